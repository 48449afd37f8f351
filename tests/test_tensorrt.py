"""TensorRT: engines are built with the real library where it is installed, which needs no GPU
(TensorRT-RTX); what runs them is held by `fake_tensorrt`; and the real thing where a GPU is."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cn_clip_reference as chinese
import fake_tensorrt
import numpy as np
import pytest
import seeded
import small_towers
import test_families as families
from conftest import GPU_EXECUTOR, HAS_TORCH, Start, free_ports
from numpy.typing import NDArray

from clip_server import runtimes
from clip_server.convert.__main__ import main
from clip_server.convert.parity import Parity
from clip_server.engine.halving import Halving
from clip_server.errors import ConfigurationError, WeightsError
from clip_server.launch import flow
from clip_server.model_card import ModelCard, Precision
from clip_server.models import converted, zoo
from clip_server.models.converted import TOWERS, Tower
from clip_server.runtimes import cuda, tensorrt_engines
from clip_server.runtimes.loading import load_checkpoint
from clip_server.runtimes.onnx import OnnxRuntime
from clip_server.runtimes.protocol import OutOfMemoryError
from clip_server.runtimes.tensorrt import TensorrtRuntime, fitting
from clip_server.runtimes.tensorrt_engines import Key, Profile
from clip_server.towers import graph, onnx_file

CONFIGS = {
    "vision transformer": seeded.SMALL_VIT,
    "residual network": seeded.SMALL_RESNET,
    "Chinese BERT": chinese.SMALL,
}
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
BATCH = 4
# Of the largest batches that the convert command makes engines for.
SHAPES = {"visual.trt": (32, 3, 64, 64), "textual.trt": (32, 20)}
# A batch size that is in an engine for no other reason.
ODD = 37
LEAST_COSINE = {"fp32": 0.9999, "fp16": 0.999}


def _installed() -> bool:
    try:
        tensorrt_engines.library()
    except ConfigurationError:
        return False
    return True


needs_library = pytest.mark.skipif(
    not _installed(), reason="no TensorRT: pip install 'clip-microservice[tensorrt-rtx]'"
)
needs_gpu = pytest.mark.skipif(
    cuda.device_count() == 0, reason="NOTHING WAS RUN IN TENSORRT: there is no NVIDIA GPU here"
)
needs_none = pytest.mark.skipif(cuda.device_count() > 0, reason="there is a GPU here")


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's caches, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches"


@pytest.fixture(params=["pycuda", "cuda-core"])
def gpu(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[fake_tensorrt.FakeGpu]:
    fake = fake_tensorrt.install(monkeypatch, request.param)
    yield fake
    assert fake.depth == 0, "a context was left active"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return seeded.save_drawn(tmp_path / "small", seeded.SMALL_VIT)


def model_of(card: ModelCard, tensors: Any, tower: Tower, precision: Precision) -> Any:
    kind: Any = {"precision": precision, "target": "tensorrt"}
    if tower == "image":
        return graph.build_visual(card.config, tensors, card.image, **kind)
    return graph.build_textual(card.config, tensors, **kind)


def assert_equal(found: Any, expected: Any, least: float) -> None:
    """Two runtimes give the same vectors, for batches and texts of several lengths."""
    config = expected.card.config
    for batch in (1, 3, 2 * BATCH + 1):
        pixels = seeded.random_pixels(config, batch)
        of_images = Parity.of(found.encode_image(pixels), expected.encode_image(pixels))
        assert of_images.cosine >= least
        for longest in (2, 9, config["text_cfg"]["context_length"]):
            tokens = seeded.random_tokens(config, batch, longest)[:, :longest]
            of_texts = Parity.of(found.encode_text(tokens), expected.encode_text(tokens))
            assert of_texts.cosine >= least


# --- engines are built, whatever the machine


@needs_library
@pytest.mark.parametrize(
    "name",
    [
        "vision transformer",
        pytest.param("residual network", marks=pytest.mark.slow),
        pytest.param("Chinese BERT", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.slow) for name in families.SERVED_TRUNKS),
    ],
)
def test_engines_of_every_family(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_towers.add(monkeypatch.setitem)
    config = CONFIGS.get(name) or families.FAMILIES[name]
    assert_builds(*load_checkpoint("", seeded.save_drawn(tmp_path, config)), "fp16")


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_engines_of_the_embedded_model(precision: Precision) -> None:
    assert_builds(*load_checkpoint("embedded"), precision)


def assert_builds(card: ModelCard, tensors: Any, precision: Precision) -> None:
    sizes = []
    for tower in TOWERS:
        wanted = tensorrt_engines.profiles(card, tower, ODD)
        packed = model_of(card, tensors, tower, precision).SerializeToString()
        engine = tensorrt_engines.build(packed, wanted, log_progress=lambda _: None)
        for profile in wanted:
            assert holds(engine, profile.most)
        assert not holds(engine, (ODD + 1, *wanted[-1].most[1:]))
        sizes.append((len(packed), len(engine)))
    assert all(engine > packed / 2 for packed, engine in sizes)


def holds(engine: bytes, shape: tuple[int, ...]) -> bool:
    """Whether a shape is in an engine's own bytes: the library reads profiles only on a GPU."""
    return np.array(shape, "<i8").tobytes() in engine


