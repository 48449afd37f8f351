"""Text to token ids, in Rust, equal to open_clip's tokenizers: CLIP's own byte-pair encoding, and
the vocabularies that Hugging Face's `tokenizers` library reads."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from importlib import resources
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Regex, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from clip_server.errors import ConfigurationError, WeightsError
from clip_server.model_card import TextSpec, Vocabulary
from clip_server.preprocess.cleaning import cleaned, is_plain
from clip_server.preprocess.tokens import Tokenizer, Tokens
from clip_server.preprocess.word_cache import RememberedWords
from clip_server.preprocess.wordpiece import WordPieceTokenizer

# Hugging Face's files: all of a tokenizer, and, beside it, what its special tokens are called.
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
_SEPARATOR = "[SEP]"
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
# The longest text of that pattern that is not a run of like characters.
_LONGEST_LITERAL = len(_SPECIAL[0])
# The stand-in of a byte that no text holds: nothing is merged with it.
_UNUSED_SYMBOL = "\xff"
# Of a longer text no more is looked at than its first tokens need.
_SHORT = 2**12


def tokenizer_for(spec: TextSpec) -> Tokenizer:
    """The tokenizer that a model was trained with.

    spec: its `tokenizer`, if any, is a folder: whoever loads a model has its files fetched.

    Raises:
        WeightsError: the files are not in the folder, or they are damaged.
        ConfigurationError: the model asks for a vocabulary or a clean-up that we lack.
    """
    if spec.tokenizer is not None:
        return HuggingFaceTokenizer(spec)
    if spec.vocabulary not in _BUNDLED:
        known = ", ".join(_BUNDLED)
        raise ConfigurationError(f"vocabulary {spec.vocabulary!r} is not one of {known}")
    return _BUNDLED[spec.vocabulary](spec)


class ClipTokenizer(Tokenizer):
    """CLIP's own tokenizer; see `Tokenizer`. A text that is cut ends in the end token all the
    same, and the empty text gives start and end.

    Pairs are never merged across a space, so the ids of what stands between two are remembered,
    which is ten times as fast as merging it anew.
    """

    def __init__(self, spec: TextSpec) -> None:
        if spec.clean != "lower":
            raise ConfigurationError(f"CLIP's own tokenizer cleans as 'lower', not {spec.clean!r}")
        self.spec = spec
        self._start, self._end = spec.vocab_size - 2, spec.vocab_size - 1
        self._bpe = _byte_pair_encoder(spec.vocab_size)
        self._bare_bpe = RustTokenizer(self._bpe.model)
        self._symbols = _byte_symbols()
        self._longest = max(len(left + right) for left, right in merges(spec.vocab_size))
        self._known = RememberedWords(self._merge)

    def tokenize(self, text: str) -> Tokens:
        """Start token, ids, end token; see `Tokenizer`."""
        # One more id than there is room for tells that the text was longer. Each word has one.
        most = self.spec.context_length - 1
        beginning = text[:_SHORT]
        if is_plain(beginning):
            words = beginning.lower().split(None, most)
            if len(words) > most or len(text) <= _SHORT:
                return self._framed(self._start, self._known.ids(words[:most]), self._end)
        found = (self._first_ids(*each, most) for each in cleaned(text, "lower"))
        ids = next((ids for ids in found if ids is not None), [])
        return self._framed(self._start, ids, self._end)

    def _first_ids(self, text: str, is_all: bool, count: int) -> list[int] | None:
        """The first ids of a clean text, `count` of them or more; fewer only if it has no more.
        None where they depend on what follows a text that is not all of it."""
        size = _SHORT
        while True:
            part, complete = text[:size], is_all and size >= len(text)
            words = self._words(part)
            if complete:
                return list(chain.from_iterable(ids for _, _, ids in words))
            # A match of the pattern that ends before these characters is not changed by others.
            settled = len(part) - _LONGEST_LITERAL
            found = list(chain.from_iterable(ids for _, end, ids in words[:-1] if end <= settled))
            if len(found) < count and words and words[-1][0] < settled:
                last = part[words[-1][0] : settled]
                found += self._first_of_word(last, count - len(found))
            if len(found) >= count:
                return found
            if size >= len(text):
                return None
            size *= 2

    def _first_of_word(self, word: str, count: int) -> list[int]:
        """The first ids of every word that begins like this one; empty where they differ.

        No merge goes across the end of a token, so the tokens up to there are those of the text
        up to there. One ends somewhere within the length of the longest: if all the ends there
        could be give the same first tokens, these are right however the word goes on.
        """
        symbols = "".join(map(self._symbols.__getitem__, word.encode()))
        for size in (_SHORT // 4, len(symbols)):
            ends = range(min(size, len(symbols)) - self._longest, min(size, len(symbols)))
            first, *others = (self._merged(symbols[: max(end, 0)])[:count] for end in ends)
            if len(first) == count and all(other == first for other in others):
                return first
        return []

    def _merged(self, symbols: str) -> list[int]:
        """The ids of symbols that do not end their word."""
        ids: list[int] = self._bare_bpe.encode(symbols + _UNUSED_SYMBOL).ids
        return ids[:-1]

    def _words(self, text: str) -> list[tuple[int, int, list[int]]]:
        """Where each match of the pattern begins and ends, and its ids. One that spells a special
        token has its id, as in open_clip."""
        specials = dict(zip(_SPECIAL, (self._start, self._end), strict=True))
        encoding = self._bpe.encode(text)
        words = []
        pieces = zip(encoding.word_ids, encoding.ids, encoding.offsets, strict=True)
        for _, group in groupby(pieces, key=lambda piece: piece[0]):
            word = list(group)
            start, end = word[0][2][0], word[-1][2][1]
            special = specials.get(text[start:end])
            words.append(
                (start, end, [piece[1] for piece in word] if special is None else [special])
            )
        return words

    def _merge(self, text: str) -> list[int]:
        ids: list[int] = self._bpe.encode(text).ids
        return ids


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of Hugging Face's, as open_clip's HFTokenizer uses it; see `Tokenizer`."""

    def __init__(self, spec: TextSpec) -> None:
        if spec.tokenizer is None:
            raise ConfigurationError("the model names no tokenizer of Hugging Face's")
        folder = Path(spec.tokenizer)
        config = _config(folder / CONFIG)
        self._encoder = _hugging_face_encoder(folder / FILE)
        self._encoder.enable_truncation(spec.context_length)
        self._encoder.no_padding()
        pad_id = self._id_of(config.get("pad_token"))
        self.spec = spec if pad_id is None else replace(spec, pad_id=pad_id)
        self._separator = self._id_of(config.get("sep_token", _SEPARATOR))

    def tokenize(self, text: str) -> Tokens:
        """The ids as the tokenizer's own template frames them; see `Tokenizer`."""
        beginnings = cleaned(text, self.spec.clean)
        found = (self._first(*each) for each in beginnings)
        encoding = next(encoding for encoding in found if encoding is not None)
        ids = np.array(encoding.ids, dtype=np.int32)
        if self.spec.strip_separator and self._separator is not None:
            ids[ids == self._separator] = 0
        return Tokens(ids, truncated=bool(encoding.overflowing))

    def _first(self, text: str, is_all: bool) -> Encoding | None:
        """What a clean text gives, cut to the context; None where that depends on what follows.

        Tokens of byte pairs and of Unigram up to an end of one are those of the text up to there;
        see `ClipTokenizer._first_of_word`.
        """
        size = _SHORT
        while size < len(text):
            ends = range(size - self._longest, size)
            first, *others = (self._encoder.encode(text[:end]) for end in ends)
            if first.overflowing and all(each.ids == first.ids for each in others):
                return first
            size *= 2
        return self._encoder.encode(text) if is_all else None

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self._encoder.get_vocab()))

    def _id_of(self, token: Any) -> int | None:
        """The id of a special token as a configuration has it: a string, or a table about one."""
        content = token.get("content") if isinstance(token, dict) else token
        found: int | None = None if content is None else self._encoder.token_to_id(content)
        return found


