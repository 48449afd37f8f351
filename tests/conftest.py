"""A real server as a process, and what the tests send to it."""

from __future__ import annotations

import atexit
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest
import requests
import yaml
from guard import popen
from prometheus_client.parser import text_string_to_metric_families

from clip_client.proto import clip_pb2 as pb
from clip_server.runtimes import prepared

if TYPE_CHECKING:
    from PIL import Image

# The caches of this run, for its servers too: prepared models would stay in the user's.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="clip-server-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

ROOT = Path(__file__).parent.parent
SLOW_EXECUTOR, STUCK_EXECUTOR, HELD_EXECUTOR, GPU_EXECUTOR = (
    str(ROOT / "tests" / f"{name}_executor.py") for name in ("slow", "stuck", "held", "gpu")
)
SAMPLES = ROOT / "clip_server" / "models" / "embedded" / "samples"
# Generous: other processes may keep the machine busy.
PATIENCE_SECONDS = 90
# Of the prepared models that a module leaves.
MOST_PREPARED_BYTES = 256 << 20
HAS_TORCH = find_spec("torch") is not None and find_spec("open_clip") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="the torch extra is not installed")


# Below what systems give to outgoing connections, and what executors take: nobody else takes one
# before the server does.
_PORTS = iter(random.sample(range(10_000, 16_384), 6_384))


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, all different."""
    return list(itertools.islice(filter(_is_free, _PORTS), count))


def free_range(count: int) -> int:
    """The first of so many consecutive ports that nobody listens on, none of `free_ports`."""
    starts = random.sample(range(8_000, 10_000 - count), 1_000)
    return next(start for start in starts if all(map(_is_free, range(start, start + count))))


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def eventually(holds: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> bool:
    """Whether a condition holds within some seconds: what processes do shows a little later."""
    end = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.05)
    return held


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    """An image as a file of a format has it, by Pillow's names."""
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def copy_package(target: Path) -> Path:
    """A copy of the server's package as it is installed, to be changed and put on PYTHONPATH."""
    ignored = shutil.ignore_patterns("__pycache__")
    package = target / "clip_server"
    shutil.copytree(ROOT / "clip_server", package, ignore=ignored)
    for name in ("executors", "flows"):
        shutil.copytree(ROOT / name, package / name, ignore=ignored)
    return package


def flow(
    runtime: str = "onnx",
    *,
    ports: list[int] | None = None,
    module: str = "",
    **parameters: Any,
) -> dict[str, Any]:
    """A flow with the three protocols on free ports, serving the embedded model.

    module: that of another CLIPEncoder than the runtime's.
    """
    return {
        "jtype": "Flow",
        "version": "1",
        "with": {
            "protocol": ["grpc", "http", "websocket"],
            "port": ports or free_ports(3),
            "host": "127.0.0.1",
        },
        "executors": [
            {
                "name": "clip",
                "uses": {
                    "jtype": "CLIPEncoder",
                    "with": {"name": "embedded", **parameters},
                    "metas": {"py_modules": [module or f"clip_server.executors.clip_{runtime}"]},
                },
            }
        ],
    }


def search_flow(
    folder: Path, encoder: dict[str, Any] | None = None, **indexer: Any
) -> dict[str, Any]:
    """The same flow with an indexer, whose collection is in a folder."""
    spec = flow("onnx", **(encoder or {}))
    spec["executors"].append(
        {
            "name": "indexer",
            "uses": {
                "jtype": "CLIPIndexer",
                "with": {"path": str(folder), **indexer},
                "metas": {"py_modules": ["clip_server.executors.indexer"]},
            },
        }
    )
    return spec


MILVUS = """
import sys
from milvus import default_server as server
server.set_base_dir(sys.argv[1])
server.config.set("proxy_port", int(sys.argv[2]))
server.listen_port = int(sys.argv[2])
server.start()
print("ready", flush=True)
sys.stdin.read()
server.stop()
"""


@pytest.fixture(scope="module", autouse=True)
def prepared_models_are_few() -> Iterator[None]:
    """Large models are prepared by the modules that serve them, and kept on the disk no longer."""
    yield
    if prepared.size() > MOST_PREPARED_BYTES:
        prepared.clear()


