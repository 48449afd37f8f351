"""`python -m tools.cards`: writes the server's table of models from the installed open_clip's own.

Run it after each release of open_clip. Only what open_clip does not know is written here and in
`families`: the names that OpenAI gave its models, licences, and models that are not open_clip's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from tools import families

TABLE = Path(__file__).parents[1] / "clip_server/models/data/zoo.json"
_QUICK_GELU = "-quickgelu"
# OpenAI's own names, where open_clip has others.
_OPENAI = {
    "ViT-B/32": "ViT-B-32",
    "ViT-B/16": "ViT-B-16",
    "ViT-L/14": "ViT-L-14",
    "ViT-L/14@336px": "ViT-L-14-336",
    "ViT-L/14-336px": "ViT-L-14-336",
}
# What most checkpoints do; the table holds what differs.
_USUAL = {
    "mean": OPENAI_DATASET_MEAN,
    "std": OPENAI_DATASET_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
# How the pages of the repositories state the licence of weights, by the start of a repository's
# name and of a tag. The first that fits counts; what fits none has an empty licence.
_LICENCES = [
    ("laion/", "", "MIT"),
    ("timm/", "openai", "MIT"),
    ("timm/", "laion", "MIT"),
    ("timm/", "merged2b", "MIT"),
    ("timm/", "metaclip", "CC-BY-NC-4.0"),
    ("timm/", "webli", "Apache-2.0"),
    ("timm/PE-Core", "meta", "Apache-2.0"),
    # Apple's, for research only; its repositories said apple-sample-code-license until 2025.
    ("timm/MobileCLIP2", "", "apple-amlr"),
    ("apple/", "", "apple-amlr"),
    ("jienengchen/ViTamin", "", "MIT"),
    ("visheratin/", "", "CC-BY-NC-4.0"),
]


def table() -> dict[str, dict[str, Any]]:
    """`architectures` by name, `checkpoints` by `architecture::tag`, and `aliases` of those."""
    return {
        "architectures": {
            name: open_clip.get_model_config(name)
            for name in open_clip.list_models()
            if not name.endswith(_QUICK_GELU)  # the tags say which activation they need
        }
        | families.architectures(),
        "checkpoints": {
            f"{architecture}::{tag}": _checkpoint(
                tag, open_clip.get_pretrained_cfg(architecture, tag)
            )
            for architecture, tag in open_clip.list_pretrained()
            if not architecture.endswith(_QUICK_GELU)
        }
        | families.checkpoints(),
        "aliases": {theirs: f"{ours}::openai" for theirs, ours in _OPENAI.items()}
        | families.aliases(),
    }


def _checkpoint(tag: str, known: Mapping[str, Any]) -> dict[str, Any]:
    parts = known["hf_hub"].split("/")
    repository, file = "/".join(parts[:2]), "/".join(parts[2:])
    preprocess = {key: known[key] for key, usual in _USUAL.items() if known[key] != usual}
    entry = {
        "hub": repository,
        "file": file,
        "quick_gelu": known.get("quick_gelu", False),
        "preprocess": preprocess,
        "licence": _licence(repository, tag),
    }
    return {key: value for key, value in entry.items() if value}


def _licence(repository: str, tag: str) -> str:
    fitting = (
        licence
        for owner, beginning, licence in _LICENCES
        if repository.startswith(owner) and tag.startswith(beginning)
    )
    return next(fitting, "")


def write(path: Path = TABLE) -> None:
    """One line for each entry, so that a difference between two releases is easy to read."""
    sections = []
    for title, entries in table().items():
        lines = ",\n".join(
            f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()
        )
        sections.append(f"  {json.dumps(title)}: {{\n{lines}\n  }}")
    path.write_text("{\n" + ",\n".join(sections) + "\n}\n", "utf-8")


if __name__ == "__main__":
    write()
