"""`python -m clip_client`: items from arguments and lines, results as JSONL or .npy."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SAMPLES, Server

from clip_client import Client
from clip_client.__main__ import main

CAT, PIZZA = str(SAMPLES / "cat.png"), str(SAMPLES / "pizza.png")
COMMAND = [sys.executable, "-m", "clip_client"]


class Shell:
    """The command in this process."""

    def __init__(
        self, server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        self._server, self._monkeypatch, self._capfd = server, monkeypatch, capfd
        self.errors = ""

    def run(self, name: str, *arguments: str, stdin: bytes = b"", status: int = 0) -> list[Any]:
        """The objects that it writes."""
        self._monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(stdin), "ascii"))
        assert main([name, self._server.grpc, *arguments]) == status
        written, self.errors = self._capfd.readouterr()
        assert "Traceback" not in self.errors
        return [json.loads(line) for line in written.splitlines()]


@pytest.fixture
def shell(
    onnx_server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Shell:
    return Shell(onnx_server, monkeypatch, capfd)


@pytest.fixture(scope="module")
def client(onnx_server: Server) -> Any:
    with Client(onnx_server.grpc) as client:
        yield client


def test_encode(shell: Shell, client: Client) -> None:
    # Options may stand anywhere.
    records = shell.run("encode", "a cat", "--normalize", CAT)
    assert [(each["index"], each["item"]) for each in records] == [(0, "a cat"), (1, CAT)]
    expected = client.encode(["a cat", CAT], normalize=True)
    assert np.array_equal([each["embedding"] for each in records], expected)
    assert shell.errors == ""


def test_lines(shell: Shell, client: Client, tmp_path: Path) -> None:
    """Of stdin, of text and of JSON, each where the command line names it."""
    # As Windows' programs write them.
    (tmp_path / "captions.txt").write_text("a cat\r\n猫\n", encoding="utf-8-sig")
    (tmp_path / "items.jsonl").write_text(
        json.dumps({"id": "7", "image": CAT}) + "\n\n" + json.dumps("a dog") + "\n\n"
    )
    names = [str(tmp_path / name) for name in ("captions.txt", "items.jsonl")]
    records = shell.run("encode", names[0], "-", names[1], stdin=b"\xef\xbb\xbfa house\na tree")
    items = ["a cat", "猫", "a house", "a tree", CAT, "a dog"]
    assert [each["item"] for each in records] == items
    assert [each.get("id") for each in records] == [None, None, None, None, "7", None]
    expected = client.encode(items)
    assert np.array_equal([each["embedding"] for each in records], expected)
    # Without an item: stdin.
    assert len(shell.run("encode", stdin=b"a cat\n")) == 1
    (record,) = shell.run("encode", "--jsonl", stdin=b'{"text": "cat.png"}\n')
    assert (record["item"], "error" in record) == ("cat.png", False)
    (record,) = shell.run("encode", "--texts", "cat.png")
    assert "error" not in record


def test_an_array(shell: Shell, client: Client, tmp_path: Path) -> None:
    file = tmp_path / "embeddings.npy"
    # The second is not UTF-8, and the third is empty.
    written = shell.run("encode", "-o", str(file), stdin=b"a cat\n\xff\n\na dog\n", status=1)
    assert written == []
    embeddings = np.load(file)
    assert embeddings.dtype == np.float32
    assert list(np.isnan(embeddings).all(axis=1)) == [False, True, True, False]
    assert np.array_equal(embeddings[[0, 3]], client.encode(["a cat", "a dog"]))
    assert [line.split(":")[1] for line in shell.errors.splitlines()] == [" item 1", " item 2"]
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


def test_items_that_fail(shell: Shell, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    good, *failed = shell.run("encode", "a cat", str(broken), "missing.jpg", status=1)
    assert "embedding" in good
    assert ["error" in each and "embedding" not in each for each in failed] == [True, True]
    assert shell.errors.count("\n") == 2
    for command in (["classify", "--labels", "cat,dog"], ["rank", "a cat"]):
        good, bad = shell.run(*command, CAT, str(broken), status=1)
        assert good["item"] == CAT
        assert (bad["index"], bad["item"]) == (1, str(broken))
        assert "image" in bad["error"]


def test_rank(shell: Shell, client: Client) -> None:
    texts = ["a car", "a slice of pizza", "a rocket"]
    records = shell.run("rank", PIZZA, *texts)
    for record, ranking in zip(records, client.rank(PIZZA, texts), strict=True):
        assert record == {
            "index": ranking.index,
            "item": ranking.item,
            "probability": ranking.probability,
            "cosine": ranking.cosine,
        }
    assert records[0]["item"] == "a slice of pizza"


def test_classify(shell: Shell, tmp_path: Path) -> None:
    """With more images than are classified together."""
    (tmp_path / "labels.txt").write_text("pizza\nrocket, red\n\n")
    (tmp_path / "out.jsonl").write_text("older")
    lines = "".join(f"{CAT if index % 2 else PIZZA}\n" for index in range(130)).encode()
    written = shell.run(
        *("classify", "--labels", "cat, house", "--labels", str(tmp_path / "labels.txt")),
        *("-o", str(tmp_path / "out.jsonl")),
        stdin=lines,
    )
    assert written == []
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [each["index"] for each in records] == list(range(130))
    best = [each["labels"][0]["label"] for each in records]
    assert best == ["pizza", "cat"] * 65
    labels = {each["label"] for each in records[0]["labels"]}
    assert labels == {"cat", "house", "pizza", "rocket, red"}
    assert sum(each["probability"] for each in records[0]["labels"]) == pytest.approx(1)


def test_info(shell: Shell) -> None:
    (info,) = shell.run("info")
    assert (info["model"], info["dim"]) == ("emoji-small::embedded", 256)


def test_what_is_wrong_is_one_line(
    shell: Shell, unused_address: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for arguments, word in (
        (["encode", str(tmp_path / "none.txt")], "none.txt"),
        (["rank", "missing.png", "a cat"], "missing.png"),
        (["encode", "--model", "ViT-B/32", "a cat"], "ViT-B/32"),
        (["classify", CAT, "--labels", ","], "label"),
    ):
        assert shell.run(*arguments, status=1) == []
        assert shell.errors.count("\n") == 1
        assert word in shell.errors
    shell.run("encode", "--jsonl", stdin=b'"a cat"\n{\n', status=1)
    assert "stdin, line 2 is not JSON" in shell.errors
    shell.run("encode", "long " * 100)
    assert shell.errors.startswith("clip_client: warning: 1 text was truncated")
    for name in ("cat", "here:51000"):
        assert main(["encode", name, "a cat"]) == 1
        assert capfd.readouterr().err.count("\n") == 1
    for wrong in (
        ["-o", "out.csv"],
        ["-o", "nowhere/out.npy"],
        ["--norm", "2", "--no-such"],
        ["--batch-size", "0"],
        ["--timeout", "0"],
        ["--timeout", "soon"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(["encode", unused_address, "a cat", *wrong])
        assert ended.value.code == 2


def test_the_reader_of_the_output_leaves(onnx_server: Server) -> None:
    """As in `| head`."""
    texts = b"".join(b"text %d\n" % number for number in range(2_000))
    with subprocess.Popen(
        [*COMMAND, "encode", onnx_server.grpc],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(texts)
        process.stdin.close()
        assert json.loads(process.stdout.readline())["item"] == "text 0"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_the_progress_bar(onnx_server: Server, tmp_path: Path) -> None:
    """It is on a terminal, and the records are where stdout is."""
    terminal, other_end = pty.openpty()
    (tmp_path / "captions.txt").write_text("a cat\n" * 300)
    done = subprocess.run(
        [*COMMAND, "encode", onnx_server.grpc, "captions.txt"],
        stdout=subprocess.PIPE,
        stderr=other_end,
        cwd=tmp_path,
        env={**os.environ, "TERM": "xterm"},
        check=True,
    )
    os.close(other_end)
    assert len(done.stdout.splitlines()) == 300
    assert b"encoding" in os.read(terminal, 1 << 16)
    os.close(terminal)
