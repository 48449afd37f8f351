"""Reads the parameters of an encoder from a flow's YAML."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

from clip_client import documents
from clip_client.errors import InvalidInputError
from clip_server.engine.engine import MAX_QUEUED_ITEMS
from clip_server.engine.fetcher import UriPolicy
from clip_server.engine.service import Limits
from clip_server.errors import ConfigurationError
from clip_server.executors.parameter_fields import at_least, matching, read_parameters
from clip_server.model_card import Precision
from clip_server.preprocess.image import MAX_PIXELS


@dataclass(frozen=True)
class EncoderParameters:
    """The keys of an encoder's `uses: with:`.

    name: the model.
    device: `cpu`, `cuda`, `cuda:1`, with torch `mps`; None: the best available.
    jit: torch only: compile the towers with TorchScript.
    dtype: precision of the weights; None: fp32, for TensorRT fp16.
    model_path: a local checkpoint, or a folder with what the runtime takes instead: for ONNX
        `visual.onnx` and `textual.onnx`.
    num_worker_preprocess: threads that tokenize and decode.
    minibatch_size: largest batch for the model.
    access_paths: documents to encode: `@r` those sent, `@c` their chunks, `@m` their matches,
        several as `@r,c`.
    exact: decode images at full size, equal to open_clip's to the pixel.
    max_item_bytes, max_request_items, max_pixels: limits on a text or encoded image, on a
        request, and on a decoded image.
    max_queued_items: further requests are refused while this many items are in flight.
    cache_bytes: size of the embedding cache; 0: no cache.
    allow_uri: which URIs of items the server fetches; None: none but `data:`.
    max_length: tokens that texts are truncated to, start and end included; None: the model's
        context length.
    idle_seconds: a tower that is not used for so long is unloaded; 0: both stay loaded.
    aliases: other names of the model, which requests may use.
    matryoshka_dimensions: lengths to which embeddings may be cut, of a model trained for it.
    """

    name: str = "ViT-B-32::openai"
    device: str | None = matching(r"cpu|mps|cuda(:\d+)?", "cpu, cuda, cuda:1 (or higher), mps")
    jit: bool = False
    dtype: str | None = matching("|".join(get_args(Precision)), ", ".join(get_args(Precision)))
    model_path: str | None = None
    num_worker_preprocess: int = at_least(1, 4)
    minibatch_size: int = at_least(1, 32)
    access_paths: str = "@r"
    exact: bool = False
    max_item_bytes: int = at_least(1, Limits.max_item_bytes)
    max_request_items: int = at_least(1, Limits.max_request_items)
    max_pixels: int = at_least(1, MAX_PIXELS)
    max_queued_items: int = at_least(1, MAX_QUEUED_ITEMS)
    cache_bytes: int = at_least(0, 0)
    max_length: int | None = field(default=None, metadata={"least": 2})
    allow_uri: UriPolicy | None = None
    idle_seconds: float = field(default=0.0, metadata={"least": 0})
    aliases: tuple[str, ...] = ()
    matryoshka_dimensions: tuple[int, ...] = field(default=(), metadata={"least": 1})

    @classmethod
    def names(cls) -> list[str]:
        """The keys that `uses: with:` may hold."""
        return [each.name for each in fields(cls)]

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> EncoderParameters:
        """Reads the parameters of a YAML file. An empty key means its default.

        Raises:
            ConfigurationError: a key is unknown, or its value has the wrong type or is not
                allowed.
        """
        values = {key: value for key, value in given.items() if value not in (None, "")}
        for name in ("traversal_paths", "access_paths"):
            if isinstance(values.get(name), (list, tuple)):
                values[name] = ",".join(map(str, values[name]))
        if "traversal_paths" in values:
            warnings.warn(
                "traversal_paths is the old name of access_paths: rename it", stacklevel=2
            )
            values.setdefault("access_paths", values.pop("traversal_paths"))
        policy = values.pop("allow_uri", None)
        parameters = read_parameters(cls, values, "CLIPEncoder")
        if policy is not None:
            parameters = replace(parameters, allow_uri=UriPolicy.parse(policy))
        parse_access_paths(parameters.access_paths)
        return parameters


def parse_access_paths(paths: str) -> list[str]:
    """Converts `@r,c` to names of fields of the documents sent: ["", "chunks"].

    Raises:
        ConfigurationError: another path.
    """
    try:
        return field_paths(documents.parse_access_paths(paths))
    except InvalidInputError as error:
        raise ConfigurationError(str(error)) from None


def field_paths(paths: Sequence[str]) -> list[str]:
    """Paths of the steps r, c and m as docarray's: ["r", "c"] becomes ["", "chunks"].

    Raises ConfigurationError for more than one level: a ClipDoc has no more.
    """
    fields_of = {"r": "", "c": "chunks", "m": "matches"}
    if not all(path in fields_of for path in paths):
        raise ConfigurationError(
            f"access_paths {','.join(paths)!r}: documents of Jina have one level of chunks and "
            "matches, '@r', '@c' and '@m'; deeper ones are encoded over HTTP"
        )
    return [fields_of[path] for path in paths]
