"""The encoders of Jina Hub for one modality: `CLIPImageEncoder` and `CLIPTextEncoder`."""

# Jina reads the endpoints' annotations at run time: no `from __future__ import annotations`.

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from docarray import DocList
from jina import requests
from jina.constants import __default_endpoint__

from clip_server.engine.engine import Item
from clip_server.errors import ConfigurationError
from clip_server.executors.base import BaseCLIPEncoder, Modality, content_of, descend
from clip_server.executors.documents import ClipDoc
from clip_server.executors.parameters import EncoderParameters

# What OpenAI's models are called on the Hugging Face hub.
_HUB_NAMES = {
    "openai/clip-vit-base-patch32": "ViT-B-32::openai",
    "openai/clip-vit-base-patch16": "ViT-B-16::openai",
    "openai/clip-vit-large-patch14": "ViT-L-14::openai",
    "openai/clip-vit-large-patch14-336": "ViT-L-14-336::openai",
}
# Names of parameters, in several versions of the encoders, and ours.
_ALIASES = {
    "pretrained_model_name_or_path": "name",
    "model_name": "name",
    "batch_size": "minibatch_size",
    "default_batch_size": "minibatch_size",
    "default_traversal_paths": "access_paths",
    "traversal_paths": "access_paths",
    "default_device": "device",
}
_TEXT_URI = re.compile(r"data:(text/|,|;charset)", re.IGNORECASE)
# Models whose tokenizer, or preprocessing of images, is to be used.
_BASES = {"base_tokenizer_model", "base_feature_extractor"}


class _OneModality(BaseCLIPEncoder):
    """Encodes the documents of one modality, and leaves the others as they are.

    The modality of a document is its `modality`, or follows from its content. A document without
    content gets the mean embedding of those of its chunks that are of this modality.

    Parameters: those of CLIPEncoder, under these names or those of Jina Hub.
    """

    parameter_order = ("pretrained_model_name_or_path",)

    @classmethod
    def read_parameters(cls, given: Mapping[str, Any]) -> EncoderParameters:
        values = {_ALIASES[key]: value for key, value in given.items() if key in _ALIASES}
        values |= {key: value for key, value in given.items() if key not in _ALIASES}
        if not isinstance(values.pop("use_default_preprocessing", True), bool):
            raise ConfigurationError("use_default_preprocessing is neither true nor false")
        name = values.get("name") or "openai/clip-vit-base-patch32"
        for key in _BASES & values.keys():
            base = values.pop(key)
            if base and base != name and base not in _HUB_NAMES:
                raise ConfigurationError(
                    f"{key}: {base!r} is not supported: a model is used with its own, or with "
                    f"that of one of {', '.join(_HUB_NAMES)}"
                )
        return super().read_parameters(values | {"name": _HUB_NAMES.get(name, name)})

    @requests(on=["/", "/encode", __default_endpoint__])
    async def encode(
        self, docs: DocList[ClipDoc], parameters: dict[str, Any] | None = None, **_: Any
    ) -> DocList[ClipDoc]:
        """Sets `embedding` of each document of the modality; see BaseCLIPEncoder."""
        await super().encode(docs, parameters)
        for doc in docs if "" in self._access_paths(self._options(parameters)) else ():
            parts = [part for part in _parts(doc) if part is not doc and self._is_ours(part)]
            embeddings = [part.embedding for part in parts if part.embedding is not None]
            if embeddings:
                doc.embedding = np.mean(embeddings, axis=0)
        return docs

    def select(self, docs: Iterable[Any], paths: Iterable[str]) -> list[Any]:
        """Selects documents; of a document without content, its chunks."""
        found = super().select(docs, paths)
        parts = [part for doc in found for part in _parts(doc)]
        return [part for part in parts if self._is_ours(part)]

    def _is_ours(self, doc: Any) -> bool:
        return (getattr(doc, "modality", None) or _modality_of(doc)) == self.modality


class CLIPImageEncoder(_OneModality):
    """Encodes images.

    use_default_preprocessing: if false, a `tensor` is what the model takes: floats, [3, S, S],
        normalized by the model's mean and standard deviation.
    """

    modality = "image"

    def __init__(self, *by_place: Any, **arguments: Any) -> None:
        super().__init__(*by_place, **arguments)
        self._use_default_preprocessing = arguments.get("use_default_preprocessing", True)

    def from_tensor(self, tensor: np.ndarray[Any, Any]) -> Item:
        if self._use_default_preprocessing or tensor.ndim != 3 or len(tensor) != 3:
            return super().from_tensor(tensor)
        spec = self.engine.card.image
        pixels = (tensor.transpose(1, 2, 0) * np.array(spec.std) + np.array(spec.mean)) * 255
        return super().from_tensor(np.rint(pixels).clip(0, 255).astype(np.uint8))


class CLIPTextEncoder(_OneModality):
    """Encodes texts."""

    modality = "text"


def _parts(doc: Any) -> list[Any]:
    """A document; if it has no content, its chunks."""
    return [doc] if content_of(doc)[0] else descend([doc], "chunks")


def _modality_of(doc: Any) -> Modality | None:
    """The modality of a document's content."""
    field, value = content_of(doc)
    if field == "text" or (field == "uri" and _TEXT_URI.match(value)):
        return "text"
    return "image" if field else None
