"""Starts processes that do not outlive the tests, even if those are killed."""

from __future__ import annotations

import atexit
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import IO, Any

import psutil


def popen(command: Sequence[Any], **options: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen`, for a process that is killed when this one has ended."""
    process = subprocess.Popen(command, **options)
    watched = _watched()
    watched.write(b"%d\n" % process.pid)
    watched.flush()
    return process


@cache
def _watched() -> IO[bytes]:
    """What a process of its own reads until this one ends, however that happens."""
    guard = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, start_new_session=True
    )
    atexit.register(guard.communicate)
    assert guard.stdin is not None
    return guard.stdin


def _kill_at_end_of_input() -> None:
    started = []
    for line in sys.stdin:
        with suppress(psutil.Error):
            started.append(psutil.Process(int(line)))
    for process in started:
        with suppress(psutil.Error):  # most of them have ended
            for each in [*process.children(recursive=True), process]:
                each.kill()


if __name__ == "__main__":
    _kill_at_end_of_input()
