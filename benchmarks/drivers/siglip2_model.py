"""Writes a SigLIP 2 with seeded random weights as a Hugging Face folder, which infinity serves.

Runs in infinity's environment: `siglip2_model.py TARGET`. The architecture is that of
ViT-B-16-SigLIP2. The tokenizer is trained on the captions that the drivers send, since none comes
with the packages; the model's vocabulary keeps its size.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
from driver import captions
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

CONTEXT_LENGTH, VOCABULARY = 64, 256_000
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]


def main(target: Path) -> None:
    torch.manual_seed(0)
    config = SiglipConfig(
        text_config={"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT_LENGTH},
        vision_config={"image_size": 224, "patch_size": 16},
    )
    SiglipModel(config).save_pretrained(target)
    images = SiglipImageProcessor(size={"height": 224, "width": 224})
    SiglipProcessor(images, tokenizer()).save_pretrained(target)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte pair encoding as Gemma's: a text ends with `<eos>` and is padded with `<pad>`."""
    found = Tokenizer(models.BPE(unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=SPECIAL, show_progress=False)
    found.train_from_iterator(itertools.islice(captions(seed=0), 2000), trainer)
    end = ("<eos>", SPECIAL.index("<eos>"))
    found.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[end])
    return PreTrainedTokenizerFast(
        tokenizer_object=found,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=CONTEXT_LENGTH,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
