"""The tokenizer equals open_clip's, on many scripts and on what people paste."""

from __future__ import annotations

import random
import string
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from clip_server.errors import ItemError
from clip_server.model_card import TextSpec
from clip_server.preprocess import cleaning
from clip_server.preprocess.tokenizer import pad, tokenizer_for

SPEC = TextSpec()
START, END = SPEC.vocab_size - 2, SPEC.vocab_size - 1

# Ranges of code points by script, from which words are drawn.
SCRIPTS = {
    "ascii": [(0x20, 0x7F)],
    "latin": [(0x61, 0x7B), (0xC0, 0x250), (0x1E00, 0x1F00)],
    "greek and cyrillic": [(0x370, 0x400), (0x400, 0x530)],
    "hebrew and arabic": [(0x590, 0x600), (0x600, 0x700), (0xFB50, 0xFE00)],
    "indic": [(0x900, 0x980), (0x980, 0xA00), (0xB80, 0xC00)],
    "thai": [(0xE00, 0xE80)],
    "cjk": [(0x3040, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0xFF00, 0xFFF0)],
    "emoji": [(0x1F300, 0x1F700), (0x1F900, 0x1FA00), (0x2600, 0x27C0), (0x1F1E6, 0x1F200)],
    "symbols": [(0x2000, 0x2070), (0x20A0, 0x20C0), (0x2100, 0x2200), (0x2460, 0x2500)],
    "combining": [(0x61, 0x7B), (0x300, 0x370)],
    "control": [(0x00, 0x21), (0x7F, 0xA1), (0xFEFF, 0xFF00)],
    "anything": [(0x00, 0xD800), (0xE000, 0x30000)],
}
SNIPPETS = [
    *("<start_of_text>", "<end_of_text>", "<START_OF_TEXT>", "<\u017ftart_of_text>"),
    *("<|startoftext|>", "<|endoftext|>", "!<end_of_text>", "a<end_of_text>b"),
    *("&amp;", "&amp;amp;lt;", "&eacute;", "&EACUTE;", "&#x27;", "&#128512;", "&#xD800;", "&nope;"),
    *("it's", "we'LL", "they\u2019re", "i'\u017f", "\u2018quoted\u2019", "d'accord", "3.14"),
    *("voil\u00c3\u00a0", "sch\u00c3\u00b6n", "\u00e2\u20ac\u0153mojibake\u00e2\u20ac\u009d"),
    *("\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd", "\u2764\ufe0f"),
    *("e\u0301", "\ufb01n", "\u0130stanbul", "stra\u00dfe", "\u1e9e", "\u212a", "a\u0345b"),
    *("\x1b[31mred\x1b[0m", "a\r\nb", "tab\tbed", "\u2028", "\u3000", "\x00", "\ufeff", "\x85"),
    *("http://example.org/?q=1&lt=2", "user@example.org", "#tag", "snake_case", "<b>bold</b>"),
]


def corpus(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [fuzzed_text(rng) for _ in range(count)]


def fuzzed_text(rng: random.Random) -> str:
    scripts = rng.sample(list(SCRIPTS), k=rng.choice([1, 1, 1, 2, 3]))
    words = []
    for _ in range(rng.choice([1, 2, 5, 10, 40])):
        if rng.random() < 0.15:
            words.append(rng.choice(SNIPPETS))
        else:
            words.append(fuzzed_word(rng, SCRIPTS[rng.choice(scripts)]))
    return rng.choice([" ", " ", " ", "", "  ", "-", ", "]).join(words)


def fuzzed_word(rng: random.Random, ranges: list[tuple[int, int]]) -> str:
    letters = (chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(1, 9)))
    # What Python's Unicode has not yet assigned, other libraries may already know as a letter.
    return "".join(letter for letter in letters if unicodedata.category(letter) != "Cn")


