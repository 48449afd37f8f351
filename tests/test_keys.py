"""Keys: who may call, on every protocol and every route."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests
import yaml
from conftest import PATIENCE_SECONDS, Server, Start, eventually, flow, free_ports
from docarray import DocList
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from clip_client import AuthenticationError, Client, OverloadedError
from clip_client.proto import clip_pb2 as pb
from clip_server import watched_files
from clip_server.errors import ConfigurationError
from clip_server.gateway.access import Access, caller_name
from clip_server.gateway.http import HttpListener
from clip_server.gateway.jina_protocol import JINA_SERVICES
from clip_server.gateway.listener import ListenerOptions
from clip_server.keys import __main__ as keys_command
from clip_server.keys.keyring import KeyRing, open_keyring
from clip_server.launch import flow as flows
from clip_server.rpc.documents import ClipDoc

OPEN_PATHS = {"/livez", "/readyz", "/health", "/ping", "/.well-known/live", "/.well-known/ready"}
TEXT = {"data": [{"text": "a cat"}]}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.yml"


@pytest.fixture(scope="module")
def add_key(key_file: Path) -> Callable[..., str]:
    """Makes a key with the command, and returns it."""

    def add(name: str, *options: str) -> str:
        done = keys("add", name, *options, file=key_file)
        assert done.status == 0, done.stderr
        return done.stdout.strip()

    return add


@dataclass
class Done:
    status: int
    stdout: str
    stderr: str


def keys(*arguments: str, file: Path) -> Done:
    """Runs the command."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = keys_command.main([*arguments, "--file", str(file)])
    return Done(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def key(add_key: Callable[..., str]) -> str:
    return add_key("alice")


@pytest.fixture(scope="module")
def server(start: Start, key: str, key_file: Path) -> Server:
    assert key not in key_file.read_text()
    return start(
        flow("onnx"), CLIP_AUTH_FILE=str(key_file), CLIP_AUTH_TOKEN="one, two", CLIP_ACCESS_LOG="1"
    )


@pytest.mark.parametrize("protocol", ["grpc", "http", "websocket"])
def test_refused_keys_are_counted_and_logged(server: Server, protocol: str) -> None:
    def refused() -> float:
        headers = {"authorization": "Bearer one"}
        text = requests.get(f"{server.http}/metrics", headers=headers, timeout=30).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "clip_errors_total"
            and sample.labels == {"protocol": protocol, "code": "UNAUTHENTICATED"}
        )

    before, logged = refused(), server.output().count(f"protocol={protocol} ")
    client = Client(getattr(server, protocol), credential="wrong")
    with client, pytest.raises(AuthenticationError) as caught:
        client.encode(["a cat"])
    assert re.fullmatch("[0-9a-f]{32}", caught.value.request_id)
    assert caught.value.request_id in server.output()
    assert eventually(lambda: refused() > before)
    assert server.output().count(f"protocol={protocol} ") > logged


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_our_client(server: Server, key: str, protocol: int) -> None:
    address = server.addresses[protocol]
    for right in (key, "one", "two", {"Authorization": key}):
        with Client(address, credential=right) as client:  # type: ignore[arg-type]
            assert client.encode(["a cat"]).shape == (1, 256)
    for wrong in (f"{key}x", key[:-1], "one, two", "alice", {"Authorization": "Basic eDp5"}):
        options: dict[str, Any] = {"credential": wrong, "connect_timeout": 2 * PATIENCE_SECONDS}
        started = time.monotonic()
        with (
            Client(address, **options) as client,
            pytest.raises(AuthenticationError, match="key is not one that this server accepts"),
        ):
            client.encode(["a cat"] * 2_000)
        assert time.monotonic() - started < PATIENCE_SECONDS, "it was tried again"
    with Client(address) as client, pytest.raises(AuthenticationError, match="needs a key"):
        client.info()


def test_a_request_adds_no_line_to_the_log(server: Server) -> None:
    requests.get(f"{server.http}/a%0D%0A2026 INFO%20forged%E2%80%A8", timeout=60)
    assert eventually(lambda: "forged" in server.output())
    (line,) = (each for each in server.output().splitlines() if "forged" in each)
    assert r"endpoint=/a\r\n2026 INFO forged\u2028 " in line


