"""Documents of docarray, of either version, or objects as good as one."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any

from clip_client.errors import InvalidInputError

# The fields that may hold the content of a Document, and how inputs.py reads each. In this order:
# content that is present goes before content to be fetched.
CONTENT_FIELDS = {
    "blob": "blob",
    "bytes_": "image",
    "text": "text",
    "tensor": "image",
    "uri": "uri",
    "url": "uri",
}
# The steps of an access path.
_STEPS = {"r": "", "c": "chunks", "m": "matches"}


def is_document(raw_item: Any) -> bool:
    """Whether it is a Document of docarray, of either version, or as good as one."""
    # `dir` asks no property for its value.
    return hasattr(raw_item, "embedding") and not CONTENT_FIELDS.keys().isdisjoint(dir(raw_item))


def is_document_list(items: Any) -> bool:
    """Whether it is docarray's own list of Documents: a DocumentArray, DocList or DocVec."""
    return hasattr(items, "traverse_flat")


def in_own_list(documents: list[Any]) -> Any:
    """The Documents as a DocumentArray if they are docarray 1's, else as the list they are in."""
    # docarray 2 raises for a name of version 1 that is asked for as an attribute.
    docarray = vars(sys.modules.get("docarray", sys))
    kind, array = docarray.get("Document", ()), docarray.get("DocumentArray")
    if array is None or not all(isinstance(each, kind) for each in documents):
        return documents
    return array(documents)


def returned(items: Any, documents: list[Any]) -> Any:
    """The result of a call whose items were all Documents.

    `items` itself, with the same Documents; but a list for an iterator, and a DocumentArray for
    any other collection of docarray 1's Documents.
    """
    if is_document_list(items):
        return items
    own = in_own_list(documents)
    return items if own is documents and isinstance(items, Sequence) else own


def parse_access_paths(paths: str) -> list[str]:
    """`@r,c` as attributes to descend by, one list of steps per path: `["r", "c"]`.

    Raises InvalidInputError for anything but steps of r (root), c (chunks) and m (matches).
    """
    steps = [path.removeprefix("@") for path in paths.replace(" ", "").split(",")]
    if not all(each and set(each) <= _STEPS.keys() for each in steps):
        raise InvalidInputError(
            f"access_paths {paths!r}: allowed are '@r' (the documents passed), '@c' (their "
            "chunks) and '@m' (their matches), several as '@r,c'"
        )
    return steps


def descend(document: Any, paths: Iterable[str]) -> Iterator[Any]:
    """The Documents at the end of each path."""
    for path in paths:
        fields = [_STEPS[step] for step in path if _STEPS[step]]
        if fields and not is_document(document):
            raise InvalidInputError(
                f"access_paths are those of Documents, not of {type(document).__name__}"
            )
        level = [document]
        for field in fields:
            level = [each for parent in level for each in getattr(parent, field, None) or ()]
        yield from level


def candidates_of(document: Any, source: str) -> list[Any]:
    """The Documents in `.matches`, or in the attribute that `source` names.

    Raises InvalidInputError if there are none, and TypeError if it is no Document.
    """
    if not is_document(document):
        raise TypeError(
            f"rank takes a query and candidates, or Documents with `.{source}`, not "
            f"{type(document).__name__}"
        )
    candidates = list(getattr(document, source, None) or ())
    if not candidates:
        raise InvalidInputError(f"rank needs Documents with `.{source}`, and this one has none")
    return candidates


def note_failure(document: Any, message: str | None) -> None:
    """Stores why a Document has no embedding in its `.error` or `.tags`, if it has one."""
    if hasattr(document, "error"):
        document.error = message
    elif isinstance(tags := getattr(document, "tags", None), MutableMapping):
        if message is None:
            tags.pop("clip_error", None)
        else:
            tags["clip_error"] = message


def note_score(document: Any, name: str, value: float) -> None:
    """Stores a score in a Document's `.scores`: docarray 1's NamedScores, or a dict.

    Without `.scores`, in its dict `.tags`.
    """
    scores = getattr(document, "scores", None)
    if scores is None:
        scores = document.tags
    try:
        scores[name].value = value
    except (KeyError, AttributeError):
        scores[name] = value
