"""Runs a prepared flow: starts its processes, reports those that die, stops them in order."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from clip_server.commands import console
from clip_server.errors import ConfigurationError
from clip_server.gateway.replicas import ReplicaPool, replica_pools
from clip_server.launch import jina_internals
from clip_server.launch.flow import ALL_INTERFACES, addresses, needs_key
from clip_server.launch.jina_internals import FlowProcess
from clip_server.launch.start_failures import StartFailures

# Time for the processes to exit. One that was killed never confirms it.
_SHUTDOWN_TIMEOUT_MS = 15_000
_WATCH_SECONDS = 0.5
_INFO_TIMEOUT_SECONDS = 10.0


class _StopSignal:
    """Waits for SIGINT or SIGTERM, which raise KeyboardInterrupt until the server is ready."""

    def __init__(self) -> None:
        self._received = threading.Event()
        self.is_ready = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, *_: object) -> None:
        self._received.set()
        if not self.is_ready:
            raise KeyboardInterrupt

    def wait(self, seconds: float) -> bool:
        """Whether a signal came, within so many seconds."""
        return self._received.wait(seconds)


def run(spec: dict[str, Any], started: float) -> int:
    """Serves a flow until SIGINT or SIGTERM. The exit status: 0 stopped as told, 1 the gateway
    or every replica of an executor died, 130 interrupted while starting.

    started: when the command began, in seconds of `time.perf_counter`.

    Raises:
        ConfigurationError: a process could not start.
    """
    from jina import Flow

    stop = _StopSignal()
    for executor in spec["executors"]:
        executor.setdefault("timeout_ctrl", _SHUTDOWN_TIMEOUT_MS)
    failures = StartFailures()
    jina_internals.wrap_start(failures.watch)
    try:
        flow = Flow.load_config(spec)
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"the flow cannot be loaded: {_in_one_line(error)}") from None
    jina_internals.wrap_wait(flow, lambda wait: _noticing_deaths(flow, failures, wait))
    try:
        flow.start()
    except KeyboardInterrupt:
        flow.close()
        return 130
    except Exception as error:
        flow.close()
        why = "; ".join(failures.reasons()) or _in_one_line(error)
        raise ConfigurationError(f"the server could not start: {why}") from None
    stop.is_ready = True
    try:
        _print_banner(spec, flow, time.perf_counter() - started)
        status = _watch(flow, stop)
        print("clip_server: shutting down: draining in-flight requests", flush=True)
    finally:
        jina_internals.close_gateway(flow)
        flow.close()
    return status


def _noticing_deaths(
    flow: Any, failures: StartFailures, wait: Callable[[], None]
) -> Callable[[], None]:
    """`wait` for the flow's processes to become ready, which ends if one of them dies."""

    def notice(over: threading.Event) -> None:
        while not over.wait(_WATCH_SECONDS):
            for processes in jina_internals.flow_processes(flow).values():
                for process in processes:
                    if process.exit_code is not None and process.is_expected_to_run:
                        failures.add(_cause_of_death(process))
                        process.give_up()

    def waiting() -> None:
        over = threading.Event()
        # Not before now: a process with several threads should not be forked.
        watcher = threading.Thread(target=notice, args=(over,), daemon=True)
        watcher.start()
        try:
            wait()
        finally:
            over.set()
            watcher.join()

    return waiting


def _watch(flow: Any, stop: _StopSignal) -> int:
    """Waits for a signal (0), or until the processes that are left cannot serve (1)."""
    deployments = jina_internals.flow_processes(flow).values()
    dead: set[str] = set()
    stopped = False
    while not stopped:
        # Looks once more after the signal: Jina would wait for a process that has just died.
        stopped = stop.wait(_WATCH_SECONDS)
        for processes in deployments:
            for process in processes:
                if process.exit_code is not None and process.name not in dead:
                    dead.add(process.name)
                    process.give_up()
                    console.log(f"clip_server: {_cause_of_death(process)}")
            if processes and all(process.name in dead for process in processes):
                return 1
    return 0


def _cause_of_death(process: FlowProcess) -> str:
    code = process.exit_code
    if code is None or code >= 0:
        return f"{process.name} exited by itself (exit code {code})"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    memory = ", perhaps because memory ran out" if -code == signal.SIGKILL else ""
    return f"{process.name} was killed ({name}){memory}"


def _print_banner(spec: dict[str, Any], flow: Any, seconds: float) -> None:
    lines = [f"clip_server: ready in {seconds:.1f} s"]
    lines += [*asyncio.run(_describe_executors(flow)), *addresses(spec)]
    if spec["gateway"]["host"] in ALL_INTERFACES and not needs_key(spec):
        lines.append(
            "WARNING: listening on all network interfaces, and callers need no key; set "
            "CLIP_AUTH_TOKEN, or use --host 127.0.0.1 to restrict it to this machine"
        )
    print("\n  ".join(lines), flush=True)


async def _describe_executors(flow: Any) -> list[str]:
    """A line for each executor that encodes or holds a collection."""
    pools = replica_pools(jina_internals.executor_addresses(flow), _INFO_TIMEOUT_SECONDS)
    described = [await _describe(pool) for pool in pools]
    for pool in pools:
        await pool.close()
    return [line for line in described if line]


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
