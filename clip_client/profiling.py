"""Breaks down the latency of one request."""

from __future__ import annotations

from clip_client.proto.clip_pb2 import Timings

_ROUNDTRIP = "Roundtrip"

# Each line and its parent, which comes before its children.
_PARENTS = {
    "Client-server network": _ROUNDTRIP,
    "Server": _ROUNDTRIP,
    "Gateway-CLIP network": "Server",
    "CLIP model": "Server",
    "Preprocess": "CLIP model",
    "Inference": "CLIP model",
}


def latencies(roundtrip: float, timings: Timings) -> dict[str, float]:
    """The lines that clip-as-service has, in milliseconds."""
    server = timings.gateway + timings.total
    return {
        _ROUNDTRIP: roundtrip,
        "Client-server network": max(roundtrip - server, 0.0),
        "Server": server,
        "Gateway-CLIP network": timings.gateway,
        "CLIP model": timings.total,
    }


def show(roundtrip: float, timings: Timings) -> None:
    """Prints the tree, with the percentage that each line is of its parent."""
    from rich import print as rich_print
    from rich.tree import Tree

    lines = latencies(roundtrip, timings)
    lines |= {"Preprocess": timings.preprocess, "Inference": timings.inference}
    trees = {_ROUNDTRIP: Tree(_line(_ROUNDTRIP, roundtrip, roundtrip))}
    for name, parent in _PARENTS.items():
        trees[name] = trees[parent].add(_line(name, lines[name], lines[parent]))
    rich_print(trees[_ROUNDTRIP])


def _line(name: str, milliseconds: float, whole: float) -> str:
    percent = 100 * milliseconds / whole if whole else 0
    return f"{name}  [b]{milliseconds:.1f}[/b] ms  [dim]{percent:.0f} %[/dim]"
