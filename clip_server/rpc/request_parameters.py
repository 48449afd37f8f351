"""The `parameters` of one request, read alike from an HTTP body and from a Jina request."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from clip_client.documents import parse_access_paths
from clip_client.errors import InvalidInputError
from clip_server.errors import RequestError

_ENCODINGS = ("float", "base64")
# Other names, most of which clip-as-service's users have in their requests.
_ALIASES = {
    "batch_size": "minibatch_size",
    "traversal_paths": "access_paths",
    "model": "model_name",
}
_MOST_MINIBATCH = 2**31
_LONGEST_PATHS = 100
# Characters of a value that an error message shows.
_MOST_SHOWN = 60
# Encodes piece by piece, so that only what is shown is encoded.
_JSON = json.JSONEncoder(ensure_ascii=False, skipkeys=True, default=repr)


@dataclass(frozen=True)
class RequestParameters:
    """Parameters of one request.

    normalize: embeddings of length 1.
    minibatch_size: items per batch for this request; 0: the server's own setting.
    drop_image_content: whether responses come back without `uri` and `blob`; None: as the
        protocol has it.
    encoding_format: of embeddings in JSON, `float` or `base64`.
    access_paths: which documents are encoded: a path from those sent for each, with the steps r,
        c (chunks) and m (matches); None: the server's own setting.
    model_name: of the encoder, or of its model, if the flow has several, or one of its aliases;
        "": the first.
    """

    normalize: bool = False
    minibatch_size: int = 0
    drop_image_content: bool | None = None
    encoding_format: str = "float"
    access_paths: list[str] | None = None
    model_name: str = ""

    @classmethod
    def parse(cls, given: Any, *, refuse_unknown: bool) -> RequestParameters:
        """From a request's `parameters`, in which null is the default.

        refuse_unknown: whether a name that is not known is an error, not another executor's.

        Raises:
            RequestError: a parameter has the wrong type or value, or is unknown.
        """
        return cls(**read_mapping(given, _READERS, _ALIASES, refuse_unknown=refuse_unknown))


def read_mapping(
    given: Any,
    readers: Mapping[str, Callable[[str, Any], Any]],
    aliases: Mapping[str, str],
    *,
    refuse_unknown: bool,
) -> dict[str, Any]:
    """The values of a request's `parameters`, each read by the reader of its name.

    Raises:
        RequestError: it is no object, a reader refuses a value, or a name is unknown.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise RequestError('"parameters" is not an object like {"normalize": true}')
    values: dict[str, Any] = {}
    for name, value in given.items():
        known = aliases.get(name, name)
        if known in readers:
            if value is not None:
                values[known] = readers[known](name, value)
        elif refuse_unknown:
            raise RequestError(
                f"unknown parameter {shown(name)}: the allowed are {', '.join(readers)}"
            )
    return values


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a finite number."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def is_whole(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a whole number; over Jina even those are floats."""
    return is_number(value) and value % 1 == 0


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {shown(value)}, which is neither true nor false")
    return value


def _size(name: str, value: Any) -> int:
    if not is_whole(value) or not 0 <= value < _MOST_MINIBATCH:
        raise RequestError(
            f"{name} is {shown(value)}, which is not a whole number from 1, or 0 for the "
            "server's own setting"
        )
    return int(value)


def _encoding(name: str, value: Any) -> str:
    if value not in _ENCODINGS:
        raise RequestError(f"{name} is {shown(value)}: the allowed are {', '.join(_ENCODINGS)}")
    return str(value)


def _paths(name: str, value: Any) -> list[str]:
    paths = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(path, str) for path in paths) or len(",".join(paths)) > _LONGEST_PATHS:
        raise RequestError(f"{name} is {shown(value)}, which is not a string like '@r' or '@r,c'")
    try:
        return parse_access_paths(",".join(paths))
    except InvalidInputError as error:
        raise RequestError(str(error)) from None


def name_of(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} is {shown(value)}, which is not a string")
    return value


_READERS = {
    "normalize": flag,
    "minibatch_size": _size,
    "drop_image_content": flag,
    "encoding_format": _encoding,
    "access_paths": _paths,
    "model_name": name_of,
}


def shown(value: Any) -> str:
    """A value as an error message shows it: the beginning of its JSON, however large or deeply
    nested it is."""
    text = ""
    for part in _JSON.iterencode(value[: _MOST_SHOWN + 1] if isinstance(value, str) else value):
        text += part
        if len(text) > _MOST_SHOWN:
            text = f"{text[:_MOST_SHOWN]}..."
            break
    return text.encode("utf-8", "backslashreplace").decode()