@needs_library
def test_a_large_graph_is_built_from_a_file(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card, tensors = load_checkpoint("", small)
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)
    with onnx_file.packed(model_of(card, tensors, "text", "fp16")) as packed:
        assert isinstance(packed, Path)
        wanted = tensorrt_engines.profiles(card, "text", 1)[:1]
        assert tensorrt_engines.build(packed, wanted, log_progress=lambda _: None)
    assert not packed.exists()


@needs_library
def test_a_graph_that_cannot_be_built_says_why() -> None:
    with pytest.raises(ConfigurationError, match=r"TensorRT cannot build the engine \(tensorrt"):
        tensorrt_engines.build(b"no graph", [], log_progress=lambda _: None)


@needs_library
def test_what_is_no_engine_is_refused_by_name() -> None:
    with pytest.raises(WeightsError, match=r"visual\.trt is not an engine that tensorrt\S* \d"):
        tensorrt_engines.load(b"\x00" * 4096, "visual.trt")


@pytest.mark.slow
@needs_library
@needs_none
def test_the_convert_command_says_that_nothing_was_compared(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = [str(small), "--to", "tensorrt", "--precision", "fp16", "--out", str(out)]
    assert main(given) == 0
    printed = capsys.readouterr()
    assert printed.err.count("NOT COMPARED with its source") == 2
    assert printed.out.count("NOT COMPARED") == 2
    assert "clip_server.executors.clip_tensorrt" in printed.out
    assert {file.name for file in out.iterdir()} == {"card.json", *SHAPES}
    described = converted.read(out)
    assert described is not None
    assert described.precision == "fp16"
    for file in SHAPES:
        assert holds((out / file).read_bytes(), SHAPES[file])


# --- profiles


def test_profiles_are_for_one_item_and_for_many_and_for_lengths() -> None:
    card = zoo.resolve("ViT-B-32::openai")
    assert tensorrt_engines.profiles(card, "image", 32) == tuple(
        Profile((1, 3, 224, 224), (most, 3, 224, 224), (most, 3, 224, 224)) for most in (1, 32)
    )
    assert tensorrt_engines.profiles(card, "text", 32) == tuple(
        Profile((1, 1), (most, length), (most, length))
        for length in (16, 32, 77)
        for most in (1, 32)
    )
    assert len(tensorrt_engines.profiles(card, "image", 1)) == 1
    assert {
        each.most[1] for each in tensorrt_engines.profiles(zoo.resolve("CN-CLIP/RN50"), "text", 8)
    } == {*(16, 32, 52)}


def test_a_tower_that_takes_every_position_has_one_length() -> None:
    card = zoo.resolve("ViT-B-16-SigLIP::webli")
    context = card.text.context_length
    assert tensorrt_engines.profiles(card, "text", 2) == (
        Profile((1, context), (1, context), (1, context)),
        Profile((1, context), (2, context), (2, context)),
    )


def test_a_batch_has_the_smallest_profile_that_takes_it() -> None:
    profiles = tensorrt_engines.profiles(zoo.resolve("embedded"), "text", 32)
    chosen = [profiles[fitting(profiles, shape)].most for shape in ((1, 8), (1, 24), (2, 8))]
    assert chosen == [(1, 16), (1, 32), (32, 16)]
    assert profiles[fitting(profiles, (32, 77))].most == (32, 77)
    with pytest.raises(ValueError, match=r"no batch of shape \(33, 8\)"):
        fitting(profiles, (33, 8))
    with pytest.raises(ValueError, match=r"no batch of shape \(1, 8\)"):
        fitting([Profile((1, 77), (1, 77), (1, 77))], (1, 8))


# --- the cache


KEY = Key("graph", "tensorrt 10.9", "H100 (9.0)", "fp16", (Profile((1,), (2,), (3,)),))


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, graph="another"),
        replace(KEY, library="tensorrt 11.0"),
        replace(KEY, library="tensorrt_rtx 10.9"),
        replace(KEY, gpu="H200 (9.0)"),
        replace(KEY, precision="fp32"),
        replace(KEY, profiles=(Profile((1,), (3,), (3,)),)),
    ],
)
def test_an_engine_of_anything_else_is_another(other: Key, tmp_path: Path) -> None:
    assert other.digest != KEY.digest
    tensorrt_engines.write(tmp_path / "one.engine", KEY, b"engine")
    assert tensorrt_engines.read(tmp_path / "one.engine", KEY) == b"engine"
    assert tensorrt_engines.read(tmp_path / "one.engine", other) is None


