"""Ranks candidates by the embeddings of a call, and stores the scores in Documents."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_client.callbacks import Batch, Callbacks, document_list, is_of_request
from clip_client.collector import Advance
from clip_client.documents import note_score
from clip_client.errors import InvalidInputError, ItemFailure
from clip_client.parameters import Parameters
from clip_client.proto import clip_pb2
from clip_client.results import Ranking
from clip_client.scores import cosines, logit_bias_of, probabilities

_PROBABILITY, _COSINE = "clip_score", "clip_score_cosine"


# An embedding, [D] float32 ([0] if it failed), or why its request failed.
Answer = NDArray[np.float32] | Exception


@dataclass
class Group:
    """A query and its candidates.

    number: its place among the groups of the call.
    start: the place of the query among the items of the call; its candidates follow.
    document: the Document whose candidates they are, if it is one.
    """

    number: int
    start: int
    query: Any
    candidates: list[Any]
    document: Any = None
    # Best first.
    rankings: list[Ranking] = field(default_factory=list)
    # The candidates that failed, by their places among those of all groups.
    failures: list[ItemFailure] = field(default_factory=list)
    # Why none is ranked.
    exception: Exception | None = None
    # Of the query, then of the candidates.
    embeddings: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))

    @property
    def size(self) -> int:
        """The number of its items."""
        return 1 + len(self.candidates)


class RankCollector:
    """Ranks the candidates of each query as soon as their embeddings have arrived.

    model: the answer to an InfoRequest; done before the first batch is added.
    source: the attribute of Documents that holds the candidates.
    documents_per_call: how many Documents the callbacks get at a time.
    """

    def __init__(
        self,
        model: Future[clip_pb2.Response],
        callbacks: Callbacks,
        parameters: Parameters,
        advance: Advance,
        source: str,
        documents_per_call: int,
    ) -> None:
        self.failures: list[ItemFailure] = []
        self.total = 0
        # Texts that were truncated to the model's context length.
        self.truncated = 0
        self.keeps = callbacks.on_done is None
        # Of the last group, best first.
        self.rankings: list[Ranking] = []
        self._model = model
        self._callbacks = callbacks
        self._parameters = parameters
        self._advance = advance
        self._source = source
        self._documents_per_call = documents_per_call
        self._waiting: deque[Group] = deque()
        self._answers: deque[Answer] = deque()
        self._failed: dict[int, ItemFailure] = {}
        # Ranked, and not passed to the callbacks yet.
        self._ranked: list[Group] = []

    def items_of(self, groups: Iterable[tuple[Any, list[Any], Any]]) -> Iterator[Any]:
        """The items of all groups: of each a query, its candidates, and its Document or None."""
        start = 0
        for number, (query, candidates, document) in enumerate(groups):
            group = Group(number, start, query, candidates, document)
            self._waiting.append(group)
            start += group.size
            yield query
            yield from candidates

    def begin(self, index: int, raw_item: Any) -> None:
        """Needs nothing of an item but its embedding."""

    def read(self, index: int, item: clip_pb2.Item) -> None:
        """Needs nothing of an item but its embedding."""

    def keep(self, batch: Batch) -> None:
        """Needs no batch after the call has failed."""

    def add(self, batch: Batch, truncated: int = 0) -> None:
        """Adds the next batch, and ranks the groups that are complete."""
        self.truncated += truncated
        self._failed.update({failure.index: failure for failure in batch.errors})
        self._answers.extend(batch.exception or row for row in batch.embeddings)
        while self._waiting and self._waiting[0].size <= len(self._answers):
            group = self._waiting.popleft()
            self._rank(group, [self._answers.popleft() for _ in range(group.size)])

    def fail(self, batch: Batch) -> bool:
        """Adds a request that failed as a whole; returns whether `on_error` handles its error."""
        if not is_of_request(batch.exception):
            return False
        self.add(batch)
        if self._callbacks.on_error is None:
            self.finish()
            return False
        return True

    def finish(self) -> None:
        """Passes the groups that are left to the callbacks."""
        groups, self._ranked = self._ranked, []
        if not groups:
            return
        batch = self._batch(groups)
        self._advance(len(batch))
        good = [group for group in groups if group.exception is None]
        self._callbacks.call(batch, self._batch(good) if good else None)

    def _rank(self, group: Group, answers: list[Answer]) -> None:
        broken = [answer for answer in answers if isinstance(answer, Exception)]
        rows = [answer for answer in answers if not isinstance(answer, Exception)]
        if broken:
            group.exception = broken[0]
        elif failure := self._failed.get(group.start):
            group.exception = InvalidInputError(
                f"the query cannot be encoded: {failure.message} (the query is {failure.item})"
            )
            if self._callbacks.on_error is None:
                raise group.exception
        else:
            self._score(group, rows)
        self.total += len(group.candidates)
        self.failures += group.failures
        self.rankings = group.rankings
        self._ranked.append(group)
        if len(self._ranked) == self._documents_per_call:
            self.finish()

    def _score(self, group: Group, rows: list[NDArray[np.float32]]) -> None:
        good = []
        for index in range(len(group.candidates)):
            if failure := self._failed.get(group.start + 1 + index):
                place = group.start - group.number + index
                group.failures.append(replace(failure, index=place))
            else:
                good.append(index)
        group.embeddings = np.full((group.size, len(rows[0])), np.nan, np.float32)
        for row in (0, *(1 + index for index in good)):
            group.embeddings[row] = rows[row]
        cosine = cosines(group.embeddings[:1], group.embeddings[[1 + index for index in good]])
        info = self._model.result().info
        scores = probabilities(cosine, info.logit_scale, logit_bias_of(info))
        group.rankings = [
            Ranking(
                good[best],
                group.candidates[good[best]],
                float(scores[0, best]),
                float(cosine[0, best]),
            )
            for best in np.argsort(-cosine[0], kind="stable")
        ]
        if group.document is not None:
            _order(group, getattr(group.document, self._source))

    def _batch(self, groups: Sequence[Group]) -> Batch:
        first = groups[0]
        if first.document is None:
            indices: Sequence[int] = range(len(first.candidates))
            embeddings, docs = first.embeddings[1:], first.rankings
        else:
            indices = [group.number for group in groups]
            docs = document_list([group.document for group in groups])
            dim = max(group.embeddings.shape[1] for group in groups)
            embeddings = np.full((len(groups), dim), np.nan, np.float32)
            for row, group in enumerate(groups):
                if group.exception is None:
                    embeddings[row] = group.embeddings[0]
        return Batch(
            indices,
            embeddings,
            [failure for group in groups for failure in group.failures],
            next((group.exception for group in groups if group.exception), None),
            docs,
            self._parameters.given,
            "/rank",
        )


def _order(group: Group, candidates: Any) -> None:
    """Stores the scores in the Documents and sorts them, best first; those that failed are last."""
    for ranking in group.rankings:
        note_score(ranking.item, _PROBABILITY, ranking.probability)
        note_score(ranking.item, _COSINE, ranking.cosine)
    places = [ranking.index for ranking in group.rankings]
    failed = sorted(set(range(len(group.candidates))) - set(places))
    candidates[:] = [group.candidates[index] for index in places + failed]
