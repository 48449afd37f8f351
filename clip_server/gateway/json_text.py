"""JSON in and out. What orjson refuses because of a single string or number in it is read and
written by the standard library: half of a surrogate pair, bytes that are not UTF-8, line ends,
NaN."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import orjson

from clip_server.errors import RequestError

# Digits of integers that every JSON reader takes.
_MOST_DIGITS = 18
# The most arrays and objects, strings and numbers in a body, by the characters that each of them
# has. Each takes some 60 bytes and 0.1 us to read, in which nothing else is answered.
_MOST_CHARACTERS = {
    "brackets and braces": (b"[{", 1_000_000),
    "quotation marks": (b'"', 4_000_000),
    "commas": (b",", 16_000_000),
}
# How deep arrays and objects may lie in one another in what comes back to the client.
MOST_NESTED = 100


def loads(body: bytes) -> Any:
    """A parsed body. NaN and infinite numbers are None; what is not Unicode in a string is left
    in it as lone surrogates, which are an error of that item.

    Raises:
        RequestError: it is not JSON, or has too many values.
    """
    _refuse_many_values(body)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        why = str(error)
    try:
        return json.loads(
            body.decode("utf-8-sig", "surrogateescape"),
            parse_float=_finite,
            parse_int=_integer,
            parse_constant=_finite,
            strict=False,  # as in "$(base64 cat.png)", whose lines end within the string
        )
    except (ValueError, RecursionError):
        raise RequestError(f"the body is not JSON: {why}") from None


def dumps(content: Any) -> bytes:
    """JSON of plain objects and numpy's arrays, at most `MOST_NESTED` and a few levels deep."""
    try:
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:
        return json.dumps(content, default=np.ndarray.tolist).encode()


def is_nested(value: Any, most: int = MOST_NESTED) -> bool:
    """Whether arrays and objects lie deeper in one another than `most`."""
    level = [value]
    for _ in range(most):
        parts = (each.values() if isinstance(each, dict) else each for each in level)
        level = [part for each in parts for part in each if isinstance(part, (dict, list))]
        if not level:
            return False
    return True


def _refuse_many_values(body: bytes) -> None:
    # Those in strings count as well: to tell them apart takes as long as to read the body.
    for name, (characters, most) in _MOST_CHARACTERS.items():
        if len(body) > most and sum(body.count(each) for each in characters) > most:
            raise RequestError(
                f"the body has more than {most:,} {name}, the most the server reads: send fewer "
                "items in one"
            )


def _finite(number: str) -> float | None:
    value = float(number)
    return value if math.isfinite(value) else None


def _integer(number: str) -> int | float | None:
    return int(number) if len(number) <= _MOST_DIGITS else _finite(number)
