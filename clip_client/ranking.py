"""The scores of `rank` on Documents: candidates in `.matches`, as clip-as-service has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clip_client.results import Ranking

_PROBABILITY, _COSINE = "clip_score", "clip_score_cosine"


def order_matches(document: Any, rankings: Sequence[Ranking]) -> None:
    """Writes the scores into the matches and sorts `document.matches`, best first.

    Matches that failed have no ranking; they come last, without scores.
    """
    matches = list(document.matches)
    for ranking in rankings:
        _score(ranking.item, _PROBABILITY, ranking.probability)
        _score(ranking.item, _COSINE, ranking.cosine)
    places = [ranking.index for ranking in rankings]
    failed = [index for index in range(len(matches)) if index not in set(places)]
    document.matches[:] = [matches[index] for index in places + failed]


def _score(match: Any, name: str, value: float) -> None:
    """Into `.scores`, docarray v1's table of NamedScore or a dict, else into the dict `.tags`."""
    scores = getattr(match, "scores", None)
    if scores is None:
        scores = match.tags
    try:
        scores[name].value = value
    except (KeyError, AttributeError):
        scores[name] = value
