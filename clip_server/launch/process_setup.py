"""What every process of the server does about its parent and the outside world."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import io
import mmap
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_M_ARENA_MAX = -8  # malloc.h of glibc
_ARENAS = 2
# A process is idle if it used less than this share of a core for this long.
_IDLE_SECONDS, _IDLE_SHARE = 5.0, 0.05
# Growth that is worth returning.
_GROWTH_BYTES = 16 << 20


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


def limit_malloc_arenas() -> None:
    """Has all threads share two heaps, in this process and those it forks (glibc only).

    By default each thread has its own, so memory freed by one cannot be used for the next image,
    decoded by another, and the process grows for hours. Nothing gets slower: the libraries that
    allocate in parallel have allocators of their own.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl has no such call, nor the heaps
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)


def return_memory_when_idle() -> None:
    """Starts a thread that returns freed memory to the system while this process is idle (glibc
    only).

    Freed memory lies between blocks that are still used, so malloc keeps it; returning it takes
    milliseconds, as does getting it back. Thus it is returned only when nothing is being computed,
    and only if the process has grown since it last was.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        threading.Thread(target=_trim_when_idle, name="malloc-trim", daemon=True).start()


def _trim_when_idle() -> None:
    malloc_trim = ctypes.CDLL(None).malloc_trim
    smallest = _resident_bytes()
    while True:
        used = time.process_time()
        time.sleep(_IDLE_SECONDS)
        is_idle = time.process_time() - used < _IDLE_SHARE * _IDLE_SECONDS
        if is_idle and _resident_bytes() > smallest + _GROWTH_BYTES:
            malloc_trim(0)
            smallest = _resident_bytes()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * mmap.PAGESIZE


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
