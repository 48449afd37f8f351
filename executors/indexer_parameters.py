"""The parameters of an indexer, as a flow's YAML file gives them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from clip_server.errors import ConfigurationError
from clip_server.executors.parameter_fields import at_least, read_parameters
from clip_server.search import check_engine
from clip_server.search.store import IndexMethod, Settings, parse_metric

# Of AnnLite, the indexer in clip-as-service's examples: names of ours, and those that need no
# counterpart.
_ALIASES = {"limit": "return_k", "metric": "dist_type", "data_path": "path", "workspace": "path"}
_NEEDLESS = ("n_dim", "n_components", "columns", "ef_construction", "ef_search", "max_connection",
             "index_access_paths", "search_access_paths", "include_metadata")  # fmt: skip


@dataclass(frozen=True)
class IndexerParameters:
    """`uses: with:` of a flow's YAML file.

    path: the folder of the collection, with the local engine.
    uri: of a Milvus server, which then holds the collection.
    token: what that server asks for.
    engine: None: `milvus` where there is a uri, else `local`.
    collection: its name on the server.
    index_method: `auto`, `Flat`, `IVF` or `HNSW32`.
    dist_type: `COSINE`, `IP` or `L2`.
    return_k: hits of a search that does not say how many.
    score_thres: the least score of a hit, with L2 the greatest distance; None: any.
    max_request_items: of one request.
    """

    path: str = "collection"
    uri: str | None = None
    token: str | None = None
    engine: str | None = None
    collection: str = "clip"
    index_method: str = "auto"
    dist_type: str = "COSINE"
    return_k: int = at_least(1, 10)
    score_thres: float | None = None
    max_request_items: int = at_least(1, 10_000)

    @classmethod
    def names(cls) -> list[str]:
        """The keys that `uses: with:` may hold."""
        return [*(each.name for each in fields(cls)), *_ALIASES, *_NEEDLESS]

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> IndexerParameters:
        """The parameters of a YAML file.

        Raises:
            ConfigurationError: a key is unknown, a value is not allowed, or the engine is not
                installed.
        """
        values = {_ALIASES.get(key, key): value for key, value in given.items()}
        needless = [name for name in _NEEDLESS if values.pop(name, None) is not None]
        if needless:
            warnings.warn(
                f"{', '.join(needless)}: an indexer needs no such parameter: remove it",
                stacklevel=2,
            )
        parameters = read_parameters(cls, values, "CLIPIndexer")
        check_engine(parameters.settings().engine)
        return parameters

    def settings(self) -> Settings:
        """Location and index settings of the collection."""
        engine = self.engine or ("milvus" if self.uri else "local")
        if engine == "local" and self.uri:
            raise ConfigurationError("uri: the engine local has a path, not a uri")
        return Settings(
            location=self.uri or self.path,
            engine=engine,
            index_method=IndexMethod.parse(self.index_method),
            metric=parse_metric(self.dist_type),
            collection=self.collection,
            token=self.token or "",
        )
