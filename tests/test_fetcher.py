"""`allow_uri`: what the server fetches by itself, and everything that it does not."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import threading
import time
from collections.abc import Coroutine, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import requests
from conftest import SAMPLES, Server, Start, flow
from docarray import DocList

from clip_client import Client
from clip_client.proto import clip_pb2 as pb
from clip_server.engine.fetcher import Fetcher, UriPolicy
from clip_server.errors import ConfigurationError, ItemError
from clip_server.executors.parameters import EncoderParameters
from clip_server.rpc.documents import ClipDoc

CAT = (SAMPLES / "cat.png").read_bytes()
SECRET = b"the secret of the inside"
# The server may fetch from the first, and from nothing else on this machine.
ALLOWED, CLOSED = "127.0.0.2", "127.0.0.1"


class Site(BaseHTTPRequestHandler):
    """Answers by path; knows who asked."""

    asked: list[str] = []  # noqa: RUF012 - of the test's one site

    def do_GET(self) -> None:
        host = self.server.server_address[0]
        self.asked.append(f"{host}{self.path}")
        kind, _, rest = self.path[1:].partition("/")
        headers: dict[str, str] = {}
        status, body = 200, CAT if host == ALLOWED else SECRET
        if kind == "to":
            status, body, headers["Location"] = 302, SECRET, rest
        elif kind == "status":
            status, body = int(rest), SECRET
        elif kind == "gzip":
            body, headers["Content-Encoding"] = gzip.compress(b"0" * 10_000_000), "gzip"
        elif kind == "large":
            body = b"0" * int(rest)
        elif kind == "slow":
            time.sleep(float(rest))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if kind != "large":  # whose end alone says how long it is
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the server has enough
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of the same site at both addresses."""
    with (
        ThreadingHTTPServer((ALLOWED, 0), Site) as allowed,
        ThreadingHTTPServer((CLOSED, allowed.server_port), Site) as closed,
    ):
        for site in (allowed, closed):
            threading.Thread(target=site.serve_forever, daemon=True).start()
        yield allowed.server_port
        for site in (allowed, closed):
            site.shutdown()


POLICY: dict[str, Any] = {
    "schemes": ["http", "https"],
    "hosts": ["*"],
    "networks": [f"{ALLOWED}/32"],
    "timeout": 2,
    "max_uris": 200,
}


@pytest.fixture(scope="module")
def server(start: Start) -> Server:
    return start(flow("onnx", allow_uri=POLICY, max_item_bytes=1 << 20))


def answers(server: Server, *uris: str) -> list[dict[str, Any]]:
    answer = requests.post(
        f"{server.http}/encode", json={"data": [{"uri": uri} for uri in uris]}, timeout=60
    )
    assert answer.status_code == 200
    data: list[dict[str, Any]] = answer.json()["data"]
    return data


REFUSED = r"""
http://127.0.0.1:PORT/
http://localhost:PORT/
http://LOCALHOST:PORT/
http://localhost.:PORT/
http://127.0.0.1.:PORT/
http://127.1:PORT/
http://127.0.1:PORT/
http://2130706433:PORT/
http://0x7f000001:PORT/
http://0x7F.0.0.1:PORT/
http://0x7f.1:PORT/
http://017700000001:PORT/
http://0177.0.0.1:PORT/
http://0177.0.0.01:PORT/
http://00000177.0.0.1:PORT/
http://127.000.000.001:PORT/
http://0:PORT/
http://0.0.0.0:PORT/
http://[::]:PORT/
http://[::1]:PORT/
http://[0:0:0:0:0:0:0:1]:PORT/
http://[::ffff:127.0.0.1]:PORT/
http://[::ffff:7f00:1]:PORT/
http://[0:0:0:0:0:ffff:7f00:0001]:PORT/
http://[::127.0.0.1]:PORT/
http://[64:ff9b::127.0.0.1]:PORT/
http://[64:ff9b:1::7f00:1]:PORT/
http://[2002:7f00:1::]:PORT/
http://[2001:0:7f00:1::1]:PORT/
http://[fe80::1%25lo]:PORT/
http://[fe80::1]:PORT/
http://[fc00::1]:PORT/
http://[fd00:ec2::254]/latest/meta-data/
http://[ff02::1]:PORT/
http://[fec0::1]:PORT/
http://[2001:db8::1]:PORT/
http://169.254.169.254/latest/meta-data/
http://2852039166/latest/meta-data/
http://0xa9fea9fe/latest/meta-data/
http://[::ffff:169.254.169.254]/latest/meta-data/
http://168.63.129.16/metadata/
http://100.100.100.200/latest/meta-data/
http://192.0.0.192/
http://10.0.0.1/
http://172.16.0.1/
http://192.168.0.1/
http://100.64.0.1/
http://198.18.0.1/
http://192.0.2.1/
http://203.0.113.1/
http://224.0.0.1/
http://240.0.0.1/
http://255.255.255.255/
http://ALLOWED:PORT@127.0.0.1:PORT/
http://ALLOWED@127.0.0.1:PORT/
http://user:password@ALLOWED:PORT/
http://ALLOWED:PORT\@127.0.0.1:PORT/
http://127.0.0.1:PORT\@ALLOWED:PORT/
http://127.0.0.1:PORT#@ALLOWED:PORT/
http://127.0.0.1:PORT?@ALLOWED:PORT/
http://①②⑦.⓪.⓪.①:PORT/
http://127。0。0。1:PORT/
http://localhost%00.ALLOWED:PORT/
http://%6cocalhost:PORT/
http://127.0.0.1%09:PORT/
http:///127.0.0.1:PORT/
http:127.0.0.1:PORT/
http://:PORT/
//127.0.0.1:PORT/
http://ALLOWED:PORT/to/http://127.0.0.1:PORT/
http://ALLOWED:PORT/to///127.0.0.1:PORT/
http://ALLOWED:PORT/to/http://2130706433:PORT/
http://ALLOWED:PORT/to/http://[::ffff:127.0.0.1]:PORT/
http://ALLOWED:PORT/to/http://x@127.0.0.1:PORT/
http://ALLOWED:PORT/to/file:///etc/passwd
http://ALLOWED:PORT/to/gopher://127.0.0.1:PORT/
http://ALLOWED:PORT/to/http://ALLOWED:PORT/to/http://127.0.0.1:PORT/
file:///etc/passwd
FILE:///etc/passwd
file://localhost/etc/passwd
file:/etc/passwd
/etc/passwd
../../etc/passwd
ftp://127.0.0.1/
gopher://127.0.0.1:PORT/_GET
dict://127.0.0.1:PORT/
ldap://127.0.0.1:PORT/
jar:http://127.0.0.1:PORT/!/
javascript:alert(1)
ws://127.0.0.1:PORT/
unix:///var/run/docker.sock
http+unix://%2Fvar%2Frun%2Fdocker.sock/info
"""