def test_the_graphs_hash_is_of_weights_too(small: Path) -> None:
    card, tensors = load_checkpoint("", small)
    first = onnx_file.digest(model_of(card, tensors, "text", "fp16"))
    assert first == onnx_file.digest(model_of(card, tensors, "text", "fp16"))
    others = [model_of(card, tensors, "text", "fp32"), model_of(card, tensors, "image", "fp16")]
    changed = dict(tensors) | {"ln_final.bias": tensors["ln_final.bias"] + 1}
    others.append(model_of(card, changed, "text", "fp16"))
    assert len({first, *map(onnx_file.digest, others)}) == 4


def cut(engine: bytes) -> bytes:
    return engine[:-1]


def flipped(engine: bytes) -> bytes:
    return engine[:-1] + bytes([engine[-1] ^ 1])


def emptied(engine: bytes) -> bytes:
    return engine[:0]


def stale(engine: bytes) -> bytes:
    return b"0" * 32 + engine[32:]


@pytest.mark.parametrize("damage", [cut, flipped, emptied, stale])
def test_an_engine_that_is_damaged_or_stale_is_built_again(
    damage: Callable[[bytes], bytes], caches: Path
) -> None:
    made: list[bytes] = []
    told: list[str] = []

    def make() -> bytes:
        made.append(b"engine %d" % len(made))
        return made[-1]

    def engine() -> bytes:
        return tensorrt_engines.cached(KEY, make, told.append)

    assert (engine(), engine()) == (b"engine 0", b"engine 0")
    (file,) = caches.rglob("*.engine")
    assert file.parent == caches / "clip-server" / "engines"
    file.write_bytes(damage(file.read_bytes()))
    assert (engine(), engine()) == (b"engine 1", b"engine 1")
    assert [words.split()[0] for words in told] == ["built", "built"]
    assert str(file) in told[0]
    assert not [each for each in file.parent.iterdir() if each.suffix not in (".engine", ".lock")]


def test_an_engine_that_cannot_be_built_leaves_nothing(caches: Path) -> None:
    def fail() -> bytes:
        raise ConfigurationError("no")

    with pytest.raises(ConfigurationError):
        tensorrt_engines.cached(KEY, fail, lambda _: None)
    assert not list(caches.rglob("*.engine"))


def test_a_cache_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigurationError, match=r"cannot be cached in .*XDG_CACHE_HOME"):
        tensorrt_engines.cached(KEY, lambda: b"engine", lambda _: None)


# --- what is missing is said


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tensorrt_engines.LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigurationError, match=r"pip install 'clip-microservice\[tensorrt\]'"):
        TensorrtRuntime.load("embedded")


