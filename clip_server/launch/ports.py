"""Checks the addresses that a server listens on, and finds free ports."""

from __future__ import annotations

import errno
import os
import random
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from clip_server.errors import ConfigurationError

# Ports for executors: below those that systems give to outgoing connections.
CHOSEN_FROM = range(16384, 32768)
# Sockets by which this process and its forks keep ports; see `reserve`.
_reserved: dict[int, list[socket.socket]] = {}


def check(host: str, ports: Sequence[int]) -> None:
    """Raises ConfigurationError where `host` is not this machine's, or a port is not free."""
    taken = []
    for port in ports:
        try:
            _bind(host, port)
        except socket.gaierror:
            raise ConfigurationError(f"host: no machine is known by the name {host!r}") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                taken.append(port)
            elif error.errno == errno.EACCES:
                raise ConfigurationError(
                    f"port {port} needs administrator rights: choose one above 1023"
                ) from None
            else:
                raise ConfigurationError(
                    f"host: {host} is not an address of this machine; use 127.0.0.1 for this "
                    "machine only, or 0.0.0.0 for all its network interfaces"
                ) from None
    if taken:
        held = " and ".join(f"{port}{_holder(port)}" for port in taken)
        raise ConfigurationError(
            f"in use on {host}: port {held}; stop that process, or choose another port with "
            "--port or `port:` in the flow"
        )


def reserve(host: str, ports: Sequence[int]) -> None:
    """Keeps ports for the servers that this process forks, which share them by SO_REUSEPORT.

    Another server of the same user could otherwise join them, and get a part of their connections.

    Raises:
        ConfigurationError: as `check`.
    """
    for port in ports:
        for family, kind, protocol, _, address in _addresses(host, port):
            keeper = socket.socket(family, kind, protocol)
            try:
                keeper.bind(address)
            except OSError:  # of another server, or of connections that were just closed
                check(host, [port])
                keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                keeper.bind(address)
            # Set only now: the port was nobody else's.
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            _reserved.setdefault(port, []).append(keeper)


def free_port(host: str) -> int:
    """A port on which nothing listens."""
    for port in random.sample(CHOSEN_FROM, len(CHOSEN_FROM)):
        if is_free(host, port):
            return port
    raise ConfigurationError(f"no port is free on {host}")


def is_free(host: str, port: int) -> bool:
    """Whether a server of this process, or of its forks, could listen there."""
    try:
        if port not in _reserved:
            _bind(host, port)
    except OSError:
        return False
    return True


def _bind(host: str, port: int) -> None:
    """Raises OSError where a server could not listen there."""
    for family, kind, protocol, _, address in _addresses(host, port):
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":  # as servers do: ignore connections that were just closed
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)


def _addresses(host: str, port: int) -> list[Any]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)


def _holder(port: int) -> str:
    """The process that listens on a port, in parentheses; empty if the system does not tell."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path("/proc/net", table).read_text("ascii").splitlines()[1:]:
                _, local, _, state, *_, inode = line.split()[:10]
                if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{inode}]")
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if str(link.readlink()) in sockets:
                process = link.parents[1]
                return f" ({(process / 'comm').read_text('utf-8').strip()}, pid {process.name})"
    return ""
