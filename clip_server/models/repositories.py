"""Models that are named by their repository on the hub, such as `immich-app/ViT-B-32__openai`.

Their files lie in one folder of the hub's cache, which is then served as a folder of one's own.
"""

from __future__ import annotations

from pathlib import Path

from clip_server.errors import WeightsError
from clip_server.models import exported, hub, hugging_face, weights
from clip_server.preprocess import tokenizer

_CONFIGURATIONS = (weights.CONFIG, hugging_face.CONFIG)
_OPTIONAL = (
    *(tokenizer.FILE, tokenizer.CONFIG),
    *hugging_face.OPTIONAL_FILES,
    *exported.DESCRIPTIONS,
)
_CHECKPOINTS = (weights.CHECKPOINT, *weights.HUGGING_FACE)


def folder(repository: str) -> Path:
    """The folder of a repository in the hub's cache, with the small files that describe the model;
    they are downloaded if necessary.

    Raises:
        WeightsError: there is no such repository, it holds no model, or the hub cannot be reached.
    """
    cached = (hub.find_cached(repository, file) for file in _CONFIGURATIONS)
    found = next(filter(None, cached), None)
    if found is None:
        # The configuration comes last: with it, the folder is complete.
        for file in _OPTIONAL:
            hub.fetch_optional(repository, file)
        found = hub.download(repository, _CONFIGURATIONS)
    return found.parent


def fetch_checkpoint(repository: str, place: Path) -> None:
    """Downloads the weights of a repository into its folder `place`, unless they are there.

    Raises:
        WeightsError: it has none, or the hub cannot be reached.
    """
    if weights.in_folder(place) is None:
        try:
            hub.download(repository, _CHECKPOINTS)
        except WeightsError as error:
            raise WeightsError(f"{error}\nof graphs, {exported.served()}") from error
