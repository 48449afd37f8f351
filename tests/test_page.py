"""The pages of the HTTP port, in headless Chromium."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
from browser import Page, chromium, open_page
from conftest import SAMPLES, Http, Server, Start, flow

from clip_client import Client
from clip_client.scores import probabilities

TEXTS = ['a cat\'s "smile" \\ $HOME `id`', "a slice of pizza", "a rocket"]
IMAGES = [SAMPLES / "cat.png", SAMPLES / "pizza.png"]
COMPARE = "document.querySelector('button[type=submit]').click()"
HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}

# Continuous integration installs it, and says so; without it nobody would notice that it is gone.
needs_browser = pytest.mark.skipif(
    chromium() is None and not os.environ.get("CLIP_TEST_BROWSER"),
    reason="chromium is not installed",
)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with open_page(tmp_path) as page:
        yield page


def test_browsers_get_the_page_and_programs_the_endpoints(http: Http) -> None:
    assert "POST /encode" in http.get("/").json()["endpoints"]
    response = http.get("/", headers=HTML)
    assert response.headers["Content-Type"].startswith("text/html")
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "://" not in policy
    # Only `/` is the page.
    assert http.get("/info", headers=HTML).json()["dim"] == 256
    assert http.post("/", headers=HTML, json={"data": ["a cat"]}).json()["data"][0]["embedding"]


def choose(page: Page, file: Path) -> None:
    page.choose("#files", file)


def drop(page: Page, file: Path) -> None:
    transfer(page, file, "new DragEvent('drop', { dataTransfer: data, bubbles: true })")


def paste(page: Page, file: Path) -> None:
    transfer(page, file, "new ClipboardEvent('paste', { clipboardData: data, bubbles: true })")


def transfer(page: Page, file: Path, event: str) -> None:
    """Has the page get an event that carries a file."""
    content = base64.b64encode(file.read_bytes()).decode()
    page.evaluate(
        f"""(() => {{
          const bytes = Uint8Array.from(atob("{content}"), (each) => each.charCodeAt(0));
          const data = new DataTransfer();
          data.items.add(new File([bytes], {json.dumps(file.name)}, {{ type: "image/png" }}));
          document.body.dispatchEvent({event});
        }})()"""
    )


@needs_browser
@pytest.mark.slow
def test_comparing(page: Page, onnx_server: Server, tmp_path: Path) -> None:
    broken = tmp_path / "it's broken.png"
    broken.write_bytes(b"no image")
    page.resize(360)
    page.open(f"{onnx_server.http}/")
    page.wait_for("document.querySelector('#model').innerText.includes('256 dimensions')")
    assert page.evaluate("document.querySelector('#models-field').hidden")
    assert page.evaluate("document.querySelector('#search').hidden")
    page.evaluate(COMPARE)
    assert page.text("#status") == "Type a text or choose an image first."
    assert page.evaluate("document.activeElement.id") == "texts"

    page.type("#texts", "\n".join(TEXTS) + "\n\n")
    for number, (way, file) in enumerate(
        ((choose, IMAGES[0]), (drop, IMAGES[1]), (paste, broken)), 1
    ):
        way(page, file)
        page.wait_for(f"document.querySelectorAll('#thumbnails li').length === {number}")
    assert page.text("#status") == "3 images chosen."
    page.evaluate("document.querySelector('button[type=submit]').focus()")
    page.press("Enter", 13)
    page.wait_for("document.querySelector('#status').innerText === '5 of 6 encoded.'")
    assert page.text("#errors").startswith("it's broken.png: ")
    assert page.evaluate("document.activeElement.id") == "results"

    with Client(onnx_server.grpc) as client:
        texts = client.encode([{"text": text} for text in TEXTS], normalize=True)
        images = client.encode(IMAGES, normalize=True)
        logits = client.info().logit_scale * images @ texts.T
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shown = page.evaluate("[...document.querySelectorAll('td')].map((cell) => cell.innerText)")
    cells = np.array([cell.removesuffix("%").split() for cell in shown if cell], float)
    assert np.allclose(cells[:, 0], (images @ texts.T).ravel(), atol=6e-4)
    expected = 100 * powers / powers.sum(axis=1, keepdims=True)
    assert np.allclose(cells[:, 1], expected.ravel(), atol=0.06)
    best = page.evaluate(
        "[...document.querySelectorAll('ol li:first-child')].map(e => e.innerText)"
    )
    assert [each.splitlines()[0] for each in best] == TEXTS[:2]

    # Nothing is wider than a phone, and dark mode is dark.
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    colours = []
    for scheme in ("light", "dark"):
        page.darken(scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    light, dark = ([int(part) for part in each[4:-1].split(",")] for each in colours)
    assert sum(light) > 600 > 150 > sum(dark)
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, textarea, button')].filter(e => !e.innerText.trim()"
        " && !e.getAttribute('aria-label') && !e.labels?.length).length"
    )
    assert unnamed == 0
    assert page.complaints == []

    # What it offers to copy runs, in the folder of the images, and returns the same.
    for image in IMAGES:
        (tmp_path / image.name).write_bytes(image.read_bytes())
    curl = ["bash", "-ec", page.evaluate("document.querySelector('#curl').textContent")]
    said = subprocess.run(curl, cwd=tmp_path, capture_output=True, check=True).stdout
    data = json.loads(said)["data"]
    assert [each["text"] for each in data[:3]] == TEXTS
    embeddings = np.array([each["embedding"] for each in data[:5]])
    assert np.allclose(embeddings, np.vstack([texts, images]), atol=1e-6)
    assert "error" in data[5]
    page.evaluate("document.querySelector('#thumbnails li:last-child button').click()")
    page.evaluate(COMPARE)
    page.wait_for("document.querySelector('#status').innerText === '5 of 5 encoded.'")
    python = [sys.executable, "-c", page.evaluate("document.querySelector('#python').textContent")]
    printed = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "a slice of pizza" in printed.stdout


@needs_browser
@pytest.mark.slow
def test_choosing_a_model(page: Page, two_models: Server) -> None:
    page.open(f"{two_models.http}/")
    page.wait_for("document.querySelector('#model').innerText.includes('fp32')")
    assert page.text("label[for=models]") == "Model"
    named = "[...document.querySelectorAll('#models option')].map((each) => each.value)"
    assert page.evaluate(named) == ["emoji-small::embedded", "second"]
    page.evaluate("document.querySelector('#models').focus()")
    page.press("ArrowDown", 40)
    page.wait_for("document.querySelector('#model').innerText.includes('int8')")
    page.type("#texts", "\n".join(TEXTS[1:]))
    page.evaluate(COMPARE)
    page.wait_for("document.querySelector('#status').innerText === '2 of 2 encoded.'")
    with Client(two_models.grpc) as client:
        pizza, rocket = client.encode(TEXTS[1:], normalize=True, model="second")
    shown = page.evaluate("[...document.querySelectorAll('td')].map((cell) => cell.innerText)")
    assert [float(cell) for cell in shown if cell][1] == pytest.approx(pizza @ rocket, abs=6e-4)
    for program in ("curl", "python"):
        assert '"second"' in page.text(f"#{program}")
    # SigLIP's probabilities are of each pair by itself, whatever the bias is.
    for bias in (-12.9, 0.0):
        page.evaluate(f"info = {{ logit_scale: 112, logit_bias: {bias} }}")
        expected = probabilities(np.array([0.1, 0.12]), 112, bias)
        assert np.allclose(page.evaluate("probabilitiesOf([0.1, 0.12])"), expected)
    assert page.complaints == []


@needs_browser
@pytest.mark.slow
def test_searching(page: Page, search_server: Server) -> None:
    with Client(search_server.http) as client:
        client.index([{"text": "a red car", "id": "page-1", "tags": {"colour": "<b>red</b>"}}])
        page.open(f"{search_server.http}/")
        page.wait_for("!document.querySelector('#search').hidden")
        page.type("#texts", "a red car")
        page.evaluate("document.querySelector('#search').click()")
        page.wait_for("document.querySelectorAll('.card').length > 0")
        assert "a red car" in page.text(".card")
        assert "colour: <b>red</b>" in page.text(".grid")
        assert "client.search(items" in page.text("#python")
        client.delete(["page-1"])
    assert page.complaints == []


@needs_browser
@pytest.mark.slow
def test_a_key(page: Page, start: Start) -> None:
    server = start(flow(), CLIP_AUTH_TOKEN="secret-of-the-page-1234567890")
    page.open(f"{server.http}/")
    page.wait_for("document.querySelector('#errors').innerText.includes('key')")
    page.type("#key", "secret-of-the-page-1234567890")
    page.type("#texts", "a cat\na dog")
    page.evaluate(COMPARE)
    page.wait_for("document.querySelector('#status').innerText === '2 of 2 encoded.'")
    assert "secret" not in page.text("#code")
    assert "$CLIP_AUTH_TOKEN" in page.text("#curl")
    server.stop()


@pytest.mark.slow
def test_no_page(start: Start) -> None:
    spec = flow()
    spec["with"]["page"] = False
    server = start(spec)
    with Http(server.http) as http:
        assert "POST /encode" in http.get("/", headers=HTML).json()["endpoints"]
    server.stop()


@needs_browser
@pytest.mark.slow
def test_the_reference_shows_every_operation(page: Page, onnx_server: Server) -> None:
    document = requests.get(f"{onnx_server.http}/openapi.json", timeout=60).json()
    operations = [f"{method.upper()} {path}" for path, methods in document["paths"].items()
                  for method in methods]  # fmt: skip
    page.open(f"{onnx_server.http}/docs")
    page.wait_for("document.querySelector('#status').hidden")
    shown = "[...document.querySelectorAll('summary > code')].map((each) => each.innerText)"
    assert sorted(page.evaluate(shown)) == sorted(operations)
    dangling = (
        "[...document.querySelectorAll('a')].map((each) => each.getAttribute('href'))"
        ".filter((each) => each.startsWith('#') && !document.querySelector(each))"
    )
    assert page.evaluate(dangling) == []
    curl = "document.querySelector('pre[aria-label=\"POST /encode, curl\"]').textContent"
    ran = subprocess.run(["sh", "-c", page.evaluate(curl)], capture_output=True, check=True)
    assert "embedding" in json.loads(ran.stdout)["data"][0]
    assert page.complaints == []
