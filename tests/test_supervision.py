"""Processes that die, hang or are told to end: nothing is lost, and they come back."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
from conftest import (
    HELD_EXECUTOR,
    PATIENCE_SECONDS,
    SLOW_EXECUTOR,
    STUCK_EXECUTOR,
    Server,
    Start,
    eventually,
    flow,
    is_alive,
    saved,
    search_flow,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from clip_client import Client

TEXTS = ["a cat", "a dog", "a house"]


class Load:
    """Clients that send texts one after the other, and what went wrong."""

    def __init__(self, server: Server, each: int = 3, timeout: float = 60) -> None:
        self.answered, self.problems = 0, list[str]()
        self._timeout, self._is_over = timeout, threading.Event()
        with Client(server.grpc) as client:
            self._expected = client.encode(TEXTS)
        self._threads = [
            threading.Thread(target=self._send, args=[address])
            for address in server.addresses * each
        ]

    def _send(self, address: str) -> None:
        with Client(address) as client:
            while not self._is_over.is_set():
                for text, expected in zip(TEXTS, self._expected, strict=True):
                    try:
                        found = client.encode([text], timeout=self._timeout)
                        np.testing.assert_allclose(found[0], expected, atol=1e-4)
                        self.answered += 1
                    except (Exception, AssertionError) as error:
                        self.problems.append(f"{address}: {error}")

    def end(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def listening(server: Server) -> list[tuple[int, psutil.Process]]:
    """The gateways and the executors that have started, with each port that they listen on."""
    found = []
    for process in server.family()[1:]:
        with suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.append((connection.laddr.port, process))
    return sorted(found, key=lambda each: each[0])


def ports(server: Server) -> list[int]:
    """One that several processes share comes several times."""
    return [port for port, _ in listening(server)]


def gateways(server: Server) -> list[psutil.Process]:
    return [process for port, process in listening(server) if port == server.ports[0]]


def executors(server: Server) -> list[psutil.Process]:
    return [process for port, process in listening(server) if port not in server.ports]


def is_ready(server: Server) -> bool:
    with suppress(requests.RequestException):
        return requests.get(f"{server.http}/readyz", timeout=2).status_code == 200
    return False


def health(server: Server) -> int:
    with server.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(), timeout=2).status


@contextmanager
def replaced(server: Server, victims: list[psutil.Process]) -> Iterator[None]:
    """Whatever is done to processes: they are replaced, and the server is ready again."""
    before = ports(server)
    yield
    assert eventually(lambda: not any(map(is_alive, victims)))
    assert eventually(lambda: ports(server) == before)
    assert eventually(lambda: is_ready(server))


@pytest.fixture(scope="module")
def two_replicas(start: Start) -> Server:
    """And two gateways."""
    spec = flow()
    spec["with"] |= {
        "max_restarts": 50,
        "silence_seconds": 1.5,
        "hang_seconds": 4,
        "gateways": 2,
    }
    spec["executors"][0]["replicas"] = 2
    return start(spec)


def test_what_dies_comes_back(start: Start) -> None:
    """The only replica, then the gateway; readiness and health follow."""
    server = start(flow(module=HELD_EXECUTOR))
    hold = server.log.parent / "hold"
    with Client(server.grpc) as client:
        expected = client.encode(TEXTS)
        victim = executors(server)[0]
        with replaced(server, [victim]):
            hold.touch()  # so that it does not come back too soon to be seen away
            victim.kill()
            assert eventually(lambda: not is_ready(server))
            assert eventually(lambda: health(server) == health_pb2.HealthCheckResponse.NOT_SERVING)
            answer = requests.post(f"{server.http}/encode", json={"data": [{"text": "a cat"}]})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            hold.unlink()
            np.testing.assert_allclose(client.encode(TEXTS), expected, atol=1e-4)
        assert eventually(lambda: health(server) == health_pb2.HealthCheckResponse.SERVING)
        (victim,) = gateways(server)
        with replaced(server, [victim]):
            victim.kill()
            np.testing.assert_allclose(client.encode(TEXTS), expected, atol=1e-4)
    for said in (
        "clip/rep-0 was killed (SIGKILL), perhaps because memory ran out: restarting",
        "clip/rep-0 is ready again",
        "gateway/rep-0 was killed (SIGKILL)",
        "gateway/rep-0 is ready again",
    ):
        server.wait_for_output(said)
    server.stop()


@pytest.mark.slow
def test_what_dies_again_and_again_stays_down(start: Start) -> None:
    spec = flow()
    spec["with"]["max_restarts"] = 0
    server = start(spec)
    family = server.family()
    executors(server)[0].kill()
    assert server.process.wait(PATIENCE_SECONDS) == 1
    assert not any(map(is_alive, family))
    assert "it stays down (max_restarts: 0)" in server.output()
    assert "the server ends, because every replica of clip is down" in server.output()


@pytest.mark.slow
def test_every_process_killed_in_turn_under_load(two_replicas: Server) -> None:
    server = two_replicas
    with Load(server) as load:
        for choose in (
            lambda: executors(server)[:1],
            lambda: executors(server)[1:],
            lambda: gateways(server)[:1],
            lambda: gateways(server)[1:],
            lambda: executors(server),
            lambda: [*gateways(server), *executors(server)],
        ):
            victims = choose()
            answered = load.answered
            with replaced(server, victims):
                for victim in victims:
                    victim.kill()
            assert eventually(lambda answered=answered: load.answered > answered + 20)
    assert not load.problems
    assert server.metrics()["gateway_up"] == 2
    assert "gateway/rep-1 is ready again" in server.output()


@pytest.mark.slow
def test_a_gateway_that_is_stopped_is_restarted(two_replicas: Server) -> None:
    """Its siblings answer meanwhile, and say that it does not."""
    server = two_replicas
    victim = gateways(server)[0]
    with replaced(server, [victim]):
        victim.suspend()
        assert eventually(lambda: _gateways_up(server) == 1)
    assert eventually(lambda: _gateways_up(server) == 2)
    assert re.search(r"gateway/rep-\d: showed no sign of life", server.output())


def _gateways_up(server: Server) -> float | None:
    """As a gateway says that answers; None: none does in time."""
    with suppress(requests.RequestException):
        text = requests.get(f"{server.http}/metrics", timeout=2).text
        up = re.findall(r"^clip_gateway_up\{.*\} (\d)", text, re.MULTILINE)
        return sum(map(float, up))
    return None


@pytest.mark.slow
def test_a_replica_that_is_stopped_is_passed_over(two_replicas: Server) -> None:
    """For a short time, which it survives; then for good, which it does not."""
    server = two_replicas
    with Load(server, timeout=PATIENCE_SECONDS) as load:
        victim = executors(server)[0]
        victim.suspend()
        time.sleep(3)
        victim.resume()
        time.sleep(1)
        assert is_alive(victim)
        with replaced(server, [victim]):
            victim.suspend()
    assert not load.problems
    assert "showed no sign of life for 4 s: restarting it" in server.output()


@pytest.mark.slow
def test_the_only_replica_hangs(start: Start) -> None:
    """Requests are refused in bounded time, on each protocol, and may be sent again."""
    spec = flow()
    spec["with"]["hang_seconds"] = 3
    server = start(spec)
    victim = executors(server)[0]
    with replaced(server, [victim]):
        victim.suspend()
        answer = requests.post(
            f"{server.http}/encode", json={"data": [{"text": "a cat"}]}, timeout=PATIENCE_SECONDS
        )
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "UNAVAILABLE"
    server.stop()


@pytest.mark.slow
def test_a_device_that_never_answers(start: Start) -> None:
    """The replica is killed; the requests of others, and the next ones, are answered."""
    spec = flow(module=STUCK_EXECUTOR, minibatch_size=4)
    spec["with"] |= {"hang_seconds": 2, "max_batch_seconds": 1}
    spec["executors"][0]["replicas"] = 2
    server = start(spec, PYTHONPATH=str(Path(__file__).parent))
    with Client(server.grpc) as client:
        for _ in range(4):  # both replicas learn how long a batch takes
            client.encode(["warm"])
        victims = executors(server)
        (server.log.parent / "stuck").touch()
        for number in range(20):
            assert client.encode([f"text {number}"], timeout=60).shape == (1, 256)
        assert eventually(lambda: len(executors(server)) == 2 and executors(server) != victims)
    assert "showed no sign of life" in server.output()
    server.stop()


@pytest.mark.slow
def test_a_busy_replica_is_not_killed(start: Start) -> None:
    """For longer than a hang may last."""
    spec = flow()
    spec["with"]["hang_seconds"] = 2
    server = start(spec)
    family = server.family()
    with Load(server, each=1), Client(server.grpc) as client:
        end = time.monotonic() + 5
        while time.monotonic() < end:
            client.encode([f"a longer text of some words, number {i}" for i in range(2000)])
    assert server.family() == family
    server.stop()


@pytest.mark.slow
def test_a_collection_survives_its_indexer(start: Start, tmp_path: Path) -> None:
    server = start(search_flow(tmp_path / "rows"))
    with Client(server.grpc) as client:
        client.index(TEXTS)
        for choose in (lambda: executors(server), lambda: gateways(server)):
            victims = choose()
            with replaced(server, victims):
                for victim in victims:
                    victim.kill()
            assert client.search(["a dog"], limit=1)[0][0].text == "a dog"
    server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("is_stopped", [False, True])
def test_the_grace_period_is_a_bound(start: Start, is_stopped: bool) -> None:
    """With more in flight than can be finished, and a replica that does not react."""
    spec = flow(module=SLOW_EXECUTOR)
    spec["with"]["grace_seconds"] = 2
    server = start(spec)
    family = server.family()
    client = Client(server.grpc)
    thread = threading.Thread(target=_encode_in_vain, args=[client])
    thread.start()
    assert eventually(lambda: server.metrics()["in_flight_items"] > 0)
    if is_stopped:
        executors(server)[0].suspend()
    server.process.send_signal(signal.SIGTERM)
    # Far less than the 30 s that the batches in flight take.
    assert server.process.wait(20) == 0
    assert not any(map(is_alive, family))
    client.close()
    thread.join()


def _encode_in_vain(client: Client) -> None:
    with suppress(Exception):
        client.encode([f"text {number}" for number in range(20_000)], batch_size=5000)


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(start: Start) -> None:
    spec = flow()
    spec["with"]["grace_seconds"] = 60
    server = start(spec)
    executors(server)[0].suspend()
    gateways(server)[0].suspend()
    server.process.send_signal(signal.SIGTERM)
    server.wait_for_output("draining in-flight requests")
    time.sleep(0.5)  # one that came sooner would count as the same
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 128 + signal.SIGTERM  # before the grace period ends


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_draining_answers_what_was_begun(start: Start, count: int) -> None:
    """Clients with a connection each, and with a new one for each request, when the terminal is
    closed, whose signal reaches the whole process group."""
    spec = flow()
    spec["with"]["gateways"] = count
    server = start(spec)
    lost: list[str] = []
    told = threading.Event()

    def send(address: str) -> None:
        while True:
            begun_before = not told.is_set()
            try:
                with Client(address, connect_timeout=0.1) as client:
                    client.encode(["a cat"], timeout=30)
            except Exception as error:
                if begun_before:
                    lost.append(f"{address}: {error}")
                return
            if not begun_before:
                return

    threads = [threading.Thread(target=send, args=[each]) for each in server.addresses * 3]
    for thread in threads:
        thread.start()
    time.sleep(2)
    told.set()
    os.killpg(server.process.pid, signal.SIGHUP)
    assert server.process.wait(PATIENCE_SECONDS) == 0
    for thread in threads:
        thread.join()
    assert not lost


@pytest.mark.slow
def test_draining_answers_images_that_are_decoded(start: Start) -> None:
    """What was begun is answered, and the command ends within the grace period and 2 s."""
    grace_seconds = 60
    spec = flow(exact=True, num_worker_preprocess=1)
    spec["with"] |= {"grace_seconds": grace_seconds, "max_wait": 0}
    server = start(spec)
    # Large to decode, but sixteen of them fit into one request.
    photo = saved(Image.linear_gradient("L").resize((3000, 2000)).convert("RGB"), "JPEG")
    rows: list[int] = []
    problems: list[str] = []

    def send(address: str) -> None:
        try:
            with Client(address) as client:
                # What follows a JPEG is not looked at, but equal images are decoded once.
                images = [photo + f"{address} {number}".encode() for number in range(16)]
                rows.append(len(client.encode(images)))
        except Exception as error:
            problems.append(f"{address}: {error}")

    threads = [threading.Thread(target=send, args=[each]) for each in server.addresses]
    for thread in threads:
        thread.start()
    assert eventually(lambda: server.metrics()["in_flight_items"] >= 48)
    told = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(2 * grace_seconds) == 0
    assert time.monotonic() - told < grace_seconds + 2
    for thread in threads:
        thread.join()
    assert not problems
    assert rows == [16, 16, 16]


def test_replicas_share_the_runtime_with_the_command(onnx_server: Server) -> None:
    """A replica that is restarted does not import it again, which takes seconds."""
    command = onnx_server.family()[0]
    assert any("onnxruntime" in each.path for each in command.memory_maps())
