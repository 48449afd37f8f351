"""Who is measured: this server in several forms, its runtime alone, and its peers."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from benchmarks import environments, workload
from benchmarks.processes import LOGS, Driver, NotAvailableError, Server
from benchmarks.workload import CACHE, MODEL

HERE = Path(__file__).parent
DRIVERS = HERE / "drivers"
VOCABULARY = HERE.parent / "clip_server" / "preprocess" / "data" / "bpe_simple_vocab_16e6.txt.gz"
HOST = "127.0.0.1"
SCHEMES = {"grpc": "grpc", "http": "http", "websocket": "ws"}

OURS, INT8, RAW = "clip-server", "clip-server int8", "raw runtime"
INFINITY, CLIP_AS_SERVICE, TRITON = "infinity", "clip-as-service", "Triton"
EMBEDDED, NULL = "clip-server embedded", "clip-server null"
EMBEDDED_REPLICAS = "clip-server embedded, two replicas"
# With a model that takes no time: what is measured is the server around it.
THIN, THIN_INFINITY = "clip-server thin", "infinity thin"
# ViT-B-16-SigLIP2.
SIGLIP2, SIGLIP2_INT8 = "clip-server SigLIP 2", "clip-server SigLIP 2 int8"
SIGLIP2_INFINITY = "infinity SigLIP 2"
TORCH, TWO_REPLICAS = "clip-server torch", "clip-server two replicas"

# The cache of our servers.
PREPARED = CACHE / "prepared"

_ONNX = "clip_server.executors.clip_onnx"

# What is compared before anything is timed, and how near its vectors must be to ours.
COMPARED = {"texts": 32, "photos": 8}
LEAST_COSINE = {
    RAW: 0.9999,
    INT8: 0.97,
    INFINITY: 0.99,
    THIN_INFINITY: 0.99,
    CLIP_AS_SERVICE: 0.99,
    TRITON: 0.9999,
}
# Who is driven over HTTP by OpenAI's API.
OPENAI = (INFINITY, THIN, THIN_INFINITY, SIGLIP2_INFINITY)


@dataclass(frozen=True)
class Started:
    """A server, and its address for each protocol."""

    server: Server
    addresses: dict[str, str]


class Peers:
    """Servers and drivers of a leg by name, each started when asked for and kept until its end.

    first_port: the first of those that the servers listen on, one after the other.
    """

    def __init__(self, first_port: int) -> None:
        self._ports = itertools.count(first_port)
        self._stack = ExitStack()
        LOGS.mkdir(parents=True, exist_ok=True)
        self.started = functools.cache(self._start)
        self.driver = functools.cache(self._drive)

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def available(self, *names: str) -> dict[str, Driver]:
        """Drivers of those that run here and give the vectors of the first; says which do not, and
        why."""
        found = {}
        for name in names:
            try:
                found[name] = self.driver(name)
                self._check(name, names[0])
            except NotAvailableError as error:
                found.pop(name, None)
                print(f"  {name}: not available: {error}", flush=True)
        return found

    def another(self, name: str) -> Driver:
        """One more driver of a server, to be used beside the first."""
        return self._drive(name)

    def another_server(self, name: str) -> Started:
        """One more server, such as one to be ended."""
        return self._start(name)

    def first_start(self, name: str) -> Server:
        """Starts one of our servers with nothing prepared, and ends it."""
        shutil.rmtree(PREPARED, ignore_errors=True)
        server = self._start(name).server
        server.close()
        return server

    def visitors(self, name: str, seconds: float) -> subprocess.Popen[str]:
        """The crowd of drivers/visitors.py, at all protocols of a server."""
        addresses = self.started(name).addresses.values()
        command = [sys.executable, DRIVERS / "visitors.py", seconds, workload.photos(), *addresses]
        crowd = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
        self._stack.callback(crowd.kill)
        return crowd

    def indexer(self, name: str, folder: Path, method: str) -> tuple[str, Callable[[], Server]]:
        """The gRPC address of a flow with an indexer whose collection is in `folder`, and what
        starts it, which may be done several times."""
        port = next(self._ports)
        listen = {"protocol": "grpc", "port": port, "host": HOST}
        indexer = {
            "jtype": "CLIPIndexer",
            "with": {"path": str(folder), "index_method": method},
            "metas": {"py_modules": ["clip_server.executors.indexer"]},
        }
        flow = _write_flow(name, listen, **_encoder(NULL), indexer=indexer)
        command = [sys.executable, "-m", "clip_server", flow]
        return f"{HOST}:{port}", lambda: Server(name, command, "clip_server: ready", {})

    def _check(self, name: str, reference: str) -> None:
        if name not in LEAST_COSINE:
            return
        least = {
            kind: _least_cosine(self.driver(reference), self.driver(name), kind, count)
            for kind, count in COMPARED.items()
        }
        shown = ", ".join(f"{kind} {cosine:.5f}" for kind, cosine in least.items())
        if min(least.values()) < LEAST_COSINE[name]:
            raise NotAvailableError(f"its vectors are not ours: lowest cosine {shown}")
        print(f"  {name}: lowest cosine to {reference}: {shown}", flush=True)

    def openai_driver(self, name: str) -> Driver:
        """A driver of OpenAI's API, whatever else the server has."""
        address = self.started(name).addresses["http"]
        return self._driver(name, Path(sys.executable), "openai_driver.py", address)

    def _drive(self, name: str, protocol: str = "grpc") -> Driver:
        if name in OPENAI:
            return self.openai_driver(name)
        interpreter, script, target = Path(sys.executable), "clip_server_driver.py", ""
        if name == RAW:
            script, target = "raw_driver.py", str(workload.checkpoint())
        else:
            target = self.started(name).addresses[protocol]
        if name == CLIP_AS_SERVICE:
            interpreter = environments.python("clip_as_service")
            script = "clip_as_service_driver.py"
        return self._driver(name, interpreter, script, target)

    def _driver(self, name: str, interpreter: Path, script: str, target: str) -> Driver:
        driver = Driver(name, [interpreter, DRIVERS / script, target, workload.photos()])
        self._stack.callback(driver.close)
        return driver

    def _start(self, name: str) -> Started:
        print(f"  starting {name}", flush=True)
        start = {
            INFINITY: lambda: self._infinity(INFINITY, _clip_folder(INFINITY)),
            THIN_INFINITY: lambda: self._infinity(THIN_INFINITY, _clip_folder(THIN_INFINITY)),
            SIGLIP2_INFINITY: lambda: self._infinity(SIGLIP2_INFINITY, _siglip2_folder()),
            CLIP_AS_SERVICE: self._clip_as_service,
            TRITON: self._triton,
        }
        started = start[name]() if name in start else self._clip_server(name)
        self._stack.callback(started.server.close)
        return started

    def _clip_server(self, name: str) -> Started:
        ports = dict(zip(SCHEMES, self._ports, strict=False))
        listen = {"protocol": list(ports), "port": list(ports.values()), "host": HOST}
        flow = _write_flow(name, listen, **_encoder(name))
        command = [sys.executable, "-m", "clip_server", flow]
        addresses = {each: f"{SCHEMES[each]}://{HOST}:{port}" for each, port in ports.items()}
        environment = {"XDG_CACHE_HOME": str(PREPARED)}
        return Started(Server(name, command, "clip_server: ready", environment), addresses)

    def _infinity(self, name: str, model: Path) -> Started:
        """model: a Hugging Face folder."""
        python, port = environments.python("infinity"), str(next(self._ports))
        command = [python.with_name("infinity_emb"), "v2"]
        command += ["--model-id", model, "--served-model-name", "clip", "--batch-size", "32"]
        # Its better transformer is not for CLIP, and its warm-up is left to ours.
        command += ["--device", "cpu", "--no-bettertransformer", "--no-model-warmup"]
        command += ["--host", HOST, "--port", port]
        quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_HOME": str(CACHE)}
        server = Server(name, command, "Uvicorn running", quiet)
        return Started(server, {"http": f"http://{HOST}:{port}"})

    def _clip_as_service(self) -> Started:
        python, port = environments.python("clip_as_service"), next(self._ports)
        script = "clip_as_service_model.py"
        model = _written(CLIP_AS_SERVICE, python, script, workload.checkpoint())
        parameters = {"name": MODEL, "model_path": str(model), "device": "cpu"}
        listen = {"protocol": "grpc", "port": port, "host": HOST}
        module = "clip_server.executors.clip_onnx"
        flow = _write_flow(CLIP_AS_SERVICE, listen, "CLIPEncoder", module, parameters)
        quiet = {"NO_VERSION_CHECK": "1", "JINA_OPTOUT_TELEMETRY": "1"}
        command = [python, "-m", "clip_server", flow]
        server = Server(CLIP_AS_SERVICE, command, "Flow is ready to serve", quiet)
        return Started(server, {"grpc": f"grpc://{HOST}:{port}"})

    def _triton(self) -> Started:
        """From the wheel of NVIDIA's pytriton, with ONNX Runtime in the python backend."""
        python, ports = environments.python("triton"), [next(self._ports), next(self._ports)]
        program = environments.site_packages(python) / "pytriton" / "tritonserver"
        stub = program / "python_backend_stubs" / f"3.{sys.version_info.minor}"
        shutil.copy(stub / "triton_python_backend_stub", program / "backends" / "python")
        command = [program / "bin" / "tritonserver", "--model-repository", _model_repository()]
        command += ["--backend-directory", program / "backends", "--allow-metrics=false"]
        command += [f"--http-address={HOST}", f"--http-port={ports[0]}"]
        command += [f"--grpc-address={HOST}", f"--grpc-port={ports[1]}"]
        # The backend runs the first `python3` that it finds.
        path = f"{python.parent}:{os.environ['PATH']}"
        server = Server(TRITON, command, "Started HTTPService", {"PATH": path})
        addresses = {
            "grpc": f"triton+grpc://{HOST}:{ports[1]}",
            "http": f"http://{HOST}:{ports[0]}",
        }
        return Started(server, addresses)


