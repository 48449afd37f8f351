"""clip.v1 on top of the engine: one request message in, one response message out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from clip_client import scores
from clip_client.data_uri import has_scheme, read_data_uri
from clip_client.proto import clip_pb2 as pb
from clip_server import __version__
from clip_server.engine.engine import Encoded, Engine, Item
from clip_server.engine.fetcher import Fetcher
from clip_server.errors import ItemError, RequestError
from clip_server.models import zoo
from clip_server.rpc.errors import FAILED, check_count, error_response
from clip_server.rpc.items import item_errors
from clip_server.rpc.metrics import to_text

log = logging.getLogger(__name__)

_LEAST_SECONDS = 0.001


@dataclass(frozen=True)
class Limits:
    """Limits on a request. The gateway limits the bytes of a whole message.

    max_item_bytes: size of one text or encoded image.
    max_request_items: items of one message or HTTP body.
    """

    max_item_bytes: int = 32 << 20
    max_request_items: int = 10_000


@dataclass(frozen=True)
class Ranked:
    """Candidates sorted by their score against a query.

    matches: sorted by descending score, without the candidates that failed.
    errors: messages by index, for the candidates that failed.
    encoded: the result for the query and the candidates.
    """

    matches: list[pb.Match]
    errors: dict[int, str]
    encoded: Encoded


class Service:
    """Answers clip.v1 requests. Use it from the engine's event loop.

    modality: the one that it encodes, `text` or `image`; None: both.
    fetcher: of URIs other than `data:`; None: they are refused.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits | None = None,
        modality: str | None = None,
        fetcher: Fetcher | None = None,
    ) -> None:
        self.engine, self.modality = engine, modality
        self.limits = limits or Limits()
        self._fetcher = fetcher

    async def handle(self, request: pb.Request) -> pb.Response:
        """Answers `request`. Errors are in the response: none that a client can cause is raised.

        The items to encode are copies of what the message holds. It is released before they are
        computed, by all callers: images would be in memory twice.
        """
        response = pb.Response(id=request.id)
        try:
            kind = request.WhichOneof("body")
            timeout = request.timeout / 1e3 or None
            if kind == "encode":
                encoding = self._encode(request.encode, timeout, response.encode)
                del request
                await encoding
            elif kind == "rank":
                ranking = self._rank(request.rank, timeout, response.rank)
                del request
                await ranking
            elif kind == "info":
                response.info.CopyFrom(self._info())
            elif kind == "metrics":
                response.metrics.counts.update(self.engine.metrics.counts())
                if request.metrics.text:
                    response.metrics.text = to_text(self.engine.metrics.registry)
            else:
                raise RequestError("an empty request: it holds one of encode, rank or info")
        except RequestError as error:
            return error_response(response.id, error)
        except Exception:
            log.exception("a request failed")
            return error_response(response.id, RequestError(FAILED, "INTERNAL"))
        return response

    async def _encode(
        self, request: pb.EncodeRequest, timeout: float | None, response: pb.EncodeResponse
    ) -> None:
        check_count(len(request.items), self.limits.max_request_items)
        minibatch_size, normalize = request.options.minibatch_size, request.options.normalize
        items, timeout = await self._to_items(request.items, timeout)
        del request  # see `handle`
        encoding = self.engine.encode(items, minibatch_size=minibatch_size, timeout=timeout)
        del items  # see `Engine.encode`
        encoded = await encoding
        embeddings = encoded.embeddings
        if normalize:
            embeddings = scores.normalize(embeddings)
        response.embeddings = embeddings.astype("<f4", copy=False).tobytes()
        response.count, response.dim = embeddings.shape
        response.errors.extend(item_errors(encoded.errors))
        response.truncated, response.tokens = len(encoded.truncated_items), encoded.tokens
        response.truncated_items.extend(encoded.truncated_items)
        _set_timings(response.timings, encoded)

    async def rank(
        self, query: Item, candidates: Sequence[Item], timeout: float | None = None
    ) -> Ranked:
        """Scores each candidate against the query.

        Raises:
            RequestError: the query failed; or as `Engine.encode` does.
        """
        count = len(candidates)
        encoding = self.engine.encode([query, *candidates], timeout=timeout)
        del query, candidates  # see `Engine.encode`
        encoded = await encoding
        if 0 in encoded.errors:
            raise RequestError(f"the query cannot be encoded: {encoded.errors[0]}")
        good = [i for i in range(count) if i + 1 not in encoded.errors]
        query_embedding, embeddings = encoded.embeddings[:1], encoded.embeddings[1:][good]
        cosines = scores.cosines(query_embedding, embeddings)
        card = self.engine.card
        probabilities = scores.probabilities(cosines, card.logit_scale, card.logit_bias)[0]
        return Ranked(
            matches=[
                pb.Match(index=good[i], probability=probabilities[i], cosine=cosines[0, i])
                for i in np.argsort(-cosines[0], kind="stable")
            ],
            errors={index - 1: why for index, why in encoded.errors.items()},
            encoded=encoded,
        )

    async def _rank(
        self, request: pb.RankRequest, timeout: float | None, response: pb.RankResponse
    ) -> None:
        check_count(len(request.candidates) + 1, self.limits.max_request_items)
        parts = [request.query, *request.candidates]
        (query, *candidates), timeout = await self._to_items(parts, timeout)
        del request, parts  # see `handle`
        ranking = self.rank(query, candidates, timeout)
        del query, candidates  # see `Engine.encode`
        ranked = await ranking
        response.matches.extend(ranked.matches)
        response.errors.extend(item_errors(ranked.errors))
        _set_timings(response.timings, ranked.encoded)

    def _info(self) -> pb.InfoResponse:
        runtime, card = self.engine.runtime, self.engine.card
        return pb.InfoResponse(
            model=card.name,
            runtime=runtime.name,
            device=runtime.device,
            dtype=runtime.precision,
            dim=card.dim,
            image_size=card.image.size,
            context_length=card.text.context_length,
            logit_scale=card.logit_scale,
            logit_bias=card.logit_bias,
            version=__version__,
            max_item_bytes=self.limits.max_item_bytes,
            max_request_items=self.limits.max_request_items,
            modality=self.modality or "",
            model_names=zoo.other_names(card.name),
        )

    async def fetch(self, uris: Iterable[str], timeout: float | None = None) -> Mapping[str, Item]:
        """What is at each URI that the server fetches, or why not; nothing for others."""
        if self._fetcher is None:
            return {}
        return await self._fetcher.fetch((uri for uri in uris if not has_scheme(uri)), timeout)

    async def _to_items(
        self, items: Sequence[pb.Item], timeout: float | None
    ) -> tuple[list[Item], float | None]:
        """The items for the engine, and what is left of `timeout` after their URIs are fetched."""
        started = time.monotonic()
        fetched = await self.fetch((item.uri for item in items if item.uri), timeout)
        if timeout and fetched:
            timeout = max(timeout - (time.monotonic() - started), _LEAST_SECONDS)
        return [self.to_item(item, fetched) for item in items], timeout

    def to_item(self, item: pb.Item, fetched: Mapping[str, Item] = MappingProxyType({})) -> Item:
        """Converts an item of a message to one of the engine; an ItemError if it is invalid.

        fetched: what is at URIs other than `data:`.
        """
        kind = item.WhichOneof("content")
        if kind is None:
            return ItemError("an empty item: it holds one of text, image or uri")
        try:
            content = read_uri(item.uri, fetched) if kind == "uri" else getattr(item, kind)
        except ItemError as error:
            return error
        return self.check(content)

    def check(self, content: str | bytes) -> Item:
        """Returns `content`, or an ItemError if it is empty, too large, or of another modality."""
        modality = "text" if isinstance(content, str) else "image"
        if not content or (isinstance(content, str) and not content.strip()):
            return ItemError(f"an empty {modality} has no embedding")
        if self.modality not in (None, modality):
            return ItemError(f"this encoder takes no {modality}s: it encodes {self.modality}s only")
        if len(content) > self.limits.max_item_bytes:
            return ItemError(
                f"the item has {len(content) / 2**20:.1f} MiB; the server takes at most "
                f"{self.limits.max_item_bytes / 2**20:.0f} MiB: scale the image down first"
            )
        return content


def read_uri(uri: str, fetched: Mapping[str, Item]) -> str | bytes:
    """Reads a `data:` URI (RFC 2397): a text if its media type is text/*, else an image.

    fetched: what is at other URIs.

    Raises:
        ItemError: any other URI; the server opens no files.
    """
    if uri in fetched:
        content = fetched[uri]
        if isinstance(content, ItemError):
            raise content
        return content
    if not has_scheme(uri):
        scheme = uri.partition(":")[0] if ":" in uri[:20] else "a path"
        raise ItemError(
            f"the server opens only data: URIs, this one is {scheme[:20]!r}: send the bytes, "
            "or let the client read it"
        )
    try:
        return read_data_uri(uri)
    except ValueError as error:
        raise ItemError(str(error)) from None


def _set_timings(timings: pb.Timings, encoded: Encoded) -> None:
    timings.total, timings.preprocess = (
        encoded.total_seconds * 1e3,
        encoded.preprocess_seconds * 1e3,
    )
    timings.inference = timings.total - timings.preprocess
    timings.queue = encoded.queue_seconds * 1e3
