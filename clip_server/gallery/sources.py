"""Sources of a gallery: files, folders, lists, JSONL, tars and Parquet."""

from __future__ import annotations

import glob
import importlib
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_server.errors import ConfigurationError
from clip_server.install import install_hint

_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"}
_LISTS = {".txt", ".lst", ".list", ".tsv", ".csv"}
# Columns and keys, in the order in which they are looked for.
_IMAGE_KEYS = ("image", "path", "file", "filename", "image_path", "uri", "url", "key")
_TEXT_KEYS = ("text", "caption", "prompt")
_EMBEDDING_KEYS = ("embedding", "vector", "emb")
_PARQUET_ROWS = 1024


@dataclass(frozen=True)
class Entry:
    """One image or text that becomes a row.

    id: its path, its text, or what its source calls it.
    content: a path, the bytes of an image, or a text; None where only the embedding is known.
    """

    id: str
    content: Path | bytes | str | None
    text: str | None = None
    uri: str | None = None
    tags: Mapping[str, Any] = field(default_factory=dict)
    embedding: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Format:
    """Options for reading entries.

    modality: `image` or `text`.
    delimiter: between a path or text of a list, and its label.
    root: the folder that paths of lists are relative to.
    """

    modality: str
    delimiter: str = "\t"
    root: Path = Path()


def read(written: str, form: Format) -> Iterator[Entry]:
    """The entries of a file, a folder or a pattern with * in it.

    Raises:
        ConfigurationError: there is none, or it cannot be read.
    """
    path = Path(written).expanduser()
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - of any root
        if not found:
            raise ConfigurationError(f"{written}: there is no such file or folder")
        return (entry for each in found for entry in read(each, form))
    suffix = path.suffix.lower()
    readers: dict[str, Callable[[Path, Format], Iterator[Entry]]] = {
        ".jsonl": _jsonl,
        ".tar": _tar,
        ".parquet": _parquet,
        **dict.fromkeys(_LISTS, _list),
    }
    if suffix in readers:
        return readers[suffix](path, form)
    if form.modality == "text":
        return _list(path, form)
    return iter([_file(path)])


def _file(path: Path, label: str = "") -> Entry:
    return Entry(str(path), path, uri=str(path), tags={"label": label} if label else {})


def _folder(folder: Path) -> Iterator[Entry]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _IMAGES and not path.name.startswith("."):
            yield _file(path)


def _list(path: Path, form: Format) -> Iterator[Entry]:
    """A path or a text on each line, and perhaps a label after the delimiter."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigurationError(f"{path} is no list of paths or texts in UTF-8") from None
    for line in filter(str.strip, lines):
        content, _, label = line.strip().partition(form.delimiter)
        if form.modality == "text":
            yield Entry(content, content, content, tags={"label": label} if label else {})
        else:
            yield _file(form.root / content, label)


def _jsonl(path: Path, form: Format) -> Iterator[Entry]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                raise ConfigurationError(f"{path}, line {number}, is not JSON") from None
            if not isinstance(record, Mapping):
                raise ConfigurationError(f"{path}, line {number}, is not an object")
            yield _of_record(record, form, f"{path}:{number}")


def _of_record(record: Mapping[str, Any], form: Format, place: str) -> Entry:
    """An entry of named values; those that are not known become tags."""
    image = next((k for k in _IMAGE_KEYS if isinstance(record.get(k), str)), None)
    text = next((k for k in _TEXT_KEYS if isinstance(record.get(k), str)), None)
    vector = next((k for k in _EMBEDDING_KEYS if record.get(k) is not None), None)
    given_tags = record.get("tags")
    tags = dict(given_tags) if isinstance(given_tags, Mapping) else {}
    tags |= {
        key: value
        for key, value in record.items()
        if key not in (image, vector, "id", "tags") and isinstance(value, str | int | float | bool)
    }
    embedding = None if vector is None else np.asarray(record[vector], np.float32)
    is_text = form.modality == "text"
    content = record[text] if is_text and text else record[image] if image else None
    row_id = str(record.get("id") or content or place)
    if is_text:
        tags.pop(text or "", None)
        return Entry(row_id, content, content, tags=tags, embedding=embedding)
    located = None if content is None else form.root / content
    uri = None if located is None else str(located)
    return Entry(row_id, located, None, uri, tags, embedding)


def _tar(path: Path, form: Format) -> Iterator[Entry]:
    """Images with a .txt of their caption and a .json of their tags, as img2dataset writes them."""
    try:
        with tarfile.open(path) as archive:
            group: dict[str, bytes] = {}
            name = ""
            for member in archive:
                stem, _, suffix = member.name.rpartition(".")
                if not member.isfile() or not stem:
                    continue
                if stem != name and group:
                    yield from _of_group(path, name, group, form)
                    group = {}
                name = stem
                content = archive.extractfile(member)
                group[suffix.lower()] = content.read() if content else b""
            if group:
                yield from _of_group(path, name, group, form)
    except tarfile.TarError as error:
        raise ConfigurationError(f"{path} is no tar that can be read: {error}") from None


def _of_group(path: Path, name: str, group: Mapping[str, bytes], form: Format) -> Iterator[Entry]:
    image = next((group[key] for key in group if f".{key}" in _IMAGES), None)
    caption = group.get("txt", b"").decode("utf-8", "replace").strip()
    try:
        tags = json.loads(group.get("json", b"{}"))
    except ValueError:
        tags = {}
    tags = {key: value for key, value in tags.items() if value is not None}
    place = f"{path}/{name}"
    if form.modality == "text":
        if caption:
            yield Entry(place, caption, caption, tags=tags)
    elif image is not None:
        uri = str(tags.get("url") or place)
        yield Entry(place, image, None, uri, {**({"caption": caption} if caption else {}), **tags})


def _parquet(path: Path, form: Format) -> Iterator[Entry]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigurationError(
            f"{path}: Parquet needs the package pyarrow: {install_hint('parquet')}"
        ) from None
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(_PARQUET_ROWS):
            for record in batch.to_pylist():
                number += 1
                yield _of_record(record, form, f"{path}:{number}")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} is no Parquet that can be read: {error}") from None
