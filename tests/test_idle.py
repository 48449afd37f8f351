"""Towers that are unloaded while nobody uses them, and loaded again on demand."""

from __future__ import annotations

import asyncio
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
from conftest import ROOT, SAMPLES, Server, Start, eventually, flow, needs_torch
from prometheus_client.parser import text_string_to_metric_families as read_metrics

from benchmarks import workload
from clip_client import Client
from clip_client.proto import clip_pb2 as pb
from clip_server.errors import ConfigurationError

CAT = (SAMPLES / "cat.png").read_bytes()
EMBEDDED = ROOT / "clip_server" / "models" / "embedded"
FREED_BYTES = 60 << 20


def encoder_class(runtime: str) -> Any:
    if runtime == "torch":
        from clip_server.executors.clip_torch import CLIPEncoder as TorchEncoder

        return TorchEncoder
    from clip_server.executors.clip_onnx import CLIPEncoder

    return CLIPEncoder


def embedding(encoder: Any, *items: pb.Item) -> np.ndarray[Any, Any]:
    request = pb.Request(encode=pb.EncodeRequest(items=items))
    response = asyncio.run(encoder.handle(request))
    assert response.encode.count == len(items)
    assert not response.encode.errors
    return np.frombuffer(response.encode.embeddings, "<f4")


@pytest.mark.parametrize("runtime", ["onnx", pytest.param("torch", marks=needs_torch)])
def test_each_tower_alone_is_unloaded_and_loaded_again(runtime: str) -> None:
    text, image = pb.Item(text="a cat"), pb.Item(image=CAT)
    encoder = encoder_class(runtime)("embedded", device="cpu", idle_seconds=0.4)
    towers = encoder.engine.runtime.towers
    expected = embedding(encoder, text), embedding(encoder, image)

    assert eventually(lambda: not (towers["image"].is_loaded or towers["text"].is_loaded))
    np.testing.assert_allclose(embedding(encoder, text), expected[0], atol=1e-5)
    assert not towers["image"].is_loaded

    while towers["text"].is_loaded:  # which images do not keep
        np.testing.assert_allclose(embedding(encoder, image), expected[1], atol=1e-5)
    assert towers["image"].is_loaded
    encoder.close()


def test_a_tower_whose_files_changed_is_not_loaded_again(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    encoder = encoder_class("onnx")(str(folder), device="cpu", idle_seconds=0.1)
    text = pb.Item(text="a cat")
    expected = embedding(encoder, text)
    checkpoint = folder / "open_clip_model.safetensors"
    kept = checkpoint.rename(tmp_path / "kept")
    shutil.copy(kept, checkpoint)
    assert eventually(lambda: not any(map(encoder.engine.is_loaded, ("text", "image"))))
    request = pb.Request(encode=pb.EncodeRequest(items=[text, text, pb.Item(image=CAT)]))
    response = asyncio.run(encoder.handle(request))
    assert {each.message for each in response.encode.errors} == {
        "the model could not be loaded again"
    }
    kept.rename(checkpoint)
    np.testing.assert_allclose(embedding(encoder, text), expected, atol=1e-5)
    encoder.close()


def test_a_runtime_that_cannot_unload_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from clip_server.runtimes.onnx import OnnxRuntime

    kind = encoder_class("onnx")

    class Bare:
        name, concurrent = "bare", False
        card = OnnxRuntime.load("embedded", device="cpu").card

        def encode_text(self) -> None: ...

        def encode_image(self) -> None: ...

    monkeypatch.setattr(kind, "build_runtime", lambda *_: Bare())
    with pytest.raises(ConfigurationError, match="idle_seconds: bare cannot unload its towers"):
        kind("embedded", idle_seconds=1)


def loaded(server: Server) -> dict[str, float]:
    """Which towers are loaded, by the metrics of the server, which do not load them."""
    families = read_metrics(requests.get(f"{server.http}/metrics", timeout=30).text)
    samples = next(each for each in families if each.name == "clip_tower_loaded").samples
    return {each.labels["modality"]: each.value for each in samples}


def replica(server: Server) -> psutil.Process:
    """The process with the model: the one with the most memory mapped."""
    return max(server.family()[1:], key=lambda each: each.memory_info().rss)


def resident_bytes(process: psutil.Process) -> int:
    return process.memory_info().rss  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def vit() -> Path:
    """ViT-B/32 with seeded weights, kept among the files of the benchmarks."""
    return workload.checkpoint()


@pytest.mark.slow  # writes and loads ViT-B/32, 600 MB
@pytest.mark.parametrize("runtime", ["onnx", pytest.param("torch", marks=needs_torch)])
def test_memory_is_returned_and_waiting_requests_lose_nothing(
    start: Start, vit: Path, runtime: str
) -> None:
    server = start(flow(runtime, name=str(vit), device="cpu", idle_seconds=2))
    photo = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    unloaded = {"text": 0.0, "image": 0.0}
    with Client(server.grpc) as client:
        info = client.info()
        expected = client.encode(["a cat", photo])
        assert eventually(lambda: loaded(server) == unloaded)
        process = replica(server)
        time.sleep(1)  # the memory is returned a moment later
        before = resident_bytes(process)

        for items, rows in (
            (["a cat"], expected[:1]),
            ([photo], expected[1:]),
            (["a cat", photo], expected),
        ):
            with ThreadPoolExecutor(8) as pool:
                for found in pool.map(client.encode, [items] * 8):
                    np.testing.assert_allclose(found, rows, atol=1e-4)
            assert resident_bytes(process) > before + FREED_BYTES
            assert eventually(lambda: loaded(server) == unloaded)
            assert eventually(lambda: resident_bytes(process) < before + FREED_BYTES)
            # An unloaded server is ready, and knows its model.
            assert requests.get(f"{server.http}/readyz", timeout=30).status_code == 200
            assert client.info() == info
    assert "tower is loaded again" in server.output()
    server.stop()
