"""What mypy, and so an editor, knows of the Client's results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

ARRAY = "ndarray[tuple[Any, ...], dtype[floating[_32Bit]]]"
SNIPPET = """
from collections.abc import AsyncIterator, Iterator
from typing import Any

from clip_client import Batch, Client


class Document:
    embedding: Any = None
    matches: Any = ()


def store(batch: Batch) -> None: ...
def documents() -> Iterator[Document]: ...
def stream() -> AsyncIterator[str]: ...


client = Client("grpc://127.0.0.1:51000", ca_file="ca.pem")
texts: list[str] = ["a cat"]
listed = [Document()]
"""
REVEALED = {
    "client.encode(texts, normalize=True, batch_size=3)": ARRAY,
    "client.encode(['a', b'x'], on_item_error='return')": f"tuple[{ARRAY}, list[ItemFailure]]",
    "client.encode(listed)": "list[Document]",
    "client.encode(documents(), on_item_error='return')": (
        "tuple[list[Document], list[ItemFailure]]"
    ),
    "client.encode(texts, on_done=store, timeout=5)": "None",
    "client.encode(texts, on_done=store, on_item_error='return')": "tuple[None, list[ItemFailure]]",
    "client.rank('a', texts)": "list[Ranking]",
    "client.rank('a', texts, on_item_error='return')": "tuple[list[Ranking], list[ItemFailure]]",
    "client.rank(listed)": "list[Document]",
    "client.rank(docs=documents(), source='matches', batch_size=2)": "list[Document]",
    "client.rank(listed, on_done=store, on_item_error='return')": "tuple[None, list[ItemFailure]]",
    "client.encode(content=texts, on_error=store)": ARRAY,
    "client.classify([b'x'], texts)": "list[list[Label]]",
    "client.classify([b'x'], texts, on_item_error='return')": (
        "tuple[list[list[Label] | None], list[ItemFailure]]"
    ),
    "client.index(texts, ids=texts, tags=[{'a': 1}])": "list[str]",
    "client.index([b'x'], on_error=store)": "list[str | None]",
    "client.index(texts, on_item_error='return')": "tuple[list[str | None], list[ItemFailure]]",
    "client.index(listed, timeout=5)": "list[Document]",
    "client.index(documents(), on_item_error='return')": (
        "tuple[list[Document], list[ItemFailure]]"
    ),
    "client.index(texts, on_done=store, on_error=store)": "None",
    "client.search(texts, limit=3, target='images', filter={'a': 1})": "list[list[Match]]",
    "client.search(texts)[0][0].score": "float",
    "client.search(content=texts, on_error=store)": "list[list[Match] | None]",
    "client.search([b'x'], on_item_error='return')": (
        "tuple[list[list[Match] | None], list[ItemFailure]]"
    ),
    "client.search(listed, parameters={'limit': 3})": "list[Document]",
    "client.search(texts, on_done=store, on_item_error='return')": "tuple[None, list[ItemFailure]]",
    "client.profile()['Server']": "float",
    "client.info()": "Info",
    "await client.aencode(stream())": ARRAY,
    "await client.aencode(listed, on_item_error='return')": (
        "tuple[list[Document], list[ItemFailure]]"
    ),
    "await client.aencode(texts, on_done=store)": "None",
    "await client.arank('a', texts)": "list[Ranking]",
    "await client.aclassify([b'x'], texts)": "list[list[Label]]",
    "await client.aindex(stream(), batch_size=2)": "list[str]",
    "await client.aindex(documents(), on_item_error='return')": (
        "tuple[list[Document], list[ItemFailure]]"
    ),
    "await client.asearch(stream(), min_relevance=0.5)": "list[list[Match]]",
    "await client.asearch(texts, on_item_error='return')": (
        "tuple[list[list[Match] | None], list[ItemFailure]]"
    ),
    "await client.asearch(texts, on_done=store)": "None",
    "(await client.aprofile(content='cat.jpg'))['Server']": "float",
    "(await client.ainfo()).dim": "int",
}
REFUSED = (
    "client.encode(texts, batchsize=3)",
    "client.encode(texts, on_item_error='ignore')",
    "client.index(texts, limit=3)",
    "client.search(texts, target='videos')",
)


@pytest.mark.slow
def test_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    lines = [f"    reveal_type({call})" for call in REVEALED] + [f"    {call}" for call in REFUSED]
    file = tmp_path / "snippet.py"
    file.write_text("\n".join([SNIPPET, "async def work() -> None:", *lines, ""]))
    (tmp_path / "clip_client").symlink_to(ROOT / "clip_client")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--disable-error-code=empty-body", file],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    revealed = [
        re.sub(r"[\w.]*\.(?=\w)", "", each)
        for each in re.findall(r'Revealed type is "(.*)"', done.stdout)
    ]
    assert revealed == list(REVEALED.values()), done.stdout + done.stderr
    refused = set(re.findall(r"snippet\.py:(\d+): error", done.stdout))
    assert len(refused) == len(REFUSED), done.stdout
