"""The clean-up of texts before their tokens are looked up, as open_clip does it; of a long text
only as much as its first tokens need."""

from __future__ import annotations

import html
import string
import subprocess
import sys
from collections.abc import Callable, Iterator

from clip_server.errors import ItemError
from clip_server.model_card import Clean

# Whole lines that are mended in one go, in characters. A line that is longer is mended in a
# process of its own: it takes up to seconds, in which no other thread of this one could run.
_BLOCK = 2**15
# ftfy mends each line by itself, and so many characters of one at most.
_LONGEST_SEGMENT = 1_000_000
_ASCII_SPACE = " \t\n\r\f"
_MEND = """
import sys
from clip_server.preprocess.cleaning import mend
text = sys.stdin.buffer.read().decode()
sys.stdout.buffer.write(mend(text, sys.argv[1] == "True").encode())
"""


def is_plain(text: str) -> bool:
    """Whether the clean-up changes nothing but spaces and case, and no special token is spelled."""
    return text.isascii() and text.isprintable() and "&" not in text and "<" not in text


def cleaned(text: str, clean: Clean) -> Iterator[tuple[str, bool]]:
    """Ever longer beginnings of what becomes of `text`, and whether each is all of it. The last
    word of one that is not may go on.

    Raises:
        ItemError: the text holds half of a surrogate pair, so it is not Unicode.
    """
    finish = _CLEANERS[clean]
    _check_unicode(text)
    if clean == "none":
        yield text, True
        return
    mended, size = "", 0
    for piece, is_last in _mended(text):
        mended += piece
        if is_last or len(mended) >= 2 * size:
            size = len(mended)
            yield finish(mended), is_last


def mend(text: str, unescape: bool) -> str:
    """With a broken encoding repaired and HTML unescaped.

    unescape: whether ftfy may unescape HTML too, which it does up to the first `<` of a text.
    """
    import ftfy  # 90 ms, and many servers only ever see ASCII

    fixed = ftfy.fix_text(text, unescape_html="auto" if unescape else False)
    try:
        return html.unescape(html.unescape(fixed))
    except ValueError:
        raise ItemError("the text holds an HTML entity with more digits than a number") from None


def _mended(text: str) -> Iterator[tuple[str, bool]]:
    """A text as `mend` leaves it, piece by piece, and whether each is the last."""
    plain = is_plain(text)
    unescape = True
    start = 0
    while start < len(text):
        end = min(start + _BLOCK, len(text)) if plain else _end_of_piece(text, start)
        piece = text[start:end]
        if plain:
            yield piece, end == len(text)
        elif not piece.isascii() or piece.strip(_ASCII_SPACE):  # not all of it is a gap
            mended = mend if len(piece) <= _BLOCK else _mend_elsewhere
            yield mended(piece, unescape), end == len(text)
        elif end == len(text):
            yield " ", True
        unescape = unescape and "<" not in piece
        start = end
    if not text:
        yield "", True


def _end_of_piece(text: str, start: int) -> int:
    """Of the lines that fit into a block, or of a single longer one."""
    if len(text) - start <= _BLOCK:
        return len(text)
    end = text.rfind("\n", start, start + _BLOCK) + 1
    most = start + _LONGEST_SEGMENT
    return end or text.find("\n", start, most) + 1 or min(most, len(text))


def _mend_elsewhere(text: str, unescape: bool) -> str:
    """`mend`, in a process of its own."""
    if is_plain(text.rstrip("\n")):
        return text
    command = [sys.executable, "-c", _MEND, str(unescape)]
    done = subprocess.run(command, input=text.encode(), capture_output=True)
    if done.returncode:
        return mend(text, unescape)  # which raises what it has to
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
    """With one space for each gap, in lower case."""
    return _whitespace(text).lower()


def _whitespace(text: str) -> str:
    """With one space for each gap."""
    return " ".join(text.split())


def _canonicalize(text: str) -> str:
    """As `_lower`, without ASCII's punctuation; the underscore is a gap."""
    bare = text.strip().replace("_", " ").translate(_NO_PUNCTUATION)
    return " ".join(bare.lower().split())


def _unchanged(text: str) -> str:
    return text


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# open_clip's clean-ups of a text that is mended.
_CLEANERS: dict[Clean, Callable[[str], str]] = {
    "lower": _lower,
    "whitespace": _whitespace,
    "canonicalize": _canonicalize,
    "none": _unchanged,
}
