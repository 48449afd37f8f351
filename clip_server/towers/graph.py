"""ONNX graphs of a model's two towers, built from open_clip's configuration and weights.

Nothing is traced, so neither torch nor open_clip is needed. Both towers take a dynamic batch
and pool early: the last block computes its query and its MLP for the one position that becomes
the embedding. They compute in float32; in float16 except for sums (see `builder.Fp16Builder`); or
their linear layers in int8 (see `quantize`), with one operator that only onnxruntime on a CPU has.

Within a tower activations are [N, W], so that every linear layer is one Gemm; `layout` says
which of the B * L positions the N rows are.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from clip_server.model_card import ImageSpec, Precision
from clip_server.towers import registry
from clip_server.towers.builder import BUILDERS, Store, Weights, store_inline
from clip_server.towers.tower import Config, Target


def build_visual(
    config: Config,
    tensors: Weights,
    image: ImageSpec,
    *,
    precision: Precision = "fp32",
    target: Target = "onnxruntime",
    store: Store = store_inline,
) -> onnx.ModelProto:
    """The image tower: `pixels` uint8 [B, 3, S, S] to `embedding` float32 [B, D].

    config: open_clip's JSON form. tensors: a checkpoint that has `registry.tensor_shapes(config)`.
    precision: in int8 the convolutions of a residual network stay in float32.
    target: the library that the graph is for.
    store: where its weights are kept; by default in the model.

    Raises:
        ConfigurationError: only torch can build the tower.
    """
    graph = BUILDERS[precision]("visual", tensors, store)
    embedding = registry.image_tower(config).build(graph, image, target)
    size = image.size
    source = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 3, size, size])
    return graph.finished(source, embedding, config["embed_dim"])


def build_textual(
    config: Config,
    tensors: Weights,
    *,
    precision: Precision = "fp32",
    target: Target = "onnxruntime",
    store: Store = store_inline,
) -> onnx.ModelProto:
    """The text tower: `tokens` int32 [B, L], any L up to the context, to `embedding` [B, D].

    Arguments and errors are those of `build_visual`.
    """
    graph = BUILDERS[precision]("textual", tensors, store)
    embedding = registry.text_tower(config).build(graph, target)
    source = helper.make_tensor_value_info("tokens", TensorProto.INT32, ["batch", "length"])
    return graph.finished(source, embedding, config["embed_dim"])
