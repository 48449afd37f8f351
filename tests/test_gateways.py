"""Several gateways on the same ports: they answer as one, and share every limit."""

from __future__ import annotations

import hashlib
import itertools
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml
from conftest import (
    HELD_EXECUTOR,
    PATIENCE_SECONDS,
    SLOW_EXECUTOR,
    Server,
    Start,
    eventually,
    flow,
)
from prometheus_client.parser import text_string_to_metric_families

from clip_client import Client
from clip_server.launch.ports import is_free

PROTOCOLS = ("grpc", "http", "websocket")
KEY, LIMITED_KEY, LIMIT = "a key", "a limited key", 200
BATCH, MOST_CONNECTIONS, MOST_BYTES = 8, 40, 50_000
# More connections than ever go to one gateway by chance.
MANY = 64
# Of texts that no one has sent before.
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """Two gateways before a slow encoder."""
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in (KEY, LIMITED_KEY)}
    keys = {
        "one": {"sha256": digests[KEY]},
        "limited": {"sha256": digests[LIMITED_KEY], "max_in_flight_items": LIMIT},
    }
    file = tmp_path_factory.mktemp("keys") / "keys.yml"
    file.write_text(yaml.safe_dump({"keys": keys}))
    spec = flow(module=SLOW_EXECUTOR, minibatch_size=BATCH)
    spec["with"] |= {
        "gateways": 2,
        "auth_file": str(file),
        "public_metrics": True,
        "max_wait": 0.3,
        "max_queued_bytes": MOST_BYTES,
        "max_connections_per_address": MOST_CONNECTIONS,
    }
    return start(spec)


def gateways(server: Server) -> list[psutil.Process]:
    """Those that have opened their HTTP port."""
    return [each for each in server.family()[1:] if server.ports[1] in listens_on(each)]


def listens_on(process: psutil.Process) -> set[int]:
    with suppress(psutil.Error):
        connections = process.net_connections("tcp")
        return {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}
    return set()


@dataclass
class Answer:
    status: int
    message: str


@dataclass
class Link:
    """A connection to the HTTP port."""

    connection: HTTPConnection

    def send(self, texts: int, key: str = KEY, words: str = "") -> Answer:
        """Sends so many texts to be encoded."""
        data = [{"text": f"text {next(_numbers)} {words}"} for _ in range(texts)]
        headers = {"authorization": f"Bearer {key}"}
        self.connection.request("POST", "/encode", json.dumps({"data": data}), headers)
        response = self.connection.getresponse()
        error = json.loads(response.read()).get("error") or {}
        return Answer(response.status, error.get("message", ""))

    def gateway(self, server: Server) -> int | None:
        """The process that the system has dealt it to."""
        ours = self.connection.sock.getsockname()
        for each in gateways(server):
            if any(ours == tuple(other.raddr or ()) for other in each.net_connections("tcp")):
                return each.pid
        return None


@contextmanager
def connected(server: Server) -> Iterator[Link]:
    connection = HTTPConnection("127.0.0.1", server.ports[1], timeout=PATIENCE_SECONDS)
    connection.connect()
    try:
        yield Link(connection)
    finally:
        connection.close()


@contextmanager
def link_to_each(server: Server) -> Iterator[list[Link]]:
    """A connection to each gateway."""
    found: dict[int, Link] = {}
    with ExitStack() as stack:
        while len(found) < 2:
            link = stack.enter_context(connected(server))
            assert eventually(lambda link=link: link.gateway(server) is not None)
            gateway = link.gateway(server)
            assert gateway is not None
            found.setdefault(gateway, link)
        yield list(found.values())


@pytest.fixture
def links(server: Server) -> Iterator[list[Link]]:
    with link_to_each(server) as found:
        yield found


@contextmanager
def holding(server: Server, link: Link, *arguments: Any) -> Iterator[None]:
    """One gateway has texts in flight; they are answered in the end."""
    with ThreadPoolExecutor() as pool:
        held = pool.submit(link.send, *arguments)
        while not server.metrics()["in_flight_items"]:
            assert not held.done()
        yield
        assert held.result().status == 200
    assert eventually(lambda: server.metrics()["in_flight_items"] == 0)


