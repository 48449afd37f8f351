"""What cn_clip itself makes of seeded checkpoints, kept in tests/references/cn_clip.npz.

cn_clip asks for packages that cannot be installed beside ours, so that it runs here alone:

    pip install --no-deps cn_clip six
    python tests/cn_clip_reference.py

`CONFIGS` are the checkpoints, in the server's own form; `drawn` gives their tensors.
"""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FILE = Path(__file__).parent / "references" / "cn_clip.npz"
Shapes = Mapping[str, tuple[int, ...]]

SMALL_BERT = {"width": 64, "layers": 3, "heads": 4, "mlp_width": 160, "vocab_size": 21128}
SMALL_TEXT = {"context_length": 52, "vocab_size": 21128, "vocabulary": "chinese-bert"}
SMALL = {
    "embed_dim": 32,
    "quick_gelu": True,
    "preprocess_cfg": {"resize_mode": "squash"},
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 128, "patch_size": 16},
    "text_cfg": SMALL_TEXT | {"bert": SMALL_BERT},
}
SMALL_RESNET = SMALL | {
    "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 16, "head_width": 64},
}
CONFIGS = {"small": SMALL, "small-resnet": SMALL_RESNET}
REAL = ("RN50", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14")
# Of the real sizes, those whose vectors are kept; of all, the tensors' names and shapes are.
MEASURED = ("RN50", "ViT-B-16")
CLASSES = ["杰尼龟", "妙蛙种子", "小火龙", "皮卡丘", "一只猫坐在沙发上", "A dog, 2 cats & iPhone14"]


def drawn(shapes: Shapes) -> dict[str, NDArray[np.float32]]:
    """Tensors that are the same on every machine, with numpy's one stream that never changes."""
    return {name: _tensor(name, shape) for name, shape in shapes.items()}


def _tensor(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if name == "logit_scale":
        return np.array(np.log(100), np.float32)
    count = int(np.prod(shape))
    noise = np.frombuffer(np.random.RandomState(crc32(name.encode())).bytes(count), np.int8)
    values = (noise.astype(np.float32) / 128).reshape(shape)
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        return 1 + values / 2
    if shape[:1] == (count,):  # a vector, even if it has more axes
        return values / 10
    stored_as_product = name in ("visual.proj", "text_projection")
    inputs = shape[0] if stored_as_product else int(np.prod(shape[1:]))
    return values * np.float32(2 * inputs**-0.5)


def digest(shapes: Shapes) -> str:
    """Of the names and shapes of a checkpoint's tensors."""
    listed = sorted((name, list(shape)) for name, shape in shapes.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def picture(width: int, height: int) -> Image.Image:
    """Coloured waves, no two pixels of a row alike."""
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    waves = [np.sin(across / 7 + down / 11), np.cos(across / 5), np.sin(across * down / 900)]
    return Image.fromarray(np.uint8(np.stack(waves, axis=-1) * 127 + 128))


PICTURES = [picture(120, 90), picture(90, 200), picture(64, 64), picture(31, 17)]


def texts() -> list[str]:
    """Sentences, oddities, and random characters that every Python knows the same way."""
    rng = random.Random(0)
    blocks = [(0x20, 0x7F), (0x4E00, 0x9FA6), (0x4E00, 0x9FA6), (0xA1, 0x250), (0x3000, 0x3100)]
    blocks += [(0x370, 0x530), (0xFF00, 0xFFF0), (0x2000, 0x2800), (0x1F300, 0x1F600), (0, 0xA0)]
    fuzzed = []
    for _ in range(300):
        chosen = rng.sample(blocks, k=2)
        letters = [chr(rng.randrange(*rng.choice(chosen))) for _ in range(rng.randint(1, 70))]
        fuzzed.append("".join(filter(_settled, letters)))
    odd = ["", " ", "[CLS] [PAD] [UNK] [MASK]", "a" * 200, "a" * 201, "中" * 80, "##中", "\u2028"]
    odd += ["e\u0301cole É\u0130", "ΌΣΟΣ", "1,000.50", "\ufffd\0\x07a\u200bb", "ﬁ①㎡", "㐀𠀀豈"]
    return [*CLASSES, *odd, *fuzzed]


def _settled(char: str) -> bool:
    """Whether a character has been in Unicode, as what it is now, since version 3.2."""
    old = unicodedata.ucd_3_2_0.category(char)
    return old != "Cn" and old == unicodedata.category(char)


def main() -> None:
    """Writes the file."""
    import torch
    from cn_clip import clip

    kept: dict[str, Any] = {"texts": np.array(texts()), "tokens": clip.tokenize(texts()).numpy()}
    transform = clip.image_transform(64)
    transform.transforms.pop()  # what normalises the pixels
    pixels = torch.stack([transform(image) for image in PICTURES])
    kept["pixels"] = (pixels * 255).round().byte().numpy()
    for name in (*CONFIGS, *REAL):
        kept |= {f"{name}.{key}": value for key, value in _measured(name).items()}
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **kept)


def _measured(name: str) -> dict[str, Any]:
    """cn_clip's vectors and probabilities of the pictures and classes."""
    import torch
    from cn_clip import clip

    with torch.device("meta"):
        model = _model(name).eval()
    empty = {
        key: tuple(value.shape)
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    found: dict[str, Any] = {"shapes": np.array(digest(empty))}
    if name in REAL and name not in MEASURED:
        return found
    state = {key: torch.from_numpy(value) for key, value in drawn(empty).items()}
    model.load_state_dict(state, strict=False, assign=True)
    size = model.visual.input_resolution
    images = torch.stack([clip.image_transform(size)(image) for image in PICTURES])
    with torch.inference_mode():
        tokens = clip.tokenize(CLASSES)
        logits, _ = model.get_similarity(images, tokens)
        found["images"] = model.encode_image(images).numpy()
        found["texts"] = model.encode_text(tokens).numpy()
        found["probabilities"] = logits.softmax(dim=-1).numpy()
    return found


def _model(name: str) -> Any:
    from cn_clip.clip import utils
    from cn_clip.clip.model import CLIP

    if name in REAL:
        folder = Path(utils.__file__).parent / "model_configs"
        vision, text = utils._MODEL_INFO[name]["struct"].split("@")
        described = {
            key: value
            for part in (vision, text)
            for key, value in json.loads((folder / f"{part}.json").read_text()).items()
        }
        if isinstance(described["vision_layers"], str):
            described["vision_layers"] = json.loads(described["vision_layers"])
        return CLIP(**described)
    config: Any = CONFIGS[name]
    vision, bert = config["vision_cfg"], config["text_cfg"]["bert"]
    return CLIP(
        embed_dim=config["embed_dim"],
        image_resolution=vision["image_size"],
        vision_layers=vision["layers"],
        vision_width=vision["width"],
        vision_patch_size=vision.get("patch_size"),
        vocab_size=bert["vocab_size"],
        text_attention_probs_dropout_prob=0.1,
        text_hidden_act="gelu",
        text_hidden_dropout_prob=0.1,
        text_hidden_size=bert["width"],
        text_initializer_range=0.02,
        text_intermediate_size=bert["mlp_width"],
        text_max_position_embeddings=512,
        text_num_attention_heads=bert["heads"],
        text_num_hidden_layers=bert["layers"],
        text_type_vocab_size=2,
    )


if __name__ == "__main__":
    main()
