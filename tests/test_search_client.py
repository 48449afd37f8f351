"""The client's index, search, delete and count, over every transport."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from conftest import SAMPLES, Server

from clip_client import Client, InvalidInputError, ItemsError, Match, ServerError

IMAGES = sorted(SAMPLES.glob("*.png"))
EVERYTHING = {"$or": [{"x": 1}, {"x": {"$ne": 1}}]}


@pytest.fixture(params=["grpc", "http", "websocket"])
def client(search_server: Server, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A Client, and an empty collection."""
    with Client(getattr(search_server, request.param)) as made:
        made.delete(filter=EVERYTHING)
        yield made


def test_a_gallery(client: Client) -> None:
    ids = client.index(
        [*IMAGES, "a red car"], tags=[*({"n": n} for n, _ in enumerate(IMAGES)), {}], prefetch=2
    )
    assert ids[:-1] == [str(image) for image in IMAGES]
    assert (client.count(), client.count(target="texts")) == (len(IMAGES) + 1, 1)
    assert client.index([*IMAGES, "a red car"]) == ids  # once more changes nothing
    assert client.count() == len(IMAGES) + 1
    (cats, cars) = client.search(["a smiling cat", SAMPLES / "car.png"], limit=2)
    assert all(isinstance(match, Match) for match in cats + cars)
    assert cats[0].uri == str(SAMPLES / "cat.png")
    assert [cars[0].uri, cars[1].text] == [str(SAMPLES / "car.png"), "a red car"]
    assert cars[0].score == pytest.approx(1, abs=1e-3)
    assert cars[0].scores["cosine"] == cars[0].score
    assert [m.modality for m in client.search(["a red car"], target="images", limit=1)[0]] == [
        "image"
    ]
    assert client.delete([ids[0], "nobody"]) == 1
    assert client.delete([]) == 0
    info = client.info().collection
    assert info is not None
    assert (info.rows, info.metric) == (len(IMAGES), "COSINE")


def test_dicts_filters_and_thresholds(client: Client) -> None:
    client.index(
        [{"id": f"{n}", "text": f"a text with the number {n}", "tags": {"n": n, "even": n % 2 == 0}}
         for n in range(30)]
    )  # fmt: skip
    found = client.search(["a text with the number 7"], filter={"even": True, "n": {"$lt": 10}})[0]
    assert sorted(int(match.id) for match in found) == [0, 2, 4, 6, 8]
    assert all(type(match.tags["n"]) is int for match in found)
    assert client.count(filter={"n": {"$in": [1, 2, 99]}}) == 2
    assert client.delete(filter={"even": True}) == 15
    best = client.search(["a text with the number 7"], limit=30)[0]
    assert [best[0].id, len(best)] == ["7", 15]
    cut = best[4].score
    assert len(client.search(["a text with the number 7"], score_threshold=cut - 1e-6)[0]) == 5
    relevant = client.search(["a text with the number 7"], min_relevance=0.5, limit=30)[0]
    assert all(match.relevance is not None and match.relevance >= 0.5 for match in relevant)
    as_clip_as_service = client.search(["a text"], parameters={"limit": 3})[0]
    assert len(as_clip_as_service) == 3


def test_errors_of_items(client: Client) -> None:
    items: Any = ["good", " ", "missing.png", {"text": "x", "tags": {"a": object()}}, b"junk"]
    ids, failures = client.index(items, on_item_error="return")
    assert [each is None for each in ids] == [False, True, True, True, True]
    assert [failure.index for failure in failures] == [1, 2, 3, 4]
    with pytest.raises(ItemsError, match="4 of 5 items failed"):
        client.index(items)
    assert client.count() == 1
    found, failures = client.search(["good", " "], on_item_error="return")
    assert (found[0][0].text, found[1], len(failures)) == ("good", None, 1)
    with pytest.raises(ServerError, match="no operator"):
        client.search(["good"], filter={"a": {"$x": 1}})
    with pytest.raises(InvalidInputError, match="limit"):
        client.search(["good"], limit=0)
    with pytest.raises(InvalidInputError, match="target"):
        client.search(["good"], target="videos")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="no parameter"):
        client.search(["good"], parameters={"lmit": 3})
    with pytest.raises(TypeError, match="several"):
        client.search("good")
    with pytest.raises(TypeError, match="several"):
        client.delete("good")
    with pytest.raises(ServerError, match="ids or a filter"):
        client.delete()


def test_documents_get_matches(client: Client) -> None:
    from docarray import DocList

    from clip_server.executors.documents import ClipDoc, ClipMatch

    docs = DocList[ClipDoc](
        ClipDoc(id=file.stem, blob=file.read_bytes(), uri=file.name, tags={"n": n})
        for n, file in enumerate(IMAGES)
    )
    assert client.index(docs) is docs
    query = DocList[ClipDoc]([ClipDoc(text="a smiling cat"), ClipDoc(text="")])
    found, failures = client.search(query, limit=3, on_item_error="return")
    assert found is query
    assert isinstance(found[0].matches[0], ClipMatch)
    best = found[0].matches[0]
    assert [best.id, best.uri, best.tags] == ["cat", "cat.png", {"n": IMAGES.index(
        SAMPLES / "cat.png")}]  # fmt: skip
    assert best.scores["cosine"] > found[0].matches[1].scores["cosine"]
    assert [failure.index for failure in failures] == [1]


def test_async_and_streams(client: Client) -> None:
    async def gallery() -> list[Any]:
        async def texts() -> Any:
            for number in range(300):
                yield {"id": f"{number}", "text": f"text {number}"}

        done: list[str] = []
        assert await client.aindex(texts(), on_done=lambda b: done.extend(b.results)) is None
        assert done == [f"{number}" for number in range(300)]
        assert await client.acount() == 300
        found: list[Any] = await client.asearch(["text 42"], limit=1)
        assert await client.adelete(["42"]) == 1
        return found

    assert asyncio.run(gallery())[0][0].id == "42"
    with pytest.raises(TypeError, match="async call: aindex"):
        client.index(_none())


async def _none() -> Any:
    yield "never"


def test_images_of_arrays_and_pillow(client: Client) -> None:
    from PIL import Image

    picture = Image.open(BytesIO((SAMPLES / "tree.png").read_bytes())).convert("RGB")
    ids = client.index([picture, np.asarray(picture)], ids=["pillow", "array"])
    assert ids == ["pillow", "array"]
    assert {match.id for match in client.search([picture])[0]} == {"pillow", "array"}
