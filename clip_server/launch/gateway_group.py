"""The gateways of one server: processes that share its ports, and count as one.

The system deals connections out to them, while limits, and the time that a request waits, are those
of the whole server. So each gateway writes what it has in flight to a row of its own in shared
memory, and reads the rows of the others. A row has one writer, so there is no lock that a process
could hold when it is killed.
"""

from __future__ import annotations

import mmap
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

MOST_GATEWAYS = 64
# The largest requests of all are in the last class.
SIZE_CLASSES = 16
_CELL_BYTES = 8
# Cells of the sketch of names, in each of its two halves.
_WIDTH = 1 << 16
_NAMES = 2 * _WIDTH
# Of the work on one executor: texts and images of each class, and the items of all of them.
_ITEMS = 2 * SIZE_CLASSES
_WORK_CELLS = _ITEMS + 1


class SharedCounts:
    """Numbers by name, to which each gateway adds its part.

    The parts of the others are read from count-min sketches, so that no table of names is in shared
    memory: a name has two cells, each of which it may share with other names, so that the smaller
    one is hardly ever more than its part, and never less.

    own: the row of this gateway; None: it has no siblings.
    others: their rows.
    """

    def __init__(self, own: memoryview | None = None, others: Sequence[memoryview] = ()) -> None:
        self._row, self._others = own, others
        self._own: Counter[str] = Counter()

    def add(self, name: str, number: int) -> None:
        """Adds to the part of this gateway."""
        self._own[name] += number
        if not self._own[name]:
            del self._own[name]
        if self._row is not None and self._others:
            for cell in _cells(name):
                self._row[cell] += number

    def own(self, name: str) -> int:
        """The part of this gateway."""
        return self._own[name]

    def total(self, name: str) -> int:
        """The parts of all gateways."""
        if not self._others:
            return self._own[name]
        first, second = _cells(name)
        return self._own[name] + sum(min(row[first], row[second]) for row in self._others)


def _cells(name: str) -> tuple[int, int]:
    # The same in all gateways, which are forks of one process, and known to nobody else.
    number = hash(name)
    return number % _WIDTH, _WIDTH + (number >> 16) % _WIDTH


class WorkInFlight:
    """The items in flight on one executor, of all gateways, by class of size.

    rows: its part of the row of each gateway, that of this one first.
    """

    def __init__(self, rows: Sequence[memoryview]) -> None:
        self._own, self._rows = rows[0], rows

    @property
    def own_items(self) -> int:
        """Those of this gateway."""
        return self._own[_ITEMS]

    def add(self, size_class: int, texts: int, images: int) -> None:
        """Adds to the part of this gateway."""
        own = self._own
        own[size_class] += texts
        own[SIZE_CLASSES + size_class] += images
        own[_ITEMS] += texts + images

    def up_to(self, size_class: int) -> tuple[int, int]:
        """The texts and the images of a class and of those below it."""
        texts = images = 0
        for row in self._rows:
            if row[_ITEMS]:
                texts += sum(row[: size_class + 1].tolist())
                images += sum(row[SIZE_CLASSES : SIZE_CLASSES + size_class + 1].tolist())
        return texts, images


class SharedTime:
    """When something last happened in any gateway.

    rows: a cell of each gateway, that of this one first.
    """

    def __init__(self, rows: Sequence[memoryview]) -> None:
        self._own, self._rows = rows[0], rows

    def note(self) -> None:
        """Notes that it happens in this gateway."""
        self._own[0] = time.monotonic_ns()

    def latest(self) -> float:
        """In seconds of `time.monotonic`; 0: never."""
        return max(row[0] for row in self._rows) / 1e9


class GatewayGroup:
    """What the gateways of a server share.

    size: how many there are.
    executors: of the flow.
    folder: that of their sockets, which only this user may enter; None: one gateway needs none.
    """

    def __init__(self, size: int, executors: int, folder: Path | None = None) -> None:
        self.size, self.folder = size, folder
        cells = _NAMES + 1 + executors * _WORK_CELLS
        # Only the pages in use take memory.
        memory = memoryview(mmap.mmap(-1, size * cells * _CELL_BYTES)).cast("q")
        self._rows = [memory[cells * number : cells * (number + 1)] for number in range(size)]

    def counts(self, number: int) -> SharedCounts:
        """The numbers by name, for the gateway of a number."""
        own, *others = self._own_first(number)
        return SharedCounts(own, others)

    def last_request(self, number: int) -> SharedTime:
        """When the last request came, for the gateway of a number."""
        return SharedTime([row[_NAMES : _NAMES + 1] for row in self._own_first(number)])

    def work(self, number: int, executor: int) -> WorkInFlight:
        """The work in flight on an executor, for the gateway of a number."""
        start = _NAMES + 1 + executor * _WORK_CELLS
        return WorkInFlight([row[start : start + _WORK_CELLS] for row in self._own_first(number)])

    def forget(self, number: int) -> None:
        """Clears the row of a gateway that has ended."""
        row = self._rows[number]
        row[:] = memoryview(bytes(row.nbytes)).cast("q")

    def _own_first(self, number: int) -> list[memoryview]:
        others = [row for each, row in enumerate(self._rows) if each != number]
        return [self._rows[number], *others]


_group: GatewayGroup | None = None


def form(size: int, executors: int, folder: Path) -> None:
    """Makes the gateways that this process forks from now on a group; see GatewayGroup."""
    global _group
    _group = GatewayGroup(size, executors, folder)


def formed(executors: int) -> GatewayGroup:
    """The group of this process, or one of a single gateway."""
    return _group or GatewayGroup(1, executors)


def forget(number: int) -> None:
    """Forgets what a gateway that has ended had in flight."""
    if _group is not None:
        _group.forget(number)
