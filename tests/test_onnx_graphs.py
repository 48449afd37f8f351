"""Folders with anyone's `visual.onnx` and `textual.onnx`: embeddings equal to those of the model
that they were exported from, or one line that says what does not fit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeded
from conftest import SAMPLES, Start, flow, needs_torch
from numpy.typing import NDArray

from clip_client import Client
from clip_server.errors import ConfigurationError
from clip_server.model_card import ImageSpec, TextSpec
from clip_server.preprocess.image import ImageTransform
from clip_server.preprocess.tokenizer import pad, tokenizer_for
from clip_server.runtimes.loading import normalized
from clip_server.runtimes.onnx import OnnxRuntime

TEXTS = ["a cat", "a photo of a very small dog on a sofa!", "smile", "a cat"]
SIZE, DIM = 32, 16


@pytest.fixture(scope="module")
def model() -> Any:
    """transformers' CLIPModel with CLIP's vocabulary and few, seeded weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    small["num_hidden_layers"] = 2
    tokens = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    config = transformers.CLIPConfig(
        text_config=small | tokens,
        vision_config=small | {"image_size": SIZE, "patch_size": 8},
        projection_dim=DIM,
    )
    return transformers.CLIPModel(config).eval()


def tokens_of(texts: Sequence[str]) -> NDArray[np.int32]:
    tokenizer = tokenizer_for(TextSpec())
    return pad([tokenizer.encode(text) for text in texts], TextSpec())


def pixels_of(count: int = 4) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8)


def expected_texts(model: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    import torch

    whole = np.pad(tokens, ((0, 0), (0, 77 - tokens.shape[1])))
    with torch.inference_mode():
        pooled = model.text_model(input_ids=torch.from_numpy(whole).long()).pooler_output
        return model.text_projection(pooled).numpy()


def expected_images(model: Any, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        values = torch.from_numpy(normalized(pixels, ImageSpec(SIZE)))
        pooled = model.vision_model(pixel_values=values).pooler_output
        return model.visual_projection(pooled).numpy()


def export(
    model: Any,
    folder: Path,
    *,
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
    outputs: Sequence[str] = ("last_hidden_state", "text_embeds"),
    integers: str = "int64",
    image_input: str = "pixel_values",
    image_outputs: Sequence[str] = ("last_hidden_state", "image_embeds"),
    floats: str = "float32",
    batch: int = 2,
    dynamic: Sequence[str] = ("batch", "sequence"),
) -> Path:
    """Writes both towers as torch exports them. dynamic: the axes that any size is declared for."""
    import torch

    class Text(torch.nn.Module):
        def forward(self, ids: Any, mask: Any = None) -> Any:
            output = model.text_model(input_ids=ids, attention_mask=mask)
            found = {
                "last_hidden_state": output.last_hidden_state,
                "pooler_output": output.pooler_output,
            }
            embeddings = model.text_projection(output.pooler_output)
            return tuple(found.get(name, embeddings) for name in outputs)

    class Image(torch.nn.Module):
        def forward(self, values: Any) -> Any:
            output = model.vision_model(pixel_values=values)
            found = {"last_hidden_state": output.last_hidden_state}
            embeddings = model.visual_projection(output.pooler_output)
            return tuple(found.get(name, embeddings) for name in image_outputs)

    def write(tower: Any, examples: Any, names: Sequence[str], made: Sequence[str]) -> None:
        file = folder / ("textual.onnx" if tower is text else "visual.onnx")
        axes = {axis: name for axis, name in enumerate(("batch", "sequence")) if name in dynamic}
        axes = axes if tower is text else {axis: name for axis, name in axes.items() if axis == 0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its deprecation
            torch.onnx.export(
                tower,
                tuple(examples),
                str(file),
                dynamo=False,
                input_names=list(names),
                output_names=list(made),
                dynamic_axes=dict.fromkeys(names, axes) if axes else None,
            )

    folder.mkdir(exist_ok=True)
    text, image = Text().eval(), Image().eval()
    text.model = image.model = model  # or its weights would be taken for results of the graph
    ids = torch.from_numpy(np.resize(tokens_of(["a b c d"]), (batch, 77)).copy())
    ids = ids.to(getattr(torch, integers))
    write(text, [ids, torch.ones_like(ids)][: len(inputs)], inputs, outputs)
    values = torch.zeros((batch, 3, SIZE, SIZE))
    if floats == "float16":
        model = copy.deepcopy(model).half()
        image.model, values = model, values.half()
    write(image, [values], [image_input], image_outputs)
    return folder


EXPORTS: dict[str, dict[str, Any]] = {
    "transformers": {},
    "int32 ids": {"integers": "int32"},
    "int32 ids, batches of one": {"integers": "int32", "batch": 1, "dynamic": ()},
    "batches of three": {"batch": 3, "dynamic": ("sequence",)},
    "texts of 77": {"dynamic": ("batch",)},
    "CLIP's own": {
        "inputs": ["input"],
        "outputs": ["output"],
        "image_input": "input",
        "image_outputs": ["output"],
        "dynamic": ("batch",),
    },
    "other names": {
        "inputs": ["text"],
        "outputs": ["text_features"],
        "integers": "int32",
        "image_input": "image",
        "image_outputs": ["last_hidden_state", "image_features"],
    },
    "more outputs": {"outputs": ["pooler_output", "last_hidden_state", "text_embeds"]},
    "float16 pixels": {"floats": "float16"},
}


USUAL = ("transformers", "int32 ids, batches of one", "CLIP's own", "float16 pixels")


@needs_torch
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, marks=() if name in USUAL else pytest.mark.slow, id=name)
        for name, options in EXPORTS.items()
    ],
)
def test_embeddings_equal_those_of_the_exported_model(
    options: dict[str, Any], model: Any, tmp_path: Path
) -> None:
    runtime = OnnxRuntime.load("ViT-B/32", model_path=export(model, tmp_path, **options))
    assert (runtime.card.image.size, runtime.card.dim) == (SIZE, DIM)
    for count in (4, 1):
        tokens = tokens_of(TEXTS[:count])
        expected = expected_texts(model, tokens)
        assert seeded.relative(runtime.encode_text(tokens), expected) < 1e-4
        pixels = pixels_of(count)
        found = runtime.encode_image(pixels)
        assert found.dtype == np.float32
        half = options.get("floats") == "float16"
        assert seeded.relative(found, expected_images(model, pixels)) < (1e-2 if half else 1e-4)
    assert runtime.precision == ("fp16" if half else "fp32")


