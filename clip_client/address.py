"""Parses the server's address, `scheme://host:port`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from clip_client.errors import ConnectionFailedError, InvalidInputError
from clip_client.proxies import through

# The default port of each scheme.
SCHEMES = {
    "grpc": 51000,
    "grpcs": 443,
    "http": 80,
    "https": 443,
    "ws": 80,
    "wss": 443,
    # NVIDIA's Triton Inference Server, over HTTP and gRPC.
    "triton": 8000,
    "tritons": 443,
    "triton+grpc": 8001,
    "triton+grpcs": 443,
}
_SECURE = {"grpcs", "https", "wss", "tritons", "triton+grpcs"}
# clip-as-service's names.
_ALIASES = {"websocket": "ws", "websockets": "wss"}


@dataclass(frozen=True)
class Address:
    """A server and its protocol."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @classmethod
    def parse(cls, server: str) -> Address:
        """Reads `grpc://host:port`, or another of `SCHEMES`. Raises InvalidInputError."""
        server = server.strip()
        written, separator, rest = server.partition("://")
        scheme = _ALIASES.get(written.lower(), written.lower())
        allowed = ", ".join(f"{name}://" for name in SCHEMES)
        if not separator:
            raise InvalidInputError(f"{server!r} has no scheme; did you mean 'grpc://{server}'?")
        if scheme not in SCHEMES:
            raise InvalidInputError(f"unsupported URL scheme {written!r}: use one of {allowed}")
        try:
            parts = urlsplit(f"{scheme}://{rest}")
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidInputError(f"{server!r} is no address: {error}") from None
        if not host or parts.username is not None or parts.query or parts.fragment:
            raise InvalidInputError(f"{server!r} is not of the form {scheme}://host:port")
        path = parts.path.rstrip("/")
        if path and "grpc" in scheme:
            raise InvalidInputError(f"{server!r}: a gRPC address has no path")
        return cls(scheme, host, SCHEMES[scheme] if port is None else port, path)

    @property
    def secure(self) -> bool:
        return self.scheme in _SECURE

    @property
    def target(self) -> str:
        """`host:port`, an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.target}{self.path}"

    def unreachable(self, reason: object, proxy: str | None = None) -> ConnectionFailedError:
        """The error for a server that could not be reached, with advice."""
        detail = str(reason).strip() or type(reason).__name__
        if isinstance(reason, ConnectionError) and reason.errno:
            detail = os.strerror(reason.errno)
        server = "tritonserver" if "triton" in self.scheme else "python -m clip_server"
        advice = f"Is it running there ({server}), and does that port speak {self.scheme}://?"
        if proxy:
            advice = f"Is that proxy right? NO_PROXY={self.host} goes without it."
        error = ConnectionFailedError(
            f"no server answered at {self}{through(proxy)} ({detail}). {advice}"
        )
        error.away = True
        return error
