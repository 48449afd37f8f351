"""Folders of CLIPModel, ChineseCLIPModel and SiglipModel: transformers' own embeddings."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeded
from cn_clip_reference import picture
from conftest import saved
from numpy.typing import NDArray
from safetensors.numpy import save_file
from test_tokenizer_hugging_face import t5 as write_tokenizer

from clip_server.errors import ConfigurationError
from clip_server.model_card import ImageSpec
from clip_server.models import hugging_face, zoo
from clip_server.preprocess import tokenizer
from clip_server.preprocess.image import ImageTransform
from clip_server.runtimes.onnx import OnnxRuntime
from clip_server.runtimes.protocol import Runtime

KINDS = ["onnx", "torch"]
VISION = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "vocab_size": 600,
    "bos_token_id": 598,
    "eos_token_id": 599,
}
CHINESE_TEXT = {key: value for key, value in TEXT.items() if not key.endswith("token_id")}
CHINESE_TEXT |= {"max_position_embeddings": 64, "vocab_size": 21128}
# What the parts of a random model are drawn with, so that every part counts.
SPREAD = {"initializer_factor": 5.0, "initializer_range": 0.2}


def hugging_face_model(kind: str, text: dict[str, Any], **vision: Any) -> Any:
    """transformers' own model, seeded."""
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        text_config=text | SPREAD, vision_config=VISION | vision | SPREAD, projection_dim=32
    )
    model = getattr(transformers, f"{kind}Model")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def load(kind: str, folder: Path) -> Runtime:
    if kind == "onnx":
        return OnnxRuntime.load("mine", model_path=folder)
    pytest.importorskip("open_clip")
    from clip_server.runtimes.torch import TorchRuntime

    return TorchRuntime.load("mine", model_path=folder)


def theirs(model: Any, part: str, **inputs: Any) -> NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        found = getattr(model, f"get_{part}_features")(**inputs)
    # Since its release 5, transformers gives more than the embeddings.
    return getattr(found, "pooler_output", found).numpy()


def assert_equal_to_transformers(
    runtime: Runtime, model: Any, tokens: NDArray[np.int32], longest: int
) -> None:
    import torch

    size, image = runtime.card.image.size, runtime.card.image
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, size, size), dtype=np.uint8)
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (image.mean, image.std))
    normalised = torch.from_numpy(((pixels / 255 - mean) / std).astype(np.float32))
    expected = theirs(model, "image", pixel_values=normalised)
    assert seeded.relative(runtime.encode_image(pixels), expected) < 1e-4

    ids = torch.from_numpy(tokens).long()
    mask = (ids != runtime.card.text.pad_id).long()
    expected = theirs(model, "text", input_ids=ids, attention_mask=mask)
    for length in (longest, tokens.shape[1]):
        assert seeded.relative(runtime.encode_text(tokens[:, :length]), expected) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("activation", "epsilon"), [("quick_gelu", 1e-5), ("gelu", 1e-5), ("gelu_new", 1e-3)]
)
def test_clip_equals_transformers(
    kind: str, activation: str, epsilon: float, tmp_path: Path
) -> None:
    options = {"hidden_act": activation, "layer_norm_eps": epsilon}
    model = hugging_face_model("CLIP", TEXT | options, **options)
    model.save_pretrained(tmp_path)
    runtime = load(kind, tmp_path)
    assert (runtime.card.dim, runtime.card.image) == (32, ImageSpec(64, crop="floor"))
    assert (runtime.card.text.context_length, runtime.card.text.trim) == (20, "causal")
    assert runtime.card.logit_scale == pytest.approx(model.logit_scale.exp().item())
    tokens = np.zeros((3, 20), np.int32)
    for row, length in zip(tokens, (3, 9, 5), strict=True):
        row[:length] = [598, *range(7, 5 + length), 599]
    assert_equal_to_transformers(runtime, model, tokens, longest=9)


@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        ("onnx", "gelu_pytorch_tanh"),
        ("onnx", "gelu"),
        ("torch", "gelu_pytorch_tanh"),
        ("torch", "quick_gelu"),
    ],
)
def test_siglip_equals_transformers(kind: str, activation: str, tmp_path: Path) -> None:
    act = {"hidden_act": activation}
    text = {key: value for key, value in TEXT.items() if not key.endswith("token_id")} | act
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION | act)
    model = transformers.SiglipModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    runtime = load(kind, tmp_path)
    card = runtime.card
    assert (card.dim, card.image) == (64, ImageSpec(64, resize="squash", crop="floor"))
    assert (card.text.context_length, card.text.trim, card.text.pad_id) == (20, "fixed", 1)
    assert card.logit_scale == pytest.approx(model.logit_scale.exp().item())
    assert card.logit_bias == pytest.approx(model.logit_bias.item())
    tokens = np.random.default_rng(0).integers(2, 600, (3, 20), dtype=np.int32)
    assert_equal_to_transformers(runtime, model, tokens, longest=20)


