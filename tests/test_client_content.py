"""What a person may pass, and what becomes of it."""

from __future__ import annotations

import base64
import io
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import saved
from PIL import Image

from clip_client import InvalidInputError, inputs
from clip_client.proto.clip_pb2 import Item

PIXELS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def item(thing: Any) -> Item:
    begun = inputs.to_item(thing)
    return begun if isinstance(begun, Item) else begun()


def pixels(thing: Any) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(item(thing).image)))


def png(array: np.ndarray[Any, Any] = PIXELS) -> bytes:
    return saved(Image.fromarray(array), "PNG")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    path.write_bytes(png())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a cat",
        "",
        "a cat beside\ncat.jpg",
        "an essay " * 10_000,
        "x" * 5_000 + " .jpg",
        "a dog beside cat.jpg",
        "NUL \0 in the middle.png",
        "https://example.com is a site",
        "see http://example.com/cat.jpg",
        "data: the new oil",
        "data: we need more, please",
        "data:science,python",
        "C'est l'été 🐈",
        "README.md",
        ".",
    ],
)
def test_texts(text: str) -> None:
    assert item(text) == Item(text=text)


def test_the_kinds_of_text() -> None:
    assert item(np.str_("a cat")) == Item(text="a cat")
    assert item({"text": "cat.jpg"}) == Item(text="cat.jpg")
    assert item("").WhichOneof("content") == "text"


def test_paths(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Item(image=png())
    assert item(picture) == item(str(picture)) == item(picture.as_uri()) == expected
    assert item({"image": picture}) == item({"uri": str(picture)}) == expected
    assert item({"uri": picture}) == expected
    monkeypatch.chdir(picture.parent)
    assert item("cat.png") == expected
    spaced = picture.rename(picture.parent / "my cat.PNG")
    assert item("my cat.PNG") == item(str(spaced)) == expected
    plain = spaced.rename(picture.parent / "cat")
    assert item({"image": "cat"}) == item(plain) == expected
    assert item("cat") == Item(text="cat")


@pytest.mark.parametrize("missing", ["cat.jpg", "no/such/dir/cat.JPEG", "/nowhere/cat.webp"])
def test_a_missing_file_says_how_to_mean_the_text(missing: str) -> None:
    with pytest.raises(InvalidInputError, match=r"no such file .*\{'text': \.\.\.\}"):
        item(missing)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is not a file"):
        item(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InvalidInputError, match="is not a file"):
        item(tmp_path / "pipe.png")
    with pytest.raises(InvalidInputError, match="is not a file"):
        item(Path("/dev/zero"))
    (tmp_path / "empty.png").touch()
    with pytest.raises(InvalidInputError, match="is empty"):
        item(tmp_path / "empty.png")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        item(Path("x" * 5_000))
    with pytest.raises(InvalidInputError, match="cannot be read"):
        item("x" * 5_000 + ".png")


def test_a_file_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_BYTES", 2**20)
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**20 + 1)
    with pytest.raises(InvalidInputError, match="larger than 1 MiB"):
        item(tmp_path / "huge.png")


def test_data_uris_go_as_they_are() -> None:
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    assert item(uri) == item({"uri": uri}) == item({"image": uri}) == Item(uri=uri)
    assert item("data:text/plain;charset=utf-8,hello").uri


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes(kind: Callable[[bytes], Any]) -> None:
    assert item(kind(b"JPEG")) == Item(image=b"JPEG")
    assert item({"blob": kind(b"JPEG")}) == item({"image": kind(b"JPEG")}) == Item(image=b"JPEG")
    with pytest.raises(InvalidInputError, match="is empty"):
        item(kind(b""))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
def test_arrays(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = array[..., 0] if shape[-1] == 1 else array
    assert np.array_equal(pixels(array), expected)
    assert np.array_equal(pixels(array[::-1, ::2]), expected[::-1, ::2])
    assert np.array_equal(pixels({"tensor": array}), expected)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((5, 7, 3), np.complex64),
        np.zeros((5, 7, 5), np.uint8),
        np.zeros((3, 5, 7), np.uint8),
        np.zeros((1, 5, 7, 3), np.uint8),
        np.zeros(3, np.uint8),
        np.uint8(3),
        np.array(["a"]),
    ],
)
def test_other_arrays_are_told_what_is_allowed(array: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"pass numbers of shape \(H, W\)") as caught:
        item(array)
    assert ("transpose(1, 2, 0)" in str(caught.value)) is (array.shape == (3, 5, 7))
    with pytest.raises(InvalidInputError, match="no pixels"):
        item(np.zeros((0, 7, 3), np.uint8))


FLOATS = np.random.default_rng(0).random((5, 7, 3))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (PIXELS.astype(np.int64), PIXELS),
        (PIXELS.astype(np.uint16), PIXELS),
        (PIXELS.astype(np.float16), PIXELS),
        (PIXELS.astype(np.float32)[..., 0], PIXELS[..., 0]),
        (PIXELS / 255, PIXELS),
        ((PIXELS / 255).astype(np.float32), PIXELS),
        (FLOATS * 255, (FLOATS * 255).astype(np.uint8)),
        (PIXELS + 2e-4, PIXELS),
        (np.eye(5, 7) > 0, np.eye(5, 7) > 0),
        (PIXELS > 99, 255 * (PIXELS > 99)),
        (np.full((5, 7, 4), 0.5, np.float32), np.full((5, 7, 4), 128)),
        (np.zeros((5, 7, 3)), np.zeros((5, 7, 3))),
    ],
    ids=lambda array: f"{array.dtype}",
)
def test_arrays_of_any_numbers(array: Any, expected: Any) -> None:
    assert np.array_equal(pixels(array), expected)
    tensor = SimpleNamespace(detach=lambda: tensor, cpu=lambda: array, __array__=None)
    assert np.array_equal(pixels(tensor), expected)


