"""The fingerprint of a model: what tells whether two embeddings are comparable."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

# What encoders of one model agree to, whatever their runtime and device.
_SAME_COSINE = 0.999


@dataclass(frozen=True)
class Fingerprint:
    """Identifies the model that encoded a collection.

    name: its name, for people.
    dim: D, the length of an embedding.
    precision: `int8`, or `float` for fp32, fp16 and bf16, whose embeddings agree.
    probes: its embeddings of a fixed text and image, one after the other; empty if unknown.
        They distinguish other weights of the same name, and recognise the same under another.
    """

    name: str
    dim: int
    precision: str = "float"
    probes: tuple[float, ...] = ()

    def difference(self, other: Fingerprint) -> str | None:
        """The part in which `other` differs, in words; None: it is the same model."""
        if self.dim != other.dim:
            return f"its dimension is {self.dim}, not {other.dim} (its model is {self.name})"
        if self.precision != other.precision:
            return f"its precision is {self.precision}, not {other.precision}"
        agreement = self._agreement(other)
        if agreement is not None and agreement >= _SAME_COSINE:
            return None
        if self.name != other.name:
            return f"its model is {self.name}, not {other.name}"
        if agreement is not None:
            return (
                f"its weights differ: both are {self.name}, but their embeddings of one input "
                f"have a cosine of only {agreement:.3f}"
            )
        return None

    def _agreement(self, other: Fingerprint) -> float | None:
        """The smallest cosine of the two models' probes; None where one has none."""
        if not self.probes or not other.probes:
            return None
        return float((_unit_rows(self) * _unit_rows(other)).sum(axis=1).min())

    def to_json(self) -> str:
        """A JSON object, which `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """The fingerprint that `to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "probes": tuple(values["probes"])})


def _unit_rows(model: Fingerprint) -> NDArray[np.float64]:
    rows = np.asarray(model.probes, np.float64).reshape(-1, model.dim)
    unit: NDArray[np.float64] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit
