"""Collections: what is stored is found, stays, and survives whatever happens to the index."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_server.errors import ConfigurationError, RequestError
from clip_server.search import filters, open_store
from clip_server.search.fingerprint import Fingerprint
from clip_server.search.store import (
    IndexMethod,
    Query,
    Row,
    Settings,
    Store,
    StoreFullError,
    parse_metric,
)

DIM = 32
MODEL = Fingerprint("a-model", DIM)
ENGINES = ["local", pytest.param("milvus", marks=pytest.mark.slow)]
METHODS = ["Flat", "IVF", "HNSW32"]

Open = Callable[..., Store]


@pytest.fixture(params=ENGINES)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens collections of an engine, each call the same one again."""
    is_local = request.param == "local"
    location = str(tmp_path / "collection") if is_local else request.getfixturevalue("milvus")
    with reopening(location, request.param) as open_one:
        yield open_one


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Open]:
    """The same of the local engine alone."""
    with reopening(str(tmp_path / "collection"), "local") as open_one:
        yield open_one


@contextmanager
def reopening(location: str, engine: str) -> Iterator[Open]:
    stores: list[Store] = []
    name = f"c{uuid.uuid4().hex}"

    def open_one(method: str = "auto", metric: str = "COSINE", model: Any = MODEL) -> Store:
        while stores:
            stores.pop().close()
        settings = Settings(location, engine, IndexMethod.parse(method), parse_metric(metric), name)
        stores.append(open_store(settings, model))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


def vectors(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)


def rows(count: int, seed: int = 0) -> list[Row]:
    """Texts and images by turns; every hundredth has the tag rare."""
    return [
        Row(
            f"row-{index}",
            "image" if index % 2 else "text",
            vector,
            uri=f"{index}.png" if index % 2 else None,
            text=None if index % 2 else f"text {index}",
            tags={"number": index, "rare": index % 100 == 0, "colour": ["red", "blue"][index % 2]},
        )
        for index, vector in enumerate(vectors(count, seed))
    ]


def ids(store: Store, query: Any, **options: Any) -> list[str]:
    return [hit.id for hit in store.search(np.atleast_2d(query), Query(**options))[0]]


@pytest.mark.parametrize("metric", ["COSINE", "IP", "L2"])
def test_the_closest_are_found_with_their_scores(opened: Open, metric: str) -> None:
    store = opened("Flat", metric)
    matrix = vectors(200) * np.linspace(0.5, 2, 200, dtype=np.float32)[:, None]
    store.upsert([Row(f"{i}", "image", v, tags={"i": i}) for i, v in enumerate(matrix)])
    query = vectors(1, seed=7)[0]
    scores = {
        "COSINE": matrix @ query / np.linalg.norm(matrix, axis=1) / np.linalg.norm(query),
        "IP": matrix @ query,
        "L2": np.linalg.norm(matrix - query, axis=1),
    }[metric]
    order = np.argsort(scores if metric == "L2" else -scores)[:10]
    for flushed in (False, True):
        if flushed:
            store.flush()
        hits = store.search(query[None], Query())[0]
        assert [hit.id for hit in hits] == [f"{i}" for i in order]
        np.testing.assert_allclose([hit.score for hit in hits], scores[order], rtol=1e-4)
        assert hits[0].tags == {"i": int(order[0])}
    threshold = float(scores[order[4]])
    assert ids(store, query, threshold=threshold + (1e-4 if metric == "L2" else -1e-4)) == [
        f"{i}" for i in order[:5]
    ]


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_replaced_removed_and_kept(opened: Open, method: str) -> None:
    store = opened(method)
    store.upsert(rows(300))
    store.flush()
    store.upsert([*rows(300)[100:200], Row("new", "text", vectors(1, 5)[0], text="new")])
    assert (store.count(), store.count(target="images")) == (301, 150)
    moved = vectors(1, 9)[0]
    store.upsert([Row("row-7", "image", moved, uri="moved.png")])
    assert ids(store, moved, limit=1) == ["row-7"]
    assert store.get(["row-7", "nobody"])[1] is None
    # Of several with one id, the last.
    store.upsert([Row("twice", "text", moved, text=word) for word in ("first", "last")])
    assert getattr(store.get(["twice"])[0], "text", "") == "last"
    assert store.delete(["twice", "row-7", "nobody"]) == 2
    assert not {"twice", "row-7"} & set(ids(store, moved, limit=300))
    store = opened(method)
    assert store.count() == 300
    assert not {"twice", "row-7"} & set(ids(store, moved, limit=300))
    assert sum(len(batch) for batch in store.scan(50)) == 300
    found = store.get(["row-8"])[0]
    assert found is not None
    assert (found.text, found.tags["number"]) == ("text 8", 8)
    np.testing.assert_array_equal(found.embedding, vectors(300)[8])


@pytest.mark.parametrize("method", METHODS)
def test_filters_keep_the_recall(opened: Open, method: str) -> None:
    store = opened(method)
    stored = rows(3000)
    store.upsert(stored[:2500])
    store.flush()
    store.upsert(stored[2500:])
    matrix = np.stack([row.embedding for row in stored])
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    chosen = {
        "rare": ({"rare": True}, {}),
        "half": ({"colour": "red"}, {}),
        "images": (None, {"target": "images"}),
        "few images": ({"number": {"$gte": 100, "$lt": 120}}, {"target": "images"}),
    }
    for name, (written, options) in chosen.items():
        allowed = np.array([
            {"rare": row.tags["rare"], "half": row.tags["colour"] == "red",
             "images": row.modality == "image",
             "few images": 100 <= row.tags["number"] < 120 and row.modality == "image"}[name]
            for row in stored
        ])  # fmt: skip
        same = total = 0
        for query in vectors(20, seed=3):
            best = np.argsort(-np.where(allowed, matrix @ query, -np.inf))
            true = {stored[i].id for i in best[: min(10, allowed.sum())]}
            found = ids(store, query, filter=filters.parse(written), **options)
            assert all(allowed[int(each.removeprefix("row-"))] for each in found)
            same, total = same + len(true & set(found)), total + len(true)
        assert same >= 0.95 * total, name


FILTERS: list[tuple[Any, list[int]]] = [
    ({"a": 1}, [1, 4]),
    ({"a": {"$ne": 1}}, [0, 2, 3, 5, 6]),
    ({"a": {"$gt": 1, "$lte": 3}}, [2]),
    ({"a": "1"}, [3]),
    ({"a": True}, [6]),
    ({"a": {"$in": [3, "1"]}}, [2, 3]),
    ({"a": {"$nin": [3, "1"]}}, [0, 1, 4, 5, 6]),
    ({"a": {"$exists": False}}, [0]),
    ({"b.c": "x"}, [2]),
    ({"b": "x"}, [5]),
    ({"$or": [{"a": 3}, {"b": "y"}]}, [2, 5]),
    ({"$and": [{"a": 1}, {"b": {"$exists": True}}]}, [4]),
    ({"$not": {"a": {"$gte": 1}}}, [0, 3, 5, 6]),
    ({"a": {"$not": {"$gte": 1}}}, [0, 3, 5, 6]),
    ({"a": {"$gte": "0"}}, [3]),
    ({"it's; DROP TABLE rows --": "x' OR 1=1"}, []),
    ({"ключ": "значение"}, [4]),
    ({"a": {"$in": []}}, []),
    ({"$or": []}, []),
    ({"$and": []}, [0, 1, 2, 3, 4, 5, 6]),
]


def test_filters(opened: Open) -> None:
    store = opened()
    tags: list[dict[str, Any]] = [
        {},
        {"a": 1},
        {"a": 3, "b": {"c": "x"}},
        {"a": "1"},
        {"a": 1.0, "b": None, "ключ": "значение"},
        {"a": None, "b": ["x", "y"]},
        {"a": True},
    ]
    stored = [
        Row(f"{i}", "text", vector, text="t", tags=each)
        for i, (each, vector) in enumerate(zip(tags, vectors(7), strict=True))
    ]
    for written, expected in FILTERS:
        store.upsert(stored)
        condition = filters.parse(written)
        found = ids(store, vectors(1), filter=condition)
        assert sorted(found) == [f"{i}" for i in expected], written
        assert store.count(condition) == len(expected), written
        assert store.delete_matching(condition) == len(expected), written
        assert store.count() == 7 - len(expected), written


@pytest.mark.parametrize(
    "written",
    [
        {"a": {"$regex": "x"}},
        {"$where": "1"},
        {"a": None},
        {"a": [1]},
        {"a": {}},
        {'a"': 1},
        {"a..b": 1},
        {"a": {"$lt": True}},
        {"a": {"$in": 3}},
        {"a": float("nan")},
        {"a": 2**80},
        "a = 1",
        {"$or": [1]},
        {f"x{i}": 1 for i in range(1000)},
    ],
)
def test_what_is_no_filter_is_refused(written: Any) -> None:
    with pytest.raises(RequestError, match="filter"):
        filters.parse(written)
    nested: Any = {"a": 1}
    for _ in range(100):
        nested = {"$not": nested}
    with pytest.raises(RequestError, match="nested"):
        filters.parse(nested)


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "info"])
def test_a_damaged_index_is_made_again(local: Open, tmp_path: Path, damage: str) -> None:
    store = local("HNSW16")
    store.upsert(rows(500))
    store.flush()
    store.close()
    (folder,) = (tmp_path / "collection").glob("index-*")
    file = folder / ("info.json" if damage == "info" else "faiss.index")
    content = bytearray(file.read_bytes())
    if damage == "missing":
        shutil.rmtree(folder)
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2])
    store = local("HNSW16")
    for _ in range(2):
        assert ids(store, vectors(500)[42], limit=1) == ["row-42"]
        store.flush()
    assert store.describe().indexed == 500


