"""The parameters of a search."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, SupportsIndex

import numpy as np

from clip_client.errors import InvalidInputError
from clip_client.parameters import positive
from clip_client.proto import clip_pb2

Target = Literal["both", "texts", "images"]
_TARGETS = {"both": clip_pb2.BOTH, "texts": clip_pb2.TEXTS, "images": clip_pb2.IMAGES}


@dataclass(frozen=True)
class SearchParameters:
    """The arguments of `Client.search` that the server gets."""

    limit: SupportsIndex | None = 10
    filter: Mapping[str, Any] | str | None = None
    target: str = "both"
    score_threshold: float | None = None
    min_relevance: float | None = None

    def updated(self, given: Mapping[str, Any] | None) -> SearchParameters:
        """The same with the `parameters` of a call. Raises InvalidInputError for unknown ones."""
        known = [field.name for field in fields(self)]
        # As clip-as-service's clients pass it, whose images never come back either.
        values = {k: v for k, v in (given or {}).items() if k != "drop_image_content"}
        for name in values:
            if name not in known:
                raise InvalidInputError(
                    f"no parameter is named {name!r}; there are {', '.join(known)}"
                )
        return replace(self, **values)

    def to_request(self) -> clip_pb2.SearchRequest:
        """A request without queries. Raises InvalidInputError for a wrong value."""
        if self.target not in _TARGETS:
            raise InvalidInputError(f"target is one of {', '.join(_TARGETS)}, not {self.target!r}")
        return clip_pb2.SearchRequest(
            limit=0 if self.limit is None else min(positive("limit", self.limit), 2**31),
            filter=to_json_filter(self.filter),
            target=_TARGETS[self.target],
            score_threshold=_number("score_threshold", self.score_threshold, math.inf),
            min_relevance=_number("min_relevance", self.min_relevance, 1),
        )


def to_json_filter(condition: Any) -> str:
    """A filter as JSON, which may be JSON already. Raises InvalidInputError if it cannot be."""
    if condition is None:
        return ""
    if isinstance(condition, str):
        return condition
    try:
        if isinstance(condition, Mapping):
            return json.dumps(dict(condition))
    except (TypeError, ValueError, RecursionError):
        pass
    raise InvalidInputError(
        f"filter is a dict such as {{'price': {{'$lt': 50}}}}, not {condition!r:.60}"
    )


def _number(name: str, value: Any, most: float) -> float | None:
    if value is None:
        return None
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not is_number or not -math.inf < value <= most or (most == 1 and value < 0):
        allowed = "a number from 0 to 1" if most == 1 else "a number"
        raise InvalidInputError(f"{name} is {allowed}, not {value!r:.60}")
    return float(value)
