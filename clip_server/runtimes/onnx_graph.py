"""A tower in an ONNX graph, whoever exported it.

Our own graphs take uint8 pixels or int32 tokens and have one output. Those that clip-as-service,
transformers or torch export may take normalised pixels in float32 or float16, an attention mask
beside the tokens, batches or texts of one size only, and may have several outputs. The role of
each input and output follows from its name, type and shape.

A graph of unknown origin is tried out when it is loaded, since neither a declared shape nor a name
is proof: that finds its embeddings, and whether batches and texts may really have any size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_server.errors import ConfigurationError
from clip_server.model_card import ImageSpec, ModelCard, TextSpec
from clip_server.runtimes.loading import normalized
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
# How the names of outputs with embeddings end, such as transformers' text_embeds, the likeliest
# first; its pooler_output is not projected.
_EMBEDDINGS = ("embeds", "embedding", "embeddings", "features")
_POOLED = "pooler_output"
# The largest difference, as a share of the largest value, between the same texts padded in two
# ways where padding changes nothing.
_ROUNDING = 1e-4

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
    """A session that is fed and read as numpy arrays.

    origin: its file, or what it was built from, for people.
    inputs: by their names. batch: the only size of a batch that it takes; None if it takes any.
    """

    def __init__(self, session: Any, origin: str) -> None:
        self.origin = origin
        self.inputs = {each.name: each for each in self._read_inputs(session)}
        first = next(iter(self.inputs.values()), None)
        self.batch = first.shape[0] if first and first.shape else None
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
        """Inputs [B, ...] by their names, converted to their dtypes, to embeddings [B, D]."""
        count = len(next(iter(feeds.values())))
        size = self.batch or count
        parts = [
            self._run({name: values[first : first + size] for name, values in feeds.items()}, size)
            for first in range(0, count, size)
        ]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts))[:count]

    def _run(self, feeds: Feeds, size: int) -> NDArray[np.float32]:
        (output,) = self._session.run([self._output], self._prepared(feeds, size))
        embeddings: NDArray[np.float32] = output.astype(np.float32, copy=False)
        return embeddings

    def _prepared(self, feeds: Feeds, size: int) -> dict[str, NDArray[Any]]:
        """Of the inputs' dtypes, and filled up to a batch with copies of the last item."""
        return {
            name: np.ascontiguousarray(_filled(values, size), dtype=self.inputs[name].dtype)
            for name, values in feeds.items()
        }

    def try_out(self, feeds: Feeds, dim: int) -> None:
        """Chooses the output with the embeddings, and the size of batches, by computing one.

        dim: of the embeddings, where names do not tell.

        Raises:
            ConfigurationError: it cannot compute them, or no output is [B, D].
        """
        sizes = [self.batch] if self.batch else [len(next(iter(feeds.values()))), 1]
        failure = ""
        for size in sizes:
            prepared = self._prepared({name: each[:size] for name, each in feeds.items()}, size)
            try:
                outputs = self._session.run(self._outputs, prepared)
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
            f"{self.origin} does not turn {shapes_fed} into embeddings [B, D], for which an "
            f"output named like image_embeds or text_embeds is taken first: {failure}"
        )


class ImageGraph:
    """The image tower. image: how images are prepared for it."""

    def __init__(self, graph: Graph, image: ImageSpec) -> None:
        (pixels, *others) = graph.inputs.values() or [None]
        if pixels is None or others or not _takes_pixels(pixels):
            raise graph.refusal(
                graph.describe_inputs(),
                "one, of pixels [B, 3, S, S]: float, which get normalised ones, or uint8",
            )
        side = pixels.shape[2] or pixels.shape[3] or image.size
        self.image = replace(image, size=side)
        self._graph, self._pixels = graph, pixels

    def try_out(self, card: ModelCard) -> int:
        """Learns from a batch what its declaration leaves open; returns the dimensions.

        Raises:
            ConfigurationError: as `Graph.try_out`.
        """
        pixels = samples(replace(card, image=self.image), "image")[:2]
        self._graph.try_out(self._feeds(pixels), card.dim)
        return int(self.encode(pixels[:1]).shape[1])

    @property
    def is_half(self) -> bool:
        """Whether it computes in float16, as far as its input shows."""
        return self._pixels.dtype == np.float16

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[B, 3, S, S] RGB pixels, 0..255, to [B, D] embeddings."""
        return self._graph.run(self._feeds(pixels))

    def _feeds(self, pixels: NDArray[np.uint8]) -> Feeds:
        ready = pixels if self._pixels.dtype == np.uint8 else normalized(pixels, self.image)
        return {self._pixels.name: ready}


class TextGraph:
    """The text tower. text: how texts are tokenized for it."""

    def __init__(self, graph: Graph, text: TextSpec) -> None:
        roles = {name: _role(each) for name, each in graph.inputs.items()}
        tokens = [name for name, role in roles.items() if role == "tokens"]
        if len(tokens) != 1 or "unknown" in roles.values():
            raise graph.refusal(
                graph.describe_inputs(),
                "one of integer tokens [B, L], and beside it at most attention_mask, "
                "token_type_ids and position_ids",
            )
        self._length = graph.inputs[tokens[0]].shape[1]
        self.text = replace(text, context_length=self._length or text.context_length)
        self._graph, self._roles = graph, roles

    def try_out(self, card: ModelCard) -> int:
        """Learns from a batch what its declaration leaves open; returns the dimensions.

        Raises:
            ConfigurationError: as `Graph.try_out`.
        """
        texts = samples(replace(card, text=self.text), "text")
        self._graph.try_out(self._feeds(texts[-2:]), card.dim)
        short = texts[:2]
        padded = self._graph.run(self._feeds(short))
        if self._length is None and not self._may_be_trimmed(short, padded):
            self._length = self.text.context_length
        return int(padded.shape[1])

    def _may_be_trimmed(self, texts: NDArray[np.int32], padded: NDArray[np.float32]) -> bool:
        """Whether texts give the same embeddings without their padding."""
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
    channels_first = len(each.shape) == 4 and each.shape[1] in (3, None)
    square = channels_first and (None in each.shape[2:] or each.shape[2] == each.shape[3])
    return square and (each.dtype == np.uint8 or np.issubdtype(each.dtype, np.floating))


def _role(each: _Input) -> str:
    """What a text tower's input is: `tokens`, `mask`, `types`, `positions` or `unknown`."""
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
    """[B, L]: what an input of a role gets for tokens."""
    if role == "mask":
        return _attention_mask(tokens, text)
    if role == "types":
        return np.zeros_like(tokens)
    return tokens if role == "tokens" else np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)


def _attention_mask(tokens: NDArray[np.int32], text: TextSpec) -> NDArray[np.bool_]:
    """[B, L]: whether each position is a token of the text, not padding."""
    if text.trim == "fixed":
        return np.ones(tokens.shape, np.bool_)
    if text.trim == "masked":
        mask: NDArray[np.bool_] = tokens != text.pad_id
    else:
        # Up to CLIP's end token, the largest id: its padding is the id of a word as well.
        mask = np.arange(tokens.shape[1]) <= tokens.argmax(axis=1, keepdims=True)
    return mask


def _find_embeddings(shapes: Mapping[str, Sequence[int]], count: int, dim: int) -> str | None:
    """The output that holds the embeddings of `count` items; None if none does, or several may.

    dim: of the embeddings, where names do not tell.
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