def test_forms_of_a_key(server: Server, key: str) -> None:
    def status(**headers: str) -> int:
        return requests.post(
            f"{server.http}/encode", json=TEXT, headers=headers, timeout=60
        ).status_code

    basic = base64.b64encode(f"anyone:{key}".encode()).decode()
    right: list[dict[str, str]] = [
        {"Authorization": f"Bearer {key}"},
        {"authorization": f"bearer  {key} "},
        {"Authorization": key},
        {"X-API-Key": key},
        {"api-key": key},
        {"Authorization": f"Basic {basic}"},
        {"Authorization": f"Basic {basic}", "Origin": server.http},
    ]
    wrong: list[dict[str, str]] = [
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {key} {key}"},
        {"Authorization": f"Token {key}"},
        {"Authorization": "Basic !!"},
        {"Authorization": f"Basic {base64.b64encode(key.encode()).decode()}"},
        # A page of another site, in a browser that remembers the password.
        {"Authorization": f"Basic {basic}", "Origin": "https://example.com"},
        {"Authorization": "Bearer \xff\xfe"},
        {"X-API-Key": "x" * 10_000},
        {"Cookie": f"authorization={key}"},
    ]
    assert [status(**headers) for headers in right] == [200] * len(right)
    assert [status(**headers) for headers in wrong] == [401] * len(wrong)
    refused = requests.post(f"{server.http}/encode?api-key={key}", json=TEXT, timeout=60)
    assert refused.status_code == 401
    assert refused.headers["WWW-Authenticate"].startswith("Bearer")
    assert refused.json()["error"]["code"] == "UNAUTHENTICATED"


def test_every_http_route_is_closed(server: Server) -> None:
    listener = HttpListener("", 0, None, None, None, None, None, ListenerOptions(1))  # type: ignore[arg-type]
    routes = {(getattr(each, "path", "/x"), method)
              for each in listener._app().routes
              for method in (getattr(each, "methods", None) or {"GET"})}  # fmt: skip
    assert len(routes) > 10
    others = {"/dry_run", "/status", "/livez/", "/livez/x", "//livez", "/LIVEZ", "/%6civez/../info",
              "/openapi.json", "/docs", "/v1/embeddings", "/my_endpoint"}  # fmt: skip
    routes |= {(path, method) for path in others
               for method in ("GET", "POST", "PUT", "OPTIONS", "HEAD")}  # fmt: skip
    with requests.Session() as session:
        statuses = {
            (path, method): session.request(
                method, f"{server.http}{path}", timeout=60, allow_redirects=False
            ).status_code
            for path, method in routes
        }
        # In the form of the API that was called.
        for path, message in (
            ("/v1/embeddings", lambda content: content["error"]["message"]),
            ("/v2/embed", lambda content: content["message"]),
            ("/embed", lambda content: content["error"]),
        ):
            refused = session.post(f"{server.http}{path}", timeout=60)
            assert "needs a key" in message(refused.json())
    is_open = {route for route, status in statuses.items() if status != 401}
    assert is_open == {route for route in routes if route[0] in OPEN_PATHS}
    assert all(statuses[route] in (200, 204) for route in is_open)


def test_every_grpc_method_is_closed(server: Server, key: str) -> None:
    with server.channel() as channel:
        known = ProtoReflectionDescriptorDatabase(_with_key(channel, key))
        pool, services = DescriptorPool(known), set(known.get_services())
        assert len(services) >= 2
        methods = [
            f"/{service}/{method.name}"
            for service in services
            for method in pool.FindServiceByName(service).methods
        ]
        methods += [f"/{JINA_SERVICES['JinaRPC']}/Call",
                    f"/{JINA_SERVICES['JinaSingleDataRequestRPC']}/process_single_data",
                    f"/{JINA_SERVICES['JinaGatewayDryRunRPC']}/dry_run",
                    f"/{JINA_SERVICES['JinaDiscoverEndpointsRPC']}/endpoint_discovery",
                    "/clip.v1.Clip/Unknown", "/x/y"]  # fmt: skip
        for method in methods:
            for call in (channel.unary_unary(method), _streaming(channel, method)):
                if "grpc.health" in method:
                    continue
                with pytest.raises(grpc.RpcError) as caught:
                    call(b"", timeout=60)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, method
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == 1
        encode = channel.unary_unary("/clip.v1.Clip/Encode")
        message = pb.EncodeRequest(items=[pb.Item(text="a cat")]).SerializeToString()
        for metadata in ((("authorization", f"Bearer {key}"),), (("x-api-key", key),)):
            assert pb.EncodeResponse.FromString(encode(message, metadata=metadata)).count == 1


def _with_key(channel: grpc.Channel, key: str) -> grpc.Channel:
    class AddKey(grpc.StreamStreamClientInterceptor):  # type: ignore[misc]
        def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
            details = details._replace(metadata=[("authorization", f"Bearer {key}")])
            return continuation(details, requests)

    return grpc.intercept_channel(channel, AddKey())


def _streaming(channel: grpc.Channel, method: str) -> Callable[..., Any]:
    call = channel.stream_stream(method)
    return lambda message, timeout: list(call(iter([message]), timeout=timeout))


