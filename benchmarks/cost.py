"""The leg `cost`: memory while starting and under load, time to start, processor time."""

from __future__ import annotations

from collections import defaultdict

from benchmarks.options import Options
from benchmarks.peers import CLIP_AS_SERVICE, INFINITY, INT8, OURS, TORCH, TWO_REPLICAS, Peers
from benchmarks.processes import NotAvailableError
from benchmarks.report import Figures, Goal, Leg

MEBIBYTE = 2**20
# Of the checkpoint, ViT-B/32 in float32; and what Python, Jina and three processes take.
WEIGHTS, BASE = 577, 250
FIRST, LATER = "first start, peak MiB", "later start, peak MiB"
READY, SECONDS = "ready, MiB", "later start, seconds until ready"
LOAD = "under load, peak MiB"
CPU = {kind: f"CPU seconds per 1,000 {kind}" for kind in ("texts", "photos")}
BATCHES = {"texts": 32, "photos": 16}


def cost(peers: Peers, options: Options) -> Leg:
    """What a server takes of the machine: its peers have nothing to prepare, so one start."""
    rows: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for name in (OURS, INT8, TORCH, TWO_REPLICAS):
        rows[FIRST][name] = [peers.first_start(name).peak / MEBIBYTE]
        _measure(name, peers, options, rows)
    for name in (INFINITY, CLIP_AS_SERVICE):
        _measure(name, peers, options, rows)
    figures = {what: Figures(what, rounds, less_is_better=True) for what, rounds in rows.items()}
    goals = [
        Goal(f"{name}, {what}", "<=", BASE + factor * WEIGHTS, figures[what].median(name))
        for name in (OURS, INT8, TORCH)
        for what, factor in ((FIRST, 2.5), (LATER, 1.5))
    ]
    goals += [
        Goal(f"{name}, {LOAD}", "<=", most, figures[LOAD].median(name))
        for name, most in ((OURS, 800), (INT8, 400))
    ]
    replicas = figures[LOAD].ratio(TWO_REPLICAS, OURS)
    goals.append(Goal("two replicas, memory under load, of one", "<=", 1.3, replicas))
    return Leg("ViT-B/32 (so many times ours)", [*figures.values()], goals)


def _measure(
    name: str, peers: Peers, options: Options, rows: dict[str, dict[str, list[float]]]
) -> None:
    """One server: how it starts, and what it takes under load. It is ended afterwards."""
    try:
        driver = peers.driver(name)
    except NotAvailableError as error:
        print(f"  {name}: not available: {error}", flush=True)
        return
    server = peers.started(name).server
    rows[LATER][name] = [server.peak / MEBIBYTE]
    rows[SECONDS][name] = [server.start_seconds]
    rows[READY][name] = [server.proportional_memory() / MEBIBYTE]
    server.peak = 0
    for kind, batch in BATCHES.items():
        before = server.cpu_seconds()
        answer = driver(
            "throughput",
            kind=kind,
            batch=batch,
            in_flight=4,
            seconds=options.rounds * options.seconds,
            seed=1,
        )
        used = server.cpu_seconds() - before
        rows[CPU[kind]][name] = [1000 * used / answer["items"]]
    rows[LOAD][name] = [server.peak / MEBIBYTE]
    print(f"  {name}: {server.peak / MEBIBYTE:,.0f} MiB under load", flush=True)
    server.close()
