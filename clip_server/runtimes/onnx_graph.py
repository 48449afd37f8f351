"""Adapts ONNX graphs of any exporter to towers: pixels or tokens in, embeddings out.

Our own graphs have one input, of uint8 pixels or int32 tokens, and one output. Those of
clip-as-service, transformers or torch may need normalised pixels in float32 or float16, an
attention mask in addition to the tokens, or batches and texts of a fixed size, and may have several
outputs. Inputs and outputs are identified by name, dtype and shape.

A graph of unknown origin is tried when it is loaded, because declarations are not reliable: this
finds the output with the embeddings, and shows whether batches and texts may have any size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_server.errors import ConfigurationError
from clip_server.model_card import ImageSpec, ModelCard, TextSpec
from clip_server.runtimes.loading import normalized
from clip_server.runtimes.onnx_tables import Table
from clip_server.runtimes.protocol import OutOfMemoryError
from clip_server.runtimes.samples import samples

_DTYPES = {
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
}
# Of an image: red, green and blue.
_CHANNELS = 3
# Endings of the names of outputs with embeddings, the most specific first, such as transformers'
# text_embeds. Its pooler_output is not projected by CLIP, so that is the last resort.
_EMBEDDINGS = ("embeds", "embedding", "embeddings", "features")
_POOLED = "pooler_output"
# The largest difference, as a share of the largest value, that rounding makes between the same
# texts with and without padding.
_ROUNDING = 1e-4

# In the messages of onnxruntime's arena and of CUDA.
_OUT_OF_MEMORY = ("Failed to allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# Images that a CPU computes at once: more take more memory for their activations, and no less of
# its time.
_IMAGES_AT_ONCE = 4

Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class _Input:
    """An input of a graph. shape: None for an axis of any length."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        axes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name} {self.dtype} [{axes}]"


class Graph:
    """A session with numpy arrays as inputs and output.

    origin: its file, or the model that it was built from, for people.
    options: onnxruntime's, of each run.
    tables: that it reads, whose rows are loaded before they are used.
    inputs: by name. batch: the only batch size that it accepts; None if it accepts any.
    on_cpu: whether the CPU computes it.
    """

    def __init__(
        self, session: Any, origin: str, options: Any, tables: Sequence[Table] = ()
    ) -> None:
        self.origin, self._options, self._tables = origin, options, tables
        self.inputs = {each.name: each for each in self._read_inputs(session)}
        first = next(iter(self.inputs.values()), None)
        self.batch = first.shape[0] if first and first.shape else None
        self.on_cpu = session.get_providers()[0] == "CPUExecutionProvider"
        self._session = session
        self._outputs = [each.name for each in session.get_outputs()]
        self._output = self._outputs[0]

    def _read_inputs(self, session: Any) -> Iterable[_Input]:
        for each in session.get_inputs():
            if each.type not in _DTYPES:
                raise self.refusal(f"an input {each.name} of {each.type}", "tensors of numbers")
            shape = (size if isinstance(size, int) else None for size in each.shape)
            yield _Input(each.name, np.dtype(_DTYPES[each.type]), tuple(shape))

    def refusal(self, found: str, expected: str) -> ConfigurationError:
        """The error for a graph that cannot be served."""
        return ConfigurationError(f"{self.origin} has {found}; expected {expected}")

    def describe_inputs(self) -> str:
        """Its inputs, for people."""
        return f"the inputs {', '.join(map(str, self.inputs.values())) or 'none'}"

    def run(self, feeds: Feeds) -> NDArray[np.float32]:
        """Computes embeddings [B, D] from inputs [B, ...] by name, converted to their dtypes."""
        count = len(next(iter(feeds.values())))
        size = self.batch or count
        parts = [
            self._run({name: values[first : first + size] for name, values in feeds.items()}, size)
            for first in range(0, count, size)
        ]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts))[:count]

    def _run(self, feeds: Feeds, size: int) -> NDArray[np.float32]:
        prepared = self._prepared(feeds, size)
        try:
            (output,) = self._compute([self._output], prepared)
        except Exception as error:  # onnxruntime's errors have no class of their own
            if any(sign in str(error) for sign in _OUT_OF_MEMORY):
                raise OutOfMemoryError(str(error)) from None
            raise
        embeddings: NDArray[np.float32] = output.astype(np.float32, copy=False)
        return embeddings

    def _compute(self, outputs: Sequence[str], feeds: Feeds) -> list[NDArray[Any]]:
        for table in self._tables:
            table.load(feeds[table.indices])
        computed: list[NDArray[Any]] = self._session.run(outputs, feeds, self._options)
        return computed

    def _prepared(self, feeds: Feeds, size: int) -> dict[str, NDArray[Any]]:
        """Converts values to the inputs' dtypes, and pads a batch with copies of its last item."""
        return {
            name: np.ascontiguousarray(_filled(values, size), dtype=self.inputs[name].dtype)
            for name, values in feeds.items()
        }

    def try_out(self, feeds: Feeds, dim: int) -> None:
        """Computes a batch to find the output with the embeddings, and the size of batches.

        dim: of the embeddings, if names are ambiguous.

        Raises:
            ConfigurationError: it cannot compute the batch, or no output is [B, D].
        """
        sizes = [self.batch] if self.batch else [len(next(iter(feeds.values()))), 1]
        failure = ""
        for size in sizes:
            prepared = self._prepared({name: each[:size] for name, each in feeds.items()}, size)
            try:
                outputs = self._compute(self._outputs, prepared)
            except Exception as error:  # onnxruntime's errors have no class of their own
                failure = failure or " ".join(str(error).split())
                continue
            shapes = dict(zip(self._outputs, map(np.shape, outputs), strict=True))
            if name := _find_embeddings(shapes, size, dim):
                self._output = name
                self.batch = self.batch or (1 if size == 1 else None)
                return
            listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            failure = failure or f"for a batch of {size} its outputs are {listed}"
        shapes_fed = ", ".join(f"{name} {list(each.shape)}" for name, each in feeds.items())
        raise ConfigurationError(
            f"{self.origin} does not turn {shapes_fed} into embeddings [B, D] (of several outputs, "
            f"name that one image_embeds or text_embeds): {failure}"
        )


