"""`python -m benchmarks` runs; the peers, which it would have to install, are left out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import seeded
from conftest import Server, free_range, needs_torch
from PIL import Image

from benchmarks import report

ROOT = Path(__file__).parents[1]
CONTESTANTS = ["torch fp32", "onnx fp32", "clip-as-service"]


def run(script: str, folder: Path, *arguments: str) -> str:
    """What a script prints that uses our benchmarks, in a process whose cache is in a folder."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=folder,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_torch
@pytest.mark.slow
def test_the_gpu_benchmark_can_be_tried_without_one(tmp_path: Path) -> None:
    """All who can run on a CPU are compared, measured and put in a table."""
    model = seeded.save(seeded.open_clip_model(seeded.SMALL_CLIP), tmp_path, seeded.SMALL_CLIP)
    little = "--batches 1,2 --texts 32 --photos 2 --rounds 1 --seconds 0.01"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.gpu", "--device", "cpu"),
            *("--json", "found.json"),
            *("--model-path", str(model), *little.split()),
        ],
        cwd=tmp_path,
        # One thread: on a busy machine torch's wait for each other longer than they work.
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rates = json.loads((tmp_path / "found.json").read_text())
    assert list(rates["end to end, photos"]) == CONTESTANTS
    assert all(rate > 0 for row in rates.values() for (rate,) in row.values())
    assert len(rates) == 6
    (heading,) = re.findall(r"^\| lowest cosine with torch fp32 .*", done.stdout, re.MULTILINE)
    assert heading
    assert done.stdout.count("not measured") == 6


PAGE = """# Benchmarks

<!-- measured: begin -->

A machine.

### Goals

| leg | goal | wanted | measured | met |
| --- | --- | --- | --- | --- |
| texts | fast | ≥ 2 | 3 | yes |
| cost | small | ≤ 2 | 3 | **no** |

### texts

2026-11-22, 3 rounds.

| rate | clip-server |
| --- | --- |
| texts/s | 3 |

### cost

2026-11-26, on another machine.

<!-- measured: end -->

After.
"""


def test_a_page_keeps_the_sections_of_legs_that_were_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "DOCS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(report, "machine", lambda: "My machine.")
    page = tmp_path / "benchmarks.md"
    page.write_text(PAGE)
    report.write_docs(["texts", "photos", "cost"])
    assert page.read_text() == PAGE
    figures = report.Figures("texts/s", {"clip-server": [4.0]})
    report.save(
        "texts", report.Leg("rate", [figures], [report.Goal("fast", ">=", 2, 4)]), "1 round"
    )
    report.write_docs(["texts", "photos", "cost"])
    written = re.sub("2026-.*1 round", "today, 1 round", page.read_text())
    assert written == PAGE.replace("2026-11-22, 3 rounds.", "today, 1 round. My machine.").replace(
        "| fast | ≥ 2 | 3 |", "| fast | ≥ 2 | 4 |"
    ).replace("| texts/s | 3 |", "| texts/s | 4 |")


@pytest.mark.slow
def test_the_capacity_leg_measures_every_protocol() -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "--quick",
        "--port",
        str(free_range(12)),
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


@pytest.mark.slow
def test_the_overhead_leg_compares_two_servers(onnx_server: Server, tmp_path: Path) -> None:
    """Over OpenAI's API, once their vectors are equal; here both are the same server."""
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "photo.jpg")
    script = (
        "import json, sys; from pathlib import Path\n"
        "from benchmarks import legs, peers, workload; from benchmarks.options import Options\n"
        "workload.photos = Path\n"
        "with peers.Peers(0) as found:\n"
        "    found.started = lambda _: peers.Started(None, {'http': sys.argv[1]})\n"
        "    leg = legs.overhead(found, Options(1, 0.2, 0, 0, ()))\n"
        "ratios = {goal.what: goal.figure for goal in leg.goals}\n"
        "print(json.dumps([[row.rounds for row in leg.figures], ratios]))"
    )
    printed = run(script, tmp_path, onnx_server.http)
    rows, ratios = json.loads(printed.splitlines()[-1])
    assert "lowest cosine to clip-server thin: texts 1.0" in printed
    for row in rows:
        assert list(row) == ["clip-server", "infinity"]
        assert all(rate > 0 for (rate,) in row.values())
    assert len(rows) == len(ratios) == 3
    assert all(ratio > 0 for ratio in ratios.values())


@pytest.mark.slow
def test_the_search_leg_measures_the_service(tmp_path: Path) -> None:
    script = (
        "import json; from benchmarks.peers import Peers; from benchmarks.search import measure\n"
        f"with Peers({free_range(12)}) as peers:\n"
        "    print(json.dumps(measure(peers, 'clip-server Flat', size=300, seconds=1)))"
    )
    figures = json.loads(run(script, tmp_path).splitlines()[-1])
    assert [value for what, value in figures.items() if "recall" in what] == [1, 1, 1]
    assert all(value > 0 for value in figures.values())
