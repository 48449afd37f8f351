"""Every internal of Jina that this server replaces or uses, with the reason for each.

Jina 3.34 is the last of its line, so its faults stay. tests/test_jina_internals.py shows each of
them in unpatched Jina: a test that fails there names a patch that is no longer needed.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from clip_server import logs
from clip_server.errors import RequestError
from clip_server.launch import gateway_group, heartbeats, ports
from clip_server.launch.tracing import Trace, span

if TYPE_CHECKING:
    import grpc

# Given an endpoint, its number of documents and the traceparent of the caller: the context of a
# call that is recorded.
TimeCall: TypeAlias = Callable[[str, int, str], AbstractContextManager[Trace | None]]

_ENVIRONMENT = {
    "JINA_LOG_LEVEL": "ERROR",
    "GRPC_VERBOSITY": "ERROR",
    # At shutdown each process sends its last traces and metrics in four attempts, one after the
    # other: by default 10 s each where no collector answers.
    "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
    # Jina names the collector without a scheme, for which the exporter takes TLS.
    "OTEL_EXPORTER_OTLP_INSECURE": "true",
    # By default Jina chooses executors' ports among those that systems give to outgoing
    # connections, one of which could take a port before the executor listens on it.
    "JINA_RANDOM_PORT_MIN": str(ports.CHOSEN_FROM.start),
    "JINA_RANDOM_PORT_MAX": str(ports.CHOSEN_FROM.stop - 1),
}

# Keys of the gateway that every flow has, unless it names another one.
GATEWAY_DEFAULTS: Mapping[str, Any] = {
    "uses": "ClipGateway",
    "py_modules": ["clip_server.gateway"],
    # Jina would retry a call that was only slow.
    "retries": 0,
}


# --- Importing ---


def import_jina(*, without_torch: bool = False) -> None:
    """Imports Jina with what concerns the process as a whole patched. May be called again."""
    warnings.filterwarnings("ignore", message=".*pkg_resources is deprecated.*")
    # gRPC writes lines of its own, in no format of ours.
    if logs.is_json():
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with _no_folders_in_home(), _hidden_torch(without_torch):
        import jina.helper
        import jina.orchestrate.flow.base
        import jina.orchestrate.orchestrator as orchestrator
        import jina.serve.executors

        from clip_server.rpc.documents import UntypedDoc
    # Jina looks for free ports on IPv4 only, fails for a host such as ::1, and knows of no ports
    # that its processes share.
    jina.helper._single_port_free = ports.is_free
    # Jina asks three services on the internet for this machine's public address.
    orchestrator.get_public_ip = lambda *_, **__: None
    # Jina's document for endpoints without annotations cannot be read with chunks or matches.
    jina.serve.executors.LegacyDocumentJina = UntypedDoc
    _refuse_misfit_documents()
    if logs.is_json():
        _log_with_ours()
    # Jina's banner shows addresses that are not ours, and pages that this server lacks.
    jina.orchestrate.flow.base.print = lambda *_: None


def _log_with_ours() -> None:
    """Makes Jina's loggers use the handlers of the process, as others do.

    Jina gives each logger handlers of its own, which draw tables of 80 columns.
    """
    from jina.enums import LogVerbosity
    from jina.logging.logger import JinaLogger

    def add_handlers(logger: JinaLogger, *_: Any, **__: Any) -> None:
        logger.logger.handlers = []
        logger.logger.propagate = True
        logger.logger.setLevel(LogVerbosity.from_string(os.environ["JINA_LOG_LEVEL"]).value)

    JinaLogger.add_handlers = add_handlers


def _refuse_misfit_documents() -> None:
    """Makes documents that an executor's class cannot read a fault of the request.

    Jina reports them as a failure of the executor, some as `AttributeError('docs')`.
    """
    from jina.types.request.data import DataRequest

    content = DataRequest._DataContent
    read = content.docs.fget
    if read is None or read.__module__ == __name__:
        return

    def docs(self: Any) -> Any:
        try:
            return read(self)
        except Exception as error:
            raise RequestError(_misfit(error)) from error

    content.docs = property(docs, content.docs.fset)


def _misfit(error: Exception) -> str:
    fields = [
        # Other messages show a class of the server.
        f"{'.'.join(map(str, each['loc']))}: {each['msg']}"
        for each in getattr(error, "errors", list)()
        if "<class" not in each["msg"]
    ]
    what = "; ".join(fields) or "a field holds content of another type"
    return f"the documents are not those that the executor reads: {what}"


@contextmanager
def _hidden_torch(hidden: bool) -> Iterator[None]:
    """Makes docarray leave torch out, which takes more than a second to import.

    docarray imports it wherever it is installed, to offer torch tensors in documents. Ours have
    none.
    """
    hidden = hidden and "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]


@contextmanager
def _no_folders_in_home() -> Iterator[None]:
    """Keeps Jina from creating folders in the home directory, which may not be writable.

    Where it needs them it creates them again.
    """
    make_folder = Path.mkdir
    Path.mkdir = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Path.mkdir = make_folder  # type: ignore[method-assign]


# --- The YAML of a flow ---


def expand_variables(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A flow with its ${{ ENV.NAME }} replaced, as Jina does it when it loads a file."""
    from jina.jaml import JAML

    expanded: dict[str, Any] = JAML.expand_dict(dict(spec))
    return expanded


