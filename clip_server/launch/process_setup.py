"""Process setup: signals, the parent's death, malloc arenas, proxies, closed output, event loop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import io
import mmap
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MAX_ARENAS = 2
_MADV_DONTNEED = 4  # sys/mman.h of Linux
# The beginning of a mapping in /proc/self/smaps.
_MAPPING = re.compile(r"^(?=[0-9a-f]+-[0-9a-f]+ )", re.MULTILINE)
# Blocks of this size and more are returned when they are freed, and free memory at the end of a
# heap when it is larger than that.
_LARGE_BLOCK, _LARGE_END = 1 << 20, 8 << 20
# Between two looks at what malloc keeps, and how many of them a process is idle for, which means
# that it used less than this share of a core, before all of it is returned.
_LOOK_SECONDS, _IDLE_LOOKS, _IDLE_SHARE = 1.0, 5, 0.05
# New objects after which the garbage collector looks at the young ones; Python's own 700 are made
# by a handful of requests.
_COLLECTED_OBJECTS = 10_000
# Growth that is worth returning.
_GROWTH_BYTES = 8 << 20


def die_with_parent() -> None:
    """Makes this process ignore Ctrl-C and exit when its parent does (on Linux).

    Call it in the thread of the event loop. A terminal's Ctrl-C, `timeout` and others send signals
    to a whole process group, which this process leaves: only the parent handles them, and stops
    the others in an order that loses no request in flight.
    If the parent is killed, it can no longer do that: the kernel then sends SIGTERM to this
    process, which would otherwise live on and hold its port.
    """
    with contextlib.suppress(RuntimeError, NotImplementedError):
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent ended before prctl took effect
        os.kill(os.getpid(), signal.SIGTERM)


def limit_malloc_arenas() -> None:
    """Makes all threads share two malloc arenas, in this process and its forks (glibc only).

    By default each thread allocates from an arena of its own. Memory that decoding an image leaves
    free in one arena cannot be used by the next image, decoded on another thread, so that memory
    grows for hours. Nothing gets slower: the libraries that allocate in hot loops have allocators
    of their own.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl has neither mallopt nor arenas
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _MAX_ARENAS)


def return_large_blocks() -> None:
    """Makes malloc return large blocks of this process when they are freed (glibc only).

    Once one has been freed, malloc would keep all others up to its size, 32 MiB at most: messages,
    and the images in them. Not for processes that compute with malloc's memory: getting it anew for
    every activation takes a tenth of their time.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
            libc.mallopt(_M_TRIM_THRESHOLD, _LARGE_END)


def return_memory_regularly() -> None:
    """Starts a thread that returns freed memory to the system (glibc only).

    Freed memory lies between blocks that are still used, so malloc keeps it, and the activations
    and images of each batch find other holes than those before. Returning it takes milliseconds, as
    does getting it back: it is returned once a second at most, and only if the process has grown
    since it last was, or has become idle.
    """
    if _can_trim():
        threading.Thread(target=_trim_regularly, name="malloc-trim", daemon=True).start()


def spare_garbage_collector() -> None:
    """Excludes what this process holds now from garbage collection; call it once it is ready.

    Modules and models live until the end. Looking through them takes a tenth of a second, in which
    nothing is answered, and copies the memory that is shared with the parent process.
    """
    gc.freeze()
    gc.set_threshold(_COLLECTED_OBJECTS, *gc.get_threshold()[1:])


def return_freed_memory() -> None:
    """Returns freed memory to the system at once, after much of it was freed (glibc only)."""
    if _can_trim():
        ctypes.CDLL(None).malloc_trim(0)


def unmap_read_pages() -> None:
    """Unmaps the pages of files that this process has only read, such as those of libraries, which
    imports read for the most part; a page that is needed again is mapped again (Linux only).

    Call it where few of them are.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for mapping in _MAPPING.split(Path("/proc/self/smaps").read_text("utf-8"))[1:]:
        addresses, rights, _, _, inode = mapping.split(maxsplit=5)[:5]
        # What has been written to, as when it was relocated, is anonymous and would be lost.
        is_read = "w" not in rights and re.search(r"^Anonymous: +0 kB", mapping, re.MULTILINE)
        if inode != "0" and is_read:
            start, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def raise_descriptor_limit() -> None:
    """Lets this process have as many open files and connections as the system allows it to."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _can_trim() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")


def _trim_regularly() -> None:
    size, idle_looks = _anonymous_bytes(), 0
    while True:
        used = time.process_time()
        time.sleep(_LOOK_SECONDS)
        is_idle = time.process_time() - used < _IDLE_SHARE * _LOOK_SECONDS
        idle_looks = idle_looks + 1 if is_idle else 0
        if idle_looks == _IDLE_LOOKS or _anonymous_bytes() > size + _GROWTH_BYTES:
            return_freed_memory()
            size = _anonymous_bytes()


def _anonymous_bytes() -> int:
    """Resident memory that is not of files, such as mapped weights."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text("ascii").split())
    return (resident - shared) * mmap.PAGESIZE


def bypass_proxies() -> None:
    """Makes gRPC ignore the environment's proxies, in this process and its forks.

    A proxy would never forward the server's calls from process to process. The Hugging Face hub
    is still reached through a proxy: its client does not read this variable.
    """
    # gRPC reads it before http_proxy and https_proxy; an empty value means no proxy.
    os.environ["grpc_proxy"] = ""  # noqa: SIM112


def use_uvloop() -> None:
    """Makes this process and its forks run their event loops on uvloop, where it is installed.

    It comes with Jina, except on Windows, and serves a fifth to a third more requests.
    """
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def tolerate_closed_output() -> None:
    """Keeps this process and its forks running when stdin, stdout or stderr is closed.

    A server outlives the reader of its log. Output that cannot be written, because the pipe is
    closed or the disk is full, is dropped. Call it once, before anything is written.
    """
    # The next file or socket opened would get the descriptor of a closed stream, and receive
    # the output of libraries.
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
