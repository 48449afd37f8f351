"""The guide's part on Prometheus and Grafana, and Jina's keys for tracing."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import requests
from conftest import Server, Start, flow, free_ports
from guide import CAT, SENTENCES

from clip_client import Client

# What the dashboard of the guide reads: of each summary its _sum and _count.
SUMMARIES = [
    "jina_receiving_request_seconds",
    "jina_sending_request_seconds",
    "jina_process_request_seconds",
    "jina_preprocess_texts_seconds",
    "jina_encode_texts_seconds",
    "jina_preprocess_images_seconds",
    "jina_encode_images_seconds",
]


class Monitored:
    """A server with the keys of the guide, and what its two ports say."""

    def __init__(self, server: Server, gateway: int, executor: int) -> None:
        self.server = server
        self.gateway = f"http://localhost:{gateway}"
        self.executor = f"http://localhost:{executor}"

    def samples(self) -> str:
        return "\n".join(
            requests.get(url, timeout=30).text for url in (self.gateway, self.executor)
        )


@pytest.fixture(scope="module")
def monitored(start: Start) -> Iterator[Monitored]:
    gateway, executor = free_ports(2)
    spec = flow()
    spec["with"] |= {"monitoring": True, "port_monitoring": gateway}
    spec["executors"][0] |= {"monitoring": True, "port_monitoring": executor}
    server = start(spec)
    with Client(server.grpc) as client:
        client.encode([*SENTENCES, CAT])
    with Client(server.http) as client:
        client.encode([*SENTENCES, CAT])
    yield Monitored(server, gateway, executor)
    server.stop()


def test_gateway_and_executor_have_an_endpoint_each(monitored: Monitored) -> None:
    for url in (monitored.gateway, monitored.executor):
        for path in ("", "/", "/metrics"):
            answer = requests.get(f"{url}{path}", timeout=30)
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/plain")
            assert "# HELP" in answer.text


@pytest.mark.parametrize("name", SUMMARIES)
def test_what_the_dashboard_divides(monitored: Monitored, name: str) -> None:
    counted = re.findall(rf"^{name}_count(?:{{.*}})? ([\d.e+]+)$", monitored.samples(), re.M)
    assert any(float(count) > 0 for count in counted)
    summed = re.findall(rf"^{name}_sum(?:{{.*}})? ([\d.e+-]+)$", monitored.samples(), re.M)
    assert any(float(seconds) > 0 for seconds in summed)


def test_the_dashboards_labels(monitored: Monitored) -> None:
    samples = monitored.samples()
    assert re.search(
        r'^jina_receiving_request_seconds_count{.*runtime_name="gateway.*"', samples, re.M
    )
    for name in ("jina_document_processed_total", "jina_process_request_seconds_count"):
        assert re.search(
            rf'^{name}{{(?=.*executor_endpoint="/)(?=.*runtime_name="clip)', samples, re.M
        )


def test_the_servers_own_metrics_are_there_too(monitored: Monitored) -> None:
    text = requests.get(f"{monitored.server.http}/metrics", timeout=30).text
    assert "clip_texts_total" in text


@pytest.mark.slow
def test_a_flow_with_tracing_becomes_ready(start: Start) -> None:
    """Nobody answers where the traces go, which must not hold up the server."""
    (port,) = free_ports(1)
    spec = flow()
    spec["with"] |= {
        "tracing": True,
        "traces_exporter_host": "localhost",
        "traces_exporter_port": port,
        "metrics": True,
        "metrics_exporter_host": "localhost",
        "metrics_exporter_port": port,
    }
    server = start(spec)
    with Client(server.grpc) as client:
        assert len(client.encode(SENTENCES)) == 3
    server.stop()
