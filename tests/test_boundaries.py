"""The house: imports go downward only, and what is optional stays so."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# A module may import its own room and those to the right of it, nothing else of ours.
ALLOWED = {
    "clip_client": [],
    "clip_server.errors": [],
    "clip_server.install": [],
    "clip_server.process": [],
    "clip_server.model_card": [],
    "clip_server.halving": ["clip_server.runtimes.protocol"],
    # A command, which may look at the rooms above the catalogue.
    "clip_server.models.__main__": [
        "clip_server.runtimes",
        "clip_server.models",
        "clip_server.towers",
        "clip_server.model_card",
        "clip_server.process",
    ],
    "clip_server.towers": ["clip_server.model_card", "clip_server.errors"],
    "clip_server.models": [
        "clip_server.towers",
        "clip_server.model_card",
        "clip_server.install",
        "clip_server.process",
        "clip_server.errors",
    ],
    "clip_server.runtimes": [
        "clip_server.models",
        "clip_server.towers",
        "clip_server.model_card",
        "clip_server.install",
        "clip_server.errors",
    ],
    "clip_server.rank": [],
    "clip_server.request_parameters": ["clip_server.errors"],
    "clip_server.cache": [],
    "clip_server.queues": [],
    "clip_server.workers": [],
    "clip_server.engine": [
        "clip_server.models",
        "clip_server.towers",
        "clip_server.model_card",
        "clip_server.runtimes.protocol",
        "clip_server.halving",
        "clip_server.queues",
        "clip_server.cache",
        "clip_server.workers",
        "clip_server.errors",
    ],
    "clip_server.service": [
        "clip_client.data_uri",
        "clip_client.proto",
        "clip_server.engine",
        "clip_server.rank",
        "clip_server.errors",
    ],
    "clip_server.streams": [
        "clip_client.proto",
        "clip_client.envelope",
        "clip_server.service",
        "clip_server.errors",
    ],
    "clip_server.handlers": ["clip_client.proto", "clip_server.streams"],
    "clip_server.executors": [
        "clip_client.proto",
        "clip_server.handlers",
        "clip_server.streams",
        "clip_server.service",
        "clip_server.request_parameters",
        "clip_server.engine",
        "clip_server.rank",
        "clip_server.runtimes",
        "clip_server.models",
        "clip_server.towers",
        "clip_server.model_card",
        "clip_server.process",
        "clip_server.errors",
    ],
    "clip_server.gateway": [
        "clip_client",
        "clip_server.handlers",
        "clip_server.streams",
        "clip_server.service",
        "clip_server.request_parameters",
        "clip_server.process",
        "clip_server.errors",
    ],
    "clip_server.reporting": [],
    "clip_server.variants": [
        "clip_server.runtimes",
        "clip_server.models",
        "clip_server.towers",
        "clip_server.model_card",
        "clip_server.errors",
    ],
    "clip_server.evaluate": [
        "clip_client",
        "clip_server.reporting",
        "clip_server.variants",
        "clip_server.engine",
        "clip_server.rank",
        "clip_server.runtimes",
        "clip_server.models",
        "clip_server.towers",
        "clip_server.model_card",
        "clip_server.process",
        "clip_server.errors",
    ],
    "clip_server.benchmark": [
        "clip_server.reporting",
        "clip_server.variants",
        "clip_server.runtimes",
        "clip_server.models",
        "clip_server.towers",
        "clip_server.model_card",
        "clip_server.process",
        "clip_server.errors",
    ],
    "clip_server.convert": [
        "clip_server.reporting",
        "clip_server.runtimes",
        "clip_server.models",
        "clip_server.towers",
        "clip_server.model_card",
        "clip_server.process",
        "clip_server.install",
        "clip_server.errors",
    ],
    "clip_server.ports": ["clip_server.errors"],
    "clip_server.start_failures": [],
    "clip_server.flow_keys": ["clip_server.executors.parameters", "clip_server.errors"],
    "clip_server.flow": [
        "clip_server.runtimes",
        "clip_server.flow_keys",
        "clip_server.ports",
        "clip_server.executors.parameters",
        "clip_server.install",
        "clip_server.errors",
    ],
    "clip_server.__main__": [
        "clip_server.runtimes",
        "clip_client.proto",
        "clip_server.flow",
        "clip_server.start_failures",
        "clip_server.gateway",
        "clip_server.process",
        "clip_server.install",
        "clip_server.errors",
    ],
}
# Who may know a framework.
FRAMEWORKS = {
    "jina": ["clip_server.executors", "clip_server.gateway", "clip_server.flow",
             "clip_server.flow_keys",
             "clip_server.__main__"],
    "docarray": ["clip_server.executors"],
    "torch": ["clip_server.runtimes.torch", "clip_server.runtimes.torch_bert",
              "clip_server.models.weights", "clip_server.convert.export"],
    "open_clip": ["clip_server.runtimes.torch"],
    "onnxruntime": ["clip_server.runtimes.onnx"],
    "onnx": ["clip_server.towers.builder", "clip_server.towers.graph",
             "clip_server.towers.onnx_file", "clip_server.convert"],
    "pycuda": ["clip_server.runtimes.cuda"],
    "onnxscript": ["clip_server.convert.export"],
}  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in (
        ("clip_client", "clip_client"),
        ("clip_server", "clip_server"),
        ("executors", "clip_server.executors"),
    ):
        for file in (ROOT / folder).rglob("*.py"):
            parts = [package, *file.relative_to(ROOT / folder).with_suffix("").parts]
            if parts[1] == "build":  # left by an install of the client
                continue
            found[".".join(part for part in parts if part != "__init__")] = file
    return found


def imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def test_imports_go_downward() -> None:
    checked = 0
    for name, file in modules().items():
        room = next((room for room in ALLOWED if within(name, room)), None)
        if room is None:
            assert name == "clip_server", f"{name} is in no room"
            continue
        for imported in imports(file):
            if imported.split(".")[0] not in ("clip_client", "clip_server"):
                continue
            if imported in ("clip_server", "clip_server.__version__", "clip_client"):
                continue
            checked += 1
            fits = any(within(imported, each) for each in [room, *ALLOWED[room]])
            # `from a.b import c` also names the packages on the way down.
            onway = any(within(each, imported) for each in [room, *ALLOWED[room]])
            assert fits or onway, f"{name} imports {imported}"
    assert checked > 50


def test_frameworks_stay_in_their_rooms() -> None:
    for name, file in modules().items():
        for imported in imports(file):
            rooms = FRAMEWORKS.get(imported.split(".")[0])
            assert rooms is None or any(within(name, room) for room in rooms), (name, imported)


def test_the_catalogue_does_without_onnx_and_torch() -> None:
    """Where only torch is installed, or nothing yet, models have their cards all the same."""
    code = (
        "import sys\n"
        "sys.modules['onnx'] = sys.modules['torch'] = None\n"
        "from clip_server.models import zoo\n"
        "from clip_server.towers import registry\n"
        "print(len(registry.tensor_shapes(zoo.resolve('CN-CLIP/ViT-B-16').config)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 300


@pytest.mark.parametrize("module", ["clip_client", "clip_client.client", "clip_client.flow"])
def test_the_client_is_light(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "heavy = {'jina', 'docarray', 'pydantic', 'torch', 'PIL', 'clip_server'}\n"
        "print(heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
