"""TensorRT, on an NVIDIA GPU. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_server import runtimes
from clip_server.errors import ConfigurationError
from clip_server.install import IMPORT_ERRORS, import_failure
from clip_server.model_card import ModelCard, Precision
from clip_server.models import converted, weights, zoo
from clip_server.models.converted import TOWERS, Tower
from clip_server.runtimes import tensorrt_engines
from clip_server.runtimes.cuda import Buffer, Gpu
from clip_server.runtimes.loading import load_checkpoint, normalized
from clip_server.runtimes.protocol import OutOfMemoryError
from clip_server.runtimes.reloading import Reloadable
from clip_server.runtimes.tensorrt_engines import Profile, Shape

# The largest batch that engines are built for, unless another is asked for.
BATCH = 32
# Lengths of texts are rounded up to a multiple of this: each new shape costs an engine time, and
# GPUs multiply matrices of such sizes fastest.
_LENGTH_STEP = 8


class TensorrtRuntime:
    """CLIP's two towers as TensorRT engines; see `Runtime` for the methods."""

    spec = runtimes.find("tensorrt")
    name = spec.name
    concurrent = True
    # Each thread has a stream of its own.
    overlaps = True

    def __init__(
        self,
        card: ModelCard,
        visual: Reloadable[EngineTower],
        textual: Reloadable[EngineTower],
        device: str,
        precision: str,
    ) -> None:
        self.card, self.device, self.precision = card, device, precision
        self.towers: dict[Tower, Reloadable[EngineTower]] = {"image": visual, "text": textual}
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
        minibatch_size: int = BATCH,
    ) -> TensorrtRuntime:
        """Loads a model's engines; builds those that are not cached, which takes minutes once.

        name: a canonical name or an alias.
        model_path: a checkpoint as in `weights.find`, or a folder with engines: `visual.trt` and
            `textual.trt`, or `.engine`, whose card is in its `card.json` or else that of `name`.
        device: `cuda` or `cuda:1`.
        precision: that the engines of a checkpoint compute in: `fp16`, the default, or `fp32`.
        threads: cores that building may use.
        minibatch_size: the largest batch that engines are built for; those in a folder have theirs.

        Raises:
            ConfigurationError: the extra, the device, the precision or the model is unavailable.
        """
        tensorrt_engines.library()
        gpu = Gpu(_index(device))
        if own := cls.spec.own_towers(name, model_path):
            precision = converted.check_precision(own.folder, precision)
            card = zoo.resolve(name, model_path)
            sources: dict[Tower, Sequence[Path]] = {
                tower: [file] for tower, file in own.files.items()
            }
            plan_of = partial(_read, own.files)
        else:
            precision = built_in = cls.spec.check_precision(precision)
            card, tensors = _checkpoint(name, model_path)
            sources = dict.fromkeys(TOWERS, tensors.files)
            options = {"batch": minibatch_size, "threads": threads}
            plan_of = partial(_built, card, tensors, built_in, gpu, options)

        def load_tower(tower: Tower) -> EngineTower:
            return cls._tower(gpu, *plan_of(tower))

        visual, textual = (
            Reloadable(load_tower(tower), partial(load_tower, tower), sources[tower], gpu.active)
            for tower in TOWERS
        )
        return cls(card, visual, textual, gpu.device, precision)

    @staticmethod
    def _tower(gpu: Gpu, plan: bytes, origin: str) -> EngineTower:
        return EngineTower(gpu, plan, origin)

    def encode_image(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[B, 3, S, S] RGB pixels, 0..255, to [B, D] embeddings (not normalised)."""
        with self._visual.use() as tower:
            takes_pixels = tower.dtype == np.uint8
            return tower.run(pixels if takes_pixels else normalized(pixels, self.card.image))

    def encode_text(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """[B, L] token ids, L at most the context length, to [B, D] (not normalised)."""
        text = self.card.text
        missing = min(-tokens.shape[1] % _LENGTH_STEP, text.context_length - tokens.shape[1])
        with self._textual.use() as tower:
            missing = max(missing, tower.least[1] - tokens.shape[1])
            padded = np.pad(tokens, ((0, 0), (0, missing)), constant_values=text.pad_id)
            return tower.run(padded)


def open_tower(path: Path) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
    """One tower by itself: an engine in a file, as pixels or tokens to embeddings [B, D].

    Raises:
        ConfigurationError: the extra or a GPU is missing, or the file is not an engine for it.
    """
    return EngineTower(Gpu(), path.read_bytes(), str(path)).run


class EngineTower:
    """An engine with one input and one output, fed and read as numpy arrays. Thread-safe.

    plan: the serialized engine. origin: its file, or what it was built from, for people.
    dtype: of the input. least: the smallest batch of the smallest items that it accepts.
    """

    def __init__(self, gpu: Gpu, plan: bytes, origin: str) -> None:
        trt = tensorrt_engines.library()
        self._gpu = gpu
        with gpu.active():
            self._engine = engine = tensorrt_engines.load(plan, origin)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        if len(inputs) != 1 or len(names) != 2:
            raise ConfigurationError(
                f"{origin}: expected one input and one output, not {', '.join(names)}"
            )
        self._input, (self._output,) = inputs[0], [name for name in names if name != inputs[0]]
        self.dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(self._input)))
        self._output_dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(self._output)))
        self._profiles = tensorrt_engines.profiles_of(engine, self._input)
        self.least = min((profile.least for profile in self._profiles), key=math.prod)
        self._most = max(profile.most[0] for profile in self._profiles)
        self._idle: list[_ExecutionSlot] = []

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """A batch of any size, converted to the input's dtype, to embeddings [B, D].

        Raises:
            OutOfMemoryError: the GPU has no memory for this batch; a smaller one may fit.
        """
        parts = [batch[first : first + self._most] for first in range(0, len(batch), self._most)]
        return np.concatenate([self._run(part) for part in parts])

    def _run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        index = fitting(self._profiles, batch.shape)
        least = self._profiles[index].least
        with self._gpu.active():
            # There are as many slots as threads have ever called concurrently.
            slot = self._idle.pop() if self._idle else self._new_slot()
            try:
                return slot.run(index, batch, max(len(batch), least[0]))
            finally:
                # Whatever came of it: memory cannot be freed where no context is active.
                self._idle.append(slot)

    def _new_context(self) -> Any:
        return self._engine.create_execution_context()

    def _new_slot(self) -> _ExecutionSlot:
        context = self._new_context()
        if context is None:
            raise OutOfMemoryError("no memory for an execution context")
        return _ExecutionSlot(
            self._gpu.driver,
            context,
            (self._input, self.dtype),
            (self._output, self._output_dtype),
        )


class _ExecutionSlot:
    """A stream, an execution context and buffers: one batch at a time needs them for itself.

    source, target: the name and dtype of the input and of the output.
    """

    def __init__(
        self,
        driver: Any,
        context: Any,
        source: tuple[str, np.dtype[Any]],
        target: tuple[str, np.dtype[Any]],
    ) -> None:
        self._context, self._stream = context, driver.new_stream()
        (self._source, source_dtype), (self._target, target_dtype) = source, target
        self._fed = Buffer(driver, self._stream, source_dtype)
        self._read = Buffer(driver, self._stream, target_dtype)
        self._profile = 0

    def run(self, profile: int, batch: NDArray[Any], size: int) -> NDArray[np.float32]:
        """The embeddings of a batch, computed as one of `size` items."""
        context, stream = self._context, self._stream
        if profile != self._profile:
            context.set_optimization_profile_async(profile, stream.handle)
            self._profile = profile
        shape = (size, *batch.shape[1:])
        fed = self._fed.reserve(shape)
        fed[: len(batch)] = batch
        fed[len(batch) :] = 0
        tensorrt_engines.take_errors()
        if not context.set_input_shape(self._source, shape):
            raise RuntimeError(f"the engine accepts no batch of shape {shape}")
        read = self._read.reserve(tuple(context.get_tensor_shape(self._target)))
        context.set_tensor_address(self._source, self._fed.address)
        context.set_tensor_address(self._target, self._read.address)
        self._fed.upload(fed)
        if not context.execute_async_v3(stream.handle):
            reason = tensorrt_engines.take_errors() or "TensorRT could not compute the batch"
            raise OutOfMemoryError(reason) if "memory" in reason else RuntimeError(reason)
        self._read.download(read)
        stream.synchronize()
        return read[: len(batch)].astype(np.float32)


def _index(device: str | None) -> int:
    """The number of a GPU."""
    kind, _, index = (device or "cuda").partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise ConfigurationError(f"device {device!r} is not cuda or cuda:N, which TensorRT needs")
    return int(index or 0)


def fitting(profiles: Sequence[Profile], shape: Shape) -> int:
    """The profile for a batch: of those that accept it, the one for the smallest batches.

    Raises:
        ValueError: there is none.
    """
    fit = [index for index, profile in enumerate(profiles) if profile.takes(shape)]
    if not fit:
        raise ValueError(f"the engine accepts no batch of shape {shape}")
    return min(fit, key=lambda index: math.prod(profiles[index].best))


def _checkpoint(
    name: str, model_path: str | Path | None
) -> tuple[ModelCard, weights.CheckpointTensors]:
    """The card of a checkpoint, and its tensors, which have the shapes that the card says."""
    try:
        from clip_server.towers import registry
    except IMPORT_ERRORS as error:
        raise ConfigurationError(import_failure(error, "the onnx package", "tensorrt")) from error

    card, tensors = load_checkpoint(name, model_path)
    weights.check(tensors, registry.tensor_shapes(card.config))
    return card, tensors


def _read(files: Mapping[Tower, Path], tower: Tower) -> tuple[bytes, str]:
    """The engine in a file, and its origin."""
    return files[tower].read_bytes(), str(files[tower])


def _built(
    card: ModelCard,
    tensors: weights.CheckpointTensors,
    precision: Precision,
    gpu: Gpu,
    options: Mapping[str, Any],
    tower: Tower,
) -> tuple[bytes, str]:
    """The engine of a checkpoint's tower, from the cache or newly built, and its origin.

    options: of `tensorrt_engines.engine_of`.
    """
    from clip_server.towers import graph

    kind: Any = {"precision": precision, "target": "tensorrt"}
    if tower == "image":
        model = graph.build_visual(card.config, tensors, card.image, **kind)
    else:
        model = graph.build_textual(card.config, tensors, **kind)
    with gpu.active():  # kernels are chosen by timing them on it
        plan = tensorrt_engines.engine_of(model, card, tower, precision, gpu.name, **options)
    return plan, f"the {tower} engine of {card.name}"
