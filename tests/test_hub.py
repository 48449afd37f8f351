"""The Hugging Face hub, as far as a download needs it, served on localhost."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from clip_server.models import weights
from clip_server.preprocess.tokenizer import CONFIG, FILE

REPO = "timm/vit_base_patch32_clip_224.openai"
SIGLIP = "timm/ViT-B-16-SigLIP"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Files by `repository/name`.

    damage: done to the bytes of a file on their way.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.damage: Callable[[bytes], bytes] = bytes
        self.requests: list[str] = []
        self.agents: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        self.server.agents.append(self.headers.get("User-Agent", ""))
        content = self.content()
        self.send_response(404 if content is None else 200)
        if content is None:
            known = any(name.startswith(self.repository()) for name in self.server.files)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        else:
            # Of a large file the hub gives the digest of its content.
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.server.damage(self.content() or b""))

    def repository(self) -> str:
        return self.path.partition("/resolve/")[0].lstrip("/") + "/"

    def content(self) -> bytes | None:
        file = self.path.partition("/resolve/main/")[2]
        return self.server.files.get(self.repository() + file)

    def log_message(self, *args: object) -> None:
        """Says nothing."""


CHECKPOINT = save({"logit_scale": np.float32([4.6052]), "weight": np.zeros((64, 64), np.float32)})


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {
        f"{REPO}/{weights.CHECKPOINT}": CHECKPOINT,
        f"{SIGLIP}/{weights.CHECKPOINT}": CHECKPOINT,
        f"{SIGLIP}/{FILE}": b"{}",
        f"{SIGLIP}/{CONFIG}": json.dumps({"pad_token": "</s>"}).encode(),
    }
    with Hub(files) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(name: str, home: Path, endpoint: str, **settings: str) -> str:
    """Asks for a model's checkpoint in a new process, as the hub's client reads its settings
    when imported: the path of it, or the error."""
    return run("zoo.checkpoint(sys.argv[1])", name, home, endpoint, **settings).stdout.strip()


def run(
    expression: str, name: str, home: Path, endpoint: str, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Prints the value of an expression of the server's modules, or its error."""
    program = (
        "import sys\n"
        "from clip_server.errors import WeightsError\n"
        "from clip_server.models import tokenizer_files, zoo\n"
        "from clip_server.preprocess.tokenizer import tokenizer_for\n"
        "from clip_server.runtimes.loading import load_checkpoint\n"
        "from clip_server.runtimes.onnx import OnnxRuntime\n"
        f"try: print({expression})\n"
        "except WeightsError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, name],
        env=environment(home, endpoint) | settings,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def environment(home: Path, endpoint: str) -> dict[str, str]:
    ours = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint}
    ours.pop("HF_HUB_CACHE", None)
    return ours


def test_a_checkpoint_is_downloaded_once_and_then_needs_no_network(
    hub: Hub, tmp_path: Path
) -> None:
    path = Path(fetch("ViT-B/32", tmp_path, hub.url))
    assert path.name == weights.CHECKPOINT
    assert path.is_relative_to(tmp_path / "hub")
    assert path.read_bytes() == CHECKPOINT
    assert f"GET /{REPO}/resolve/main/{weights.CHECKPOINT}" in hub.requests

    hub.requests.clear()
    assert Path(fetch("ViT-B/32", tmp_path, hub.url)) == path
    assert Path(fetch("ViT-B/32", tmp_path, hub.url, HF_HUB_OFFLINE="1")) == path
    assert hub.requests == []


def test_nothing_but_the_file_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    fetch("ViT-B-32::openai", tmp_path, hub.url)
    assert {request.partition(" ")[2] for request in hub.requests} == {
        f"/{REPO}/resolve/main/{weights.CHECKPOINT}"
    }
    # With its telemetry on, the hub's client lists what is installed.
    assert not any("torch" in agent for agent in hub.agents)


def test_a_repository_the_hub_lacks_is_an_error(hub: Hub, tmp_path: Path) -> None:
    message = fetch("ViT-L/14", tmp_path, hub.url)
    assert "cannot get open_clip_model.safetensors of timm/vit_large_patch14_clip" in message
    assert "404" in message


def test_offline_without_the_file_is_an_error(hub: Hub, tmp_path: Path) -> None:
    message = fetch("ViT-B/32", tmp_path, hub.url, HF_HUB_OFFLINE="1")
    assert "offline" in message
    assert str(tmp_path / "hub") in message
    assert hub.requests == []


