"""How requests reach the server. A transport's libraries load when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_client.address import Address
    from clip_client.transports.base import Transport

_MODULES = {
    "grpc": "grpc",
    "grpcs": "grpc",
    "http": "http",
    "https": "http",
    "ws": "websocket",
    "wss": "websocket",
}


def open_transport(address: Address, headers: dict[str, str]) -> Transport:
    """The transport for the address's scheme. It connects at its first request."""
    module = import_module(f"clip_client.transports.{_MODULES[address.scheme]}")
    transport: Transport = module.open_transport(address, headers)
    return transport
