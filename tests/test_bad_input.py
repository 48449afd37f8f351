"""Bad input: a clear answer for that item, its neighbours encoded, the server alive."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import requests
from conftest import SAMPLES, Http, Server, Start, encode_method, flow, saved
from odd_bodies import PROTOBUF, odd_bodies

from clip_client import Client
from clip_client.errors import ClipError, ItemsError
from clip_client.proto import clip_pb2 as pb
from clip_server.models import converted, zoo

INTERNALS = ("Traceback", 'File "', "/work", "site-packages", "Error(", "0x", ".py")


@pytest.fixture(params=["grpc", "http", "websocket"])
def client(request: pytest.FixtureRequest, onnx_server: Server) -> Iterator[Client]:
    with Client(getattr(onnx_server, request.param)) as client:
        yield client


@pytest.fixture(scope="module")
def bad_items(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("bad")
    text = folder / "notes.jpg"
    text.write_text("these are my notes")
    from PIL import Image

    jpeg = saved(Image.open(SAMPLES / "cat.png").convert("RGB"), "JPEG")
    return {
        "notes.jpg": text,
        "truncated JPEG": jpeg[: len(jpeg) // 2],
        "empty string": "",
        "spaces": " \n ",
        "empty bytes": b"",
        "missing file": folder / "nowhere.png",
        "large": b"\xff\xd8" + bytes(40 << 20),
        "bomb": saved(Image.new("1", (20_000, 20_000)), "PNG"),
        "half a surrogate pair": "\ud83d",
        "a data URI of nonsense": "data:image/png;base64,AAAA",
    }


def test_each_bad_item_fails_alone(client: Client, bad_items: dict[str, object]) -> None:
    items: list[object] = ["a cat"]
    for item in bad_items.values():
        items += [item, SAMPLES / "cat.png"]
    embeddings, errors = client.encode(items, on_item_error="return")
    assert [error.index for error in errors] == list(range(1, len(items), 2))
    for name, error in zip(bad_items, errors, strict=True):
        assert len(error.message) > 10, name
        assert not any(word in error.message for word in INTERNALS), (name, error.message)
    assert np.isnan(embeddings[1::2]).all()
    assert np.isfinite(embeddings[::2]).all()
    # The same neighbours alone give the same embeddings.
    again = client.encode(["a cat", SAMPLES / "cat.png"])
    np.testing.assert_allclose(embeddings[[0, 2]], again, rtol=1e-4, atol=1e-5)

    with pytest.raises(ItemsError) as raised:
        client.encode(items)
    assert len(raised.value.errors) == len(bad_items)


def test_two_hundred_megabytes(client: Client) -> None:
    embeddings, errors = client.encode(
        ["a cat", b"\xff\xd8" + bytes(200 << 20), "a dog"], on_item_error="return"
    )
    assert [error.index for error in errors] == [1]
    assert "MiB" in errors[0].message
    assert np.isfinite(embeddings[[0, 2]]).all()
    assert len(client.encode(["still here"])) == 1


def test_too_many_items_in_a_message(onnx_server: Server) -> None:
    request = pb.EncodeRequest(items=[pb.Item(text="a")] * 10_001)
    with onnx_server.channel() as channel:
        call = encode_method(channel)
        with pytest.raises(grpc.RpcError) as raised:
            call(request)
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "10,000" in raised.value.details()
        assert call(pb.EncodeRequest(items=[pb.Item(text="a")])).count == 1


@pytest.mark.parametrize(("name", "seed"), [("onnx_server", 12), ("search_server", 21)])
def test_odd_bodies_are_refused_with_the_reason(
    name: str, seed: int, request: pytest.FixtureRequest
) -> None:
    server: Server = request.getfixturevalue(name)
    before = len(server.output())
    counts: Counter[int] = Counter()
    with Http(server.http) as http:
        for body in odd_bodies(seed, count=200):
            answer = http.post(
                body.route, data=body.content, headers={"content-type": body.content_type}
            )
            counts[answer.status_code] += 1
            assert answer.status_code in (200, 400, 404), (body, answer.text)
            if body.content_type == PROTOBUF:
                said = answer.status_code == 200 or pb.Error.FromString(answer.content).message
            else:
                said = answer.json().get("error", {"message": "none"})["message"]
            assert said, body
        assert "embedding" in http.post("/encode", json={"data": ["a cat"]}).json()["data"][0]
    # Some are good enough to be answered; none has failed in the gateway.
    assert counts[200] > 10
    assert "Exception in ASGI" not in server.output()[before:]


def test_what_fits_into_no_collection(search_server: Server) -> None:
    items = [pb.Item(text="a cat", id=f"odd-{number}") for number in range(3)]
    items[1].tags.update({"page": float("nan")})
    with Http(search_server.http) as http:
        body = pb.IndexRequest(items=items).SerializeToString()
        answer = http.post("/index", data=body, headers={"content-type": PROTOBUF})
        indexed = pb.IndexResponse.FromString(answer.content)
        assert [error.index for error in indexed.errors] == [1]
        assert "not finite" in indexed.errors[0].message
        refused = http.post("/delete", data=rb'{"ids": ["odd-0", "\ud83d"]}')
        assert refused.status_code == 400
        assert "not valid Unicode" in refused.json()["error"]["message"]
        assert http.post("/delete", json={"ids": ["odd-0", "odd-2"]}).json() == {"count": 2}


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_clients_that_go_away_leave_nothing_in_the_log(onnx_server: Server, reset: bool) -> None:
    before = len(onnx_server.output())
    body = json.dumps({"data": [f"text {reset} {i}" for i in range(500)]}).encode()
    for route in (b"/encode", b"/post", b"/anything", b"/search"):
        head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (route, len(body))
        for sent in (head, head + body[:100], head + body):
            for seconds in (0.0, 0.02):
                leave(onnx_server.ports[1], sent, reset, seconds)
    upgrade = (
        b"GET / HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    )
    jina = b"sec-websocket-protocol: bytes\r\n"
    masked = b"\x82\x85\0\0\0\0abcde"
    for sent in (
        b"GET",
        upgrade,
        upgrade + b"\r\n" + masked,
        upgrade + jina + b"\r\n" + masked[:4],
    ):
        leave(onnx_server.ports[2], sent, reset, 0.02)
    with Client(onnx_server.http) as client:
        assert len(client.encode(["still here"])) == 1
    time.sleep(0.5)  # for what would be written late
    assert "Traceback" not in onnx_server.output()[before:]


def leave(port: int, sent: bytes, reset: bool, seconds: float) -> None:
    """Sends something, waits, and goes away without reading the answer."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(sent)
        time.sleep(seconds)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_the_server_opens_no_addresses(onnx_server: Server) -> None:
    uris = ["file:///etc/hostname", "/etc/hostname", "http://127.0.0.1/x.png", "ftp://x/y"]
    answer = requests.post(
        f"{onnx_server.http}/encode", json={"data": [{"uri": uri} for uri in uris]}
    ).json()
    for each in answer["data"]:
        assert "only data: URIs" in each["error"]


