"""M-CLIP: a BERT's mean over a text, turned into CLIP's space, beside CLIP's own image tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeded
from numpy.typing import NDArray

from clip_server.errors import ItemError, WeightsError
from clip_server.models import weights, zoo
from clip_server.preprocess.tokenizer import pad, tokenizer_for
from clip_server.runtimes.onnx import OnnxRuntime
from clip_server.runtimes.protocol import Runtime
from clip_server.towers import registry

KINDS = ["onnx", "torch"]
DIM = seeded.SMALL_VIT["embed_dim"]
WORDS = ["<s>", "<pad>", "</s>", "<unk>", "eine", "Katze", "un", "chat", "on", "a", "mat"]
WORDS += [",", "und", "der", "Hund"]
TEXTS = ["eine Katze", "un chat , a mat und der Hund on", "Hund"]
# transformers' class, and what M-CLIP's two kinds of text tower have beside their sizes.
XLM_ROBERTA = (
    "XLMRoberta",
    {"positions": 40, "first_position": 2, "types": 1, "pad_id": 1, "epsilon": 1e-05},
)
LABSE = ("Bert", {"positions": 40, "types": 2, "pad_id": 0, "epsilon": 1e-12})
TOWERS = [XLM_ROBERTA, LABSE]


def transformer(kind: str, bert: dict[str, Any]) -> Any:
    """transformers' own text tower."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=bert["vocab_size"],
        hidden_size=bert["width"],
        num_hidden_layers=bert["layers"],
        num_attention_heads=bert["heads"],
        intermediate_size=bert["mlp_width"],
        max_position_embeddings=bert.get("positions", 512),
        type_vocab_size=bert.get("types", 2),
        pad_token_id=bert.get("pad_id", 0),
        layer_norm_eps=bert.get("epsilon", 1e-12),
        initializer_range=0.3,
    )
    return getattr(transformers, f"{kind}Model")(config).eval()


