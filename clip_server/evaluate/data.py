"""Reads the data to evaluate: images with captions, or images by class."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clip_server.errors import ClipServerError
from clip_server.evaluate import scores
from clip_server.rpc.probes import PROBE_TEXT
from clip_server.search.relevance import FEWEST

TEMPLATES = (
    "{}",
    "a {}",
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "a drawing of a {}.",
    "a close-up of a {}.",
)
_LINE = 'a line is {"image": "a path", "caption": "a text"}, or a list of texts for the caption'


class DataError(ClipServerError):
    """The data cannot be read; the message says where, and what was expected."""


@dataclass(frozen=True)
class Pairs:
    """Images and their captions.

    images: each once.
    texts: the captions. image_of: the index of each one's image.
    left_out: the reasons why something was skipped, by its place (a file and line).
    """

    images: list[Path] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    image_of: list[int] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def scores(
        self, images: NDArray[np.float32], texts: NDArray[np.float32]
    ) -> Mapping[str, float]:
        """Scores of retrieval, and of quantized embeddings, over the pairs of which both
        embeddings, [N, D] and [T, D], exist."""
        images, texts, image_of = self._usable(images, texts)
        return {
            **scores.retrieval(images, texts, image_of),
            **scores.kept_neighbours(texts, images),
        }

    def _usable(
        self, images: NDArray[np.float32], texts: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Images and texts of the pairs whose embeddings exist, and each text's image."""
        image_of = np.array(self.image_of)
        # A caption without its image does not count.
        usable = np.isfinite(texts).all(axis=1) & np.isfinite(images[image_of]).all(axis=1)
        if not usable.any():
            raise DataError("no image with a caption is left to evaluate")
        kept, row_of = np.unique(image_of[usable], return_inverse=True)
        return images[kept], texts[usable], row_of


class Presence(Pairs):
    """Images and their captions, half of whose images are not in the collection searched.

    texts: the captions, and last the probe of relevance.
    """

    def __init__(self, pairs: Pairs) -> None:
        texts = [*pairs.texts, PROBE_TEXT]
        super().__init__(pairs.images, texts, pairs.image_of, pairs.left_out)

    def scores(
        self, images: NDArray[np.float32], texts: NDArray[np.float32]
    ) -> Mapping[str, float]:
        """ROC AUCs over the pairs of which both embeddings, [N, D] and [T, D], exist."""
        probe = texts[-1]
        if not np.isfinite(probe).all():
            raise DataError(f"the model does not encode {PROBE_TEXT!r}")
        images, texts, image_of = self._usable(images, texts[:-1])
        if len(images) < 2 * FEWEST:
            raise DataError(
                f"{len(images)} images are left to evaluate; relevance takes {2 * FEWEST} or more"
            )
        return scores.presence(images, texts, image_of, probe)


@dataclass(frozen=True)
class Classes:
    """Images by class.

    class_of: the index of each image's class.
    texts: the prompts by class, `templates` of them for each.
    left_out: as in `Pairs`.
    """

    images: list[Path]
    class_of: list[int]
    texts: list[str]
    templates: int
    left_out: dict[str, str] = field(default_factory=dict)

    def scores(
        self, images: NDArray[np.float32], texts: NDArray[np.float32]
    ) -> Mapping[str, float]:
        """Zero-shot classification scores of the images whose embedding [N, D] exists."""
        if np.isnan(texts).any():
            raise DataError("a prompt cannot be encoded, so its class cannot be named")
        usable = np.isfinite(images).all(axis=1)
        if not usable.any():
            raise DataError("no image is left to evaluate")
        prompts = texts.reshape(-1, self.templates, texts.shape[1])
        return scores.zero_shot(
            images[usable], scores.ensemble(prompts), np.array(self.class_of)[usable]
        )


def read_pairs(path: Path) -> Pairs:
    """Reads images and captions from a JSONL file, or from a folder.

    A line of the file is `{"image": PATH, "caption": TEXT}`; the path is relative to the file,
    the caption may be a list, and an image may be on several lines. In a folder and its
    subfolders, `cat.txt` holds the captions of `cat.png` (or of any image with that name), one
    per line.

    Malformed lines, empty captions, and files of a folder without their counterpart are left
    out.

    Raises:
        DataError: the path is neither a file nor a folder, or no pair is left.
    """
    pairs = Pairs()
    indices: dict[Path, int] = {}
    entries = _folder_pairs if path.is_dir() else _lines
    for place, image, captions in entries(path, pairs.left_out):
        texts = [caption for caption in captions if caption.strip()]
        if len(texts) < max(1, len(captions)):
            pairs.left_out[place] = "the caption is empty"
        if texts and image not in indices:
            indices[image] = len(indices)
            pairs.images.append(image)
        pairs.texts.extend(texts)
        pairs.image_of.extend(indices[image] for _ in texts)
    if not pairs.texts:
        first = next((f" ({place}: {why})" for place, why in pairs.left_out.items()), "")
        raise DataError(f"{path} has no image with a caption{first}: {_LINE}")
    return pairs


