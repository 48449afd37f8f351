"""Tokenizers equal to open_clip's, in Rust: CLIP's own byte-pair encoding, and the vocabularies
that Hugging Face's `tokenizers` library reads."""

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
from clip_server.preprocess.cleaning import cleaned_prefixes, is_plain
from clip_server.preprocess.tokens import Tokenizer, Tokens
from clip_server.preprocess.word_cache import WordTokenCache
from clip_server.preprocess.wordpiece import WordPieceTokenizer

# Hugging Face's files: the tokenizer itself, and the names of its special tokens.
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
_SEPARATOR = "[SEP]"
_VOCABULARY = "data/bpe_simple_vocab_16e6.txt.gz"
_SPECIAL = ("<start_of_text>", "<end_of_text>")
# Suffix of a symbol that ends its word.
_END_OF_WORD = "</w>"
# CLIP matches this pattern case-insensitively on lower-cased text. Spelled out, that adds the long
# s, which folds to s, and removes U+0345, which folds to a letter but is not one.
_PATTERN = (
    r"<[sſ]tart_of_text>|<end_of_text>|'[sſ]|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\x{0345}]+"
)
# The longest literal of that pattern.
_MAX_LITERAL_LENGTH = len(_SPECIAL[0])
# The symbol of a byte that no text holds: it is merged with no other.
_UNUSED_SYMBOL = "\xff"
# Characters of a longer text are read only as far as its first tokens need.
_SHORT = 2**12


def tokenizer_for(spec: TextSpec) -> Tokenizer:
    """Returns the tokenizer that a model was trained with.

    spec: its `tokenizer`, if any, is a local folder: the files were fetched with the model.

    Raises:
        WeightsError: the files are missing or damaged.
        ConfigurationError: the vocabulary or clean-up is not supported.
    """
    if spec.tokenizer is not None:
        return HuggingFaceTokenizer(spec)
    if spec.vocabulary not in _BUNDLED:
        known = ", ".join(_BUNDLED)
        raise ConfigurationError(f"vocabulary {spec.vocabulary!r} is not one of {known}")
    return _BUNDLED[spec.vocabulary](spec)


