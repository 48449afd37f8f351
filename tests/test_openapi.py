"""The OpenAPI document and the page that shows it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import requests
from conftest import Http, Server
from openapi_spec_validator import OpenAPIV31SpecValidator

from clip_server import __version__
from clip_server.gateway.access import Access
from clip_server.gateway.http import HttpListener
from clip_server.gateway.listener import ListenerOptions
from clip_server.gateway.openapi import document

# Any other path is an endpoint of the flow: it has no route.
OTHER_PATHS = {("/{endpoint}", "post")}
OPERATIONS = [(path, method) for path, methods in document()["paths"].items() for method in methods]
SEARCHES = [
    each for each in OPERATIONS if "Search" in document()["paths"][each[0]][each[1]]["tags"]
]
# A body that is wrong in every API.
WRONG = {"data": 1, "input": 1, "inputs": 1, "texts": 1, "parameters": 1}


@pytest.fixture(scope="module")
def served(http: Http) -> dict[str, Any]:
    content: dict[str, Any] = http.get("/openapi.json").json()
    return content


@pytest.fixture(scope="module")
def search(search_server: Server) -> Iterator[Http]:
    with Http(search_server.http) as session:
        yield session


def validate(answer: requests.Response, served: dict[str, Any], operation: dict[str, Any]) -> None:
    """Fails unless an answer is one that the document has."""
    described = operation["responses"][str(answer.status_code)]
    if "content" not in described:
        assert answer.content == b""
        return
    media_type = answer.headers["Content-Type"].split(";")[0]
    schema = described["content"][media_type]["schema"]
    content = answer.json() if media_type == "application/json" else answer.text
    jsonschema.Draft202012Validator({**schema, "components": served["components"]}).validate(
        content
    )


def send_example(
    http: Http, path: str, method: str, operation: dict[str, Any]
) -> requests.Response:
    for each in operation.get("parameters", ()):
        if each["in"] == "path":
            path = path.replace(f"{{{each['name']}}}", each["example"])
    content = operation.get("requestBody", {}).get("content", {})
    if "multipart/form-data" in content:
        form = content["multipart/form-data"]["example"]
        return http.post(path, files={name: (None, value) for name, value in form.items()})
    example = content.get("application/json", {}).get("example")
    return http.request(method, path, json=example)


def test_the_document_is_openapi(served: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(served).validate()
    assert served["openapi"].startswith("3.1")
    assert served["info"]["version"] == __version__


def test_the_document_has_the_routes_of_the_port(served: dict[str, Any]) -> None:
    listener = HttpListener("", 0, None, None, None, None, None, ListenerOptions(1))  # type: ignore[arg-type]
    routes = {
        (re.sub(r":\w+}", "}", route.path), method.lower())  # type: ignore[attr-defined]
        for route in listener._app().routes
        for method in route.methods  # type: ignore[attr-defined]
        if method != "HEAD"
    }
    described = {(path, method) for path, methods in served["paths"].items() for method in methods}
    assert described == routes | OTHER_PATHS


def test_the_document_says_which_routes_need_no_key(served: dict[str, Any]) -> None:
    for path, method in OPERATIONS:
        operation = served["paths"][path][method]
        assert (operation.get("security") == []) == Access().is_open(path)
        assert ("401" in operation["responses"]) != Access().is_open(path)


@pytest.mark.parametrize(("path", "method"), [each for each in OPERATIONS if each not in SEARCHES])
def test_examples_are_answered_as_described(
    http: Http, served: dict[str, Any], path: str, method: str
) -> None:
    operation = served["paths"][path][method]
    answer = send_example(http, path, method, operation)
    assert answer.ok, answer.text
    validate(answer, served, operation)
    if "requestBody" in operation and path not in ("/post", "/{endpoint}"):
        wrong = http.request(method, path, json=WRONG)
        assert wrong.status_code == 400
        validate(wrong, served, operation)
        encoded = http.request(method, path, headers={"Content-Encoding": "br"})
        assert encoded.status_code == 415
        validate(encoded, served, operation)


def test_examples_of_searches_are_answered_as_described(
    search: Http, http: Http, served: dict[str, Any]
) -> None:
    # The last deletes what the first stores.
    for path, method in SEARCHES:
        operation = served["paths"][path][method]
        answer = send_example(search, path, method, operation)
        assert answer.ok, answer.text
        validate(answer, served, operation)
        validate(search.request(method, path, json=WRONG), served, operation)
        without_collection = send_example(http, path, method, operation)
        assert not without_collection.ok
        validate(without_collection, served, operation)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v2/embed", "/embed", "/vectorize"])
def test_a_model_that_is_not_served(http: Http, served: dict[str, Any], path: str) -> None:
    operation = served["paths"][path]["post"]
    example = operation["requestBody"]["content"]["application/json"]["example"]
    answer = http.post(path, json={**example, "model": "other"})
    assert answer.status_code == 404
    validate(answer, served, operation)


def test_the_page_of_the_document(http: Http) -> None:
    page = http.get("/docs")
    assert page.headers["Content-Type"].startswith("text/html")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "://" not in page.text


@pytest.mark.slow
def test_generated_requests_are_answered_as_described(
    search_server: Server, tmp_path: Path
) -> None:
    # In an environment of its own: its dependencies are not those of the server.
    binaries = tmp_path / "venv" / "bin"
    subprocess.run([sys.executable, "-m", "venv", binaries.parent], check=True)
    subprocess.run(
        [binaries / "python", "-m", "pip", "install", "-q", "schemathesis>=4,<5"], check=True
    )
    checks = ("not_a_server_error", "status_code_conformance", "response_schema_conformance")
    command = [binaries / "schemathesis", "run", f"{search_server.http}/openapi.json",
               "--max-examples=6", "--phases=examples,fuzzing", f"--checks={','.join(checks)}",
               "--seed=1", "--suppress-health-check=all", "--continue-on-failure"]  # fmt: skip
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert re.search(r"Operations:\s+(\d+) selected / \1 total", ran.stdout)
