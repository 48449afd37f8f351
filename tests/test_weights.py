"""Checkpoints: found on disk, in the hub's cache or on a hub, read, and refused when bad."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from clip_server.errors import WeightsError
from clip_server.models import weights, zoo

REPO = "timm/vit_base_patch32_clip_224.openai"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """As much of the Hugging Face hub as a download needs: one file of one repository."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.content = content
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
        found = self.path == f"/{REPO}/resolve/main/{weights.CHECKPOINT}"
        self.send_response(200 if found else 404)
        if found:
            self.send_header("ETag", '"etag-of-the-file"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(self.server.content)))
        else:
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.server.content)

    def log_message(self, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    file = tmp_path / "served.safetensors"
    save_file({"logit_scale": np.float32([4.6052])}, file)
    with Hub(file.read_bytes()) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(name: str, home: Path, endpoint: str, **settings: str) -> str:
    """Asks for a model's checkpoint in a new process, as the hub's client reads its settings
    when imported: the path of it, or the error."""
    program = (
        "import sys\n"
        "from clip_server.errors import WeightsError\n"
        "from clip_server.models import zoo\n"
        "try: print(zoo.checkpoint(sys.argv[1]))\n"
        "except WeightsError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, **settings}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", program, name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.strip()


def test_a_checkpoint_is_downloaded_once_and_then_needs_no_network(
    hub: Hub, tmp_path: Path
) -> None:
    path = Path(fetch("ViT-B/32", tmp_path, hub.url))
    assert path.name == weights.CHECKPOINT
    assert path.is_relative_to(tmp_path / "hub")
    assert path.read_bytes() == hub.content
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


def saved(path: Path, **tensors: np.ndarray) -> Path:
    save_file(tensors, path)
    return path


def test_half_precision_is_read(tmp_path: Path) -> None:
    values = np.linspace(-3, 3, 12).reshape(3, 4)
    path = saved(
        tmp_path / "half.safetensors",
        half=values.astype(np.float16),
        brain=values.astype(ml_dtypes.bfloat16),
        logit_scale=np.array(np.log(50), dtype=ml_dtypes.bfloat16),
    )
    tensors = weights.read(path)
    assert tensors["half"].dtype == np.float16
    assert tensors["brain"].dtype == np.float32
    np.testing.assert_allclose(tensors["brain"], values, rtol=1 / 128)
    assert weights.read_logit_scale(path) == pytest.approx(50, rel=0.02)


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = saved(tmp_path / "cut.safetensors", weight=np.zeros((8, 8), np.float32))
    path.write_bytes(path.read_bytes()[:keep])
    for read in (weights.read, weights.read_logit_scale):
        with pytest.raises(WeightsError, match=r"cut\.safetensors is damaged"):
            read(path)


def test_a_file_without_a_logit_scale_is_no_clip_checkpoint(tmp_path: Path) -> None:
    path = saved(tmp_path / "other.safetensors", weight=np.zeros(3, np.float32))
    with pytest.raises(WeightsError, match="not a CLIP checkpoint"):
        weights.read_logit_scale(path)


def test_another_architecture_is_refused_with_names_and_shapes() -> None:
    tensors = {"a": np.zeros((2, 3)), "c": np.zeros(1), "bn1.num_batches_tracked": np.zeros(())}
    expected = {"a": (3, 2), "b": (4,), **{f"more.{index}": () for index in range(5)}}
    with pytest.raises(WeightsError) as caught:
        weights.check(tensors, expected)
    assert str(caught.value) == (
        "the checkpoint is of another architecture: "
        "b (4,), more.0 (), more.1 () and 3 more (missing); "
        "a is (2, 3), expected (3, 2) (of another shape); c (1,) (not in the model)"
    )


def test_the_right_architecture_passes_whatever_else_a_trainer_left() -> None:
    tensors = {"a": np.zeros((2, 3)), "attn_mask": np.zeros((77, 77))}
    weights.check(tensors, {"a": (2, 3), "bn1.num_batches_tracked": ()})


def test_model_path_may_be_a_file_or_a_folder(tmp_path: Path) -> None:
    card = zoo.resolve("ViT-B/32")
    file = saved(tmp_path / weights.CHECKPOINT, logit_scale=np.zeros((), np.float32))
    assert weights.find(card, tmp_path) == file
    assert weights.find(card, str(file)) == file


def test_model_path_to_nothing_or_to_a_pickle_is_refused(tmp_path: Path) -> None:
    card = zoo.resolve("ViT-B/32")
    with pytest.raises(WeightsError, match="no checkpoint at"):
        weights.find(card, tmp_path / "missing.safetensors")
    with pytest.raises(WeightsError, match="no checkpoint at"):
        weights.find(card, tmp_path)
    (tmp_path / "model.pt").write_bytes(b"pickled")
    with pytest.raises(WeightsError, match="may hold code"):
        weights.find(card, tmp_path / "model.pt")