class ClipTokenizer(Tokenizer):
    """CLIP's own tokenizer; see `Tokenizer`. A truncated text ends in the end token too, and the
    empty text is start and end.

    Pairs are never merged across a space, so the ids of each word are cached: a cached word is ten
    times as fast as merging its symbols again.
    """

    def __init__(self, spec: TextSpec) -> None:
        if spec.clean != "lower":
            raise ConfigurationError(f"CLIP's own tokenizer cleans as 'lower', not {spec.clean!r}")
        self.spec = spec
        self._start, self._end = spec.vocab_size - 2, spec.vocab_size - 1
        pairs = merges(spec.vocab_size)
        self._bpe = _byte_pair_encoder(pairs)
        self._bare_bpe = RustTokenizer(self._bpe.model)
        self._symbols = _byte_symbols()
        self._max_symbol_length = max(len(left + right) for left, right in pairs)
        self._word_ids = WordTokenCache(self._merge)

    def tokenize(self, text: str) -> Tokens:
        """Returns start token, ids, end token; see `Tokenizer`."""
        # One id more than fits shows that the text was longer. Each word has at least one.
        limit = self.spec.context_length - 1
        beginning = text[:_SHORT]
        if is_plain(beginning):
            words = beginning.lower().split(None, limit)
            if len(words) > limit or len(text) <= _SHORT:
                return self._with_special_tokens(
                    self._start, self._word_ids.ids(words[:limit]), self._end
                )
        found = (self._first_ids(*each, limit) for each in cleaned_prefixes(text, "lower"))
        ids = next((ids for ids in found if ids is not None), [])
        return self._with_special_tokens(self._start, ids, self._end)

    def _first_ids(self, text: str, is_all: bool, count: int) -> list[int] | None:
        """The first `count` ids of a clean text, or more; fewer only if it has no more.

        None if the text is incomplete and the ids depend on what follows it.
        """
        size = _SHORT
        while True:
            part, complete = text[:size], is_all and size >= len(text)
            words = self._words(part)
            if complete:
                return list(chain.from_iterable(ids for _, _, ids in words))
            # A match of the pattern that ends before the last few characters is final.
            settled = len(part) - _MAX_LITERAL_LENGTH
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
        """The first ids shared by all words that start like this one; empty if they differ.

        No merge crosses the end of a token, so the tokens up to an end are those of the text up to
        it. One token ends within the length of the longest: if all candidate ends give the same
        first tokens, these are final however the word continues.
        """
        symbols = "".join(map(self._symbols.__getitem__, word.encode()))
        for size in (_SHORT // 4, len(symbols)):
            ends = range(min(size, len(symbols)) - self._max_symbol_length, min(size, len(symbols)))
            first, *others = (self._merged(symbols[: max(end, 0)])[:count] for end in ends)
            if len(first) == count and all(other == first for other in others):
                return first
        return []

    def _merged(self, symbols: str) -> list[int]:
        """The ids of symbols in the middle of a word."""
        ids: list[int] = self._bare_bpe.encode(symbols + _UNUSED_SYMBOL).ids
        return ids[:-1]

    def _words(self, text: str) -> list[tuple[int, int, list[int]]]:
        """Start, end and ids of each match of the pattern. A match that spells a special token has
        its id, as in open_clip."""
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
    """A Hugging Face tokenizer, used like open_clip's HFTokenizer; see `Tokenizer`."""

    def __init__(self, spec: TextSpec) -> None:
        if spec.tokenizer is None:
            raise ConfigurationError("the model names no Hugging Face tokenizer")
        folder = Path(spec.tokenizer)
        config = _config(folder / CONFIG)
        self._encoder = _hugging_face_encoder(folder / FILE)
        self._encoder.enable_truncation(spec.context_length)
        self._encoder.no_padding()
        pad_id = self._id_of(config.get("pad_token"))
        self.spec = spec if pad_id is None else replace(spec, pad_id=pad_id)
        self._separator = self._id_of(config.get("sep_token", _SEPARATOR))

    def tokenize(self, text: str) -> Tokens:
        """Returns the ids in the tokenizer's own template; see `Tokenizer`."""
        prefixes = cleaned_prefixes(text, self.spec.clean)
        found = (self._first(*each) for each in prefixes)
        encoding = next(encoding for encoding in found if encoding is not None)
        ids = np.array(encoding.ids, dtype=np.int32)
        if self.spec.strip_separator and self._separator is not None:
            ids[ids == self._separator] = 0
        return Tokens(ids, truncated=bool(encoding.overflowing))

    def _first(self, text: str, is_all: bool) -> Encoding | None:
        """Encodes a clean text, truncated to the context; None if that depends on what follows.

        The tokens of byte-pair and Unigram models up to the end of one are those of the text up to
        there; see `ClipTokenizer._first_of_word`.
        """
        size = _SHORT
        while size < len(text):
            ends = range(size - self._max_token_length, size)
            first, *others = (self._encoder.encode(text[:end]) for end in ends)
            if first.overflowing and all(each.ids == first.ids for each in others):
                return first
            size *= 2
        return self._encoder.encode(text) if is_all else None

    @cached_property
    def _max_token_length(self) -> int:
        """Number of characters of the longest token."""
        return max(map(len, self._encoder.get_vocab()))

    def _id_of(self, token: Any) -> int | None:
        """The id of a special token, which a configuration gives as a string or as a table."""
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
    """Reads the configuration of a tokenizer; empty if there is none."""
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
    """Pads token ids to one batch, [B, L] int32.

    L is the length of the longest text if the model allows trimming, else the context length.
    """
    fixed = spec.trim == "fixed"
    length = spec.context_length if fixed else max((len(row) for row in rows), default=0)
    batch = np.full((len(rows), length), spec.pad_id, dtype=np.int32)
    for target, row in zip(batch, rows, strict=True):
        target[: len(row)] = row
    return batch


def _byte_pair_encoder(pairs: list[tuple[str, str]]) -> RustTokenizer:
    """CLIP's encoder with the merges of a vocabulary."""
    alphabet = _byte_symbols().values()
    symbols = [*alphabet, *(symbol + _END_OF_WORD for symbol in alphabet)]
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
    """Pairs of symbols that CLIP merges, commonest first: as many as fit into a vocabulary of
    `vocab_size`, next to the bytes and the special tokens."""
    count = vocab_size - 2 * 256 - len(_SPECIAL)
    packed = resources.files(__package__).joinpath(_VOCABULARY).read_bytes()
    # The first line is a version; each later one is a pair of symbols, commonest first.
    lines = gzip.decompress(packed).decode().split("\n")[1 : count + 1]
    return [(left, right) for left, _, right in (line.partition(" ") for line in lines)]


def _byte_symbols() -> dict[int, str]:
    """The printable symbols of the 256 bytes, in the order of CLIP's vocabulary.

    Printable bytes come first, as themselves; the others follow, as U+0100 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [code for code in range(256) if code not in printable]
    symbols = {code: chr(0x100 + n) for n, code in enumerate(others)}
    return {code: chr(code) for code in printable} | symbols