@pytest.mark.parametrize("kind", KINDS)
def test_chinese_clip_equals_transformers(kind: str, tmp_path: Path) -> None:
    model = hugging_face_model("ChineseCLIP", CHINESE_TEXT)
    model.save_pretrained(tmp_path)
    runtime = load(kind, tmp_path)
    text = runtime.card.text
    assert (text.vocabulary, text.trim, text.context_length) == ("chinese-bert", "masked", 52)
    assert runtime.card.image == ImageSpec(64, resize="squash", crop="floor")
    tokens = np.zeros((3, 52), np.int32)
    for row, length in zip(tokens, (3, 9, 5), strict=True):
        row[:length] = [101, *range(7, 5 + length), 102]
    assert_equal_to_transformers(runtime, model, tokens, longest=9)


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_token_that_is_not_the_last_of_the_vocabulary(kind: str, tmp_path: Path) -> None:
    model = hugging_face_model("CLIP", TEXT | {"eos_token_id": 300})
    model.save_pretrained(tmp_path)
    tokens = np.zeros((2, 20), np.int32)
    tokens[0, :4], tokens[1, :5] = [598, 599, 7, 300], [598, 8, 9, 599, 300]
    runtime = load(kind, tmp_path)
    assert_equal_to_transformers(runtime, model, tokens, longest=5)


@pytest.mark.parametrize("kind", ["CLIP", "ChineseCLIP"])
def test_pixels_are_transformers_own(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    # Since release 5 the one that scales with Pillow, as open_clip does, has a name of its own.
    names = (f"{kind}ImageProcessorPil", f"{kind}ImageProcessor")
    processor = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    size = {"CLIP": {"shortest_edge": 64}, "ChineseCLIP": {"height": 64, "width": 64}}[kind]
    theirs = processor(size=size, crop_size={"height": 64, "width": 64}, do_normalize=False)
    theirs.save_pretrained(tmp_path)
    described(tmp_path, {"model_type": "clip", "vision_config": VISION})
    save_file({"logit_scale": np.zeros((), np.float32)}, tmp_path / "model.safetensors")
    ours = ImageTransform(zoo.resolve("mine", tmp_path).image, exact=True)
    for sides in ((120, 90), (123, 90), (90, 125), (90, 131), (64, 64), (31, 17)):
        image = picture(*sides)
        expected = theirs(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(ours(saved(image, "PNG")), np.round(expected * 255))


def described(folder: Path, config: dict[str, Any], **files: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def configuration(folder: Path) -> dict[str, Any]:
    found = hugging_face.configuration(folder)
    assert found is not None
    return found


def test_what_is_not_said_is_as_in_the_first_model(tmp_path: Path) -> None:
    """As in OpenAI's own repositories, whose files say little; so did the first releases, in
    places that have since been renamed."""
    said = {
        "model_type": "clip",
        "text_config_dict": None,
        "vision_config_dict": {"patch_size": 16},
    }
    found = configuration(described(tmp_path, said))["model_cfg"]
    expected = zoo.resolve("ViT-B-16::openai").config
    named = {"head_width": 64, "mlp_ratio": 4.0}
    assert found["vision_cfg"] == expected["vision_cfg"] | named
    assert found["text_cfg"] == expected["text_cfg"] | {"mlp_ratio": 4.0}
    assert (found["embed_dim"], found["quick_gelu"]) == (512, True)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"size": 64, "crop_size": 64, "resample": 3}, {"interpolation": "bicubic"}),
        ({"size": {"shortest_edge": 64}, "resample": 2}, {"interpolation": "bilinear"}),
        (
            {"size": {"height": 64, "width": 64}, "do_center_crop": False, "image_mean": [0.5] * 3},
            {"resize_mode": "squash", "mean": [0.5] * 3},
        ),
    ],
)
def test_how_pictures_are_prepared(
    said: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    config = {"model_type": "clip", "vision_config": VISION}
    described(tmp_path, config, preprocessor_config=said)
    found = configuration(tmp_path)["preprocess_cfg"]
    usual = {"resize_mode": "shortest", "interpolation": "bicubic", "crop": "floor"}
    assert found == usual | expected
    (tmp_path / "preprocessor_config.json").unlink()
    described(tmp_path, config, processor_config={"image_processor": said})
    assert configuration(tmp_path)["preprocess_cfg"] == found


@pytest.mark.parametrize(
    ("config", "pictures", "message"),
    [
        ({"model_type": "siglip2"}, {}, r"'siglip2': .*NaFlex.*siglip2-base-patch16-224"),
        ({"model_type": "blip"}, {}, "'blip': supported are 'clip', 'chinese_clip', 'siglip'"),
        ({"model_type": "jina_clip"}, {}, "'jina_clip': its text tower .* a BERT with ALiBi"),
        ({"model_type": "nomic_bert"}, {}, "'nomic_bert': it is one tower alone"),
        ({"vision_config": {"hidden_act": "relu"}}, {}, "hidden_act 'relu'"),
        ({"text_config": {"hidden_act": "gelu"}}, {}, "different activations"),
        ({}, {"size": {"shortest_edge": 256}}, "takes squares of 224 pixels"),
        ({}, {"do_center_crop": False}, "cropped to None"),
        ({}, {"crop_size": {"height": 200, "width": 200}}, "cropped to {'height': 200"),
    ],
)
def test_what_we_do_not_do_is_refused(
    config: dict[str, Any], pictures: dict[str, Any], message: str, tmp_path: Path
) -> None:
    described(tmp_path, {"model_type": "clip"} | config, preprocessor_config=pictures)
    with pytest.raises(ConfigurationError, match=message):
        hugging_face.configuration(tmp_path)


def test_a_configuration_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match="is not JSON"):
        hugging_face.configuration(tmp_path)


