"""Tokenizers of Hugging Face's: the ids that open_clip's HFTokenizer gives, made here small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_tokenizer import corpus
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from clip_server.errors import ConfigurationError, ItemError, WeightsError
from clip_server.model_card import TextSpec
from clip_server.models import zoo
from clip_server.preprocess.tokenizer import CONFIG, FILE, pad, tokenizer_for

CONTEXT = 16
TEXTS = [
    *("", " ", "a cat", "A Cat, on the_mat!", "the end.", "naïve café", "&lt;b&gt; it&#39;s"),
    *("schÃ¶n", "东京塔 и Москва", "word " * 40, "unbelievably-hyphenated", "tab\tand\nline"),
]


def bert(folder: Path) -> None:
    """As bert-base-uncased: [CLS] ... [SEP], filled up with [PAD]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    write(folder, tokenizer, trainer, "[CLS] $A [SEP]", pad_token="[PAD]", sep_token="[SEP]")


def t5(folder: Path) -> None:
    """As SigLIP's: ... </s>, filled up with </s>."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    end = {"__type": "AddedToken", "content": "</s>"}
    write(folder, tokenizer, trainer, "$A </s>", pad_token=end, unk_token="<unk>")


def roberta(folder: Path) -> None:
    """As roberta-base: <s> ... </s>, filled up with <pad>, case kept."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    write(folder, tokenizer, trainer, "<s> $A </s>", pad_token="<pad>", sep_token="</s>")


def write(
    folder: Path, tokenizer: Tokenizer, trainer: Any, template: str, **special: object
) -> None:
    """Trains a tokenizer and writes the two files that its repository would have."""
    words = [*TEXTS, *(text for text in corpus(200) if text.isascii())]
    tokenizer.train_from_iterator(words, trainer)
    framing = [part for part in template.split() if part != "$A"]
    tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(part, tokenizer.token_to_id(part)) for part in framing]
    )
    tokenizer.save(str(folder / FILE))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / CONFIG).write_text(json.dumps(config))


MODELS = [
    pytest.param(bert, {"strip_separator": True}, {"strip_sep_token": True}, 0, id="bert"),
    pytest.param(t5, {"clean": "canonicalize"}, {"clean": "canonicalize"}, 1, id="t5"),
    pytest.param(roberta, {"clean": "whitespace"}, {}, 1, id="roberta"),
    pytest.param(roberta, {"clean": "lower"}, {"clean": "lower"}, 1, id="lower"),
]


@pytest.mark.parametrize(("make", "ours", "theirs", "pad_id"), MODELS)
def test_the_ids_are_open_clips(
    make: Any, ours: dict[str, Any], theirs: dict[str, Any], pad_id: int, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    open_clip = pytest.importorskip("open_clip")
    make(tmp_path)
    spec = TextSpec(str(tmp_path), CONTEXT, trim="fixed", **{"clean": "whitespace", **ours})
    tokenizer = tokenizer_for(spec)
    reference = open_clip.tokenizer.HFTokenizer(str(tmp_path), CONTEXT, **theirs)
    texts = [*TEXTS, *corpus(300, seed=3)]
    found = pad([tokenizer.encode(text) for text in texts], tokenizer.spec)
    np.testing.assert_array_equal(found, reference(texts).numpy())
    assert tokenizer.spec.pad_id == pad_id


def test_a_text_is_framed_cut_and_cleaned(tmp_path: Path) -> None:
    bert(tmp_path)
    spec = TextSpec(str(tmp_path), CONTEXT, pad_id=7, trim="masked", clean="whitespace")
    tokenizer = tokenizer_for(spec)
    empty, short, long = (tokenizer.encode(text) for text in ("", " A  cat ", "cat " * 99))
    assert empty.tolist() == [2, 3]
    assert (short[0], short[-1], short.dtype) == (2, 3, np.int32)
    np.testing.assert_array_equal(short, tokenizer.encode("a cat"))
    assert (len(long), long[-1]) == (CONTEXT, 3)
    # The tokenizer's own padding, whatever the card says, and no more than the longest needs.
    np.testing.assert_array_equal(
        pad([empty, short], tokenizer.spec), [[2, 3] + [0] * (len(short) - 2), short]
    )
    stripped = tokenizer_for(replace(spec, strip_separator=True))
    assert stripped.encode("").tolist() == [2, 0]


@pytest.mark.parametrize("make", [bert, t5, roberta])
def test_the_ids_of_a_long_text_are_those_of_all_of_it(make: Any, tmp_path: Path) -> None:
    make(tmp_path)
    tokenizer = tokenizer_for(TextSpec(str(tmp_path), CONTEXT, clean="none"))
    whole = Tokenizer.from_file(str(tmp_path / FILE))
    whole.enable_truncation(CONTEXT)
    texts = [*("ab" * 9_000, "a" * 9_000, "cat " * 9_000, " " * 9_000 + "a", "!?" * 9_000),
             *("\u732b" * 9_000, "\u00e9 " * 9_000, "unbelievably-" * 1_000),
             "".join(corpus(300, seed=5))]  # fmt: skip
    for text in texts:
        found = tokenizer.tokenize(text)
        expected = whole.encode(text)
        assert found.ids.tolist() == expected.ids, text[:20]
        assert found.truncated == bool(expected.overflowing)


def test_canonical_texts_have_no_case_and_no_punctuation(tmp_path: Path) -> None:
    roberta(tmp_path)
    tokenizer = tokenizer_for(TextSpec(str(tmp_path), clean="canonicalize"))
    same = [tokenizer.encode(text).tolist() for text in ("the cat", " The_cat!?", "&amp;The  CAT.")]
    assert same[0] == same[1] == same[2]


def test_half_a_surrogate_pair_is_an_error_of_the_item(tmp_path: Path) -> None:
    roberta(tmp_path)
    tokenizer = tokenizer_for(TextSpec(str(tmp_path), clean="whitespace"))
    with pytest.raises(ItemError, match="character 2 is half of a surrogate"):
        tokenizer.encode("a \ud800")


def test_a_card_in_a_folder_takes_the_tokenizer_beside_it(tmp_path: Path) -> None:
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32},
        "text_cfg": {"hf_tokenizer_name": "google/mt5-base", "tokenizer_kwargs": {}},
    }
    assert zoo.card_from_config("mine", config, {}, folder=tmp_path).text.tokenizer == (
        "google/mt5-base"
    )
    t5(tmp_path)
    text = zoo.card_from_config("mine", config, {}, folder=tmp_path).text
    assert (text.tokenizer, text.clean) == (str(tmp_path), "whitespace")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [(FILE, None, "no tokenizer.json"), (FILE, "{", "is damaged"), (CONFIG, "{", "is not JSON")],
)
def test_a_folder_without_a_whole_tokenizer(
    file: str, content: str | None, message: str, tmp_path: Path
) -> None:
    bert(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(WeightsError, match=message):
        tokenizer_for(TextSpec(str(tmp_path)))


def test_clips_own_vocabulary_has_one_clean_up() -> None:
    with pytest.raises(ConfigurationError, match="cleans as 'lower', not 'whitespace'"):
        tokenizer_for(TextSpec(clean="whitespace"))


def test_a_vocabulary_that_we_lack_is_named() -> None:
    with pytest.raises(ConfigurationError, match="'klingon' is not one of clip, chinese-bert"):
        tokenizer_for(TextSpec(vocabulary="klingon"))  # type: ignore[arg-type]
