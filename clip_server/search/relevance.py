"""Calibrated relevance: how far a score stands out from those of the collection's other rows.

Cosines of a text with images lie in a narrow band that moves with the text, so no fixed cutoff
says that nothing matches. What does is the query's own scores with a sample of the collection: a
hit is relevant if the best of so many unrelated rows would hardly score as high.
"""

from __future__ import annotations

import math
import threading
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from clip_server.search.rows import MODALITIES
from clip_server.search.store import Hit, Metric, Modality, Store, Target, Vectors

# Rows a query is compared with, and the fewest that say anything.
_SAMPLE, _FEWEST = 1000, 8
# A sample is drawn anew when the collection has changed by this part.
_DRAWN_AGAIN = 0.1
_NORMAL = NormalDist()


class Background:
    """A sample of a collection's rows, by modality. Safe to use from several threads."""

    def __init__(self, store: Store, metric: Metric) -> None:
        self._store, self._metric = store, metric
        self._drawn: dict[Modality, tuple[int, Vectors]] = {}
        self._lock = threading.Lock()

    def relevances(self, query: Vectors, hits: list[Hit]) -> list[float | None]:
        """The relevance of each hit of a query, from 0 to 1; None where the collection has too
        few rows of the hit's modality. query: [D]."""
        by_modality = {
            modality: self._scores(query, modality)
            for modality in MODALITIES
            if any(hit.modality == modality for hit in hits)
        }
        sign = -1.0 if self._metric == "L2" else 1.0
        return [relevance(sign * hit.score, *by_modality[hit.modality]) for hit in hits]

    def _scores(self, query: Vectors, modality: Modality) -> tuple[NDArray[np.float64], int]:
        """The query's scores with the sample, larger is closer, and the number of rows."""
        rows, sample = self._sample(modality)
        if self._metric == "L2":
            return -np.linalg.norm(sample - query, axis=1).astype(np.float64), rows
        scores = (sample @ query).astype(np.float64)
        if self._metric == "COSINE":
            scores /= np.maximum(
                np.linalg.norm(sample, axis=1) * np.linalg.norm(query), np.finfo(np.float32).tiny
            )
        return scores, rows

    def _sample(self, modality: Modality) -> tuple[int, Vectors]:
        target: Target = "texts" if modality == "text" else "images"
        rows = self._store.count(target=target)
        with self._lock:
            drawn, sample = self._drawn.get(modality, (0, None))
            if sample is None or abs(rows - drawn) > _DRAWN_AGAIN * drawn:
                sample = self._store.sample(modality, _SAMPLE)
                self._drawn[modality] = (rows, sample)
        return rows, sample


def relevance(score: float, background: NDArray[np.float64], rows: int) -> float | None:
    """The probability that the best of `rows` unrelated rows scores lower than a hit.

    background: scores of the query with a sample of the rows, larger is closer. The hit itself
        and a few others that match may be among them: the best are left out.
    """
    if len(background) < _FEWEST:
        return None
    unrelated = np.sort(background)[: -max(1, len(background) // 20)]
    deviation = standard_score(score, unrelated)
    below = _NORMAL.cdf(deviation)
    return below ** max(rows, 1) if below > 0 else 0.0


def standard_score(score: float, unrelated: NDArray[np.float64]) -> float:
    """The number of standard deviations that a score lies above the mean of others, as of a normal
    distribution: few others make it smaller, since they say little of the deviation."""
    spread = float(unrelated.std(ddof=1)) or 1e-9
    deviation = (score - float(unrelated.mean())) / spread
    freedom = len(unrelated) - 1
    # Wallace's approximation of Student's t.
    size = math.sqrt(freedom * math.log1p(deviation**2 / freedom))
    return math.copysign(size * (8 * freedom + 1) / (8 * freedom + 3), deviation)