def read_classes(folder: Path, names: Path | None, templates: Sequence[str]) -> Classes:
    """Reads a folder with a subfolder of images for each class.

    names: a file with one class per line: its subfolder, a tab, and its name in the prompts; the
        subfolder alone if that is the name. A class without a subfolder is a distractor. None:
        all subfolders, by name, with spaces for underscores.
    templates: of the prompts, each with {} for the name of the class.

    Raises:
        DataError: there is no such folder or no class, or a class has no name.
    """
    subfolders = sorted(each.name for each in _children(folder) if each.is_dir())
    named = {name: name.replace("_", " ") for name in subfolders}
    if names is not None:
        lines = [_class_line(line) for line in _text_lines(names)]
        named = dict(lines)
        if len(named) < len(lines):
            raise DataError(f"{names} names a subfolder twice")
        for name in subfolders:
            if name not in named:
                raise DataError(f"{names} does not name the class of {folder / name}")
    if not subfolders:
        raise DataError(f"{folder} has no subfolders; expected one for each class")
    images, class_of = [], []
    for index, name in enumerate(named):
        inside = _files(folder / name)
        images += inside
        class_of += [index] * len(inside)
    texts = [template.replace("{}", name) for name in named.values() for template in templates]
    return Classes(images, class_of, texts, len(templates))


def read_templates(file: Path) -> list[str]:
    """Reads templates, one per line, each with {} for the name of the class.

    Raises:
        DataError: the file cannot be read or is empty, or a line has no {}.
    """
    templates = _text_lines(file)
    for template in templates:
        if "{}" not in template:
            raise DataError(f"{file}: the template {template!r} has no {{}} for the class")
    return templates


def _lines(file: Path, left_out: dict[str, str]) -> Iterator[tuple[str, Path, list[str]]]:
    """The place, image and captions of each line of a JSONL file."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{file}:{number}"
            try:
                image, captions = _parse(line)
            except DataError as error:
                left_out[place] = str(error)
            else:
                yield place, file.parent / image, captions


def _parse(line: bytes) -> tuple[str, list[str]]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(f"it is not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise DataError("it is not a JSON object")
    image, captions = entry.get("image"), entry.get("caption")
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(image, str) or not image:
        raise DataError("'image' is not a path")
    if not isinstance(captions, list) or not all(isinstance(each, str) for each in captions):
        raise DataError("'caption' is not a text or a list of texts")
    return image, captions


def _folder_pairs(folder: Path, left_out: dict[str, str]) -> Iterator[tuple[str, Path, list[str]]]:
    """The place, image and captions of each image below a folder that has a caption file."""
    partners: dict[Path, list[Path]] = {}
    for file in _files(folder):
        partners.setdefault(file.with_suffix(""), []).append(file)
    for files in partners.values():
        captions = [file for file in files if file.suffix == ".txt"]
        images = [file for file in files if file.suffix != ".txt"]
        if len(captions) == len(images) == 1:
            place = str(images[0])
            try:
                lines = _text_lines(captions[0])
            except DataError as error:
                left_out[place] = str(error)
            else:
                yield place, images[0], lines
        elif captions:
            left_out[str(captions[0])] = f"{len(images)} images have its name; expected one"
        else:
            left_out.update({str(image): "it has no .txt file" for image in images})


def _class_line(line: str) -> tuple[str, str]:
    subfolder, _, name = line.partition("\t")
    return subfolder.strip(), (name or subfolder).strip()


def _text_lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty, at least one."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from None
    found = [line for line in lines if line]
    if not found:
        raise DataError(f"{file} has no lines")
    return found


def _files(folder: Path) -> list[Path]:
    """The files below a folder, sorted, without hidden ones."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and "/." not in f"/{file.relative_to(folder).as_posix()}"
    )


def _children(folder: Path) -> list[Path]:
    try:
        return [each for each in folder.iterdir() if not each.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from None
