"""The `parameters` of searching, counting and deleting, from an HTTP body or a Jina request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.rpc.request_parameters import is_number, is_whole, read_mapping, shown

TARGETS = {"both": pb.BOTH, "texts": pb.TEXTS, "images": pb.IMAGES}
_ALIASES = {"return_k": "limit", "top_k": "limit", "score_thres": "score_threshold"}
_LONGEST_FILTER = 1 << 20


@dataclass(frozen=True)
class SearchParameters:
    """Parameters of one request to a collection.

    limit: hits of each query; 0: the indexer's own setting.
    filter: a condition on tags, in JSON; empty: none.
    target: `texts`, `images` or `both`, as a number of `pb.Target`.
    score_threshold: the least score, with L2 the greatest distance; None: the indexer's own.
    min_relevance: from 0 to 1; None: any.
    """

    limit: int = 0
    filter: str = ""
    target: pb.Target = pb.BOTH
    score_threshold: float | None = None
    min_relevance: float | None = None

    @classmethod
    def parse(cls, given: Any, *, refuse_unknown: bool) -> SearchParameters:
        """From a request's `parameters`, in which null is the default.

        refuse_unknown: whether a name that is not known is an error, not another executor's.

        Raises:
            RequestError: a parameter has the wrong type or value, or is unknown.
        """
        return cls(**read_mapping(given, _READERS, _ALIASES, refuse_unknown=refuse_unknown))

    def to_request(self) -> pb.SearchRequest:
        """The request, without queries."""
        return pb.SearchRequest(**vars(self))


def _limit(name: str, value: Any) -> int:
    if not is_whole(value) or value < 1:
        raise RequestError(f"{name} is {shown(value)}, which is not a whole number from 1")
    return min(int(value), 2**31)


def _filter(name: str, value: Any) -> str:
    text = value if isinstance(value, str) else None
    if isinstance(value, Mapping):
        try:
            text = json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            text = None
    if text is None or len(text) > _LONGEST_FILTER:
        raise RequestError(f'{name} is not an object like {{"colour": "red"}}')
    return text


def _target(name: str, value: Any) -> int:
    if not isinstance(value, str) or value not in TARGETS:
        raise RequestError(f"{name} is {shown(value)}: the allowed are {', '.join(TARGETS)}")
    return TARGETS[value]


def _number(name: str, value: Any) -> float:
    if not is_number(value):
        raise RequestError(f"{name} is {shown(value)}, which is not a number")
    return float(value)


def _fraction(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 <= number <= 1:
        raise RequestError(f"{name} is {shown(value)}, which is not between 0 and 1")
    return number


_READERS = {
    "limit": _limit,
    "filter": _filter,
    "target": _target,
    "score_threshold": _number,
    "min_relevance": _fraction,
}
