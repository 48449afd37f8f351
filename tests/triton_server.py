"""A real Triton Inference Server, without a GPU, from the wheel of NVIDIA's pytriton."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import free_ports
from guard import popen

# Its python backend was built before numpy 2.
WHEELS = ("nvidia-pytriton==0.7.0", "numpy==1.26.4")
MISSING = "a real Triton is needed, from the wheel nvidia-pytriton and for numpy 1.26"
START_SECONDS = 120


@dataclass(frozen=True)
class Installed:
    """server: the program. python: an interpreter with the packages that the models need, and not
    with this project's, so that the repository's own copy of the code is used."""

    server: Path
    python: Path

    @property
    def backends(self) -> Path:
        return self.server.parents[1] / "backends"


def install(folder: Path) -> Installed:
    """Installs the wheel, or skips the test aloud where there is none for this Python."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary", ":all:"]
    wheels = folder / "wheels"
    done = subprocess.run([*pip, "--target", wheels, *WHEELS], capture_output=True, text=True)
    name = f"{sys.version_info.major}.{sys.version_info.minor}"
    server = wheels / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    stub = server.parents[1] / "python_backend_stubs" / name / "triton_python_backend_stub"
    if done.returncode or not stub.is_file():
        pytest.skip(f"{MISSING}: {done.stderr.strip() or f'no stub for Python {name}'}")
    library = subprocess.run(["ldd", stub], capture_output=True, text=True, env=environment())
    if "not found" in library.stdout:
        pytest.skip(f"{MISSING}, and a libpython{name}.so")
    shutil.copy(stub, server.parents[1] / "backends" / "python")
    python = folder / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", python], check=True)
    packages = python / "lib" / f"python{name}" / "site-packages"
    # The wheels first: their numpy is the older one. Path files in these folders are not read, so
    # that editable packages are not found.
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "paths.pth").write_text("\n".join([str(wheels), *ours, ""]))
    return Installed(server, python / "bin" / "python")


def environment() -> dict[str, str]:
    """For the stub, which needs Python as a library."""
    paths = [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, paths))}


@dataclass(frozen=True)
class Triton:
    """A server that is ready."""

    http_port: int
    grpc_port: int

    @property
    def addresses(self) -> list[str]:
        """For our client; that of HTTP where the extra of tritonclient for it is installed."""
        http = [f"triton://127.0.0.1:{self.http_port}"] if find_spec("geventhttpclient") else []
        return [*http, f"triton+grpc://127.0.0.1:{self.grpc_port}"]

    def post(self, path: str) -> dict[str, object]:
        """Sends an empty request of Triton's own HTTP protocol."""
        url = f"http://127.0.0.1:{self.http_port}/v2/{path}"
        with urllib.request.urlopen(urllib.request.Request(url, method="POST")) as answer:
            return json.loads(answer.read() or b"{}")

    def statistics(self, model: str) -> dict[str, int]:
        """Requests that a model served, and the batches it served them in."""
        url = f"http://127.0.0.1:{self.http_port}/v2/models/{model}/stats"
        with urllib.request.urlopen(url) as answer:
            found = json.loads(answer.read())["model_stats"][0]
        return {"items": found["inference_count"], "batches": found["execution_count"]}


@contextmanager
def running(installed: Installed, repository: Path, log: Path) -> Iterator[Triton]:
    """Serves a repository."""
    http_port, grpc_port = free_ports(2)
    command = [
        installed.server,
        f"--model-repository={repository}",
        f"--backend-directory={installed.backends}",
        "--model-control-mode=explicit",
        "--load-model=*",
        "--allow-metrics=false",
        "--http-address=127.0.0.1",
        f"--http-port={http_port}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={grpc_port}",
    ]
    path = f"{installed.python.parent}:{os.environ['PATH']}"
    with log.open("wb") as output:
        process = popen(command, stdout=output, stderr=output, env=environment() | {"PATH": path})
    try:
        wait_until_ready(process, http_port, log)
        yield Triton(http_port, grpc_port)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(errors="replace")[-5000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready").close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise AssertionError(log.read_text(errors="replace")[-5000:])