def _model_repository() -> Path:
    """The checkpoint as `convert --to triton` exports it, made once."""
    folder = CACHE / "models" / "triton"
    if not (folder / "requirements.txt").is_file():  # written last
        command = [sys.executable, "-m", "clip_server.convert", workload.checkpoint()]
        command += ["--to", "triton", "--towers", "python", "--out", folder]
        with (LOGS / "triton model.log").open("wb") as log:
            subprocess.run([*map(str, command)], check=True, stdout=log, stderr=log)
    return folder


def _encoder(name: str) -> dict[str, Any]:
    """Of a flow: the executor of one of our own servers."""
    if name == NULL:
        module = str(HERE / "null_executor.py")
        return {"encoder": "NullEncoder", "module": module, "parameters": {"name": MODEL}}
    parameters = {"name": MODEL, "model_path": str(workload.checkpoint())}
    module = "clip_server.executors.clip_torch" if name == TORCH else _ONNX
    if name in (SIGLIP2, SIGLIP2_INT8):
        parameters = {"name": str(_siglip2_folder())}
    if name in (INT8, SIGLIP2_INT8):
        parameters["dtype"] = "int8"
    elif name == THIN:
        parameters = {"name": str(workload.thin_checkpoint())}
    elif name in (EMBEDDED, EMBEDDED_REPLICAS):
        parameters = {"name": "embedded"}
    return {"encoder": "CLIPEncoder", "module": module, "parameters": parameters}