class ImageGraph:
    """An image tower. image: the preprocessing that it needs."""

    def __init__(self, graph: Graph, image: ImageSpec) -> None:
        (pixels, *others) = graph.inputs.values() or [None]
        if pixels is None or others or not _takes_pixels(pixels):
            raise graph.refusal(
                graph.describe_inputs(),
                "a single input of pixels [B, 3, S, S] or [B, S, S, 3], uint8 or float",
            )
        self._channels_last = _are_channels_last(pixels.shape)
        side = next(filter(None, _sides(pixels.shape)), image.size)
        self.image = replace(image, size=side)
        self._graph, self._pixels = graph, pixels

    def try_out(self, card: ModelCard) -> NDArray[np.float32]:
        """Tries the graph on samples; returns embeddings of some of them.

        Raises:
            ConfigurationError: as `Graph.try_out`.
        """
        pixels = samples(replace(card, image=self.image), "image")[:2]
        self._graph.try_out(self._feeds(pixels), card.dim)
        return self.encode(pixels[:1])

    @property
    def is_half(self) -> bool:
        """Whether its input is float16."""
        return self._pixels.dtype == np.float16

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[B, 3, S, S] RGB pixels, 0..255, to [B, D] embeddings."""
        whole = self._graph.batch is not None or not self._graph.on_cpu
        parts = 1 if whole else math.ceil(len(pixels) / _IMAGES_AT_ONCE)
        split = np.array_split(pixels, max(1, parts))
        return np.concatenate([self._graph.run(self._feeds(part)) for part in split])

    def _feeds(self, pixels: NDArray[np.uint8]) -> Feeds:
        ready = pixels if self._pixels.dtype == np.uint8 else normalized(pixels, self.image)
        ready = ready.transpose(0, 2, 3, 1) if self._channels_last else ready
        return {self._pixels.name: ready}


class TextGraph:
    """A text tower. text: the tokens that it needs."""

    def __init__(self, graph: Graph, text: TextSpec) -> None:
        roles = {name: _role(each) for name, each in graph.inputs.items()}
        tokens = [name for name, role in roles.items() if role == "tokens"]
        if len(tokens) != 1 or "unknown" in roles.values():
            raise graph.refusal(
                graph.describe_inputs(),
                "an input of integer tokens [B, L], and optionally attention_mask, "
                "token_type_ids and position_ids",
            )
        self._length = graph.inputs[tokens[0]].shape[1]
        self.text = replace(text, context_length=self._length or text.context_length)
        self._graph, self._roles = graph, roles

    def try_out(self, card: ModelCard) -> NDArray[np.float32]:
        """Tries the graph on samples; returns embeddings of some of them.

        Raises:
            ConfigurationError: as `Graph.try_out`.
        """
        texts = samples(replace(card, text=self.text), "text")
        self._graph.try_out(self._feeds(texts[-2:]), card.dim)
        short = texts[:2]
        padded = self._graph.run(self._feeds(short))
        if self._length is None and not self._may_be_trimmed(short, padded):
            self._length = self.text.context_length
        return padded

    def _may_be_trimmed(self, texts: NDArray[np.int32], padded: NDArray[np.float32]) -> bool:
        """Whether texts have the same embeddings without their padding."""
        if self.text.trim == "fixed":
            return False
        longest = int((texts != self.text.pad_id).sum(axis=1).max())
        try:
            trimmed = self._graph.run(self._feeds(texts[:, :longest]))
        except Exception:  # onnxruntime's errors have no class of their own
            return False
        return bool(np.abs(trimmed - padded).max() <= _ROUNDING * np.abs(padded).max())

    def encode(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """[B, L] token ids, L at most the context length, to [B, D] embeddings."""
        if self._length is not None:
            missing = self._length - tokens.shape[1]
            tokens = np.pad(tokens, ((0, 0), (0, missing)), constant_values=self.text.pad_id)
        return self._graph.run(self._feeds(tokens))

    def _feeds(self, tokens: NDArray[np.int32]) -> Feeds:
        return {name: _values(role, tokens, self.text) for name, role in self._roles.items()}


def _takes_pixels(each: _Input) -> bool:
    if len(each.shape) != 4 or not {_CHANNELS, None} & {each.shape[1], each.shape[3]}:
        return False
    height, width = _sides(each.shape)
    square = None in (height, width) or height == width
    return square and (each.dtype == np.uint8 or np.issubdtype(each.dtype, np.floating))


def _sides(shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """Height and width of images, whose channels come first or last."""
    return shape[1:3] if _are_channels_last(shape) else shape[2:4]


def _are_channels_last(shape: tuple[int | None, ...]) -> bool:
    return shape[3] == _CHANNELS and shape[1] != _CHANNELS


def _role(each: _Input) -> str:
    """The role of a text tower's input: `tokens`, `mask`, `types`, `positions` or `unknown`."""
    if len(each.shape) != 2:
        return "unknown"
    if "mask" in each.name:
        return "mask"
    if each.dtype not in (np.int32, np.int64):
        return "unknown"
    if "type" in each.name or "segment" in each.name:
        return "types"
    return "positions" if "position" in each.name else "tokens"


