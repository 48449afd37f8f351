"""`python -m benchmarks` runs; the peers, which it would have to install, are left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import free_ports

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_capacity_leg_measures_every_protocol() -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "--quick",
        "--port",
        str(free_ports(1)[0]),
        "capacity",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    header = "| null runtime | grpc | http | websocket |"
    assert header in done.stdout
    table = done.stdout.partition(header)[2]
    rate = next(line for line in table.splitlines() if line.startswith("| texts/s"))
    cells = [float(cell.replace(",", "")) for cell in rate.split("|")[2:5]]
    assert all(cell > 0 for cell in cells)
