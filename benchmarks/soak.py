"""The leg `soak`: the server under everything at once, at four fifths of its capacity."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from benchmarks.options import Options
from benchmarks.peers import EMBEDDED, Peers
from benchmarks.report import SOAK_PLOT, Figures, Goal, Leg, shown

# Between two looks at the processes, the share of the time that is warm-up, the looks whose median
# is one point, and how far a point may be from the median of all.
LOOK_SECONDS, WARM_UP_SHARE, LOOKS, FLAT = 5.0, 0.25, 12, 0.05
MEMORY, DESCRIPTORS, P99 = "memory, MiB", "descriptors", "p99, ms"
# How much more of these there may be in the last part after the warm-up than in the first:
# descriptors vary with the connections of the moment, and latency varies more.
PARTS, GROWTH = 3, {DESCRIPTORS: 1.05, P99: 1.25}

# A figure over time: minutes since the start, and its values.
Series = tuple[NDArray[np.float64], NDArray[np.float64]]


def soak(peers: Peers, options: Options) -> Leg:
    """Memory, descriptors and threads of the server's processes, and the time that calls take."""
    started = peers.started(EMBEDDED)
    visitors = peers.visitors(EMBEDDED, seconds=60 * options.minutes)
    begun, looks = time.monotonic(), []
    while visitors.poll() is None:
        minute = (time.monotonic() - begun) / 60
        looks.append((minute, started.server.memory() / 2**20, *started.server.usage()))
        if len(looks) % LOOKS == 1:
            print(f"  minute {looks[-1][0]:.1f}: {looks[-1][1]:.0f} MiB", flush=True)
        time.sleep(LOOK_SECONDS)
    answered, percentiles = visitors.communicate()[0].strip().splitlines()
    minutes, *usage = np.array(looks, np.float64).T
    series: dict[str, Series] = {
        what: (minutes, values)
        for what, values in zip((MEMORY, DESCRIPTORS, "threads"), usage, strict=True)
    }
    times, p99 = np.array(json.loads(percentiles), np.float64).T
    series[P99] = times, p99
    SOAK_PLOT.write_text(plot(series))
    warm = {what: _warm(each, options.minutes) for what, each in series.items()}
    goals = [_goal(what, each) for what, each in warm.items()]
    goals.append(Goal("tracebacks in the log", "<=", 0, started.server.errors()))
    rows = [
        Figures(
            what,
            {
                "start": [float(values[0])],
                "after warm-up": [float(warm[what][0])],
                "end": [float(values[-1])],
            },
        )
        for what, (_, values) in series.items()
    ]
    notes = [
        f"{options.minutes:g} minutes. Answered: {answered}.",
        "![Memory, descriptors, threads and p99 over time](soak.svg)",
    ]
    return Leg("all processes together", rows, goals, notes)


def _warm(series: Series, minutes: float) -> NDArray[np.float64]:
    """The values after the warm-up; at least the last."""
    times, values = series
    found = values[times > WARM_UP_SHARE * minutes]
    return found if len(found) else values[-1:]


def _goal(what: str, warm: NDArray[np.float64]) -> Goal:
    if what in GROWTH:
        growth = _growth(warm)
        return Goal(f"{what}: last third of the first, after warm-up", "<=", GROWTH[what], growth)
    return Goal(f"{what}: furthest from the median, after warm-up", "<=", FLAT, _unevenness(warm))


def _unevenness(values: NDArray[np.float64]) -> float:
    """The largest deviation of a minute's median from the overall median, as a share of it."""
    whole = len(values) // LOOKS * LOOKS
    points = np.median(values[:whole].reshape(-1, LOOKS), axis=1) if whole else values
    return float(np.abs(points / np.median(values) - 1).max())


def _growth(values: NDArray[np.float64]) -> float:
    """The median of the last part, as a share of the first's."""
    part = max(1, len(values) // PARTS)
    return float(np.median(values[-part:]) / np.median(values[:part]))


_WIDTH, _HEIGHT, _GAP, _LEFT = 640, 90, 40, 10


def plot(series: Mapping[str, Series]) -> str:
    """A panel for each figure over the minutes, from 0 to its largest value, as SVG."""
    parts, y = [], 0
    for what, (minutes, values) in series.items():
        most = float(values.max())
        y += _GAP
        across = _LEFT + minutes / max(float(minutes.max()), 1e-9) * (_WIDTH - 2 * _LEFT)
        down = y + _HEIGHT - values / (most or 1.0) * _HEIGHT
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, down, strict=True))
        parts += [
            f'<text x="{_LEFT}" y="{y - 8}" font-weight="bold">{what}: 0 to {shown(most)}, '
            f"{minutes.max():.0f} minutes</text>",
            f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH - 2 * _LEFT}" height="{_HEIGHT}" '
            'fill="none" stroke="#cbd5e1"/>',
            f'<polyline points="{points}" fill="none" stroke="#2563eb" stroke-width="1.5"/>',
        ]
        y += _HEIGHT
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 10}" '
        f'font-family="sans-serif" font-size="13">\n'
        f'<rect width="{_WIDTH}" height="{y + 10}" fill="white"/>\n{body}\n</svg>\n'
    )
