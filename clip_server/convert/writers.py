"""Writers of a model's towers as files that a runtime serves: ONNX graphs, TensorRT engines,
TorchScript."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from clip_server import runtimes
from clip_server.errors import ConfigurationError
from clip_server.install import IMPORT_ERRORS, import_failure
from clip_server.model_card import ModelCard, Precision
from clip_server.models import weights
from clip_server.models.converted import Tower
from clip_server.runtimes import cuda, tensorrt_engines
from clip_server.runtimes import onnx as onnx_runtime
from clip_server.runtimes import tensorrt as tensorrt_runtime
from clip_server.runtimes.samples import samples
from clip_server.towers.tower import Target

try:
    import onnx

    from clip_server.convert import rewrite
    from clip_server.towers import graph, onnx_file, registry
except IMPORT_ERRORS as error:
    raise ConfigurationError(import_failure(error, "the onnx package", "onnx")) from error

Encode: TypeAlias = Callable[[NDArray[Any]], NDArray[np.float32]]


class Writer(Protocol):
    """Writes one kind of file."""

    def write(self, tower: Tower, path: Path) -> None:
        """Writes a tower's file."""
        ...

    def open(self, path: Path) -> Encode | None:
        """Opens a tower's file as it is served; None if this machine cannot run it."""
        ...


class OnnxWriter:
    """Writes graphs, built from the weights or, for other architectures, exported from torch."""

    target: Target = "onnxruntime"

    def __init__(self, card: ModelCard, tensors: weights.Tensors, precision: Precision) -> None:
        self._card, self._tensors, self._precision = card, tensors, precision

    def write(self, tower: Tower, path: Path) -> None:
        onnx_file.save(self.model(tower), path)

    def open(self, path: Path) -> Encode | None:
        return onnx_runtime.open_tower(path)

    def model(self, tower: Tower) -> onnx.ModelProto:
        """Returns a tower's graph."""
        built = registry.builds(self._card.config)
        return self._build(tower) if built else self._export(tower)

    def _build(self, tower: Tower) -> onnx.ModelProto:
        card, tensors = self._card, self._tensors
        weights.check(tensors, registry.tensor_shapes(card.config))
        kind: Any = {"precision": self._precision, "target": self.target}
        if tower == "image":
            return graph.build_visual(card.config, tensors, card.image, **kind)
        return graph.build_textual(card.config, tensors, **kind)

    def _export(self, tower: Tower) -> onnx.ModelProto:
        modules = self._modules
        from clip_server.convert.export import export

        name = "pixels" if tower == "image" else "tokens"
        trimmed = tower == "text" and self._card.text.trim != "fixed"
        axes = ["batch", "length"] if trimmed else ["batch"]
        example = samples(self._card, tower)
        return rewrite.rewrite(export(modules[tower], name, example, axes), self._precision)

    @cached_property
    def _modules(self) -> Mapping[Tower, Any]:
        return _torch_towers(self._card, self._tensors)


class TensorrtGraphWriter(OnnxWriter):
    """Writes the same graphs, in operators that TensorRT has."""

    target = "tensorrt"

    def __init__(self, card: ModelCard, tensors: weights.Tensors, precision: Precision) -> None:
        runtimes.find("tensorrt").check_precision(precision)
        super().__init__(card, tensors, precision)


class TensorrtWriter(TensorrtGraphWriter):
    """Writes engines of these graphs, for this machine's GPU, or for any if there is none."""

    def __init__(self, card: ModelCard, tensors: weights.Tensors, precision: Precision) -> None:
        tensorrt_engines.library()
        super().__init__(card, tensors, precision)

    def write(self, tower: Tower, path: Path) -> None:
        profiles = tensorrt_engines.profiles(self._card, tower, tensorrt_runtime.BATCH)
        with onnx_file.packed(self.model(tower)) as packed:
            engine = tensorrt_engines.build(
                packed, profiles, log_progress=tensorrt_engines.progress_logger(path.name)
            )
        path.write_bytes(engine)

    def open(self, path: Path) -> Encode | None:
        return tensorrt_runtime.open_tower(path) if cuda.device_count() else None


class TorchScriptWriter:
    """Writes towers traced in torch."""

    def __init__(self, card: ModelCard, tensors: weights.Tensors, precision: Precision) -> None:
        self._card = card
        self._modules = _torch_towers(card, tensors, precision)

    def write(self, tower: Tower, path: Path) -> None:
        from clip_server.runtimes import torch as torch_runtime

        example = samples(self._card, tower)
        torch_runtime.save_traced(self._modules[tower], example, path)

    def open(self, path: Path) -> Encode | None:
        from clip_server.runtimes import torch as torch_runtime

        return torch_runtime.open_tower(path)


_WRITERS: Mapping[str, Callable[[ModelCard, weights.Tensors, Precision], Writer]] = {
    "onnx": OnnxWriter,
    "tensorrt": TensorrtWriter,
    "torchscript": TorchScriptWriter,
}


def writer(to: str, card: ModelCard, tensors: weights.Tensors, precision: Precision) -> Writer:
    """The writer for `onnx`, `tensorrt` or `torchscript`.

    Raises:
        ConfigurationError: its runtime lacks this precision, or is not installed.
    """
    if to == "torchscript" and precision == "int8":
        raise ConfigurationError("TorchScript has no int8: convert --to onnx")
    runtimes.of_files(to).check_precision(precision)
    return _WRITERS[to](card, tensors, precision)


def _torch_towers(
    card: ModelCard, tensors: weights.Tensors, precision: Precision = "fp32"
) -> Mapping[Tower, Any]:
    from clip_server.runtimes import torch as torch_runtime

    visual, textual = torch_runtime.towers(card, tensors, precision)
    return {"image": visual, "text": textual}