def _hugging_face_encoder(file: Path) -> RustTokenizer:
    if not file.is_file():
        raise WeightsError(f"no {file.name} in {file.parent}")
    try:
        return RustTokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more precise
        raise WeightsError(f"{file} is damaged, or not a tokenizer ({error})") from error


def _config(file: Path) -> dict[str, Any]:
    """The configuration of a tokenizer; empty if there is none."""
    if not file.is_file():
        return {}
    try:
        config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file} is not JSON: {error}") from error
    return config


# The tokenizers whose vocabularies come with the package.
_BUNDLED: dict[Vocabulary, Callable[[TextSpec], Tokenizer]] = {
    "clip": ClipTokenizer,
    "chinese-bert": WordPieceTokenizer,
}


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


def _byte_pair_encoder(vocab_size: int) -> RustTokenizer:
    """The encoder of the first merges, as many as a vocabulary of `vocab_size` leaves."""
    alphabet = _byte_symbols().values()
    symbols = [*alphabet, *(symbol + _END_OF_WORD for symbol in alphabet)]
    pairs = merges(vocab_size)
    symbols += [left + right for left, right in pairs]
    encoder = RustTokenizer(
        models.BPE(
            vocab={symbol: index for index, symbol in enumerate(symbols)},
            merges=pairs,
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


def merges(vocab_size: int) -> list[tuple[str, str]]:
    """The pairs of symbols that CLIP's own vocabulary merges, commonest first: as many as one of
    `vocab_size` has room for beside the bytes and the special tokens."""
    count = vocab_size - 2 * 256 - len(_SPECIAL)
    packed = resources.files(__package__).joinpath(_VOCABULARY).read_bytes()
    # The first line is a version; each later one is a pair of symbols, commonest first.
    lines = gzip.decompress(packed).decode().split("\n")[1 : count + 1]
    return [(left, right) for left, _, right in (line.partition(" ") for line in lines)]


def _byte_symbols() -> dict[int, str]:
    """The printable stand-ins for the 256 bytes, in the order of CLIP's vocabulary.

    Bytes that print as themselves come first; the others follow as U+0100 and on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [code for code in range(256) if code not in printable]
    stand_ins = {code: chr(0x100 + n) for n, code in enumerate(others)}
    return {code: chr(code) for code in printable} | stand_ins
