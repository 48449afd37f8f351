"""Text to token ids, in Rust, equal to open_clip's tokenizers: CLIP's own byte-pair encoding, and
the vocabularies that Hugging Face's `tokenizers` library reads."""

from __future__ import annotations

import gzip
import html
import json
import string
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Regex, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from clip_server.errors import ConfigurationError, ItemError, WeightsError
from clip_server.model_card import Clean, TextSpec
from clip_server.models import weights
from clip_server.models.tokens import Tokenizer, Tokens
from clip_server.models.wordpiece import WordPieceTokenizer
from clip_server.models.words import RememberedWords

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


def tokenizer_for(spec: TextSpec) -> Tokenizer:
    """The tokenizer that a model was trained with.

    Raises:
        WeightsError: its files are neither here nor on the hub, or they are damaged.
        ConfigurationError: the model asks for a clean-up that its tokenizer lacks.
    """
    if spec.tokenizer is not None:
        return HuggingFaceTokenizer(spec)
    return WordPieceTokenizer(spec) if spec.vocabulary == "chinese-bert" else ClipTokenizer(spec)


def fetch(spec: TextSpec) -> None:
    """Downloads what `tokenizer_for` needs, unless it is here.

    Raises:
        WeightsError: it is neither here nor on the hub, or the hub cannot be reached.
    """
    source = spec.tokenizer
    if source is None or Path(source).is_dir() or weights.in_cache(source, FILE):
        return
    with suppress(WeightsError):  # not every tokenizer has one
        weights.fetch(source, CONFIG)
    weights.fetch(source, FILE)


def files(spec: TextSpec) -> list[Path]:
    """The files that `fetch` made sure of; none where the vocabulary comes with the package.

    Raises:
        WeightsError: as `fetch`.
    """
    if spec.tokenizer is None:
        return []
    config = _config_file(spec.tokenizer)
    return [_file(spec.tokenizer), *([config] if config else [])]


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
        self._known = RememberedWords(self._merge)

    def tokenize(self, text: str) -> Tokens:
        """Start token, ids, end token; see `Tokenizer`."""
        if _is_plain(text):
            # Each word has an id at least, so one more than there is room for is enough.
            most = self.spec.context_length - 1
            ids = self._known.ids(text.lower().split(None, most)[:most])
        else:
            cleaned = _lower(text)
            encoding = self._bpe.encode(cleaned)
            ids = encoding.ids
            if any(special in cleaned for special in _SPECIAL):
                ids = self._restore_specials(cleaned, encoding)
        return self._framed(self._start, ids, self._end)

    def _merge(self, text: str) -> list[int]:
        ids: list[int] = self._bpe.encode(text).ids
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


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of Hugging Face's, as open_clip's HFTokenizer uses it; see `Tokenizer`."""

    def __init__(self, spec: TextSpec) -> None:
        if spec.tokenizer is None:
            raise ConfigurationError("the model names no tokenizer of Hugging Face's")
        config = _config(spec.tokenizer)
        self._encoder = _hugging_face_encoder(_file(spec.tokenizer))
        self._encoder.enable_truncation(spec.context_length)
        self._encoder.no_padding()
        pad_id = self._id_of(config.get("pad_token"))
        self.spec = spec if pad_id is None else replace(spec, pad_id=pad_id)
        self._separator = self._id_of(config.get("sep_token", _SEPARATOR))
        self._clean = _CLEANERS[spec.clean]

    def tokenize(self, text: str) -> Tokens:
        """The ids as the tokenizer's own template frames them; see `Tokenizer`."""
        encoding = self._encoder.encode(self._clean(text))
        ids = np.array(encoding.ids, dtype=np.int32)
        if self.spec.strip_separator and self._separator is not None:
            ids[ids == self._separator] = 0
        return Tokens(ids, truncated=bool(encoding.overflowing))

    def _id_of(self, token: Any) -> int | None:
        """The id of a special token as a configuration has it: a string, or a table about one."""
        content = token.get("content") if isinstance(token, dict) else token
        found: int | None = None if content is None else self._encoder.token_to_id(content)
        return found


def _hugging_face_encoder(file: Path) -> RustTokenizer:
    try:
        return RustTokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more precise
        raise WeightsError(f"{file} is damaged, or not a tokenizer ({error})") from error


def _file(source: str) -> Path:
    """The `tokenizer.json` of a folder or a hub repository."""
    if not Path(source).is_dir():
        return weights.fetch(source, FILE)
    file = Path(source) / FILE
    if not file.is_file():
        raise WeightsError(f"no {FILE} in {source}")
    return file


def _config_file(source: str) -> Path | None:
    folder = Path(source)
    file = folder / CONFIG if folder.is_dir() else weights.in_cache(source, CONFIG)
    return file if file and file.is_file() else None


def _config(source: str) -> dict[str, Any]:
    """What stands beside a tokenizer; empty where nothing does."""
    file = _config_file(source)
    if file is None:
        return {}
    try:
        config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file} is not JSON: {error}") from error
    return config


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


def _lower(text: str) -> str:
    """Mended, with one space for each gap, in lower case."""
    return _whitespace(text).lower()


def _whitespace(text: str) -> str:
    """Mended, with one space for each gap."""
    return " ".join(_mend(text).split())


def _canonicalize(text: str) -> str:
    """As `_lower`, without ASCII's punctuation; the underscore is a gap."""
    bare = _mend(text).strip().replace("_", " ").translate(_NO_PUNCTUATION)
    return " ".join(bare.lower().split())


def _mend(text: str) -> str:
    """With a broken encoding repaired and HTML unescaped."""
    if _is_plain(text):
        return text
    import ftfy  # 90 ms, and many servers only ever see ASCII

    return html.unescape(html.unescape(ftfy.fix_text(_valid(text))))


def _valid(text: str) -> str:
    """As it is, if it is Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ItemError(
            f"the text is not valid Unicode: character {error.start} is half of a surrogate "
            "pair; send the whole character"
        ) from None
    return text


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# open_clip's clean-ups.
_CLEANERS: dict[Clean, Callable[[str], str]] = {
    "lower": _lower,
    "whitespace": _whitespace,
    "canonicalize": _canonicalize,
    "none": _valid,
}


def _byte_pair_encoder(vocab_size: int) -> RustTokenizer:
    """The encoder of the first merges, as many as a vocabulary of `vocab_size` leaves."""
    alphabet = _alphabet()
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
    count = vocab_size - 2 * len(_alphabet()) - len(_SPECIAL)
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
