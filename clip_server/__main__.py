"""`python -m clip_server [flow.yml | -i]`: runs a flow until told to end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from clip_server.errors import ConfigurationError
from clip_server.install import conflict
from clip_server.launch import flow as flows
from clip_server.launch.process_setup import (
    bypass_proxies,
    limit_malloc_arenas,
    tolerate_closed_output,
)
from clip_server.launch.start_failures import StartFailures
from clip_server.runtimes import install_options

# Replicas that were killed never confirm their end; waiting longer for them helps nobody.
_END_TIMEOUT_MS = 15_000
_WATCH_SECONDS = 0.5
# What Jina and gRPC read from the environment.
_DEFAULTS = {
    "JINA_LOG_LEVEL": "ERROR",
    "GRPC_VERBOSITY": "ERROR",
    # Executors listen below the ports that systems give to outgoing connections: one of those
    # could take a port between Jina's choice of it and the executor's start.
    "JINA_RANDOM_PORT_MIN": "16384",
    "JINA_RANDOM_PORT_MAX": "32767",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. The exit status: 0 ended as told, 1 could not start, 2 misused."""
    limit_malloc_arenas()
    bypass_proxies()
    started = time.perf_counter()
    try:
        options = _parse(arguments)
        if advice := conflict():
            _warn(advice)
        spec = flows.load(flows.read(options.flow))
        _import_jina(without_torch=flows.has_only_encoders(spec))
        return _run(flows.prepare(flows.expand(spec), options.host, options.port), started)
    except ConfigurationError as error:
        _warn(str(error))
        return 1
    except ModuleNotFoundError as error:
        _warn(f"the server needs the package {error.name}: {install_options()}")
        return 1
    except KeyboardInterrupt:
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    ports = ", ".join(f"{port} for {name}" for name, port in flows.DEFAULT_PORTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m clip_server",
        description="Serves CLIP embeddings of texts and images.",
        epilog="The environment variable CLIP_MODEL=NAME sets the model of a built-in flow; "
        "CLIP_MODEL=embedded needs no download, and `python -m clip_server.models` lists the "
        f"others. The default ports are {ports}.",
    )
    parser.add_argument(
        "flow",
        nargs="?",
        help=f"a YAML file, or one of the built-in {', '.join(flows.built_in())} "
        f"(default: {flows.DEFAULT_FLOW})",
    )
    parser.add_argument("-i", dest="stdin", action="store_true", help="read the flow from stdin")
    parser.add_argument("--host", help="listen on this address, whatever the flow says")
    parser.add_argument(
        "--port",
        nargs="+",
        action="extend",
        default=[],
        help="listen on these ports, whatever the flow says: one for each protocol, or one that "
        "is the first of consecutive ports; 0: any free port",
    )
    options = parser.parse_args(arguments)
    # In `--port 8000 my.yml` the flow is not one more port.
    if options.port and options.flow is None and not options.port[-1].isdecimal():
        options.flow = options.port.pop()
    if not all(map(_is_port, options.port)):
        parser.error(f"--port: {' '.join(options.port)}: a port is a number from 0 to 65535")
    options.port = [int(port) for port in options.port]
    if options.stdin and options.flow is not None:
        parser.error(f"-i reads the flow from stdin: give either it or {options.flow}")
    options.flow = "-" if options.stdin else options.flow or flows.DEFAULT_FLOW
    return options


def _is_port(word: str) -> bool:
    return word.isdecimal() and int(word) <= 65535