def test_an_unreachable_hub_is_an_error_that_says_where_it_looked(tmp_path: Path) -> None:
    message = fetch("ViT-B/32", tmp_path, "http://127.0.0.1:9")
    for part in (REPO, weights.CHECKPOINT, str(tmp_path), "http://127.0.0.1:9", "embedded"):
        assert part in message


def test_a_silent_hub_is_given_up_within_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        message = fetch("ViT-B/32", tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "timed out" in message
    assert time.monotonic() - started < 20  # 5 s of waiting, and a process on a busy machine


def test_a_download_shows_its_progress(hub: Hub, tmp_path: Path) -> None:
    shown = {"TQDM_POSITION": "-1"}  # or the bar is for terminals only
    done = run("zoo.checkpoint(sys.argv[1])", "ViT-B/32", tmp_path, hub.url, **shown)
    assert "100%" in done.stderr
    again = run("zoo.checkpoint(sys.argv[1])", "ViT-B/32", tmp_path, hub.url, **shown)
    assert again.stderr == ""


def flipped(content: bytes) -> bytes:
    """With another last byte, which is in a tensor: no format would notice."""
    return content[:-1] + bytes([content[-1] ^ 1])


def test_a_file_damaged_on_its_way_is_refused_and_fetched_anew(hub: Hub, tmp_path: Path) -> None:
    hub.damage = flipped
    assert "damaged on its way" in fetch("ViT-B/32", tmp_path, hub.url)
    hub.damage = bytes
    path = Path(fetch("ViT-B/32", tmp_path, hub.url))
    assert path.read_bytes() == CHECKPOINT


def test_a_file_damaged_in_the_cache_is_refused(hub: Hub, tmp_path: Path) -> None:
    path = Path(fetch("ViT-B/32", tmp_path, hub.url))
    path.resolve().write_bytes(CHECKPOINT[:-100])
    message = run("load_checkpoint(sys.argv[1])", "ViT-B/32", tmp_path, hub.url).stdout
    assert f"{path} is damaged" in message


def test_a_wrong_architecture_on_the_hub_is_an_error(hub: Hub, tmp_path: Path) -> None:
    message = run("OnnxRuntime.load(sys.argv[1])", "ViT-B/32", tmp_path, hub.url).stdout
    assert "the checkpoint is of another architecture" in message
    assert "weight (64, 64) (not in the model)" in message


def test_a_tokenizer_comes_with_its_model(hub: Hub, tmp_path: Path) -> None:
    fetch("ViT-B-16-SigLIP::webli", tmp_path, hub.url)
    asked = [request for request in hub.requests if request.startswith("GET")]
    files = (weights.CHECKPOINT, CONFIG, FILE)
    assert asked == [f"GET /{SIGLIP}/resolve/main/{file}" for file in files]

    hub.requests.clear()
    path = fetch("ViT-B-16-SigLIP::webli", tmp_path, hub.url, HF_HUB_OFFLINE="1")
    assert Path(path).read_bytes() == CHECKPOINT
    assert hub.requests == []


def test_a_tokenizer_of_the_hubs_is_loaded_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    words = {"[UNK]": 0, "cat": 1, "</s>": 2}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    hub.files[f"{SIGLIP}/{FILE}"] = json.dumps({"version": "1.0", "model": model}).encode()
    loaded = "tokenizer_for(tokenizer_files.located(zoo.resolve(sys.argv[1]).text))"
    expression = f"[(t.encode('cat').tolist(), t.spec.pad_id) for t in [{loaded}]]"
    for offline in ("0", "1"):
        done = run(expression, "ViT-B-16-SigLIP::webli", tmp_path, hub.url, HF_HUB_OFFLINE=offline)
        assert done.stdout.strip() == "[([1], 2)]"


def test_a_tokenizer_that_the_hub_lacks_is_an_error(hub: Hub, tmp_path: Path) -> None:
    del hub.files[f"{SIGLIP}/{FILE}"]
    message = fetch("ViT-B-16-SigLIP::webli", tmp_path, hub.url)
    assert f"cannot get {FILE} of {SIGLIP}" in message


def test_the_list_says_what_is_in_the_cache(hub: Hub, tmp_path: Path) -> None:
    fetch("ViT-B/32", tmp_path, hub.url)
    done = subprocess.run(
        [sys.executable, "-m", "clip_server.models", "openai", "--json"],
        env=environment(tmp_path, hub.url),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    cached = [each["name"] for each in json.loads(done.stdout) if each["cached"]]
    assert cached == ["ViT-B-32::openai"]