def requests_answered(server: Server) -> Counter[tuple[str, str]]:
    """By gateway and protocol."""
    text = requests.get(f"{server.http}/metrics", timeout=PATIENCE_SECONDS).text
    return Counter(
        {
            (sample.labels["gateway"], sample.labels["protocol"]): int(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "clip_request_duration_seconds_count"
            and sample.labels["endpoint"] == "/encode"
        }
    )


def test_both_answer_on_every_protocol_and_scrapes_are_of_both(server: Server) -> None:
    before = seen = requests_answered(server)
    sent = Counter[str]()
    for protocol, address in zip(PROTOCOLS, server.addresses, strict=True):
        while not all(seen[number, protocol] > before[number, protocol] for number in "01"):
            assert sent[protocol] < MANY
            with Client(address, credential=KEY) as client:
                client.encode(["a cat"])
            sent[protocol] += 1
            now = requests_answered(server)
            assert all(now[each] >= count for each, count in seen.items()), "it went backwards"
            seen = now

    def counted() -> Counter[str]:
        answered = Counter[str]()
        for (_, protocol), count in (requests_answered(server) - before).items():
            answered[protocol] += count
        return answered

    assert eventually(lambda: counted() == sent)
    assert server.metrics()["gateway_up"] == 2


def test_a_keys_items_are_limited_over_all(server: Server, links: list[Link]) -> None:
    first, second = links
    with holding(server, first, LIMIT - 20, LIMITED_KEY):
        refused = second.send(21, LIMITED_KEY)
        assert refused.status == 429
        assert f"{LIMIT - 20} items of this key are in flight" in refused.message
        assert second.send(20, LIMITED_KEY).status == 200


def test_requests_wait_for_those_of_the_other(server: Server, links: list[Link]) -> None:
    first, second = links
    for _ in range(10):  # the second gateway may not have measured the encoder well enough
        learn_rate(server)
        with holding(server, first, 160):
            refused = second.send(130)
            # A small request passes the large one.
            assert second.send(1).status == 200
        if refused.status == 429:
            break
    assert "would wait" in refused.message


def learn_rate(server: Server) -> None:
    """Each gateway learns how fast the encoder is, from more requests than it lets begin before."""
    with ExitStack() as stack, ThreadPoolExecutor(2 * BATCH) as pool:
        links = [stack.enter_context(connected(server)) for _ in range(2 * BATCH)]
        answers = pool.map(Link.send, links, [BATCH] * len(links))
        assert {answer.status for answer in answers} <= {200, 429}


def test_bytes_in_flight_are_limited_over_all(server: Server, links: list[Link]) -> None:
    first, second = links
    with holding(server, first, 160, KEY, "word " * 150):
        refused = second.send(1)
        assert refused.status == 429
        assert "MiB" in refused.message


def test_connections_are_limited_over_all(server: Server) -> None:
    with ExitStack() as stack:
        sessions = [stack.enter_context(requests.Session()) for _ in range(MOST_CONNECTIONS + 1)]
        answers = [
            each.get(f"{server.http}/livez", timeout=PATIENCE_SECONDS).status_code
            for each in sessions
        ]
    assert set(answers) == {200, 429}
    # Connections of other tests that were just closed may still count.
    assert MOST_CONNECTIONS - 5 <= answers.count(200) <= MOST_CONNECTIONS


@pytest.mark.slow
def test_grpc_connections_are_limited_over_all(server: Server) -> None:
    with ExitStack() as stack, ThreadPoolExecutor(MOST_CONNECTIONS + 1) as pool:

        def encode(client: Client) -> str:
            try:
                client.encode(["a cat"], timeout=2)
            except Exception as error:
                return str(error)
            return ""

        clients = [Client(server.grpc, credential=KEY) for _ in range(MOST_CONNECTIONS + 1)]
        for each in clients:
            stack.callback(each.close)
        refused = [error for error in pool.map(encode, clients) if error]
    assert refused
    assert all("max_connections_per_address" in error for error in refused)


@pytest.mark.slow
def test_no_other_server_shares_the_ports(start: Start) -> None:
    """Neither one that starts at the same time, nor a later one."""
    spec = flow(module=HELD_EXECUTOR)
    spec["with"]["gateways"] = 2
    server = start(spec, wait=False)
    hold = server.log.parent / "hold"
    hold.touch()
    assert eventually(lambda: len(server.family()) > 3)
    assert not gateways(server)
    assert_refused(server, start(spec, wait=False))
    hold.unlink()
    server.wait_until_ready()
    assert "2 gateways share these ports" in server.output()
    assert_refused(server, start(spec, wait=False))
    server.stop()


@pytest.mark.slow
def test_all_accept_requests_while_one_gets_them(start: Start) -> None:
    """Also when they are told to end: a client that connects anew may be dealt to any."""
    spec = flow(module=SLOW_EXECUTOR)
    spec["with"] |= {"gateways": 2, "grace_seconds": 120}
    server = start(spec)
    with Client(server.websocket) as client:  # by one connection, to one of them
        client.encode(["a cat"])
        server.process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        while time.monotonic() < told + 1:
            client.encode(["a cat"])
        assert len(gateways(server)) == 2
    assert server.process.wait(PATIENCE_SECONDS) == 0


def assert_refused(server: Server, other: Server) -> None:
    assert other.process.wait(PATIENCE_SECONDS) == 1
    assert f"in use on 127.0.0.1: port {server.ports[0]}" in other.output()


def test_the_command_is_killed(server: Server) -> None:
    """The last of the tests: nothing of the server is left."""
    family = server.family()
    (folder,) = {
        Path(each.laddr).parent
        for gateway in gateways(server)
        for each in gateway.net_connections("unix")
        if "clip-server-gateways-" in str(each.laddr)
    }
    assert folder.stat().st_mode & 0o777 == 0o700
    server.process.kill()
    server.process.wait()
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_SECONDS)
    assert not alive
    assert all(is_free("127.0.0.1", port) for port in server.ports)
    assert not folder.exists()
