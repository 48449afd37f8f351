"""Calibrated relevance: how far a score stands out from those of the collection's other rows.

Cosines of a text with images lie in a narrow band that moves with the text, so no fixed cutoff
says that nothing matches. What does is the query's own scores with a sample of the collection: a
hit is relevant if the best of so many unrelated rows would hardly score as high.

A query says where its band lies, but little of how wide it is: where something matches, much is
similar, and the band is wide for that reason. Its width is therefore that of a fixed query, the
model's probe of the same modality.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from clip_server.search.fingerprint import Fingerprint
from clip_server.search.store import Hit, Metric, Modality, Store, Target, Vectors

# Rows a query is compared with, and the fewest that say anything.
SAMPLE, FEWEST = 1000, 8
# A sample is drawn anew when the collection has changed by this part.
_DRAWN_AGAIN = 0.1
_NORMAL = NormalDist()


class Background:
    """A sample of a collection's rows, by modality. Safe to use from several threads."""

    def __init__(self, store: Store, metric: Metric) -> None:
        self._store, self._metric = store, metric
        self._probes = _probes(store.model)
        self._drawn: dict[Modality, tuple[int, Vectors]] = {}
        self._lock = threading.Lock()

    def relevances(
        self, query: Vectors, modality: Modality | None, hits: list[Hit]
    ) -> list[float | None]:
        """The relevance of each hit of a query, from 0 to 1; None where the collection has too
        few rows of the hit's modality.

        query: [D]. modality: its own; None if unknown, so that its width is its own, too.
        """
        probe = self._probes.get(modality, query) if modality else query
        probe = probe * (np.linalg.norm(query) / np.linalg.norm(probe))
        sign = -1.0 if self._metric == "L2" else 1.0
        pair = np.stack([query, probe])
        unrelated = {
            each: Unrelated.fitted(*self._scores(pair, each))
            for each in {hit.modality for hit in hits}
        }
        return [
            found.relevance(sign * hit.score) if (found := unrelated[hit.modality]) else None
            for hit in hits
        ]

    def _scores(
        self, pair: Vectors, modality: Modality
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        """Scores of a query and of its probe [2, D] with the sample, larger is closer, and the
        number of rows."""
        rows, sample = self._sample(modality)
        if self._metric == "L2":
            scores = -np.linalg.norm(sample[:, None] - pair, axis=2).astype(np.float64)
        else:
            scores = (sample @ pair.T).astype(np.float64)
        if self._metric == "COSINE":
            norms = np.linalg.norm(sample, axis=1, keepdims=True) * np.linalg.norm(pair, axis=1)
            scores /= np.maximum(norms, np.finfo(np.float32).tiny)
        return scores[:, 0], scores[:, 1], rows

    def _sample(self, modality: Modality) -> tuple[int, Vectors]:
        target: Target = "texts" if modality == "text" else "images"
        rows = self._store.count(target=target)
        with self._lock:
            drawn, sample = self._drawn.get(modality, (0, None))
            if sample is None or abs(rows - drawn) > _DRAWN_AGAIN * drawn:
                sample = self._store.sample(modality, SAMPLE)
                self._drawn[modality] = (rows, sample)
        return rows, sample


def _probes(model: Fingerprint) -> dict[Modality, Vectors]:
    """The embeddings of the fixed text and image; none where the model's are unknown."""
    if not model.probes:
        return {}
    text, image = np.asarray(model.probes, np.float32).reshape(2, model.dim)
    return {"text": text, "image": image}


@dataclass(frozen=True)
class Unrelated:
    """The normal distribution of a query's scores with rows that are unrelated to it.

    rows: how many there are.
    """

    mean: float
    deviation: float
    rows: int

    @classmethod
    def fitted(
        cls, background: NDArray[np.float64], probe: NDArray[np.float64], rows: int
    ) -> Unrelated | None:
        """The distribution by a sample of the rows; None if that is too small.

        background: scores of the query with the sample, larger is closer. A few rows that match
            may be among them: the best are left out.
        probe: scores of a fixed query with the sample, whose standard deviation is taken.
        """
        if len(background) < FEWEST:
            return None
        deviation = float(probe.std(ddof=1)) or 1e-9
        # From the next best, since the tail of the unrelated is what a hit is compared with.
        first, last = _next_best(len(background))
        tail = float(np.sort(background)[::-1][first:last].mean())
        return cls(tail - deviation * _expected(len(background)), deviation, max(rows, 1))

    def relevance(self, score: float) -> float:
        """The probability that the best of the unrelated rows scores lower than a hit."""
        return _NORMAL.cdf((score - self.mean) / self.deviation) ** self.rows


def _next_best(count: int) -> tuple[int, int]:
    """The ranks, from the best, of those that stand for the unrelated: a tenth of all, after the
    twentieth part that may match."""
    first = max(1, count // 20)
    return first, first + max(3, count // 10)


@cache
def _expected(count: int) -> float:
    """The mean of the next best of so many standard normal values, by Blom's approximation of
    their expectations."""
    ranks = range(*_next_best(count))
    values = [_NORMAL.inv_cdf(1 - (rank + 1 - 0.375) / (count + 0.25)) for rank in ranks]
    return sum(values) / len(values)
