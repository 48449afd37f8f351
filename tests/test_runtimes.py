"""Both runtimes: the same vectors as open_clip, on devices that are there, or a clear error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeded
from conftest import Start, flow, needs_torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from clip_client import Client
from clip_server.errors import ConfigurationError, WeightsError
from clip_server.models import zoo
from clip_server.runtimes import cuda
from clip_server.runtimes.onnx import OnnxRuntime
from clip_server.runtimes.protocol import Runtime

TOLERANCE = 1e-4
OPENAI = ["ViT-B-32::openai", "ViT-B-16::openai", "ViT-L-14::openai", "ViT-L-14-336::openai"]
RN50 = {
    "embed_dim": 1024,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 512,
        "heads": 8,
        "layers": 12,
    },
}


def load(kind: str, name: str, **options: Any) -> Any:
    if kind == "onnx":
        return OnnxRuntime.load(name, **options)
    pytest.importorskip("open_clip")
    from clip_server.runtimes.torch import TorchRuntime

    return TorchRuntime.load(name, **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """open_clip's small seeded model, and the folder it is saved in."""
    pytest.importorskip("open_clip")
    model = seeded.open_clip_model(seeded.SMALL_VIT)
    return model, seeded.save(model, tmp_path_factory.mktemp("small"), seeded.SMALL_VIT)


def assert_equal_to_open_clip(
    runtime: Runtime, model: Any, batches: tuple[int, ...], lengths: tuple[int, ...]
) -> None:
    config = runtime.card.config
    for batch in batches:
        pixels = seeded.random_pixels(config, batch)
        found = runtime.encode_image(pixels)
        assert (found.shape, found.dtype) == ((batch, runtime.card.dim), np.float32)
        assert seeded.relative(found, seeded.reference_images(model, pixels)) < TOLERANCE
        for longest in lengths:
            tokens = seeded.random_tokens(config, batch, longest)
            found = runtime.encode_text(tokens[:, :longest])
            assert (found.shape, found.dtype) == ((batch, runtime.card.dim), np.float32)
            assert seeded.relative(found, seeded.reference_texts(model, tokens)) < TOLERANCE