def tokenizer_file(folder: Path, kind: str, **model: Any) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": kind, **model}}))


def test_clips_own_merges_are_clips_own_tokenizer(tmp_path: Path) -> None:
    described(tmp_path, {"model_type": "clip"})
    merges = [" ".join(pair) for pair in tokenizer.merges(49408)]
    tokenizer_file(tmp_path, "BPE", merges=merges)
    assert "hf_tokenizer_name" not in configuration(tmp_path)["model_cfg"]["text_cfg"]
    tokenizer_file(tmp_path, "BPE", merges=merges[1:])
    assert configuration(tmp_path)["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == str(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_chinese_berts_own_pieces_are_its_own_tokenizer(file: str, tmp_path: Path) -> None:
    from clip_server.preprocess.wordpiece import vocabulary

    described(tmp_path, {"model_type": "chinese_clip", "text_config": {"vocab_size": 21128}})
    pieces = vocabulary()
    lines = [""] * 21128
    for piece, index in pieces.items():
        lines[index] = piece
    for missing in (0, 1):
        kept = lines[: len(lines) - missing]
        if file == "vocab.txt":
            (tmp_path / file).write_text("\n".join(kept) + "\n", "utf-8")
        else:
            tokenizer_file(tmp_path, "WordPiece", vocab={p: i for i, p in enumerate(kept) if p})
        text = configuration(tmp_path)["model_cfg"]["text_cfg"]
        assert ("vocabulary" in text, "hf_tokenizer_name" in text) == (not missing, bool(missing))


def test_a_tokenizer_of_its_own_is_used(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = hugging_face_model("CLIP", TEXT)
    model.save_pretrained(tmp_path)
    words = {"[UNK]": 0, "cat": 7, "dog": 9}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.save(str(tmp_path / "tokenizer.json"))
    card = zoo.resolve("mine", tmp_path)
    assert tokenizer.tokenizer_for(card.text).encode("dog cat bird").tolist() == [9, 7, 0]
    OnnxRuntime.load("mine", model_path=tmp_path)


def test_encoders_of_one_modality_serve_a_folder(tmp_path: Path) -> None:
    """`CLIPTextEncoder` and `CLIPImageEncoder`, as in Jina Hub, on what transformers saved."""
    import torch
    from docarray import DocList

    from clip_server.executors.clip_hub import CLIPImageEncoder, CLIPTextEncoder
    from clip_server.executors.documents import ClipDoc

    model = hugging_face_model("CLIP", TEXT)
    model.save_pretrained(tmp_path)
    tokenizer_file(tmp_path, "WordLevel", vocab={"[UNK]": 0, "cat": 7, "dog": 9}, unk_token="[UNK]")
    texts = CLIPTextEncoder(str(tmp_path), base_tokenizer_model=str(tmp_path), max_length=8)
    docs = DocList[ClipDoc]([ClipDoc(text="cat"), ClipDoc(text="cat " * 20)])
    asyncio.run(texts.encode(docs))
    assert [doc.embedding.shape for doc in docs] == [(32,)] * 2

    images = CLIPImageEncoder(str(tmp_path), use_default_preprocessing=False)
    spec = images.engine.card.image
    pixels = np.random.default_rng(0).integers(0, 256, (spec.size, spec.size, 3), dtype=np.uint8)
    ready = ((pixels / 255 - spec.mean) / spec.std).transpose(2, 0, 1).astype(np.float32)
    docs = DocList[ClipDoc]([ClipDoc(tensor=ready), ClipDoc(text="left alone")])
    asyncio.run(images.encode(docs))
    expected = theirs(model, "image", pixel_values=torch.from_numpy(ready[None]))
    assert seeded.relative(docs[0].embedding[None], expected) < 1e-4
    assert docs[1].embedding is None
    for encoder in (texts, images):
        encoder.close()
