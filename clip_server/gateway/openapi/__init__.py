"""The OpenAPI document of the HTTP port."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from importlib import resources
from typing import Any

import yaml

from clip_server import __version__

_OWN = "Error"
_FAILED = {
    "400": "The request is not as described, or one of its items cannot be encoded.",
    "401": "The server asks for a key, and none or a wrong one was sent.",
    "404": "There is no such model or endpoint; the message lists those there are.",
    "408": "The headers or the body came too slowly.",
    "413": "The body is too large: send fewer items.",
    "415": "The Content-Encoding is neither gzip nor deflate.",
    "429": "The server is full, or the key has too many items in flight, or the address too many "
    "connections: retry after Retry-After seconds.",
    "431": "The headers are too large.",
    "500": "An error in the server; see its log.",
    "503": "No encoder is ready, the server is shutting down, or has too many connections: retry "
    "after Retry-After seconds.",
    "504": "The request timed out.",
}
# Answered before the path is known: in our own form, whatever the API.
_BEFORE_THE_PATH = {"408", "431"}
# Answered before or after; the answer says when to retry.
_BEFORE_OR_AFTER = {"429", "503"}
_WITHOUT_BODY = ("401", "408", "429", "431", "500", "503")


@cache
def document() -> dict[str, Any]:
    """The document as JSON's types."""
    text = resources.files(__name__).joinpath("openapi.yml").read_text("utf-8")
    # The C loader, where PyYAML has it, is ten times as fast.
    found: dict[str, Any] = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    found["info"]["version"] = __version__
    found["paths"] = {
        path: {method: _with_errors(operation) for method, operation in operations.items()}
        for path, operations in found["paths"].items()
    }
    return found


def _with_errors(operation: dict[str, Any]) -> dict[str, Any]:
    """An operation with the responses by which it may fail."""
    described = {key: value for key, value in operation.items() if key != "x-error"}
    forms = operation.get("x-error", [_OWN])
    statuses: Iterable[str] = _FAILED if "requestBody" in operation else _WITHOUT_BODY
    if operation.get("security") == []:
        statuses = [status for status in statuses if status != "401"]
    errors = {status: _error(status, forms) for status in statuses}
    return {**described, "responses": {**errors, **operation["responses"]}}


def _error(status: str, forms: list[str]) -> dict[str, Any]:
    schemas = [{"$ref": f"#/components/schemas/{name}"} for name in _forms(status, forms)]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    response: dict[str, Any] = {
        "description": _FAILED[status],
        "content": {"application/json": {"schema": schema}},
    }
    if status in _BEFORE_OR_AFTER:
        response["headers"] = {"Retry-After": {"schema": {"type": "integer"}}}
    return response


def _forms(status: str, forms: list[str]) -> Iterator[str]:
    """The schemas of the errors with this status. forms: those of the API's own errors."""
    if status in _BEFORE_THE_PATH:
        yield _OWN
        return
    yield from forms
    if status in _BEFORE_OR_AFTER and _OWN not in forms:
        yield _OWN
