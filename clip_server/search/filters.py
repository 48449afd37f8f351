"""Filters on tags: conditions written as JSON, with the operators of MongoDB's.

    {"colour": "red"}                                  equal to
    {"price": {"$gte": 10, "$lt": 50}}                 in a range
    {"colour": {"$in": ["red", "blue"]}}               one of several
    {"$or": [{"colour": "red"}, {"price": {"$lt": 5}}]}

Engines translate the parsed condition; values never become part of a query's text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from clip_server.errors import RequestError
from clip_server.rpc.request_parameters import shown

Scalar: TypeAlias = str | int | float | bool
Operator = Literal["<", "<=", ">", ">="]

_MOST_CONDITIONS = 256
_MOST_VALUES = 1000
_MOST_NESTED = 16
_LONGEST_FIELD = 256
_LARGEST_INTEGER = 2**63 - 1
_COMPARISONS: dict[str, Operator] = {
    "$lt": "<",
    "$lte": "<=",
    "$gt": ">",
    "$gte": ">=",
}
# The second name of $ne is docarray's.
_NOT_EQUAL = ("$ne", "$neq")
_OPERATORS = ("$eq", *_NOT_EQUAL, *_COMPARISONS, "$in", "$nin", "$exists", "$not")


@dataclass(frozen=True)
class OneOf:
    """A tag that is one of several values, or a list that holds one of them.

    field: the names on the way to the tag, several for nested tags.
    """

    field: tuple[str, ...]
    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class Compare:
    """A number or a text that is less or greater than another of its type."""

    field: tuple[str, ...]
    operator: Operator
    value: str | float


@dataclass(frozen=True)
class Exists:
    """Whether there is such a tag."""

    field: tuple[str, ...]


@dataclass(frozen=True)
class Every:
    """All of the conditions; true where there are none."""

    conditions: tuple[Condition, ...]


@dataclass(frozen=True)
class Some:
    """At least one of the conditions; false where there are none."""

    conditions: tuple[Condition, ...]


@dataclass(frozen=True)
class Negation:
    """The opposite of a condition; also true where the tag does not exist."""

    condition: Condition


Condition: TypeAlias = OneOf | Compare | Exists | Every | Some | Negation


def parse_json(text: str) -> Condition | None:
    """The condition of a filter in JSON; None where it is empty.

    Raises:
        RequestError: it is not JSON, or as for `parse`.
    """
    if not text.strip():
        return None
    try:
        written = json.loads(text)
    except (ValueError, RecursionError):
        raise _refused("it is not JSON") from None
    return parse(written)


def parse(written: Any) -> Condition | None:
    """The condition of a filter as a dict; None where it is empty.

    Raises:
        RequestError: an operator is unknown, a value has the wrong type, or there are too many
            conditions.
    """
    if written is None or written == {}:
        return None
    return _Parser().parse_object(written)


class _Parser:
    def __init__(self) -> None:
        self._count = 0

    def parse_object(self, written: Any, depth: int = 0) -> Condition:
        """`{"field": ..., "$and": [...]}`."""
        if not isinstance(written, Mapping):
            raise _refused(f"{shown(written)} is not an object")
        if depth > _MOST_NESTED:
            raise _refused(f"it is nested more than {_MOST_NESTED} deep")
        return _every([self._member(key, value, depth) for key, value in written.items()])

    def _member(self, key: Any, value: Any, depth: int) -> Condition:
        self._count += 1
        if self._count > _MOST_CONDITIONS:
            raise _refused(f"it has more than {_MOST_CONDITIONS} conditions")
        combine = _COMBINATIONS.get(key)
        if combine is not None:
            return combine([self.parse_object(each, depth + 1) for each in _listed(key, value)])
        if key == "$not":
            return Negation(self.parse_object(value, depth + 1))
        field = _field(key)
        if isinstance(value, Mapping):
            return self._operators(field, value, depth)
        return OneOf(field, (_scalar(key, value),))

    def _operators(
        self, field: tuple[str, ...], written: Mapping[str, Any], depth: int
    ) -> Condition:
        if not written:
            raise _refused(f"{'.'.join(field)} has no operator")
        return _every([self._operator(field, *each, depth) for each in written.items()])

    def _operator(self, field: tuple[str, ...], name: str, value: Any, depth: int) -> Condition:
        self._count += 1
        if name in _COMPARISONS:
            return Compare(field, _COMPARISONS[name], _ordered(name, value))
        if name == "$eq":
            return OneOf(field, (_scalar(name, value),))
        if name in _NOT_EQUAL:
            return Negation(OneOf(field, (_scalar(name, value),)))
        if name in ("$in", "$nin"):
            one = OneOf(field, tuple(_scalar(name, each) for each in _listed(name, value)))
            return one if name == "$in" else Negation(one)
        if name == "$exists":
            if not isinstance(value, bool):
                raise _refused("$exists is true or false")
            return Exists(field) if value else Negation(Exists(field))
        if name == "$not" and isinstance(value, Mapping) and depth < _MOST_NESTED:
            return Negation(self._operators(field, value, depth + 1))
        raise _refused(f"{shown(name)} is no operator; there are {', '.join(_OPERATORS)}")


def _every(conditions: Sequence[Condition]) -> Condition:
    return conditions[0] if len(conditions) == 1 else Every(tuple(conditions))


_COMBINATIONS: dict[Any, Callable[[list[Condition]], Condition]] = {
    "$and": _every,
    "$or": lambda conditions: Some(tuple(conditions)),
    "$nor": lambda conditions: Negation(Some(tuple(conditions))),
}


def _field(key: Any) -> tuple[str, ...]:
    if not isinstance(key, str) or not 0 < len(key) <= _LONGEST_FIELD:
        raise _refused(f"a tag's name has 1 to {_LONGEST_FIELD} characters")
    if key.startswith("$"):
        raise _refused(
            f"{shown(key)} is no operator here; there are {', '.join(_COMBINATIONS)} and $not, "
            f"and for a tag {', '.join(_OPERATORS)}"
        )
    names = tuple(key.split("."))
    if not all(names) or any(c in key for c in '"\\') or not key.isprintable():
        raise _refused(
            f"{shown(key)} is no tag's name: it may not hold quotation marks, backslashes or "
            "control characters; a dot separates the names of nested tags"
        )
    return names


def _listed(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list | tuple) or len(value) > _MOST_VALUES:
        raise _refused(f"{name} has a list of at most {_MOST_VALUES:,} entries")
    return list(value)


def _scalar(name: str, value: Any) -> Scalar:
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int) and abs(value) <= _LARGEST_INTEGER:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise _refused(f"{shown(name)}: {shown(value)} is not a text, a number, true or false")


def _ordered(name: str, value: Any) -> str | float:
    scalar = _scalar(name, value)
    if isinstance(scalar, bool):
        raise _refused(f"{name} compares numbers and texts, not true and false")
    return scalar


def _refused(why: str) -> RequestError:
    return RequestError(f"filter: {why}; docs/search.md#filters shows what a filter may be")
