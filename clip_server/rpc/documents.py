"""Documents for Jina: its clients send them, and executors hand them on."""

# docarray reads the annotations at run time, in its own older style.
# ruff: noqa: UP006, UP035, UP045, RUF012

from typing import Any, Dict, Optional

from docarray import BaseDoc, DocList
from docarray.typing import NdArray


class ClipPart(BaseDoc):
    """A text or an image.

    text, blob (an encoded image), tensor (pixels), uri (a `data:` URI): one of them is the content.
    tensor: [H, W] or [H, W, C], of 0 to 255, or floats of 0 to 1.
    modality: `text` or `image`, for encoders of one of them.
    embedding: [D] float32, set by /encode.
    error: why there is no embedding.
    scores: of a match, set by /rank: `clip_score` and `clip_score_cosine`.
    """

    text: Optional[str] = None
    blob: Optional[bytes] = None
    tensor: Optional[NdArray] = None  # type: ignore[type-arg]
    uri: Optional[str] = None
    embedding: Optional[NdArray] = None  # type: ignore[type-arg]
    error: Optional[str] = None
    modality: Optional[str] = None
    tags: Dict[str, Any] = {}
    scores: Dict[str, float] = {}


class ClipChunk(ClipPart):
    """A part of a ClipDoc."""


class ClipMatch(ClipPart):
    """A candidate for a ClipDoc."""


class ClipDoc(ClipPart):
    """A document with others below it: `@c` and `@m` as clip-as-service had them.

    One level, and a class for each field: a schema that refers to itself, or to one class
    twice, does not cross Jina 3.34.
    """

    chunks: DocList[ClipChunk] = DocList[ClipChunk]()
    matches: DocList[ClipMatch] = DocList[ClipMatch]()


class UntypedDoc(ClipDoc):
    """The document of endpoints without annotations: a ClipDoc with Jina's other default fields.

    Jina's own default class refers to itself: it cannot be read with chunks or matches, and has
    neither the uri nor the error of a ClipDoc.
    """

    url: Optional[str] = None
