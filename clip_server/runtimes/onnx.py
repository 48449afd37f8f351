"""onnxruntime, on the CPU or a CUDA GPU. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_server import runtimes
from clip_server.errors import ConfigurationError
from clip_server.model_card import ModelCard
from clip_server.models import converted
from clip_server.models.converted import Tower
from clip_server.runtimes.onnx_graph import ImageGraph, TextGraph
from clip_server.runtimes.onnx_sessions import Sessions
from clip_server.runtimes.reloading import Reloadable


class OnnxRuntime:
    """CLIP's two towers as onnxruntime sessions; see `Runtime` for the methods."""

    spec = runtimes.find("onnx")
    name = spec.name
    overlaps = False

    def __init__(
        self,
        card: ModelCard,
        visual: Reloadable[ImageGraph],
        textual: Reloadable[TextGraph],
        device: str,
        precision: str,
    ) -> None:
        with visual.use() as images, textual.use() as texts:
            self.card = replace(card, image=images.image, text=texts.text)
        self.device, self.precision = device, precision
        self.concurrent = device == "cpu"
        self.towers: dict[Tower, Reloadable[Any]] = {"image": visual, "text": textual}
        self._visual, self._textual = visual, textual

    @classmethod
    def load(
        cls,
        name: str,
        *,
        model_path: str | Path | None = None,
        device: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
    ) -> OnnxRuntime:
        """Loads a model and opens its sessions.

        name: a canonical name or an alias.
        model_path: a checkpoint as in `weights.find`, or a folder with `visual.onnx` and
            `textual.onnx`, whose card is in its `card.json`, or else that of `name`; or a folder
            that others exported (see `models.exported`). Sizes are then those of the graphs.
        device: `cpu`, `cuda` or `cuda:1`; by default CUDA where it works, else the CPU.
        precision: that the graphs of a checkpoint are built in: `fp32`, the default; on a GPU
            `fp16`; on the CPU `int8`: linear layers in integers (see `towers.quantize`).
            Graphs in a folder have theirs.
        threads: cores that one call may use; by default all that this process may run on.

        Raises:
            ConfigurationError: the extra, the device, the precision or the model is unavailable.
        """
        from clip_server.runtimes.onnx_towers import CheckpointTowers, FolderTowers, Towers

        towers: Towers
        served: str
        if own := cls.spec.own_towers(name, model_path, precision):
            described = converted.read(own.folder)
            if described:
                converted.check_precision(own.folder, precision)
            sessions = Sessions(device, threads, described.precision if described else "fp32")
            towers = FolderTowers(name, model_path, own, sessions)
        else:
            served = built_in = cls.spec.check_precision(precision)
            sessions = Sessions(device, threads, built_in)
            if built_in == "fp16" and sessions.device == "cpu":
                # CPUs convert every fp16 product to fp32 and back: slower, and less exact.
                raise ConfigurationError("dtype 'fp16' needs a GPU: on a CPU use fp32 or int8")
            towers = CheckpointTowers(name, model_path, built_in, sessions)
        towers.check_memory()
        image, text = towers.open_images(), towers.open_texts()
        if own:
            found = own.precision or ("fp16" if image.is_half else "fp32")
            served = converted.check_precision(own.folder, precision, found)
        return cls(
            towers.card,
            Reloadable(image, towers.open_images, towers.files),
            Reloadable(text, towers.open_texts, towers.files),
            sessions.device,
            served,
        )

    def encode_image(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[B, 3, S, S] RGB pixels, 0..255, to [B, D] embeddings (not normalised)."""
        with self._visual.use() as tower:
            return tower.encode(pixels)

    def encode_text(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """[B, L] token ids, L at most the context length, to [B, D] (not normalised)."""
        # Sorted, so that neighbours have the longest common prefixes: see `layout.of_texts`.
        order = np.lexsort(tokens.T[::-1])
        with self._textual.use() as tower:
            embeddings = tower.encode(tokens[order])
        return embeddings[np.argsort(order)]


def open_tower(
    path: Path, *, device: str = "cpu", threads: int | None = None
) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
    """One tower by itself: a graph in a file, as pixels or tokens to embeddings [B, D].

    Raises:
        ConfigurationError: the extra is not installed, or the file is not a tower.
    """
    graph = Sessions(device, threads).open(path, str(path))
    (name,) = graph.inputs
    return lambda batch: graph.run({name: batch})