def test_another_model_is_refused_by_what_differs(opened: Open) -> None:
    probes = tuple(float(x) for x in vectors(2).ravel())
    model = Fingerprint("a-model", DIM, probes=probes)
    opened(model=model).upsert(rows(3))
    for other, part in {
        Fingerprint("a-model", 64): "dimension is 32, not 64",
        Fingerprint("b-model", DIM): "model is a-model, not b-model",
        Fingerprint("a-model", DIM, "int8", probes): "precision is float, not int8",
        Fingerprint("a-model", DIM, probes=probes[::-1]): "weights differ",
    }.items():
        with pytest.raises(ConfigurationError, match=part):
            opened(model=other)
    # The same weights under another name are the same model.
    assert opened(model=Fingerprint("renamed", DIM, probes=probes)).count() == 3
    assert opened(model=None).model == model


def test_settings_may_change_between_openings(local: Open) -> None:
    store = local("HNSW32")
    store.upsert(rows(300))
    store.flush()
    store = local("IVF16", "L2")
    store.flush()
    assert store.describe().index_method.startswith("IVF")
    assert store.search(vectors(300)[3:4], Query(limit=1))[0][0].score == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize("written", ["PQ", "HNSW", "IVF,Flat", "ivf256,flat", "auto", "Flat"])
def test_names_of_methods(written: str) -> None:
    if written == "PQ":
        with pytest.raises(ConfigurationError, match="none of auto, Flat"):
            IndexMethod.parse(written)
    else:
        assert IndexMethod.parse(str(IndexMethod.parse(written))) == IndexMethod.parse(written)


def test_a_second_process_is_refused(local: Open, tmp_path: Path) -> None:
    local()
    code = (
        "import sys; from clip_server.search import open_store\n"
        "from clip_server.search.store import Settings\n"
        "open_store(Settings(sys.argv[1]), None)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "collection")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "is open in another process" in done.stderr


WRITER = """
import resource, sys
import numpy as np
from clip_server.search import open_store
from clip_server.search.fingerprint import Fingerprint
from clip_server.search.store import Row, Settings, StoreFullError

folder, begin, most = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if most:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
store = open_store(Settings(folder), Fingerprint("a-model", 32))
random = np.random.default_rng(begin)
for number in range(begin, begin + 100_000):
    try:
        store.upsert([Row(f"{number}-{i}", "text", v.astype("f4"), text=f"{number}")
                      for i, v in enumerate(random.normal(size=(64, 32)))])
        if number % 5 == 4:
            store.delete([f"{number - 1}-{i}" for i in range(64)])
    except StoreFullError as error:
        print("full", error, flush=True)
        break
    print(number, flush=True)
"""


def write_in_a_process(folder: Path, begin: int, most: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(begin), str(most)],
        stdout=subprocess.PIPE,
        text=True,
    )


def check_kept(folder: Path, acknowledged: list[int]) -> None:
    """Every acknowledged batch is there whole, unless it was removed; no part of another is."""
    store = open_store(Settings(str(folder)), None)
    try:
        counts: dict[str, int] = {}
        for batch in store.scan():
            for row in batch:
                assert row.text is not None
                assert row.id.startswith(f"{row.text}-")
                counts[row.text] = counts.get(row.text, 0) + 1
        assert set(counts.values()) <= {64}
        for number in acknowledged:
            removed = number % 5 == 3 and number + 1 in acknowledged
            pending = number % 5 == 3 and number == acknowledged[-1]
            assert (str(number) in counts) != removed or pending, number
        last = store.get([f"{acknowledged[-1]}-63"])[0]
        if last is not None:
            assert ids(store, last.embedding, limit=1) == [last.id]
    finally:
        store.close()


@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_loses_no_acknowledged_row(tmp_path: Path, rounds: int) -> None:
    random = np.random.default_rng(rounds)
    for number in range(rounds):
        folder = tmp_path / f"{number % 4}"  # some are killed several times
        begin = 1_000_000 * number
        with write_in_a_process(folder, begin) as process:
            assert process.stdout is not None
            first = int(process.stdout.readline())
            time.sleep(float(random.uniform(0, 1.0)))
            process.send_signal(signal.SIGKILL)
            acknowledged = [first, *(int(line) for line in process.stdout if line.endswith("\n"))]
        check_kept(folder, acknowledged)


def test_a_full_disk_refuses_the_write_and_keeps_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "collection"
    process = write_in_a_process(folder, 0, most=3 << 20)
    output, _ = process.communicate(timeout=60)
    *acknowledged, refused = output.splitlines()
    assert refused.startswith("full the collection cannot be written")
    assert len(acknowledged) > 10
    check_kept(folder, [int(line) for line in acknowledged])
    assert issubclass(StoreFullError, RequestError)
