"""The interface of a vector store, and the types that cross it.

An engine is one class that implements `Store` and one line in `clip_server.search.ENGINES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from clip_server.errors import ConfigurationError, RequestError
from clip_server.search.filters import Condition
from clip_server.search.fingerprint import Fingerprint

Modality = Literal["text", "image"]
Target = Literal["texts", "images", "both"]
Metric = Literal["COSINE", "IP", "L2"]
Vectors = NDArray[np.float32]

_METRIC_ALIASES = {"INNER_PRODUCT": "IP", "EUCLIDEAN": "L2"}
_METHOD = re.compile(r"(auto|Flat|IVF|HNSW)(\d*)(,Flat)?", re.IGNORECASE)
_METHOD_NAMES = {"auto": "auto", "flat": "Flat", "ivf": "IVF", "hnsw": "HNSW"}
HNSW_NEIGHBOURS = 32


@dataclass(frozen=True)
class IndexMethod:
    """An index method and its parameters.

    kind: `Flat` (exact), `IVF` (clusters), `HNSW` (a graph), or `auto`, by the number of rows.
    size: clusters of IVF, neighbours of a node of HNSW; 0: chosen by the engine.
    """

    kind: str = "auto"
    size: int = 0

    @classmethod
    def parse(cls, written: str) -> IndexMethod:
        """`HNSW32`, `IVF`, `IVF1024`, `Flat` or `auto`.

        Raises:
            ConfigurationError: it is none of them.
        """
        found = _METHOD.fullmatch(str(written).strip())
        kind = _METHOD_NAMES[found[1].lower()] if found else ""
        size = int(found[2] or 0) if found else 0
        if not kind or (size and kind in ("auto", "Flat")) or size == 1 or size > 2**20:
            raise ConfigurationError(
                f"index_method: {written!r} is none of auto, Flat, IVF, IVF1024 (clusters) and "
                "HNSW32 (neighbours), with any number from 2"
            )
        return cls(kind, size or (HNSW_NEIGHBOURS if kind == "HNSW" else 0))

    def __str__(self) -> str:
        return f"{self.kind}{self.size or ''}"


def parse_metric(written: str) -> Metric:
    """`COSINE`, `IP` or `L2`, in any case, or a longer name of one.

    Raises:
        ConfigurationError: it is none of them.
    """
    name = str(written).upper()
    name = _METRIC_ALIASES.get(name, name)
    for metric in get_args(Metric):
        if name == metric:
            known: Metric = metric
            return known
    raise ConfigurationError(f"dist_type: {written!r} is none of {', '.join(get_args(Metric))}")


@dataclass(frozen=True)
class Settings:
    """Location and index settings of a collection.

    engine: its name in `ENGINES`.
    location: a folder (local), or the URL of a server (milvus).
    collection: its name, where a server holds several.
    token: what the server asks for.
    """

    location: str
    engine: str = "local"
    index_method: IndexMethod = field(default_factory=IndexMethod)
    metric: Metric = "COSINE"
    collection: str = "clip"
    token: str = ""


@dataclass(frozen=True)
class Row:
    """One text or image of a collection.

    id: unique in its collection; a row with the same id replaces it.
    embedding: [D] float32, as the model gives it.
    text, uri: the text itself, or where the image came from, if known.
    tags: a JSON object.
    """

    id: str
    modality: Modality
    embedding: Vectors
    text: str | None = None
    uri: str | None = None
    tags: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Hit:
    """A row that was found.

    score: cosine or inner product (larger is closer), or Euclidean distance with L2 (smaller is
        closer).
    """

    id: str
    modality: Modality
    score: float
    text: str | None
    uri: str | None
    tags: Mapping[str, Any]


@dataclass(frozen=True)
class Query:
    """Parameters of a search, besides the embeddings.

    threshold: the least score, or with L2 the greatest distance; None: any.
    """

    limit: int = 10
    target: Target = "both"
    filter: Condition | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Description:
    """A description of a collection, for people, logs and tests.

    rows: those that are stored.
    indexed: rows that the approximate index holds; the others are searched exactly.
    index_method: the one in use, after `auto` was resolved.
    """

    engine: str
    rows: int
    indexed: int
    dim: int
    model: str
    metric: Metric
    index_method: str


class Store(Protocol):
    """One collection. Safe to use from several threads."""

    @classmethod
    def open(cls, settings: Settings, model: Fingerprint | None) -> Store:
        """Opens a collection, and creates it if it does not exist.

        model: what encodes its rows; None opens an existing collection whatever its model.

        Raises:
            ConfigurationError: its rows are of another model; another process has it open; it
                does not exist and `model` is None; it cannot be read.
        """

    @classmethod
    def shadow(cls, settings: Settings) -> Settings:
        """Creates an empty collection that is to replace that of `settings`."""

    @classmethod
    def swap(cls, settings: Settings, shadow: Settings) -> None:
        """Puts the closed collection `shadow` in the place of that of `settings`.

        Raises:
            ConfigurationError: another process has that open.
        """

    @property
    def model(self) -> Fingerprint:
        """The model that encoded the rows."""

    def upsert(self, rows: Sequence[Row]) -> None:
        """Stores rows, all or none, replacing those with the same ids.

        They are on disk, and found by searches, when this returns. Raises StoreFullError.
        """

    def delete(self, ids: Sequence[str]) -> int:
        """Removes rows; the number of those that existed."""

    def delete_matching(self, condition: Condition) -> int:
        """Removes the rows that fulfil a condition; their number."""

    def search(self, embeddings: Vectors, query: Query) -> list[list[Hit]]:
        """The hits of each query, closest first. embeddings: [Q, D]."""

    def get(self, ids: Sequence[str]) -> list[Row | None]:
        """Rows by id; None where there is none."""

    def count(self, condition: Condition | None = None, target: Target = "both") -> int:
        """The number of rows that fulfil a condition."""

    def scan(self, batch: int = 1000) -> Iterator[list[Row]]:
        """All rows, in batches."""

    def sample(self, modality: Modality, count: int) -> Vectors:
        """Embeddings of rows of a modality, [n, D], n at most `count`: always much the same
        rows, drawn at random."""

    def flush(self) -> None:
        """Returns when the approximate index holds every row."""

    def describe(self) -> Description:
        """Describes the collection."""

    def close(self) -> None:
        """Closes the collection; every row that was stored stays."""


class StoreFullError(RequestError):
    """Rows could not be written; those stored before are unchanged."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the collection cannot be written ({reason}): nothing of this request was stored, "
            "what was stored before is unchanged",
            "RESOURCE_EXHAUSTED",
        )
