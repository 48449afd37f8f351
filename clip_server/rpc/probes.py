"""Inputs whose embeddings distinguish one model from another."""

from __future__ import annotations

# A text and an image, a PNG of eight by eight pixels, that every model encodes differently.
PROBE_TEXT = "a photo of a cat next to a red car"
PROBE_IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAh0lEQVR42g3IMQFAUQ"
    "QF0BvF8IIYxRBACBFEEEIAMYyCGP4/4wEAwmOIwhyRqMYs7u9HBCZTEqdKiqZbGoCF2Jih/Jwn+ZpjuQA1UmF9qn"
    "C91Gmt1QA8yIt91M8d6a9d1g3IogzO0xzPl4lO2xSgh/q4Q7u8Jdu6sf2APdrhLd3wtVzpfbv4AJT7V4FhG01PAA"
    "AAAElFTkSuQmCC"
)


def comparable_precision(precision: str) -> str:
    """`int8`, or `float` for all whose embeddings agree: fp32, fp16 and bf16."""
    return "int8" if precision == "int8" else "float"
