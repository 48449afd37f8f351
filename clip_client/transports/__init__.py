"""How requests reach the server. Only the libraries of the transport used are loaded."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_client.address import Address
    from clip_client.tls import Trust
    from clip_client.transports.base import Transport

_MODULES = {
    "grpc": "grpc",
    "grpcs": "grpc",
    "http": "http",
    "https": "http",
    "ws": "websocket",
    "wss": "websocket",
}


def opener(scheme: str) -> Callable[[Address, dict[str, str], Trust], Transport]:
    """What makes the transport for an address with this scheme: headers to send along, and trust.

    The transport is made on the event loop it lives on. It connects at its first request.
    """
    module = import_module(f"clip_client.transports.{_MODULES[scheme]}")
    open_transport: Callable[[Address, dict[str, str], Trust], Transport] = module.open_transport
    return open_transport
