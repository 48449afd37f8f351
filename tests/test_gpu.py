"""What only a real GPU shows: its memory and streams, and each runtime and a server on it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeded
from conftest import Start, flow, needs_torch
from test_tensorrt import CONFIGS

from clip_client import Client
from clip_server.convert.parity import Parity
from clip_server.engine.halving import Halving
from clip_server.runtimes import cuda, load_runtime
from clip_server.runtimes.onnx import OnnxRuntime
from clip_server.runtimes.protocol import OutOfMemoryError, Runtime

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.device_count() == 0, reason="there is no NVIDIA GPU here"),
]
RUNTIMES = [
    ("onnx", "fp32"),
    ("onnx", "fp16"),
    ("torch", "fp32"),
    ("torch", "fp16"),
    ("torch", "bf16"),
]
# The lowest cosine with the CPU in fp32.
LEAST_COSINE = {"fp32": 0.99999, "fp16": 0.999, "bf16": 0.99}
DRIVERS = {"cuda-core": ("cuda.core", "_CudaCore"), "pycuda": ("pycuda", "_PyCuda")}
TEXTS = ["a cat", "a dog on a beach", "two people ride bicycles through the rain"]


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> Any:
    module, name = DRIVERS[request.param]
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"{request.param} is not installed")
    return getattr(cuda, name)(0)


def test_memory_is_copied_both_ways(driver: Any) -> None:
    with driver.active():
        source, target = driver.allocate_pinned(1 << 20), driver.allocate_pinned(1 << 20)
        source[:] = np.random.default_rng(0).integers(0, 256, len(source), dtype=np.uint8)
        target[:] = 0
        stream = driver.new_stream()
        memory = driver.allocate(len(source), stream)
        assert driver.address_of(memory) > 0
        driver.upload(memory, source, stream)
        driver.download(target, memory, stream)
        stream.synchronize()
    assert (source == target).all()
    assert driver.name.startswith("NVIDIA")
    assert driver.capability >= (5, 0)


def test_too_much_memory(driver: Any) -> None:
    with pytest.raises(OutOfMemoryError), driver.active():
        driver.allocate(1 << 50, driver.new_stream())
    with driver.active():
        driver.allocate(1 << 20, driver.new_stream())


def loaded(runtime: str, folder: Path, **options: Any) -> Runtime:
    if runtime == "torch":
        pytest.importorskip("open_clip")
    return load_runtime(runtime, "", model_path=folder, **options)


@pytest.mark.parametrize(("runtime", "precision"), RUNTIMES)
@pytest.mark.parametrize("name", CONFIGS)
def test_equal_to_the_cpu(name: str, runtime: str, precision: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    folder = seeded.save_drawn(tmp_path / "model", config)
    on_gpu = loaded(runtime, folder, precision=precision)
    assert on_gpu.device.startswith("cuda")
    on_cpu = OnnxRuntime.load("", model_path=folder, device="cpu")
    for batch in (1, 3, 33):
        pixels, tokens = seeded.random_pixels(config, batch), seeded.random_tokens(config, batch, 9)
        for found, expected in (
            (on_gpu.encode_image(pixels), on_cpu.encode_image(pixels)),
            (on_gpu.encode_text(tokens), on_cpu.encode_text(tokens)),
        ):
            assert Parity.of(found, expected).cosine >= LEAST_COSINE[precision]


@contextmanager
def memory_left(size: int) -> Iterator[None]:
    """Takes the GPU's memory, but for so many bytes."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - size, dtype=torch.uint8, device="cuda")
    try:
        yield
    finally:
        del taken
        torch.cuda.empty_cache()


@needs_torch
@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_a_batch_that_does_not_fit_is_halved(runtime: str, tmp_path: Path) -> None:
    folder = seeded.save_drawn(tmp_path / "model", seeded.SMALL_VIT)
    on_gpu = loaded(runtime, folder)
    pixels = seeded.random_pixels(seeded.SMALL_VIT, 2**16)
    expected = on_gpu.encode_image(pixels[:8])
    halving = Halving(on_gpu.encode_image)
    with memory_left(2**31):
        found = halving(pixels)
    assert halving.splits > 0
    assert len(found) == len(pixels)
    np.testing.assert_allclose(found[:8], expected, atol=1e-3)


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_a_server_on_a_gpu(runtime: str, start: Start) -> None:
    if runtime == "torch":
        pytest.importorskip("open_clip")
    embeddings = []
    for device in ("cuda", "cpu"):
        server = start(flow(runtime, device=device))
        with Client(server.grpc) as client:
            assert client.info().device.startswith(device)
            embeddings.append(client.encode(TEXTS))
        server.stop()
    np.testing.assert_allclose(*embeddings, atol=1e-4)
