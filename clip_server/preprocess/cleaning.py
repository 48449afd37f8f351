"""Cleans texts before tokenization, equal to open_clip; of a long text, only its beginning."""

from __future__ import annotations

import html
import string
import subprocess
import sys
from collections.abc import Callable, Iterator

from clip_server.errors import ItemError
from clip_server.model_card import Clean

# Characters repaired per step, in whole lines. A longer line is repaired in a process of its own:
# it takes up to seconds, during which no other thread of this process could run.
_BLOCK = 2**15
# ftfy repairs each line by itself, and at most this many characters of a line together.
_MAX_SEGMENT = 1_000_000
_ASCII_SPACE = " \t\n\r\f"
_REPAIR_SCRIPT = """
import sys
from clip_server.preprocess.cleaning import repair
text = sys.stdin.buffer.read().decode()
sys.stdout.buffer.write(repair(text, sys.argv[1] == "True").encode())
"""


def is_plain(text: str) -> bool:
    """Whether cleaning changes only spaces and case, and the text spells no special token."""
    return text.isascii() and text.isprintable() and "&" not in text and "<" not in text


def cleaned_prefixes(text: str, clean: Clean) -> Iterator[tuple[str, bool]]:
    """Yields longer and longer prefixes of the cleaned text, and whether each is all of it. The
    last word of a prefix may be incomplete.

    Raises:
        ItemError: the text holds half of a surrogate pair, so it is not valid Unicode.
    """
    finish = _CLEANERS[clean]
    _check_unicode(text)
    if clean == "none":
        yield text, True
        return
    repaired, size = "", 0
    for piece, is_last in _repaired_pieces(text):
        repaired += piece
        if is_last or len(repaired) >= 2 * size:
            size = len(repaired)
            yield finish(repaired), is_last


def repair(text: str, unescape: bool) -> str:
    """Repairs a broken encoding, and unescapes HTML.

    unescape: whether ftfy may unescape HTML too, which it does up to the first `<` of a text.
    """
    import ftfy  # 90 ms, and many servers only ever see ASCII

    fixed = ftfy.fix_text(text, unescape_html="auto" if unescape else False)
    try:
        return html.unescape(html.unescape(fixed))
    except ValueError:
        raise ItemError("the text holds an HTML entity with more digits than a number") from None


def _repaired_pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Yields the repaired text piece by piece, and whether each is the last."""
    plain = is_plain(text)
    unescape = True
    start = 0
    while start < len(text):
        end = min(start + _BLOCK, len(text)) if plain else _end_of_piece(text, start)
        piece = text[start:end]
        if plain:
            yield piece, end == len(text)
        elif not piece.isascii() or piece.strip(_ASCII_SPACE):  # it is not only space
            repair_piece = repair if len(piece) <= _BLOCK else _repair_in_subprocess
            yield repair_piece(piece, unescape), end == len(text)
        elif end == len(text):
            yield " ", True
        unescape = unescape and "<" not in piece
        start = end
    if not text:
        yield "", True


def _end_of_piece(text: str, start: int) -> int:
    """The end of the lines that fit into a block, or of a single longer line."""
    if len(text) - start <= _BLOCK:
        return len(text)
    end = text.rfind("\n", start, start + _BLOCK) + 1
    limit = start + _MAX_SEGMENT
    return end or text.find("\n", start, limit) + 1 or min(limit, len(text))


def _repair_in_subprocess(text: str, unescape: bool) -> str:
    """Runs `repair` in a process of its own."""
    if is_plain(text.rstrip("\n")):
        return text
    command = [sys.executable, "-c", _REPAIR_SCRIPT, str(unescape)]
    done = subprocess.run(command, input=text.encode(), capture_output=True)
    if done.returncode:
        return repair(text, unescape)  # which raises the error
    return done.stdout.decode()


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ItemError(
            f"the text is not valid Unicode: character {error.start} is half of a surrogate "
            "pair; send the whole character"
        ) from None


def _lower(text: str) -> str:
    """Collapses whitespace, and lower-cases."""
    return _whitespace(text).lower()


def _whitespace(text: str) -> str:
    """Collapses whitespace."""
    return " ".join(text.split())


def _canonicalize(text: str) -> str:
    """Like `_lower`, without ASCII punctuation; an underscore counts as a space."""
    bare = text.strip().replace("_", " ").translate(_NO_PUNCTUATION)
    return " ".join(bare.lower().split())


def _unchanged(text: str) -> str:
    return text


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# open_clip's clean-ups of a repaired text.
_CLEANERS: dict[Clean, Callable[[str], str]] = {
    "lower": _lower,
    "whitespace": _whitespace,
    "canonicalize": _canonicalize,
    "none": _unchanged,
}
