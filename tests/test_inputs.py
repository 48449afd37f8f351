"""One image, however it is passed, has one embedding: through the client and the server."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import numpy as np
import pytest
from conftest import SAMPLES, Http, Server, saved
from numpy.typing import NDArray
from PIL import Image

from clip_client import Client, ItemsError, ServerError, images
from clip_client.data_uri import read_data_uri

CAT = (SAMPLES / "cat.png").read_bytes()
ENCODED = base64.b64encode(CAT).decode()
URL_SAFE = base64.urlsafe_b64encode(CAT).decode()
LINES = "\r\n".join(ENCODED[i : i + 76] for i in range(0, len(ENCODED), 76))
Rows = NDArray[np.float32]


@pytest.fixture(scope="module")
def client(onnx_server: Server) -> Iterator[Client]:
    with Client(onnx_server.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def cat(client: Client) -> Rows:
    row: Rows = client.encode([CAT])[0]
    return row


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the image of a cat under `photos/cat`."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat").write_bytes(CAT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def cosine(one: Rows, other: Rows) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def answers(http: Http, *data: Any) -> list[dict[str, Any]]:
    reply = http.post("/encode", json={"data": list(data)})
    assert reply.status_code == 200, reply.text
    found: list[dict[str, Any]] = reply.json()["data"]
    return found


@pytest.mark.parametrize(
    "uri",
    [
        f"data:image/png;base64,{ENCODED}",
        f"data:image/png;name=my%20cat.png;base64,{ENCODED}",
        f'data:image/png;name="my, cat; base64.png";base64,{ENCODED}',
        f"data:image/png;name=%22my%2C%20cat.png%22;charset=utf-8;base64,{ENCODED}",
        f"DATA:Image/PNG;BASE64,{ENCODED}",
        f"  data:image/png;base64,{ENCODED}\n",
        f"data:image/png; base64, {ENCODED}",
        f"data:image/png;base64,{LINES}",
        f"data:image/png;base64,{URL_SAFE.rstrip('=')}",
        f"data:image/png;base64,{quote(ENCODED, safe='')}",
        f"data:image/png,{quote(CAT)}",
        f"data:image/*;base64,{ENCODED}",
        f"data:image;base64,{ENCODED}",
        f"data:application/octet-stream;base64,{ENCODED}",
        f"data:;base64,{ENCODED}",
        f"data:base64,{ENCODED}",
    ],
    ids=lambda uri: ascii(uri[:60]),
)
def test_data_uris_of_an_image(client: Client, http: Http, cat: Rows, uri: str) -> None:
    rows = [
        *client.encode([uri, {"uri": uri}, {"image": uri}]),
        *(each["embedding"] for each in answers(http, uri, {"uri": uri}, {"image": uri})),
    ]
    assert np.allclose(rows, cat, atol=1e-5)


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("data:,hello", "hello"),
        ("data:,hello%20world%0A", "hello world"),
        ("data:text/plain,a%20cat%2C+asleep", "a cat,+asleep"),
        ("data:text/plain;charset=iso-8859-1,caf%E9", "café"),
        ('data:text/plain;Charset="UTF-8",caf%C3%A9', "café"),
        ("data:text/plain;charset=us-ascii;base64,YSBjYXQ", "a cat"),
        ("data:;charset=utf-8,%E7%8C%AB", "猫"),
        ("data:;base64,YSBjYXQ=", "a cat"),
        ("data:text/html,<b>cat</b>", "<b>cat</b>"),
    ],
)
def test_data_uris_of_a_text(client: Client, http: Http, uri: str, text: str) -> None:
    rows = client.encode([{"text": text}, uri, {"uri": uri}])
    found = [each["embedding"] for each in answers(http, uri, {"uri": uri})]
    assert np.allclose([*rows[1:], *found], rows[0], atol=1e-5)


@pytest.mark.parametrize(
    "text", ["data: we need more, please", "data:science,python", "data: image/text pairs, or so"]
)
def test_sentences_about_data(client: Client, http: Http, text: str) -> None:
    rows = client.encode([{"text": text}, text])
    assert np.allclose([rows[1], answers(http, text)[0]["embedding"]], rows[0], atol=1e-5)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("data:image/png", "has no comma"),
        (f"data:image/png;base64 {ENCODED}", "has no comma"),
        ("data:image/png;base64,%%%", "not valid base64"),
        ("data:image/png;base64,AAAAA", "not valid base64"),
        ("data:image/png;base64,", "an empty image"),
        ("data:image/png;base64,AAAA", "is not an image"),
        ("data:text/plain;charset=utf-8,caf%E9", "is not UTF-8: name its charset"),
        ("data:text/plain;charset=punycode,a", "unknown charset, 'punycode'"),
    ],
)
def test_malformed_data_uris(client: Client, http: Http, uri: str, message: str) -> None:
    _, failures = client.encode([uri, {"uri": uri}], on_item_error="return")
    errors = [failure.message for failure in failures]
    errors += [each["error"] for each in answers(http, uri, {"uri": uri})]
    assert len(errors) == 4
    assert all(message in error for error in errors), errors


def test_blobs_in_json(http: Http, cat: Rows) -> None:
    forms = [ENCODED, LINES, URL_SAFE, ENCODED.rstrip("="), f" {ENCODED}\n", ENCODED + "\t"]
    found = answers(http, *({key: form} for key in ("blob", "image") for form in forms))
    assert np.allclose([each["embedding"] for each in found], cat, atol=1e-5)
    for each in answers(http, {"blob": "%%%"}, {"image": "AAAAA"}, {"blob": "é"}):
        assert "not valid base64" in each["error"]
        assert "data:" not in each["error"]


def test_blobs_in_dicts(client: Client, cat: Rows) -> None:
    forms = [CAT, ENCODED, LINES, URL_SAFE, f"data:image/png;base64,{ENCODED}", SAMPLES / "cat.png"]
    assert np.allclose(client.encode([{"blob": form} for form in forms]), cat, atol=1e-5)
    assert "not valid base64" in error(client, {"blob": "%%%"})


def test_fields_that_are_empty(client: Client, http: Http, cat: Rows) -> None:
    uri = f"data:image/png;base64,{ENCODED}"
    dicts: list[dict[str, Any]] = [
        {"text": "", "uri": uri},
        {"uri": uri, "text": None, "id": "7", "tags": {"a": 1}},
        {"text": " ", "blob": None, "uri": uri},
    ]
    rows = [*client.encode(dicts), *(each["embedding"] for each in answers(http, *dicts))]
    assert np.allclose(rows, cat, atol=1e-5)
    with pytest.raises(ItemsError, match="this one has 'text', 'uri'"):
        client.encode([{"text": "a cat", "uri": uri}])
    with pytest.raises(ItemsError, match="this one has 'caption'"):
        client.encode([{"text": "a cat", "caption": "a dog"}])


@pytest.mark.parametrize(
    "suffix",
    [".mpo", ".MPO", ".Jpg", ".jfif", ".pjpeg", ".apng", ".dib", ".TIFF", ".hif", ".AVIF"],
)
def test_suffixes(client: Client, cat: Rows, folder: Path, suffix: str) -> None:
    (folder / f"cat{suffix}").write_bytes(CAT)
    assert np.allclose(client.encode([f"cat{suffix}", f"./cat{suffix}\n"]), cat, atol=1e-5)
    assert "no such file" in error(client, f"dog{suffix}")


def test_paths_without_a_suffix(client: Client, cat: Rows, folder: Path) -> None:
    paths = [
        "photos/cat",
        "photos/cat\n",
        "~/photos/cat",
        "./photos/cat",
        str(folder / "photos" / "cat"),
        (folder / "photos" / "cat").as_uri(),
        f"FILE://localhost{folder}/photos/cat",
        f"file:{folder}/photos/cat",
        "file://photos/cat",
        Path("~/photos/cat"),
        {"uri": "file:photos/cat"},
        {"image": " photos/cat"},
    ]
    assert np.allclose(client.encode(paths), cat, atol=1e-5)
    ranked = client.rank("photos/cat", ["photos/cat"])
    assert ranked[0].cosine == pytest.approx(1, abs=1e-5)
    (folder / "my photos").mkdir()
    (folder / "my photos" / "my cat.png").write_bytes(CAT)
    spaced = ["my photos/my cat.png", f"file://{folder}/my photos/my%20cat.png"]
    assert np.allclose(client.encode(spaced), cat, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~/dog", "no such file"),
        ("./dog", "no such file"),
        ("/nowhere/dog", "no such file"),
        ("/nowhere/my dog.png", "no such file"),
        ("C:\\photos\\my dog.png", "no such file"),
        ("file:///nowhere/dog", "no such file"),
        ("dog.jp2\n", "no such file"),
        ("photos", None),
        ("photos/", "is not a file but a folder"),
        ("s3://bucket/cat", "reads http://, https://, file:// and data: URIs, not s3://"),
        ("and/or", None),
        ("/imagine a cat", None),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_is_no_file(client: Client, path: str, message: str | None) -> None:
    if message is None:
        assert np.allclose(*client.encode([path, {"text": path}]), atol=1e-5)
        return
    assert message in (advice := error(client, path))
    assert "{'text': ...}" in advice
    for other in ({"image": path}, {"uri": path}):
        assert "'text'" not in error(client, other)
    with pytest.raises(ItemsError) as caught:
        client.classify([path], ["cat"])
    assert "'text'" not in caught.value.errors[0].message


def test_advice_to_classify_has_no_texts(client: Client) -> None:
    with pytest.raises(ItemsError, match=r"int cannot be encoded: pass a path") as caught:
        client.classify([3], ["cat"])
    assert "text" not in caught.value.errors[0].message


def test_a_text_that_names_a_file_is_warned_of_once(client: Client, folder: Path) -> None:
    for name in ("cat", "notes.txt", "a photo of a cat"):
        (folder / name).write_bytes(CAT)
    texts = ["cat", "notes.txt", "a photo of a cat", "a dog", "photos"]
    with pytest.warns(UserWarning, match=r"'cat' and 2 more were encoded as texts") as caught:
        client.encode(texts)
    assert len(caught) == 1
    client.encode([{"text": text} for text in texts])
    assert cosine(*client.encode([Path("cat"), CAT])) == pytest.approx(1, abs=1e-5)


def noise(mode: str, width: int = 300, height: int = 250) -> Image.Image:
    """An image of any mode, of smooth noise, since palettes and 16 bits are resized roughly."""
    rng = np.random.default_rng(len(mode))
    if mode in ("I", "F") or mode.startswith("I;16"):
        values = rng.integers(0, 400, (height, width))
        dtype = {"I": "=i4", "F": "=f4", "I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")
        return Image.frombytes(mode, (width, height), values.astype(dtype).tobytes())
    bands = {"LA": 2, "La": 2, "PA": 2, "RGBA": 4, "RGBa": 4, "RGBX": 4, "CMYK": 4}.get(mode, 3)
    small = rng.integers(0, 256, (5, 6, bands), dtype=np.uint8)
    grown = np.kron(small, np.ones((50, 50, 1), np.uint8))
    if mode in ("La", "RGBa"):
        return Image.frombytes(mode[:-1] + "A", (300, 250), grown.tobytes()).convert(mode)
    if mode in ("LA", "PA", "RGBA", "RGBX", "CMYK", "LAB"):
        image = Image.frombytes(mode, (300, 250), grown.tobytes())
        if mode == "PA":
            image.putpalette(rng.bytes(768))
        return image
    return Image.fromarray(grown, "RGB").convert(mode)


def palette(transparency: bytes | int | None = None, colors: int = 256) -> Image.Image:
    image = Image.fromarray(np.arange(75_000, dtype=np.uint8).reshape(250, 300) % 7, "L")
    image.putpalette(np.random.default_rng(0).bytes(3 * colors))
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def frames(form: str) -> bytes:
    first = noise("RGB")
    others = [first.transpose(Image.Transpose.ROTATE_180)]
    return saved(first, form, save_all=True, append_images=others)


def files() -> dict[str, bytes]:
    """An image of each mode that files hold, and what may be in a file beside its pixels."""
    modes = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F"]
    found = {f"TIFF {mode}": saved(noise(mode), "TIFF") for mode in [*modes, "I;16", "I;16B"]}
    found |= {f"PNG {m}": saved(noise(m), "PNG") for m in ("1", "L", "LA", "RGB", "RGBA", "I;16")}
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        **found,
        "PNG P": saved(palette(), "PNG"),
        "PNG P, transparent": saved(palette(bytes([0, 99, 255])), "PNG"),
        "PNG P, a transparent index": saved(palette(3), "PNG"),
        "PNG L, transparent": saved(noise("L"), "PNG", transparency=7),
        "PNG RGB, transparent": saved(noise("RGB"), "PNG", transparency=(1, 2, 3)),
        "PNG RGB, profile, turned": saved(noise("RGB"), "PNG", icc_profile=b"profile", exif=exif),
        "PNG LA of 16 bits": saved(noise("I;16"), "PNG"),
        "GIF P": saved(palette(), "GIF"),
        "GIF, transparent": saved(palette(), "GIF", transparency=2),
        "BMP": saved(noise("RGB"), "BMP"),
        "BMP P": saved(palette(), "BMP"),
        "WebP": saved(noise("RGBA"), "WEBP"),
        "JPEG, turned": saved(noise("RGB"), "JPEG", exif=exif),
        "JPEG L": saved(noise("L"), "JPEG"),
        "JPEG CMYK": saved(noise("CMYK"), "JPEG"),
        "JPEG, large": saved(noise("RGB").resize((2000, 1600)), "JPEG"),
        "TIFF, turned": saved(noise("RGB"), "TIFF", exif=exif),
        **{f"{form} of two frames": frames(form) for form in ("GIF", "TIFF", "MPO", "PNG", "WEBP")},
    }


@pytest.mark.parametrize(("name", "file"), files().items(), ids=files())
def test_a_file_and_its_pil_image(client: Client, name: str, file: bytes) -> None:
    of_file, of_image = client.encode([file, Image.open(BytesIO(file))])
    assert cosine(of_file, of_image) == pytest.approx(1, abs=1e-5), name
    loaded = Image.open(BytesIO(file))
    loaded.load()
    # The server decodes a large JPEG at a fraction of its size.
    least = 0.98 if name == "JPEG, large" else 0.99999
    assert cosine(of_file, client.encode([loaded])[0]) > least
    array = np.asarray(loaded)
    if loaded.mode in ("1", "L", "LA", "RGB", "RGBA"):
        assert cosine(client.encode([array])[0], of_file) > least


@pytest.mark.parametrize("mode", ["La", "RGBa", "RGBX", "HSV", "I;16L", "I;16N"])
def test_modes_that_no_file_has(client: Client, mode: str) -> None:
    image = noise(mode)
    like = {"La": "LA", "RGBa": "RGBA", "I;16L": "I;16", "I;16N": "I;16"}.get(mode, "RGB")
    same = (
        image.convert(like)
        if like != "I;16"
        else Image.frombytes(like, image.size, image.tobytes())
    )
    assert cosine(*client.encode([image, saved(same, "PNG")])) == pytest.approx(1, abs=1e-5)


def test_another_frame(client: Client) -> None:
    animation = Image.open(BytesIO(frames("TIFF")))
    animation.seek(1)
    turned = saved(noise("RGB").transpose(Image.Transpose.ROTATE_180), "PNG")
    assert cosine(*client.encode([animation, turned])) == pytest.approx(1, abs=1e-5)


def test_palette_shorter_than_its_indexes(client: Client) -> None:
    image = palette(colors=3)
    assert cosine(*client.encode([image, saved(image, "PNG", bits=8)])) == pytest.approx(
        1, abs=1e-5
    )


@pytest.mark.parametrize("mode", ["P", "RGB", "RGBA", "LA", "CMYK", "F", "I", "I;16"])
def test_an_image_over_the_limit_is_sent_smaller(
    client: Client, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    image = noise("RGB").quantize(8) if mode == "P" else noise(mode, 1200, 1000)
    exact = client.encode([image])[0]
    is_deep = mode.startswith(("I", "F"))
    limit = 300_000 if is_deep else 100
    monkeypatch.setattr(images, "MAX_ITEM_BYTES", limit)
    sent = images.encode(image.copy())
    assert len(sent) <= limit if is_deep else sent[:2] == b"\xff\xd8"
    assert cosine(exact, client.encode([image])[0]) > 0.95


def test_addresses_of_clip_as_service(onnx_server: Server) -> None:
    port = onnx_server.ports[2]
    for address in (f"websocket://127.0.0.1:{port}", f" WebSocket://127.0.0.1:{port}/\n"):
        with Client(address) as client:
            assert client.encode(["a cat"]).shape[0] == 1


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("websocket://host:51002", "ws://host:51002"),
        ("websockets://host", "wss://host:443"),
        ("WS://host", "ws://host:80"),
        ("GRPC://host", "grpc://host:51000"),
        ("grpc://0.0.0.0:51000/", "grpc://0.0.0.0:51000"),
        ("grpcs://host\n", "grpcs://host:443"),
        ("HTTPS://host:8443/clip/", "https://host:8443/clip"),
        ("websocket://[::1]:51002", "ws://[::1]:51002"),
    ],
)
def test_addresses(written: str, read: str) -> None:
    with Client(server=written) as client:
        assert read in repr(client)


def test_a_request_of_too_many_items_says_what_to_set(client: Client) -> None:
    with pytest.raises(ServerError, match="a batch_size of 10000 or less"):
        client.encode([CAT[:1]] * 10_001, batch_size=20_000)


def error(client: Client, thing: Any) -> str:
    _, failures = client.encode([thing], on_item_error="return")
    assert len(failures) == 1
    return failures[0].message


def test_percent_decoding_is_that_of_urllib() -> None:
    """On every kind of malformed escape."""
    rng = random.Random(0)
    for _ in range(3_000):
        payload = "".join(rng.choice("%%%aAfF09gé") for _ in range(rng.randint(0, 12)))
        content = read_data_uri(f"data:application/octet-stream,{payload}")
        assert content == unquote_to_bytes(payload)
