"""Retrieval and classification scores of embeddings. All are shares of 1.

Every score is a function of ranks: how many wrong answers stand before a query's first right
one, by cosine. **Ties count against the model**: a wrong answer that scores the same as the
right one stands before it. So a model that gives everything the same vector gets 0, and two
captions with the same words, of two pictures, cost each other a place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_client.scores import normalize

# Cosines nearer than this are equal. Equal embeddings, in float64, differ by 1e-16 or so with
# their place in a matrix product; different ones, in float32, by 1e-8 at least.
TIE = 1e-9
# Cosines held at once, in float64: 32 MB, however many queries and targets there are.
BLOCK = 1 << 22
RECALLS_AT = (1, 5, 10)


def ranks(
    queries: NDArray[np.float32],
    targets: NDArray[np.float32],
    query_groups: NDArray[Any],
    target_groups: NDArray[Any],
) -> NDArray[np.int64]:
    """How many wrong answers stand before the first right one: [Q], 0 the best.

    queries, targets: [Q, D] and [T, D], of any length.
    query_groups, target_groups: [Q] and [T]; a target is right where its group is the query's,
        and each query has one at least.
    """
    unit_queries, unit_targets = (normalize(rows).astype(np.float64) for rows in (queries, targets))
    found = np.empty(len(queries), np.int64)
    size = max(1, BLOCK // max(1, len(targets)))
    for start in range(0, len(queries), size):
        rows = slice(start, start + size)
        cosines = unit_queries[rows] @ unit_targets.T
        right = query_groups[rows, None] == target_groups
        best = np.max(cosines, axis=1, keepdims=True, initial=-np.inf, where=right)
        found[rows] = ((cosines >= best - TIE) & ~right).sum(axis=1)
    return found


def retrieval(
    images: NDArray[np.float32], texts: NDArray[np.float32], image_of: NDArray[np.int64]
) -> dict[str, float]:
    """R@1, R@5, R@10 and mean reciprocal rank, both ways, and the mean of the six recalls.

    images, texts: [N, D] and [T, D].
    image_of: [T], for each text the row of its image. An image may have several texts: it is
        found by each, and any of them is a right answer to it.
    """
    numbers = np.arange(len(images))
    scores: dict[str, float] = {}
    for way, found in (
        ("text to image", ranks(texts, images, image_of, numbers)),
        ("image to text", ranks(images, texts, numbers, image_of)),
    ):
        scores |= {f"{way} R@{k}": float((found < k).mean()) for k in RECALLS_AT}
        scores[f"{way} MRR"] = float((1 / (1 + found)).mean())
    recalls = [score for name, score in scores.items() if "R@" in name]
    return {**scores, "mean recall": float(np.mean(recalls))}


def zero_shot(
    images: NDArray[np.float32], classes: NDArray[np.float32], class_of: NDArray[np.int64]
) -> dict[str, float]:
    """Top-1 and top-5 accuracy of images [N, D] whose right classes are rows of classes [C, D]."""
    found = ranks(images, classes, class_of, np.arange(len(classes)))
    return {f"top-{k}": float((found < k).mean()) for k in (1, 5)}


def ensemble(prompts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Classes [C, D] from the embeddings [C, T, D] of their prompts: the mean of those at length
    1, at length 1 again, as OpenAI made CLIP's zero-shot classifiers (Radford et al. 2021,
    section 3.1.4)."""
    count, templates, dim = prompts.shape
    units = normalize(prompts.reshape(-1, dim)).reshape(count, templates, dim)
    mean: NDArray[np.float32] = units.mean(axis=1)
    return normalize(mean)
