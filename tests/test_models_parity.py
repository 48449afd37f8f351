"""Every family that open_clip knows: the torch runtime gives open_clip's own vectors.

The image towers are the smallest of timm's that have the family's modules; the text towers are
the family's own, made narrow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeded
from numpy.typing import NDArray
from test_tokenizer_hugging_face import roberta as write_tokenizer

from clip_server.errors import ConfigurationError, WeightsError
from clip_server.model_card import Trim

pytest.importorskip("open_clip")

TOLERANCE = 1e-5
CONTEXT, VOCABULARY = 20, 600
TEXT = {
    "context_length": CONTEXT,
    "vocab_size": VOCABULARY,
    "width": 64,
    "heads": 4,
    "layers": 2,
}
SIGLIP_TEXT = TEXT | {
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}


def timm(name: str, size: int, pool: str, proj: str | None) -> dict[str, Any]:
    return {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": pool,
        "timm_proj": proj,
        "image_size": size,
    }


def config(vision: dict[str, Any], text: dict[str, Any], **more: object) -> dict[str, Any]:
    return {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, **more}


VIT = {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16}
CLIPA = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
COCA = {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
CAPTIONS = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 64, "heads": 4}
FAMILIES: dict[str, tuple[dict[str, Any], Trim]] = {
    "convnext": (config(timm("convnext_atto", 64, "", "linear"), TEXT), "causal"),
    "eva": (
        config(timm("eva02_tiny_patch14_224", 224, "token", None), TEXT, custom_text=True),
        "causal",
    ),
    "siglip": (
        config(
            timm("test_vit", 160, "map", "none"),
            SIGLIP_TEXT,
            custom_text=True,
            embed_dim=64,
            init_logit_bias=-10,
        ),
        "fixed",
    ),
    "mobileclip": (
        config(
            timm("fastvit_t8", 64, "avg", None), TEXT | {"no_causal_mask": True}, custom_text=True
        ),
        "fixed",
    ),
    "swin": (config(timm("swin_tiny_patch4_window7_224", 224, "", "linear"), TEXT), "causal"),
    "vitamin": (
        config(timm("vitamin_small_224", 224, "", "linear"), TEXT, custom_text=True),
        "causal",
    ),
    "clipa": (
        config(VIT | CLIPA, TEXT | {"pool_type": "last", "no_causal_mask": True}),
        "fixed",
    ),
    "metaclip worldwide": (
        config(VIT, TEXT | {"pool_type": "eos", "eos_id": VOCABULARY - 1}),
        "causal",
    ),
    "coca": (
        config(
            VIT | COCA,
            TEXT | {"embed_cls": True, "output_tokens": True},
            custom_text=True,
            multimodal_cfg={**CAPTIONS, "layers": 1, "attn_pooler_heads": 4},
        ),
        "fixed",
    ),
}


def open_clip_model(config: dict[str, Any]) -> Any:
    """The model of the class that open_clip's factory takes for it, with seeded weights."""
    import torch
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP

    torch.manual_seed(0)
    parts = {key: value for key, value in config.items() if key != "custom_text"}
    if "multimodal_cfg" in config:
        return CoCa(**parts).eval()
    return (CustomTextCLIP if config.get("custom_text") else CLIP)(**parts).eval()


def references(
    model: Any, pixels: NDArray[np.uint8], tokens: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """open_clip's own embeddings, not normalised; CoCa's are unless one asks."""
    import torch
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    mean, std = (
        torch.tensor(values).reshape(3, 1, 1)
        for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    )
    with torch.inference_mode():
        scaled = (torch.from_numpy(pixels).float() / 255 - mean) / std
        images = model.encode_image(scaled, normalize=False)
        texts = model.encode_text(torch.from_numpy(tokens).long(), normalize=False)
    return images.numpy(), texts.numpy()


def assert_equal_to_open_clip(folder: Path, model: Any, trim: Trim, *, jit: bool = False) -> None:
    from clip_server.runtimes.torch import TorchRuntime

    runtime = TorchRuntime.load("mine", model_path=folder, device="cpu", jit=jit)
    assert runtime.card.text.trim == trim
    for batch, longest in ((1, 5), (3, CONTEXT)):
        pixels = seeded.random_pixels(runtime.card.config, batch)
        tokens = random_tokens(runtime.card.config, batch, longest)
        images, texts = references(model, pixels, tokens)
        kept = CONTEXT if trim == "fixed" else longest
        assert seeded.relative(runtime.encode_image(pixels), images) < TOLERANCE
        assert seeded.relative(runtime.encode_text(tokens[:, :kept]), texts) < TOLERANCE
        # Another picture, another vector: a tower that gives zeros would be equal too.
        assert batch == 1 or seeded.relative(images[:1], images[1:2]) > 1e-3


def random_tokens(config: dict[str, Any], batch: int, longest: int) -> NDArray[np.int32]:
    return seeded.random_tokens({"text_cfg": TEXT | config["text_cfg"]}, batch, longest)


LONG = ("swin", "vitamin", "mobileclip", "eva", "convnext")


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=pytest.mark.slow if family in LONG else []) for family in FAMILIES],
)
def test_a_family_equals_open_clip(family: str, tmp_path: Path) -> None:
    described, trim = FAMILIES[family]
    model = open_clip_model(described)
    folder = seeded.save(model, tmp_path, described)
    assert_equal_to_open_clip(folder, model, trim)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["convnext", "clipa", "coca"])
