"""Cosines and probabilities of embeddings, for the client and the server alike."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from clip_client.proto.clip_pb2 import InfoResponse

_Float = TypeVar("_Float", np.float32, np.float64)

# Keeps a row of zeros as it is, where a division by its length would give NaN.
_MIN_LENGTH = 1e-12


def normalize(embeddings: NDArray[_Float]) -> NDArray[_Float]:
    """Scales embeddings, [N, D], to length 1. Rows of NaN stay NaN, rows of zeros stay zero."""
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit: NDArray[_Float] = embeddings / np.maximum(lengths, _MIN_LENGTH)
    return unit


def cosines(queries: NDArray[np.float32], targets: NDArray[np.float32]) -> NDArray[np.float64]:
    """[Q, D] and [T, D] -> [Q, T]; NaN where a row is NaN."""
    product: NDArray[np.float64] = _unit(queries) @ _unit(targets).T
    return product


def probabilities(
    cosine: NDArray[np.float64], logit_scale: float, logit_bias: float | None = None
) -> NDArray[np.float64]:
    """Probabilities of [Q, T] cosines, [Q, T].

    CLIP: the softmax of logit_scale * cosine over each row (Radford et al. 2021, figure 3).
    SigLIP, with a logit_bias: sigmoid(logit_scale * cosine + logit_bias), of each pair by itself
    (Zhai et al. 2023, section 3.2).
    """
    logits = logit_scale * cosine
    if logit_bias is not None:
        sigmoid: NDArray[np.float64] = 1 / (1 + np.exp(-(logits + logit_bias)))
        return sigmoid
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    scores: NDArray[np.float64] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return scores


def logit_bias_of(info: InfoResponse) -> float | None:
    """The logit bias of a model; None if it has none."""
    return info.logit_bias if info.HasField("logit_bias") else None


def _unit(embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    return normalize(embeddings.astype(np.float64))
