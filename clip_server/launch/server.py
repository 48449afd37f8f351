"""Runs a prepared flow: starts its processes, has them supervised, stops them in order."""

from __future__ import annotations

import asyncio
import logging
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from clip_server import logs
from clip_server.errors import ConfigurationError
from clip_server.gateway.replicas import ReplicaPool, replica_pools
from clip_server.launch import gateway_group, heartbeats, jina_internals, ports
from clip_server.launch.flow import addresses, needs_key
from clip_server.launch.flow_gateway import ALL_INTERFACES
from clip_server.launch.process_setup import unmap_read_pages
from clip_server.launch.start_failures import StartFailures
from clip_server.launch.supervision import Supervision, Supervisor, cause_of_death, end

_WATCH_SECONDS = 0.05
_INFO_TIMEOUT_SECONDS = 10.0
# For the processes of a flow that could not start to end by themselves.
_ABORT_SECONDS = 1.0
# Signals that come so soon after the first are the same one, sent to the process and to its group.
_SAME_SIGNAL_SECONDS = 0.25
# Of the address of a Unix socket, for the path of the folder.
_LONGEST_FOLDER = 90


class _StopSignal:
    """Waits for a signal to end, which raises KeyboardInterrupt until the server is ready."""

    def __init__(self) -> None:
        self._received = threading.Event()
        self._signals: list[int] = []
        self._first = -math.inf
        self.is_ready = False
        numbers = _stop_signals()
        for number in numbers:
            signal.signal(number, self._receive)
        # A process that is only being forked has no other handler yet.
        os.register_at_fork(after_in_child=lambda: _handle_by_default(numbers))

    def _receive(self, number: int, _: object) -> None:
        now = time.monotonic()
        if now < self._first + _SAME_SIGNAL_SECONDS:
            return
        if not self._signals:
            self._first = now
        self._signals.append(number)
        self._received.set()
        if not self.is_ready:
            raise KeyboardInterrupt

    def wait(self, seconds: float) -> bool:
        """Whether a signal came, within so many seconds."""
        return self._received.wait(seconds)

    def is_repeated(self) -> bool:
        """Whether a second signal came."""
        return len(self._signals) > 1

    @property
    def forced_status(self) -> int:
        """The exit status of a command that was ended by its second signal."""
        return 128 + self._signals[1]


def _stop_signals() -> list[int]:
    """SIGINT, SIGTERM, and SIGHUP, which a terminal sends when it is closed, unless nohup has
    it ignored."""
    hangup: int | None = getattr(signal, "SIGHUP", None)  # not on Windows
    if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN:
        return [signal.SIGINT, signal.SIGTERM]
    return [signal.SIGINT, signal.SIGTERM, hangup]


def _handle_by_default(numbers: Iterable[int]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)


def run(spec: dict[str, Any], supervision: Supervision, started: float) -> int:
    """Serves a flow until a signal ends it. The exit status: 0 stopped as told, 1 every gateway
    or every replica of an executor stays down, 128 and the number of the signal if it was
    interrupted while starting, or by a second signal while stopping.

    started: when the command began, in seconds of `time.perf_counter`.

    Raises:
        ConfigurationError: a process could not start.
    """
    with _gateways_sharing(spec, supervision.gateways):
        return _serve(spec, supervision, started)


@contextmanager
def _gateways_sharing(spec: dict[str, Any], gateways: int) -> Iterator[None]:
    """Prepares what several gateways share: ports, counts, and a folder for their sockets."""
    if gateways == 1:
        yield
        return
    ports.reserve(spec["gateway"]["host"], spec["gateway"]["port"])
    with tempfile.TemporaryDirectory(prefix="clip-server-gateways-") as folder:
        if len(os.fsencode(folder)) > _LONGEST_FOLDER:
            raise ConfigurationError(
                f"gateways: the path of {tempfile.gettempdir()} is too long for the addresses of "
                "sockets: set TMPDIR to a shorter one"
            )
        gateway_group.form(gateways, len(spec["executors"]), Path(folder))
        yield


