"""LangChain and LlamaIndex over the Client: their real packages, which need pydantic 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SAMPLES, Server

from clip_client import Client

CAT = str(SAMPLES / "cat.png")
TEXTS = ["a cat", "cat.png", "a slice of pizza"]

LANGCHAIN = """
import asyncio, json, sys
from langchain_core.vectorstores import InMemoryVectorStore
from clip_client.integrations.langchain import ClipEmbeddings

server, cat, *texts = sys.argv[1:]
clip = ClipEmbeddings(server)
found = InMemoryVectorStore.from_texts(texts, clip).similarity_search("a pizza", k=1)
print(json.dumps({
    "texts": clip.embed_documents(texts),
    "query": clip.embed_query(texts[0]),
    "images": clip.embed_image([cat]),
    "async texts": asyncio.run(clip.aembed_documents(texts)),
    "async query": asyncio.run(clip.aembed_query(texts[0])),
    "async images": asyncio.run(clip.aembed_image([cat])),
    "found": found[0].page_content,
}))
"""

LLAMA_INDEX = """
import asyncio, json, sys
from io import BytesIO
from pathlib import Path
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from clip_client.integrations.llama_index import ClipEmbedding

server, cat, *texts = sys.argv[1:]
clip = ClipEmbedding(server, embed_batch_size=2, num_workers=2, callback_manager=None)
index = VectorStoreIndex([TextNode(text=text) for text in texts], embed_model=clip)
found = index.as_retriever(similarity_top_k=1).retrieve("a pizza")
print(json.dumps({
    "texts": clip.get_text_embedding_batch(texts),
    "query": clip.get_query_embedding(texts[0]),
    "images": clip.get_image_embedding_batch([cat]),
    "async texts": asyncio.run(clip.aget_text_embedding_batch(texts)),
    "async query": asyncio.run(clip.aget_query_embedding(texts[0])),
    "async images": [asyncio.run(clip.aget_image_embedding(BytesIO(Path(cat).read_bytes())))],
    "found": found[0].node.text,
}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with the client and both libraries."""
    folder = tmp_path_factory.mktemp("integrations")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    inside = str(folder / "venv" / "bin" / "python")
    packages = (str(ROOT / "clip_client"), "langchain-core", "llama-index-core")
    subprocess.run([inside, "-m", "pip", "install", "-q", *packages], check=True)
    return inside


@pytest.mark.slow
@pytest.mark.parametrize("program", [LANGCHAIN, LLAMA_INDEX], ids=["langchain", "llama_index"])
def test_embeddings(python: str, program: str, onnx_server: Server, tmp_path: Path) -> None:
    # In a folder with a file of the name of a text, which stays a text.
    (tmp_path / "cat.png").write_bytes(Path(CAT).read_bytes())
    command = [python, "-c", program, onnx_server.http, CAT, *TEXTS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    with Client(onnx_server.grpc) as client:
        texts = client.encode([{"text": text} for text in TEXTS], normalize=True)
        images = client.encode([{"image": CAT}], normalize=True)
    for kind in ("", "async "):
        assert np.allclose(found[f"{kind}texts"], texts, atol=1e-6)
        assert np.allclose(found[f"{kind}query"], texts[0], atol=1e-6)
        assert np.allclose(found[f"{kind}images"], images, atol=1e-6)
    assert found["found"] == "a slice of pizza"


def test_a_missing_library_is_named() -> None:
    program = """
import importlib, sys
sys.modules["langchain_core"] = sys.modules["llama_index"] = None
for module in ("langchain", "llama_index"):
    try:
        importlib.import_module(f"clip_client.integrations.{module}")
    except ImportError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    langchain, llama_index = done.stdout.splitlines()
    assert langchain.endswith("pip install langchain-core")
    assert llama_index.endswith("pip install llama-index-core")
