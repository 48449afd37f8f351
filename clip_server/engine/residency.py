"""Towers that are in memory only while they are used."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from clip_server.engine.workers import Workers
from clip_server.models.converted import Tower
from clip_server.runtimes.reloading import Reloadable

log = logging.getLogger(__name__)

# Between two looks for towers that are idle; more often if they may be idle for less.
_LOOK_SECONDS = 1.0


class Residency:
    """Unloads the towers that nobody uses, and loads them again. Use it from one event loop.

    towers: those of the runtime.
    idle_seconds: a tower that is not used for so long is unloaded.
    """

    def __init__(self, towers: Mapping[Tower, Reloadable[Any]], idle_seconds: float) -> None:
        self._towers, self._idle_seconds = towers, idle_seconds
        # For which event loop: one that was closed is not told that its tower is loaded.
        self._loading: dict[Tower, asyncio.AbstractEventLoop] = {}
        # A thread for each, so that neither waits for the other.
        self._loaders = Workers(len(towers), "load")
        self._closed = threading.Event()
        threading.Thread(target=self._unload_idle, name="unload", daemon=True).start()

    def is_loaded(self, tower: Tower) -> bool:
        """Whether a tower is in memory."""
        return self._towers[tower].is_loaded

    def load(self, tower: Tower, finish: Callable[[bool], None]) -> None:
        """Loads a tower in a thread, unless that is in progress, then calls `finish` with whether
        it is loaded."""
        loop = asyncio.get_running_loop()
        if self._loading.get(tower) is loop:
            return
        self._loading[tower] = loop

        def finish_loading(is_loaded: bool) -> None:
            self._loading.pop(tower, None)
            finish(is_loaded)

        self._loaders.submit(lambda: self._load(tower), finish_loading)

    def close(self) -> None:
        """Ends the threads."""
        self._closed.set()
        self._loaders.close()

    def _load(self, tower: Tower) -> bool:
        started = time.perf_counter()
        try:
            with self._towers[tower].use():
                seconds = time.perf_counter() - started
        except Exception:
            log.exception("the %s tower could not be loaded again", tower)
            return False
        log.info("the %s tower is loaded again, in %.1f s", tower, seconds)
        return True

    def _unload_idle(self) -> None:
        while not self._closed.wait(min(_LOOK_SECONDS, self._idle_seconds / 4)):
            for tower, reloadable in self._towers.items():
                if reloadable.unload(self._idle_seconds):
                    log.info(
                        "the %s tower is unloaded: it was not used for %g s",
                        tower,
                        self._idle_seconds,
                    )
