"""Retrieval and classification scores of embeddings, from 0 to 1.

Every score is a function of ranks: the number of wrong answers that precede a query's first right
one, by cosine. **Ties count against the model**: a wrong answer that scores the same as the
right one precedes it. So a model that embeds everything alike scores 0, and the same caption for
two images lowers the rank of both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_client.quantization import quantize
from clip_client.scores import normalize
from clip_server.search.relevance import Unrelated

# Cosines closer than this are equal. Equal embeddings, in float64, differ by 1e-16 or so with
# their place in a matrix product; different ones, in float32, by 1e-8 at least.
TIE = 1e-9
# Cosines in memory together, in float64: 32 MB, whatever the number of queries and targets.
BLOCK = 1 << 22
RECALLS_AT = (1, 5, 10)
NEIGHBOURS = 10


def ranks(
    queries: NDArray[np.float32],
    targets: NDArray[np.float32],
    query_groups: NDArray[Any],
    target_groups: NDArray[Any],
) -> NDArray[np.int64]:
    """Counts the wrong answers that precede the first right one: [Q], 0 is the best.

    queries, targets: [Q, D] and [T, D], normalised or not.
    query_groups, target_groups: [Q] and [T]; a target is right if its group is the query's, and
        each query has at least one.
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
    """Recall at 1, 5 and 10 and the mean reciprocal rank, in both directions, and the mean of the
    six recalls.

    images, texts: [N, D] and [T, D].
    image_of: [T], the row of each text's image. An image may have several texts: each is a query
        for it, and any of them is a right answer to it.
    """
    numbers = np.arange(len(images))
    scores: dict[str, float] = {}
    for direction, found in (
        ("text to image", ranks(texts, images, image_of, numbers)),
        ("image to text", ranks(images, texts, numbers, image_of)),
    ):
        scores |= {f"{direction} R@{k}": float((found < k).mean()) for k in RECALLS_AT}
        scores[f"{direction} MRR"] = float((1 / (1 + found)).mean())
    recalls = [score for name, score in scores.items() if "R@" in name]
    return {**scores, "mean recall": float(np.mean(recalls))}


def kept_neighbours(queries: NDArray[np.float32], targets: NDArray[np.float32]) -> dict[str, float]:
    """The share of each query's nearest targets, by float32, that are also its nearest by the
    embeddings in 8 bits (cosine) and in 1 bit (Hamming distance)."""
    exact = _nearest(queries, targets)
    shares = {}
    for kind in ("int8", "binary"):
        found = _nearest(*(_as_compared(rows, kind) for rows in (queries, targets)))
        kept = (exact[:, :, None] == found[:, None]).any(axis=2)
        shares[f"{kind} neighbours @{NEIGHBOURS}"] = float(kept.mean())
    return shares


def _as_compared(embeddings: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """Quantized embeddings as floats whose cosines order them as they are compared."""
    rows = quantize(embeddings, "ubinary" if kind == "binary" else kind)
    if kind == "binary":
        # The cosine of rows of 1 and -1 falls as their Hamming distance grows.
        rows = 2 * np.unpackbits(rows, axis=1, count=embeddings.shape[1]).astype(np.int8) - 1
    return rows.astype(np.float32)


def _nearest(queries: NDArray[np.float32], targets: NDArray[np.float32]) -> NDArray[np.int64]:
    """The rows of each query's nearest targets by cosine, at most `NEIGHBOURS` of them."""
    unit_queries, unit_targets = (normalize(rows) for rows in (queries, targets))
    size = max(1, BLOCK // max(1, len(targets)))
    cosines = (unit_queries[at : at + size] @ unit_targets.T for at in range(0, len(queries), size))
    return np.concatenate(
        [np.argsort(-each, axis=1, kind="stable")[:, :NEIGHBOURS] for each in cosines]
    )


def presence(
    images: NDArray[np.float32],
    texts: NDArray[np.float32],
    image_of: NDArray[np.int64],
    probe: NDArray[np.float32],
) -> dict[str, float]:
    """ROC AUC of telling texts whose image is in a collection from those whose image is not, by
    the cosine and by the relevance of the best match: 0.5 is a guess.

    images, texts, image_of: as for `retrieval`. Every other image is in the collection, then the
        others are.
    probe: [D], the model's embedding of the text that relevance compares with.
    """
    queries = normalize(np.vstack([texts, probe[None]])).astype(np.float64)
    cosines = queries @ normalize(images).astype(np.float64).T
    best: list[tuple[float, float]] = []
    present: list[bool] = []
    for start in (0, 1):
        *found, probed = cosines[:, start::2]
        for row, query in zip(image_of, found, strict=True):
            score = float(query.max())
            unrelated = Unrelated.fitted(query, probed, len(query))
            best.append((score, unrelated.relevance(score) if unrelated else 0.0))
            present.append(row % 2 == start)
    labels = np.array(present)
    by_cosine, by_relevance = np.array(best).T
    return {
        "best cosine ROC AUC": roc_auc(by_cosine[labels], by_cosine[~labels]),
        "best relevance ROC AUC": roc_auc(by_relevance[labels], by_relevance[~labels]),
    }


def roc_auc(positives: NDArray[np.float64], negatives: NDArray[np.float64]) -> float:
    """The probability that a positive scores higher than a negative; ties count half."""
    ordered = np.sort(negatives)
    lower, higher = (np.searchsorted(ordered, positives, side) for side in ("left", "right"))
    return float((lower + higher).mean() / (2 * len(negatives)))


def zero_shot(
    images: NDArray[np.float32], classes: NDArray[np.float32], class_of: NDArray[np.int64]
) -> dict[str, float]:
    """Top-1 and top-5 accuracy of images [N, D] whose right classes are rows of classes [C, D]."""
    found = ranks(images, classes, class_of, np.arange(len(classes)))
    return {f"top-{k}": float((found < k).mean()) for k in (1, 5)}


def ensemble(prompts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Embeddings of classes [C, D] from those of their prompts [C, T, D]: normalised, averaged and
    normalised again, as in CLIP's zero-shot classifiers (Radford et al. 2021, section 3.1.4)."""
    count, templates, dim = prompts.shape
    units = normalize(prompts.reshape(-1, dim)).reshape(count, templates, dim)
    mean: NDArray[np.float32] = units.mean(axis=1)
    return normalize(mean)
