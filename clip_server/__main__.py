"""`python -m clip_server [flow.yml | -i]`: runs a flow until told to end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clip_server import flow as flows
from clip_server.errors import ConfigurationError
from clip_server.install import runtimes_hint
from clip_server.process import bypass_proxies, share_heaps, tolerate_closed_output

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
    options = _parser().parse_args(arguments)
    share_heaps()
    bypass_proxies()
    started = time.perf_counter()
    try:
        spec = flows.load(sys.stdin.read() if options.stdin else flows.read(options.flow))
        _import_jina(without_torch=flows.has_only_encoders(spec))
        return _run(flows.prepare(flows.expand(spec), options.host), started)
    except ConfigurationError as error:
        _warn(str(error))
        return 1
    except ModuleNotFoundError as error:
        _warn(f"the server needs the package {error.name}: {runtimes_hint()}")
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clip_server",
        description="Serves CLIP embeddings of texts and images.",
        epilog="CLIP_MODEL=NAME in the environment names the model of a built-in flow; "
        "CLIP_MODEL=embedded needs no download.",
    )
    parser.add_argument(
        "flow",
        nargs="?",
        default=flows.DEFAULT_FLOW,
        help="a YAML file, or one of the built-in torch-flow.yml (default) and onnx-flow.yml",
    )
    parser.add_argument("-i", dest="stdin", action="store_true", help="read the flow from stdin")
    parser.add_argument("--host", help="listen on this address, whatever the flow says")
    return parser


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
        import jina.orchestrate.flow.base
        import jina.orchestrate.orchestrator as orchestrator
    finally:
        Path.mkdir = make_folder  # type: ignore[method-assign]
        if hidden:
            del sys.modules["torch"]
    # Jina asks three services on the internet for this machine's public address.
    orchestrator.get_public_ip = lambda *_, **__: None
    # Its welcome names addresses that are not ours, and pages we do not serve.
    jina.orchestrate.flow.base.print = lambda *_: None
    # The processes of the flow inherit it. It comes with Jina, though not on Windows, and serves
    # a fifth to a third more requests.
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def _run(spec: dict[str, Any], started: float) -> int:
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
    flow = Flow.load_config(spec)
    try:
        flow.start()
    except KeyboardInterrupt:
        flow.close()
        return 130
    except Exception as error:
        flow.close()
        why = str(error) or "what stands above says why"
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
                    _warn(f"{pod.name} ended by itself (exit code {pod.worker.exitcode})")
            if pods and all(pod.name in dead for pod in pods):
                return 1
    return 0


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
    if spec["gateway"]["host"] == flows.ALL_INTERFACES:
        lines.append("open to every network this machine is on; --host 127.0.0.1 closes it")
    print("\n  ".join(lines), flush=True)


async def _describe(flow: Any) -> list[str]:
    """What encodes, by its own word."""
    from clip_client.proto import clip_pb2 as pb
    from clip_server.gateway.encoder import Encoder, replica_addresses

    deployments = json.loads(flow._deployment_nodes["gateway"].args.deployments_addresses)
    encoder = Encoder(replica_addresses(deployments), timeout=10.0)
    try:
        await encoder.find(asyncio.Event())
        info = (await encoder.call(pb.Request(info=pb.InfoRequest()))).info
    except ConfigurationError:
        return []
    finally:
        await encoder.close()
    return [f"{info.model}, {info.dim} dimensions, on {info.runtime} ({info.device}, {info.dtype})"]


if __name__ == "__main__":
    tolerate_closed_output()
    sys.exit(main())
