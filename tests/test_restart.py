"""A long job of the client survives a restart of the server."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import psutil
import pytest
from conftest import Server, Start, flow

from clip_client import Batch, Client

COUNT, DIFFERENT = 20_000, 500


@pytest.mark.slow  # starts two servers
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("protocol", ["grpc", "http", "websocket"])
def test_a_job_over_a_restart(start: Start, protocol: str, end: signal.Signals) -> None:
    spec = flow()
    server = start(spec)
    answered = threading.Event()
    restarted: list[Server] = []

    def restart() -> None:
        answered.wait()
        family = server.family()
        for process in family if end is signal.SIGKILL else family[:1]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(end)
        server.process.wait(60)
        restarted.append(start(spec))

    def note(batch: Batch) -> None:
        if batch.indices[0] > COUNT // 4:
            answered.set()

    def texts() -> Iterator[str]:
        return (f"text {number % DIFFERENT}" for number in range(COUNT))

    worker = threading.Thread(target=restart)
    worker.start()
    with Client(getattr(server, protocol)) as client:
        expected = client.encode([f"text {number}" for number in range(DIFFERENT)])
        result = client.encode(texts(), on_always=note, timeout=120)
    worker.join()
    # Of a batch of other lengths the last bits may differ.
    np.testing.assert_allclose(result, np.resize(expected, result.shape), atol=1e-4)
    assert len(result) == COUNT
    restarted[0].stop()
