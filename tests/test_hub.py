"""The Hugging Face hub, as far as a download needs it, served on localhost."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from conftest import PATIENCE_SECONDS, eventually
from safetensors.numpy import save

from clip_server.errors import WeightsError
from clip_server.models import tokenizer_files, weights, zoo
from clip_server.preprocess.tokenizer import CONFIG, FILE, tokenizer_for
from clip_server.runtimes.loading import load_checkpoint
from clip_server.runtimes.onnx import OnnxRuntime

# The hub's client reads its settings when it is imported, so each call has a process of its own.
# This one is forked for them: all else is imported once.
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload([__name__])
REPO = "timm/vit_base_patch32_clip_224.openai"
SIGLIP = "timm/ViT-B-16-SigLIP"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Files by `repository/name`.

    damage: done to the bytes of a file on their way.
    breaks: of the next downloads, the bytes after which each one breaks off.
    stalls: whether a download waits at its break, until the client goes away.
    ranges: whether a request to go on within a file is honoured, ignored or misunderstood.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.damage: Callable[[bytes], bytes] = bytes
        self.breaks: list[int] = []
        self.stalls = False
        self.ranges: Literal["honoured", "ignored", "misunderstood"] = "honoured"
        self.requests: list[str] = []
        self.wanted: list[str | None] = []
        self.agents: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        content = self.content()
        self.send_head(404 if content is None else 200, content or b"", len(content or b""))

    def do_GET(self) -> None:
        content, wanted = self.content() or b"", self.headers.get("Range")
        self.server.wanted.append(wanted)
        first = 0
        if wanted and self.server.ranges != "ignored":
            first = int(wanted.removeprefix("bytes=").partition("-")[0])
            first = first if self.server.ranges == "honoured" else first // 2
        body = self.server.damage(content)[first:]
        status = 404 if self.content() is None else 206 if first else 200
        self.send_head(status, content, len(body))
        if not self.server.breaks:
            self.wfile.write(body)
            return
        self.wfile.write(body[: self.server.breaks.pop(0)])
        self.close_connection = True
        if self.server.stalls:
            self.connection.recv(1)

    def send_head(self, status: int, content: bytes, length: int) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        self.server.agents.append(self.headers.get("User-Agent", ""))
        self.send_response(status)
        if status == 404:
            known = any(name.startswith(self.repository()) for name in self.server.files)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        else:
            # Of a large file the hub gives the digest of its content.
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        if status == 206:
            first = len(content) - length
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def repository(self) -> str:
        return self.path.partition("/resolve/")[0].lstrip("/") + "/"

    def content(self) -> bytes | None:
        file = self.path.partition("/resolve/main/")[2]
        return self.server.files.get(self.repository() + file)

    def log_message(self, *args: object) -> None:
        """Says nothing."""


# Some 130 kB, no part of which is like another.
WEIGHT = np.random.default_rng(0).random((128, 256), np.float32)
CHECKPOINT = save({"logit_scale": np.float32([4.6052]), "weight": WEIGHT})
HALF = len(CHECKPOINT) // 2


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {
        f"{REPO}/{weights.CHECKPOINT}": CHECKPOINT,
        f"{SIGLIP}/{weights.CHECKPOINT}": CHECKPOINT,
        f"{SIGLIP}/{FILE}": b"{}",
        f"{SIGLIP}/{CONFIG}": json.dumps({"pad_token": "</s>"}).encode(),
    }
    with serve(files) as server:
        yield server


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Hub]:
    """Serves files by `repository/name`."""
    with Hub(files) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(name: str, home: Path, endpoint: str, **settings: str) -> str:
    """The path of a model's checkpoint, or the error."""
    return run(zoo.checkpoint, name, home, endpoint, **settings).stdout.strip()


@dataclass
class Printed:
    stdout: str
    stderr: str


