"""Breaks down the latency of one request."""

from __future__ import annotations

from clip_client.proto.clip_pb2 import Timings
from clip_client.results import Latency

ROUNDTRIP = "Roundtrip"

# Each line and its parent; a parent comes before its children.
_PARTS = {
    "Client-server network": ROUNDTRIP,
    "Server": ROUNDTRIP,
    "Gateway": "Server",
    "CLIPEncoder": "Server",
    "Preprocess": "CLIPEncoder",
    "Inference": "CLIPEncoder",
}


def latencies(roundtrip: float, timings: Timings) -> dict[str, Latency]:
    """The lines of the tree, from milliseconds."""
    server = timings.gateway + timings.total
    milliseconds = {
        ROUNDTRIP: roundtrip,
        "Client-server network": max(roundtrip - server, 0.0),
        "Server": server,
        "Gateway": timings.gateway,
        "CLIPEncoder": timings.total,
        "Preprocess": timings.preprocess,
        "Inference": timings.inference,
    }
    lines = {ROUNDTRIP: Latency(roundtrip, 100.0)}
    for name, above in _PARTS.items():
        whole = milliseconds[above]
        lines[name] = Latency(milliseconds[name], 100 * milliseconds[name] / whole if whole else 0)
    return lines


def show(lines: dict[str, Latency]) -> None:
    """Prints the tree."""
    from rich import print as rich_print
    from rich.tree import Tree

    trees = {ROUNDTRIP: Tree(_line(ROUNDTRIP, lines))}
    for name, above in _PARTS.items():
        trees[name] = trees[above].add(_line(name, lines))
    rich_print(trees[ROUNDTRIP])


def _line(name: str, lines: dict[str, Latency]) -> str:
    milliseconds, percent = lines[name]
    return f"{name}  [b]{milliseconds:.1f}[/b] ms  [dim]{percent:.0f} %[/dim]"
