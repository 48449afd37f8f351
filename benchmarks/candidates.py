"""Ways of running a tower that may be faster on a GPU than those of the runtimes.

None of them has been measured on one. `python -m benchmarks.gpu --candidates` puts them beside the
runtimes; what is faster there, and as exact, belongs into these.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clip_server import runtimes
from clip_server.model_card import Precision
from clip_server.models import converted
from clip_server.runtimes import tensorrt_engines
from clip_server.runtimes.cuda import Gpu
from clip_server.runtimes.loading import load_checkpoint
from clip_server.runtimes.onnx import OnnxRuntime
from clip_server.runtimes.onnx_graph import Feeds, Graph, ImageGraph, TextGraph
from clip_server.runtimes.protocol import Runtime
from clip_server.runtimes.reloading import Reloadable
from clip_server.runtimes.tensorrt import EngineTower, TensorrtRuntime
from clip_server.runtimes.torch import TorchRuntime, towers
from clip_server.towers import graph, onnx_file


def named(device: str) -> dict[str, Callable[[Path], Runtime]]:
    """Every candidate of a device, by name; each is made of a checkpoint's folder."""
    precision: Precision = "fp32" if device.startswith("cpu") else "fp16"
    candidates: dict[str, Callable[..., Runtime]] = {
        "torch channels-last": _channels_last,
        "torch compiled": _compiled,
        "torch pinned": _pinned,
        "onnx padded-texts": _padded_texts,
        "onnx io-binding": _io_binding,
        "tensorrt cuda-graphs": _cuda_graphs,
    }
    if device.startswith("cpu"):
        del candidates["torch pinned"], candidates["tensorrt cuda-graphs"]
    return {
        f"{name} {precision}": partial(make, precision=precision, device=device)
        for name, make in candidates.items()
    }


def _torch_towers(checkpoint: Path, precision: Precision, device: str) -> Any:
    card, tensors = load_checkpoint("", checkpoint)
    return card, *(tower.to(device) for tower in towers(card, tensors, precision))


def _channels_last(checkpoint: Path, precision: Precision, device: str) -> Runtime:
    """Convolutions of pictures in the order that tensor cores take them in."""
    card, visual, textual = _torch_towers(checkpoint, precision, device)
    visual.to(memory_format=torch.channels_last)

    class ChannelsLast(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            embeddings: torch.Tensor = visual(pixels.contiguous(memory_format=torch.channels_last))
            return embeddings

    return TorchRuntime(card, Reloadable(ChannelsLast()), Reloadable(textual), device, precision)


def _compiled(checkpoint: Path, precision: Precision, device: str) -> Runtime:
    """Kernels fused by torch.compile; those of pictures, whose shapes are few, in CUDA graphs."""
    card, visual, textual = _torch_towers(checkpoint, precision, device)
    compiled: Callable[..., Any] = torch.compile
    visual = compiled(visual, mode=None if device.startswith("cpu") else "reduce-overhead")
    textual = compiled(textual, dynamic=True)
    return TorchRuntime(card, Reloadable(visual), Reloadable(textual), device, precision)


def _pinned(checkpoint: Path, precision: Precision, device: str) -> Runtime:
    """Batches copied from pinned memory, beside whatever the GPU still computes."""
    card, visual, textual = _torch_towers(checkpoint, precision, device)

    @torch.inference_mode()
    def run(tower: torch.nn.Module, batch: NDArray[Any]) -> NDArray[np.float32]:
        source = torch.from_numpy(batch).pin_memory()
        embeddings: torch.Tensor = tower(source.to(device, non_blocking=True)).float()
        target = torch.empty_like(embeddings, device="cpu", pin_memory=True)
        target.copy_(embeddings, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return target.numpy()

    class Pinned(TorchRuntime):
        def encode_image(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
            return run(visual, pixels)

        def encode_text(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
            return run(textual, tokens)

    return Pinned(card, Reloadable(visual), Reloadable(textual), device, precision)


def _padded_texts(checkpoint: Path, precision: Precision, device: str) -> Runtime:
    """The graph that computes padding too, with which nothing waits for the shapes of texts."""
    card, tensors = load_checkpoint("", checkpoint)
    with tempfile.TemporaryDirectory() as place:
        folder, files = Path(place), runtimes.find("onnx").file_names
        visual = graph.build_visual(card.config, tensors, card.image, precision=precision)
        textual = graph.build_textual(card.config, tensors, precision=precision, target="tensorrt")
        onnx_file.save(visual, folder / files["image"])
        onnx_file.save(textual, folder / files["text"])
        converted.write(folder, card, precision)
        return OnnxRuntime.load(card.name, model_path=folder, device=device)


def _io_binding(checkpoint: Path, precision: Precision, device: str) -> Runtime:
    """Batches copied into memory of the GPU that is kept for their shape."""
    from onnxruntime import OrtValue  # after clip_server, which keeps it from calling home

    class BoundGraph(Graph):
        def __init__(self, graph: Graph) -> None:
            super().__init__(graph._session, graph.origin)
            self._bindings: dict[tuple[int, ...], tuple[Any, OrtValue]] = {}

        def _run(self, feeds: Feeds, size: int) -> NDArray[np.float32]:
            ((name, batch),) = self._prepared(feeds, size).items()
            if batch.shape not in self._bindings:
                self._bindings[batch.shape] = self._bind(name, batch)
            binding, source = self._bindings[batch.shape]
            source.update_inplace(batch)
            self._session.run_with_iobinding(binding)
            output: NDArray[Any] = binding.copy_outputs_to_cpu()[0]
            return output.astype(np.float32, copy=False)

        def _bind(self, name: str, batch: NDArray[Any]) -> tuple[Any, OrtValue]:
            kind, _, index = device.partition(":")
            place = (kind, int(index or 0))
            source = OrtValue.ortvalue_from_shape_and_type(batch.shape, batch.dtype, *place)
            binding = self._session.io_binding()
            binding.bind_ortvalue_input(name, source)
            binding.bind_output(self._output, *place)
            return binding, source

    runtime = OnnxRuntime.load("", model_path=checkpoint, device=device, precision=precision)
    card = runtime.card
    with runtime.towers["image"].use() as images, runtime.towers["text"].use() as texts:
        visual = ImageGraph(BoundGraph(images._graph), card.image)
        textual = TextGraph(BoundGraph(texts._graph), card.text)
    towers = Reloadable(visual), Reloadable(textual)
    return OnnxRuntime(card, *towers, runtime.device, runtime.precision)


def _cuda_graphs(checkpoint: Path, precision: Precision, device: str) -> Runtime:
    """TensorRT-RTX's own capture of each shape's kernels in a graph, launched as one."""

    class GraphedTower(EngineTower):
        def _new_context(self) -> Any:
            config = self._engine.create_runtime_config()
            strategies = tensorrt_engines.library().CudaGraphStrategy
            config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE
            return self._engine.create_execution_context(config)

    class GraphedRuntime(TensorrtRuntime):
        @staticmethod
        def _tower(gpu: Gpu, plan: bytes, origin: str) -> EngineTower:
            return GraphedTower(gpu, plan, origin)

    return GraphedRuntime.load("", model_path=checkpoint, device=device, precision=precision)