def parser(name: str) -> argparse.ArgumentParser:
    """Jina's parser of the options of a flow, gateway, deployment or client, by that name.

    It is the only list of Jina's keys. A mistake raises ValueError, where Jina would print 50
    lines of usage and end the process.
    """
    import jina.parsers
    from jina.parsers.flow import set_flow_parser

    makers: dict[str, Callable[[], argparse.ArgumentParser]] = {
        "flow": set_flow_parser,
        "gateway": jina.parsers.set_gateway_parser,
        "deployment": jina.parsers.set_deployment_parser,
        "client": jina.parsers.set_client_cli_parser,
    }
    found = makers[name]()

    def fail(message: str) -> NoReturn:
        raise ValueError(message)

    found.error = fail  # type: ignore[method-assign]
    return found


def check_option(parser: argparse.ArgumentParser, key: str, value: Any) -> None:
    """Raises what Jina's parser raises for a key of a flow, once for the whole flow.

    Jina itself would parse it in each process, after the models are loaded.
    """
    from jina.helper import ArgNamespace

    parser.parse_known_args(ArgNamespace.kwargs2list({key: value}))


# --- Flows in Python ---


def use_our_gateway(executor_class: type) -> None:
    """Gives our gateway to flows made by `jina.Flow` that contain an executor of a class, unless
    they name another one.

    Users of clip-as-service embed the server as `jina.Flow().add(uses=CLIPEncoder)`, and Jina's
    own gateway does not know clip.v1.

    executor_class: may be subclassed.
    """
    from jina import Flow
    from jina.jaml import JAML

    add_gateway = Flow._add_gateway

    def add_ours(flow: Any, *arguments: Any, **options: Any) -> Any:
        # By the names of classes: their constructors from YAML.
        constructors = JAML.registered_classes()
        used = [constructors.get(str(each.args.uses)) for each in flow._deployment_nodes.values()]
        if "uses" not in flow._gateway_kwargs and any(
            issubclass(each.__self__, executor_class) for each in used if each
        ):
            flow._gateway_kwargs |= GATEWAY_DEFAULTS
        return add_gateway(flow, *arguments, **options)

    Flow._add_gateway = add_ours


# --- The processes of a flow ---


def selects_gpus(devices: str) -> bool:
    """Whether `CUDA_VISIBLE_DEVICES: RR`, or a slice such as `RR0:2`, has GPUs to hand out.

    If it has none, Jina leaves the value as it is for CUDA and its libraries to make sense of, or
    fails with an exception of its own.
    """
    from jina.orchestrate.deployments import Deployment

    try:
        return bool(Deployment._roundrobin_cuda_device(devices, 1))
    except (ValueError, StopIteration):  # no slice, or one beyond the last GPU
        return False


