"""Heartbeats: the processes of a server show each other, in shared memory, that they are alive.

A process that is stopped, or stuck in a driver, keeps its connections and its port: only its
silence gives it away. Beating needs no network, so a process that is merely busy beats on.
"""

from __future__ import annotations

import math
import mmap
import threading
import time
from collections.abc import Callable

INTERVAL_SECONDS = 0.5
_PORTS, _COUNTER_BYTES = 1 << 16, 8
# The most that one look may add to a silence: whoever looks may have been asleep as well, as on a
# machine that was suspended.
_LONGEST_STEP = 1.0

# A counter for each port. Only the pages of ports in use take memory.
_counters: mmap.mmap | None = None
_max_batch_seconds = math.inf


def share(max_batch_seconds: float) -> None:
    """Makes this process and those that it forks from now on see each other's heartbeats.

    max_batch_seconds: the bound with which `beat_in_background` asks whether one is stuck.
    """
    global _counters, _max_batch_seconds
    _counters = mmap.mmap(-1, _PORTS * _COUNTER_BYTES)
    _max_batch_seconds = max_batch_seconds


def beat(port: int) -> None:
    """Shows that the process that listens on `port` is alive."""
    if _counters is not None:
        _write(port, _read(port) + 1)


def beat_in_background(port: int, is_stuck: Callable[[float], bool]) -> None:
    """Starts a thread that beats for the process that listens on `port`, while it is not stuck.

    is_stuck: whether its work does not come to an end, given the seconds that it may take.
    """
    if _counters is not None:
        threading.Thread(target=_keep_beating, args=(port, is_stuck), daemon=True).start()


def _keep_beating(port: int, is_stuck: Callable[[float], bool]) -> None:
    while True:
        if not is_stuck(_max_batch_seconds):
            beat(port)
        time.sleep(INTERVAL_SECONDS)


def forget(port: int) -> None:
    """Forgets the beats of a process that has ended: its successor has not begun to beat."""
    if _counters is not None:
        _write(port, 0)


class Pulse:
    """Measures the silence of the process that listens on a port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._count, self._silence, self._looked = 0, 0.0, time.monotonic()

    def silence(self) -> float:
        """Seconds without a heartbeat, as seen by regular calls; 0 for a process that never beat,
        such as one of another machine."""
        now, count = time.monotonic(), _read(self._port) if _counters is not None else 0
        self._silence += min(now - self._looked, _LONGEST_STEP)
        self._looked = now
        if count == 0 or count != self._count:
            self._count, self._silence = count, 0.0
        return self._silence


def _read(port: int) -> int:
    assert _counters is not None
    return int.from_bytes(_counters[_COUNTER_BYTES * port : _COUNTER_BYTES * (port + 1)], "little")


def _write(port: int, count: int) -> None:
    assert _counters is not None
    _counters[_COUNTER_BYTES * port : _COUNTER_BYTES * (port + 1)] = count.to_bytes(
        _COUNTER_BYTES, "little"
    )
