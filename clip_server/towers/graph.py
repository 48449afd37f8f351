"""ONNX graphs of CLIP's two towers, built from open_clip's configuration and weights.

Nothing is traced, so neither torch nor open_clip is needed. Both towers take a dynamic batch
and pool early: the last block computes its query and its MLP for the one position that becomes
the embedding. They compute in float32; in float16, but for sums (see `nodes.HalfGraph`); or their
linear layers in int8 (see `quantize`), with one operator that only onnxruntime on a CPU has.

Within a tower activations are [N, W], so that every linear layer is one Gemm; `layout` tells
which of the B * L positions the N rows are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from clip_server.errors import ConfigurationError
from clip_server.model_card import ImageSpec, Precision
from clip_server.towers import bert_graph
from clip_server.towers.attention import Attention, head
from clip_server.towers.bert import BertTower, Shapes
from clip_server.towers.layout import Layout, of_first_positions, of_padded_texts, of_texts
from clip_server.towers.nodes import EPSILON, KINDS, Graph, Weights

# Graphs for onnxruntime save a CPU work, with shapes that depend on the texts and operators on
# bytes; TensorRT takes neither.
Target = Literal["onnxruntime", "tensorrt"]

_VISION_KEYS = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
_TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_TEXT_KEYS |= {"hf_tokenizer_name", "tokenizer_kwargs"}  # which no tower is made of


def build_visual(
    config: Mapping[str, Any],
    tensors: Weights,
    image: ImageSpec,
    *,
    precision: Precision = "fp32",
    target: Target = "onnxruntime",
) -> onnx.ModelProto:
    """The image tower: `pixels` uint8 [B, 3, S, S] to `embedding` float32 [B, D].

    config: open_clip's JSON form. tensors: a checkpoint that has `tensor_shapes(config)`.
    precision: in int8 the convolutions of a residual network stay in float32.
    target: the library that the graph is for.

    Raises:
        ConfigurationError: the architecture is of a family that this builder lacks.
    """
    vision = _vision(config)
    graph = _graph("visual", config, tensors, precision)
    if isinstance(vision, _ResNet):
        embedding = _resnet(graph, vision, _normalised(graph, image))
    else:
        embedding = _vision_transformer(graph, vision, image, target)
    size = image.size
    source = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 3, size, size])
    return graph.finished(source, embedding, config["embed_dim"])


def build_textual(
    config: Mapping[str, Any],
    tensors: Weights,
    *,
    precision: Precision = "fp32",
    target: Target = "onnxruntime",
) -> onnx.ModelProto:
    """The text tower: `tokens` int32 [B, L], any L up to the context, to `embedding` [B, D].

    Arguments and errors are those of `build_visual`.
    """
    text = _text(config)
    if isinstance(text, BertTower):
        graph = KINDS[precision]("textual", tensors)
        embedding = bert_graph.text_transformer(graph, text)
    else:
        graph = _graph("textual", config, tensors, precision)
        embedding = _text_transformer(graph, text, target)
    source = helper.make_tensor_value_info("tokens", TensorProto.INT32, ["batch", "length"])
    return graph.finished(source, embedding, config["embed_dim"])


def builds(config: Mapping[str, Any]) -> bool:
    """Whether an architecture is of a family that this builder has."""
    try:
        tensor_shapes(config)
    except ConfigurationError:
        return False
    return True


def tensor_shapes(config: Mapping[str, Any]) -> Shapes:
    """The name and shape of every tensor in a checkpoint of this architecture.

    Raises:
        ConfigurationError: the architecture is of a family that this builder lacks.
    """
    vision, text, dim = _vision(config), _text(config), config["embed_dim"]
    return {
        "logit_scale": (),
        **vision.shapes(dim),
        **text.shapes(dim),
    }


@dataclass(frozen=True)
class _Transformer:
    """The blocks of a tower; `prefix` is where their tensors are in a checkpoint."""

    prefix: str
    width: int
    layers: int
    heads: int
    mlp_ratio: float

    def block(self, index: int) -> str:
        return f"{self.prefix}transformer.resblocks.{index}."

    def block_shapes(self) -> Shapes:
        width, hidden = self.width, int(self.width * self.mlp_ratio)
        one: Shapes = {
            **_affine("ln_1", width),
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            **_linear("attn.out_proj", width, width),
            **_affine("ln_2", width),
            **_linear("mlp.c_fc", width, hidden),
            **_linear("mlp.c_proj", hidden, width),
        }
        return {
            self.block(index) + name: shape
            for index in range(self.layers)
            for name, shape in one.items()
        }


@dataclass(frozen=True)
class _VisionTransformer(_Transformer):
    patch: int
    grid: int

    def shapes(self, dim: int) -> Shapes:
        width = self.width
        shapes: Shapes = {
            "conv1.weight": (width, 3, self.patch, self.patch),
            "class_embedding": (width,),
            "positional_embedding": (self.grid**2 + 1, width),
            **_affine("ln_pre", width),
            **_affine("ln_post", width),
            "proj": (width, dim),
        }
        return {self.prefix + name: shape for name, shape in shapes.items()} | self.block_shapes()


@dataclass(frozen=True)
class _TextTransformer(_Transformer):
    context: int
    vocabulary: int

    def shapes(self, dim: int) -> Shapes:
        return {
            "token_embedding.weight": (self.vocabulary, self.width),
            "positional_embedding": (self.context, self.width),
            **_affine("ln_final", self.width),
            "text_projection": (self.width, dim),
            **self.block_shapes(),
        }


@dataclass(frozen=True)
class _ResNet:
    """OpenAI's ResNet: a stem of three convolutions, anti-aliased strides, attention pooling."""

    prefix: str
    layers: tuple[int, ...]
    width: int
    heads: int
    grid: int

    def bottlenecks(self) -> list[tuple[str, int, int, int]]:
        """(tensor prefix, channels in, channels inside, stride) of each, in order."""
        found, channels = [], self.width
        for stage, blocks in enumerate(self.layers):
            planes = self.width * 2**stage
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                prefix = f"{self.prefix}layer{stage + 1}.{block}."
                found.append((prefix, channels, planes, stride))
                channels = 4 * planes
        return found

    def shapes(self, dim: int) -> Shapes:
        half, pooled = self.width // 2, 32 * self.width
        shapes: Shapes = {
            **_convolution(self.prefix, 1, 3, half, 3),
            **_convolution(self.prefix, 2, half, half, 3),
            **_convolution(self.prefix, 3, half, self.width, 3),
        }
        for prefix, channels, planes, stride in self.bottlenecks():
            shapes |= _convolution(prefix, 1, channels, planes, 1)
            shapes |= _convolution(prefix, 2, planes, planes, 3)
            shapes |= _convolution(prefix, 3, planes, 4 * planes, 1)
            if stride > 1 or channels != 4 * planes:
                shapes[f"{prefix}downsample.0.weight"] = (4 * planes, channels, 1, 1)
                shapes |= _batch_norm(f"{prefix}downsample.1", 4 * planes)
        pool = f"{self.prefix}attnpool."
        shapes[f"{pool}positional_embedding"] = (self.grid**2 + 1, pooled)
        for name in ("q_proj", "k_proj", "v_proj"):
            shapes |= _linear(pool + name, pooled, pooled)
        return shapes | _linear(f"{pool}c_proj", pooled, dim)


