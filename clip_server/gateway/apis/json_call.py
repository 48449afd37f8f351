"""A JSON body of documents, as clip-as-service and Jina have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from clip_server import logs
from clip_server.errors import RequestError
from clip_server.gateway import json_text
from clip_server.gateway.apis.entries import find_fault
from clip_server.rpc.request_parameters import RequestParameters

# The longest name or id in a request, in characters.
_LONGEST_NAME = 1024


@dataclass(frozen=True)
class JsonCall:
    """A JSON body, without its parts that depend on the endpoint.

    endpoint: as it came.
    target: a pattern of the executors that get it, as Jina's `target_executor`; "": all.
    request_id: as it came, or that of the HTTP request.
    is_jinas: one of Jina's clients sent it, which read no other fields than Jina's.
    entries: of `data`; None: it has none.
    given: its `parameters`, as they came.
    parameters: the same, read.
    """

    endpoint: str
    target: str
    request_id: str
    is_jinas: bool
    entries: list[Any] | None
    given: Any
    parameters: RequestParameters

    @classmethod
    def parse(cls, body: Mapping[str, Any], endpoint: str | None) -> JsonCall:
        """From a body.

        endpoint: None: the body names it.

        Raises:
            RequestError: a field has the wrong type.
        """
        header = body.get("header")
        if not (header is None or isinstance(header, Mapping)):
            raise RequestError('"header" is not an object like {"requestId": "1"}')
        places = (body, header) if header else (body,)
        named = _name("execEndpoint", "exec_endpoint", *places)
        given = body.get("parameters")
        if given and json_text.is_nested([given]):
            raise RequestError(f'"parameters" are nested more than {json_text.MOST_NESTED} deep')
        parameters = RequestParameters.parse(given, refuse_unknown=False)
        if not parameters.model_name:
            parameters = replace(parameters, model_name=_name("model", "model_name", body))
        return cls(
            endpoint or named or "/",
            _name("targetExecutor", "target_executor", *places),
            _name("requestId", "request_id", *places) or logs.request_id.get(),
            header is not None,
            _entries(body.get("data")),
            given,
            parameters,
        )

    @property
    def drop_image_content(self) -> bool | None:
        """As the parameters say. Otherwise Jina's clients get all back, as over Jina's protocol."""
        asked = self.parameters.drop_image_content
        return False if asked is None and self.is_jinas else asked

    def required_entries(self) -> list[Any]:
        """The entries. Raises RequestError if there is no `data`."""
        if self.entries is None:
            raise RequestError('"data" is not a list like [{"text": "a cat"}]')
        return self.entries

    def refuse_unknown_parameters(self) -> None:
        """Raises RequestError for one of another name; Jina's clients may send them for other
        executors."""
        if self.given and not self.is_jinas:
            RequestParameters.parse(self.given, refuse_unknown=True)

    def show_scores(self, scores: Mapping[str, Any]) -> Mapping[str, Any]:
        """Scores of a match, each an object with its `value`, as docarray 1 has them; a number
        where the sender's class has a field of numbers for them, as ClipMatch has."""
        if self._sends_scores:
            return scores
        return {name: {"value": score} for name, score in scores.items()}

    @cached_property
    def _sends_scores(self) -> bool:
        matches = (match for entry in self.entries or () for match in _matches(entry))
        return any(isinstance(match.get("scores"), dict) for match in matches)

    def answer(
        self, data: list[Any], routes: Iterable[tuple[str, str, str]], parameters: Any
    ) -> dict[str, Any]:
        """The answer as Jina's clients read it.

        routes: each executor that took part, and when it began and ended, in ISO 8601.
        """
        return {
            "header": {
                "requestId": self.request_id,
                "status": None,
                "execEndpoint": self.endpoint,
                "targetExecutor": self.target,
            },
            "parameters": parameters,
            "routes": [
                {
                    "executor": name,
                    "startTime": begun,
                    "endTime": ended,
                    "status": None,
                }
                for name, begun, ended in routes
            ],
            "data": data,
        }


def _matches(entry: Any) -> list[Any]:
    matches = entry.get("matches") if isinstance(entry, Mapping) else None
    return [each for each in matches or () if isinstance(each, Mapping)]


def _name(camel: str, snake: str, *places: Mapping[str, Any]) -> str:
    for place in places:
        for key in (camel, snake):
            value = place.get(key)
            if value is None:
                continue
            if not isinstance(value, str) or len(value) > _LONGEST_NAME:
                raise RequestError(
                    f'"{key}" is not a string of at most {_LONGEST_NAME:,} characters'
                )
            if fault := find_fault({"text": value}):
                raise RequestError(fault.replace("text", key, 1))
            return value
    return ""


def _entries(data: Any) -> list[Any] | None:
    if isinstance(data, dict):  # Jina's older {"data": {"docs": [...]}}, or a document alone
        data = data.get("docs", [data])
    if not (data is None or isinstance(data, list)):
        raise RequestError('"data" is not a list like [{"text": "a cat"}]')
    return data
