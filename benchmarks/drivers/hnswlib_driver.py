"""Drives hnswlib: `hnswlib_driver.py FOLDER DATA`. It acknowledges rows that are in memory."""

from __future__ import annotations

import sys
from typing import Any

import hnswlib
import numpy as np
from search_driver import EF, EF_CONSTRUCTION, LIMIT, EmbeddedDriver, M, tag


class HnswlibDriver(EmbeddedDriver):
    def __init__(self, folder: str, data: str) -> None:
        super().__init__(folder, data)
        self.file = str(self.folder / "index.bin")
        self.index = hnswlib.Index("cosine", self.rows.shape[1])
        self.index.set_num_threads(1)

    def insert(self) -> float:
        self.index.init_index(len(self.rows), M=M, ef_construction=EF_CONSTRUCTION)
        return super().insert()

    def store(self, start: int, embeddings: Any) -> None:
        self.index.add_items(embeddings, np.arange(start, start + len(embeddings)))

    def finish(self) -> None:
        self.index.save_index(self.file)

    def open(self) -> None:
        self.index.load_index(self.file)
        self.index.set_ef(EF)

    def closest(self, query: Any, below: int | None) -> list[int]:
        keeps = None if below is None else lambda row: tag(row) < below
        found, _ = self.index.knn_query(query[None], k=LIMIT, num_threads=1, filter=keeps)
        return [int(row) for row in found[0]]


if __name__ == "__main__":
    HnswlibDriver(*sys.argv[1:]).serve()