def run(
    function: Callable[[str], object], name: str, home: Path, endpoint: str, **settings: str
) -> Printed:
    """Prints the result of a function in a process of its own, or its error."""
    receiver, sender = forks.Pipe(duplex=False)
    variables = environment(home, endpoint) | settings
    process = forks.Process(target=_print_result, args=(function, name, variables, sender))
    process.start()
    sender.close()
    with receiver:
        assert receiver.poll(PATIENCE_SECONDS)
        printed: Printed = receiver.recv()
    process.join()
    return printed


def _print_result(
    function: Callable[[str], object], name: str, variables: dict[str, str], sender: Connection
) -> None:
    os.environ.clear()
    os.environ.update(variables)
    with redirect_stdout(StringIO()) as stdout, redirect_stderr(StringIO()) as stderr:
        try:
            print(function(name))
        except WeightsError as error:
            print(error)
    sender.send(Printed(stdout.getvalue(), stderr.getvalue()))


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


@pytest.mark.slow
def test_a_silent_hub_is_given_up_within_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        message = fetch("ViT-B/32", tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "timed out" in message


def test_a_download_shows_its_progress(hub: Hub, tmp_path: Path) -> None:
    shown = {"TQDM_POSITION": "-1"}  # or the bar is for terminals only
    done = run(zoo.checkpoint, "ViT-B/32", tmp_path, hub.url, **shown)
    assert "100%" in done.stderr
    again = run(zoo.checkpoint, "ViT-B/32", tmp_path, hub.url, **shown)
    assert again.stderr == ""


def flipped(content: bytes) -> bytes:
    """With another last byte, which is in a tensor: no format would notice."""
    return content[:-1] + bytes([content[-1] ^ 1])


def test_a_file_damaged_on_its_way_is_refused_and_fetched_anew(hub: Hub, tmp_path: Path) -> None:
    hub.damage = flipped
    assert "does not match the hub's checksum" in fetch("ViT-B/32", tmp_path, hub.url)
    hub.damage = bytes
    path = Path(fetch("ViT-B/32", tmp_path, hub.url))
    assert path.read_bytes() == CHECKPOINT


@pytest.mark.parametrize("ranges", ["honoured", "ignored", "misunderstood"])
def test_a_download_goes_on_after_a_break(
    hub: Hub, tmp_path: Path, ranges: Literal["honoured", "ignored", "misunderstood"]
) -> None:
    hub.breaks, hub.ranges = [HALF], ranges
    path = Path(fetch("ViT-B/32", tmp_path, hub.url))
    assert path.read_bytes() == CHECKPOINT
    whole, rest, *again = hub.wanted
    assert whole is None
    assert HALF - 2**14 <= int(str(rest).removeprefix("bytes=").partition("-")[0]) <= HALF
    # What a server sent from the wrong place is not the file.
    assert again == ([None] if ranges == "misunderstood" else [])
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("changed", [False, True], ids=["same", "changed"])
def test_a_later_start_goes_on_where_a_killed_one_was(
    changed: bool, hub: Hub, tmp_path: Path
) -> None:
    hub.breaks, hub.stalls = [HALF], True
    program = "import sys; from clip_server.models import zoo; zoo.checkpoint('ViT-B/32')"
    process = subprocess.Popen([sys.executable, "-c", program], env=environment(tmp_path, hub.url))
    assert eventually(lambda: any(part.stat().st_size for part in tmp_path.rglob("*.part")))
    process.kill()
    process.wait()
    if changed:
        hub.files[f"{REPO}/{weights.CHECKPOINT}"] = flipped(CHECKPOINT)
    hub.wanted.clear()
    path = Path(fetch("ViT-B/32", tmp_path, hub.url))
    assert path.read_bytes() == hub.files[f"{REPO}/{weights.CHECKPOINT}"]
    assert [wanted is None for wanted in hub.wanted] == [changed]


@pytest.mark.slow
def test_a_download_that_breaks_off_for_good_says_so(hub: Hub, tmp_path: Path) -> None:
    hub.breaks = [HALF] + [0] * 20
    message = fetch("ViT-B/32", tmp_path, hub.url)
    assert "\n" not in message
    assert "broke off after 0.1 of 0.1 MB" in message
    assert "start again to resume it" in message
    hub.breaks.clear()
    assert Path(fetch("ViT-B/32", tmp_path, hub.url)).read_bytes() == CHECKPOINT


def emptied(hub: Hub, home: Path) -> tuple[Path, Path]:
    """Where a checkpoint was in the cache and no longer is: its entry, and its content."""
    entry = Path(fetch("ViT-B/32", home, hub.url))
    content = entry.resolve()
    content.unlink()
    entry.unlink()
    return entry, content


@pytest.mark.parametrize("left", [b"something else", b"longer" * len(CHECKPOINT)])
def test_a_partial_file_of_something_else_is_no_part_of_it(
    left: bytes, hub: Hub, tmp_path: Path
) -> None:
    entry, content = emptied(hub, tmp_path)
    content.with_suffix(".part").write_bytes(left)
    assert fetch("ViT-B/32", tmp_path, hub.url) == str(entry)
    assert entry.read_bytes() == CHECKPOINT


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_cache_entry_that_is_no_file_is_an_error_that_names_it(
    kind: str, hub: Hub, tmp_path: Path
) -> None:
    entry, _ = emptied(hub, tmp_path)
    entry.mkdir() if kind == "folder" else os.mkfifo(entry)
    message = fetch("ViT-B/32", tmp_path, hub.url)
    expected = "a folder" if kind == "folder" else "no regular file"
    assert f"the cache has {expected} instead of a file, {entry}: remove it" in message
    assert "\n" not in message


def test_content_in_the_cache_that_is_no_file_is_an_error(hub: Hub, tmp_path: Path) -> None:
    _, content = emptied(hub, tmp_path)
    content.mkdir()
    assert f"instead of a file, {content}: remove it" in fetch("ViT-B/32", tmp_path, hub.url)


def test_a_link_to_nothing_in_the_cache_is_replaced(hub: Hub, tmp_path: Path) -> None:
    entry, _ = emptied(hub, tmp_path)
    entry.symlink_to(tmp_path / "gone")
    assert "offline" in fetch("ViT-B/32", tmp_path, hub.url, HF_HUB_OFFLINE="1")
    path = Path(fetch("ViT-B/32", tmp_path, hub.url))
    assert (path, path.read_bytes()) == (entry, CHECKPOINT)


def test_a_cache_that_is_no_folder_is_an_error(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file")
    message = fetch("ViT-B/32", tmp_path, hub.url)
    assert f"cannot get {weights.CHECKPOINT}" in message
    assert str(tmp_path / "hub") in message


def test_a_file_damaged_in_the_cache_is_refused(hub: Hub, tmp_path: Path) -> None:
    path = Path(fetch("ViT-B/32", tmp_path, hub.url))
    path.resolve().write_bytes(CHECKPOINT[:-100])
    message = run(load_checkpoint, "ViT-B/32", tmp_path, hub.url).stdout
    assert f"{path} is damaged" in message


def test_a_wrong_architecture_on_the_hub_is_an_error(hub: Hub, tmp_path: Path) -> None:
    message = run(OnnxRuntime.load, "ViT-B/32", tmp_path, hub.url).stdout
    assert "the checkpoint is of another architecture" in message
    assert "weight (128, 256) (not in the model)" in message


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
    for offline in ("0", "1"):
        done = run(
            tokens_of_cat, "ViT-B-16-SigLIP::webli", tmp_path, hub.url, HF_HUB_OFFLINE=offline
        )
        assert done.stdout.strip() == "[1] padded with 2"


def tokens_of_cat(name: str) -> str:
    tokenizer = tokenizer_for(tokenizer_files.located(zoo.resolve(name).text))
    return f"{tokenizer.encode('cat').tolist()} padded with {tokenizer.spec.pad_id}"


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
