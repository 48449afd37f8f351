"""Text to token ids as Chinese BERT does it, equal to cn_clip's tokenizer.

A text becomes words: every Chinese character and every punctuation mark is one, other letters
are one up to the next space, in lower case and without accents. A word becomes the longest
pieces of it that the vocabulary has.

Rust's tokenizer of this kind knows another Unicode than Python's, so the words are made here;
nearly all are looked up, in a dictionary.
"""

from __future__ import annotations

import gzip
import unicodedata
from collections.abc import Callable
from importlib import resources

from clip_server.model_card import TextSpec
from clip_server.preprocess.tokens import Tokenizer, Tokens
from clip_server.preprocess.word_cache import RememberedWords

_VOCABULARY = "data/chinese_bert_vocab.txt.gz"
# A piece that does not begin its word.
_CONTINUED = "##"
_LONGEST_WORD = 200
# Characters that are made words at once: of a long text the first are enough.
_SLICE = 2**13
# Characters beyond are rare, and would take much memory if all were remembered.
_REMEMBERED_CODES = 2**16
_CHINESE = (
    range(0x3400, 0x4DC0),
    range(0x4E00, 0xA000),
    range(0xF900, 0xFB00),
    range(0x20000, 0x2A6E0),
    range(0x2A700, 0x2CEB0),
    range(0x2F800, 0x2FA20),
)


class WordPieceTokenizer(Tokenizer):
    """Chinese BERT's tokenizer for one model. Safe to call from several threads."""

    def __init__(self, spec: TextSpec) -> None:
        self.spec = spec
        self._ids = vocabulary()
        self._start, self._end = self._ids["[CLS]"], self._ids["[SEP]"]
        self._unknown = self._ids["[UNK]"]
        self._known = RememberedWords(self._pieces)

    def tokenize(self, text: str) -> Tokens:
        """[CLS], ids, [SEP]; see `Tokenizer`."""
        # Each word has an id at least, so one more than there is room for is enough.
        ids = self._known.ids(_words(text, self.spec.context_length - 1))
        return self._framed(self._start, ids, self._end)

    def _pieces(self, word: str) -> list[int]:
        """The longest pieces, from the left; [UNK] alone where a part is in none, or for a word
        that is too long."""
        if len(word) > _LONGEST_WORD:
            return [self._unknown]
        found: list[int] = []
        start = 0
        while start < len(word):
            end = self._end_of_piece(word, start)
            if end is None:
                return [self._unknown]
            found.append(self._ids[_piece(word, start, end)])
            start = end
        return found

    def _end_of_piece(self, word: str, start: int) -> int | None:
        """Where the longest piece from `start` ends."""
        ends = range(len(word), start, -1)
        return next((end for end in ends if _piece(word, start, end) in self._ids), None)


def _piece(word: str, start: int, end: int) -> str:
    return (_CONTINUED if start else "") + word[start:end]


class _Table(dict[int, "str | None"]):
    """For `str.translate`: what a character becomes, by its code; found out when first met."""

    def __init__(self, replaced: Callable[[str], str | None]) -> None:
        super().__init__()
        self._replaced = replaced

    def __missing__(self, code: int) -> str | None:
        result = self._replaced(chr(code))
        if code < _REMEMBERED_CODES:
            self[code] = result
        return result


def _spaced(char: str) -> str | None:
    """Control characters go, and Chinese ones stand apart."""
    category = unicodedata.category(char)
    if char in "\t\n\r" or category == "Zs":
        return " "
    if char in "\0\ufffd" or category in ("Cc", "Cf"):
        return None
    return f" {char} " if any(ord(char) in block for block in _CHINESE) else char


def _split(char: str) -> str | None:
    """Accents go, and punctuation marks stand apart."""
    category = unicodedata.category(char)
    if category == "Mn":
        return None
    # BERT's idea of ASCII punctuation holds what Unicode calls symbols, such as $ and ^.
    mark = "!" <= char <= "~" and not char.isalnum()
    return f" {char} " if mark or category.startswith("P") else char


_SPACED, _SPLIT = _Table(_spaced), _Table(_split)


def _words(text: str, most: int) -> list[str]:
    """The first `most` words of a text, or all of them."""
    words: list[str] = []
    begun = ""  # what may go on in the next slice
    for start in range(0, len(text), _SLICE):
        spaced = begun + text[start : start + _SLICE].translate(_SPACED)
        complete, _, begun = spaced.rpartition(" ")
        words += _parted(complete)
        if len(begun) > _SLICE:
            *found, begun = _parted(begun) or [""]
            words += found
            begun = begun[: _LONGEST_WORD + 1]  # beyond, it does not matter how it goes on
        if len(words) >= most:
            break
    return [*words, *_parted(begun)][:most]


def _parted(spaced: str) -> list[str]:
    """The words of a text with spaces around what is Chinese."""
    return unicodedata.normalize("NFD", spaced.lower()).translate(_SPLIT).split()


def vocabulary() -> dict[str, int]:
    """The pieces that words are made of, with their ids."""
    packed = resources.files(__package__).joinpath(_VOCABULARY).read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")
    return {line.strip(): index for index, line in enumerate(lines) if line.strip()}
