"""Collections of texts and images that are searched by embedding, and the engines that hold them.

`open_store` opens a collection with the engine that its settings name. An engine's module is
imported only then, since what it needs may not be installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from clip_server.errors import ConfigurationError
from clip_server.install import install_hint, missing_package
from clip_server.search.fingerprint import Fingerprint
from clip_server.search.store import Settings, Store


@dataclass(frozen=True)
class EngineSpec:
    """One engine.

    implementation: the import path of its class, `module:Class`, which is a `Store`.
    extra: the package extra that installs what it needs.
    packages: what it imports.
    """

    implementation: str
    extra: str
    packages: tuple[str, ...]


ENGINES = {
    "local": EngineSpec("clip_server.search.local:LocalStore", "search", ("faiss",)),
    "milvus": EngineSpec("clip_server.search.milvus:MilvusStore", "search-milvus", ("pymilvus",)),
}


def check_engine(name: str) -> EngineSpec:
    """The engine of a name. Raises ConfigurationError if there is none or it is not installed."""
    spec = ENGINES.get(name)
    if spec is None:
        raise ConfigurationError(f"engine: {name!r} is none of {', '.join(ENGINES)}")
    if package := missing_package(spec.packages):
        raise ConfigurationError(
            f"the engine {name} needs the package {package}: {install_hint(spec.extra)}"
        )
    return spec


def open_store(settings: Settings, model: Fingerprint | None) -> Store:
    """Opens a collection, and creates it if it does not exist. See Store.open."""
    return _engine(settings).open(settings, model)


@contextmanager
def replacement(settings: Settings, model: Fingerprint) -> Iterator[Store]:
    """A new collection that takes the place of that of `settings` when the block is done.

    Until then, and if the block raises, the old one stays as it was.
    """
    engine = _engine(settings)
    shadow = engine.shadow(settings)
    store = engine.open(shadow, model)
    try:
        yield store
    finally:
        store.close()
    engine.swap(settings, shadow)


def _engine(settings: Settings) -> type[Store]:
    module, _, name = check_engine(settings.engine).implementation.partition(":")
    engine: type[Store] = getattr(importlib.import_module(module), name)
    return engine