@pytest.mark.parametrize("frame", [b"\xff\xff\xff", "text", b"", b"\x0a\xff", bytes(1 << 20)])
def test_nonsense_on_a_websocket(onnx_server: Server, frame: bytes | str) -> None:
    from websockets.sync.client import connect

    with connect(onnx_server.websocket, proxy=None) as socket:
        socket.send(frame)
        answer = socket.recv()
        assert isinstance(answer, bytes)
        (response,) = pb.Responses.FromString(answer).responses
        assert response.error.code == pb.Error.INVALID_ARGUMENT
        # The connection lives on.
        request = pb.Request(id=7, info=pb.InfoRequest())
        socket.send(pb.Requests(requests=[request]).SerializeToString())
        answer = socket.recv()
        assert isinstance(answer, bytes)
        assert pb.Responses.FromString(answer).responses[0].info.dim == 256


def test_rank_with_bad_candidates(client: Client) -> None:
    with pytest.raises(ClipError, match="empty text"):
        client.rank("", ["a cat"])
    with pytest.raises(ItemsError) as raised:
        client.rank(SAMPLES / "cat.png", ["a cat", b"not a picture", "a dog"])
    assert [error.index for error in raised.value.errors] == [1]


def test_a_model_that_fails_on_a_batch(start: Start, tmp_path: Path) -> None:
    """A graph that takes one text only: the others' requests go on."""
    import onnx
    from onnx import TensorProto, helper

    def graph(name: str, kind: int, shape: list[object]) -> None:
        # Gather at a place that only exists for long enough inputs.
        nodes = [
            helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["f"], ["flat"]),
            helper.make_node("Slice", ["flat", "a", "b", "axis"], ["cut"]),
            helper.make_node("Reshape", ["cut", "to"], ["embedding"]),
        ]
        constants = {"a": [0], "b": [256], "axis": [1], "to": [-1, 256]}
        initializers = [
            helper.make_tensor(key, TensorProto.INT64, [len(value)], value)
            for key, value in constants.items()
        ]
        made = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 256])],
            initializers,
        )
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 8
        onnx.save(model, tmp_path / f"{name}.onnx")

    graph("visual", TensorProto.UINT8, ["N", 3, 64, 64])
    graph("textual", TensorProto.INT32, ["N", "L"])  # shorter than 256 ids: it fails
    # Described graphs are not tried out at start.
    converted.write(tmp_path, zoo.resolve("embedded"), "fp32")
    server = start(flow("onnx", model_path=str(tmp_path)))
    with Client(server.grpc) as client:
        embeddings, errors = client.encode(["a cat", SAMPLES / "cat.png"], on_item_error="return")
    server.stop()
    assert [error.index for error in errors] == [0]
    assert "the model failed" in errors[0].message
    assert np.isfinite(embeddings[1]).all()


GIANT_TEXTS = {
    "one long word": "ab" * 3_000_000,
    "emoji": "\U0001f602" * 500_000,
    "broken encoding": "sch\u00c3\u00b6n " * 200_000,
    "a gap": "a" + " " * 6_000_000 + "cat",
    "blank": "\n" * 6_000_000,
}


def test_giant_texts_do_not_delay_others(onnx_server: Server) -> None:
    waits: list[float] = []
    with Client(onnx_server.grpc) as client, ThreadPoolExecutor(1) as pool:
        expected = client.encode([text[:2000] for text in list(GIANT_TEXTS.values())[:3]])
        giants = pool.submit(client.encode, list(GIANT_TEXTS.values()), on_item_error="return")
        while not giants.done():
            started = time.monotonic()
            client.encode([f"a cat {len(waits)}"])
            assert requests.get(f"{onnx_server.http}/readyz", timeout=60).status_code == 200
            waits.append(time.monotonic() - started)
        embeddings, errors = giants.result()
    assert [error.index for error in errors] == [4]
    np.testing.assert_allclose(embeddings[:3], expected, rtol=1e-3, atol=1e-4)
    # Were one of them read to its end, a small request would wait for most of the time they take.
    assert len(waits) < 4 or max(waits) < 0.75 * sum(waits), waits
