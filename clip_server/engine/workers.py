"""Threads for the work that would block an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

_Task: TypeAlias = tuple[asyncio.AbstractEventLoop, Callable[[], Any], Callable[[Any], None]]


class Workers:
    """A fixed number of threads with one task queue.

    `concurrent.futures` does the same with two futures per task, which took a fifth of the
    engine's time for a text.
    """

    def __init__(self, count: int, name: str) -> None:
        self.count = count
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], Any], finish: Callable[[Any], None]) -> None:
        """Runs `work`, which must not raise, in a thread, then calls `finish` with its result in
        the running event loop."""
        self._tasks.put((asyncio.get_running_loop(), work, finish))

    def close(self) -> None:
        """Drops the tasks that no thread has started, and waits for the others."""
        with contextlib.suppress(Empty):
            while True:
                self._tasks.get_nowait()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            loop, work, finish = task
            result = work()
            with contextlib.suppress(RuntimeError):  # the loop was closed: no one waits
                loop.call_soon_threadsafe(finish, result)
            del task, work, finish, result  # or the thread would hold them while it waits
