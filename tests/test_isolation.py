"""No dependency calls home, or writes where nobody asked it to.

Where the system allows it, commands run on a network of their own, whose name server sees what
libraries in C ask for as well. Elsewhere Python's own calls are watched.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import SAMPLES, flow

ISOLATE = ["unshare", "--map-root-user", "--net", "--mount"]
# Says what Python looks up and connects to, in every process of a command.
WATCH = """
import os, sys

def watch(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect"):
        with open(os.environ["CALLS"], "a") as file:
            print(args[1] if event == "socket.connect" else args[0], file=file)

sys.addaudithook(watch)
"""
OUR_OWN = re.compile(
    r"127\.0\.0\.1|::1|localhost|None|^/|^b'\\x00"
    # Jina's look at the machine's own outgoing address: a datagram socket that sends nothing.
    r"|10\.255\.255\.255"
)
SERVE_AND_ENCODE = """
import subprocess, sys
from pathlib import Path
from clip_client import Client

flow, picture, *addresses = sys.argv[1:]
server = subprocess.Popen([sys.executable, "-m", "clip_server", flow], stdout=subprocess.PIPE)
assert any(b"clip_server: ready" in line for line in server.stdout)
for address in addresses:
    with Client(address) as client:
        assert client.encode(["a cat", Path(picture)]).shape == (2, 256)
server.terminate()
server.stdout.read()
sys.exit(server.wait())
"""


def can_isolate() -> bool:
    if shutil.which(ISOLATE[0]) is None:
        return False
    return subprocess.run([*ISOLATE, "true"], capture_output=True, check=False).returncode == 0


@dataclass
class Place:
    """Where commands run: every folder that a library might write to, and nothing else."""

    folder: Path
    environment: dict[str, str]

    def run(self, *arguments: object) -> None:
        """Python, with these arguments."""
        command = [sys.executable, *map(str, arguments)]
        if can_isolate():
            program = Path(__file__).with_name("isolated.py")
            command = [*ISOLATE, sys.executable, str(program), str(self.calls), *command]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=120,
            cwd=self.folder / "work",
            env={**os.environ, **self.environment},
            check=False,
        )
        assert done.returncode == 0, done.stderr

    @property
    def calls(self) -> Path:
        return self.folder / "calls"

    def called(self) -> set[str]:
        """The names and addresses that are not this machine's own."""
        return {line for line in self.calls.read_text().splitlines() if not OUR_OWN.search(line)}

    def written(self) -> list[str]:
        """What there is that nobody asked for."""
        places = ("home", "temporary")
        written = [each.name for place in places for each in (self.folder / place).rglob("*")]
        # torch's, once it is imported: an empty folder in the temporary directory.
        return [name for name in written if not name.startswith("torchinductor_")]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for name in ("home", "temporary", "work", "watch"):
        (tmp_path / name).mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    environment = {
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "temporary"),
        "PYTHONPATH": str(tmp_path / "watch"),
        "CALLS": str(tmp_path / "calls"),
        "ORT_DISABLE_TELEMETRY": "0",
    }
    return Place(tmp_path, environment)


def test_calls_are_seen(place: Place) -> None:
    code = "import socket\ntry: socket.getaddrinfo('a.name', 80)\nexcept OSError: pass"
    place.run("-c", code)
    assert place.called() == {"a.name"}


def test_the_server(place: Place) -> None:
    spec = flow()
    file = place.folder / "flow.yml"
    file.write_text(yaml.safe_dump(spec))
    ports = zip(("grpc", "http", "ws"), spec["with"]["port"], strict=True)
    addresses = [f"{scheme}://127.0.0.1:{port}" for scheme, port in ports]
    place.run("-c", SERVE_AND_ENCODE, file, SAMPLES / "cat.png", *addresses)
    assert place.called() == set()
    assert place.written() == []
    assert list((place.folder / "work").iterdir()) == []


@pytest.mark.slow
def test_the_commands(place: Place) -> None:
    for name in ("cat", "dog"):
        (place.folder / "data" / name).mkdir(parents=True)
        shutil.copy(SAMPLES / f"{name}.png", place.folder / "data" / name)
    place.run("-m", "clip_server.convert", "embedded", "--out", "converted")
    evaluate = ("-m", "clip_server.evaluate", "zero-shot", place.folder / "data")
    place.run(*evaluate, "--runtime", "onnx")
    assert place.called() == set()
    assert place.written() == []
    assert [each.name for each in (place.folder / "work").iterdir()] == ["converted"]


def test_a_runtime_by_itself(place: Place) -> None:
    code = "from clip_server.runtimes.onnx import OnnxRuntime; OnnxRuntime.load('embedded')"
    place.run("-c", code)
    assert place.written() == []
