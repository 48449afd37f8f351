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
# A slot for each port, and for the gateways, which may share theirs.
_PORTS, _SLOTS, _COUNTER_BYTES = 1 << 16, 1 << 17, 8
# The most that one look may add to a silence: whoever looks may have been asleep as well, as on a
# machine that was suspended.
_LONGEST_STEP = 1.0

# A counter for each slot. Only the pages of slots in use take memory.
_counters: mmap.mmap | None = None
_max_batch_seconds = math.inf


def share(max_batch_seconds: float) -> None:
    """Makes this process and those that it forks from now on see each other's heartbeats.

    max_batch_seconds: the bound with which `beat_in_background` asks whether one is stuck.
    """
    global _counters, _max_batch_seconds
    _counters = mmap.mmap(-1, _SLOTS * _COUNTER_BYTES)
    _max_batch_seconds = max_batch_seconds


def gateway_slot(number: int) -> int:
    """The slot of a gateway; that of another process is the port that it listens on."""
    return _PORTS + number


def beat(slot: int) -> None:
    """Shows that the process of a slot is alive."""
    if _counters is not None:
        _write(slot, _read(slot) + 1)


def beat_in_background(slot: int, is_stuck: Callable[[float], bool]) -> None:
    """Starts a thread that beats for the process of a slot, while it is not stuck.

    is_stuck: whether its work does not come to an end, given the seconds that it may take.
    """
    if _counters is not None:
        threading.Thread(target=_keep_beating, args=(slot, is_stuck), daemon=True).start()


def _keep_beating(slot: int, is_stuck: Callable[[float], bool]) -> None:
    while True:
        if not is_stuck(_max_batch_seconds):
            beat(slot)
        time.sleep(INTERVAL_SECONDS)


def forget(slot: int) -> None:
    """Forgets the beats of a process that has ended: its successor has not begun to beat."""
    if _counters is not None:
        _write(slot, 0)


class Pulse:
    """Measures the silence of the process of a slot."""

    def __init__(self, slot: int) -> None:
        self._slot = slot
        self._count, self._silence, self._looked = 0, 0.0, time.monotonic()

    def silence(self) -> float:
        """Seconds without a heartbeat, as seen by regular calls; 0 for a process that never beat,
        such as one of another machine."""
        now, count = time.monotonic(), _read(self._slot) if _counters is not None else 0
        self._silence += min(now - self._looked, _LONGEST_STEP)
        self._looked = now
        if count == 0 or count != self._count:
            self._count, self._silence = count, 0.0
        return self._silence


def _read(slot: int) -> int:
    assert _counters is not None
    return int.from_bytes(_counters[_COUNTER_BYTES * slot : _COUNTER_BYTES * (slot + 1)], "little")


def _write(slot: int, count: int) -> None:
    assert _counters is not None
    _counters[_COUNTER_BYTES * slot : _COUNTER_BYTES * (slot + 1)] = count.to_bytes(
        _COUNTER_BYTES, "little"
    )
