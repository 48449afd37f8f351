"""`python docarray_1.py ADDRESS FOLDER`: the guide's own lines, with docarray 1. FOLDER has images.

It runs in an environment of its own, with our client and no server.
"""

# ruff: noqa: E402, PT017

import asyncio
import sys
import warnings

warnings.filterwarnings("ignore")

import numpy as np
from docarray import Document, DocumentArray

from clip_client import Client

address, folder = sys.argv[1:]
cat, dog = f"{folder}/cat.png", f"{folder}/dog.png"
c = Client(address)


def inputs():
    return [
        Document(text="she smiled, with pain"),
        Document(uri=cat),
        Document(uri=cat).load_uri_to_image_tensor(),
        Document(blob=open(cat, "rb").read()),  # noqa: PTH123
    ]


# Encoding

expected = c.encode(["she smiled, with pain", cat, cat, cat])
for build in (list, DocumentArray, iter):
    sent = inputs()
    r = c.encode(build(sent), batch_size=2, show_progress=False)
    assert isinstance(r, DocumentArray), type(r)
    assert r.embeddings.shape == expected.shape
    np.testing.assert_allclose(r.embeddings, expected, rtol=1e-2, atol=1e-2)
    assert [d.id for d in r] == [d.id for d in sent]
    assert [d.content_type for d in r] == [d.content_type for d in inputs()]
    assert not r[0].tags
r.summary()

da = DocumentArray(inputs())
assert c.encode(da)[0] is da[0]
assert asyncio.run(c.aencode(DocumentArray(inputs()))).embeddings.shape == expected.shape
assert isinstance(c.encode(DocumentArray()), DocumentArray)
assert (
    c.encode(DocumentArray.from_files(f"{folder}/*.png")).embeddings.shape[1] == expected.shape[1]
)
(both,) = c.encode([Document(text="hello", uri="https://nowhere.invalid/a.png")])
np.testing.assert_allclose(both.embedding, c.encode(["hello"])[0], rtol=1e-3, atol=1e-4)

# Access paths

da = DocumentArray([Document(chunks=[Document(text="hello"), Document(uri=cat)])])
r = c.encode(da, parameters={"access_paths": "@c"})
assert r["@c"].embeddings.shape == (2, expected.shape[1])

# Ranking


def queries():
    return [
        Document(uri=cat, matches=[Document(text=f"a {name}") for name in ("car", "cat", "dog")]),
        Document(text="a cat", matches=[Document(uri=dog), Document(uri=cat)]),
    ]


for r in (
    c.rank(queries()),
    c.rank(DocumentArray(queries())),
    c.rank(docs=iter(queries())),
    asyncio.run(c.arank(queries())),
):
    assert isinstance(r, DocumentArray), type(r)
    assert r[0].matches.texts[0] == "a cat"
    assert r[1].matches[0].uri == cat
    assert all(score > 0 for score in r["@m", "scores__clip_score__value"])
    for d in r:
        values = [match.scores["clip_score"].value for match in d.matches]
        assert values == sorted(values, reverse=True)
        assert abs(sum(values) - 1) < 1e-3
        assert all(-1 <= match.scores["clip_score_cosine"].value <= 1 for match in d.matches)
try:
    c.rank([Document(text="a cat")])
except ValueError as error:
    assert "matches" in str(error)
else:
    raise AssertionError("a document without matches was ranked")

# Callbacks

calls = {"on_done": [], "on_error": [], "on_always": []}
arguments = {name: got.append for name, got in calls.items()}
assert c.encode(DocumentArray(inputs()), **arguments) is None
assert c.rank(DocumentArray(queries()), **arguments) is None
assert [len(got) for got in calls.values()] == [2, 0, 2]
docs = calls["on_done"][0].docs
assert isinstance(docs, DocumentArray), type(docs)
assert docs.embeddings.shape == expected.shape
assert calls["on_done"][0].data.docs.embeddings.shape == expected.shape
assert calls["on_done"][1].docs["@m"].texts

print("all kept")