def test_without_pycuda_and_cuda_core(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt.install(monkeypatch)
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(ConfigurationError, match=r"neither pycuda nor .*microservice\[tensorrt\]'"):
        TensorrtRuntime.load("embedded")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt.install(monkeypatch)
    monkeypatch.setattr(cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigurationError, match="'cuda:0' cannot be used: 0 NVIDIA GPUs"):
        TensorrtRuntime.load("embedded")


@pytest.mark.usefixtures("gpu")
def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(ConfigurationError, match="'cpu' is not cuda or cuda:N"):
        TensorrtRuntime.load("embedded", device="cpu")
    with pytest.raises(ConfigurationError, match="'cuda:1' cannot be used: 1 NVIDIA GPUs"):
        TensorrtRuntime.load("embedded", device="cuda:1")
    with pytest.raises(ConfigurationError, match="dtype 'int8' is not one"):
        TensorrtRuntime.load("embedded", precision="int8")


# --- what is around the engines, on a GPU that is not there


@pytest.mark.parametrize("name", CONFIGS)
def test_vectors_are_those_of_the_graph(
    name: str, gpu: fake_tensorrt.FakeGpu, tmp_path: Path
) -> None:
    folder = seeded.save_drawn(tmp_path, CONFIGS[name])
    found = TensorrtRuntime.load("", model_path=folder, precision="fp32", minibatch_size=BATCH)
    expected = OnnxRuntime.load("", model_path=folder, device="cpu", threads=1)
    assert (found.name, found.device, found.precision) == ("tensorrt", "cuda:0", "fp32")
    assert_equal(found, expected, LEAST_COSINE["fp32"])
    assert gpu.contexts == 2, "one of each tower, for one thread"


def test_engines_are_built_once(
    gpu: fake_tensorrt.FakeGpu, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert TensorrtRuntime.load("", model_path=small).precision == "fp16"
    assert gpu.builds == 2
    assert capsys.readouterr().err.count("not built yet for Imaginary (9.0)") == 2
    TensorrtRuntime.load("", model_path=small)
    assert gpu.builds == 2
    TensorrtRuntime.load("", model_path=small, precision="fp32")
    TensorrtRuntime.load("", model_path=small, minibatch_size=BATCH)
    assert gpu.builds == 6


def test_a_batch_with_no_memory_for_it_is_halved(gpu: fake_tensorrt.FakeGpu, small: Path) -> None:
    runtime = TensorrtRuntime.load("", model_path=small, precision="fp32", minibatch_size=16)
    expected = OnnxRuntime.load("", model_path=small, device="cpu", threads=1)
    pixels = seeded.random_pixels(seeded.SMALL_VIT, 16)
    gpu.capacity = pixels[:5].nbytes
    halving = Halving(runtime.encode_image)
    found = halving(pixels)
    assert seeded.relative(found, expected.encode_image(pixels)) < 1e-4
    assert halving.splits == 3  # 16, and twice 8
    tokens = seeded.random_tokens(seeded.SMALL_VIT, 2, 9)
    gpu.capacity = 10
    with pytest.raises(OutOfMemoryError, match=r"(?i)out.of.memory"):
        runtime.encode_text(tokens)
    gpu.capacity = 1 << 40
    assert runtime.encode_text(tokens).shape == (2, 32), "it goes on"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("suffix", [".trt", ".engine"])
def test_engines_in_a_folder_are_served(suffix: str, small: Path, tmp_path: Path) -> None:
    card, tensors = load_checkpoint("", small)
    folder = tmp_path / "engines"
    folder.mkdir()
    converted.write(folder, card, "fp32")
    for tower, file in runtimes.find("tensorrt").file_names.items():
        packed = model_of(card, tensors, tower, "fp32").SerializeToString()
        wanted = tensorrt_engines.profiles(card, tower, BATCH)
        engine = tensorrt_engines.build(packed, wanted, log_progress=lambda _: None)
        (folder / file).with_suffix(suffix).write_bytes(engine)
    found = TensorrtRuntime.load("any name", model_path=folder)
    expected = OnnxRuntime.load("", model_path=small, device="cpu", threads=1)
    assert (found.precision, found.card) == ("fp32", card)
    assert_equal(found, expected, LEAST_COSINE["fp32"])
    with pytest.raises(ConfigurationError, match="run unchanged, in fp32"):
        TensorrtRuntime.load("any name", model_path=folder, precision="fp16")
    (folder / f"visual{suffix}").write_bytes(b"of another version")
    with pytest.raises(WeightsError, match=f"visual{suffix} is not an engine .*magic tag"):
        TensorrtRuntime.load("any name", model_path=folder)


def test_halving_ends_at_one() -> None:
    tried: list[int] = []

    def run(batch: NDArray[Any]) -> NDArray[np.float32]:
        tried.append(len(batch))
        if len(batch) > 2:
            raise OutOfMemoryError
        return batch.astype(np.float32)

    halving = Halving(run)
    batch = np.arange(10).reshape(5, 2)
    assert (halving(batch) == batch).all()
    assert tried == [5, 2, 3, 1, 2]
    assert halving.splits == 2


def test_memory_of_a_failed_batch_is_free_before_its_halves(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Although log records are kept, and with them whatever they refer to."""
    allocated: list[weakref.ref[NDArray[np.float32]]] = []

    def run(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        assert not any(each() is not None for each in allocated)
        activations = batch * 2
        allocated.append(weakref.ref(activations))
        if len(batch) > 1:
            raise OutOfMemoryError
        return activations + 0

    Halving(run)(np.ones((4, 2), np.float32))
    assert len(caplog.records) == 3


# --- several GPUs


@pytest.mark.slow
def test_replicas_take_the_gpus_in_turn(start: Start) -> None:
    """Of four GPUs the second and the third, by three replicas, each of which says its own."""
    spec = flow.load(flow.read("gpus-flow.yml"))
    (executor,) = spec["executors"]
    assert (executor["replicas"], executor["env"]) == (2, {"CUDA_VISIBLE_DEVICES": "RR"})
    spec["with"] = {"protocol": ["grpc"], "port": free_ports(1), "host": "127.0.0.1"}
    executor["uses"]["metas"]["py_modules"] = [GPU_EXECUTOR]
    executor["env"]["CUDA_VISIBLE_DEVICES"] = "RR1:3"
    executor["replicas"] = 3
    server = start(
        spec, CUDA_TOTAL_DEVICES="4", CLIP_MODEL="embedded", PYTHONPATH=str(Path(__file__).parent)
    )
    assert sorted(re.findall(r"sees GPU (\S+)\.", server.output())) == ["1", "1", "2"]
    server.stop()


# --- the real thing


@pytest.mark.gpu
@needs_gpu
@needs_library
@pytest.mark.skipif(not HAS_TORCH, reason="the torch extra is not installed")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_profiles_and_vectors_on_a_gpu(name: str, precision: Precision, tmp_path: Path) -> None:
    from clip_server.runtimes.torch import TorchRuntime

    folder = seeded.save_drawn(tmp_path, CONFIGS[name])
    card, tensors = load_checkpoint("", folder)
    for tower in TOWERS:
        wanted = tensorrt_engines.profiles(card, tower, BATCH)
        packed = model_of(card, tensors, tower, precision).SerializeToString()
        engine = tensorrt_engines.load(
            tensorrt_engines.build(packed, wanted, log_progress=lambda _: None), tower
        )
        assert tuple(tensorrt_engines.profiles_of(engine, engine.get_tensor_name(0))) == wanted
    found = TensorrtRuntime.load("", model_path=folder, precision=precision, minibatch_size=BATCH)
    expected = TorchRuntime.load("", model_path=folder, device="cpu")
    assert_equal(found, expected, LEAST_COSINE[precision])


@pytest.mark.gpu
@needs_gpu
@needs_library
def test_threads_share_a_tower() -> None:
    from concurrent.futures import ThreadPoolExecutor

    runtime = TensorrtRuntime.load("embedded", minibatch_size=BATCH)
    size = runtime.card.image.size
    batches = np.random.default_rng(0).integers(0, 256, (16, 2, 3, size, size), dtype=np.uint8)
    alone = [runtime.encode_image(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(runtime.encode_image, batches))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-2)
