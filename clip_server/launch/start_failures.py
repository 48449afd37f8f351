"""Collects the reasons why processes of the flow could not start."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

# Writes to a pipe up to this size are atomic (PIPE_BUF on Linux).
_MAX_BYTES = 4096


class StartFailures:
    """Receives startup errors from the processes of a flow, forked from this one, over a pipe.

    Each reason is kept once: replicas tend to fail alike.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._noticed: list[str] = []

    def watch(self, start: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps `start`, which runs in a new process, to report its exceptions."""

        def watched(*arguments: Any, **options: Any) -> Any:
            try:
                return start(*arguments, **options)
            except SystemExit as end:
                # One of our executors exits with the reason; there is no need to print more.
                if isinstance(end.code, str):
                    self.report(end.code.removeprefix("clip_server: "))
                    sys.exit(1)
                raise
            except Exception as error:
                self.report(f"{type(error).__name__}: {error}")
                raise

        return watched

    def report(self, reason: str) -> None:
        """Adds a reason, as one line."""
        line = " ".join(reason.split())
        os.write(self._write, line.encode()[: _MAX_BYTES - 1] + b"\n")

    def add(self, reason: str) -> None:
        """Adds a reason that this process found."""
        self._noticed.append(reason)

    def reasons(self) -> list[str]:
        """The reasons reported so far."""
        try:
            reported = os.read(self._read, 1 << 16).decode(errors="replace").splitlines()
        except BlockingIOError:
            reported = []
        return list(dict.fromkeys([*reported, *self._noticed]))
