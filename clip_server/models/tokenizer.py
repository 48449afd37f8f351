"""Text to token ids: CLIP's byte-pair encoding in Rust, equal to open_clip's tokenizer."""

from __future__ import annotations

import gzip
import html
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Regex, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from clip_server.errors import ItemError
from clip_server.models.card import TextSpec

_VOCABULARY = "data/bpe_simple_vocab_16e6.txt.gz"
_SPECIAL = ("<start_of_text>", "<end_of_text>")
# The end-of-word form of a symbol is an entry of its own.
_END_OF_WORD = "</w>"
# CLIP matches this pattern ignoring case on lower-cased text. Spelled out, that adds the long
# s, which folds to s, and takes away U+0345, which folds to a letter but is none.
_PATTERN = (
    r"<[sſ]tart_of_text>|<end_of_text>|'[sſ]|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\x{0345}]+"
)
# Words whose ids are remembered, and the characters that one may have: some 20 MB at most.
_REMEMBERED_WORDS, _REMEMBERED_LENGTH = 2**16, 32


class Tokenizer:
    """CLIP's tokenizer for one model. Safe to call from several threads.

    Pairs are never merged across a space, so the ids of what stands between two are remembered:
    of common text nearly every word is known, which is ten times as fast as merging it anew.
    """

    def __init__(self, spec: TextSpec) -> None:
        self.spec = spec
        self._start, self._end = spec.vocab_size - 2, spec.vocab_size - 1
        self._bpe = _byte_pair_encoder(spec.vocab_size)
        self._remembered = lru_cache(_REMEMBERED_WORDS)(self._merge)

    def encode(self, text: str) -> NDArray[np.int32]:
        """The ids of one text: start token, ids, end token; [l] int32, not padded.

        A text longer than the context is cut, and its last id is then the end token. The
        empty text gives start and end.

        Raises:
            ItemError: the text holds half of a surrogate pair, so it is not Unicode.
        """
        most = self.spec.context_length - 2  # two places go to the start and the end token
        if _is_plain(text):
            ids = self._look_up(text, most)
        else:
            cleaned = _clean(text)
            encoding = self._bpe.encode(cleaned)
            ids = encoding.ids
            if any(special in cleaned for special in _SPECIAL):
                ids = self._restore_specials(cleaned, encoding)
        return np.array([self._start, *ids[:most], self._end], dtype=np.int32)

    def _merge(self, text: str) -> list[int]:
        ids: list[int] = self._bpe.encode(text).ids
        return ids

    def _look_up(self, text: str, most: int) -> list[int]:
        """The ids of a plain text, or at least the first `most`."""
        ids: list[int] = []
        for word in text.lower().split(None, most)[:most]:  # each has an id at least
            ids += self._remembered(word) if len(word) <= _REMEMBERED_LENGTH else self._merge(word)
        return ids

    def _restore_specials(self, text: str, encoding: Encoding) -> list[int]:
        """Gives words that spell a special token its id, as open_clip does."""
        specials = dict(zip(_SPECIAL, (self._start, self._end), strict=True))
        ids: list[int] = []
        pieces = zip(encoding.word_ids, encoding.ids, encoding.offsets, strict=True)
        for _, group in groupby(pieces, key=lambda piece: piece[0]):
            word = list(group)
            spelling = text[word[0][2][0] : word[-1][2][1]]
            special = specials.get(spelling)
            ids += [piece[1] for piece in word] if special is None else [special]
        return ids


def pad(rows: Sequence[NDArray[np.int32]], spec: TextSpec) -> NDArray[np.int32]:
    """Encoded texts as one batch, [B, L] int32.

    L is the longest row where the model allows trimming, else the context length.
    """
    fixed = spec.trim == "fixed"
    length = spec.context_length if fixed else max((len(row) for row in rows), default=0)
    batch = np.full((len(rows), length), spec.pad_id, dtype=np.int32)
    for target, row in zip(batch, rows, strict=True):
        target[: len(row)] = row
    return batch


def _is_plain(text: str) -> bool:
    """Whether the clean-up changes nothing but spaces and case, and no special token is spelled."""
    return text.isascii() and text.isprintable() and "&" not in text and "<" not in text


def _clean(text: str) -> str:
    """open_clip's clean-up: mend the encoding, unescape HTML, one space, lower case."""
    return " ".join(html.unescape(html.unescape(_mend(text))).split()).lower()


def _mend(text: str) -> str:
    import ftfy  # 90 ms, and many servers only ever see ASCII

    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ItemError(
            f"the text is not valid Unicode: character {error.start} is half of a surrogate "
            "pair; send the whole character"
        ) from None
    mended: str = ftfy.fix_text(text)
    return mended


def _byte_pair_encoder(vocab_size: int) -> RustTokenizer:
    """The encoder of the first merges, as many as a vocabulary of `vocab_size` leaves."""
    alphabet = _alphabet()
    symbols = [*alphabet, *(symbol + _END_OF_WORD for symbol in alphabet)]
    merges = _merges(vocab_size - len(symbols) - len(_SPECIAL))
    symbols += [left + right for left, right in merges]
    encoder = RustTokenizer(
        models.BPE(
            vocab={symbol: index for index, symbol in enumerate(symbols)},
            merges=merges,
            end_of_word_suffix=_END_OF_WORD,
        )
    )
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return encoder


def _merges(count: int) -> list[tuple[str, str]]:
    packed = resources.files(__package__).joinpath(_VOCABULARY).read_bytes()
    # The first line is a version; each later one is a pair of symbols, commonest first.
    lines = gzip.decompress(packed).decode().split("\n")[1 : count + 1]
    return [(left, right) for left, _, right in (line.partition(" ") for line in lines)]


def _alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes, in the order of CLIP's vocabulary.

    Bytes that print as themselves come first; the others follow as U+0100 and on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]
