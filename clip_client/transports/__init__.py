"""Transports by URL scheme. Only the libraries of the one in use are imported."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_client.address import Address
    from clip_client.tls import Trust
    from clip_client.transports.base import Compression, Transport

_MODULES = {
    "grpc": "grpc",
    "grpcs": "grpc",
    "http": "http",
    "https": "http",
    "ws": "websocket",
    "wss": "websocket",
    "triton": "triton",
    "tritons": "triton",
    "triton+grpc": "triton",
    "triton+grpcs": "triton",
}


def get_transport_factory(
    scheme: str,
) -> Callable[[Address, dict[str, str], Trust, Compression | None], Transport]:
    """The function that opens a transport for a scheme: from address, headers, trust and the
    compression of requests.

    Call it on the event loop that the transport lives on. It connects at its first request.
    """
    module = import_module(f"clip_client.transports.{_MODULES[scheme]}")
    found: Callable[[Address, dict[str, str], Trust, Compression | None], Transport]
    found = module.open_transport
    return found
