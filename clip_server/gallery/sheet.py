"""A contact sheet: each query above the images that it found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from clip_server.errors import ConfigurationError

_SIDE, _GAP, _LINE = 128, 8, 16


def save_sheet(file: Path, results: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> None:
    """Writes an image of all results. results: a query, and names and scores of what it found.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    columns = max((len(found) for _, found in results), default=0) or 1
    width = _GAP + columns * (_SIDE + _GAP)
    row_height = _LINE + _SIDE + _LINE + _GAP
    sheet = Image.new("RGB", (width, _GAP + len(results) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (query, found) in enumerate(results):
        top = _GAP + row * row_height
        draw.text((_GAP, top), _printable(query), fill="black")
        for column, (name, score) in enumerate(found):
            left = _GAP + column * (_SIDE + _GAP)
            _paste(sheet, name, (left, top + _LINE))
            draw.text((left, top + _LINE + _SIDE), f"{score:.3f}", fill="black")
    try:
        sheet.save(file)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file} cannot be written: {error}") from None


def _paste(sheet: Image.Image, name: str, place: tuple[int, int]) -> None:
    """Pastes an image, or the text where it is none that can be opened."""
    try:
        with Image.open(name) as opened:
            opened.thumbnail((_SIDE, _SIDE))
            sheet.paste(opened.convert("RGB"), place)
    except (OSError, ValueError):
        ImageDraw.Draw(sheet).text(place, _printable(name)[:24], fill="grey")


def _printable(text: str) -> str:
    """Text that Pillow's own font has letters for."""
    return text.encode("latin-1", "replace").decode("latin-1")