def test_websocket_handshakes(server: Server, key: str) -> None:
    for path in ("/", "/dry_run", "/livez", "/encode"):
        for subprotocols in (None, ["bytes"]):
            with (
                pytest.raises(InvalidStatus) as caught,
                connect(f"{server.websocket}{path}", subprotocols=subprotocols, proxy=None),  # type: ignore[arg-type]
            ):
                pass
            assert caught.value.response.status_code == 401
    with connect(server.websocket, additional_headers={"x-api-key": key}, proxy=None) as socket_:
        socket_.send(
            pb.Requests(requests=[pb.Request(id=7, info=pb.InfoRequest())]).SerializeToString()
        )
        answer = pb.Responses.FromString(socket_.recv())  # type: ignore[arg-type]
        assert answer.responses[0].info.dim == 256


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Jina leaves its session open when it is refused
@pytest.mark.parametrize("protocol", ["grpc", "http", "websocket"])
def test_jina_clients(server: Server, key: str, protocol: str) -> None:
    from jina import Client as JinaClient
    from jina.excepts import BadServerFlow

    port = server.ports[["grpc", "http", "websocket"].index(protocol)]
    client = JinaClient(host="127.0.0.1", port=port, protocol=protocol)
    docs = DocList[ClipDoc]([ClipDoc(text="a cat")])
    sent = {"metadata": (("authorization", f"Bearer {key}"),)} if protocol == "grpc" else {
        "headers": {"authorization": f"Bearer {key}"}
    }  # fmt: skip
    [answered] = client.post("/encode", docs, return_type=DocList[ClipDoc], **sent)
    assert answered.embedding is not None
    assert answered.embedding.shape == (256,)
    with pytest.raises((BadServerFlow, ValueError, ConnectionError), match=r"401|needs a key"):
        client.post("/encode", docs, return_type=DocList[ClipDoc])
    gc.collect()


def test_a_key_is_checked_before_the_body(server: Server) -> None:
    """The answer comes although none of the body was sent; a client sends what it announced in
    full."""
    with socket.create_connection(("127.0.0.1", server.ports[1]), 60) as connection:
        connection.sendall(
            b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")
    body = b"x" * (20 << 20)
    assert requests.post(f"{server.http}/encode", data=body, timeout=60).status_code == 401
    with socket.create_connection(("127.0.0.1", server.ports[1]), 60) as connection:
        connection.sendall(
            b"POST /encode HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
        )
        answer = b""
        while part := connection.recv(1000):  # until the server closes it
            answer += part
        assert answer.startswith(b"HTTP/1.1 401 ")


@pytest.mark.slow
def test_rotation(server: Server, add_key: Callable[..., str], key_file: Path) -> None:
    """A new key works, and a removed one no longer, also on connections that are open."""
    old = add_key("bob")
    clients = [Client(address, credential=old) for address in server.addresses]

    def works(client: Client) -> bool:
        try:
            client.encode(["a cat"])
        except AuthenticationError:
            return False
        return True

    for client in clients:
        assert eventually(lambda client=client: works(client))  # type: ignore[misc]
    new = add_key("bob-2")
    keys("remove", "bob", file=key_file)
    for client, address in zip(clients, server.addresses, strict=True):
        assert eventually(lambda client=client: not works(client))  # type: ignore[misc]
        with client, pytest.raises(AuthenticationError):
            client.rank("a cat", ["a dog"])
        with Client(address, credential=new) as client:
            assert client.encode(["a cat"]).shape == (1, 256)
    good = key_file.read_text()
    key_file.write_text("keys: {bob: {sha256: 12}}")
    time.sleep(1)
    with Client(server.grpc, credential=new) as client:
        assert client.encode(["a cat"]).shape == (1, 256)  # a mistake leaves all as it was
    key_file.write_text(good)
    assert new not in server.output()


@pytest.mark.slow
def test_items_in_flight(server: Server, add_key: Callable[..., str], key: str) -> None:
    limited = {"x-api-key": add_key("carol", "--max-in-flight-items", "40")}

    def post(count: int) -> requests.Response:
        # Not in the cache, and enough of them to be in flight for a while.
        data = [{"text": f"{'word ' * 60}{i}"} for i in range(count)]
        return requests.post(
            f"{server.http}/encode", json={"data": data}, headers=limited, timeout=60
        )

    assert eventually(lambda: post(1).status_code == 200)
    refused = post(41)
    assert refused.status_code == 429
    assert "this key may have 40" in refused.json()["error"]["message"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, [30] * 24))
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["Retry-After"] == "1"
    with Client(server.grpc, credential=limited["x-api-key"]) as client:
        with pytest.raises(OverloadedError, match="batch_size of 40"):
            client.encode(["a cat"] * 41, batch_size=41)
        assert client.encode([f"cat {i}" for i in range(100)], batch_size=20).shape == (100, 256)
    other = {"data": [{"text": "a cat"}] * 1000}
    answer = requests.post(
        f"{server.http}/encode", json=other, headers={"api-key": key}, timeout=60
    )
    assert answer.status_code == 200


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "keys.yml"
    made = keys("add", "alice", file=file).stdout.strip()
    assert len(made) > 40
    assert made not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert keys("add", "bob", "--max-in-flight-items", "7", file=file).status == 0
    assert keys("list", file=file).stdout.split("\n")[:2] == ["alice", "bob  7 items in flight"]
    assert "there is a key alice" in keys("add", "alice", file=file).stderr
    assert keys("remove", "alice", file=file).status == 0
    assert "there is no key alice" in keys("remove", "alice", file=file).stderr
    [bob] = yaml.safe_load(file.read_text())["keys"]
    assert bob == "bob"


