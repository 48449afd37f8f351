"""A real Prometheus reads the metrics, the dashboard's queries and the alerts."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from conftest import PATIENCE_SECONDS, ROOT, SAMPLES, Server, eventually, free_ports
from guard import popen

from clip_client import Client, ServerError

pytestmark = pytest.mark.slow

DEPLOY = ROOT / "deploy"
# For the variables of the dashboard.
JOB, INTERVAL = "clip", "8s"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `prometheus` and `promtool`: installed, or from the system's packages."""
    if found := shutil.which("prometheus"):
        return Path(found).parent
    folder = tmp_path_factory.mktemp("prometheus")
    try:
        download = ["apt-get", "download", "-q", "prometheus"]
        subprocess.run(download, cwd=folder, check=True, capture_output=True)
        (package,) = folder.glob("prometheus_*.deb")
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"Prometheus is neither installed nor among the system's packages: {error}")
    return folder / "usr" / "bin"


@contextmanager
def used(server: Server) -> Iterator[None]:
    """Uses a server in every way that it counts."""
    is_over = threading.Event()

    def use() -> None:
        while not is_over.wait(0.1):
            for address in server.addresses:
                with Client(address) as client, suppress(ServerError):
                    client.encode(["a cat", SAMPLES / "cat.png"], model="first")
                    client.encode(["a cat"], model="second")
                    client.encode(["a cat"], model="none")

    user = threading.Thread(target=use)
    user.start()
    try:
        yield
    finally:
        is_over.set()
        user.join()


@contextmanager
def prometheus(programs: Path, folder: Path, server: Server) -> Iterator[str]:
    """The address of a Prometheus that scrapes a server as deploy/prometheus.yml has it, but more
    often."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / each) for each in config["rule_files"]]
    config["scrape_configs"][0] |= {
        "scrape_interval": "1s",
        "static_configs": [{"targets": [server.http.removeprefix("http://")]}],
    }
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    command = [
        *(programs / "prometheus", f"--config.file={file}"),
        *(f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"),
    ]
    with (folder / "log").open("wb") as log:
        process = popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)


def values(address: str, query: str) -> list[float]:
    """The values that a query finds now, which are numbers."""
    answer = requests.get(f"{address}/api/v1/query", params={"query": query}, timeout=30).json()
    assert answer["status"] == "success", (query, answer)
    found = [float(each["value"][1]) for each in answer["data"]["result"]]
    return [each for each in found if not math.isnan(each)]


def is_ready(address: str) -> bool:
    with suppress(requests.ConnectionError):
        return requests.get(f"{address}/-/ready", timeout=30).ok
    return False


def test_every_panel_shows_data(programs: Path, two_models: Server, tmp_path: Path) -> None:
    dashboard = json.loads((DEPLOY / "grafana/dashboard.json").read_text("utf-8"))
    queries = {
        target["expr"].replace("$job", JOB).replace("$__rate_interval", INTERVAL)
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }
    assert len(queries) > 15
    with prometheus(programs, tmp_path, two_models) as address, used(two_models):
        assert eventually(lambda: is_ready(address))
        end = time.monotonic() + PATIENCE_SECONDS
        while queries and time.monotonic() < end:
            queries = {each for each in queries if not values(address, each)}
            time.sleep(0.5)
        assert not queries, (tmp_path / "log").read_text()

        def alerts() -> list[Any]:
            answer = requests.get(f"{address}/api/v1/rules", timeout=30).json()
            return answer["data"]["groups"][0]["rules"]  # type: ignore[no-any-return]

        assert eventually(lambda: all(each["health"] == "ok" for each in alerts()))
        assert {each["state"] for each in alerts()} == {"inactive"}


def test_what_promtool_says(programs: Path, two_models: Server) -> None:
    def run(*arguments: str | Path, given: str = "") -> str:
        command = [programs / "promtool", *arguments]
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "SUCCESS" in run("check", "config", DEPLOY / "prometheus.yml")
    assert run("check", "metrics", given=requests.get(f"{two_models.http}/metrics").text) == ""
