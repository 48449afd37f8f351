"""What the ensembles of NVIDIA's Triton cost, by its own statistics."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from typing import Any

# The models of an ensemble in their order: preprocessing, then the tower.
MEMBERS = {
    "text_embedding": ("clip_text", "clip_textual"),
    "image_embedding": ("clip_image", "clip_visual"),
}
# Triton counts a request a little after it has answered it.
SETTLING_SECONDS = 1.0


def stages(url: str, ensemble: str, work: Callable[[], object]) -> str:
    """A sentence on the mean time of an ensemble's requests, and where Triton spends it.

    url: of Triton's HTTP port.
    work: sends requests to the ensemble and returns when they are answered.
    """
    before = _statistics(url, ensemble)
    work()
    after = _statistics(url, ensemble)

    def milliseconds(model: str, stage: str) -> float:
        count, nanoseconds = (
            after[model][stage][figure] - before[model][stage][figure] for figure in ("count", "ns")
        )
        return float(nanoseconds / 1e6 / max(count, 1))

    whole = milliseconds(ensemble, "success")
    parts = {model: milliseconds(model, "compute_infer") for model in MEMBERS[ensemble]}
    shares = ", ".join(f"{part:.2f} in `{model}`" for model, part in parts.items())
    return (
        f"Triton's own statistics, one item in flight: a request of `{ensemble}` takes "
        f"{whole:.2f} ms, {shares}. The ensemble itself, which queues and copies between them, "
        f"costs {whole - sum(parts.values()):.2f} ms."
    )


def _statistics(url: str, ensemble: str) -> dict[str, Any]:
    """The statistics of an ensemble and of its members, by model."""
    time.sleep(SETTLING_SECONDS)
    found = {}
    for model in (ensemble, *MEMBERS[ensemble]):
        with urllib.request.urlopen(f"{url}/v2/models/{model}/stats") as answer:
            found[model] = json.loads(answer.read())["model_stats"][0]["inference_stats"]
    return found
