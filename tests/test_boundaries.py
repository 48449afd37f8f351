"""The house: imports go downward only, and what is optional stays so."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

GROUND = [
    "clip_server.errors",
    "clip_server.install",
    "clip_server.model_card",
    "clip_server.launch.process_setup",
    "clip_server.logs",
    "clip_server.watched_files",
    "clip_server.launch.tracing",
    "clip_server.launch.heartbeats",
    "clip_server.launch.gateway_group",
    "clip_server.commands.console",
]
# A module may import its own room and those to the right of it, nothing else of ours.
ALLOWED = {
    "clip_client": [],
    # The ground: what every room may use.
    "clip_server.errors": [],
    "clip_server.install": [],
    "clip_server.model_card": [],
    "clip_server.launch.process_setup": [],
    "clip_server.logs": [],
    "clip_server.watched_files": ["clip_server.errors"],
    "clip_server.launch.tracing": [],
    "clip_server.launch.heartbeats": [],
    "clip_server.launch.gateway_group": [],
    "clip_server.commands.console": [],
    "clip_server.keys": ["clip_server.errors", "clip_server.watched_files",
                         "clip_server.commands.console"],
    # Shared by the processes that Jina starts.
    "clip_server.launch.ports": GROUND,
    "clip_server.launch.jina_internals": [*GROUND, "clip_server.launch.ports",
                                          "clip_server.rpc.documents"],
    # Commands whose modules lie in a room below what they show.
    "clip_server.models.__main__": [*GROUND, "clip_server.runtimes", "clip_server.models",
                                    "clip_server.towers"],
    # Models of a repository for Triton, which run in its processes.
    "clip_server.convert.triton.models": ["clip_server.errors", "clip_server.model_card",
                                          "clip_server.preprocess"],
    # First floor.
    "clip_server.preprocess": GROUND,
    "clip_server.towers": GROUND,
    "clip_server.rpc": ["clip_client.documents", "clip_client.envelope", "clip_client.errors",
                        "clip_client.proto", *GROUND],
    "clip_server.search": ["clip_client.proto", "clip_client.tags", *GROUND, "clip_server.rpc"],
    # Second floor: the catalogue of models.
    "clip_server.models": [*GROUND, "clip_server.towers", "clip_server.preprocess"],
    # Third floor.
    "clip_server.runtimes": [*GROUND, "clip_server.models", "clip_server.towers"],
    # Fourth floor.
    "clip_server.engine": ["clip_client.data_uri", "clip_client.proto", "clip_client.scores",
                           *GROUND, "clip_server.preprocess", "clip_server.models",
                           "clip_server.rpc", "clip_server.runtimes"],
    # Fifth floor: the processes of a server, and the commands.
    "clip_server.executors": ["clip_client.documents", "clip_client.errors",
                              "clip_client.images", "clip_client.proto",
                              "clip_client.scores", "clip_client.tags",
                              *GROUND, "clip_server.launch.jina_internals",
                              "clip_server.engine", "clip_server.models",
                              "clip_server.preprocess", "clip_server.rpc",
                              "clip_server.runtimes", "clip_server.search"],
    "clip_server.gateway": ["clip_client", *GROUND, "clip_server.keys",
                            "clip_server.launch.jina_internals", "clip_server.rpc"],
    "clip_server.launch.server": [*GROUND, "clip_server.gateway", "clip_server.launch"],
    "clip_server.launch": [*GROUND, "clip_server.keys", "clip_server.runtimes",
                           "clip_server.executors.parameters",
                           "clip_server.executors.indexer_parameters"],
    "clip_server.commands": [*GROUND, "clip_server.models", "clip_server.runtimes"],
    "clip_server.benchmark": [*GROUND, "clip_server.commands", "clip_server.models",
                              "clip_server.runtimes"],
    "clip_server.convert": ["clip_client.scores", *GROUND, "clip_server.commands",
                            "clip_server.models", "clip_server.runtimes", "clip_server.towers"],
    "clip_server.evaluate": ["clip_client", *GROUND, "clip_server.commands", "clip_server.engine",
                             "clip_server.models", "clip_server.preprocess",
                             "clip_server.rpc.probes", "clip_server.runtimes",
                             "clip_server.search.relevance"],
    "clip_server.compare": ["clip_client", *GROUND, "clip_server.commands",
                            "clip_server.evaluate.encoders", "clip_server.models"],
    "clip_server.gallery": ["clip_client", *GROUND, "clip_server.commands",
                            "clip_server.evaluate.encoders", "clip_server.rpc",
                            "clip_server.runtimes", "clip_server.search"],
    # The roof.
    "clip_server.__main__": [*GROUND, "clip_server.launch", "clip_server.runtimes"],
}  # fmt: skip
# Who may know a framework.
FRAMEWORKS = {
    "jina": ["clip_server.executors", "clip_server.gateway", "clip_server.launch.jina_internals",
             "clip_server.launch.jina_flow", "clip_server.launch.server"],
    "docarray": ["clip_server.executors", "clip_server.gateway",
                 "clip_server.rpc.documents"],
    "torch": ["clip_server.runtimes.torch", "clip_server.runtimes.torch_bert",
              "clip_server.runtimes.torch_siglip",
              "clip_server.models.weights", "clip_server.convert.export"],
    "open_clip": ["clip_server.runtimes.torch"],
    "onnxruntime": ["clip_server.runtimes.onnx_sessions",
                    "clip_server.convert.triton.models.tower"],
    "onnx": ["clip_server.runtimes.onnx_towers", "clip_server.towers.lookups",
             "clip_server.towers.builder", "clip_server.towers.graph",
             "clip_server.towers.onnx_file", "clip_server.convert"],
    "faiss": ["clip_server.search.local", "clip_server.search.segments"],
    "pymilvus": ["clip_server.search.milvus"],
    "pycuda": ["clip_server.runtimes.cuda"],
    "cuda": ["clip_server.runtimes.cuda"],
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


@pytest.mark.parametrize("module", ["clip_client", "clip_client.client", "clip_client.sansio"])
def test_the_client_is_light(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "heavy = {'jina', 'docarray', 'pydantic', 'torch', 'PIL', 'clip_server'}\n"
        "print(heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_gateway_does_without_inference() -> None:
    """It starts where nothing that decodes, tokenizes or computes can be imported."""
    code = (
        "import sys\n"
        "for name in ('PIL', 'tokenizers', 'safetensors', 'onnx', 'onnxruntime', 'torch',\n"
        "             'ftfy', 'huggingface_hub'):\n"
        "    sys.modules[name] = None\n"
        "import clip_server.gateway\n"
        "rooms = ('engine', 'models', 'preprocess', 'towers', 'runtimes', 'executors')\n"
        "print([name for name in sys.modules if name.startswith(\n"
        "    tuple(f'clip_server.{room}' for room in rooms))])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# What a distribution is imported as, where that is not its own name.
IMPORTED_AS = {
    "cuda_core": "cuda",
    "grpcio": "grpc",
    "grpcio_health_checking": "grpc_health",
    "grpcio_reflection": "grpc_reflection",
    "protobuf": "google",
    "pyyaml": "yaml",
    "pillow": "PIL",
    "open_clip_torch": "open_clip",
    "faiss_cpu": "faiss",
    "opentelemetry_api": "opentelemetry",
}


@pytest.mark.parametrize(
    ("file", "packages"),
    [
        ("clip_client/pyproject.toml", ["clip_client"]),
        ("pyproject.toml", ["clip_server"]),
    ],
)
def test_what_is_imported_is_declared(file: str, packages: list[str]) -> None:
    declared = set(re.findall(r'^ *"?[^"\n]*"([A-Za-z][\w.-]*)[\[>=<! ;"]', text := (ROOT / file)
                              .read_text("utf-8"), re.MULTILINE))  # fmt: skip
    for line in re.findall(r"^[\w-]+ = \[(.*)\]$", text, re.MULTILINE):
        declared |= set(re.findall(r'"([A-Za-z][\w.-]*)', line))
    if "clip_server" in packages:
        client = (ROOT / "clip_client/pyproject.toml").read_text("utf-8")
        declared |= set(re.findall(r'^  "([\w-]+)', client, re.MULTILINE))
    known = {name.replace("-", "_").lower() for name in declared}
    known |= {IMPORTED_AS[name] for name in known & IMPORTED_AS.keys()}
    # Pillow is the caller's own, where the client gets images of it; the others are for mypy.
    known |= {"PIL", "typing_extensions", "_typeshed", "clip_client", "clip_server"}
    # The libraries that the client is plugged into, which are there already.
    known |= {"langchain_core", "llama_index"}
    for name, module in modules().items():
        if name.split(".")[0] not in packages:
            continue
        imported = {each.split(".")[0] for each in imports(module)}
        undeclared = imported - known - sys.stdlib_module_names
        assert not undeclared, f"{name} imports {undeclared}"