@pytest.mark.slow
@needs_torch
def test_a_flow_of_clip_as_service_serves_a_folder_of_graphs(
    model: Any, start: Start, tmp_path: Path
) -> None:
    """As its guide to fine-tuned models has it: named by the model it was tuned from."""
    folder = export(model, tmp_path / "clip-fashion-cas", integers="int32", batch=1, dynamic=())
    spec = flow("onnx", name="ViT-B/32", model_path=f"~/{folder.name}", exact=True)
    server = start(spec, HOME=str(tmp_path))
    image = (SAMPLES / "cat.png").read_bytes()
    with Client(server.grpc) as client:
        embeddings = client.encode([*TEXTS, SAMPLES / "cat.png"])
        assert client.info().dim == DIM
    expected = expected_texts(model, tokens_of(TEXTS))
    assert seeded.relative(embeddings[:-1], expected) < 1e-4
    pixels = ImageTransform(ImageSpec(SIZE), exact=True)(image)[None]
    assert seeded.relative(embeddings[-1:], expected_images(model, pixels)) < 1e-4


Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a graph: `write("textual", inputs, nodes, outputs, **constants)`."""
    import onnx
    from onnx import helper, numpy_helper

    def write_one(
        name: str,
        inputs: dict[str, tuple[int, list[Any]]],
        nodes: list[Any],
        outputs: Sequence[str] = ("embeddings",),
        **constants: Any,
    ) -> None:
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info(key, *value) for key, value in inputs.items()],
            [helper.make_tensor_value_info(each, onnx.TensorProto.FLOAT, None) for each in outputs],
            [numpy_helper.from_array(np.asarray(v), key) for key, v in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        onnx.save(model, tmp_path / f"{name}.onnx")

    return write_one


FLOAT, INT32, INT64, STRING = 1, 6, 7, 8  # onnx.TensorProto's


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    from onnx import helper

    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def write_image(write: Write, shape: Sequence[Any] = ("N", 3, 224, 224), width: int = 3) -> None:
    """The mean of each channel."""
    nodes = [
        node("ReduceMean", "x axes", "means", keepdims=0),
        node("Gather", "means columns", "embeddings", axis=1),
    ]
    columns = np.arange(width) % 3
    write("visual", {"x": (FLOAT, [*shape])}, nodes, axes=[2, 3], columns=columns)


def write_text(write: Write, shape: Sequence[Any] = ("N", "L"), kind: int = INT64) -> None:
    """The first three ids."""
    nodes = [
        node("Cast", "x", "floats", to=FLOAT),
        node("Slice", "floats start end axis", "embeddings"),
    ]
    write("textual", {"x": (kind, [*shape])}, nodes, start=[0], end=[3], axis=[1])


TOKENS = np.array([[49406, 320, 2368, 49407], [49406, 49407, 0, 0]], np.int32)


def test_graphs_of_the_first_releases_of_clip_as_service(write: Write, tmp_path: Path) -> None:
    write_image(write)
    write_text(write, ["N", 77])
    runtime = OnnxRuntime.load("ViT-B/32", model_path=tmp_path)
    pixels = np.full((2, 3, 224, 224), 128, dtype=np.uint8)
    expected = normalized(pixels, runtime.card.image).mean(axis=(2, 3))
    np.testing.assert_allclose(runtime.encode_image(pixels), expected, atol=1e-5)
    np.testing.assert_array_equal(runtime.encode_text(TOKENS), TOKENS[:, :3])


def test_a_folder_may_be_part_of_the_name(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(write)
    write_text(write)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path.parent)
    for place in (tmp_path, f"~/{tmp_path.name}", f"./{tmp_path.name}"):
        card = OnnxRuntime.load(f"ViT-B/32::{place}").card
        assert (card.name, card.dim) == ("ViT-B-32::openai", 3)


def test_a_folder_that_lacks_a_tower_is_refused(write: Write, tmp_path: Path) -> None:
    write_image(write)
    with pytest.raises(ConfigurationError, match=r"without both towers .* it has visual\.onnx"):
        OnnxRuntime.load("ViT-B/32", model_path=tmp_path)


def test_a_graph_that_pools_its_padding_gets_it(write: Write, tmp_path: Path) -> None:
    """Though it declares texts of any length."""
    nodes = [
        node("Cast", "ids", "floats", to=FLOAT),
        node("ReduceMean", "floats axis", "mean", keepdims=1),
        node("Concat", "mean mean mean", "embeddings", axis=1),
    ]
    write("textual", {"ids": (INT64, ["N", "L"])}, nodes, axis=[1])
    write_image(write)
    runtime = OnnxRuntime.load("ViT-B/32", model_path=tmp_path)
    expected = TOKENS.sum(axis=1, keepdims=True) / 77
    np.testing.assert_allclose(runtime.encode_text(TOKENS), np.repeat(expected, 3, 1), rtol=1e-5)


def test_a_graph_with_one_size_of_batch_inside_gets_it(write: Write, tmp_path: Path) -> None:
    """Though it declares batches of any size."""
    nodes = [
        node("Cast", "ids", "floats", to=FLOAT),
        node("Slice", "floats start end axis", "cut"),
        node("Reshape", "cut shape", "embeddings"),
    ]
    constants = {"start": [0], "end": [3], "axis": [1], "shape": [1, 3]}
    write("textual", {"ids": (INT64, ["N", "L"])}, nodes, **constants)
    write_image(write)
    runtime = OnnxRuntime.load("ViT-B/32", model_path=tmp_path)
    np.testing.assert_array_equal(runtime.encode_text(TOKENS), TOKENS[:, :3])


def test_other_inputs_of_a_text_tower_are_fed(write: Write, tmp_path: Path) -> None:
    """A mask is 1 up to the end token, types are 0, positions count."""
    each = (INT32, ["N", "L"])
    nodes = [
        node("Mul", "attention_mask position_ids", "products"),
        node("Add", "products token_type_ids", "sums"),
        node("Add", "sums zero", "rows"),
        node("Cast", "rows", "floats", to=FLOAT),
        node("ReduceSum", "floats axis", "sum", keepdims=1),
        node("ReduceMax", "floats axis", "most", keepdims=1),
        node("Concat", "sum most most", "embeddings", axis=1),
        node("Cast", "input_ids", "unused", to=FLOAT),
    ]
    inputs = ["attention_mask", "input_ids", "position_ids", "token_type_ids"]
    write("textual", dict.fromkeys(inputs, each), nodes, axis=[1], zero=np.int32([0]))
    write_image(write)
    runtime = OnnxRuntime.load("ViT-B/32", model_path=tmp_path)
    np.testing.assert_array_equal(runtime.encode_text(TOKENS), [[6, 3, 3], [1, 1, 1]])


def test_texts_are_cut_to_what_a_graph_takes(write: Write, tmp_path: Path) -> None:
    write_image(write)
    write_text(write, ["N", 8], INT32)
    assert OnnxRuntime.load("ViT-B/32", model_path=tmp_path).card.text.context_length == 8


IDENTITY = [("Identity", "x", "embeddings")]
UNFIT: dict[str, tuple[str, dict[str, Any], list[tuple[str, str, str]], list[str]]] = {
    "grey pixels": (
        "visual", {"x": (FLOAT, ["N", 1, 32, 32])}, IDENTITY,
        ["visual.onnx has the inputs x float32 [?, 1, 32, 32]", "pixels [B, 3, S, S]"],
    ),
    "oblong images": (
        "visual", {"x": (FLOAT, ["N", 32, 48, 3])}, IDENTITY, ["pixels [B, 3, S, S]"],
    ),
    "two images": (
        "visual", {"x": (FLOAT, ["N", 3, 32, 32]), "y": (FLOAT, ["N", 3, 32, 32])}, IDENTITY,
        ["y float32", "expected a single input"],
    ),
    "states of every patch": (
        "visual", {"x": (FLOAT, ["N", 3, 32, 32])}, IDENTITY,
        ["embeddings [B, D]", "its outputs are embeddings [2, 3, 32, 32]"],
    ),
    "texts": (
        "textual", {"x": (STRING, ["N"])},
        [("StringNormalizer", "x", "y"), ("Shape", "y", "z"), ("ConstantOfShape", "z", "w")],
        ["an input x of tensor(string)", "tensors of numbers"],
    ),
    "tokens as floats": (
        "textual", {"x": (FLOAT, ["N", "L"])}, IDENTITY,
        ["textual.onnx has the inputs x float32 [?, ?]", "an input of integer tokens [B, L]"],
    ),
    "an input nobody knows": (
        "textual", {"ids": (INT64, ["N", "L"]), "x": (FLOAT, ["N", "L"])}, IDENTITY,
        ["x float32", "attention_mask"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT.values(), ids=UNFIT.keys())
def test_a_graph_that_does_not_fit_is_refused_in_one_line(
    case: tuple[str, Any, Any, list[str]], write: Write, tmp_path: Path
) -> None:
    name, inputs, nodes, parts = case
    write_image(write)
    write_text(write)
    write(name, inputs, [node(*each) for each in nodes], [nodes[-1][2]])
    with pytest.raises(ConfigurationError) as caught:
        OnnxRuntime.load("ViT-B/32", model_path=tmp_path)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_graph_with_another_vocabulary_is_refused(write: Write, tmp_path: Path) -> None:
    nodes = [
        node("Gather", "table x", "states"),
        node("ReduceMean", "states axis", "embeddings", keepdims=0),
    ]
    table = np.zeros((100, 3), np.float32)
    write("textual", {"x": (INT64, ["N", "L"])}, nodes, table=table, axis=[1])
    write_image(write)
    with pytest.raises(ConfigurationError, match=r"textual\.onnx does not turn x \[2, 77\] into"):
        OnnxRuntime.load("ViT-B/32", model_path=tmp_path)


def test_towers_of_two_models_are_refused(write: Write, tmp_path: Path) -> None:
    write_image(write, width=5)
    write_text(write)
    with pytest.raises(ConfigurationError, match=r"of 5 dimensions, and .*textual\.onnx of 3:"):
        OnnxRuntime.load("ViT-B/32", model_path=tmp_path)
