"""The rows of a local collection in SQLite: the truth, from which the index is derived.

Each version of a row has a number that is never used again, so an index entry is either current
or of a number that no longer exists; it can never stand for another row.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_server.errors import ConfigurationError
from clip_server.search.filters import Compare, Condition, Every, Exists, Negation, OneOf, Some
from clip_server.search.store import Modality, Row, StoreFullError, Target, Vectors

Numbers = NDArray[np.int64]

MODALITIES: tuple[Modality, ...] = ("text", "image")
# Of one SQL statement with a parameter each.
_CHUNK = 500
_SCHEMA = """
CREATE TABLE IF NOT EXISTS collection (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS rows (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    modality INTEGER NOT NULL,
    text TEXT,
    uri TEXT,
    tags TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS embeddings (number INTEGER PRIMARY KEY, embedding BLOB NOT NULL);
"""


class RowTable:
    """The rows of one collection, in one file.

    Writes are one transaction each, and on disk when they return. Reads see whole transactions,
    and do not wait for writes.
    """

    def __init__(self, file: Path) -> None:
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        try:
            self._writer = _connect(file)
            self._writer.executescript(_SCHEMA)
            self._reader = _connect(file)
        except sqlite3.DatabaseError as error:
            raise ConfigurationError(
                f"the collection in {file} cannot be opened: {error}"
            ) from None

    def close(self) -> None:
        """Closes the file."""
        self._reader.close()
        self._writer.close()

    def setting(self, name: str) -> str | None:
        """A value kept beside the rows."""
        found = self._read("SELECT value FROM collection WHERE name = ?", [name])
        return found[0][0] if found else None

    def set(self, name: str, value: str) -> None:
        """Keeps a value beside the rows."""
        with self._transaction() as write:
            write.execute("INSERT OR REPLACE INTO collection VALUES (?, ?)", [name, value])

    def upsert(self, rows: Sequence[Row]) -> tuple[Numbers, Numbers]:
        """Stores rows, the last of those with one id; their numbers, in order, and the numbers
        that they replace."""
        with self._transaction() as write:
            replaced = self._delete(write, self._numbers_of(write, [row.id for row in rows]))
            numbers = [
                write.execute(
                    "INSERT INTO rows (id, modality, text, uri, tags) VALUES (?, ?, ?, ?, ?)",
                    (row.id, MODALITIES.index(row.modality), row.text, row.uri, _dumps(row.tags)),
                ).lastrowid
                for row in rows
            ]
            write.executemany(
                "INSERT INTO embeddings VALUES (?, ?)",
                zip(numbers, (row.embedding.astype("<f4").tobytes() for row in rows), strict=True),
            )
        return np.array(numbers, np.int64), replaced

    def delete(self, ids: Sequence[str]) -> Numbers:
        """Removes rows; the numbers they had."""
        with self._transaction() as write:
            return self._delete(write, self._numbers_of(write, ids))

    def delete_matching(self, condition: Condition) -> Numbers:
        """Removes the rows that fulfil a condition; the numbers they had."""
        where, values = to_sql(condition)
        with self._transaction() as write:
            found = write.execute(f"SELECT number FROM rows WHERE {where}", values)
            return self._delete(write, [number for (number,) in found])

    def matching(self, condition: Condition, after: int, through: int) -> Numbers:
        """The numbers in a range, both ends as named, whose rows fulfil a condition."""
        where, values = to_sql(condition)
        found = self._read(
            f"SELECT number FROM rows WHERE number > ? AND number <= ? AND {where} ORDER BY number",
            [after, through, *values],
        )
        return np.array([number for (number,) in found], np.int64)

    def count(self, condition: Condition | None, target: Target) -> int:
        """The number of rows that fulfil a condition."""
        where, values = to_sql(condition) if condition else ("1", [])
        if target != "both":
            where += f" AND modality = {MODALITIES.index('text' if target == 'texts' else 'image')}"
        return int(self._read(f"SELECT count(*) FROM rows WHERE {where}", values)[0][0])

    def numbers(self) -> Numbers:
        """The numbers of all rows, ascending."""
        found = self._read("SELECT number FROM rows ORDER BY number", [])
        return np.array([number for (number,) in found], np.int64)

    def vectors(
        self, after: int, dim: int, batch: int = 4096
    ) -> Iterator[tuple[Numbers, NDArray[np.uint8], Vectors]]:
        """Batches of numbers, modalities and embeddings beyond a number, ascending."""
        while found := self._read(
            "SELECT number, modality, embedding FROM rows JOIN embeddings USING (number) "
            "WHERE number > ? ORDER BY number LIMIT ?",
            [after, batch],
        ):
            numbers = np.array([number for number, _, _ in found], np.int64)
            modalities = np.array([modality for _, modality, _ in found], np.uint8)
            joined = b"".join(embedding for _, _, embedding in found)
            yield numbers, modalities, np.frombuffer(joined, "<f4").reshape(-1, dim)
            after = int(numbers[-1])

    def get_numbered(self, numbers: Iterable[int]) -> dict[int, tuple[Any, ...]]:
        """(id, modality, text, uri, tags) by number, of those that exist."""
        found: dict[int, tuple[Any, ...]] = {}
        for chunk in _chunks([int(number) for number in numbers]):
            rows = self._read(
                "SELECT number, id, modality, text, uri, tags FROM rows "
                f"WHERE number IN ({_marks(chunk)})",
                chunk,
            )
            for number, row_id, modality, text, uri, tags in rows:
                found[number] = (row_id, MODALITIES[modality], text, uri, json.loads(tags))
        return found

    def get(self, ids: Sequence[str]) -> dict[str, Row]:
        """Rows by id."""
        found: dict[str, Row] = {}
        for chunk in _chunks(ids):
            rows = self._read(f"{_WHOLE_ROWS} WHERE id IN ({_marks(chunk)})", chunk)
            found.update({row.id: row for _, row in map(_to_row, rows)})
        return found

    def scan(self, batch: int) -> Iterator[list[Row]]:
        """All rows, in batches."""
        after = 0
        while found := self._read(
            f"{_WHOLE_ROWS} WHERE number > ? ORDER BY number LIMIT ?", [after, batch]
        ):
            rows = [_to_row(each) for each in found]
            yield [row for _, row in rows]
            after = rows[-1][0]

    def sample(self, modality: Modality, count: int, dim: int) -> Vectors:
        """Embeddings of at most `count` rows of a modality, [n, D], much the same at each call."""
        found = self._read(
            "SELECT embedding FROM embeddings WHERE number IN (SELECT number FROM rows WHERE "
            # Knuth's multiplicative hash draws at random, and the same for all time.
            "modality = ? ORDER BY (number * 2654435761) & 4294967295 LIMIT ?)",
            [MODALITIES.index(modality), count],
        )
        return np.frombuffer(b"".join(each for (each,) in found), "<f4").reshape(-1, dim)

    def _read(self, statement: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        with self._reading:
            return self._reader.execute(statement, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Commits what its block writes, or nothing of it."""
        with self._writing:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException as error:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise StoreFullError(str(error)) from None
                raise

    @staticmethod
    def _numbers_of(write: sqlite3.Connection, ids: Sequence[str]) -> list[int]:
        return [
            number
            for chunk in _chunks(ids)
            for (number,) in write.execute(
                f"SELECT number FROM rows WHERE id IN ({_marks(chunk)})", chunk
            )
        ]

    @staticmethod
    def _delete(write: sqlite3.Connection, numbers: Sequence[int]) -> Numbers:
        for chunk in _chunks(numbers):
            for table in ("rows", "embeddings"):
                write.execute(f"DELETE FROM {table} WHERE number IN ({_marks(chunk)})", chunk)
        return np.array(numbers, np.int64)


def _connect(file: Path) -> sqlite3.Connection:
    # Transactions are begun and ended by hand.
    connection = sqlite3.connect(file, check_same_thread=False, isolation_level=None, timeout=30)
    connection.execute("PRAGMA journal_mode = WAL")
    # A transaction is on disk when it is committed; NORMAL would lose the last ones.
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA cache_size = -32000")
    return connection


_WHOLE_ROWS = (
    "SELECT number, id, modality, text, uri, tags, embedding "
    "FROM rows JOIN embeddings USING (number)"
)


def _to_row(found: tuple[Any, ...]) -> tuple[int, Row]:
    number, row_id, modality, text, uri, tags, embedding = found
    vector = np.frombuffer(embedding, "<f4")
    return number, Row(row_id, MODALITIES[modality], vector, text, uri, json.loads(tags))


def _dumps(tags: Any) -> str:
    return json.dumps(dict(tags), ensure_ascii=False, separators=(",", ":"))


def _chunks(values: Sequence[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(values), _CHUNK):
        yield list(values[start : start + _CHUNK])


def _marks(values: Sequence[Any]) -> str:
    return ",".join("?" * len(values))


def to_sql(condition: Condition) -> tuple[str, list[Any]]:
    """A condition on the column `tags`, and the values of its parameters. Never NULL."""
    if isinstance(condition, Every | Some):
        parts = [to_sql(each) for each in condition.conditions]
        joint, empty = (" AND ", "1") if isinstance(condition, Every) else (" OR ", "0")
        text = joint.join(text for text, _ in parts) or empty
        return f"({text})", [value for _, values in parts for value in values]
    if isinstance(condition, Negation):
        text, values = to_sql(condition.condition)
        return f"(NOT {text})", values
    path = "$" + "".join(f'."{name}"' for name in condition.field)
    if isinstance(condition, Exists):
        return "(json_type(tags, ?) IS NOT NULL)", [path]
    if isinstance(condition, Compare):
        types = "'text'" if isinstance(condition.value, str) else "'integer', 'real'"
        return (
            f"(coalesce(json_type(tags, ?) IN ({types}) "
            f"AND json_extract(tags, ?) {condition.operator} ?, 0))",
            [path, path, condition.value],
        )
    return _one_of(path, condition)


def _one_of(path: str, condition: OneOf) -> tuple[str, list[Any]]:
    by_type: dict[str, list[Any]] = {}
    for value in condition.values:
        names = {bool: "'true', 'false'", str: "'text'"}.get(type(value), "'integer', 'real'")
        by_type.setdefault(names, []).append(value)
    member = " OR ".join(f"(type IN ({types}) AND value IN ({_marks(values)}))"
                         for types, values in by_type.items()) or "0"  # fmt: skip
    values = [value for values in by_type.values() for value in values]
    # json_each gives the members of a list, and a scalar as its only member.
    return (
        "(coalesce(json_type(tags, ?) <> 'object', 0) AND "
        f"EXISTS (SELECT 1 FROM json_each(tags, ?) WHERE {member}))",
        [path, path, *values],
    )