@pytest.mark.parametrize("count", [1000, pytest.param(6000, marks=pytest.mark.slow)])
def test_equals_open_clip_on_a_fuzzed_corpus(count: int) -> None:
    open_clip = pytest.importorskip("open_clip")
    ours, theirs = tokenizer_for(SPEC), open_clip.tokenizer.SimpleTokenizer()
    texts = ["", " ", *SNIPPETS, *corpus(count)]
    expected = theirs(texts).numpy()
    for text, row in zip(texts, expected, strict=True):
        found = ours.encode(text)
        np.testing.assert_array_equal(row[: len(found)], found, err_msg=repr(text))
        assert not row[len(found) :].any(), text


def test_special_tokens_spelled_in_a_text() -> None:
    tokens = tokenizer_for(SPEC).encode("a <start_of_text> b<end_of_text>").tolist()
    assert tokens == [START, 320, START, 321, END, END]


def test_empty_text_is_start_and_end() -> None:
    tokens = tokenizer_for(SPEC).encode(" \n")
    assert tokens.tolist() == [START, END]
    assert tokens.dtype == np.int32


def test_a_long_text_is_cut_and_ends_with_the_end_token() -> None:
    tokens = tokenizer_for(SPEC).encode("cat " * 1000)
    assert len(tokens) == SPEC.context_length
    assert (tokens[0], tokens[-1]) == (START, END)
    assert set(tokens[1:-1].tolist()) == {2368}


def test_a_smaller_vocabulary_keeps_the_first_merges() -> None:
    small, text = TextSpec(vocab_size=8192), "a photograph of an archaeopteryx \U0001f995"
    tokens = tokenizer_for(small).encode(text)
    assert (tokens[0], tokens[-1]) == (8190, 8191)
    assert tokens[1:-1].max() < 8190
    # Ids do not move: what both vocabularies know is the same.
    assert tokens[1] == tokenizer_for(SPEC).encode(text)[1]


@pytest.mark.parametrize("text", ["\ud83d", "smile \ude00", "\U0001f600 \udfff"])
def test_half_a_surrogate_pair_is_an_item_error(text: str) -> None:
    with pytest.raises(ItemError, match="surrogate"):
        tokenizer_for(SPEC).encode(text)


def test_padding_goes_to_the_longest_where_the_model_allows() -> None:
    rows = [np.array([7, 8], dtype=np.int32), np.array([7, 9, 8], dtype=np.int32)]
    padded = pad(rows, TextSpec(context_length=5, pad_id=1))
    assert padded.tolist() == [[7, 8, 1], [7, 9, 8]]
    assert padded.dtype == np.int32
    assert pad(rows, TextSpec(context_length=5, trim="masked")).shape == (2, 3)
    assert pad(rows, TextSpec(context_length=5, trim="fixed")).shape == (2, 5)
    assert pad([], SPEC).shape == (0, 0)


def test_threads_share_a_tokenizer() -> None:
    tokenizer, texts = tokenizer_for(SPEC), corpus(400, seed=1)
    alone = [tokenizer.encode(text).tolist() for text in texts]
    with ThreadPoolExecutor(4) as pool:
        together = [tokens.tolist() for tokens in pool.map(tokenizer.encode, texts)]
    assert together == alone


