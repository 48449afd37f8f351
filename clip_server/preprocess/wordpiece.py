"""Chinese BERT's WordPiece tokenizer, equal to cn_clip's.

A text is split into words: every Chinese character and every punctuation mark is a word, other
letters form a word up to the next space, in lower case and without accents. A word is split into
the longest pieces of it that are in the vocabulary.

Rust's tokenizer of this kind uses another version of Unicode than Python, so words are split here;
the ids of nearly all are cached.
"""

from __future__ import annotations

import gzip
import unicodedata
from collections.abc import Callable
from importlib import resources

from clip_server.model_card import TextSpec
from clip_server.preprocess.tokens import Tokenizer, Tokens
from clip_server.preprocess.word_cache import WordTokenCache

_VOCABULARY = "data/chinese_bert_vocab.txt.gz"
# Prefix of a piece that does not start its word.
_CONTINUATION = "##"
_MAX_WORD_LENGTH = 200
# Characters split per step: the beginning of a long text is enough.
_SLICE = 2**13
# Characters beyond are rare, and caching all of them would take much memory.
_MAX_CACHED_CODE = 2**16
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
        self._word_ids = WordTokenCache(self._pieces)

    def tokenize(self, text: str) -> Tokens:
        """Returns [CLS], ids, [SEP]; see `Tokenizer`."""
        # Each word has at least one id, so one word more than fits is enough.
        ids = self._word_ids.ids(_words(text, self.spec.context_length - 1))
        return self._with_special_tokens(self._start, ids, self._end)

    def _pieces(self, word: str) -> list[int]:
        """The ids of the longest pieces, from the left; [UNK] alone for a word that is too long or
        has a part that is in no piece."""
        if len(word) > _MAX_WORD_LENGTH:
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
        """The end of the longest piece that starts at `start`; None if there is none."""
        ends = range(len(word), start, -1)
        return next((end for end in ends if _piece(word, start, end) in self._ids), None)


def _piece(word: str, start: int, end: int) -> str:
    return (_CONTINUATION if start else "") + word[start:end]


class _Table(dict[int, "str | None"]):
    """Replacements for `str.translate`, by character code; computed on first use."""

    def __init__(self, replacement: Callable[[str], str | None]) -> None:
        super().__init__()
        self._replacement = replacement

    def __missing__(self, code: int) -> str | None:
        result = self._replacement(chr(code))
        if code < _MAX_CACHED_CODE:
            self[code] = result
        return result


def _space_out_chinese(char: str) -> str | None:
    """Removes control characters, and puts spaces around Chinese ones."""
    category = unicodedata.category(char)
    if char in "\t\n\r" or category == "Zs":
        return " "
    if char in "\0\ufffd" or category in ("Cc", "Cf"):
        return None
    return f" {char} " if any(ord(char) in block for block in _CHINESE) else char


def _space_out_punctuation(char: str) -> str | None:
    """Removes accents, and puts spaces around punctuation marks."""
    category = unicodedata.category(char)
    if category == "Mn":
        return None
    # BERT counts what Unicode calls symbols, such as $ and ^, as ASCII punctuation.
    mark = "!" <= char <= "~" and not char.isalnum()
    return f" {char} " if mark or category.startswith("P") else char


_CHINESE_SPACING = _Table(_space_out_chinese)
_PUNCTUATION_SPACING = _Table(_space_out_punctuation)


def _words(text: str, limit: int) -> list[str]:
    """The first `limit` words of a text, or all of them."""
    words: list[str] = []
    unfinished = ""  # may continue in the next slice
    for start in range(0, len(text), _SLICE):
        spaced = unfinished + text[start : start + _SLICE].translate(_CHINESE_SPACING)
        complete, _, unfinished = spaced.rpartition(" ")
        words += _split(complete)
        if len(unfinished) > _SLICE:
            *found, unfinished = _split(unfinished) or [""]
            words += found
            unfinished = unfinished[: _MAX_WORD_LENGTH + 1]  # [UNK], however it continues
        if len(words) >= limit:
            break
    return [*words, *_split(unfinished)][:limit]


def _split(spaced: str) -> list[str]:
    """Splits a text whose Chinese characters have spaces around them into words."""
    return unicodedata.normalize("NFD", spaced.lower()).translate(_PUNCTUATION_SPACING).split()


def vocabulary() -> dict[str, int]:
    """Reads the ids of all pieces."""
    packed = resources.files(__package__).joinpath(_VOCABULARY).read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")
    return {line.strip(): index for index, line in enumerate(lines) if line.strip()}
