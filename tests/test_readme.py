"""The README's blocks do what it says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, Server

from clip_server import flow

README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def on(server: Server, block: str) -> str:
    """A block with the addresses of a running server."""
    for documented, port in zip((51000, 51001, 51002), server.ports, strict=True):
        block = block.replace(str(documented), str(port))
    return block


def test_the_two_commands_come_first() -> None:
    assert blocks("")[0].split() == ["make", "serve", "make", "test"]
    makefile = (ROOT / "Makefile").read_text()
    for target in ("serve", "test", "lint"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_python(onnx_server: Server) -> None:
    (block,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", on(onnx_server, block)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "(2, 256)"
    assert "a slice of pizza" in lines[1]
    assert lines[-1] == "dog"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(onnx_server: Server) -> None:
    answers = []
    for block in blocks("bash"):
        done = subprocess.run(
            ["bash", "-c", on(onnx_server, block)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        answers.append(json.loads(done.stdout)["data"])
    assert [len(each["embedding"]) for each in answers[0]] == [256, 256]
    assert answers[1][0]["matches"][0]["text"] == "a cat"


def test_yaml() -> None:
    for page in (README, (ROOT / "docs" / "flows.md").read_text("utf-8")):
        found = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        assert found
        for block in found:
            spec = flow.expand(flow.load(block))
            assert spec["executors"][0]["uses"]["jtype"] == "CLIPEncoder"
            with_embedded = yaml.safe_load(block.replace("ViT-L-14::openai", "embedded")
                                           .replace("ViT-B-32::openai", "embedded"))  # fmt: skip
            assert flow.prepare(with_embedded)["gateway"]["uses"] == "ClipGateway"


def test_links() -> None:
    prose = re.sub(r"^```.*?^```|`[^`\n]+`", "", README, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)\)", prose)
    assert "docs/embedded-model.md" in links
    for link in links:
        assert link.startswith("http") or (ROOT / link).exists(), link
