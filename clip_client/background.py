"""The event loop that all clients of a process share, in a thread of its own.

Connections live on it, so one Client serves any number of threads, and of event loops that come
and go (`asyncio.run` ends its own each time). A forked child starts another.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

# Re-entrant, because a finalizer of a Client may run, and submit, anywhere.
_lock = threading.RLock()
_current: _LoopThread | None = None


class _LoopThread:
    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(_on_exception)
        thread = threading.Thread(target=_run, args=(self.loop,), name="clip-client", daemon=True)
        thread.start()
        # At the interpreter's exit. Finalizers run last in, first out: connections close before.
        weakref.finalize(self, _stop, self.pid, self.loop, thread)


def submit(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Runs a coroutine on the shared loop; cancelling the future cancels it."""
    global _current
    with _lock:
        if _current is None or _current.pid != os.getpid():
            _current = _LoopThread()
        return asyncio.run_coroutine_threadsafe(_watched(work), _current.loop)


async def _watched(work: Coroutine[Any, Any, T]) -> T:
    # asyncio would log the error of a task whose caller has given up.
    task = asyncio.current_task()
    assert task is not None
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await work


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    # Closing connections get a moment; requests still in flight are cancelled.
    loop.run_until_complete(_settle(1.0))
    loop.close()


async def _settle(seconds: float) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        _, running = await asyncio.wait(others, timeout=seconds)
        for task in running:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


def _stop(pid: int, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if pid == os.getpid():
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def _on_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # If a process has several loops, grpcio 1.67 wakes all of them for an event of one.
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)


def _after_fork() -> None:
    # The lock may have been held in the parent, by a thread that the child does not have.
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
