"""docarray 1: the guide's lines as they are, and clip-as-service's own client."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES, Server

pytestmark = pytest.mark.slow


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder that holds no packages."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [*map(str, command)],
        env=environment,
        cwd=SAMPLES,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with our client and docarray 1."""
    folder = tmp_path_factory.mktemp("docarray-1")
    inside = folder / "bin" / "python"
    for command in (
        [sys.executable, "-m", "venv", folder],
        [inside, "-m", "pip", "install", "-q", "docarray<0.30", "pillow", ROOT / "clip_client"],
    ):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    return inside


@pytest.mark.parametrize("place", range(3), ids=["grpc", "http", "websocket"])
def test_the_lines_of_the_guide(python: Path, onnx_server: Server, place: int) -> None:
    program = Path(__file__).with_name("docarray_1.py")
    done = run(python, program, onnx_server.addresses[place], SAMPLES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("all kept\n")


# What clip-as-service's client 0.8.3 prints of its results.
THEIRS = """
import sys, warnings
warnings.filterwarnings("ignore")
from clip_client import Client
from docarray import Document, DocumentArray

address, cat = sys.argv[1:]
c = Client(address)
print(c.encode(["a cat", cat]).shape)
print(c.encode(DocumentArray([Document(text="a cat"), Document(uri=cat)])).embeddings.shape)
matches = [Document(text="a car"), Document(text="a cat")]
print(c.rank([Document(uri=cat, matches=matches)])["@m", "text"])
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with clip-as-service 0.8.3."""
    folder = tmp_path_factory.mktemp("clip-as-service")
    inside = folder / "bin" / "python"
    pins = ROOT / "benchmarks" / "requirements" / "clip_as_service.txt"
    for command in (
        [sys.executable, "-m", "venv", folder],
        # The file lists every package there is to be, besides those that torch needs too.
        [inside, "-m", "pip", "install", "-q", "--no-deps", "-r", pins, "numpy<2", "pillow"],
        # Its own last Jina: over HTTP, Jina 3.34 loses what docarray 1's clients get.
        [inside, "-m", "pip", "install", "-q", "--no-deps", "jina==3.14.1", "aiostream<0.5"],
    ):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    return inside


@pytest.mark.parametrize("place", range(3), ids=["grpc", "http", "websocket"])
def test_clip_as_services_client(theirs: Path, onnx_server: Server, place: int) -> None:
    address = onnx_server.addresses[place].replace("ws://", "websocket://")
    done = run(theirs, "-c", THEIRS, address, SAMPLES / "cat.png")
    assert done.stdout.splitlines()[-3:] == ["(2, 256)", "(2, 256)", "['a cat', 'a car']"], (
        done.stderr[-3000:]
    )
