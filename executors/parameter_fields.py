"""Fields of a dataclass of parameters, read from a flow's YAML and checked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import Field, field, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from clip_server.errors import ConfigurationError

P = TypeVar("P")

# Names of the types in messages about YAML.
_TYPES = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}


def at_least(least: int, default: int) -> int:
    """A field of whole numbers from `least` on."""
    number: int = field(default=default, metadata={"least": least})
    return number


def matching(pattern: str, allowed: str) -> str | None:
    """An optional text that matches a pattern. allowed: the matching texts, for messages."""
    text: str | None = field(default=None, metadata={"pattern": pattern, "allowed": allowed})
    return text


def read_parameters(kind: type[P], given: Mapping[str, Any], executor: str) -> P:
    """Reads the values of a YAML file into the dataclass `kind`. An empty key means its default.

    executor: the name of the class, for messages.

    Raises:
        ConfigurationError: a key is unknown, or its value has the wrong type or is not allowed.
    """
    values = {key: value for key, value in given.items() if value not in (None, "")}
    types = get_type_hints(kind)
    known: list[Field[Any]] = list(fields(kind))  # type: ignore[arg-type]
    for key in values.keys() - types.keys():
        raise ConfigurationError(_unknown(str(key), [each.name for each in known], executor))
    for each in known:
        if each.name not in values:
            continue
        if get_origin(types[each.name]) is tuple:
            values[each.name] = _several(values[each.name])
            for value in values[each.name]:
                _check(each, types[each.name], value)
        else:
            _check(each, types[each.name], values[each.name])
    return kind(**values)


def _several(value: Any) -> tuple[Any, ...]:
    """The values of a field of several; one alone needs no list."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _unknown(key: str, known: list[str], executor: str) -> str:
    likely = difflib.get_close_matches(key, known, 1)
    meant = f"; did you mean {likely[0]!r}?" if likely else ""
    return f"unknown parameter {key!r} of {executor}{meant} (known: {', '.join(known)})"


def _check(parameter: Field[Any], annotated: Any, value: Any) -> None:
    """Raises ConfigurationError if a value does not fit its field."""
    expected = next(each for each in (*get_args(annotated), annotated) if each in _TYPES)
    least, pattern = parameter.metadata.get("least"), parameter.metadata.get("pattern")
    # A bool is an int to Python, but not to someone who writes YAML.
    fits = type(value) is expected or (expected is float and type(value) is int)
    if fits and (least is None or value >= least):
        if pattern is None or re.fullmatch(pattern, value):
            return
        allowed = f"one of {parameter.metadata['allowed']}"
    else:
        allowed = _TYPES[expected] + ("" if least is None else f" from {least}")
    raise ConfigurationError(f"{parameter.name}: {value!r} is not {allowed}")