def _import_jina(without_torch: bool) -> None:
    """Imports Jina, and keeps it quiet."""
    warnings.filterwarnings("ignore", message=".*pkg_resources is deprecated.*")
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    # docarray imports torch wherever it is installed, which takes more than a second, in order
    # to offer torch tensors in documents. Ours have none.
    hidden = without_torch and "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    # Jina makes folders in the home directory, where there may be none to write to. It makes them
    # again where it needs them.
    make_folder = Path.mkdir
    Path.mkdir = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        import jina.helper
        import jina.orchestrate.flow.base
        import jina.orchestrate.orchestrator as orchestrator
        import jina.serve.executors

        from clip_server.rpc.documents import UntypedDoc
    finally:
        Path.mkdir = make_folder  # type: ignore[method-assign]
        if hidden:
            del sys.modules["torch"]
    # Jina looks for free ports on IPv4 alone.
    jina.helper._single_port_free = _is_free
    # Jina asks three services on the internet for this machine's public address.
    orchestrator.get_public_ip = lambda *_, **__: None
    # Executors without annotations take the encoder's documents as they are.
    jina.serve.executors.LegacyDocumentJina = UntypedDoc
    # Its welcome names addresses that are not ours, and pages we do not serve.
    jina.orchestrate.flow.base.print = lambda *_: None
    # The processes of the flow inherit it. It comes with Jina, though not on Windows, and serves
    # a fifth to a third more requests.
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def _is_free(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return True
    return False


def _run(spec: dict[str, Any], started: float) -> int:
    import jina.serve.executors.run as pods
    from jina import Flow

    stop = threading.Event()
    running = False

    def end(*_: object) -> None:
        stop.set()
        if not running:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    for executor in spec["executors"]:
        executor.setdefault("timeout_ctrl", _END_TIMEOUT_MS)
    failures = StartFailures()
    pods.AsyncNewLoopRuntime = failures.watch(pods.AsyncNewLoopRuntime)
    try:
        flow = Flow.load_config(spec)
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"the flow cannot be loaded: {_in_one_line(error)}") from None
    # It would say that the flow was aborted, and not why.
    flow.logger.logger.setLevel(logging.CRITICAL + 1)
    flow._wait_until_all_ready = _noticing_deaths(flow, failures, flow._wait_until_all_ready)
    try:
        flow.start()
    except KeyboardInterrupt:
        flow.close()
        return 130
    except Exception as error:
        flow.close()
        why = "; ".join(failures.reasons()) or _in_one_line(error)
        raise ConfigurationError(f"the server could not start: {why}") from None
    running = True
    try:
        _welcome(spec, flow, time.perf_counter() - started)
        status = _watch(flow, stop)
        print("clip_server: finishing what is under way", flush=True)
    finally:
        # The gateway first, while the encoders can still answer what it has taken.
        flow._deployment_nodes["gateway"].close()
        flow.close()
    return status


def _noticing_deaths(
    flow: Any, failures: StartFailures, wait: Callable[[], None]
) -> Callable[[], None]:
    """`wait`, for the flow's processes to start, but not for one that died with no word of it,
    for which Jina waits for ever."""

    def notice(over: threading.Event) -> None:
        while not over.wait(_WATCH_SECONDS):
            for pod in [pod for each in flow._deployment_nodes.values() for pod in _pods(each)]:
                if pod.worker.exitcode is not None and not pod.is_shutdown.is_set():
                    failures.add(_end_of(pod))
                    pod.is_shutdown.set()

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


def _end_of(pod: Any) -> str:
    """What became of a process that nobody told to end."""
    code = pod.worker.exitcode
    if code is None or code >= 0:
        return f"{pod.name} ended by itself (exit code {code})"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    memory = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
    return f"{pod.name} was killed ({name}){memory}"


def _watch(flow: Any, stop: threading.Event) -> int:
    """Waits until told to end (0), or until what is left of the flow cannot serve (1)."""
    dead: set[str] = set()
    told = False
    while not told:
        told = stop.wait(_WATCH_SECONDS)
        for deployment in flow._deployment_nodes.values():
            pods = list(_pods(deployment))
            for pod in pods:
                if not pod.worker.is_alive() and pod.name not in dead:
                    dead.add(pod.name)
                    # Jina would wait for its word when the flow ends.
                    pod.is_shutdown.set()
                    _warn(_end_of(pod))
            if pods and all(pod.name in dead for pod in pods):
                return 1
    return 0


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _warn(message: str) -> None:
    print(f"clip_server: {message}", file=sys.stderr, flush=True)


def _pods(deployment: Any) -> Iterator[Any]:
    """Jina's handles of a deployment's processes."""
    if deployment.gateway_pod is not None:
        yield deployment.gateway_pod
    for replicas in deployment.shards.values():
        yield from replicas._pods


def _welcome(spec: dict[str, Any], flow: Any, seconds: float) -> None:
    lines = [f"clip_server: ready in {seconds:.1f} s"]
    lines += [*asyncio.run(_describe(flow)), *flows.addresses(spec)]
    if spec["gateway"]["host"] in flows.ALL_INTERFACES:
        lines.append("open to every network this machine is on; --host 127.0.0.1 closes it")
    print("\n  ".join(lines), flush=True)


async def _describe(flow: Any) -> list[str]:
    """A line for each executor that encodes or holds a collection."""
    from clip_server.gateway.replicas import replica_pools

    deployments = json.loads(flow._deployment_nodes["gateway"].args.deployments_addresses)
    lines = []
    for pool in replica_pools(deployments, timeout=10.0):
        info = await pool.find_info(asyncio.Event())
        if info and info.HasField("collection"):
            held = info.collection
            lines.append(
                f"{held.rows:,} rows in the collection, {held.index_method}, {held.metric} "
                f"({held.engine})"
            )
        elif info:
            lines.append(
                f"{info.model}, {info.dim} dimensions, on {info.runtime} "
                f"({info.device}, {info.dtype})"
            )
        await pool.close()
    return lines


if __name__ == "__main__":
    tolerate_closed_output()
    sys.exit(main())