def _write_flow(
    name: str,
    listen: dict[str, Any],
    encoder: str,
    module: str,
    parameters: dict[str, Any],
    indexer: dict[str, Any] | None = None,
) -> Path:
    clip = {"jtype": encoder, "with": parameters, "metas": {"py_modules": [module]}}
    executors = [
        {
            "name": executor,
            "host": HOST,
            "timeout_ready": -1,
            "replicas": 2 if name in (TWO_REPLICAS, EMBEDDED_REPLICAS) else 1,
            "uses": uses,
        }
        for executor, uses in (("clip", clip), ("indexer", indexer))
        if uses
    ]
    flow = {"jtype": "Flow", "version": "1", "with": listen, "executors": executors}
    file = CACHE / f"{name}.yml"
    # Jina reads `jtype` only where it stands first.
    file.write_text(yaml.safe_dump(flow, sort_keys=False))
    return file


def _clip_folder(name: str) -> Path:
    """One of our checkpoints in Hugging Face's form, for infinity."""
    checkpoint = workload.checkpoint() if name == INFINITY else workload.thin_checkpoint()
    python = environments.python("infinity")
    return _written(name, python, "infinity_model.py", checkpoint, VOCABULARY)


def _siglip2_folder() -> Path:
    """In Hugging Face's form, which this server reads too."""
    return _written("SigLIP 2", environments.python("infinity"), "siglip2_model.py")


def _written(name: str, python: Path, script: str, *arguments: Path) -> Path:
    """The folder that a script writes with a peer's packages, made once."""
    folder = CACHE / "models" / name
    done = folder / "done"
    if not done.is_file():
        command = [python, DRIVERS / script, *arguments, folder]
        with (LOGS / f"{name} model.log").open("wb") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
        done.touch()
    return folder


def _least_cosine(one: Driver, other: Driver, kind: str, count: int) -> float:
    ours, theirs = (_unit(each("vectors", kind=kind, count=count)) for each in (one, other))
    return float((ours * theirs).sum(axis=1).min())


def _unit(answer: dict[str, Any]) -> NDArray[np.float64]:
    vectors = np.array(answer["vectors"])
    unit: NDArray[np.float64] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
