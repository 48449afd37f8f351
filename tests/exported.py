"""Folders of graphs as Immich and transformers.js publish them, written from seeded weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, compose, helper, numpy_helper

from clip_server.model_card import ImageSpec, Precision
from clip_server.runtimes.onnx import OnnxRuntime
from clip_server.towers import graph

Pixels = Literal["float", "uint8", "channels last"]
Tensors = dict[str, NDArray[Any]]
# Keeps our names apart from theirs.
PREFIX = "tower/"


def write_immich(
    folder: Path,
    config: dict[str, Any],
    tensors: Tensors,
    *,
    image: ImageSpec,
    pixels: Pixels = "float",
    mask: bool = False,
    external: bool | str = False,
    tokenizer: Path | None = None,
) -> Path:
    """Graphs for batches of one. external: with weights in files of their own, or all in one file
    of this name."""
    visual = graph.build_visual(config, tensors, image)
    textual = graph.build_textual(config, tensors)
    _take_pixels(visual, "image", image, pixels, batch=1)
    _take_tokens(textual, "text", TensorProto.INT32, [1, config["text_cfg"]["context_length"]])
    if mask:
        _use_mask(textual, TensorProto.INT32, [1, config["text_cfg"]["context_length"]])
    for name, model in {"visual": visual, "textual": textual}.items():
        _save(model, folder / name / "model.onnx", external=external)
    preprocess = {
        "size": [image.size, image.size],
        "mode": "RGB",
        "mean": image.mean,
        "std": image.std,
        "interpolation": image.interpolation,
        "resize_mode": image.resize,
        "fill_color": 0,
    }
    _write_json(folder / "visual/preprocess_cfg.json", preprocess)
    _write_json(folder / "config.json", config)
    _copy_tokenizer(tokenizer, folder / "textual")
    return folder


def write_transformers_js(
    folder: Path,
    config: dict[str, Any],
    tensors: Tensors,
    *,
    image: ImageSpec,
    described: dict[str, Any],
    preprocessor: dict[str, Any],
    precisions: dict[str, Precision] | None = None,
    mask: bool = False,
    tokenizer: Path | None = None,
) -> Path:
    """Graphs for batches and texts of any size. precisions: by the suffixes of their files."""
    for suffix, precision in (precisions or {"": "fp32"}).items():
        visual = graph.build_visual(config, tensors, image, precision=precision)
        textual = graph.build_textual(config, tensors, precision=precision)
        _take_pixels(visual, "pixel_values", image, "float", batch="batch")
        _take_tokens(textual, "input_ids", TensorProto.INT64, ["batch", "length"])
        if mask:
            _use_mask(textual, TensorProto.INT64, ["batch", "length"])
        for name, model in {"vision": visual, "text": textual}.items():
            _rename_output(model, {"vision": "image_embeds", "text": "text_embeds"}[name])
            _save(model, folder / f"onnx/{name}_model{suffix}.onnx")
    _write_json(folder / "config.json", described)
    _write_json(folder / "preprocessor_config.json", preprocessor)
    _copy_tokenizer(tokenizer, folder)
    return folder


def _take_pixels(
    model: onnx.ModelProto, name: str, image: ImageSpec, kind: Pixels, batch: int | str
) -> None:
    """Gives an image tower of ours, which takes uint8 pixels, another input."""
    compose.add_prefix(model, PREFIX, inplace=True)
    shape = [batch, 3, image.size, image.size]
    nodes = [helper.make_node("Cast", ["undone"], [f"{PREFIX}pixels"], to=TensorProto.UINT8)]
    if kind == "float":
        for key, values in (("std", image.std), ("mean", image.mean)):
            scaled = np.float32(values).reshape(3, 1, 1) * 255
            model.graph.initializer.append(numpy_helper.from_array(np.float32(scaled), key))
        nodes = [
            helper.make_node("Mul", [name, "std"], ["scaled"]),
            helper.make_node("Add", ["scaled", "mean"], ["moved"]),
            helper.make_node("Round", ["moved"], ["undone"]),
            *nodes,
        ]
    elif kind == "uint8":
        nodes = [helper.make_node("Identity", [name], [f"{PREFIX}pixels"])]
    else:
        shape = [batch, image.size, image.size, 3]
        nodes = [helper.make_node("Transpose", [name], [f"{PREFIX}pixels"], perm=[0, 3, 1, 2])]
    dtype = TensorProto.FLOAT if kind == "float" else TensorProto.UINT8
    _replace_input(model, nodes, helper.make_tensor_value_info(name, dtype, shape))


def _take_tokens(model: onnx.ModelProto, name: str, dtype: int, shape: Sequence[int | str]) -> None:
    """Gives a text tower of ours, which takes int32 tokens, another input."""
    compose.add_prefix(model, PREFIX, inplace=True)
    node = helper.make_node("Cast", [name], [f"{PREFIX}tokens"], to=TensorProto.INT32)
    _replace_input(model, [node], helper.make_tensor_value_info(name, dtype, shape))


def _use_mask(model: onnx.ModelProto, dtype: int, shape: Sequence[int | str]) -> None:
    """Adds an attention mask: the embedding is multiplied by the number of tokens that it has."""
    model.graph.input.append(helper.make_tensor_value_info("attention_mask", dtype, shape))
    axis = numpy_helper.from_array(np.int64([1]), "mask.axis")
    model.graph.initializer.append(axis)
    output = model.graph.output[0].name
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["attention_mask"], ["mask.floats"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["mask.floats", "mask.axis"], ["mask.sum"], keepdims=1),
            helper.make_node("Mul", [output, "mask.sum"], ["masked"]),
        ]
    )
    model.graph.output[0].name = "masked"


def _replace_input(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], source: onnx.ValueInfoProto
) -> None:
    others = [*model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *others])
    del model.graph.input[:]
    model.graph.input.append(source)


def _rename_output(model: onnx.ModelProto, name: str) -> None:
    old = model.graph.output[0].name
    model.graph.node.append(helper.make_node("Identity", [old], [name]))
    model.graph.output[0].name = name


def _save(model: onnx.ModelProto, file: Path, *, external: bool | str = False) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    together = isinstance(external, str)
    onnx.save(
        model,
        file,
        save_as_external_data=bool(external),
        all_tensors_to_one_file=together,
        location=external if together else None,
        size_threshold=10_000,
    )


def _copy_tokenizer(source: Path | None, target: Path) -> None:
    if source is not None:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / file, target / file)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


def load_int8(name: str) -> tuple[str, int]:
    """The precision and dimensions of a model that is loaded in int8, in a process of its own."""
    runtime = OnnxRuntime.load(name, precision="int8")
    return runtime.precision, runtime.card.dim
