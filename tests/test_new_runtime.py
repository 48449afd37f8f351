"""The registry of runtimes: a new one is what CONTRIBUTING.md says, and the docs agree with it."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, Start, copy_package, flow

from clip_client import Client
from clip_server.runtimes import RUNTIMES, find

RUNTIME = '''
"""Embeds by counting: enough to see that a runtime is served."""

import numpy as np

from clip_server.models import zoo


class ToyRuntime:
    name, device, precision = "toy", "cpu", "fp32"
    concurrent, overlaps = True, False

    def __init__(self, card):
        self.card = card

    @classmethod
    def load(cls, name, *, model_path=None, device=None, precision=None, threads=None):
        return cls(zoo.resolve(name, model_path))

    def encode_image(self, pixels):
        return np.full((len(pixels), self.card.dim), pixels.shape[-1], np.float32)

    def encode_text(self, tokens):
        rows = (tokens != 0).sum(axis=1, dtype=np.float32)
        return np.repeat(rows[:, None], self.card.dim, axis=1)
'''
LINE = """
    RuntimeSpec(
        "toy",
        "Toy",
        "clip_server.runtimes.toy:ToyRuntime",
        extras=("toy",),
        packages=("numpy",),
        devices=("CPU",),
        precisions=("fp32",),
        files=None,
        flow="toy-flow.yml",
    ),
)
"""
EXECUTOR = """
from clip_server.executors.base import BaseCLIPEncoder


class CLIPEncoder(BaseCLIPEncoder):
    runtime = "toy"
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package with one runtime more, by the recipe and nothing else."""
    folder = copy_package(tmp_path)
    (folder / "runtimes" / "toy.py").write_text(RUNTIME)
    table = folder / "runtimes" / "__init__.py"
    before, line, after = table.read_text("utf-8").partition("\n)\n\n\ndef find(")
    assert line
    table.write_text(before + LINE + line.removeprefix("\n)\n") + after, "utf-8")
    (folder / "executors" / "clip_toy.py").write_text(EXECUTOR)
    onnx_flow = (folder / "flows" / "onnx-flow.yml").read_text()
    (folder / "flows" / "toy-flow.yml").write_text(onnx_flow.replace("clip_onnx", "clip_toy"))
    return tmp_path


def test_a_new_runtime_is_served(package: Path, start: Start) -> None:
    server = start(flow("toy"), PYTHONPATH=str(package))
    assert "on toy (cpu, fp32)" in server.output()
    client = Client(server.grpc)
    embeddings = client.encode(["a cat", "a cat and a dog"])
    # The start and the end token are counted too.
    assert np.array_equal(embeddings[:, 0], [4, 7])
    assert client.info().runtime == "toy"


def test_every_command_knows_a_new_runtime(package: Path) -> None:
    for command, said in (
        (["clip_server", "--help"], "toy-flow.yml"),
        (["clip_server.benchmark", "--help"], "toy"),
        (["clip_server.evaluate", "retrieval", "--help"], "toy"),
        (["clip_server.models", "embedded"], "toy"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=package,
            capture_output=True,
            text=True,
            check=True,
        )
        # argparse may break a line at the hyphen.
        assert said in "".join(done.stdout.split()), command


def test_flows_and_executors_of_the_registry() -> None:
    flows = resources.files("clip_server.flows")
    for spec in RUNTIMES:
        built_in = yaml.safe_load(flows.joinpath(spec.flow).read_text("utf-8"))
        modules = built_in["executors"][0]["uses"]["metas"]["py_modules"]
        assert modules == [f"clip_server.executors.{spec.executor}"]
        assert (ROOT / "executors" / f"{spec.executor}.py").is_file()


def test_readme_agrees_with_the_registry() -> None:
    """Its table of runtimes names each one's flow, devices and precisions."""
    readme = (ROOT / "README.md").read_text("utf-8")
    rows = {
        cells[1].strip("` ").split("`")[0]: (cells[0].strip(), cells[2], cells[3])
        for line in re.findall(r"^\|(.*-flow\.yml.*)\|$", readme, re.MULTILINE)
        if len(cells := line.split("|")) == 4
    }
    assert rows.keys() == {spec.flow for spec in RUNTIMES}
    for spec in RUNTIMES:
        title, devices, weights = rows[spec.flow]
        assert title == spec.title
        assert tuple(each.strip() for each in devices.split(",")) == spec.devices
        assert set(re.findall(r"\b(?:fp32|fp16|bf16|int8)\b", weights)) == set(spec.precisions)


def test_extras_of_the_registry() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    for spec in RUNTIMES:
        for extra in spec.extras:
            assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), extra
    with pytest.raises(Exception, match="no runtime is named 'none'; there are torch, onnx"):
        find("none")
