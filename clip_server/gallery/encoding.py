"""Turns entries into rows of a collection, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from clip_client.data_uri import read_data_uri
from clip_server.errors import ConfigurationError
from clip_server.evaluate.encoders import Encoder
from clip_server.gallery.sources import Entry
from clip_server.rpc.probes import PROBE_IMAGE, PROBE_TEXT, comparable_precision
from clip_server.search.fingerprint import Fingerprint
from clip_server.search.store import Modality, Row, Vectors

# Of the files that one batch reads.
_MOST_BYTES = 256 << 20


@dataclass
class Report:
    """Results for the entries.

    errors: why an entry was left out, by its id.
    """

    stored: int = 0
    removed: int = 0
    errors: dict[str, str] = field(default_factory=dict)


def fingerprint(encoder: Encoder) -> Fingerprint:
    """The fingerprint of the model that an encoder has loaded."""
    embeddings, errors = encoder.encode([PROBE_TEXT, read_data_uri(PROBE_IMAGE)])
    for why in errors.values():
        raise ConfigurationError(f"{encoder.name} does not encode: {why}")
    precision = comparable_precision(encoder.name.rpartition(" ")[2])
    probes = tuple(float(value) for value in embeddings.ravel())
    return Fingerprint(encoder.model, encoder.dim, precision, probes)


def batches(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    """Entries in batches."""
    stream = iter(entries)
    while batch := list(islice(stream, size)):
        yield batch


def to_rows(
    batch: Sequence[Entry], modality: Modality, encoder: Encoder, errors: dict[str, str]
) -> list[Row]:
    """The rows of a batch; `errors` gets why an entry has none, by its id."""
    vectors = embed(batch, encoder, errors)
    return [
        Row(entry.id, modality, vectors[index], entry.text, entry.uri, entry.tags)
        for index, entry in enumerate(batch)
        if index in vectors
    ]


def embed(
    batch: Sequence[Entry], encoder: Encoder, errors: dict[str, str]
) -> Mapping[int, Vectors]:
    """The embedding of each entry by its index: its own, or the encoder's of its content."""
    vectors: dict[int, Vectors] = {}
    contents: dict[int, str | bytes] = {}
    for index, entry in enumerate(batch):
        if entry.embedding is not None:
            if entry.embedding.shape == (encoder.dim,):
                vectors[index] = entry.embedding
            else:
                errors[entry.id] = f"its embedding is not of {encoder.dim} numbers"
            continue
        try:
            contents[index] = _read(entry.content)
        except OSError as error:
            errors[entry.id] = f"it cannot be read: {error.strerror}"
    if contents:
        encoded, failed = encoder.encode(list(contents.values()))
        for row, index in enumerate(contents):
            if row in failed:
                errors[batch[index].id] = failed[row]
            else:
                vectors[index] = encoded[row]
    for index in [i for i, v in vectors.items() if not np.isfinite(v).all() or not v.any()]:
        errors[batch[index].id] = "its embedding is zero, or holds a value that is not a number"
        del vectors[index]
    return vectors


def _read(content: Path | bytes | str | None) -> str | bytes:
    if content is None:
        raise OSError(0, "it names neither an image nor a text")
    if not isinstance(content, Path):
        return content
    with content.open("rb") as file:
        read = file.read(_MOST_BYTES + 1)
    if len(read) > _MOST_BYTES:
        raise OSError(0, "it is larger than 256 MiB")
    return read
