"""What the users' guide of clip-as-service works with, for the tests beside this file.

docarray 1 had one Document with every field. `Document` has the same fields in docarray 2, which
ships `LegacyDocument` for the same purpose; the tests that need docarray 1 itself are in
test_docarray_1_guide.py.
"""

# docarray reads the annotations at run time, in its own older style.
# ruff: noqa: UP006, UP035, UP045, RUF012

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
from conftest import SAMPLES, saved
from docarray import BaseDoc, DocList
from docarray.typing import AnyTensor, NdArray
from PIL import Image

DIM = 256
CAT, DOG, PIZZA = (SAMPLES / f"{name}.png" for name in ("cat", "dog", "pizza"))
SENTENCES = ["First do it", "then do it right", "then do it better"]


class Document(BaseDoc):
    """A Document with the fields that clip-as-service's guide fills and reads."""

    text: Optional[str] = None
    uri: Optional[str] = None
    blob: Optional[bytes] = None
    tensor: Optional[AnyTensor] = None
    modality: Optional[str] = None
    embedding: Optional[NdArray] = None
    tags: Dict[str, Any] = {}
    scores: Dict[str, Any] = {}
    matches: Optional[DocList[Match]] = None
    chunks: Optional[DocList[Match]] = None


class Match(BaseDoc):
    """A Document below another one."""

    text: Optional[str] = None
    uri: Optional[str] = None
    blob: Optional[bytes] = None
    tensor: Optional[AnyTensor] = None
    embedding: Optional[NdArray] = None
    tags: Dict[str, Any] = {}
    scores: Dict[str, Any] = {}


Document.update_forward_refs(DocList=DocList, Match=Match)


def pixels(path: Path) -> np.ndarray[Any, Any]:
    """[H, W, 3] uint8: what `load_uri_to_image_tensor` gave."""
    return np.asarray(Image.open(path).convert("RGB"))


def data_uri(path: Path, kind: str = "png") -> str:
    """The image in `path`, as a `data:` URI of that kind."""
    image = base64.b64encode(saved(Image.open(path), kind)).decode()
    return f"data:image/{kind};base64,{image}"


def rows(documents: Any) -> np.ndarray[Any, Any]:
    """[N, D]: the embeddings of documents, `.embeddings` in docarray 1."""
    return np.stack([document.embedding for document in documents])


def texts(matches: Any) -> List[Any]:
    return [match.text for match in matches]