@pytest.fixture(scope="session")
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real Milvus server: that in MILVUS_URI, or one of its own."""
    if given := os.environ.get("MILVUS_URI"):
        yield given
        return
    folder, (port,) = tmp_path_factory.mktemp("milvus"), free_ports(1)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    packages = ["milvus==2.3.5", "setuptools<81"]
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    command = [python, "-c", MILVUS, folder / "data", str(port)]
    with popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield f"http://127.0.0.1:{port}"
        assert server.stdin is not None
        server.stdin.close()


@dataclass
class Server:
    """A server process and where it answers."""

    process: subprocess.Popen[bytes]
    log: Path
    ports: list[int]

    @property
    def grpc(self) -> str:
        return f"grpc://127.0.0.1:{self.ports[0]}"

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.ports[1]}"

    @property
    def websocket(self) -> str:
        return f"ws://127.0.0.1:{self.ports[2]}"

    @property
    def addresses(self) -> list[str]:
        return [self.grpc, self.http, self.websocket]

    def channel(self, *options: Any) -> grpc.Channel:
        """For calls by gRPC's own library."""
        return grpc.insecure_channel(self.grpc.removeprefix("grpc://"), *options)

    def output(self) -> str:
        return self.log.read_text("utf-8", errors="replace")

    def wait_until_ready(self) -> None:
        self.wait_for_output("clip_server: ready")

    def wait_for_output(self, text: str) -> None:
        """Waits until the server has printed a text. Fails with what it printed instead."""
        assert eventually(lambda: text in self.output() or self.process.poll() is not None), (
            f"not printed in time: {text}\n{self.output()}"
        )
        assert text in self.output(), f"the server ended:\n{self.output()}"

    def metrics(self, **headers: str) -> Counter[str]:
        """Its metrics, summed over their labels, by name without `clip_` and `_total`."""
        answer = requests.get(f"{self.http}/metrics", headers=headers, timeout=PATIENCE_SECONDS)
        assert answer.headers["content-type"].startswith("text/plain")
        found: Counter[str] = Counter()
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                found[sample.name.removeprefix("clip_").removesuffix("_total")] += sample.value
        return found

    def family(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def stop(self) -> None:
        if self.process.poll() is None:
            family = self.family()
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            finally:
                for each in family:
                    if each.is_running():
                        each.kill()


def encode_method(channel: grpc.Channel) -> Any:
    """The method `Encode`, from EncodeRequest to EncodeResponse."""
    return channel.unary_unary(
        "/clip.v1.Clip/Encode",
        request_serializer=pb.EncodeRequest.SerializeToString,
        response_deserializer=pb.EncodeResponse.FromString,
    )


class Http(requests.Session):
    """Requests to one server: `http.get("/info")`."""

    def __init__(self, server: str) -> None:
        super().__init__()
        self._server = server

    def request(self, method: Any, url: Any, *args: Any, **kwargs: Any) -> requests.Response:
        return super().request(method, f"{self._server}{url}", *args, timeout=60, **kwargs)


Start = Callable[..., Server]


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@contextmanager
def starting(folders: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts servers of flows, and ends them."""
    servers: list[Server] = []

    def start_one(spec: dict[str, Any], *, wait: bool = True, **environment: str) -> Server:
        folder = folders.mktemp("server")
        file = folder / "flow.yml"
        file.write_text(yaml.safe_dump(spec))
        log = folder / "log"
        ports = spec.get("with", {}).get("port", [])
        with log.open("wb") as output:
            process = popen(
                [sys.executable, "-m", "clip_server", str(file)],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, **environment},
                start_new_session=True,  # a process group of its own, for Ctrl-C
            )
        server = Server(process, log, ports if isinstance(ports, list) else [ports])
        servers.append(server)
        if wait:
            server.wait_until_ready()
        return server

    yield start_one
    for server in servers:  # together: one after the other they would take a second each
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts servers of flows; they end with the module: an idle one costs memory and time."""
    with starting(tmp_path_factory) as start_one:
        yield start_one


@pytest.fixture(scope="session")
def start_shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts servers of flows; they end with the tests."""
    with starting(tmp_path_factory) as start_one:
        yield start_one


@pytest.fixture(scope="session")
def onnx_server(start_shared: Start) -> Server:
    return start_shared(flow("onnx"))


@pytest.fixture(scope="module")
def http(onnx_server: Server) -> Iterator[Http]:
    with Http(onnx_server.http) as session:
        yield session


@pytest.fixture(scope="session")
def two_models(start_shared: Start) -> Server:
    """Serves `first`, and `second` in int8, whose embeddings may be cut."""
    spec = flow("onnx", aliases=["text-embedding-3-small", "main"])
    (first,) = spec["executors"]
    second = flow(
        "onnx",
        dtype="int8",
        aliases=["small"],
        matryoshka_dimensions=[64, 128],
        cache_bytes=1 << 20,
    )["executors"][0]
    spec["executors"] = [{**first, "name": "first"}, {**second, "name": "second"}]
    return start_shared(spec)


@pytest.fixture(scope="session")
def search_server(start_shared: Start, tmp_path_factory: pytest.TempPathFactory) -> Server:
    return start_shared(search_flow(tmp_path_factory.mktemp("collection") / "rows"))


@pytest.fixture(scope="session")
def torch_server(start_shared: Start) -> Server:
    if not HAS_TORCH:
        pytest.skip("the torch extra is not installed")
    return start_shared(flow("torch"))


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """On a busy machine torch's threads wait for each other longer than they work."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sample_url() -> Iterator[str]:
    """Where a web server of the tests' own has the image of the cat."""

    class Samples(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(SAMPLES))

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Samples) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/cat.png"
        server.shutdown()


@pytest.fixture
def unused_address() -> str:
    """An address at which nobody answers."""
    return f"grpc://127.0.0.1:{free_ports(1)[0]}"


@pytest.fixture(scope="session")
def photos() -> list[bytes]:
    """Real photographs, as the JPEG files people have."""
    from PIL import Image
    from skimage import data

    return [
        saved(Image.fromarray(getattr(data, name)()), "JPEG", quality=90)
        for name in ("astronaut", "coffee", "chelsea", "rocket")
    ]


@pytest.fixture(scope="session")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images, some of which the model mistakes for others, with 48 captions beside them."""
    from PIL import Image, ImageOps

    variants = {
        "": lambda image: image,
        "upside down ": lambda image: image.rotate(180),
        "negative ": lambda image: ImageOps.invert(image.convert("RGB")),
    }
    folder = tmp_path_factory.mktemp("gallery")
    for sample in SAMPLES.glob("*.png"):
        with Image.open(sample) as image:
            for variant, change in variants.items():
                file = folder / f"{variant.replace(' ', '-')}{sample.stem}.png"
                change(image).save(file)
                file.with_suffix(".txt").write_text(
                    f"a {variant}{sample.stem}\n\nthe {sample.stem}, {variant or 'as it is'}\n"
                )
    return folder