class Small:
    """A seeded text tower, and the folder that serves it."""

    def __init__(self, folder: Path, kind: str, special: dict[str, Any]) -> None:
        import torch

        torch.manual_seed(0)
        sizes = {"width": 64, "layers": 3, "heads": 4, "mlp_width": 160, "vocab_size": len(WORDS)}
        self.folder, self.pad_id = folder, special["pad_id"]
        self.transformer = transformer(kind, sizes | special)
        self.linear = torch.nn.Linear(64, DIM)
        self.image = seeded.open_clip_model(seeded.SMALL_VIT)
        seeded.save(self.image, folder / "clip", seeded.SMALL_VIT)
        self._save_text_tower()
        self._save_tokenizer()
        self._describe(sizes | special)

    def _save_text_tower(self) -> None:
        """As multilingual_clip does, whose class has these two parts."""
        import torch

        parts = {"transformer": self.transformer, "LinearTransformation": self.linear}
        state = {
            f"{part}.{name}": tensor
            for part, module in parts.items()
            for name, tensor in module.state_dict().items()
        }
        torch.save(state, self.folder / "pytorch_model.bin")

    def _save_tokenizer(self) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        words = {word: index for index, word in enumerate(WORDS)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        ends = [(word, words[word]) for word in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, ends)
        tokenizer.save(str(self.folder / "tokenizer.json"))

    def _describe(self, bert: dict[str, Any]) -> None:
        tower = {
            "pool": "mean",
            "prefix": "transformer.",
            "projection": "LinearTransformation",
            "projection_bias": True,
        }
        text = {
            "context_length": 20,
            "vocab_size": len(WORDS),
            "hf_tokenizer_name": "a-repository",
            "tokenizer_kwargs": {"clean": "none"},
            "bert": bert | tower,
        }
        model = seeded.SMALL_VIT | {"text_cfg": text}
        described = {"model_cfg": model, "image_of": str(self.folder / "clip")}
        (self.folder / weights.CONFIG).write_text(json.dumps(described))

    def expected(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """The mean of what stands for a token, and the linear layer."""
        import torch

        ids = torch.from_numpy(tokens).long()
        mask = (ids != self.pad_id).long()
        with torch.inference_mode():
            states = self.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
            means = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            return self.linear(means).numpy()


@pytest.fixture(scope="module", params=TOWERS, ids=["XLM-RoBERTa", "LaBSE"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    pytest.importorskip("open_clip")
    pytest.importorskip("transformers")
    return Small(tmp_path_factory.mktemp("mclip"), *request.param)


def load(kind: str, folder: Path) -> Runtime:
    if kind == "onnx":
        return OnnxRuntime.load("mine", model_path=folder)
    from clip_server.runtimes.torch import TorchRuntime

    return TorchRuntime.load("mine", model_path=folder)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_parts(kind: str, small: Small) -> None:
    runtime = load(kind, small.folder)
    assert runtime.card.text.trim == "masked"
    assert runtime.card.logit_scale == pytest.approx(small.image.logit_scale.exp().item())
    pixels = seeded.random_pixels(seeded.SMALL_VIT, 2)
    expected = seeded.reference_images(small.image, pixels)
    assert seeded.relative(runtime.encode_image(pixels), expected) < 1e-4

    rng = np.random.default_rng(0)
    tokens = np.full((3, 20), small.pad_id, np.int32)
    for row, length in zip(tokens, (3, 9, 5), strict=True):
        row[:length] = rng.integers(2, len(WORDS), length)
    for length in (9, 20):
        found = runtime.encode_text(tokens[:, :length])
        assert seeded.relative(found, small.expected(tokens)) < 1e-4


def test_texts_are_tokenized_by_the_folders_tokenizer(small: Small) -> None:
    card = zoo.resolve("mine", small.folder)
    tokenizer = tokenizer_for(card.text)
    rows = [tokenizer.encode(text) for text in TEXTS]
    assert rows[0].tolist() == [0, 4, 5, 2]
    assert pad(rows, tokenizer.spec)[0, 4:].tolist() == [small.pad_id] * 7
    # Nothing is mended, as nothing was when it was trained.
    assert tokenizer.encode("a&amp;b Katze").tolist() == [0, 3, 5, 2]
    with pytest.raises(ItemError, match="surrogate"):
        tokenizer.encode("\ud83d")


def test_an_image_tower_that_is_not_there_is_an_error(small: Small, tmp_path: Path) -> None:
    for file in small.folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    described = json.loads((tmp_path / weights.CONFIG).read_text())
    missing = str(tmp_path / "missing.safetensors")
    (tmp_path / weights.CONFIG).write_text(json.dumps(described | {"image_of": missing}))
    with pytest.raises(WeightsError, match=r"missing\.safetensors"):
        OnnxRuntime.load("mine", model_path=tmp_path)


@pytest.mark.parametrize(
    ("name", "dim", "image"),
    [
        ("XLM-Roberta-Large-Vit-B-32", 512, "ViT-B-32::openai"),
        ("XLM-Roberta-Large-Vit-L-14", 768, "ViT-L-14::openai"),
        ("XLM-Roberta-Large-Vit-B-16Plus", 640, "ViT-B-16-plus-240::laion400m_e32"),
        ("LABSE-Vit-L-14", 768, "ViT-L-14::openai"),
        ("XLM_Roberta-Large-Vit-B-32", 512, "ViT-B-32::openai"),
    ],
)
def test_cards(name: str, dim: int, image: str) -> None:
    torch = pytest.importorskip("torch")
    card, other = zoo.resolve(f"M-CLIP/{name}"), zoo.resolve(image)
    assert (card.dim, card.image_of, card.image) == (dim, image, other.image)
    for key in ("vision_cfg", "quick_gelu"):
        assert card.config[key] == other.config.get(key, False)
    bert = card.config["text_cfg"]["bert"]
    # Texts are padded with what the tower masks.
    assert card.text.pad_id == bert.get("pad_id", 0)
    with torch.device("meta"):
        tower = transformer("Bert" if "LABSE" in name else "XLMRoberta", bert)
    expected = {
        f"transformer.{key}": tuple(tensor.shape)
        for key, tensor in tower.state_dict().items()
        if not key.startswith("pooler.")
    }
    shapes = registry.tensor_shapes(card.config)
    assert {
        key: shape for key, shape in shapes.items() if key.startswith("transformer.")
    } == expected
    assert shapes["LinearTransformation.weight"] == (dim, bert["width"])