def _values(role: str, tokens: NDArray[np.int32], text: TextSpec) -> NDArray[Any]:
    """The values [B, L] of an input with a role."""
    if role == "mask":
        return _attention_mask(tokens, text)
    if role == "types":
        return np.zeros_like(tokens)
    return tokens if role == "tokens" else np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)


def _attention_mask(tokens: NDArray[np.int32], text: TextSpec) -> NDArray[np.bool_]:
    """Whether each position [B, L] is a token of the text, not padding."""
    if text.trim == "fixed":
        return np.ones(tokens.shape, np.bool_)
    if text.trim == "masked":
        mask: NDArray[np.bool_] = tokens != text.pad_id
    else:
        # Up to CLIP's end token, the largest id; its padding cannot be told from a word.
        mask = np.arange(tokens.shape[1]) <= tokens.argmax(axis=1, keepdims=True)
    return mask


def _find_embeddings(shapes: Mapping[str, Sequence[int]], count: int, dim: int) -> str | None:
    """The output with the embeddings of `count` items; None if none is, or several may be.

    dim: of the embeddings, if names are ambiguous.
    """
    fit = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == count]
    if len(fit) == 1:
        return fit[0]
    named = (name for ending in _EMBEDDINGS for name in fit if name.endswith(ending))
    sized = [name for name in fit if shapes[name][1] == dim]
    alone = sized[0] if len(sized) == 1 else None
    return next(named, alone) or (_POOLED if _POOLED in fit else None)


def _filled(values: NDArray[Any], size: int) -> NDArray[Any]:
    missing = size - len(values)
    return values if missing <= 0 else np.concatenate([values, np.repeat(values[-1:], missing, 0)])
