"""Figures and goals: as lines, as JSON, and as docs/benchmarks.md with its plot."""

from __future__ import annotations

import json
import platform
import re
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import environments
from benchmarks.peers import CLIP_AS_SERVICE, INFINITY, INT8, OURS, RAW
from benchmarks.workload import CACHE

RESULTS = CACHE / "results.json"
# Drawn by the soak.
SOAK_PLOT = CACHE / "soak.svg"
DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True)
class Figures:
    """One row of a table: a figure of each round, by column.

    less_is_better: a latency, not a rate.
    """

    what: str
    rounds: dict[str, list[float]]
    less_is_better: bool = False

    def median(self, column: str) -> float:
        return statistics.median(self.rounds[column])

    def ratio(self, one: str, other: str) -> float | None:
        """The median over rounds of one's figure over the other's; None where one is missing."""
        if one not in self.rounds or other not in self.rounds:
            return None
        pairs = zip(self.rounds[one], self.rounds[other], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def cell(self, column: str) -> str:
        """`131 (1.62)`: the median, and how many times better than this we are."""
        if column not in self.rounds:
            return "–"
        figure = shown(self.median(column))
        ratio = self.ratio(OURS, column)
        if ratio is None or column == OURS:
            return figure
        return f"{figure} ({1 / ratio if self.less_is_better else ratio:.2f})"


@dataclass(frozen=True)
class Goal:
    """A bound on a figure. relation: `>=` or `<=`. figure: None where it was not measured."""

    what: str
    relation: str
    bound: float
    figure: float | None

    def line(self) -> list[str]:
        """The cells of its row: goal, figure, whether met."""
        wanted = f"{self.relation} {shown(self.bound)}".replace(">=", "≥").replace("<=", "≤")
        if self.figure is None:
            return [self.what, wanted, "–", "not measured"]
        met = self.figure >= self.bound if self.relation == ">=" else self.figure <= self.bound
        return [self.what, wanted, shown(self.figure), "yes" if met else "**no**"]


@dataclass(frozen=True)
class Leg:
    """The results of one leg.

    first: the heading of the first column.
    notes: lines to be read with the table.
    """

    first: str
    figures: list[Figures]
    goals: list[Goal]
    notes: list[str] = field(default_factory=list)

    def table(self) -> list[list[str]]:
        columns = list(dict.fromkeys(each for row in self.figures for each in row.rounds))
        rows = [[row.what, *map(row.cell, columns)] for row in self.figures]
        return [[self.first, *columns], *rows]


def shown(value: float) -> str:
    """A figure with three or four digits that mean something."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0.99 < value < 1:  # a cosine
        return f"{value:.5f}"
    return f"{value:.3g}"


def markdown(rows: Iterable[list[str]]) -> str:
    heading, *rest = rows
    lines = [heading, ["---"] * len(heading), *rest]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


_GOALS = "Goals"
GOAL_COLUMNS = ["goal", "wanted", "measured", "met"]


def show(leg: Leg) -> None:
    """Prints a leg's table and goals."""
    parts = [markdown(leg.table())]
    parts += [markdown([GOAL_COLUMNS, *(goal.line() for goal in leg.goals)])] if leg.goals else []
    print("\n\n".join(["", *parts, *leg.notes]), flush=True)


def save(name: str, leg: Leg, how: str) -> None:
    """Adds a leg to the results, in place of what it gave before."""
    results = load()
    found = {"date": time.strftime("%Y-%m-%d"), "how": how, "where": machine(), **asdict(leg)}
    results[name] = found
    RESULTS.write_text(json.dumps(results, indent=1))


def load() -> dict[str, Any]:
    """The results so far, by leg."""
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}


def _leg(saved: dict[str, Any]) -> Leg:
    figures = [Figures(**each) for each in saved["figures"]]
    return Leg(saved["first"], figures, [Goal(**each) for each in saved["goals"]], saved["notes"])


