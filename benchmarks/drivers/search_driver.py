"""The base of the drivers of collections: the embeddings, their filters, and the clocks.

A driver has one collection in one folder. The tag or field `n` of row i is i modulo 100, so that
`n < 1` keeps 1 % of the rows and `n < 50` half of them.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from driver import Commands

LIMIT = 10
BATCH = 128
# Of an HNSW graph: neighbours of a node, and candidates while building it and in a search.
M, EF_CONSTRUCTION, EF = 32, 200, 128


def tag(row: int) -> int:
    return row % 100


class SearchDriver(Commands, ABC):
    """Drives one collection. The operations are `insert`, `finish`, `reopen` and `search`.

    data: a folder with `rows.npy` and `queries.npy`, see benchmarks/workload.py.
    """

    def __init__(self, folder: str, data: str) -> None:
        self.folder = Path(folder)
        self.rows = np.load(Path(data) / "rows.npy", mmap_mode="r")
        self.queries = np.load(Path(data) / "queries.npy")

    @abstractmethod
    def store(self, start: int, embeddings: Any) -> None:
        """Stores one request of rows, numbered from `start`; they are acknowledged after it."""

    @abstractmethod
    def find(self, query: Any, below: int | None) -> tuple[list[int], float]:
        """The numbers of the LIMIT closest rows, and the milliseconds that the search itself took.

        below: only rows whose `n` is less; None: all.
        """

    @abstractmethod
    def finish(self) -> None:
        """Brings the collection of the folder into the state in which it is searched fastest."""

    @abstractmethod
    def reopen(self) -> float:
        """Seconds until the collection of the folder is open and has answered one query."""

    def store_all(self) -> None:
        """Stores every row, in requests of BATCH; a store that takes several at once does so."""
        for start in range(0, len(self.rows), BATCH):
            self.store(start, np.asarray(self.rows[start : start + BATCH]))

    def insert(self) -> float:
        """Seconds until all rows are acknowledged."""
        started = time.perf_counter()
        self.store_all()
        return time.perf_counter() - started

    def search(self, seconds: float, below: int | None = None) -> dict[str, list[Any]]:
        """For each query: its milliseconds, those of the search itself, and the rows found.

        The queries are asked one at a time, all of them or as many as `seconds` allow.
        """
        answers: dict[str, list[Any]] = {"milliseconds": [], "searching": [], "found": []}
        self.find(self.queries[-1], below)
        deadline = time.perf_counter() + seconds
        for query in self.queries:
            started = time.perf_counter()
            found, searching = self.find(query, below)
            ended = time.perf_counter()
            for name, value in zip(
                answers, (1000 * (ended - started), searching, found), strict=True
            ):
                answers[name].append(value)
            if ended > deadline:
                break
        return answers


class EmbeddedDriver(SearchDriver):
    """A collection in the driver's own process."""

    @abstractmethod
    def open(self) -> None:
        """Opens the collection of the folder."""

    @abstractmethod
    def closest(self, query: Any, below: int | None) -> list[int]:
        """The numbers of the LIMIT closest rows."""

    def find(self, query: Any, below: int | None) -> tuple[list[int], float]:
        started = time.perf_counter()
        found = self.closest(query, below)
        return found, 1000 * (time.perf_counter() - started)

    def reopen(self) -> float:
        started = time.perf_counter()
        self.open()
        self.closest(self.queries[0], None)
        return time.perf_counter() - started
