"""A long job of the client survives a restart of the server."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import psutil
import pytest
from conftest import PATIENCE_SECONDS, Start, flow

from clip_client import Batch, Client

COUNT, DIFFERENT = 20_000, 500


@pytest.mark.slow  # starts two servers
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_jobs_over_a_restart(start: Start, end: signal.Signals) -> None:
    """One on each protocol, all of them in the middle of it."""
    spec = flow()
    server = start(spec)
    all_begun = threading.Barrier(len(server.addresses) + 1)
    with Client(server.grpc) as client:
        expected = client.encode([f"text {number}" for number in range(DIFFERENT)])

    def work(address: str) -> None:
        has_begun = False

        def note(batch: Batch) -> None:
            nonlocal has_begun
            if not has_begun and batch.indices[0] > COUNT // 4:
                has_begun = True
                all_begun.wait(PATIENCE_SECONDS)

        def texts() -> Iterator[str]:
            return (f"text {number % DIFFERENT}" for number in range(COUNT))

        with Client(address) as client:
            result = client.encode(texts(), on_always=note, timeout=120)
        assert len(result) == COUNT
        # Of a batch of other lengths the last bits may differ.
        np.testing.assert_allclose(result, np.resize(expected, result.shape), atol=1e-4)

    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(work, address) for address in server.addresses]
        all_begun.wait(PATIENCE_SECONDS)
        family = server.family()
        for process in family if end is signal.SIGKILL else family[:1]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(end)
        server.process.wait(PATIENCE_SECONDS)
        again = start(spec)
        for job in jobs:
            job.result()
    again.stop()
