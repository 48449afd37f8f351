"""Why a process of the flow could not start, reported to the command that started it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

# Writes up to this size are not mixed with those of other processes.
_MOST_BYTES = 4096


class StartFailures:
    """Collects what the processes of a flow, forked from this one, fail with.

    Replicas fail alike; each reason is kept once.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._noticed: list[str] = []

    def watch(self, start: Callable[..., Any]) -> Callable[..., Any]:
        """`start`, which runs in the new process, with its failures reported."""

        def watched(*arguments: Any, **options: Any) -> Any:
            try:
                return start(*arguments, **options)
            except SystemExit as end:
                # An executor of ours that says why; nothing else needs to be printed.
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
        os.write(self._write, line.encode()[: _MOST_BYTES - 1] + b"\n")

    def add(self, reason: str) -> None:
        """What this process noticed itself."""
        self._noticed.append(reason)

    def reasons(self) -> list[str]:
        """What was reported so far."""
        try:
            reported = os.read(self._read, 1 << 16).decode(errors="replace").splitlines()
        except BlockingIOError:
            reported = []
        return list(dict.fromkeys([*reported, *self._noticed]))