@pytest.mark.slow  # full sizes; small ones are below
@pytest.mark.parametrize("name", OPENAI)
def test_openais_models_equal_open_clip(name: str, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    config = zoo.resolve(name).config
    model = seeded.open_clip_model(config)
    folder = seeded.save(model, tmp_path, config)
    for kind in ("onnx", "torch"):
        runtime = load(kind, name, model_path=folder)
        assert runtime.card.name == name
        assert_equal_to_open_clip(runtime, model, batches=(2,), lengths=(7, 77))
        del runtime


@pytest.mark.slow
def test_openais_residual_network_equals_open_clip(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    model = seeded.open_clip_model(RN50)
    folder = seeded.save(model, tmp_path, RN50)
    for kind in ("onnx", "torch"):
        runtime = load(kind, "RN50", model_path=folder)
        assert_equal_to_open_clip(runtime, model, batches=(2,), lengths=(7, 77))


@pytest.mark.parametrize(
    ("config", "jit"),
    [
        (seeded.SMALL_VIT, False),
        (seeded.SMALL_GELU, False),
        (seeded.SMALL_RESNET, False),
        pytest.param(seeded.SMALL_VIT, True, marks=pytest.mark.slow),
        pytest.param(seeded.SMALL_GELU, True, marks=pytest.mark.slow),
        pytest.param(seeded.SMALL_RESNET, True, marks=pytest.mark.slow),
    ],
)
def test_torch_equals_open_clip(config: dict[str, Any], jit: bool, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    model = seeded.open_clip_model(config)
    runtime = load("torch", "small", model_path=seeded.save(model, tmp_path, config), jit=jit)
    assert_equal_to_open_clip(runtime, model, batches=(1, 3), lengths=(2, 9, 20))


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_the_embedded_model_equals_open_clip(kind: str) -> None:
    pytest.importorskip("open_clip")
    import torch
    from safetensors.torch import load_file

    runtime = load(kind, "embedded")
    model = seeded.open_clip_model(runtime.card.config)
    state = load_file(zoo.checkpoint("embedded"))
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    assert torch.isfinite(next(model.parameters())).all()
    assert_equal_to_open_clip(runtime, model, batches=(1, 3), lengths=(2, 33, 77))
    assert runtime.card.logit_scale == pytest.approx(model.logit_scale.exp().item(), rel=1e-3)


def test_a_checkpoint_of_a_wrapped_model_is_served(tmp_path: Path) -> None:
    """As torch.compile and training on several GPUs name the tensors."""
    tensors = load_file(zoo.checkpoint("embedded"))
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}
    save_file(wrapped, tmp_path / "epoch_3.safetensors")
    alone = OnnxRuntime.load("embedded")
    runtime = OnnxRuntime.load("embedded", model_path=tmp_path / "epoch_3.safetensors")
    tokens = seeded.random_tokens(alone.card.config, batch=2, longest=9)
    np.testing.assert_array_equal(runtime.encode_text(tokens), alone.encode_text(tokens))
    assert runtime.card.logit_scale == alone.card.logit_scale


@pytest.mark.slow
@needs_torch
def test_a_fine_tuned_checkpoint_is_served_by_its_path_in_the_name(
    start: Start, tmp_path: Path
) -> None:
    """As open_clip's trainer writes it after training on several GPUs."""
    import open_clip
    import torch

    model = seeded.open_clip_model(zoo.resolve("ViT-B/32").config)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {}}, tmp_path / "finetuned.pt")
    server = start(flow("torch", name="ViT-B/32::~/finetuned.pt"), HOME=str(tmp_path))
    texts = ["a cat", "two dogs on a sofa"]
    tokens = open_clip.get_tokenizer("ViT-B-32")(texts).numpy()
    with Client(server.grpc) as client:
        found = client.encode(texts)
    assert seeded.relative(found, seeded.reference_texts(model, tokens)) < TOLERANCE
    server.stop()


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_trimming_the_padding_changes_nothing(kind: str, small: tuple[Any, Path]) -> None:
    runtime = load(kind, "small", model_path=small[1])
    tokens = seeded.random_tokens(seeded.SMALL_VIT, batch=5, longest=6)
    whole = runtime.encode_text(tokens)
    for length in (6, 7, 19):
        assert seeded.relative(runtime.encode_text(tokens[:, :length]), whole) < 1e-5


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_pixels_that_cannot_be_written_to_are_taken(kind: str, small: tuple[Any, Path]) -> None:
    runtime = load(kind, "small", model_path=small[1])
    pixels = seeded.random_pixels(seeded.SMALL_VIT, 2)
    expected = runtime.encode_image(pixels)
    pixels.flags.writeable = False
    np.testing.assert_array_equal(runtime.encode_image(pixels), expected)


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_what_a_runtime_says_of_itself(kind: str, small: tuple[Any, Path]) -> None:
    runtime = load(kind, "small", model_path=small[1], device="cpu", threads=1)
    assert (runtime.name, runtime.device, runtime.precision) == (kind, "cpu", "fp32")
    assert runtime.card.dim == 32
    # The checkpoint's own logit scale, open_clip's initial one.
    assert runtime.card.logit_scale == pytest.approx(1 / 0.07)


def test_half_precision_weights_give_nearly_the_same(small: tuple[Any, Path]) -> None:
    pixels = seeded.random_pixels(seeded.SMALL_VIT, 2)
    runtime = load("torch", "small", model_path=small[1], precision="bf16", device="cpu")
    assert runtime.precision == "bf16"
    expected = seeded.reference_images(small[0], pixels)
    assert seeded.relative(runtime.encode_image(pixels), expected) < 0.03


@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "dtype 'fp8' is not one"),
        ({"precision": "fp16", "device": "cpu"}, "dtype 'fp16'"),
        ({"device": "warp"}, "device 'warp' is not cpu, cuda"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
    ],
)
def test_unavailable_options_are_errors(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(kind, "embedded", **options)


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_cuda_without_a_gpu_is_an_error_and_never_the_cpu(kind: str) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigurationError, match="device 'cuda' cannot be used") as caught:
        load(kind, "embedded", device="cuda")
    assert "sees 0 GPUs" in str(caught.value) or "onnx-gpu" in str(caught.value)
    assert load(kind, "embedded").device == "cpu"