def _affine(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _batch_norm(name: str, width: int) -> Shapes:
    moments: Shapes = {f"{name}.running_mean": (width,), f"{name}.running_var": (width,)}
    return _affine(name, width) | moments


def _convolution(prefix: str, index: int, inputs: int, outputs: int, kernel: int) -> Shapes:
    weight: Shapes = {f"{prefix}conv{index}.weight": (outputs, inputs, kernel, kernel)}
    return weight | _batch_norm(f"{prefix}bn{index}", outputs)


def _vision(config: Mapping[str, Any]) -> _VisionTransformer | _ResNet:
    vision = config["vision_cfg"]
    _refuse_unknown("vision_cfg", vision, _VISION_KEYS)
    size, width = vision.get("image_size", 224), vision.get("width", 768)
    size = size[0] if isinstance(size, list) else size
    layers, head_width = vision.get("layers", 12), vision.get("head_width", 64)
    if isinstance(layers, list):
        heads = width * 32 // head_width
        return _ResNet("visual.", tuple(layers), width, heads, grid=size // 32)
    patch = vision.get("patch_size", 16)
    return _VisionTransformer(
        "visual.",
        width,
        layers,
        heads=width // head_width,
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        patch=patch,
        grid=size // patch,
    )


def _text(config: Mapping[str, Any]) -> _TextTransformer | BertTower:
    if bert := BertTower.of(config):
        return bert
    text = config["text_cfg"]
    _refuse_unknown("text_cfg", text, _TEXT_KEYS)
    return _TextTransformer(
        "",
        text.get("width", 512),
        text.get("layers", 12),
        heads=text.get("heads", 8),
        mlp_ratio=text.get("mlp_ratio", 4.0),
        context=text.get("context_length", 77),
        vocabulary=text.get("vocab_size", 49408),
    )


def _refuse_unknown(part: str, config: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(config.keys() - known):
        raise ConfigurationError(
            f"the ONNX graph builder does not know {', '.join(unknown)} in {part}: "
            "convert this model first (python -m clip_server.convert), or run it with torch"
        )


def _graph(name: str, config: Mapping[str, Any], tensors: Weights, precision: Precision) -> Graph:
    return KINDS[precision](name, tensors, quick_gelu=config.get("quick_gelu", False))


def _normalised(graph: Graph, image: ImageSpec) -> str:
    """Pixels 0..255 to the float range the tower was trained on."""
    scale, shift = (values.astype(np.float32) for values in _normalisation(image))
    values = graph.cast("pixels", TensorProto.FLOAT, "pixels.float")
    values = graph.op("Mul", values, graph.constant("pixels.scale", scale), name="pixels.scaled")
    values = graph.op("Add", values, graph.constant("pixels.shift", shift), name="pixels.shifted")
    return graph.computed(values)


def _normalisation(image: ImageSpec) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What pixels 0..255 are multiplied by, and what is then added: each [3, 1, 1]."""
    mean, std = (np.array(v, np.float64).reshape(3, 1, 1) for v in (image.mean, image.std))
    return 1 / (255 * std), -mean / std


# --- transformers


def _vision_transformer(
    graph: Graph, tower: _VisionTransformer, image: ImageSpec, target: Target
) -> str:
    prefix, width, length = tower.prefix, tower.width, tower.grid**2 + 1
    patches = _patches(graph, tower, image, target)
    patches = graph.op("Reshape", patches, graph.integers(-1, length - 1, width), name="patches")
    positions = graph.weight(f"{prefix}positional_embedding")
    shift = graph.floats("patches.position", positions[1:])
    patches = graph.op("Add", patches, shift, name="patches.placed")
    # The class token is the same for every image, its position included.
    token = positions[0] + graph.weight(f"{prefix}class_embedding")
    token = graph.floats("class_token", token.reshape(1, 1, width))
    batch = graph.op("Shape", "pixels", name="batch", start=0, end=1)
    shape = graph.op("Concat", batch, graph.integers(1, width), name="class_token.shape", axis=0)
    token = graph.op("Expand", token, shape, name="class_tokens")
    states = graph.op("Concat", token, patches, name="states", axis=1)
    states = graph.op("Reshape", states, graph.integers(-1, width), name="states.flat")
    states = graph.layer_norm(states, f"{prefix}ln_pre")

    pooled = _blocks(graph, tower, states, of_first_positions(graph, length))
    pooled = graph.layer_norm(pooled, f"{prefix}ln_post")
    return graph.projection(pooled, f"{prefix}proj")


def _patches(graph: Graph, tower: _VisionTransformer, image: ImageSpec, target: Target) -> str:
    """The embedding of every patch, [B * G * G, W].

    A stride as wide as the kernel makes the convolution one Gemm. The pixels are moved while
    they are bytes, but for TensorRT, which only converts bytes; their normalisation is part of
    the weight and the bias.
    """
    patch, grid = tower.patch, tower.grid
    pixels, linear = "pixels", graph.linear_of_bytes
    if target == "tensorrt":
        pixels, linear = graph.of_bytes(pixels), graph.linear
    pixels = _cropped(graph, pixels, patch * grid, image.size)
    shape = graph.integers(-1, 3, grid, patch, grid, patch)
    pixels = graph.op("Reshape", pixels, shape, name="pixels.by_patch")
    pixels = graph.op("Transpose", pixels, name="pixels.of_patch", perm=[0, 2, 4, 1, 3, 5])
    pixels = graph.op("Reshape", pixels, graph.integers(-1, 3 * patch**2), name="pixels.rows")
    scale, shift = _normalisation(image)
    kernel = graph.weight(f"{tower.prefix}conv1.weight").astype(np.float64)
    weight = (kernel * scale).reshape(tower.width, -1).astype(np.float32)
    bias = (kernel * shift).sum(axis=(1, 2, 3)).astype(np.float32)
    return linear(pixels, f"{tower.prefix}conv1", weight, bias)


def _cropped(graph: Graph, pixels: str, wanted: int, size: int) -> str:
    """The pixels that the patches cover: those left over at the end have never counted."""
    if wanted == size:
        return pixels
    starts, ends, axes = graph.integers(0, 0), graph.integers(wanted, wanted), graph.integers(2, 3)
    return graph.op("Slice", pixels, starts, ends, axes, name="pixels.cropped")


def _text_transformer(graph: Graph, tower: _TextTransformer, target: Target) -> str:
    layout = of_texts(graph) if target == "onnxruntime" else of_padded_texts(graph)
    table = graph.weight("token_embedding.weight")
    states = graph.lookup("token_embedding", table, layout.tokens)
    positions = graph.floats("positional_embedding", graph.weight("positional_embedding"))
    positions = graph.op("Gather", positions, layout.positions, name="positions.rows", axis=0)
    states = graph.op("Add", states, positions, name="states")

    mask = np.triu(np.full((tower.context, tower.context), -np.inf, dtype=np.float32), k=1)
    causal = head(graph, graph.floats("causal_mask", mask), layout.length, axes=[0, 1])
    last = graph.op("Gather", causal, layout.ends, name="end.mask.rows", axis=0)
    last = graph.op("Unsqueeze", last, graph.integers(1, 2), name="end.mask")

    pooled = _blocks(graph, tower, states, layout, mask=causal, pooled_mask=last)
    pooled = graph.layer_norm(pooled, "ln_final")
    return graph.projection(pooled, "text_projection")


def _blocks(
    graph: Graph,
    tower: _Transformer,
    states: str,
    layout: Layout,
    *,
    mask: str | None = None,
    pooled_mask: str | None = None,
) -> str:
    """All blocks: states [N, W] to the picked ones, [B, W].

    mask: added to the attention scores, [L, L]; pooled_mask: to those of the picked
        positions, [B, 1, 1, L].
    """
    for index in range(tower.layers - 1):
        states = _block(graph, tower, index, states, layout, mask)
    return _block(graph, tower, tower.layers - 1, states, layout, pooled_mask, pool=True)


def _block(
    graph: Graph,
    tower: _Transformer,
    index: int,
    states: str,
    layout: Layout,
    mask: str | None,
    pool: bool = False,
) -> str:
    """One block: states [N, W] to the same, or only to the picked ones, [B, W]."""
    prefix = tower.block(index)
    normed = graph.layer_norm(states, f"{prefix}ln_1")
    weight = graph.weight(f"{prefix}attn.in_proj_weight")
    bias = graph.weight(f"{prefix}attn.in_proj_bias")
    attention = Attention(graph, f"{prefix}attn", tower.heads, weight, bias)
    if pool:
        query, key, value = attention.project_picked(layout.pick(normed), normed, layout)
        attended = attention.attend(query, key, value, mask)
        states = layout.pick(states)
    else:
        query, key, value = attention.project_all(normed, layout)
        attended = layout.gather(attention.attend(query, key, value, mask))
    attended = graph.stored_linear(attended, f"{prefix}attn.out_proj")
    states = graph.op("Add", states, attended, name=f"{prefix}attended")
    hidden = graph.layer_norm(states, f"{prefix}ln_2")
    hidden = graph.gelu(graph.stored_linear(hidden, f"{prefix}mlp.c_fc"), f"{prefix}mlp.gelu")
    hidden = graph.stored_linear(hidden, f"{prefix}mlp.c_proj")
    return graph.op("Add", states, hidden, name=f"{prefix}states")


# --- residual network


def _resnet(graph: Graph, tower: _ResNet, pixels: str) -> str:
    states = _convolved(graph, pixels, tower.prefix, 1, stride=2)
    states = _convolved(graph, states, tower.prefix, 2)
    states = _convolved(graph, states, tower.prefix, 3)
    states = _average(graph, states, 2, f"{tower.prefix}avgpool")
    for prefix, channels, planes, stride in tower.bottlenecks():
        project = stride > 1 or channels != 4 * planes
        states = _bottleneck(graph, states, prefix, stride, project)
    return _attention_pool(graph, tower, states)


def _bottleneck(graph: Graph, states: str, prefix: str, stride: int, project: bool) -> str:
    hidden = _convolved(graph, states, prefix, 1)
    hidden = _convolved(graph, hidden, prefix, 2)
    hidden = _average(graph, hidden, stride, f"{prefix}avgpool")
    hidden = _folded(graph, hidden, f"{prefix}conv3", f"{prefix}bn3")
    if project:
        states = _average(graph, states, stride, f"{prefix}downsample.-1")
        states = _folded(graph, states, f"{prefix}downsample.0", f"{prefix}downsample.1")
    summed = graph.op("Add", hidden, states, name=f"{prefix}sum")
    return graph.op("Relu", summed, name=f"{prefix}relu3")


def _convolved(graph: Graph, states: str, prefix: str, index: int, stride: int = 1) -> str:
    states = _folded(graph, states, f"{prefix}conv{index}", f"{prefix}bn{index}", stride)
    return graph.op("Relu", states, name=f"{prefix}relu{index}")


def _folded(graph: Graph, states: str, conv: str, norm: str, stride: int = 1) -> str:
    """A convolution with the batch norm that follows it folded into its weights."""
    variance = graph.weight(f"{norm}.running_var").astype(np.float64)
    scale = graph.weight(f"{norm}.weight") / np.sqrt(variance + EPSILON)
    shift = graph.weight(f"{norm}.bias") - graph.weight(f"{norm}.running_mean") * scale
    kernel = (graph.weight(f"{conv}.weight") * scale.reshape(-1, 1, 1, 1)).astype(np.float32)
    return graph.op(
        "Conv",
        states,
        graph.floats(f"{conv}.weight", kernel),
        graph.floats(f"{conv}.bias", shift.astype(np.float32)),
        name=conv,
        strides=[stride] * 2,
        pads=[kernel.shape[-1] // 2] * 4,
    )


def _average(graph: Graph, states: str, stride: int, name: str) -> str:
    if stride == 1:
        return states
    size = [stride] * 2
    return graph.op("AveragePool", states, name=name, kernel_shape=size, strides=size)


def _attention_pool(graph: Graph, tower: _ResNet, states: str) -> str:
    """Attention of the mean over the positions [B, C, G, G]: [B, D]."""
    prefix, channels, length = f"{tower.prefix}attnpool.", 32 * tower.width, tower.grid**2 + 1
    states = graph.op("Reshape", states, graph.integers(0, channels, -1), name="positions.flat")
    mean = graph.op("ReduceMean", states, graph.integers(2), name="positions.mean")
    states = graph.op("Concat", mean, states, name="positions.all", axis=2)
    states = graph.op("Transpose", states, name="positions", perm=[0, 2, 1])
    table = graph.weight(f"{prefix}positional_embedding")
    shift = graph.floats("positions.shift", table)
    states = graph.op("Add", states, shift, name="positions.placed")
    states = graph.op("Reshape", states, graph.integers(-1, channels), name="positions.rows")
    names = [f"{prefix}{name}_proj" for name in "qkv"]
    weight = np.concatenate([graph.weight(f"{name}.weight") for name in names])
    bias = np.concatenate([graph.weight(f"{name}.bias") for name in names])
    attention = Attention(graph, f"{prefix}attn", tower.heads, weight, bias)
    layout = of_first_positions(graph, length)
    query, key, value = attention.project_picked(layout.pick(states), states, layout)
    attended = attention.attend(query, key, value, mask=None)
    return graph.stored_linear(attended, f"{prefix}c_proj")
