"""Metrics, their documentation and dashboard, request ids and logs of a server."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
import requests
from conftest import ROOT, SLOW_EXECUTOR, Server, Start, eventually, flow
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from websockets.sync.client import connect

from clip_client import Client, ServerError
from clip_client.proto import clip_pb2 as pb

CAT = str(ROOT / "clip_server/models/embedded/samples/cat.png")
DOCUMENTED = re.compile(r"`((?:clip|process)_\w+)`")


def scrape(server: Server) -> dict[str, Metric]:
    text = requests.get(f"{server.http}/metrics", timeout=30).text
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


@pytest.fixture(scope="module")
def used(onnx_server: Server) -> Server:
    """The shared server after requests on every protocol, one of them refused."""
    for address in onnx_server.addresses:
        with Client(address) as client:
            client.encode(["a cat", CAT])
    requests.post(f"{onnx_server.http}/encode", data="{", timeout=30)
    return onnx_server


@pytest.fixture(scope="module")
def spans() -> Iterator[tuple[int, list[Span]]]:
    """The port of an OpenTelemetry collector, and what it has received."""
    received: list[Span] = []

    def export(message: bytes, _: grpc.ServicerContext) -> bytes:
        for resource in ExportTraceServiceRequest.FromString(message).resource_spans:
            received.extend(span for scope in resource.scope_spans for span in scope.spans)
        return b""

    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    handlers = {"Export": grpc.unary_unary_rpc_method_handler(export)}
    with ThreadPoolExecutor() as pool:
        collector = grpc.server(pool)
        collector.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(service, handlers)]
        )
        port = collector.add_insecure_port("127.0.0.1:0")
        collector.start()
        yield port, received
        collector.stop(None)


@pytest.fixture(scope="module")
def observed(start: Start, spans: tuple[int, list[Span]]) -> Iterator[Server]:
    """A server that traces its requests and logs each of them."""
    spec = flow()
    spec["with"] |= {
        "tracing": True,
        "traces_exporter_host": "127.0.0.1",
        "traces_exporter_port": spans[0],
    }
    environment = {"CLIP_ACCESS_LOG": "1", "CLIP_LOG_FORMAT": "json"}
    server = start(spec, OTEL_BSP_SCHEDULE_DELAY="100", **environment)
    yield server
    server.stop()


def exported(families: dict[str, Metric]) -> set[str]:
    return {
        f"{name}_total" if family.type == "counter" else name for name, family in families.items()
    }


def test_what_is_exported_is_documented(used: Server, search_server: Server) -> None:
    names = exported(scrape(used)) | exported(scrape(search_server))
    names.add("clip_gateway_up")  # where there are several
    page = (ROOT / "docs/operations.md").read_text("utf-8")
    assert set(DOCUMENTED.findall(page)) == names


def test_metrics_of_each_protocol(used: Server) -> None:
    families = scrape(used)
    for family in families.values():
        assert family.documentation
    counted = {
        sample.labels["protocol"]: sample.value
        for sample in families["clip_request_duration_seconds"].samples
        if sample.name.endswith("_count") and sample.labels["endpoint"] == "/encode"
    }
    assert counted.keys() == {"grpc", "http", "websocket"}
    refused = [
        sample.value
        for sample in families["clip_errors"].samples
        if sample.labels == {"protocol": "http", "code": "INVALID_ARGUMENT"}
    ]
    assert refused[0] >= 1
    (info,) = families["clip_build_info"].samples
    assert (info.labels["executor"], info.labels["replica"]) == ("clip", "0")
    assert info.labels["model"] == "emoji-small::embedded"
    assert re.fullmatch("[0-9a-f]{16}", info.labels["fingerprint"])


def test_open_connections_are_counted(used: Server) -> None:
    def count(protocol: str) -> float:
        (family,) = (each for name, each in scrape(used).items() if name == "clip_connections")
        return next(each.value for each in family.samples if each.labels["protocol"] == protocol)

    sockets, clients = ExitStack(), ExitStack()
    with sockets, clients:
        for _ in range(5):
            sockets.enter_context(connect(used.websocket, proxy=None))
            clients.enter_context(Client(used.grpc)).encode(["a cat"])
        assert eventually(lambda: count("websocket") >= 5)
        assert eventually(lambda: count("grpc") >= 5)


def test_the_dashboard_reads_what_is_exported(used: Server) -> None:
    samples = [sample for family in scrape(used).values() for sample in family.samples]
    dashboard = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text("utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) > 15
    for expression in expressions:
        for name, selector in re.findall(r"\b((?:clip|process)_\w+)\{([^}]*)\}", expression):
            labels = {
                *(label for group in re.findall(r"by \(([^)]*)\)", expression)
                  for label in re.split(r", *", group)),
                *(label for label in re.findall(r"(\w+)=", selector) if label != "job"),
            }  # fmt: skip
            if name.endswith(("_sum", "_count")):
                labels -= {"le"}
            found = [sample for sample in samples if sample.name == name]
            assert found, f"{expression}: {name} is not exported"
            assert any(labels <= each.labels.keys() for each in found), expression


def test_spans_of_client_gateway_and_executor_are_joined(
    observed: Server, spans: tuple[int, list[Span]]
) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    url = f"{observed.http}/encode"
    assert requests.post(url, json={"data": ["a cat"]}, headers=headers, timeout=30).ok

    def received() -> list[Span]:
        return [span for span in spans[1] if span.trace_id.hex() == trace]

    assert eventually(lambda: len(received()) >= 6)
    assert sorted(span.name for span in received()) == [
        *("/encode", "/encode", "inference", "preprocess", "queue", "send /encode")
    ]
    parents = {span.span_id: span for span in received()}
    chain = [span for span in received() if span.name == "inference"]
    while chain[-1].parent_span_id in parents:
        chain.append(parents[chain[-1].parent_span_id])
    assert [span.name for span in chain] == ["inference", "/encode", "send /encode", "/encode"]
    assert chain[-1].parent_span_id.hex() == "b7ad6b7169203331"


@pytest.mark.parametrize("given", ["order-66", ""])
def test_request_ids_over_http(used: Server, given: str) -> None:
    headers = {"x-request-id": given} if given else {}
    answer = requests.post(
        f"{used.http}/encode", json={"data": ["a cat"]}, headers=headers, timeout=30
    )
    returned = answer.headers["x-request-id"]
    assert returned == given or re.fullmatch("[0-9a-f]{32}", returned)
    assert answer.json()["header"]["requestId"] == returned


def test_an_id_that_does_not_fit_a_log_is_replaced(used: Server) -> None:
    for given in ("a" * 129, "\u00e9t\u00e9".encode().decode("latin-1"), "a\tb"):
        request = urllib.request.Request(f"{used.http}/livez", headers={"x-request-id": given})
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


@pytest.mark.parametrize("protocol", ["grpc", "http", "websocket"])
def test_the_clients_errors_name_the_request(onnx_server: Server, protocol: str) -> None:
    client = Client(getattr(onnx_server, protocol))
    with client, pytest.raises(ServerError, match="none") as caught:
        client.encode(["a cat"], model="none")
    error = caught.value
    assert re.fullmatch("[0-9a-f]{32}", error.request_id)
    assert str(error).endswith(f" [request {error.request_id}]")
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.request_id) == (str(error), error.request_id)


@pytest.mark.slow
def test_every_refusal_names_its_request(start: Start) -> None:
    """To the client, whatever the reason: a key, a mistake, a server that is full or ends."""
    spec = flow(module=SLOW_EXECUTOR, max_queued_items=100)
    spec["with"]["max_wait"] = 0
    server = start(spec, CLIP_AUTH_TOKEN="right", CLIP_ACCESS_LOG="1")

    def refused(address: str, credential: str = "right", **options: Any) -> tuple[str, str]:
        client = Client(address, credential=credential)
        with client, pytest.raises(ServerError) as caught:
            client.encode(["a cat"], **options)
        return caught.value.code, caught.value.request_id

    def assert_refused(code: str, **options: Any) -> None:
        with ThreadPoolExecutor() as pool:
            calls = [pool.submit(refused, each, **options) for each in server.addresses]
        codes, named = zip(*(call.result() for call in calls), strict=True)
        assert codes == (code, code, code)
        assert eventually(lambda: all(each and each in server.output() for each in named))

    assert_refused("UNAUTHENTICATED", credential="wrong")
    assert_refused("INVALID_ARGUMENT", model="none")
    texts = [f"text {number}" for number in range(5_000)]  # for 8 s
    with Client(server.grpc, credential="right") as client, ThreadPoolExecutor() as pool:
        bulk = pool.submit(client.encode, texts, batch_size=5_000)
        assert eventually(lambda: server.metrics(authorization="right")["in_flight_items"] > 0)
        assert_refused("RESOURCE_EXHAUSTED", timeout=1)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_output("draining")
        assert_refused("UNAVAILABLE", timeout=4.5)  # for 2 s it is still full
        assert len(bulk.result()) == 5_000


def test_request_ids_over_grpc_and_websocket(used: Server) -> None:
    encode = pb.EncodeRequest(items=[pb.Item(text="a cat")])
    with used.channel() as channel:
        method = channel.unary_unary("/clip.v1.Clip/Encode")
        for message in (encode.SerializeToString(), b"\xff"):
            call = method.future(message, metadata=[("x-request-id", "order-67")])
            call.exception(30)
            assert ("x-request-id", "order-67") in call.trailing_metadata()
    with connect(used.websocket, proxy=None) as link:
        for number, given in enumerate(("order-68", ""), 1):
            request = pb.Request(id=number, encode=encode, request_id=given)
            link.send(pb.Requests(requests=[request]).SerializeToString())
            message = link.recv(30)
            assert isinstance(message, bytes)
            (response,) = pb.Responses.FromString(message).responses
            assert response.request_id == given or re.fullmatch("[0-9a-f]{32}", response.request_id)


def test_the_access_log_has_a_line_for_each_request(observed: Server) -> None:
    def logged() -> list[dict[str, Any]]:
        lines = re.findall(r"^{.*}$", observed.output(), re.M)
        return [each for each in map(json.loads, lines) if each.get("endpoint") == "/encode"]

    with Client(observed.grpc) as client:
        client.encode(["after those of other tests"])
    assert eventually(lambda: logged()[-1:] and logged()[-1]["protocol"] == "grpc")
    before = len(logged())
    for address in observed.addresses:
        with Client(address) as client:
            client.encode(["a cat", CAT])
    headers = {"x-request-id": "order-69"}
    requests.post(f"{observed.http}/encode", data="{", headers=headers, timeout=30)
    answer = requests.post(f"{observed.http}/{'long' * 9_000}", json={"data": ["a"]}, timeout=30)
    assert len(answer.text) < 1000
    assert eventually(lambda: "/longlong" in observed.output())
    assert max(map(len, observed.output().splitlines())) < 2000
    assert eventually(lambda: len(logged()) == before + 4)
    encoded = logged()[before:]
    assert [line["protocol"] for line in encoded] == ["grpc", "http", "websocket", "http"]
    assert [line["status"] for line in encoded] == ["OK", 200, "OK", 400]
    assert [line["items"] for line in encoded] == [2, 2, 2, 0]
    assert all(line["client"].startswith("127.0.0.1:") for line in encoded)
    assert all(line["duration_ms"] > 0 for line in encoded)
    assert encoded[-1]["request_id"] == "order-69"


# Whatever prints in a process of the server.
PRINTS = """
import logging, sys, threading, warnings
from clip_server import logs
logs.print_as_json()
logs.configure()
print("a line"), print("two\\nlines"), print({"a": 1}), print(3), print()
logs.announce("told", logging.WARNING, details={"addresses": ["one", "two"]})
warnings.warn("outdated", DeprecationWarning)
logging.getLogger("clip_server.x").info("logged", extra={"request_id": "order-70"})
thread = threading.Thread(target=lambda: 1 / 0)
thread.start(), thread.join()
for step in 1, 2, 3:
    print(f"\\r{step} of 3", end="", flush=True)
