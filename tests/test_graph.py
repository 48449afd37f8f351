"""ONNX graphs: valid, and equal to open_clip on seeded random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import seeded
from cn_clip_reference import drawn

from clip_server.errors import ConfigurationError
from clip_server.model_card import ImageSpec, Precision
from clip_server.runtimes.onnx import OnnxRuntime
from clip_server.towers import graph, registry

TOLERANCE = 1e-4
SMALL = {
    "vision transformer": seeded.SMALL_VIT,
    "exact GELU": seeded.SMALL_GELU,
    "residual network": seeded.SMALL_RESNET,
    "one layer": seeded.SMALL_VIT
    | {
        "vision_cfg": seeded.SMALL_VIT["vision_cfg"] | {"layers": 1},
        "text_cfg": seeded.SMALL_TEXT | {"layers": 1},
    },
    "narrow MLP, wide heads": seeded.SMALL_VIT
    | {
        "vision_cfg": seeded.SMALL_VIT["vision_cfg"] | {"head_width": 32, "mlp_ratio": 2.0},
        "text_cfg": seeded.SMALL_TEXT | {"heads": 2, "mlp_ratio": 3.0},
    },
}


@pytest.mark.parametrize("name", SMALL)
def test_equals_open_clip(name: str, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    config = SMALL[name]
    model = seeded.open_clip_model(config)
    runtime = OnnxRuntime.load("small", model_path=seeded.save(model, tmp_path, config), threads=1)
    for batch in (1, 3):
        pixels = seeded.random_pixels(config, batch)
        expected = seeded.reference_images(model, pixels)
        assert seeded.relative(runtime.encode_image(pixels), expected) < TOLERANCE
        for longest in (2, 9, 20):
            tokens = seeded.random_tokens(config, batch, longest)
            expected = seeded.reference_texts(model, tokens)
            for length in {longest, 20}:
                found = runtime.encode_text(tokens[:, :length])
                assert seeded.relative(found, expected) < TOLERANCE


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", SMALL)
def test_graphs_for_gpus_give_the_same_vectors(name: str, precision: Precision) -> None:
    config = SMALL[name]
    tensors = drawn(registry.tensor_shapes(config))
    ours, for_cuda, for_tensorrt = (
        (
            graph.build_visual(config, tensors, ImageSpec(64), precision=precision, target=target),
            graph.build_textual(config, tensors, precision=precision, target=target),
        )
        for target in get_args(graph.Target)
    )
    for model in (*for_cuda, *for_tensorrt):
        assert "NonZero" not in {node.op_type for node in model.graph.node}
    for model in for_tensorrt:
        takers = [node.op_type for node in model.graph.node if "pixels" in node.input]
        assert set(takers) <= {"Cast", "Shape"}
    pixels = {"pixels": seeded.random_pixels(config, 3)}
    texts = [
        {"tokens": seeded.random_tokens(config, batch, longest)[:, :length]}
        for batch, longest in ((1, 2), (3, 9), (5, 20))
        for length in {longest, 20}
    ]
    for feeds, *models in zip(([pixels], texts), ours, for_cuda, for_tensorrt, strict=True):
        expected, *others = map(session, models)
        for feed in feeds:
            for found in others:
                pair = found.run(None, feed)[0], expected.run(None, feed)[0]
                assert seeded.relative(*pair) < TOLERANCE


@pytest.mark.parametrize("name", SMALL)
def test_tensor_shapes_are_those_of_open_clip(name: str) -> None:
    pytest.importorskip("open_clip")
    state = seeded.open_clip_model(SMALL[name]).state_dict()
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }
    assert registry.tensor_shapes(SMALL[name]) == expected


def session(model: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def random_tensors(config: dict[str, Any]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = registry.tensor_shapes(config)
    return {name: rng.uniform(0.1, 1, shape).astype("f2") for name, shape in shapes.items()}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", SMALL)
def test_graphs_are_valid_and_typed(name: str, precision: Precision) -> None:
    config, tensors = SMALL[name], random_tensors(SMALL[name])
    visual = graph.build_visual(config, tensors, ImageSpec(64), precision=precision)
    textual = graph.build_textual(config, tensors, precision=precision)
    for model in (visual, textual):
        onnx.checker.check_model(model, full_check=True)
        assert {opset.domain for opset in model.opset_import} == {""}
        names = [node.name for node in model.graph.node]
        assert len(names) == len(set(names))
    assert signature(visual) == {
        "pixels": ("UINT8", ["batch", 3, 64, 64]),
        "embedding": ("FLOAT", ["batch", 32]),
    }
    assert signature(textual) == {
        "tokens": ("INT32", ["batch", "length"]),
        "embedding": ("FLOAT", ["batch", 32]),
    }


@pytest.mark.parametrize("name", SMALL)
def test_half_graphs_sum_in_float32(name: str) -> None:
    config, tensors = SMALL[name], random_tensors(SMALL[name])
    for model in (
        graph.build_visual(config, tensors, ImageSpec(64), precision="fp16"),
        graph.build_textual(config, tensors, precision="fp16"),
    ):
        types = types_of(onnx.shape_inference.infer_shapes(model))
        found = {kind: set[str]() for kind in ("LayerNormalization", "Softmax", "Gemm", "Conv")}
        for node in model.graph.node:
            if node.op_type in found:
                found[node.op_type].update(types[name] for name in node.input)
        assert found["LayerNormalization"] | found["Softmax"] == {"FLOAT"}
        assert found["Gemm"] | found["Conv"] == {"FLOAT16"}


def types_of(model: onnx.ModelProto) -> dict[str, str]:
    """The type of every value in a model."""
    values = {each.name: each.type.tensor_type.elem_type for each in model.graph.value_info}
    constants = {each.name: each.data_type for each in model.graph.initializer}
    return {
        name: onnx.TensorProto.DataType.Name(kind) for name, kind in (values | constants).items()
    }


def signature(model: onnx.ModelProto) -> dict[str, tuple[str, list[str | int]]]:
    return {
        value.name: (
            onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type),
            [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
        )
        for value in [*model.graph.input, *model.graph.output]
    }


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vision_cfg", "timm_model_name", "vit_base"),
        ("vision_cfg", "attentional_pool", "parallel"),
        ("text_cfg", "hf_model_name", "gpt2"),
        ("text_cfg", "pool_type", "none"),
    ],
)
def test_another_family_is_refused_by_name(part: str, key: str, value: object) -> None:
    config = seeded.SMALL_VIT | {part: seeded.SMALL_VIT[part] | {key: value}}
    with pytest.raises(ConfigurationError, match=f"{key}.* in {part}"):
        registry.tensor_shapes(config)