def sent_to_be_refused(port: int) -> list[str]:
    uris = [uri.replace("PORT", str(port)).replace("ALLOWED", ALLOWED) for uri in REFUSED.split()]
    return [
        *uris,
        f"http://127.0.0.1:{port}/a\nb",
        f"http://127.0.0.1:{port}/\r\nHost: x",
        "http://",
    ]


def test_nothing_else_is_reached(port: int) -> None:
    """The site at 127.0.0.1 is never asked, and nothing is told."""
    uris = sent_to_be_refused(port)
    assert len(uris) > 80
    Site.asked.clear()
    for uri, found in zip(uris, fetch(POLICY, *uris), strict=True):
        assert isinstance(found, ItemError), uri
        for leak in (SECRET.decode(), "root:", "Errno", "refused", CLOSED):
            assert leak not in str(found).replace(f"from '{CLOSED}'", ""), uri
    assert not [each for each in Site.asked if each.startswith(CLOSED)]


@pytest.mark.slow
def test_a_server_refuses_the_same(server: Server, port: int) -> None:
    Site.asked.clear()
    uris = sent_to_be_refused(port)
    for uri, answer in zip(uris, answers(server, *uris), strict=True):
        assert "error" in answer, uri
        assert "embedding" not in answer, uri
    assert not [each for each in Site.asked if each.startswith(CLOSED)]


@pytest.mark.slow
def test_every_protocol(server: Server, port: int) -> None:
    from jina import Client as JinaClient

    uri = f"http://{ALLOWED}:{port}/cat.png"
    with Client(server.grpc) as client:
        [expected] = client.encode([CAT])
    [over_json] = answers(server, uri)
    assert np.allclose(over_json["embedding"], expected, atol=1e-6)
    message = pb.EncodeRequest(items=[pb.Item(uri=uri), pb.Item(text="a cat"), pb.Item(uri=uri)])
    for address in server.addresses:
        with Client(address) as client:
            encoded = client._connection.send(pb.Request(encode=message), 60).result().encode
        rows = np.frombuffer(encoded.embeddings, "<f4").reshape(3, -1)
        assert np.allclose(rows[[0, 2]], expected, atol=1e-6)
        assert not encoded.errors
    ranked = requests.post(
        f"{server.http}/rank",
        json={"data": [{"uri": uri, "matches": [{"text": "a cat"}, {"text": "a car"}]}]},
        timeout=60,
    ).json()
    assert ranked["data"][0]["matches"][0]["text"] == "a cat"
    docs = DocList[ClipDoc]([ClipDoc(uri=uri), ClipDoc(uri=f"http://{CLOSED}:{port}/")])
    jina = JinaClient(host="127.0.0.1", port=server.ports[0])
    good, bad = jina.post("/encode", docs, return_type=DocList[ClipDoc])
    assert np.allclose(good.embedding, expected, atol=1e-6)
    assert bad.error == "the host of the URI cannot be reached"