@pytest.mark.parametrize(
    ("array", "values"),
    [
        (FLOATS - 0.5, "values from -0"),
        (FLOATS * 300, "to 2"),
        (PIXELS.astype(np.int32) * 256, "pass values of 0 to 255, or floats of 0 to 1"),
        (np.where(FLOATS < 0.1, np.nan, FLOATS), "from nan to nan"),
        (np.where(FLOATS < 0.1, np.inf, FLOATS), "to inf"),
    ],
)
def test_values_that_are_none_of_an_image(array: Any, values: str) -> None:
    with pytest.raises(InvalidInputError, match=values):
        item(array)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "F", "I"])
def test_pil_images(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert("L" if mode in "FI" else "RGB").convert(mode)
    sent = Image.open(io.BytesIO(item(image).image))
    assert sent.size == (7, 5)
    if mode in ("L", "RGB", "RGBA"):
        assert np.array_equal(np.asarray(sent), np.asarray(image))


def test_what_a_generator_reuses_is_copied(picture: Path) -> None:
    array = PIXELS.copy()
    of_array = inputs.to_item(array)
    array[:] = 0
    with Image.open(picture) as image:
        of_image = inputs.to_item(image)
    for read in (of_array, of_image):
        assert callable(read)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(read().image))), PIXELS)
    with Image.open(picture) as unread:
        pass
    with pytest.raises(InvalidInputError, match="PIL image cannot be read"):
        item(unread)


def document(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"embedding": None, **fields})


def test_documents(picture: Path) -> None:
    empty = {"text": "", "blob": b"", "tensor": None, "uri": None}
    assert item(document(**{**empty, "text": "cat.jpg"})) == Item(text="cat.jpg")
    assert item(document(**{**empty, "blob": b"JPEG"})) == Item(image=b"JPEG")
    assert item(document(**{**empty, "uri": str(picture)})) == Item(image=png())
    assert np.array_equal(pixels(document(**{**empty, "tensor": PIXELS})), PIXELS)
    assert item(document(url=str(picture), bytes_=b"JPEG")) == Item(image=b"JPEG")
    with pytest.raises(InvalidInputError, match="has no text, blob, tensor or uri"):
        item(document(**empty))


@pytest.mark.parametrize("thing", [None, 3, 2.5, object(), ["a"], ("a",), {1, 2}, len])
def test_what_is_nothing(thing: Any) -> None:
    with pytest.raises(InvalidInputError, match="cannot be encoded: pass a text, a path"):
        item(thing)


@pytest.mark.parametrize(
    "thing", [{}, {"txt": "a"}, {"text": "a", "uri": "b"}, {"text": 3}, {"text": None}, {3: "a"}]
)
def test_wrong_dicts(thing: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"a dict holds one of|a text is a str"):
        item(thing)


def test_a_lone_surrogate_is_no_text() -> None:
    with pytest.raises(InvalidInputError, match="surrogate"):
        item("\ud800")


class Site(BaseHTTPRequestHandler):
    """A small web site."""

    def do_GET(self) -> None:
        status = {"/gone.png": 404, "/moved.png": 302}.get(self.path, 200)
        self.send_response(status)
        page = self.path == "/page.png"
        self.send_header("content-type", "text/html" if page else "image/png")
        if status == 302:
            self.send_header("location", "/cat.png")
        self.end_headers()
        try:
            if self.path == "/endless.png":
                while True:
                    self.wfile.write(bytes(2**16))
            self.wfile.write(png())
        except OSError:
            pass

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls(site: str) -> None:
    assert item(f"{site}/cat.png") == item({"uri": f"{site}/cat"}) == Item(image=png())
    assert item(f"{site}/a cat.png") == item(f"{site}/cat\n") == Item(image=png())
    assert item(f"{site}/moved.png") == item({"image": f"{site}/cat.png"}) == Item(image=png())


def test_urls_that_fail(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_BYTES", 2**20)
    for path, reason in {
        "/gone.png": "answered with status 404",
        "/page.png": "is a web page, not an image",
        "/endless.png": "larger than 1 MiB",
    }.items():
        with pytest.raises(InvalidInputError, match=reason):
            item(site + path)
    monkeypatch.setattr(inputs, "FETCH_SECONDS", 0.0)
    with pytest.raises(InvalidInputError, match="took more than 0 s"):
        item(f"{site}/cat.png")
    for url in ("http://127.0.0.1:1/cat.png", "http://[::bad/cat.png", "http://x:99999/cat.png"):
        with pytest.raises(InvalidInputError, match="cannot be fetched"):
            item(url)


def test_as_image_leaves_no_str_a_text() -> None:
    assert inputs.as_image("cat") == {"image": "cat"}
    assert inputs.as_image(b"JPEG") == b"JPEG"


def test_ids_and_tags_are_sent() -> None:
    sent = item({"text": "a", "id": 7, "tags": {"page": 3, "of": ["x"]}})
    assert (sent.text, sent.id, sent.tags["page"], list(sent.tags["of"])) == ("a", "7", 3, ["x"])
    for thing in ({"image": png(), "id": "b"}, {"uri": "data:,b", "id": "b"}):
        assert item(thing).id == "b"
    # What JSON cannot hold does not keep an item from being encoded.
    assert item({"text": "a", "tags": {"x": object()}}).text == "a"
