"""Drives a flow with an indexer: `clip_server_search_driver.py FOLDER DATA ADDRESS METHOD`."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from search_driver import BATCH, LIMIT, SearchDriver, tag

from clip_client.proto import clip_pb2 as pb
from clip_server.search import open_store
from clip_server.search.store import IndexMethod, Query, Settings

IN_FLIGHT = 8


class ClipServerSearchDriver(SearchDriver):
    """address: `HOST:PORT` of the server; `finish` and `reopen` are for when it is stopped."""

    def __init__(self, folder: str, data: str, address: str, method: str) -> None:
        super().__init__(folder, data)
        self.settings = Settings(folder, index_method=IndexMethod.parse(method))
        channel = grpc.insecure_channel(address)
        self._index = channel.unary_unary(
            "/clip.v1.Clip/Index",
            request_serializer=pb.IndexRequest.SerializeToString,
            response_deserializer=pb.IndexResponse.FromString,
        )
        self._search = channel.unary_unary(
            "/clip.v1.Clip/Search",
            request_serializer=pb.SearchRequest.SerializeToString,
            response_deserializer=pb.SearchResponse.FromString,
        )

    def store_all(self) -> None:
        starts = range(0, len(self.rows), BATCH)
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            list(pool.map(lambda s: self.store(s, np.asarray(self.rows[s : s + BATCH])), starts))

    def store(self, start: int, embeddings: Any) -> None:
        items = [
            pb.Item(text=f"row {row}", id=str(row), tags={"n": tag(row)})
            for row in range(start, start + len(embeddings))
        ]
        answer = self._index(pb.IndexRequest(items=items, embeddings=embeddings.tobytes()))
        assert not answer.errors, answer.errors[0].message

    def find(self, query: Any, below: int | None) -> tuple[list[int], float]:
        answer = self._search(
            pb.SearchRequest(
                queries=[pb.Item(text="a query")],
                embeddings=query.tobytes(),
                limit=LIMIT,
                filter="" if below is None else json.dumps({"n": {"$lt": below}}),
            )
        )
        return [int(hit.id) for hit in answer.results[0].hits], answer.timings.search

    def finish(self) -> None:
        store = open_store(self.settings, None)
        store.flush()
        store.close()

    def reopen(self) -> float:
        started = time.perf_counter()
        store = open_store(self.settings, None)
        store.search(self.queries[:1], Query(LIMIT))
        taken = time.perf_counter() - started
        store.close()
        return taken


if __name__ == "__main__":
    ClipServerSearchDriver(*sys.argv[1:]).serve()