@pytest.mark.slow
def test_redirects_and_failures(server: Server, port: int) -> None:
    site = f"http://{ALLOWED}:{port}"
    good = [f"{site}/to/{site}/x.png", f"{site}/to//x.png", f"{site}/to/{site}/to/{site}/x.png"]
    assert all("embedding" in each for each in answers(server, *good))
    bad = {
        f"{site}/to/" * 4 + f"{site}/x": "redirects more than 3 times",
        f"{site}/status/404": "status 404",
        f"{site}/status/500": "status 500",
        f"{site}/gzip/": "compressed body",
        f"{site}/large/{2 << 20}": "more than 1 MiB",
        f"{site}/slow/5": "within 2 s",
        f"{site}/{'x' * 5000}": "longer than",
        "http://no-such-host.invalid/": "cannot be reached",
    }
    for (uri, said), answer in zip(bad.items(), answers(server, *bad), strict=True):
        assert said in answer["error"], uri
        assert SECRET.decode() not in answer["error"]
    [*_, last] = answers(server, *(f"{site}/{number}" for number in range(201)))
    assert "at most 200 URIs" in last["error"]


def fetch(policy: dict[str, Any], *uris: str) -> list[bytes | ItemError]:
    async def run() -> list[bytes | ItemError]:
        return list((await Fetcher(UriPolicy.parse(policy), 1 << 20).fetch(uris)).values())

    return run_alone(run())


def run_alone(fetching: Coroutine[Any, Any, list[bytes | ItemError]]) -> list[bytes | ItemError]:
    # uvloop, which importing Jina makes the default, does not look names up in Python.
    loop = asyncio.SelectorEventLoop()
    try:
        return loop.run_until_complete(fetching)
    finally:
        loop.close()


def test_names_are_checked_where_they_lead(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An allowed name whose address changes between a check and the connection gains nothing, and
    neither does a proxy of the environment."""
    lookups = 0

    def rebinding(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        nonlocal lookups
        lookups += 1
        address = CLOSED if host == "rebound.example" else ALLOWED
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://{CLOSED}:{port}")
    policy = {**POLICY, "hosts": ["*.example", f"with-port.test:{port}", "Exact.Test."]}
    Site.asked.clear()
    site = f":{port}/x"
    found = fetch(policy, f"http://rebound.example{site}", f"http://cdn.example{site}",
                  f"http://a.b.example{site}", f"http://EXACT.test{site}",
                  f"http://exact.test.{site}", f"http://with-port.test{site}",
                  f"http://example{site}", f"http://badexample{site}",
                  f"http://exact.test.evil{site}", "http://with-port.test/x")  # fmt: skip
    assert lookups >= 6
    assert found[1:6] == [CAT] * 5
    assert all(isinstance(each, ItemError) for each in (found[0], *found[6:]))
    assert not [each for each in Site.asked if each.startswith(CLOSED)]
    [refused] = fetch({"hosts": ["cdn.example"]}, f"http://cdn.example{site}")
    assert "only https URIs" in str(refused)


def test_slow_hosts_of_one_request_delay_no_other(port: int) -> None:
    """Only some of its images are fetched at the same time, and none once its time is over."""
    site = f"http://{ALLOWED}:{port}"

    async def run() -> list[bytes | ItemError]:
        fetcher = Fetcher(UriPolicy.parse({**POLICY, "timeout": 60}), 1 << 20)
        slow = [f"{site}/slow/1.{number}" for number in range(50)]
        fetching = asyncio.create_task(fetcher.fetch(slow, timeout=0.5))
        await asyncio.sleep(0)
        assert await fetcher.fetch([f"{site}/cat.png"]) == {f"{site}/cat.png": CAT}
        return list((await fetching).values())

    Site.asked.clear()
    found = run_alone(run())
    assert [str(each) for each in found] == ["the URI was not fetched within 0.5 s"] * 50
    assert len(Site.asked) <= 17


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (True, "is not keys with values"),
        ({"schemes": ["https"]}, "hosts: is missing"),
        ({"hosts": [], "schemes": ["https"]}, "hosts: is missing"),
        ({"hosts": ["https://example.com/"]}, "is not a host"),
        ({"hosts": ["exa*mple.com"]}, "is not a host"),
        ({"hosts": [7]}, "is not a host"),
        ({"hosts": ["a.com"], "schemes": ["file"]}, "'file' is not allowed: there is https, http"),
        ({"hosts": ["a.com"], "networks": ["10.0.0.0/99"]}, "is not a network"),
        ({"hosts": ["a.com"], "timeout": 0}, "is not a number from 1"),
        ({"hosts": ["a.com"], "host": "b.com"}, "unknown key 'host'"),
    ],
)
def test_mistakes_in_the_flow(given: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        EncoderParameters.parse({"allow_uri": given})


def test_refused_by_default(http: Any) -> None:
    answer = http.post("/encode", json={"data": [{"uri": "https://example.com/cat.png"}]})
    assert "opens only data: URIs" in answer.json()["data"][0]["error"]
