"""The leg `faults`: what clients see while processes die, hang or end, and while it is too much."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import aiohttp
import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks import workload
from benchmarks.options import Options
from benchmarks.peers import EMBEDDED_REPLICAS, SCHEMES, Peers, Started
from benchmarks.processes import Server
from benchmarks.report import Figures, Goal, Leg
from clip_client import Client
from clip_client.address import Address
from clip_client.errors import ClipError
from clip_client.proto import clip_pb2 as pb
from clip_client.tls import Trust
from clip_client.transports import get_transport_factory

Item: TypeAlias = str | bytes
Fault: TypeAlias = Callable[[Server, int], Coroutine[Any, Any, None]]

CLIENTS_OF_EACH_PROTOCOL = 3
TIMEOUT_SECONDS = 60.0
# Under load before and after a fault; and how long it may take to recover.
BEFORE_SECONDS, AFTER_SECONDS, RECOVERY_SECONDS = 3.0, 2.0, 60.0
STOPPED_SECONDS = 10.0
REPLICAS = 2
# Of the overload: texts of a request, how long the capacity is measured, how many times as much is
# sent, and for how long. Requests are large, so that sending them takes little of the cores, which
# the server is on as well.
BATCH, CAPACITY_SECONDS, TIMES, OVERLOAD_SECONDS = 512, 3.0, 10, 5.0
PHOTOS_OF_A_REQUEST = 8
GRACE_SECONDS = 8.0
# Rounding differs with the other texts of a batch.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Answered:
    """One request: when it began and ended, and how."""

    begun: float
    ended: float
    error: str = ""
    is_wrong: bool = False

    @property
    def seconds(self) -> float:
        return self.ended - self.begun


@dataclass
class Load:
    """Clients that send one request after the other, each with the client's default retry.

    requests: what is sent, in turn, with the embeddings that are right.
    """

    addresses: Iterable[str]
    requests: list[tuple[list[Item], NDArray[np.float32]]]
    answered: list[Answered] = field(default_factory=list)
    begun: dict[int, float] = field(default_factory=dict)

    def start(self) -> list[asyncio.Task[None]]:
        addresses = [*self.addresses] * CLIENTS_OF_EACH_PROTOCOL
        return [
            asyncio.create_task(self._send(number, each)) for number, each in enumerate(addresses)
        ]

    async def _send(self, number: int, address: str) -> None:
        async with Client(address) as client:
            for items, expected in itertools.cycle(self.requests):
                begun = self.begun[number] = time.monotonic()
                error, is_wrong = "", False
                try:
                    found = await client.aencode(items, timeout=TIMEOUT_SECONDS)
                    is_wrong = not np.allclose(found, expected, atol=TOLERANCE)
                except ClipError as failure:
                    error = str(failure)
                self.answered.append(Answered(begun, time.monotonic(), error, is_wrong))
                del self.begun[number]


def faults(peers: Peers, options: Options) -> Leg:
    """Each fault in turn, on two replicas of the embedded model."""
    del options
    rows, goals = [], []
    for what, fault in _FAULTS.items():
        row = asyncio.run(_under_fault(what, peers.started(EMBEDDED_REPLICAS), fault))
        rows.append(row)
        goals.append(Goal(f"{what}: seconds to full strength", "<=", 30, row.median(_RECOVERY)))
    for what, request in _ended_requests().items():
        started = peers.another_server(EMBEDDED_REPLICAS)
        row = asyncio.run(_ended(what, started, request))
        rows.append(row)
        goals.append(Goal(f"{what}: seconds", "<=", GRACE_SECONDS + 2, row.median(_RECOVERY)))
    for row in rows:
        for column in (_LOST, _WRONG):
            goals.append(Goal(f"{row.what}: {column}", "<=", 0, row.median(column)))
    for protocol in SCHEMES:
        address = peers.started(EMBEDDED_REPLICAS).addresses[protocol]
        row = asyncio.run(_overloaded(protocol, address))
        rows.append(row)
        goals.append(Goal(f"{row.what}: median refusal", "<=", 0.25, row.median(_REFUSED)))
        goals.append(Goal(f"{row.what}: admitted", "<=", 3, row.median(_ADMITTED)))
    return Leg("fault", rows, goals)


# --- The table ---

_BEGUN, _IN_FLIGHT, _LOST, _WRONG = "requests", "in flight", "lost", "wrong"
_SLOWEST, _RECOVERY = "slowest, s", "full strength or end, s"
_REFUSED, _ADMITTED = "refused, median s", "admitted, p99 s"


def _row(what: str, answered: list[Answered], in_flight: int, recovery: float) -> Figures:
    lost = [each for each in answered if each.error]
    for message in sorted({each.error for each in lost}):
        print(f"  {what}: lost: {message}", flush=True)
    figures = {
        _BEGUN: len(answered),
        _IN_FLIGHT: in_flight,
        _LOST: len(lost),
        _WRONG: sum(each.is_wrong for each in answered),
        _SLOWEST: max(each.seconds for each in answered),
        _RECOVERY: recovery,
    }
    print(f"  {what}: {figures}", flush=True)
    return Figures(what, {column: [float(value)] for column, value in figures.items()})


# --- Processes that die or hang ---


def _replicas(server: Server, gateway_port: int) -> list[psutil.Process]:
    found = server.listeners()
    gateway = found[gateway_port].pid
    return [each for each in found.values() if each.pid != gateway]


async def _kill_replica(server: Server, port: int) -> None:
    _replicas(server, port)[0].kill()


async def _kill_replicas(server: Server, port: int) -> None:
    for each in _replicas(server, port):
        each.kill()


async def _kill_gateway(server: Server, port: int) -> None:
    server.listeners()[port].kill()


async def _stop_for_a_while(server: Server, port: int) -> None:
    stopped = _replicas(server, port)[0]
    stopped.suspend()
    await asyncio.sleep(STOPPED_SECONDS)
    stopped.resume()


async def _stop_for_good(server: Server, port: int) -> None:
    _replicas(server, port)[0].suspend()


_FAULTS: dict[str, Fault] = {
    "a replica killed": _kill_replica,
    "all replicas killed": _kill_replicas,
    "the gateway killed": _kill_gateway,
    f"a replica stopped for {STOPPED_SECONDS:g} s": _stop_for_a_while,
    "a replica stopped for good": _stop_for_good,
}


async def _under_fault(what: str, started: Started, fault: Fault) -> Figures:
    addresses = started.addresses
    load = Load(addresses.values(), await _with_embeddings(addresses["grpc"], _texts()))
    clients = load.start()
    await asyncio.sleep(BEFORE_SECONDS)
    in_flight = len(load.begun)
    await fault(started.server, Address.parse(addresses["grpc"]).port)
    recovery = await _recovered(addresses["http"])
    await asyncio.sleep(AFTER_SECONDS)
    await _end(clients)
    return _row(what, load.answered, in_flight, recovery)


async def _recovered(address: str) -> float:
    """Seconds until the server says, by its metrics, that all replicas answer."""
    begun = time.monotonic()
    await asyncio.sleep(0.1)  # for a process that is killed to be gone
    timeout = aiohttp.ClientTimeout(total=2)
    while (waited := time.monotonic() - begun) < RECOVERY_SECONDS:
        with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):
            async with aiohttp.ClientSession(timeout=timeout) as session:
                metrics = await (await session.get(f"{address}/metrics")).text()
            lines = [each for each in metrics.splitlines() if each.startswith("clip_replica_up{")]
            if [each.split()[-1] for each in lines] == ["1.0"] * REPLICAS:
                return time.monotonic() - begun
        await asyncio.sleep(0.1)
    return waited


async def _end(clients: list[asyncio.Task[None]]) -> None:
    for each in clients:
        each.cancel()
    await asyncio.gather(*clients, return_exceptions=True)


def _texts() -> list[list[Item]]:
    return [[f"a drawing of {number} cats"] for number in range(64)]


async def _with_embeddings(
    address: str, requests: list[list[Item]]
) -> list[tuple[list[Item], NDArray[np.float32]]]:
    async with Client(address) as client:
        return [(items, await client.aencode(items)) for items in requests]


# --- The end of the server ---


def _ended_requests() -> dict[str, list[list[Item]]]:
    photos = [file.read_bytes() for file in sorted(workload.photos().glob("*.jpg"))]
    parts = range(0, len(photos), PHOTOS_OF_A_REQUEST)
    return {
        "SIGTERM, texts": _texts(),
        "SIGTERM, photos": [[*photos[first : first + PHOTOS_OF_A_REQUEST]] for first in parts],
    }


async def _ended(what: str, started: Started, requests: list[list[Item]]) -> Figures:
    """Requests that were begun before SIGTERM, and the seconds until the server has ended."""
    load = Load(
        started.addresses.values(), await _with_embeddings(started.addresses["grpc"], requests)
    )
    clients = load.start()
    await asyncio.sleep(BEFORE_SECONDS)
    in_flight, told = len(load.begun), time.monotonic()
    started.server.send_signal(signal.SIGTERM)
    while started.server.is_running() and time.monotonic() < told + RECOVERY_SECONDS:
        await asyncio.sleep(0.02)
    ended = time.monotonic() - told
    await asyncio.sleep(0.5)  # for the last answers to be read
    begun_before = [each for each in load.answered if each.begun < told]
    unanswered = [each for each in load.begun.values() if each < told]
    await _end(clients)
    begun_before += [Answered(each, time.monotonic(), "no answer") for each in unanswered]
    return _row(what, begun_before, in_flight, ended)


# --- Too much ---


async def _overloaded(protocol: str, address: str) -> Figures:
    """Requests at ten times the rate that the server answers, none of which is tried again."""
    parsed = Address.parse(address)
    transport = get_transport_factory(parsed.scheme)(parsed, {}, Trust())
    numbers = itertools.count()

    async def send() -> tuple[bool, float]:
        """Whether a request was answered, not refused; and its seconds."""
        texts = (f"text {next(numbers)}" for _ in range(BATCH))
        items = [pb.Item(text=text) for text in texts]
        begun = time.monotonic()
        response = await transport.send(pb.Request(encode=pb.EncodeRequest(items=items)))
        return not response.HasField("error"), time.monotonic() - begun

    async def repeat(until: float) -> int:
        count = 0
        while time.monotonic() < until:
            count += (await send())[0]
        return count

    until = time.monotonic() + CAPACITY_SECONDS
    rate = sum(await asyncio.gather(*(repeat(until) for _ in range(8)))) / CAPACITY_SECONDS
    tasks = []
    for due in _ticks(TIMES * rate, OVERLOAD_SECONDS):
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(send()))
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    await transport.close()
    found = [each for each in outcomes if not isinstance(each, BaseException)]
    refused = [seconds for is_answered, seconds in found if not is_answered]
    admitted = [seconds for is_answered, seconds in found if is_answered]
    figures = {
        _BEGUN: float(len(outcomes)),
        _LOST: float(len(outcomes) - len(found)),
        _REFUSED: float(np.median(refused)),
        _ADMITTED: float(np.percentile(admitted, 99)),
    }
    what = f"{TIMES} times overloaded, {protocol}"
    print(f"  {what}: {figures}", flush=True)
    return Figures(what, {column: [value] for column, value in figures.items()})


def _ticks(rate: float, seconds: float) -> Iterator[float]:
    """The times at which requests of a rate are due."""
    begun = time.monotonic()
    return (begun + number / rate for number in range(int(rate * seconds)))