def test_needs_neither_torch_nor_ftfy_for_ascii() -> None:
    program = (
        "import sys; sys.modules.update(torch=None, ftfy=None)\n"
        "from clip_server.model_card import TextSpec\n"
        "from clip_server.preprocess.tokenizer import tokenizer_for\n"
        "print(tokenizer_for(TextSpec()).encode('a cat').tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == f"[{START}, 320, 2368, {END}]", done.stderr


def test_long_ascii_texts_equal_open_clip() -> None:
    """Where only the beginning of a text is looked at, and where that is not enough."""
    open_clip = pytest.importorskip("open_clip")
    texts = [
        "a cat on a mat, isn't it? " * 500,
        "a" * 3000 + " cat",
        ("x" * 100 + " ") * 60,
        "pneumonoultramicroscopicsilicovolcanoconiosis " * 200,
    ]
    tokenizer = tokenizer_for(SPEC)
    for text, expected in zip(texts, open_clip.tokenize(texts).numpy(), strict=True):
        ids = tokenizer.encode(text)
        assert ids.tolist() == expected[: len(ids)].tolist()
        assert not expected[len(ids) :].any()


LONG_TEXTS = {
    "pairs": "ab" * 10_000,
    "one letter": "a" * 20_000,
    "random letters": "".join(random.Random(0).choices(string.ascii_lowercase, k=5_000)),
    "punctuation": "?!" * 10_000,
    "digits": "1" * 20_000,
    "contractions": "'s" * 10_000,
    "emoji": "\U0001f602" * 10_000,
    "hearts": "\u2764\ufe0f" * 10_000,
    "chinese": "\u732b\u72ac" * 10_000,
    "combining marks": "e" + "\u0301\u0323" * 5_000,
    "a gap": "a" + " " * 50_000 + "cat",
    "blank lines": "\n" * 40_000 + "a" + "\n \t" * 1_000 + "caf\u00e9",
    "entities": "&amp;" * 10_000,
    "entities of two levels": "&amp;eacute;" * 5_000,
    "tags before entities": "<b>\n" * 10_000 + "&eacute;",
    "mojibake": "sch\u00c3\u00b6n " * 8_000,
    "mojibake at the end of a line": "\u00e9 " * 20_000 + "sch\u00c3\u00b6n",
    "mojibake of a later line": "\u00e9 \n" * 20_000 + "sch\u00c3\u00b6n",
    "controls": "\0" * 40_000 + "a",
    "special tokens": "<end_of_text>" * 3_000,
    "long words": ("x" * 3_000 + " ") * 10,
    "a word at the end": "cat " * 70 + "ab" * 10_000,
}


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_a_long_text_equals_open_clip_though_only_its_beginning_is_read(name: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    text = LONG_TEXTS[name]
    expected = open_clip.tokenize([text])[0].tolist()
    ids = tokenizer_for(SPEC).encode(text).tolist()
    assert ids == expected[: len(ids)]
    assert not any(expected[len(ids) :])


@pytest.mark.parametrize("count", [100, pytest.param(400, marks=pytest.mark.slow)])
def test_wherever_a_text_is_parted_its_ids_equal_open_clip(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long texts are read in parts; here the parts are small, so that many end in odd places."""
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setattr("clip_server.preprocess.tokenizer._SHORT", 256)
    monkeypatch.setattr("clip_server.preprocess.cleaning._BLOCK", 64)
    monkeypatch.setattr("clip_server.preprocess.cleaning._repair_in_subprocess", cleaning.repair)
    rng = random.Random(1)
    parts = [*SNIPPETS, "ab", "a", "\u732b", "\U0001f602", "\n", " ", "!", "1", "<", "&", "\u0301"]
    texts = [
        "".join(rng.choice(parts) * rng.choice([1, 3, 40]) for _ in range(rng.randint(2, 30)))
        for _ in range(count)
    ]
    texts += ["\n".join(corpus(5, seed)) for seed in range(count // 4)]
    tokenizer = tokenizer_for(SPEC)
    for text, row in zip(texts, open_clip.tokenize(texts).tolist(), strict=True):
        ids = tokenizer.encode(text).tolist()
        assert ids == row[: len(ids)], repr(text)
        assert not any(row[len(ids) :]), repr(text)


def test_word_pieces_do_not_depend_on_where_a_text_is_parted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = tokenizer_for(TextSpec(vocabulary="chinese-bert", context_length=52))
    rng = random.Random(2)
    parts = ["ab", "cat", "\u732b", "\u0391\u03a3 ", "!", " ", "\0", "e\u0301", "\U0001f602"]
    texts = [
        "".join(rng.choice(parts) * rng.choice([1, 3, 80]) for _ in range(rng.randint(2, 30)))
        for _ in range(300)
    ]
    whole = [tokenizer.encode(text).tolist() for text in texts]
    monkeypatch.setattr("clip_server.preprocess.wordpiece._SLICE", 64)
    for text, expected in zip(texts, whole, strict=True):
        assert tokenizer.encode(text).tolist() == expected, repr(text)


def test_a_number_without_end_in_a_text_is_an_item_error() -> None:
    with pytest.raises(ItemError, match="digits"):
        tokenizer_for(SPEC).encode("&#" + "1" * 10_000 + ";")
