"""What every process of the server does about its parent and the outside world."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import io
import os
import signal
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_M_ARENA_MAX = -8  # malloc.h of glibc
_ARENAS = 2


def follow_parent() -> None:
    """Leaves it to the parent when this process ends. Call it in the event loop's thread.

    A terminal's Ctrl-C reaches every process at once; the parent alone heeds it, and ends the
    others in an order in which nothing under way is lost. And when the parent itself ends,
    however that happens, this process gets SIGTERM (on Linux): Jina's own clean-up runs in the
    parent, so one that is killed would leave its children behind, holding their ports.
    """
    with contextlib.suppress(RuntimeError, NotImplementedError):
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the call above took hold
        os.kill(os.getpid(), signal.SIGTERM)


def share_heaps() -> None:
    """Has all threads share two heaps, in this process and those it forks (on Linux).

    glibc gives each thread one of its own. What a picture leaves free in one is then of no use
    to the next picture, decoded by another thread, and the memory grows for hours. Nothing gets
    slower: the libraries that allocate while they hold the cores have allocators of their own.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl has no such call, nor the heaps
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)


def bypass_proxies() -> None:
    """Has gRPC ignore the environment's proxies, in this process and those it forks.

    The server's own calls, from process to process, would never get through one. The hub is
    still reached through a proxy: its client knows nothing of this variable.
    """
    # An empty value stands before http_proxy and https_proxy, and means none.
    os.environ["grpc_proxy"] = ""  # noqa: SIM112


def tolerate_closed_output() -> None:
    """Lets stdin, stdout and stderr be closed at any time, for this process and those it forks.

    A server outlives whoever reads its log. What cannot be written, because the reader of a pipe
    has gone or the disk is full, is dropped. Call it once, before anything is written.
    """
    # A closed stream leaves its number to the next file or socket, which would then receive what
    # libraries print.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = _tolerant(1, sys.stdout), _tolerant(2, sys.stderr)


def _tolerant(number: int, stream: TextIO | None) -> TextIO:
    encoding, errors = (stream.encoding, stream.errors) if stream else ("utf-8", "replace")
    buffer = io.BufferedWriter(_TolerantFile(number, "wb", closefd=False))
    return io.TextIOWrapper(buffer, encoding, errors, line_buffering=True)


class _TolerantFile(io.FileIO):
    def write(self, data: ReadableBuffer) -> int:
        written = None  # as of a full pipe that does not block
        with contextlib.suppress(OSError):
            written = super().write(data)
        return memoryview(data).nbytes if written is None else written