def test_a_traced_family_equals_open_clip(family: str, tmp_path: Path) -> None:
    described, trim = FAMILIES[family]
    model = open_clip_model(described)
    folder = seeded.save(model, tmp_path, described)
    assert_equal_to_open_clip(folder, model, trim, jit=True)


def test_a_text_tower_of_hugging_faces_equals_open_clip(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tower = tmp_path / "tower"
    transformers.RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=CONTEXT + 2,
    ).save_pretrained(tower)
    text = {
        "hf_model_name": str(tower),
        "hf_tokenizer_name": "roberta-base",
        "hf_model_pretrained": False,
        "context_length": CONTEXT,
    }
    described = config(VIT, text, custom_text=True)
    model = open_clip_model(described)
    text.pop("hf_model_pretrained")  # open_clip's own tables do not say it
    folder = seeded.save(model, tmp_path, described)
    write_tokenizer(tmp_path)

    from clip_server.runtimes.torch import TorchRuntime

    runtime = TorchRuntime.load("mine", model_path=folder, device="cpu")
    assert (runtime.card.text.trim, runtime.card.text.pad_id) == ("masked", 1)
    tokens = random_tokens(described, batch=3, longest=7)
    tokens[tokens == 0] = runtime.card.text.pad_id
    pixels = seeded.random_pixels(described, 3)
    images, texts = references(model, pixels, tokens)
    assert seeded.relative(runtime.encode_image(pixels), images) < TOLERANCE
    assert seeded.relative(runtime.encode_text(tokens[:, :7]), texts) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "MobileCLIP-S1", "EVA02-B-16"])
def test_an_architecture_of_open_clips_own_size(name: str, tmp_path: Path) -> None:
    import open_clip

    from clip_server.runtimes.torch import TorchRuntime

    described = open_clip.get_model_config(name)
    model = open_clip_model(described)
    folder = seeded.save(model, tmp_path, described)
    write_tokenizer(folder)  # SigLIP's would be fetched
    runtime = TorchRuntime.load(name, model_path=folder, device="cpu")
    pixels = seeded.random_pixels(described, 2)
    tokens = seeded.random_tokens(described, 2, longest=9)
    images, texts = references(model, pixels, tokens)
    assert seeded.relative(runtime.encode_image(pixels), images) < TOLERANCE
    assert seeded.relative(runtime.encode_text(tokens), texts) < TOLERANCE


def test_the_older_names_of_a_text_tower_are_read(tmp_path: Path) -> None:
    """A checkpoint of before the text tower of such a model stood apart."""
    from safetensors.torch import save_file

    described = config(VIT, TEXT, custom_text=True)
    model = open_clip_model(described)
    folder = seeded.save(model, tmp_path, described)
    older = {name.removeprefix("text."): value for name, value in model.state_dict().items()}
    save_file(older, folder / "open_clip_model.safetensors")
    assert_equal_to_open_clip(folder, model, "causal")


def test_a_family_that_onnx_needs_converted_says_so(tmp_path: Path) -> None:
    from clip_server.runtimes.onnx import OnnxRuntime

    described, _ = FAMILIES["convnext"]
    folder = seeded.save(open_clip_model(described), tmp_path, described)
    with pytest.raises(ConfigurationError, match="timm_model_name"):
        OnnxRuntime.load("mine", model_path=folder)


def test_an_architecture_that_open_clip_cannot_build_is_an_error(tmp_path: Path) -> None:
    from clip_server.runtimes.torch import TorchRuntime

    described = config(timm("no_such_model", 64, "", "linear"), TEXT)
    folder = seeded.save(open_clip_model(config(VIT, TEXT)), tmp_path, described)
    with pytest.raises(ConfigurationError, match=r"open_clip cannot build mine: .*no_such_model"):
        TorchRuntime.load("mine", model_path=folder)


def test_a_checkpoint_of_another_family_is_refused(tmp_path: Path) -> None:
    from clip_server.runtimes.torch import TorchRuntime

    folder = seeded.save(open_clip_model(config(VIT, TEXT)), tmp_path, FAMILIES["convnext"][0])
    with pytest.raises(WeightsError, match=r"another architecture: visual\.trunk"):
        TorchRuntime.load("mine", model_path=folder)
