"""Translates the flags of Chinese-CLIP's converter, `cn_clip/deploy/pytorch_to_onnx.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

_ARCHITECTURE = "--model-arch"
_CONTEXT_LENGTH = 52


def translate(arguments: Sequence[str]) -> list[str]:
    """Replaces the arguments of Chinese-CLIP's converter by ours; others stay.

    It writes files such as `PREFIX.img.fp32.onnx`; we write the folder `PREFIX`.
    """
    if not any(each.partition("=")[0] == _ARCHITECTURE for each in arguments):
        return list(arguments)
    theirs, ours = _parser().parse_known_args(arguments)
    name = f"CN-CLIP/{theirs.model_arch}"
    if theirs.pytorch_ckpt_path:
        name = f"{name}::{theirs.pytorch_ckpt_path}"
    towers = {"--text": theirs.convert_text, "--image": theirs.convert_vision}
    return [
        name,
        *("--to", "onnx"),
        *("--out", theirs.save_onnx_path),
        *("--context-length", str(theirs.context_length)),
        *(flag for flag, wanted in towers.items() if wanted),
        *ours,
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clip_server.convert", add_help=False, allow_abbrev=False
    )
    parser.add_argument(_ARCHITECTURE, required=True)
    parser.add_argument("--pytorch-ckpt-path")
    parser.add_argument("--save-onnx-path", required=True)
    parser.add_argument("--convert-text", action="store_true")
    parser.add_argument("--convert-vision", action="store_true")
    parser.add_argument("--context-length", type=int, default=_CONTEXT_LENGTH)
    return parser
