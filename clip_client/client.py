"""The Client: texts and images in, embeddings out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, SupportsIndex, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from clip_client import calls
from clip_client.address import Address
from clip_client.calls import PREFETCH, TIMEOUT, EncodeOptions
from clip_client.collector import Callback
from clip_client.connection import Connection, check_seconds
from clip_client.errors import InvalidInputError, ItemFailure
from clip_client.results import Info, Label, Latency, Ranking
from clip_client.sansio import drive_async, drive_sync
from clip_client.tls import Trust

if TYPE_CHECKING:
    from typing_extensions import Unpack

CONNECT_TIMEOUT = 5.0


class Document(Protocol):
    """A Document of docarray, of either version, or as good as one."""

    embedding: Any


class MatchedDocument(Document, Protocol):
    """A Document with candidates, for `rank`."""

    matches: Any


D = TypeVar("D", bound=Document)
M = TypeVar("M", bound=MatchedDocument)
Raise = Literal["raise"]
Return = Literal["return"]
OnItemError = Literal["raise", "return"]
Failures = list[ItemFailure]
Embeddings = NDArray[np.float32]


class Client:
    """A client of one server, for any number of threads and event loops at once.

    server: `scheme://host:port`, the scheme one of grpc, http, ws, or grpcs, https, wss for TLS.
    credential: what the server asks for, sent as `authorization: Bearer <credential>`.
    ca_file: a file of certificates in PEM to trust, the server's own or its authority's, in place
        of the system's or those that SSL_CERT_FILE names.
    verify: False accepts any certificate: what is sent can then be read by whoever is in between.
    connect_timeout: seconds that a server which has not answered this Client yet is waited for;
        one that has answered is waited for as long as the `timeout` of a call.

    It connects at the first call, keeps the connection, and reconnects when that broke. Close
    it, or use it in `with` or `async with`. Raises InvalidInputError for another address.

    Every call has an async version, named with an `a` before it, that takes the same arguments.
    A forked child may use its parent's http and ws Clients, on connections of its own; gRPC works
    in processes that were spawned, and in forked ones whose parent has not used it. A Client that
    is pickled, its credential included, opens a connection of its own.
    """

    def __init__(
        self,
        server: str,
        credential: str | Mapping[str, str] | None = None,
        *,
        ca_file: str | os.PathLike[str] | None = None,
        verify: bool = True,
        connect_timeout: float = CONNECT_TIMEOUT,
    ) -> None:
        check_seconds("connect_timeout", connect_timeout)
        self._state = {
            "server": server,
            "credential": credential,
            "ca_file": ca_file,
            "verify": verify,
            "connect_timeout": connect_timeout,
        }
        self._connection = Connection(
            Address.parse(server), _headers(credential), Trust(ca_file, verify), connect_timeout
        )

    def __getstate__(self) -> dict[str, Any]:
        return self._state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @overload
    def encode(
        self,
        items: Iterable[Any],
        *,
        on_done: Callback,
        on_item_error: Raise = ...,
        **options: Unpack[EncodeOptions],
    ) -> None: ...

    @overload
    def encode(
        self,
        items: Iterable[Any],
        *,
        on_done: Callback,
        on_item_error: Return,
        **options: Unpack[EncodeOptions],
    ) -> tuple[None, Failures]: ...

    @overload
    def encode(
        self,
        items: Iterable[D],
        *,
        on_done: None = ...,
        on_item_error: Raise = ...,
        **options: Unpack[EncodeOptions],
    ) -> list[D]: ...

    @overload
    def encode(
        self,
        items: Iterable[D],
        *,
        on_done: None = ...,
        on_item_error: Return,
        **options: Unpack[EncodeOptions],
    ) -> tuple[list[D], Failures]: ...

    @overload
    def encode(
        self,
        items: Iterable[Any],
        *,
        on_done: None = ...,
        on_item_error: Raise = ...,
        **options: Unpack[EncodeOptions],
    ) -> Embeddings: ...

    @overload
    def encode(
        self,
        items: Iterable[Any],
        *,
        on_done: None = ...,
        on_item_error: Return,
        **options: Unpack[EncodeOptions],
    ) -> tuple[Embeddings, Failures]: ...

    def encode(
        self,
        items: Any,
        *,
        batch_size: SupportsIndex | None = None,
        prefetch: SupportsIndex = PREFETCH,
        show_progress: bool = False,
        normalize: bool | None = None,
        parameters: Mapping[str, Any] | None = None,
        on_item_error: OnItemError = "raise",
        on_done: Callback | None = None,
        on_error: Callback | None = None,
        on_always: Callback | None = None,
        timeout: float | None = TIMEOUT,
    ) -> Any:
        """The embeddings of texts and images: [N, D] float32, in order.

        items: an iterable of texts, paths, URLs, bytes, PIL images, uint8 arrays, dicts and
            Documents; clip_client.inputs says which str is which. A generator is read only as
            far ahead as is needed, and the async call takes async ones too. Where all items are
            Documents, `.embedding` is set in each and they are the result.
        batch_size: items of one request; by default 128 texts or 32 images. A request is kept
            below 3 MB in any case.
        prefetch: requests in flight at once.
        show_progress: draws a bar on stderr.
        normalize: True scales embeddings to length 1.
        parameters: `normalize` as well, and `minibatch_size` (int: items the model takes at
            once).
        on_item_error: 'raise' raises ItemsError for the items that failed, at the end, with the
            others' embeddings in it; 'return' returns `(result, failures)`, with NaN in their
            rows.
        on_done: called in order with a Batch of the items of a request that have an embedding,
            to store them. Then none are kept, and the result is None.
        on_error, on_always: called in order with the Batch of a request: when it or an item of
            it failed, and in any case. Errors are raised all the same.
        timeout: seconds that one request may take, those included for which a server that was
            reached before is away; None: no limit.

        Raises ItemsError, ServerError, ConnectionFailedError, ClientClosedError or
        InvalidInputError, with the embeddings computed until then in `.embeddings`; and
        TypeError for one item where several are meant. Warns with TruncationWarning, once a
        call, where texts were longer than the model reads.
        """
        _refuse_async(items, "encode")
        return drive_sync(
            calls.encode(
                self._connection,
                items,
                batch_size=batch_size,
                prefetch=prefetch,
                show_progress=show_progress,
                normalize=normalize,
                parameters=parameters,
                on_item_error=on_item_error,
                on_done=on_done,
                on_error=on_error,
                on_always=on_always,
                timeout=timeout,
            )
        )

    @overload
    async def aencode(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        on_done: Callback,
        on_item_error: Raise = ...,
        **options: Unpack[EncodeOptions],
    ) -> None: ...

    @overload
    async def aencode(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        on_done: Callback,
        on_item_error: Return,
        **options: Unpack[EncodeOptions],
    ) -> tuple[None, Failures]: ...

    @overload
    async def aencode(
        self,
        items: Iterable[D] | AsyncIterable[D],
        *,
        on_done: None = ...,
        on_item_error: Raise = ...,
        **options: Unpack[EncodeOptions],
    ) -> list[D]: ...

    @overload
    async def aencode(
        self,
        items: Iterable[D] | AsyncIterable[D],
        *,
        on_done: None = ...,
        on_item_error: Return,
        **options: Unpack[EncodeOptions],
    ) -> tuple[list[D], Failures]: ...

    @overload
    async def aencode(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        on_done: None = ...,
        on_item_error: Raise = ...,
        **options: Unpack[EncodeOptions],
    ) -> Embeddings: ...

    @overload
    async def aencode(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        on_done: None = ...,
        on_item_error: Return,
        **options: Unpack[EncodeOptions],
    ) -> tuple[Embeddings, Failures]: ...

    async def aencode(
        self,
        items: Any,
        *,
        batch_size: SupportsIndex | None = None,
        prefetch: SupportsIndex = PREFETCH,
        show_progress: bool = False,
        normalize: bool | None = None,
        parameters: Mapping[str, Any] | None = None,
        on_item_error: OnItemError = "raise",
        on_done: Callback | None = None,
        on_error: Callback | None = None,
        on_always: Callback | None = None,
        timeout: float | None = TIMEOUT,
    ) -> Any:
        return await drive_async(
            calls.encode(
                self._connection,
                items,
                batch_size=batch_size,
                prefetch=prefetch,
                show_progress=show_progress,
                normalize=normalize,
                parameters=parameters,
                on_item_error=on_item_error,
                on_done=on_done,
                on_error=on_error,
                on_always=on_always,
                timeout=timeout,
            )
        )

    @overload
    def rank(
        self,
        query: Any,
        candidates: Iterable[Any],
        *,
        on_item_error: Raise = ...,
        timeout: float | None = ...,
    ) -> list[Ranking]: ...

    @overload
    def rank(
        self,
        query: Any,
        candidates: Iterable[Any],
        *,
        on_item_error: Return,
        timeout: float | None = ...,
    ) -> tuple[list[Ranking], Failures]: ...

    @overload
    def rank(
        self,
        query: Iterable[M],
        candidates: None = ...,
        *,
        on_item_error: Raise = ...,
        timeout: float | None = ...,
    ) -> list[M]: ...

    @overload
    def rank(
        self,
        query: Iterable[M],
        candidates: None = ...,
        *,
        on_item_error: Return,
        timeout: float | None = ...,
    ) -> tuple[list[M], Failures]: ...

    def rank(
        self,
        query: Any,
        candidates: Iterable[Any] | None = None,
        *,
        on_item_error: OnItemError = "raise",
        timeout: float | None = TIMEOUT,
    ) -> Any:
        """The candidates by how well each goes with the query: a list of Ranking, best first.

        query, candidates: items as `encode` takes them, any number of candidates. Without
            `candidates`, `query` is a list of Documents with candidates in their `.matches`:
            these are sorted in place, with `clip_score` (the probability) and
            `clip_score_cosine` in the `.scores` of each match, or in its `.tags` where it has no
            scores, and returned.
        on_item_error: 'raise' raises ItemsError for candidates that failed; 'return' returns
            `(rankings, failures)`. A query that failed raises InvalidInputError in any case.
        timeout: seconds that one request may take; None: no limit.
        """
        return drive_sync(
            calls.rank(
                self._connection, query, candidates, on_item_error=on_item_error, timeout=timeout
            )
        )

    @overload
    async def arank(
        self,
        query: Any,
        candidates: Iterable[Any],
        *,
        on_item_error: Raise = ...,
        timeout: float | None = ...,
    ) -> list[Ranking]: ...

    @overload
    async def arank(
        self,
        query: Any,
        candidates: Iterable[Any],
        *,
        on_item_error: Return,
        timeout: float | None = ...,
    ) -> tuple[list[Ranking], Failures]: ...

    @overload
    async def arank(
        self,
        query: Iterable[M],
        candidates: None = ...,
        *,
        on_item_error: Raise = ...,
        timeout: float | None = ...,
    ) -> list[M]: ...

    @overload
    async def arank(
        self,
        query: Iterable[M],
        candidates: None = ...,
        *,
        on_item_error: Return,
        timeout: float | None = ...,
    ) -> tuple[list[M], Failures]: ...

    async def arank(
        self,
        query: Any,
        candidates: Iterable[Any] | None = None,
        *,
        on_item_error: OnItemError = "raise",
        timeout: float | None = TIMEOUT,
    ) -> Any:
        return await drive_async(
            calls.rank(
                self._connection, query, candidates, on_item_error=on_item_error, timeout=timeout
            )
        )

    @overload
    def classify(
        self,
        images: Iterable[Any],
        labels: Sequence[str],
        *,
        prompt: str = ...,
        on_item_error: Raise = ...,
        timeout: float | None = ...,
    ) -> list[list[Label]]: ...

    @overload
    def classify(
        self,
        images: Iterable[Any],
        labels: Sequence[str],
        *,
        prompt: str = ...,
        on_item_error: Return,
        timeout: float | None = ...,
    ) -> tuple[list[list[Label] | None], Failures]: ...

    def classify(
        self,
        images: Any,
        labels: Sequence[str],
        *,
        prompt: str = "a photo of a {}",
        on_item_error: OnItemError = "raise",
        timeout: float | None = TIMEOUT,
    ) -> Any:
        """What each image shows: for each a list of Label, one for each of `labels`, best first.

        images: images as `encode` takes them; a str is a path, a URL or a `data:` URI.
        labels: what they may show, at least one; each is put in place of the {} in `prompt`.
        on_item_error: 'raise' raises ItemsError for images that failed; 'return' returns
            `(results, failures)`, with None in the place of those.
        timeout: seconds that one request may take; None: no limit.
        """
        _refuse_async(images, "classify")
        return drive_sync(
            calls.classify(
                self._connection,
                images,
                labels,
                prompt=prompt,
                on_item_error=on_item_error,
                timeout=timeout,
            )
        )

    @overload
    async def aclassify(
        self,
        images: Iterable[Any] | AsyncIterable[Any],
        labels: Sequence[str],
        *,
        prompt: str = ...,
        on_item_error: Raise = ...,
        timeout: float | None = ...,
    ) -> list[list[Label]]: ...

    @overload
    async def aclassify(
        self,
        images: Iterable[Any] | AsyncIterable[Any],
        labels: Sequence[str],
        *,
        prompt: str = ...,
        on_item_error: Return,
        timeout: float | None = ...,
    ) -> tuple[list[list[Label] | None], Failures]: ...

    async def aclassify(
        self,
        images: Any,
        labels: Sequence[str],
        *,
        prompt: str = "a photo of a {}",
        on_item_error: OnItemError = "raise",
        timeout: float | None = TIMEOUT,
    ) -> Any:
        return await drive_async(
            calls.classify(
                self._connection,
                images,
                labels,
                prompt=prompt,
                on_item_error=on_item_error,
                timeout=timeout,
            )
        )

    def profile(
        self, text: str = "a text", *, timeout: float | None = TIMEOUT
    ) -> dict[str, Latency]:
        """Sends a text, prints where its time went as a tree, and returns the tree's lines.

        Each is `(milliseconds, percent)`, the percentage that of the line it is part of. The
        first request of a Client also opens the connection, so one goes ahead that is not
        counted.
        """
        return drive_sync(calls.profile(self._connection, text, timeout))

    async def aprofile(
        self, text: str = "a text", *, timeout: float | None = TIMEOUT
    ) -> dict[str, Latency]:
        return await drive_async(calls.profile(self._connection, text, timeout))

    def info(self, timeout: float | None = TIMEOUT) -> Info:
        """The server's model, runtime, device, `dim`, `logit_scale`, version and limits."""
        return drive_sync(calls.info(self._connection, timeout))

    async def ainfo(self, timeout: float | None = TIMEOUT) -> Info:
        return await drive_async(calls.info(self._connection, timeout))

    def close(self) -> None:
        """Closes the connection. Requests still in flight in other threads fail."""
        closing = self._connection.close()
        if closing is not None:
            closing.result()

    async def aclose(self) -> None:
        """Closes the connection, as `close` does."""
        closing = self._connection.close()
        if closing is not None:
            await asyncio.wrap_future(closing)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"Client({str(self._connection.address)!r})"


for _name in ("encode", "rank", "classify", "profile", "info"):
    getattr(Client, f"a{_name}").__doc__ = getattr(Client, _name).__doc__


def _refuse_async(items: Any, name: str) -> None:
    if hasattr(items, "__aiter__"):
        raise TypeError(f"an async generator needs the async call: a{name}")


def _headers(credential: str | Mapping[str, str] | None) -> dict[str, str]:
    if isinstance(credential, Mapping):
        # As clip-as-service has it: {'Authorization': token}.
        named = {name.lower(): value for name, value in credential.items()}
        if list(named) != ["authorization"]:
            raise InvalidInputError("a credential is a str, or {'Authorization': ...}")
        credential = named["authorization"].removeprefix("Bearer ")
    if credential is None:
        return {}
    if not credential or not credential.isascii() or not credential.isprintable():
        raise InvalidInputError("a credential is of printable ASCII characters")
    return {"authorization": f"Bearer {credential}"}