@pytest.fixture(autouse=True)
def no_keys_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLIP_AUTH_TOKEN", "CLIP_AUTH_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("keys: {a: {sha256: 12}}", "64 hexadecimal digits"),
        ("keys: {a: my-key}", "holds sha256:"),
        ("keys: {a: {sha: 12}}", "unknown key 'sha'"),
        ("keys: [a]", "an entry for each name"),
        ("users: {}", "unknown key 'users'"),
        ("- a", "it holds `keys:`"),
        ("keys: {", "is not YAML"),
        ("keys: {a: 2026-99-99}", "is not YAML"),
        ("[" * 5_000, "is not YAML"),
        (f"keys: {{a b: {{sha256: {'a' * 64}}}}}", "the name 'a b'"),
        (f"keys: {{a: {{sha256: {'a' * 64}, max_in_flight_items: 0}}}}", "whole number from 1"),
        ("max_in_flight_items: many", "whole number from 1"),
        (f"keys: {{a: {{sha256: {'a' * 64}}}, a: {{sha256: {'b' * 64}}}}}", "a is there twice"),
        (f"keys: {{a: {{sha256: {'a' * 64}, sha256: {'b' * 64}}}}}", "sha256 is there twice"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "keys.yml"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match=said):
        open_keyring(str(file))
    spec = flow(ports=free_ports(3))
    spec["with"]["auth_file"] = str(file)
    with pytest.raises(ConfigurationError, match=said):
        flows.prepare(spec)


def test_a_file_that_cannot_be_read_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says so once for each fault, however often a key is shown meanwhile."""
    monkeypatch.setattr(watched_files, "_CHECK_SECONDS", 0)
    file = tmp_path / "keys.yml"
    alice = keys("add", "alice", file=file).stdout.strip()
    ring, good = KeyRing(file=file), file.read_text()
    file.unlink()
    for content in (None, "keys: {a: 2026-99-99}", "keys: {a: {sha256: 12}}", good[:-20]):
        if content is not None:
            file.write_text(content)
        assert all(ring.find(alice) for _ in range(3))
    faults = [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
    assert len(faults) == 4
    assert all(each.startswith("the keys stay as they were: ") for each in faults)
    file.write_text(good)
    bob = keys("add", "bob", file=file).stdout.strip()
    assert ring.find(alice)
    assert ring.find(bob)
    keys("remove", "alice", file=file)
    assert not ring.find(alice)


def test_where_keys_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_keyring(None) is None
    with pytest.raises(ConfigurationError, match="No such file"):
        open_keyring(str(tmp_path / "missing.yml"))
    file = tmp_path / "keys.yml"
    keys("add", "alice", file=file)
    monkeypatch.setenv("CLIP_AUTH_TOKEN", "first,second third\n")
    ring = open_keyring(str(file))
    assert isinstance(ring, KeyRing)
    found = [ring.find(word) for word in ("first", "second", "third", "fourth", "")]
    assert [key and key.name for key in found] == ["token-1", "token-2", "token-3", None, None]
    for blank in ("", "  ", ","):
        monkeypatch.setenv("CLIP_AUTH_TOKEN", blank)
        with pytest.raises(ConfigurationError, match="set but empty"):
            open_keyring(None)
    monkeypatch.delenv("CLIP_AUTH_TOKEN")
    spec = flow(ports=free_ports(3))
    spec["with"]["public_metrics"] = "yes"
    with pytest.raises(ConfigurationError, match="public_metrics: 'yes' is not true or false"):
        flows.prepare(spec)


def test_metrics_by_choice() -> None:
    ring = KeyRing(("secret",))
    assert not Access(ring).is_open("/metrics")
    assert Access(ring, public_metrics=True).is_open("/metrics")
    assert not Access(ring, public_metrics=True).is_open("/info")


def test_caller_name() -> None:
    """The name for logs and metrics follows the request into its tasks."""

    async def serve() -> str:
        Access(KeyRing(("secret",))).identify({"authorization": "Bearer secret"})

        async def work() -> str:
            return caller_name()

        return await asyncio.create_task(work())

    assert asyncio.run(serve()) == "token-1"
    assert caller_name() == ""
