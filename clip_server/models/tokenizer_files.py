"""Finds the files of a Hugging Face tokenizer, in a folder, the hub's cache or on the hub."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from clip_server.errors import WeightsError
from clip_server.model_card import TextSpec
from clip_server.models import hub
from clip_server.preprocess.tokenizer import CONFIG, FILE


def fetch(spec: TextSpec) -> None:
    """Downloads the files of a tokenizer, unless they are on this machine.

    Raises:
        WeightsError: they are not on the hub either, or it cannot be reached.
    """
    source = spec.tokenizer
    if source is None or Path(source).is_dir() or hub.find_cached(source, FILE):
        return
    with suppress(WeightsError):  # not every tokenizer has one
        hub.fetch(source, CONFIG)
    hub.fetch(source, FILE)


def located(spec: TextSpec) -> TextSpec:
    """The spec with its tokenizer's folder on this machine in place of a hub repository.

    Raises:
        WeightsError: as `fetch`.
    """
    if spec.tokenizer is None or Path(spec.tokenizer).is_dir():
        return spec
    fetch(spec)
    # The cache keeps the files of one revision in one folder.
    return replace(spec, tokenizer=str(hub.fetch(spec.tokenizer, FILE).parent))


def files(spec: TextSpec) -> list[Path]:
    """The files of a tokenizer; none if the vocabulary is bundled.

    Raises:
        WeightsError: as `fetch`.
    """
    folder = located(spec).tokenizer
    if folder is None:
        return []
    return [Path(folder, FILE), *(path for path in [Path(folder, CONFIG)] if path.is_file())]