class FlowProcess:
    """A process that Jina started: a gateway, or a replica of an executor.

    Jina watches over none of them: one that dies is neither reported nor restarted, and one that
    does not end is waited for without end.

    gateway: its number; None: it is not a gateway.
    slot: that of its heartbeats.
    """

    def __init__(self, pod: Any, gateway: int | None = None) -> None:
        self._pod, self._gateway = pod, gateway
        self.name: str = pod.name
        ports = pod.args.port
        port: int = ports[0] if isinstance(ports, list) else ports
        self.slot = port if gateway is None else heartbeats.gateway_slot(gateway)
        # None is Jina's -1.
        timeout = pod.args.timeout_ready
        self.ready_seconds: float = timeout / 1e3 if timeout > 0 else math.inf

    @property
    def exit_code(self) -> int | None:
        """Negative: the signal that killed it. None: it runs."""
        code: int | None = self._pod.worker.exitcode
        return code

    @property
    def is_ready(self) -> bool:
        """Whether it has started to serve."""
        ready: bool = self._pod.is_ready.is_set()
        return ready

    def restart(self) -> None:
        """Starts it again, at the same port. It must have ended."""
        # A process of multiprocessing starts only once, and so do its events.
        self._pod = type(self._pod)(self._pod.args)
        self._pod.start()

    def forget(self) -> None:
        """Clears what it left in shared memory. It must have ended."""
        heartbeats.forget(self.slot)
        if self._gateway is not None:
            gateway_group.forget(self._gateway)

    def terminate(self) -> None:
        """Sends it SIGTERM."""
        self._pod.worker.terminate()

    def kill(self) -> None:
        """Sends it SIGKILL."""
        self._pod.worker.kill()


def flow_processes(flow: Any) -> dict[str, list[FlowProcess]]:
    """The processes of a flow that have been started, in groups of which one member suffices: the
    gateways, the replicas of each executor, by their names."""
    found = {}
    for name, deployment in flow._deployment_nodes.items():
        pods = _replicas(deployment)
        if name == "gateway":
            pods += getattr(flow, "further_gateways", ())
            found[name] = [FlowProcess(pod, number) for number, pod in enumerate(pods)]
        else:
            found[name] = [FlowProcess(pod) for pod in pods]
        for pod in (deployment.head_pod, deployment.uses_before_pod, deployment.uses_after_pod):
            if pod is not None:
                found[pod.name] = [FlowProcess(pod)]
    return found


def _replicas(deployment: Any) -> list[Any]:
    return [pod for shard in deployment.shards.values() for pod in shard._pods]


def start_further_gateways(flow: Any, count: int) -> None:
    """Starts gateways in addition to the one that Jina starts, which knows of a single one.

    They differ in their number, name and port for Jina's own metrics.
    """
    (first,) = _replicas(flow._deployment_nodes["gateway"])
    flow.further_gateways = []
    for number in range(1, count + 1):
        args = copy.deepcopy(first.args)
        args.name = f"gateway/rep-{number}"
        args.uses_with = {**(args.uses_with or {}), "number": number}
        args.port_monitoring = int(args.port_monitoring) + number
        pod = type(first)(args)
        flow.further_gateways.append(pod)
        pod.start()


def executor_addresses(flow: Any) -> dict[str, Any]:
    """The gRPC addresses of the replicas, by executor, as Jina hands them to the gateway."""
    found: dict[str, Any] = json.loads(flow._deployment_nodes["gateway"].args.deployments_addresses)
    return found