def _serve(spec: dict[str, Any], supervision: Supervision, started: float) -> int:
    from jina import Flow

    stop = _StopSignal()
    failures = StartFailures()
    jina_internals.wrap_start(failures.watch)
    try:
        flow = Flow.load_config(spec)
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"the flow cannot be loaded: {_in_one_line(error)}") from None
    heartbeats.share(supervision.max_batch_seconds)

    def wait() -> None:
        jina_internals.start_further_gateways(flow, supervision.gateways - 1)
        _wait_until_ready(flow)

    jina_internals.replace_wait(flow, wait)
    try:
        flow.start()
    except KeyboardInterrupt:
        _abort(flow)
        return 130
    except Exception as error:
        _abort(flow)
        why = "; ".join(failures.reasons()) or _in_one_line(error)
        raise ConfigurationError(f"the server could not start: {why}") from None
    stop.is_ready = True
    supervisor = Supervisor(jina_internals.flow_processes(flow), supervision)
    try:
        _print_banner(spec, flow, supervision.gateways, time.perf_counter() - started)
        unmap_read_pages()  # it only supervises from now on
        status = supervisor.watch(stop.wait, failures)
        logs.announce("shutting down: draining in-flight requests", file=sys.stdout)
    finally:
        supervisor.stop(stop.is_repeated)
    return stop.forced_status if stop.is_repeated() else status


def _wait_until_ready(flow: Any) -> None:
    """Waits for a flow's processes. Raises ConfigurationError if one dies or takes too long."""
    started = time.monotonic()
    waiting = [each for group in jina_internals.flow_processes(flow).values() for each in group]
    while waiting := [each for each in waiting if not each.is_ready]:
        dead = [cause_of_death(each) for each in waiting if each.exit_code is not None]
        if dead:
            raise ConfigurationError("; ".join(dead))
        for each in waiting:
            if time.monotonic() - started > each.ready_seconds:
                raise ConfigurationError(
                    f"{each.name} was not ready within {each.ready_seconds:g} s (timeout_ready)"
                )
        time.sleep(_WATCH_SECONDS)


def _abort(flow: Any) -> None:
    processes = [each for group in jina_internals.flow_processes(flow).values() for each in group]
    end(processes, time.monotonic() + _ABORT_SECONDS)


def _print_banner(spec: dict[str, Any], flow: Any, gateways: int, seconds: float) -> None:
    details = {
        "executors": _described(jina_internals.executor_addresses(flow)),
        "addresses": addresses(spec),
    }
    if gateways > 1:
        details["gateways"] = [f"{gateways} gateways share these ports"]
    if spec["gateway"]["host"] in ALL_INTERFACES and not needs_key(spec):
        logs.announce(
            "listening on all network interfaces, and callers need no key; set CLIP_AUTH_TOKEN, or "
            "use --host 127.0.0.1 to restrict it to this machine",
            logging.WARNING,
        )
    logs.announce(f"ready in {seconds:.1f} s", details=details, file=sys.stdout)


def _described(deployments: dict[str, Any]) -> list[str]:
    """A line for each executor that encodes or holds a collection.

    A process of its own asks them: one that uses gRPC, as this one would, cannot be forked again.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_send_descriptions, args=(deployments, sender))
    process.start()
    sender.close()
    try:
        lines: list[str] = receiver.recv()
    except EOFError:  # it was killed
        lines = []
    process.join()
    return lines


def _send_descriptions(deployments: dict[str, Any], sender: Connection) -> None:
    async def describe() -> list[str]:
        pools = replica_pools(deployments, _INFO_TIMEOUT_SECONDS)
        described = [await _describe(pool) for pool in pools]
        for pool in pools:
            await pool.close()
        return [line for line in described if line]

    sender.send(asyncio.run(describe()))


async def _describe(pool: ReplicaPool) -> str:
    """One executor, as it reports itself; empty if it does neither."""
    info = await pool.find_info(asyncio.Event())
    if info is None:
        return ""
    if info.HasField("collection"):
        held = info.collection
        return (
            f"{held.rows:,} rows in the collection, {held.index_method}, {held.metric} "
            f"({held.engine})"
        )
    replicas = f"{len(pool)} replicas" if len(pool) > 1 else "1 replica"
    return (
        f"{info.model}, {info.dim} dimensions, on {info.runtime} ({info.device}, {info.dtype}), "
        f"{replicas}"
    )


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
