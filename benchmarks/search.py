"""The leg `search`: collections of several sizes, served by an indexer and beside two libraries."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import environments, workload
from benchmarks.options import Options
from benchmarks.peers import DRIVERS, Peers
from benchmarks.processes import Driver, NotAvailableError, Server
from benchmarks.report import Figures, Goal, Leg

# The index methods of the service, by column, and the libraries.
METHODS = {f"clip-server {method}": method for method in ("Flat", "IVF", "HNSW32")}
LIBRARIES = {"hnswlib": "hnswlib", "Milvus Lite": "milvus_lite"}
# What the filters keep of the rows, in percent; None: no filter.
KEPT = (None, 1, 50)
LIMIT = 10
# The goals are for a collection of so many rows.
GOALS_AT = 50_000
INSERT, SEARCHING, RECALL, REOPEN = (
    "insert, rows/s",
    "in the index, p50 ms",
    "recall@10",
    "reopen s",
)


def search(peers: Peers, options: Options) -> Leg:
    """Inserting into collections, searching them, and opening them again."""
    found: dict[str, dict[str, list[float]]] = {}
    for number in range(1, options.rounds + 1):
        for size in options.sizes:
            for column in (*METHODS, *LIBRARIES):
                try:
                    values = measure(peers, column, size, options.seconds)
                except NotAvailableError as error:
                    print(f"  {column}: not available: {error}", flush=True)
                    continue
                shown = ", ".join(f"{what} {value:.4g}" for what, value in values.items())
                print(f"  round {number}, {size:,} rows, {column}: {shown}", flush=True)
                for what, value in values.items():
                    row = found.setdefault(_row(size, what), {})
                    row.setdefault(column, []).append(value)
    figures = [Figures(what, rounds) for what, rounds in found.items()]
    notes = [
        "Queries are sent one at a time, 512 dimensions. hnswlib acknowledges rows that are only "
        "in memory. The memory is that of the indexer's process, or of the one that uses the "
        "library."
    ]
    return Leg("collection", figures, _goals({each.what: each for each in figures}), notes)


def measure(peers: Peers, column: str, size: int, seconds: float) -> dict[str, float]:
    """The figures of one collection, built in a new folder: the value of each by what it is."""
    data = workload.embeddings(size)
    with TemporaryDirectory(dir=workload.CACHE) as name:
        folder = Path(name)
        connect, serve = _contestant(peers, column, folder, data)
        with closing(connect()) as driver:
            with serve():
                inserting = driver("insert")
            driver("finish")
        figures = {INSERT: size / inserting, "disk MiB": _size(folder) / 2**20}
        with closing(connect()) as driver:
            figures[REOPEN] = driver("reopen")
            with serve() as server:
                for kept in KEPT:
                    answers = driver("search", seconds=seconds, below=kept)
                    figures |= _figures_of_queries(answers, _closest(data, kept), kept)
                memory = server.memory(folder) if server else driver.memory()
        return figures | {"memory MiB": memory / 2**20}


def _contestant(
    peers: Peers, column: str, folder: Path, data: Path
) -> tuple[Callable[[], Driver], Callable[[], AbstractContextManager[Server | None]]]:
    """A driver of the collection, and the server behind it, if it needs one."""
    if column in METHODS:
        address, start = peers.indexer(column, folder, METHODS[column])
        command = [sys.executable, DRIVERS / "clip_server_search_driver.py"]
        command += [folder, data, address, METHODS[column]]
        return lambda: Driver(column, command), lambda: closing(start())
    library = LIBRARIES[column]
    command = [environments.python(library), DRIVERS / f"{library}_driver.py", folder, data]
    return lambda: Driver(column, command), nullcontext


def _figures_of_queries(
    answers: dict[str, list[Any]], closest: NDArray[np.int64], kept: int | None
) -> dict[str, float]:
    found = answers["found"]
    right = [
        len(set(one) & set(other)) for one, other in zip(found, closest.tolist(), strict=False)
    ]
    figures = {"query, p50 ms": float(np.percentile(answers["milliseconds"], 50))}
    if kept is None:
        figures["query, p95 ms"] = float(np.percentile(answers["milliseconds"], 95))
        figures[SEARCHING] = float(np.percentile(answers["searching"], 50))
    figures[RECALL] = float(np.mean(right)) / closest.shape[1]
    return {_filtered(what, kept): value for what, value in figures.items()}


def _filtered(what: str, kept: int | None) -> str:
    return what if kept is None else f"filter that keeps {kept} %: {what}"


def _row(size: int, what: str) -> str:
    return f"{size:,} rows: {what}"


@functools.cache
def _closest(data: Path, kept: int | None) -> NDArray[np.int64]:
    """The numbers of the LIMIT rows closest to each query, among those that a filter keeps."""
    rows = np.load(data / "rows.npy")
    numbers = np.arange(len(rows))
    if kept is not None:
        numbers = numbers[numbers % 100 < kept]  # as drivers/search_driver.py tags them
    kept_rows = rows[numbers].T
    queries = np.load(data / "queries.npy")
    best = [np.argsort(-(query @ kept_rows))[:LIMIT] for query in queries]
    found: NDArray[np.int64] = numbers[np.stack(best)]
    return found


def _size(folder: Path) -> int:
    return sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())


def _goals(figures: dict[str, Figures]) -> list[Goal]:
    def of(what: str, choose: Callable[[Iterable[float]], float], *methods: str) -> float | None:
        """The figure of one of the service's methods: the least or the greatest."""
        row = figures.get(_row(GOALS_AT, what))
        columns = [each for each in METHODS if METHODS[each] in methods or not methods]
        measured = [row.median(each) for each in columns if row and each in row.rounds]
        return choose(measured) if measured else None

    filtered = [of(_filtered(RECALL, kept), min) for kept in KEPT if kept is not None]
    least = [each for each in filtered if each is not None]
    where = f"{GOALS_AT:,} rows"
    return [
        Goal(f"{where}: Flat, {SEARCHING}", "<=", 15, of(SEARCHING, max, "Flat")),
        Goal(f"{where}: IVF and HNSW32, {SEARCHING}", "<=", 5, of(SEARCHING, max, "IVF", "HNSW32")),
        Goal(f"{where}: least {RECALL}", ">=", 0.95, of(RECALL, min)),
        Goal(f"{where}: least {RECALL} with a filter", ">=", 0.95, min(least, default=None)),
        Goal(f"{where}: fewest inserted rows/s", ">=", 5_000, of(INSERT, min)),
        Goal(f"{where}: longest reopening, s", "<=", 2, of(REOPEN, max)),
    ]
