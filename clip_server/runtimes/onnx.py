"""onnxruntime, on the CPU or a CUDA GPU. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_server import runtimes
from clip_server.errors import ConfigurationError
from clip_server.install import install_hint
from clip_server.model_card import ModelCard, Precision
from clip_server.models import converted, weights, zoo
from clip_server.models.converted import TOWERS, Tower
from clip_server.runtimes import cuda
from clip_server.runtimes.loading import load_checkpoint
from clip_server.runtimes.onnx_graph import Graph, ImageGraph, TextGraph

_EXTRA = f"the ONNX runtime is not installed: {install_hint('onnx')}"
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# onnxruntime's level of logging: errors reach us as exceptions.
_LOG_FATAL = 4


class OnnxRuntime:
    """CLIP's two towers as onnxruntime sessions; see `Runtime` for the methods."""

    spec = runtimes.find("onnx")
    name = spec.name
    overlaps = False

    def __init__(
        self, card: ModelCard, visual: ImageGraph, textual: TextGraph, device: str, precision: str
    ) -> None:
        self.card = replace(card, image=visual.image, text=textual.text)
        self.device, self.precision = device, precision
        self.concurrent = device == "cpu"
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
            `textual.onnx`, whose card is in its `card.json`, or else that of `name`; sizes are
            then those of the graphs.
        device: `cpu`, `cuda` or `cuda:1`; by default CUDA where it works, else the CPU.
        precision: that the graphs of a checkpoint are built in: `fp32`, the default; on a GPU
            `fp16`; on the CPU `int8`: linear layers in integers (see `towers.quantize`).
            Graphs in a folder have theirs.
        threads: cores that one call may use; by default all that this process may run on.

        Raises:
            ConfigurationError: the extra, the device, the precision or the model is unavailable.
        """
        folder = zoo.own_path(name, model_path)
        if folder is not None and (files := cls.spec.find_towers(folder)):
            card = zoo.resolve(name, model_path)
            return cls._load_graphs(card, folder, files, device, precision, threads)
        built_in = cls.spec.check_precision(precision)
        sessions = _Sessions(device, threads, built_in)
        if built_in == "fp16" and sessions.device == "cpu":
            # CPUs convert every fp16 product to fp32 and back: slower, and less exact.
            raise ConfigurationError("dtype 'fp16' needs a GPU: on a CPU use fp32 or int8")
        card, graphs = _built(name, model_path, built_in)
        visual, textual = map(partial(sessions.open, origin=f"a graph of {card.name}"), graphs)
        image, text = ImageGraph(visual, card.image), TextGraph(textual, card.text)
        return cls(card, image, text, sessions.device, built_in)

    @classmethod
    def _load_graphs(
        cls,
        card: ModelCard,
        folder: Path,
        files: Mapping[Tower, Path],
        device: str | None,
        precision: str | None,
        threads: int | None,
    ) -> OnnxRuntime:
        """A folder's graphs: ours, which its `card.json` describes, or anyone's."""
        described = converted.read(folder)
        if described is not None:
            converted.check_precision(folder, precision)
        sessions = _Sessions(device, threads, described.precision if described else "fp32")
        image, text = (sessions.open(files[tower], str(files[tower])) for tower in TOWERS)
        visual, textual = ImageGraph(image, card.image), TextGraph(text, card.text)
        if described is not None:
            return cls(card, visual, textual, sessions.device, described.precision)
        found = "fp16" if visual.is_half else "fp32"
        converted.check_precision(folder, precision, found)
        card = replace(card, dim=_tried_out(visual, textual, card))
        return cls(card, visual, textual, sessions.device, found)

    def encode_image(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[B, 3, S, S] RGB pixels, 0..255, to [B, D] embeddings (not normalised)."""
        return self._visual.encode(pixels)

    def encode_text(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """[B, L] token ids, L at most the context length, to [B, D] (not normalised)."""
        # Sorted, so that neighbours have the longest common prefixes: see `layout.of_texts`.
        order = np.lexsort(tokens.T[::-1])
        embeddings = self._textual.encode(tokens[order])
        return embeddings[np.argsort(order)]


def open_tower(
    path: Path, *, device: str = "cpu", threads: int | None = None
) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
    """One tower by itself: a graph in a file, as pixels or tokens to embeddings [B, D].

    Raises:
        ConfigurationError: the extra is not installed, or the file is not a tower.
    """
    graph = _Sessions(device, threads).open(path, str(path))
    (name,) = graph.inputs
    return lambda batch: graph.run({name: batch})


def _tried_out(visual: ImageGraph, textual: TextGraph, card: ModelCard) -> int:
    """The dimensions of both towers' embeddings, after a trial.

    Raises:
        ConfigurationError: a graph is not a tower, or the two are of different models.
    """
    image, text = visual.try_out(card), textual.try_out(card)
    if image != text:
        raise ConfigurationError(
            f"visual.onnx has embeddings of {image} dimensions and textual.onnx of {text}: "
            "they are of different models"
        )
    return image


def _built(
    name: str, model_path: str | Path | None, precision: Precision
) -> tuple[ModelCard, Iterator[Path | bytes]]:
    """The card of a checkpoint, and the image and the text tower."""
    try:
        from clip_server.towers import graph, onnx_file, registry
    except ImportError as error:
        raise ConfigurationError(_EXTRA) from error

    card, tensors = load_checkpoint(name, model_path)
    weights.check(tensors, registry.tensor_shapes(card.config))

    def graphs() -> Iterator[Path | bytes]:
        """Builds each graph when it is needed: with its weights in it, it is large."""
        for build in (
            partial(graph.build_visual, card.config, tensors, card.image),
            partial(graph.build_textual, card.config, tensors),
        ):
            with onnx_file.packed(build(precision=precision)) as packed:
                yield packed
            del packed  # or it would be in memory together with the next one

    return card, graphs()


class _Sessions:
    """Opens sessions on one device, with no fallback to another."""

    def __init__(self, device: str | None, threads: int | None, precision: str = "fp32") -> None:
        device = _device_for_int8(device) if precision == "int8" else device
        self._ort = _onnxruntime()
        self._threads = threads or _cores()
        self.device = _device(self._ort, device)

    def open(self, graph: Path | bytes, origin: str) -> Graph:
        """A session of a graph in a file or in memory. origin: as in `Graph`."""
        model = str(graph) if isinstance(graph, Path) else graph
        kind, _, index = self.device.partition(":")
        provider = _PROVIDERS[kind]
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _LOG_FATAL
        # Threads that spin while waiting would compete with preprocessing for cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        settings = {"device_id": index} if index else {}
        try:
            session = self._ort.InferenceSession(model, options, [(provider, settings)])
        except Exception as error:  # onnxruntime's errors have no class of their own
            raise ConfigurationError(
                f"onnxruntime cannot load the model, {origin}: {error}"
            ) from error
        if provider not in session.get_providers():
            raise ConfigurationError(
                f"onnxruntime could not start {provider}: check that the CUDA and cuDNN "
                "libraries it was built for are installed"
            )
        # Or onnxruntime would keep the graph and its weights for a retry on another provider.
        session._model_bytes = None
        return Graph(session, origin)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigurationError(_EXTRA) from error
    # For programs that imported it before this package set the environment variable.
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def _device(ort: Any, wanted: str | None) -> str:
    """The device to use, as `cpu` or `cuda:0`."""
    kind, _, index = (wanted or "cuda").partition(":")
    if kind not in _PROVIDERS or (index and not index.isdigit()):
        raise ConfigurationError(f"device {wanted!r} is not cpu, cuda or cuda:N")
    if kind == "cpu":
        return "cpu"
    problem = _cuda_problem(ort, int(index or 0))
    if problem and wanted is not None:
        raise ConfigurationError(f"device {wanted!r} cannot be used: {problem}")
    return "cpu" if problem else f"cuda:{index or 0}"


def _device_for_int8(wanted: str | None) -> str:
    """The CPU, the only device with integer products."""
    if wanted not in (None, "cpu"):
        raise ConfigurationError(f"dtype 'int8' runs on the CPU, not on device {wanted!r}")
    return "cpu"


def _cuda_problem(ort: Any, index: int) -> str | None:
    """The reason why CUDA device `index` cannot be used, for people; None if it can."""
    available = ort.get_available_providers()
    if _PROVIDERS["cuda"] not in available:
        return (
            f"the onnxruntime installed here has only {', '.join(available)}; "
            f"pip uninstall onnxruntime, then {install_hint('onnx-gpu')}"
        )
    count = cuda.device_count()
    if count <= index:
        return f"{count} NVIDIA GPUs are visible"
    ort.preload_dlls()  # CUDA's libraries may be Python packages, outside the search path
    return None


def _cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
