"""Scores between embeddings."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def cosine(query: NDArray[np.float32], candidates: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosines of one embedding [D] with each of [N, D], as [N]."""
    norms = np.linalg.norm(candidates, axis=1) * np.linalg.norm(query)
    result: NDArray[np.float32] = (candidates @ query) / np.maximum(norms, 1e-12)
    return result


def softmax(cosines: NDArray[np.float32], logit_scale: float) -> NDArray[np.float32]:
    """Probabilities [N] over the candidates: softmax(logit_scale * cosine), as CLIP defines
    its logits (Radford et al. 2021, figure 3)."""
    if not len(cosines):
        return cosines
    logits = logit_scale * cosines
    exponentials = np.exp(logits - logits.max())
    result: NDArray[np.float32] = exponentials / exponentials.sum()
    return result


def normalize(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Embeddings [N, D] scaled to length 1; rows of NaN stay so."""
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    result: NDArray[np.float32] = embeddings / np.maximum(norms, 1e-12)
    return result