class FakeOnnxRuntime:
    """onnxruntime with a CUDA provider that does not start, as with a wrong cuDNN."""

    class SessionOptions:
        def add_session_config_entry(self, key: str, value: str) -> None: ...

        def add_external_initializers(self, names: list[str], values: list[object]) -> None: ...

    class OrtValue:
        ortvalue_from_numpy = staticmethod(id)

    class InferenceSession:
        def __init__(self, *_: object) -> None: ...

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def preload_dlls(self) -> None: ...

    def disable_telemetry_events(self) -> None: ...


def test_a_cuda_that_falls_back_to_the_cpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", FakeOnnxRuntime())
    monkeypatch.setattr(cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigurationError, match="0 NVIDIA GPUs are visible"):
        OnnxRuntime.load("embedded", device="cuda")
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigurationError, match="could not start CUDAExecutionProvider"):
        OnnxRuntime.load("embedded", device="cuda")


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_a_checkpoint_of_another_architecture_is_refused(
    kind: str, small: tuple[Any, Path]
) -> None:
    checkpoint = zoo.checkpoint("embedded", small[1])
    alone = checkpoint.with_name("alone") / "other.safetensors"
    alone.parent.mkdir(exist_ok=True)
    alone.write_bytes(checkpoint.read_bytes())
    with pytest.raises(WeightsError, match=r"another architecture: .*is \(.*expected \("):
        load(kind, "ViT-B/32", model_path=alone)


def test_a_damaged_graph_is_an_error(tmp_path: Path) -> None:
    for name in ("visual.onnx", "textual.onnx"):
        (tmp_path / name).write_bytes(b"not a graph")
    with pytest.raises(ConfigurationError, match="onnxruntime cannot load the model"):
        OnnxRuntime.load("ViT-B/32", model_path=tmp_path)


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.strip()


def test_onnx_runs_with_torch_made_unimportable() -> None:
    shapes = run(
        "import sys; sys.modules['torch'] = sys.modules['open_clip'] = None\n"
        "import numpy as np\n"
        "from clip_server.runtimes.onnx import OnnxRuntime\n"
        "runtime = OnnxRuntime.load('embedded', threads=1)\n"
        "size = runtime.card.image.size\n"
        "print(runtime.encode_image(np.zeros((2, 3, size, size), np.uint8)).shape)\n"
        "print(runtime.encode_text(np.array([[8190, 8191]], np.int32)).shape)\n"
    )
    assert shapes.split("\n") == ["(2, 256)", "(1, 256)"]


@pytest.mark.parametrize(
    ("missing", "program"),
    [
        ("onnxruntime", "from clip_server.runtimes.onnx import OnnxRuntime as Runtime"),
        pytest.param(
            *("onnx", "from clip_server.runtimes.onnx import OnnxRuntime as Runtime"),
            marks=pytest.mark.slow,
        ),
        ("torch", "from clip_server.runtimes.torch import TorchRuntime as Runtime"),
        pytest.param(
            *("open_clip", "from clip_server.runtimes.torch import TorchRuntime as Runtime"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_missing_extra_is_named(missing: str, program: str) -> None:
    message = run(
        f"import sys; sys.modules['{missing}'] = None\n"
        "from clip_server.errors import ConfigurationError\n"
        f"try:\n    {program}\n    Runtime.load('embedded')\n"
        "except ConfigurationError as error: print(error)"
    )
    extra = "onnx" if "onnx" in missing else "torch"
    assert f"pip install 'clip-microservice[{extra}]'" in message


def embeddings(runtime: Runtime, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    found = runtime.encode_image(pixels)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_both_runtimes_agree_on_the_embedded_model() -> None:
    onnx, torch = load("onnx", "embedded"), load("torch", "embedded")
    pixels = seeded.random_pixels(onnx.card.config, 4)
    np.testing.assert_allclose(embeddings(onnx, pixels), embeddings(torch, pixels), atol=1e-5)
