"""What the three protocols share: where they listen and what they answer with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_server.rpc.multiplexing import Call

# What is under way when the server is told to end has this long to finish.
GRACE_SECONDS = 8.0
# Requests of one connection that may be under way before more are read.
IN_FLIGHT = 64


@dataclass(frozen=True)
class Tls:
    """PEM files of a server's key and its chain of certificates."""

    key: Path
    certificate: Path


@dataclass
class Listener(ABC):
    """One protocol on one port.

    call: answers a clip.v1 request; what goes wrong is in the response.
    metrics: what each replica of the encoder has done.
    jina: Jina's own handler of requests.
    max_request_bytes: of one message or HTTP body.
    max_request_items: of one request, as the encoder says.
    args: the gateway's arguments as Jina parsed them.
    """

    host: str
    port: int
    call: Call
    metrics: Callable[[], Awaitable[dict[str, dict[str, float]]]]
    jina: Any
    max_request_bytes: int
    max_request_items: Callable[[], int]
    args: Namespace
    tls: Tls | None = None

    @property
    def hosts(self) -> Any:  # uvicorn and websockets hand it to asyncio, but name it a str
        """What asyncio listens on, to which `::` is IPv6 alone; gRPC takes it for IPv4 as well."""
        return ["::", "0.0.0.0"] if self.host == "::" else [self.host]

    @abstractmethod
    async def start(self) -> None:
        """Returns when the port is open."""

    @abstractmethod
    async def stop(self) -> None:
        """Takes nothing new, lets what is under way finish, and closes the port."""
