"""The extent and the duration of measurements."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """rounds, and seconds of each measurement; texts of the bulk job; minutes of the soak; rows
    of the collections that are searched."""

    rounds: int
    seconds: float
    bulk: int
    minutes: float
    sizes: tuple[int, ...]


QUICK = Options(rounds=1, seconds=2, bulk=100_000, minutes=1, sizes=(5_000,))
