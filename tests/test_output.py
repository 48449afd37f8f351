"""Every command runs and ends well, whatever becomes of its standard streams."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import PATIENCE_SECONDS, eventually, flow, is_alive
from guard import popen

from clip_client import Client
from clip_client.errors import ConnectionFailedError


def run(command: str) -> subprocess.CompletedProcess[str]:
    """A line of shell, in which $PYTHON is the Python of the tests."""
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHON": sys.executable},
        check=False,
    )


def serve(tmp_path: Path, redirections: str) -> tuple[subprocess.Popen[bytes], str]:
    """A server whose output is a pipe where `redirections` leave it, and its gRPC address."""
    spec = flow()
    file = tmp_path / "flow.yml"
    file.write_text(yaml.safe_dump(spec))
    process = popen(
        ["bash", "-c", f'exec "$0" -m clip_server "$1" {redirections}', sys.executable, str(file)],
        stdout=subprocess.PIPE,
    )
    return process, f"grpc://127.0.0.1:{spec['with']['port'][0]}"


def test_the_reader_of_the_servers_output_goes(tmp_path: Path) -> None:
    process, address = serve(tmp_path, "2>&1")
    assert process.stdout is not None
    try:
        assert any(b"clip_server: ready" in line for line in process.stdout)
        process.stdout.close()
        with Client(address) as client:
            assert client.encode(["a cat"]).shape == (1, 256)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0
    finally:
        process.kill()
        process.wait()


def test_a_server_without_output(tmp_path: Path) -> None:
    process, address = serve(tmp_path, ">&- 2>&- <&-")
    assert process.stdout is not None
    try:
        assert process.stdout.read() == b""  # as closed
        deadline = time.monotonic() + PATIENCE_SECONDS
        with Client(address) as client:
            while True:
                try:
                    assert client.encode(["a cat"]).shape == (1, 256)
                    break
                except ConnectionFailedError:
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        # 130 where the command, which cannot say that it is ready, was not quite so.
        assert process.wait(PATIENCE_SECONDS) in (0, 130)
    finally:
        process.stdout.close()
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "command",
    [
        "models",
        pytest.param("benchmark --runtime onnx --batch-sizes 1 --repeat 1", marks=pytest.mark.slow),
    ],
)
def test_a_command(command: str) -> None:
    for rest in ("| true", ">&- 2>&-", "> /dev/full"):
        done = run(f'"$PYTHON" -m clip_server.{command} {rest}; exit "${{PIPESTATUS[0]}}"')
        assert done.returncode == 0, done.stderr
        assert "Error" not in done.stderr


OUTLIVED = """
import time
from guard import popen
started = [popen(["sleep", "1000"]), popen(["true"])]
print(started[0].pid, flush=True)
time.sleep(1000)
"""


def test_processes_end_with_the_tests_that_are_killed() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", OUTLIVED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as tests:
        assert tests.stdout is not None
        started = psutil.Process(int(tests.stdout.readline()))
        tests.kill()
        assert eventually(lambda: not is_alive(started))


def test_what_can_be_written_is_written() -> None:
    done = run('"$PYTHON" -m clip_server.models embedded 2>&-')
    assert "emoji-small::embedded" in done.stdout
    done = run('"$PYTHON" -m clip_server nowhere.yml >&-')
    assert "nowhere.yml" in done.stderr
