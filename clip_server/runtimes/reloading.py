"""Towers that return their memory while they are not used."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Generic, TypeVar

from clip_server.errors import WeightsError
from clip_server.launch.process_setup import return_freed_memory

T = TypeVar("T")


class Reloadable(Generic[T]):
    """A loaded tower that can be unloaded, and is loaded again by its next use. Thread-safe.

    tower: as first loaded.
    reload: loads it again; None: it stays loaded.
    files: that it is loaded from, which may not change meanwhile: embeddings of other weights
        would be of no use next to those made before.
    freeing: the context in which its memory is freed.
    """

    def __init__(
        self,
        tower: T,
        reload: Callable[[], T] | None = None,
        files: Sequence[Path] = (),
        freeing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._tower: T | None = tower
        self._reload, self._freeing = reload, freeing
        self._files = {file: _state(file) for file in files}
        self._lock = threading.Lock()
        self._users = 0
        self._last_used = time.monotonic()

    @property
    def is_loaded(self) -> bool:
        """Whether it is in memory."""
        return self._tower is not None

    @contextmanager
    def use(self) -> Iterator[T]:
        """The tower, which stays loaded meanwhile. All users wait while it is loaded again.

        Raises:
            WeightsError, ConfigurationError: it cannot be: its files are gone, or have changed.
        """
        with self._lock:
            tower = self._tower
            if tower is None:
                tower = self._tower = self._load_again()
            self._users += 1
        try:
            yield tower
        finally:
            with self._lock:
                self._users -= 1
                self._last_used = time.monotonic()

    def unload(self, idle_seconds: float) -> bool:
        """Frees its memory if it was not used for so long. Returns whether it did."""
        with self._lock:
            is_idle = not self._users and time.monotonic() - self._last_used >= idle_seconds
            if self._tower is None or self._reload is None or not is_idle:
                return False
            with self._freeing():
                self._tower = None
                gc.collect()  # modules of torch refer to each other
        return_freed_memory()
        return True

    def _load_again(self) -> T:
        assert self._reload is not None
        for file, state in self._files.items():
            if _state(file) != state:
                raise WeightsError(f"{file} has changed since the server started: restart it")
        return self._reload()


def _state(file: Path) -> tuple[int, ...]:
    """What differs if a file was replaced.

    Raises:
        WeightsError: it is gone.
    """
    try:
        found = file.stat()
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns, found.st_ino
