"""The milvus engine: a collection on a Milvus server, for more rows than one machine holds."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pymilvus import DataType, MilvusClient, MilvusException

from clip_server.errors import ConfigurationError, RequestError
from clip_server.search.filters import Compare, Condition, Every, Exists, Negation, OneOf, Some
from clip_server.search.fingerprint import Fingerprint
from clip_server.search.rows import MODALITIES
from clip_server.search.store import (
    Description,
    Hit,
    Modality,
    Query,
    Row,
    Settings,
    StoreFullError,
    Target,
    Vectors,
)

_LONGEST_ID, _LONGEST_TEXT = 1024, 65535
# `draw` is a number below this, at random but the same for all time: samples are drawn by it.
_DRAWS = 1 << 15
_CLUSTERS, _PROBES, _GRAPH_WIDTH = 1024, 64, 128
_FIELDS = ["id", "modality", "text", "uri", "tags"]
_EVERY_ROW = "modality >= 0"


class MilvusStore:
    """A collection on a server. See Store."""

    def __init__(self, settings: Settings, model: Fingerprint | None) -> None:
        self._settings, self._name = settings, settings.collection
        try:
            self._client = _connect(settings)
            if not self._client.has_collection(self._name):
                if model is None:
                    raise ConfigurationError(f"{settings.location} has no collection {self._name}")
                self._create(model)
            described = self._client.describe_collection(self._name)
            self._client.load_collection(self._name)
            index = self._client.describe_index(self._name, "embedding")
        except MilvusException as error:
            raise ConfigurationError(f"{settings.location}: {error.message}") from None
        self.model = Fingerprint.from_json(described["description"])
        self._method = str(index["index_type"])
        if index["metric_type"] != settings.metric:
            raise ConfigurationError(
                f"dist_type: the collection {self._name} has {index['metric_type']}, which cannot "
                "change"
            )
        if model is not None and (difference := self.model.difference(model)):
            raise ConfigurationError(
                f"the collection {self._name} is of another model: {difference}. Serve its model, "
                "or name another collection"
            )

    def _create(self, model: Fingerprint) -> None:
        schema = MilvusClient.create_schema(description=model.to_json())
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=_LONGEST_ID)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=model.dim)
        schema.add_field("modality", DataType.INT8)
        schema.add_field("text", DataType.VARCHAR, max_length=_LONGEST_TEXT)
        schema.add_field("uri", DataType.VARCHAR, max_length=_LONGEST_TEXT)
        schema.add_field("tags", DataType.JSON)
        schema.add_field("draw", DataType.INT16)
        wanted = self._settings.index_method
        kinds: dict[str, tuple[str, dict[str, int]]] = {
            "Flat": ("FLAT", {}),
            "IVF": ("IVF_FLAT", {"nlist": wanted.size or _CLUSTERS}),
            "HNSW": ("HNSW", {"M": wanted.size or 32, "efConstruction": 128}),
        }
        kind, parameters = kinds.get(wanted.kind, ("HNSW", {"M": 32, "efConstruction": 128}))
        index = self._client.prepare_index_params()
        index.add_index(
            "embedding", index_type=kind, metric_type=self._settings.metric, params=parameters
        )
        self._client.create_collection(
            self._name, schema=schema, index_params=index, consistency_level="Strong"
        )

    @classmethod
    def open(cls, settings: Settings, model: Fingerprint | None) -> MilvusStore:
        return cls(settings, model)

    @classmethod
    def shadow(cls, settings: Settings) -> Settings:
        shadow = replace(settings, collection=f"{settings.collection}_new")
        client = _connect(settings)
        client.drop_collection(shadow.collection)
        client.close()
        return shadow

    @classmethod
    def swap(cls, settings: Settings, shadow: Settings) -> None:
        client = _connect(settings)
        old = f"{settings.collection}_old"
        client.drop_collection(old)
        if client.has_collection(settings.collection):
            client.rename_collection(settings.collection, old)
        client.rename_collection(shadow.collection, settings.collection)
        client.drop_collection(old)
        client.close()

    def close(self) -> None:
        self._client.close()

    def upsert(self, rows: Sequence[Row]) -> None:
        records = [_record(row) for row in {row.id: row for row in rows}.values()]
        if not records:
            return
        try:
            self._client.upsert(self._name, records)
        except MilvusException as error:
            raise StoreFullError(error.message) from None

    def delete(self, ids: Sequence[str]) -> int:
        found = [row.id for row in self.get(ids) if row is not None]
        if found:
            self._client.delete(self._name, ids=found)
        return len(found)

    def delete_matching(self, condition: Condition) -> int:
        count = self.count(condition)
        if count:
            self._client.delete(self._name, filter=_joined([to_expression(condition)]))
        return count

    def search(self, embeddings: Vectors, query: Query) -> list[list[Hit]]:
        parts = _target(query.target) + ([to_expression(query.filter)] if query.filter else [])
        width = max(_GRAPH_WIDTH, query.limit)
        found = self._client.search(
            self._name,
            data=list(np.asarray(embeddings, np.float32)),
            limit=query.limit,
            filter=_joined(parts),
            output_fields=_FIELDS,
            search_params={"params": {"ef": width, "nprobe": _PROBES}},
        )
        hits = [
            [_hit(each["entity"], self._score(float(each["distance"]))) for each in row]
            for row in found
        ]
        return [[hit for hit in row if self._passes(hit.score, query.threshold)] for row in hits]

    def _score(self, distance: float) -> float:
        return max(distance, 0.0) ** 0.5 if self._settings.metric == "L2" else distance

    def _passes(self, score: float, threshold: float | None) -> bool:
        if threshold is None:
            return True
        return score <= threshold if self._settings.metric == "L2" else score >= threshold

    def get(self, ids: Sequence[str]) -> list[Row | None]:
        found = {}
        for start in range(0, len(ids), 1000):
            chunk = list(ids[start : start + 1000])
            rows = self._client.get(self._name, ids=chunk, output_fields=[*_FIELDS, "embedding"])
            found.update({row.id: row for row in map(_row, rows)})
        return [found.get(each) for each in ids]

    def count(self, condition: Condition | None = None, target: Target = "both") -> int:
        parts = _target(target) + ([to_expression(condition)] if condition else [])
        found = self._client.query(self._name, filter=_joined(parts), output_fields=["count(*)"])
        return int(found[0]["count(*)"])

    def scan(self, batch: int = 1000) -> Iterator[list[Row]]:
        stream = self._client.query_iterator(
            self._name, batch_size=batch, filter=_EVERY_ROW, output_fields=[*_FIELDS, "embedding"]
        )
        while rows := stream.next():
            yield [_row(each) for each in rows]
        stream.close()

    def sample(self, modality: Modality, count: int) -> Vectors:
        target: Target = "texts" if modality == "text" else "images"
        draws = -(-_DRAWS * 2 * count // max(self.count(target=target), 1))
        rows = self._client.query(
            self._name,
            filter=_joined([*_target(target), f"draw < {min(draws, _DRAWS)}"]),
            output_fields=["embedding"],
            limit=count,
        )
        vectors = np.array([row["embedding"] for row in rows], np.float32)
        return vectors.reshape(-1, self.model.dim)

    def flush(self) -> None:
        self._client.flush(self._name)

    def describe(self) -> Description:
        rows = self.count()
        return Description(
            engine="milvus",
            rows=rows,
            indexed=rows,
            dim=self.model.dim,
            model=self.model.name,
            metric=self._settings.metric,
            index_method=self._method,
        )


def _connect(settings: Settings) -> MilvusClient:
    try:
        return MilvusClient(settings.location, token=settings.token)
    except MilvusException as error:
        raise ConfigurationError(f"no Milvus at {settings.location}: {error.message}") from None


def _record(row: Row) -> dict[str, Any]:
    for name, value in (("text", row.text), ("source", row.uri)):
        if len((value or "").encode()) > _LONGEST_TEXT:
            raise RequestError(f"the {name} of {row.id} has more than {_LONGEST_TEXT:,} bytes")
    return {
        "id": row.id,
        "embedding": np.asarray(row.embedding, np.float32),
        "modality": MODALITIES.index(row.modality),
        "text": row.text or "",
        "uri": row.uri or "",
        "tags": dict(row.tags),
        "draw": zlib.crc32(row.id.encode()) % _DRAWS,
    }


def _row(found: dict[str, Any]) -> Row:
    return Row(
        found["id"],
        MODALITIES[found["modality"]],
        np.array(found["embedding"], np.float32),
        found["text"] or None,
        found["uri"] or None,
        dict(found["tags"]),
    )


def _hit(found: dict[str, Any], score: float) -> Hit:
    return Hit(
        found["id"],
        MODALITIES[found["modality"]],
        score,
        found["text"] or None,
        found["uri"] or None,
        dict(found["tags"]),
    )


def _target(target: Target) -> list[str]:
    if target == "both":
        return []
    return [f"modality == {MODALITIES.index('text' if target == 'texts' else 'image')}"]


def _joined(parts: Sequence[str]) -> str:
    return " and ".join([_EVERY_ROW, *parts])


def to_expression(condition: Condition) -> str:
    """A condition on `tags` in Milvus' language. Names hold no quotation marks or backslashes, and
    values are JSON, so neither can end a literal."""
    if isinstance(condition, Every | Some):
        joint, empty = (" and ", _EVERY_ROW) if isinstance(condition, Every) else (" or ", "")
        empty = empty or f"not ({_EVERY_ROW})"
        return f"({joint.join(map(to_expression, condition.conditions)) or empty})"
    if isinstance(condition, Negation):
        return f"(not {to_expression(condition.condition)})"
    tag = "tags" + "".join(f'["{name}"]' for name in condition.field)
    if isinstance(condition, Exists):
        return f"(exists {tag})"
    if isinstance(condition, Compare):
        return f"({tag} {condition.operator} {json.dumps(condition.value, ensure_ascii=False)})"
    return _one_of(tag, condition)


def _one_of(tag: str, condition: OneOf) -> str:
    written = [json.dumps(value, ensure_ascii=False) for value in condition.values]
    parts = [f"{tag} == {value} or json_contains({tag}, {value})" for value in written]
    return f"({' or '.join(parts) or f'not ({_EVERY_ROW})'})"