def write_docs(order: Iterable[str]) -> None:
    """Puts the results so far into docs/benchmarks.md, between its marks, and the plot beside.

    The page keeps its sections and goals of legs without results, such as those of another machine.

    order: of the legs, by name.
    """
    results = load()
    legs = {name: _leg(results[name]) for name in order if name in results}
    page = DOCS / "benchmarks.md"
    before, _, rest = page.read_text("utf-8").partition(BEGIN)
    measured, _, after = rest.partition(END)
    above, kept = _sections(measured)
    usual = machine() if kept.keys() - {_GOALS} <= legs.keys() else above
    goals, parts = [["leg", *GOAL_COLUMNS]], []
    for name in order:
        if leg := legs.get(name):
            goals += [[name, *goal.line()] for goal in leg.goals]
            parts += [f"### {name}", _circumstances(results[name], usual)]
            parts += [markdown(leg.table()), *leg.notes]
        elif name in kept:
            goals += [cells for cells in _cells(kept[_GOALS]) if cells[0] == name]
            parts += [f"### {name}", kept[name]]
    parts = [before + BEGIN, usual, f"### {_GOALS}", markdown(goals), *parts, END]
    page.write_text("\n\n".join(parts) + after)
    if {"texts", "photos"} <= legs.keys():
        (DOCS / "benchmarks.svg").write_text(plot(legs))
    if SOAK_PLOT.is_file():
        (DOCS / SOAK_PLOT.name).write_text(SOAK_PLOT.read_text())


def _circumstances(saved: dict[str, Any], usual: str) -> str:
    """When and how a leg was measured, and where, unless that is the usual machine."""
    elsewhere = f" {saved['where']}" if saved["where"] != usual else ""
    return f"{saved['date']}, {saved['how']}.{elsewhere}"


def _sections(measured: str) -> tuple[str, dict[str, str]]:
    """What a page has above its headings, and under each."""
    above, *parts = map(str.strip, re.split(r"^### (.+)$", measured, flags=re.MULTILINE))
    return above, dict(zip(parts[::2], parts[1::2], strict=True))


def _cells(table: str) -> list[list[str]]:
    """The rows of a table, as `markdown` takes them."""
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


def machine() -> str:
    """The machine and the versions that were measured."""
    memory = psutil.virtual_memory().total / 2**30
    here = f"{_processor()}, {psutil.cpu_count()} cores, {memory:.0f} GiB"
    peers = [("infinity", "infinity_emb"), ("clip-as-service", "clip-server"), ("torch", "torch")]
    versions = ", ".join(f"{name} {environments.version(package)}" for name, package in peers)
    return f"{here}; Python {platform.python_version()}; {versions}."


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text("utf-8").splitlines() if cpus.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())


_COLOURS = {OURS: "#2563eb", INT8: "#7aa2f7", INFINITY: "#94a3b8", CLIP_AS_SERVICE: "#cbd5e1"}
_BAR, _LABELS, _LONGEST, _WIDTH = 22, 150, 400, 640


def plot(legs: dict[str, Leg]) -> str:
    """Bars of the texts and photos a second of each, as SVG."""
    parts, y = [], 0
    for row in [row for name in ("texts", "photos") if name in legs for row in legs[name].figures]:
        columns = [each for each in (*_COLOURS, RAW) if each in row.rounds and each != RAW]
        most = max(map(row.median, columns))
        y += 24
        parts.append(f'<text x="0" y="{y}" font-weight="bold">{row.what}</text>')
        y += 8
        for column in columns:
            value = row.median(column)
            length = _LONGEST * value / most
            parts += [
                f'<text x="{_LABELS - 8}" y="{y + 15}" text-anchor="end">{column}</text>',
                f'<rect x="{_LABELS}" y="{y}" width="{length:.0f}" height="{_BAR - 4}" '
                f'fill="{_COLOURS[column]}"/>',
                f'<text x="{_LABELS + length + 6:.0f}" y="{y + 15}">{shown(value)}</text>',
            ]
            y += _BAR
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 8}" '
        f'font-family="sans-serif" font-size="13">\n'
        f'<rect width="{_WIDTH}" height="{y + 8}" fill="white"/>\n{body}\n</svg>\n'
    )
