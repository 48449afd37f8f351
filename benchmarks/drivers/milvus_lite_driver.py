"""Drives Milvus Lite: `milvus_lite_driver.py FOLDER DATA`."""

from __future__ import annotations

import sys
from typing import Any

from pymilvus import DataType, MilvusClient
from search_driver import EF, EF_CONSTRUCTION, LIMIT, EmbeddedDriver, M, tag

NAME = "rows"


class MilvusLiteDriver(EmbeddedDriver):
    def __init__(self, folder: str, data: str) -> None:
        super().__init__(folder, data)
        self.client: Any = None

    def insert(self) -> float:
        self._connect()
        schema = MilvusClient.create_schema()
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=self.rows.shape[1])
        schema.add_field("n", DataType.INT64)
        index = self.client.prepare_index_params()
        build = {"M": M, "efConstruction": EF_CONSTRUCTION}
        index.add_index("embedding", index_type="HNSW", metric_type="COSINE", params=build)
        self.client.create_collection(NAME, schema=schema, index_params=index)
        return super().insert()

    def store(self, start: int, embeddings: Any) -> None:
        rows = [
            {"id": row, "embedding": embedding, "n": tag(row)}
            for row, embedding in enumerate(embeddings, start)
        ]
        self.client.insert(NAME, rows)

    def finish(self) -> None:
        self._connect()
        self.client.flush(NAME)
        self.client.compact(NAME)
        self.client.load_collection(NAME)
        self.client.close()

    def open(self) -> None:
        self._connect()
        self.client.load_collection(NAME)

    def closest(self, query: Any, below: int | None) -> list[int]:
        (found,) = self.client.search(
            NAME,
            data=[query],
            limit=LIMIT,
            filter="" if below is None else f"n < {below}",
            search_params={"params": {"ef": EF}},
            output_fields=["id"],
        )
        return [hit["id"] for hit in found]

    def _connect(self) -> None:
        if self.client is None:
            self.client = MilvusClient(str(self.folder / "rows.db"))


if __name__ == "__main__":
    MilvusLiteDriver(*sys.argv[1:]).serve()