print(), print("one\\u2028two\\x85three"), print("held", end="")
sys.stderr.write("unfinished")
raise SystemExit("the reason")
"""


def test_all_that_is_printed_is_json() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", PRINTS],
        capture_output=True,
        text=True,
        env={**os.environ, "CLIP_LOG_FORMAT": "json"},
        check=False,
    )
    printed = [json.loads(line)["message"] for line in done.stdout.splitlines()]
    assert printed == [
        *("a line", "two\nlines", "{'a': 1}", "3"),
        *("3 of 3", "one\u2028two\x85three", "held"),
    ]
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    told, warned, logged, *failed = lines
    assert (told["level"], told["message"]) == ("warning", "clip_server: told")
    assert told["addresses"] == ["one", "two"]
    assert "DeprecationWarning: outdated" in warned["message"]
    assert (logged["message"], logged["request_id"]) == ("logged", "order-70")
    said = "".join(each["message"] for each in failed)
    assert "ZeroDivisionError" in said
    assert said.endswith("unfinishedthe reason")
    assert all({"time", "level", "logger"} <= each.keys() for each in lines)


def test_json_logs_hold_nothing_else(observed: Server) -> None:
    """From the start to the end, with a request that fails and a process that dies."""
    requests.post(f"{observed.http}/encode", data="{", timeout=30)
    gateway = next(
        each for each in observed.family()[1:]
        if observed.ports[1] in [it.laddr.port for it in each.net_connections("inet")]
    )  # fmt: skip
    gateway.kill()
    observed.wait_for_output("is ready again")
    observed.stop()
    lines = [json.loads(line) for line in observed.output().splitlines()]
    for line in lines:
        assert {"time", "level", "logger", "message"} <= line.keys()
    (ready,) = (each for each in lines if each["message"].startswith("clip_server: ready in"))
    assert ready["addresses"] == observed.addresses
    assert "emoji-small::embedded" in ready["executors"][0]
    assert [each["level"] for each in lines if "was killed" in each["message"]] == ["error"]
    assert "draining" in lines[-1]["message"]