def wrap_start(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Wraps the call that starts the server of a new process.

    Jina logs an exception there and tells the parent only that the process did not start.
    """
    import jina.serve.executors.run as pods

    pods.AsyncNewLoopRuntime = wrap(pods.AsyncNewLoopRuntime)


def replace_wait(flow: Any, wait: Callable[[], None]) -> None:
    """Replaces the wait for a flow's processes to become ready.

    Jina asks them over gRPC, whose threads must not be in this process: a process forked later,
    for one that died, could not use gRPC.
    """
    flow._wait_until_all_ready = wait


# --- Inside the gateway and the executors ---


async def learn_endpoints(gateway: Any, document: type) -> dict[str, dict[str, Any]]:
    """Asks the executors for their endpoints; the schemas of each, by executor and endpoint.

    Jina's own servers do it in their `setup_server`, which ours replaces. They make a class of
    documents from each schema, which fails for some that refer to themselves, takes bytes for texts
    and loses fields of documents below others.

    document: the class for all of them, with which branches of the flow are merged.
    """
    from google.protobuf import json_format
    from jina.serve.runtimes.gateway.graph import topology_graph

    topology_graph.create_base_doc_from_schema = lambda *_, **__: document
    streamer = gateway.streamer
    graph = streamer.topology_graph
    await graph._get_all_endpoints(
        streamer._connection_pool, retry_forever=True, is_cancel=gateway.is_cancel
    )
    return {
        node.name: json_format.MessageToDict(node._endpoints_proto[0].schemas)
        for node in graph.all_nodes
        if node._endpoints_proto is not None
    }


def intercept_calls(
    executor_class: type, interceptor: Callable[[Any, TimeCall, int], grpc.aio.ServerInterceptor]
) -> None:
    """Adds a gRPC interceptor to the servers of executors of a class.

    It answers clip.v1 on the executor's own port: a call by Jina's protocol costs several times
    as much, and has one answer for everything in it. Jina offers no way to add a service.

    executor_class: may be subclassed.
    interceptor: called with the executor, a timer for its calls and the port of the server.
    """
    from jina.serve.runtimes.servers.grpc import GRPCServer

    setup_server = GRPCServer.setup_server

    async def setup_with_interceptor(server: Any) -> None:
        executor = getattr(server._request_handler, "_executor", None)
        if isinstance(executor, executor_class):
            ours = interceptor(executor, executor_timer(server), server.port)
            # Before that of tracing, which cannot wrap methods that write to the context.
            server.grpc_tracing_server_interceptors = [
                ours,
                *(server.grpc_tracing_server_interceptors or []),
            ]
            # Jina's gateway pings idle connections more often than gRPC's servers tolerate.
            server.grpc_server_options = {
                "grpc.http2.max_ping_strikes": 0,
                **(server.grpc_server_options or {}),
            }
            # Jina creates it for snapshots, which encoders do not have, and leaves it behind.
            Path(server._request_handler._snapshot_parent_directory).rmdir()
        # Jina logs the traceback of a request that an executor refuses as if it had failed.
        server._request_handler.logger.logger.addFilter(_is_no_refusal)
        await setup_server(server)

    GRPCServer.setup_server = setup_with_interceptor


def _is_no_refusal(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], RequestError))


# --- Metrics and traces, which Jina records only for calls by its own protocol ---


def untimed(_endpoint: str, _documents: int, _traceparent: str) -> AbstractContextManager[None]:
    """Records nothing."""
    return nullcontext()


def gateway_timer(gateway: Any) -> TimeCall:
    """Records calls that the gateway sends straight to an executor."""
    from jina.serve.instrumentation import MetricsTimer

    registry, tracer, name = gateway.metrics_registry, gateway.tracer, gateway.runtime_args.name
    if not (registry or gateway.meter or tracer):
        return untimed
    receiving = None
    if registry:
        # The object that owns it is out of reach.
        found = registry._names_to_collectors["jina_receiving_request_seconds"]
        receiving = found.labels(name)
    network = gateway.streamer._connection_pool
    sending = network._metrics.sending_requests_time_metrics
    histogram = network._histograms.sending_requests_time_metrics
    labels = {"runtime_name": name}

    @contextmanager
    def timed(endpoint: str, documents: int, traceparent: str) -> Iterator[Trace | None]:
        with (
            MetricsTimer(receiving, None),
            MetricsTimer(sending, histogram, labels),
            span(tracer, f"send {endpoint}", traceparent, documents=documents) as trace,
        ):
            yield trace

    return timed


def executor_timer(server: Any) -> TimeCall:
    """Records calls that an executor answers."""
    from jina.serve.instrumentation import MetricsTimer

    handler, executor = server._request_handler, server._request_handler._executor
    if not (handler.metrics_registry or handler.meter or handler.tracer):
        return untimed
    class_name, name = type(executor).__name__, handler.args.name

    @contextmanager
    def timed(endpoint: str, documents: int, traceparent: str) -> Iterator[Trace | None]:
        process = executor._summary_method
        labels = {"executor": class_name, "executor_endpoint": endpoint, "runtime_name": name}
        with (
            MetricsTimer(
                handler._summary, handler._receiving_request_seconds, handler._metric_attributes
            ),
            MetricsTimer(
                process and process.labels(class_name, endpoint, name),
                executor._process_request_histogram,
                labels,
            ),
            span(handler.tracer, endpoint, traceparent, documents=documents) as trace,
        ):
            yield trace
        request = SimpleNamespace(header=SimpleNamespace(exec_endpoint=endpoint))
        handler._record_docs_processed_monitoring([request], documents)

    return timed


def time_stage(executor: Any, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Records the time of each `call` as jina_STAGE_seconds."""
    timer = executor.monitor(f"{stage}_seconds", f"Time of a call to {stage.replace('_', ' ')}")
    # Without monitoring it is a context that does nothing.
    timed: Callable[..., Any] = timer(call) if callable(timer) else call
    return timed
