"""Files that are read again when they change, such as keys and certificates."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from clip_server.errors import ConfigurationError

log = logging.getLogger(__name__)

# How often a change is looked for.
_CHECK_SECONDS = 0.5
_Content = TypeVar("_Content")


class WatchedFiles(Generic[_Content]):
    """What files hold, as of a moment ago. Safe to call from several threads.

    Files that cannot be used, as while they are being replaced, change nothing: the log says so
    once, and they are read again until they can.

    name: of the content, in the plural, for the log.
    read: reads the files. Raises OSError, ValueError or ConfigurationError if they cannot be used.

    Raises:
        OSError, ValueError, ConfigurationError: as `read`.
    """

    def __init__(self, name: str, files: Sequence[Path], read: Callable[[], _Content]) -> None:
        self._name, self._files, self._read = name, files, read
        self._lock = threading.Lock()
        self._fault = ""
        self._signature = self._sign()
        self._content = read()
        self._checked = time.monotonic()

    def current(self) -> _Content:
        """The content of the files, at most half a second old."""
        with self._lock:
            now = time.monotonic()
            if now - self._checked >= _CHECK_SECONDS:
                self._checked = now
                self._refresh()
            return self._content

    def _refresh(self) -> None:
        signature = self._sign()  # before they are read: they may change meanwhile
        if signature == self._signature:
            self._fault = ""
            return
        try:
            self._content = self._read()
        except (OSError, ValueError, ConfigurationError) as error:
            if str(error) != self._fault:
                log.error("the %s stay as they were: %s", self._name, error)
            self._fault = str(error)
            return
        self._signature, self._fault = signature, ""
        log.info("the %s were read again", self._name)

    def _sign(self) -> list[tuple[int, ...]]:
        """Changes with any of the files, also where a link is pointed at another one."""
        return [*map(_state, self._files)]


def _state(file: Path) -> tuple[int, ...]:
    try:
        status = file.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino
