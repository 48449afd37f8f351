"""The Client: texts and images in, embeddings out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Protocol,
    SupportsIndex,
    TypeVar,
    cast,
    get_args,
    overload,
)

import numpy as np
from numpy.typing import NDArray

from clip_client import calls
from clip_client.address import Address
from clip_client.callbacks import Callback, Callbacks
from clip_client.calls import (
    PREFETCH,
    TIMEOUT,
    EncodeOptions,
    IndexOptions,
    RankOptions,
    SearchOptions,
)
from clip_client.connection import Connection, check_seconds
from clip_client.errors import InvalidInputError, ItemFailure
from clip_client.results import Info, Label, Match, Ranking
from clip_client.sansio import drive_async, drive_sync
from clip_client.search_parameters import SearchParameters, Target
from clip_client.tls import Trust
from clip_client.transports.base import Compression

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Long enough for a gateway that died to be restarted.
CONNECT_TIMEOUT = 10.0
# The value of the header, as clip-as-service reads it.
_CREDENTIAL_VARIABLE = "CLIP_AUTH_TOKEN"


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
    """A client of one server, for any number of concurrent threads and event loops.

    server: `scheme://host:port`, the scheme one of grpc, http, ws, or grpcs, https, wss for TLS;
        websocket and websockets are aliases of the last two.
    credential: sent as `authorization: Bearer <credential>`; or {'Authorization': value}, whose
        value is sent as it is. By default the value of the variable CLIP_AUTH_TOKEN, if it is set.
    ca_file: a file of certificates in PEM to trust, the server's own or its authority's, in place
        of the system's or those that SSL_CERT_FILE names.
    verify: False accepts any certificate, which allows man-in-the-middle attacks.
    cert_file, key_file: the client's own certificate and its key in PEM, for servers that ask for
        one; key_file may be left out where cert_file holds both.
    connect_timeout: seconds to wait for a server that has not answered this Client yet; one that
        has answered is waited for until the `timeout` of a call.
    compression: of requests, `gzip` or `deflate`: for many texts on a slow network. Images are
        compressed already. WebSocket has permessage-deflate for both.

    It connects at the first call, keeps the connection, and reconnects if it drops. Close it, or
    use it in `with` or `async with`. Raises InvalidInputError for an invalid address.

    Every call has an async version with the same arguments, whose name starts with `a`. A forked
    child may use its parent's http and ws Clients, on connections of its own; gRPC works in
    processes that were spawned, and in forked ones whose parent has not used it. A Client can be
    pickled, its credential included; the copy opens a connection of its own.
    """

    def __init__(
        self,
        server: str,
        credential: str | Mapping[str, str] | None = None,
        *,
        ca_file: str | os.PathLike[str] | None = None,
        verify: bool = True,
        cert_file: str | os.PathLike[str] | None = None,
        key_file: str | os.PathLike[str] | None = None,
        connect_timeout: float = CONNECT_TIMEOUT,
        compression: str | None = None,
    ) -> None:
        check_seconds("connect_timeout", connect_timeout)
        self._state = {
            "server": server,
            "credential": credential,
            "ca_file": ca_file,
            "verify": verify,
            "cert_file": cert_file,
            "key_file": key_file,
            "connect_timeout": connect_timeout,
            "compression": compression,
        }
        self._connection = Connection(
            Address.parse(server),
            _headers(credential),
            Trust(ca_file, verify, cert_file, key_file),
            connect_timeout,
            _compression(compression),
        )

    def __getstate__(self) -> dict[str, Any]:
        return self._state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @overload
    def encode(
        self,
        content: Iterable[Any],
        *,
        on_done: Callback,
        on_item_error: Raise | None = ...,
        **options: Unpack[EncodeOptions],
    ) -> None: ...

    @overload
    def encode(
        self,
        content: Iterable[Any],
        *,
        on_done: Callback,
        on_item_error: Return,
        **options: Unpack[EncodeOptions],
    ) -> tuple[None, Failures]: ...

    @overload
    def encode(
        self,
        content: Iterable[D],
        *,
        on_done: None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[EncodeOptions],
    ) -> list[D]: ...

    @overload
    def encode(
        self,
        content: Iterable[D],
        *,
        on_done: None = ...,
        on_item_error: Return,
        **options: Unpack[EncodeOptions],
    ) -> tuple[list[D], Failures]: ...

    @overload
    def encode(
        self,
        content: Iterable[Any],
        *,
        on_done: None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[EncodeOptions],
    ) -> Embeddings: ...

    @overload
    def encode(
        self,
        content: Iterable[Any],
        *,
        on_done: None = ...,
        on_item_error: Return,
        **options: Unpack[EncodeOptions],
    ) -> tuple[Embeddings, Failures]: ...

    def encode(
        self,
        content: Any,
        *,
        batch_size: SupportsIndex | None = None,
        prefetch: SupportsIndex = PREFETCH,
        show_progress: bool = False,
        normalize: bool | None = None,
        model: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        on_item_error: OnItemError | None = None,
        on_done: Callback | None = None,
        on_error: Callback | None = None,
        on_always: Callback | None = None,
        timeout: float | None = TIMEOUT,
    ) -> Any:
        """Encodes texts and images: returns [N, D] float32, in order.

        content: an iterable of texts, paths, URLs, bytes, PIL images, arrays, dicts and
            Documents; clip_client.inputs says which str is which. A generator is consumed only
            as far ahead as necessary, and the async call accepts async ones too. If all items
            are Documents, `.embedding` is set on each and they are returned: `content` itself,
            or a list for an iterator; a DocumentArray for docarray 1's.
        batch_size: items per request; by default 128 texts or 32 images. Requests are kept
            below 3 MB in any case.
        prefetch: maximum requests in flight.
        show_progress: shows a progress bar on stderr.
        normalize: True scales embeddings to length 1.
        model: which model, if the server has several: its name, an alias, or the name of its
            executor. By default the first.
        parameters: `normalize` and `model` as well; `minibatch_size` (int: maximum batch of the
            model); `access_paths` (str: '@c' encodes the chunks of the Documents passed, '@m' their
            matches, '@r,c' several); `drop_image_content` (False: the Documents that callbacks get
            for items that are none have the bytes of images in `.blob`).
        on_item_error: 'raise' raises ItemsError for the items that failed, at the end, with the
            embeddings of the others in it; 'return' returns `(result, failures)`, with NaN in
            their rows. By default 'raise'; with `on_error` the result alone is returned.
        on_done: called in order with a Batch of the items of a request that have an embedding.
            Then none are kept, and None is returned.
        on_error: called in order with the Batch of a request that failed, or in which items
            failed. It handles their errors: none is raised, and the call goes on.
        on_always: called in order with the Batch of every request.
        timeout: seconds per request, including retries while a server that has answered before
            is unavailable; None: no limit.

        Raises ItemsError, ServerError, ConnectionFailedError, ClientClosedError or
        InvalidInputError, with the embeddings received so far in `.embeddings`; and TypeError
        for a single item. Warns with TruncationWarning, once per call, if texts were longer than
        the model reads.
        """
        _refuse_async(content, "encode")
        return drive_sync(
            calls.encode(
                self._connection,
                content,
                batch_size=batch_size,
                prefetch=prefetch,
                show_progress=show_progress,
                normalize=normalize,
                model=model,
                parameters=parameters,
                on_item_error=on_item_error,
                callbacks=Callbacks(on_done, on_error, on_always),
                timeout=timeout,
            )
        )

    @overload
    async def aencode(
        self,
        content: Iterable[Any] | AsyncIterable[Any],
        *,
        on_done: Callback,
        on_item_error: Raise | None = ...,
        **options: Unpack[EncodeOptions],
    ) -> None: ...

    @overload
    async def aencode(
        self,
        content: Iterable[Any] | AsyncIterable[Any],
        *,
        on_done: Callback,
        on_item_error: Return,
        **options: Unpack[EncodeOptions],
    ) -> tuple[None, Failures]: ...

    @overload
    async def aencode(
        self,
        content: Iterable[D] | AsyncIterable[D],
        *,
        on_done: None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[EncodeOptions],
    ) -> list[D]: ...

    @overload
    async def aencode(
        self,
        content: Iterable[D] | AsyncIterable[D],
        *,
        on_done: None = ...,
        on_item_error: Return,
        **options: Unpack[EncodeOptions],
    ) -> tuple[list[D], Failures]: ...

    @overload
    async def aencode(
        self,
        content: Iterable[Any] | AsyncIterable[Any],
        *,
        on_done: None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[EncodeOptions],
    ) -> Embeddings: ...

    @overload
    async def aencode(
        self,
        content: Iterable[Any] | AsyncIterable[Any],
        *,
        on_done: None = ...,
        on_item_error: Return,
        **options: Unpack[EncodeOptions],
    ) -> tuple[Embeddings, Failures]: ...

    async def aencode(
        self,
        content: Any,
        *,
        batch_size: SupportsIndex | None = None,
        prefetch: SupportsIndex = PREFETCH,
        show_progress: bool = False,
        normalize: bool | None = None,
        model: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        on_item_error: OnItemError | None = None,
        on_done: Callback | None = None,
        on_error: Callback | None = None,
        on_always: Callback | None = None,
        timeout: float | None = TIMEOUT,
    ) -> Any:
        return await drive_async(
            calls.encode(
                self._connection,
                content,
                batch_size=batch_size,
                prefetch=prefetch,
                show_progress=show_progress,
                normalize=normalize,
                model=model,
                parameters=parameters,
                on_item_error=on_item_error,
                callbacks=Callbacks(on_done, on_error, on_always),
                timeout=timeout,
            )
        )

    @overload
    def rank(
        self,
        query: Any = ...,
        candidates: Iterable[Any] | None = ...,
        *,
        docs: Iterable[Any] | None = ...,
        source: str = ...,
        on_done: Callback,
        on_item_error: Raise | None = ...,
        **options: Unpack[RankOptions],
    ) -> None: ...

    @overload
    def rank(
        self,
        query: Any,
        candidates: Iterable[Any],
        *,
        on_done: None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[RankOptions],
    ) -> list[Ranking]: ...

    @overload
    def rank(
        self,
        docs: Iterable[M],
        *,
        source: str = ...,
        on_done: None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[RankOptions],
    ) -> list[M]: ...

    @overload
    def rank(
        self,
        query: Any = ...,
        candidates: Iterable[Any] | None = ...,
        *,
        docs: Iterable[Any] | None = ...,
        source: str = ...,
        on_done: Callback,
        on_item_error: Return,
        **options: Unpack[RankOptions],
    ) -> tuple[None, Failures]: ...

    @overload
    def rank(
        self,
        query: Any,
        candidates: Iterable[Any],
        *,
        on_done: None = ...,
        on_item_error: Return,
        **options: Unpack[RankOptions],
    ) -> tuple[list[Ranking], Failures]: ...

    @overload
    def rank(
        self,
        docs: Iterable[M],
        *,
        source: str = ...,
        on_done: None = ...,
        on_item_error: Return,
        **options: Unpack[RankOptions],
    ) -> tuple[list[M], Failures]: ...

    def rank(  # type: ignore[misc]  # the first argument has two names
        self,
        query: Any = None,
        candidates: Iterable[Any] | None = None,
        *,
        docs: Iterable[Any] | None = None,
        source: str = "matches",
        batch_size: SupportsIndex | None = None,
        prefetch: SupportsIndex = PREFETCH,
        show_progress: bool = False,
        model: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        on_item_error: OnItemError | None = None,
        on_done: Callback | None = None,
        on_error: Callback | None = None,
        on_always: Callback | None = None,
        timeout: float | None = TIMEOUT,
    ) -> Any:
        """Ranks candidates by how well each matches the query: a list of Ranking, best first.

        query, candidates: items as `encode` accepts them, any number of candidates.
        docs: in place of both, an iterable of Documents whose candidates are Documents in their
            `.matches`. These are sorted in place, with `clip_score` (the probability) and
            `clip_score_cosine` in the `.scores` of each, or in its `.tags` if it has no scores.
            The Documents are returned, as by `encode`. They may be the first argument too.
        source: the attribute of `docs` that holds the candidates.
        batch_size: items per request; with `docs`, Documents per call of the callbacks, 8 by
            default.
        prefetch, show_progress, model, parameters, timeout: as for `encode`.
        on_item_error: 'raise' raises ItemsError for candidates that failed; 'return' returns
            `(rankings, failures)`. By default as for `encode`.
        on_done, on_error, on_always: as for `encode`, called with a Batch of Documents, or once
            with all candidates.

        Raises as `encode`, InvalidInputError if a query cannot be encoded or a Document has no
        candidates.
        """
        return drive_sync(
            calls.rank(
                self._connection,
                _one_of(query, docs),
                candidates,
                source=source,
                batch_size=batch_size,
                prefetch=prefetch,
                show_progress=show_progress,
                model=model,
                parameters=parameters,
                on_item_error=on_item_error,
                callbacks=Callbacks(on_done, on_error, on_always),
                timeout=timeout,
            )
        )

    @overload
    async def arank(
        self,
        query: Any = ...,
        candidates: Iterable[Any] | None = ...,
        *,
        docs: Iterable[Any] | None = ...,
        source: str = ...,
        on_done: Callback,
        on_item_error: Raise | None = ...,
        **options: Unpack[RankOptions],
    ) -> None: ...

    @overload
    async def arank(
        self,
        query: Any,
        candidates: Iterable[Any],
        *,
        on_done: None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[RankOptions],
    ) -> list[Ranking]: ...

    @overload
    async def arank(
        self,
        docs: Iterable[M],
        *,
        source: str = ...,
        on_done: None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[RankOptions],
    ) -> list[M]: ...

    @overload
    async def arank(
        self,
        query: Any = ...,
        candidates: Iterable[Any] | None = ...,
        *,
        docs: Iterable[Any] | None = ...,
        source: str = ...,
        on_done: Callback,
        on_item_error: Return,
        **options: Unpack[RankOptions],
    ) -> tuple[None, Failures]: ...

    @overload
    async def arank(
        self,
        query: Any,
        candidates: Iterable[Any],
        *,
        on_done: None = ...,
        on_item_error: Return,
        **options: Unpack[RankOptions],
    ) -> tuple[list[Ranking], Failures]: ...

    @overload
    async def arank(
        self,
        docs: Iterable[M],
        *,
        source: str = ...,
        on_done: None = ...,
        on_item_error: Return,
        **options: Unpack[RankOptions],
    ) -> tuple[list[M], Failures]: ...

    async def arank(  # type: ignore[misc]  # the first argument has two names
        self,
        query: Any = None,
        candidates: Iterable[Any] | None = None,
        *,
        docs: Iterable[Any] | None = None,
        source: str = "matches",
        batch_size: SupportsIndex | None = None,
        prefetch: SupportsIndex = PREFETCH,
        show_progress: bool = False,
        model: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        on_item_error: OnItemError | None = None,
        on_done: Callback | None = None,
        on_error: Callback | None = None,
        on_always: Callback | None = None,
        timeout: float | None = TIMEOUT,
    ) -> Any:
        return await drive_async(
            calls.rank(
                self._connection,
                _one_of(query, docs),
                candidates,
                source=source,
                batch_size=batch_size,
                prefetch=prefetch,
                show_progress=show_progress,
                model=model,
                parameters=parameters,
                on_item_error=on_item_error,
                callbacks=Callbacks(on_done, on_error, on_always),
                timeout=timeout,
            )
        )

    @overload
    def classify(
        self,
        images: Iterable[Any],
        labels: Sequence[str],
        *,
        prompt: str = ...,
        model: str | None = ...,
        on_item_error: Raise | None = ...,
        timeout: float | None = ...,
    ) -> list[list[Label]]: ...

    @overload
    def classify(
        self,
        images: Iterable[Any],
        labels: Sequence[str],
        *,
        prompt: str = ...,
        model: str | None = ...,
        on_item_error: Return,
        timeout: float | None = ...,
    ) -> tuple[list[list[Label] | None], Failures]: ...

    def classify(
        self,
        images: Any,
        labels: Sequence[str],
        *,
        prompt: str = "a photo of a {}",
        model: str | None = None,
        on_item_error: OnItemError | None = None,
        timeout: float | None = TIMEOUT,
    ) -> Any:
        """Classifies images: for each a list of Label, one for each of `labels`, best first.

        images: images as `encode` accepts them; a str is a path, a URL or a `data:` URI.
        labels: at least one; each replaces the {} in `prompt`.
        model: as for `encode`.
        on_item_error: 'raise', the default, raises ItemsError for images that failed; 'return'
            returns `(results, failures)`, with None for those images.
        timeout: seconds per request; None: no limit.
        """
        _refuse_async(images, "classify")
        return drive_sync(
            calls.classify(
                self._connection,
                images,
                labels,
                prompt=prompt,
                model=model,
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
        model: str | None = ...,
        on_item_error: Raise | None = ...,
        timeout: float | None = ...,
    ) -> list[list[Label]]: ...

    @overload
    async def aclassify(
        self,
        images: Iterable[Any] | AsyncIterable[Any],
        labels: Sequence[str],
        *,
        prompt: str = ...,
        model: str | None = ...,
        on_item_error: Return,
        timeout: float | None = ...,
    ) -> tuple[list[list[Label] | None], Failures]: ...

    async def aclassify(
        self,
        images: Any,
        labels: Sequence[str],
        *,
        prompt: str = "a photo of a {}",
        model: str | None = None,
        on_item_error: OnItemError | None = None,
        timeout: float | None = TIMEOUT,
    ) -> Any:
        return await drive_async(
            calls.classify(
                self._connection,
                images,
                labels,
                prompt=prompt,
                model=model,
                on_item_error=on_item_error,
                timeout=timeout,
            )
        )

    @overload
    def index(
        self,
        content: Iterable[Any],
        *,
        on_done: Callback,
        on_error: Callback | None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[IndexOptions],
    ) -> None: ...

    @overload
    def index(
        self,
        content: Iterable[Any],
        *,
        on_done: Callback,
        on_error: Callback | None = ...,
        on_item_error: Return,
        **options: Unpack[IndexOptions],
    ) -> tuple[None, Failures]: ...

    @overload
    def index(
        self,
        content: Iterable[D],
        *,
        on_done: None = ...,
        on_error: Callback | None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[IndexOptions],
    ) -> list[D]: ...

    @overload
    def index(
        self,
        content: Iterable[D],
        *,
        on_done: None = ...,
        on_error: Callback | None = ...,
        on_item_error: Return,
        **options: Unpack[IndexOptions],
    ) -> tuple[list[D], Failures]: ...

    @overload
    def index(
        self,
        content: Iterable[Any],
        *,
        on_done: None = ...,
        on_error: None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[IndexOptions],
    ) -> list[str]: ...

    @overload
    def index(
        self,
        content: Iterable[Any],
        *,
        on_done: None = ...,
        on_error: Callback,
        on_item_error: Raise | None = ...,
        **options: Unpack[IndexOptions],
    ) -> list[str | None]: ...

    @overload
    def index(
        self,
        content: Iterable[Any],
        *,
        on_done: None = ...,
        on_error: Callback | None = ...,
        on_item_error: Return,
        **options: Unpack[IndexOptions],
    ) -> tuple[list[str | None], Failures]: ...

    def index(
        self,
        content: Any,
        *,
        ids: Iterable[Any] | None = None,
        tags: Iterable[Mapping[str, Any]] | None = None,
        batch_size: SupportsIndex | None = None,
        prefetch: SupportsIndex = PREFETCH,
        show_progress: bool = False,
        on_item_error: OnItemError | None = None,
        on_done: Callback | None = None,
        on_error: Callback | None = None,
        on_always: Callback | None = None,
        timeout: float | None = TIMEOUT,
    ) -> Any:
        """Stores texts and images in the server's collection, with their embeddings.

        content: items as `encode` accepts them; a dict may have an `id` and `tags` besides its
            content, and Documents have both. A row with the same id is replaced, so a call that
            was interrupted can be repeated.
        ids, tags: one for each item, in place of the items' own. An item without an id gets its
            path or URL as its id, or else a hash of its content.
        on_done, on_error, on_always, on_item_error, batch_size, prefetch, show_progress,
        timeout: as for `encode`; `results` of a Batch are the ids.

        Returns the id of each item, None for those that failed; if all items are Documents, the
        Documents, with `.embedding` set. They are on disk, and found by searches, when it returns.
        Raises ItemsError, ServerError, ConnectionFailedError, ClientClosedError, InvalidInputError
        or TypeError.
        """
        _refuse_async(content, "index")
        return drive_sync(
            calls.index(
                self._connection,
                content,
                ids=ids,
                tags=tags,
                batch_size=batch_size,
                prefetch=prefetch,
                show_progress=show_progress,
                on_item_error=on_item_error,
                callbacks=Callbacks(on_done, on_error, on_always),
                timeout=timeout,
            )
        )

    @overload
    async def aindex(
        self,
        content: Iterable[Any] | AsyncIterable[Any],
        *,
        on_done: Callback,
        on_error: Callback | None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[IndexOptions],
    ) -> None: ...

    @overload
    async def aindex(
        self,
        content: Iterable[Any] | AsyncIterable[Any],
        *,
        on_done: Callback,
        on_error: Callback | None = ...,
        on_item_error: Return,
        **options: Unpack[IndexOptions],
    ) -> tuple[None, Failures]: ...

    @overload
    async def aindex(
        self,
        content: Iterable[D] | AsyncIterable[D],
        *,
        on_done: None = ...,
        on_error: Callback | None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[IndexOptions],
    ) -> list[D]: ...

    @overload
    async def aindex(
        self,
        content: Iterable[D] | AsyncIterable[D],
        *,
        on_done: None = ...,
        on_error: Callback | None = ...,
        on_item_error: Return,
        **options: Unpack[IndexOptions],
    ) -> tuple[list[D], Failures]: ...

    @overload
    async def aindex(
        self,
        content: Iterable[Any] | AsyncIterable[Any],
        *,
        on_done: None = ...,
        on_error: None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[IndexOptions],
    ) -> list[str]: ...

    @overload
    async def aindex(
        self,
        content: Iterable[Any] | AsyncIterable[Any],
        *,
        on_done: None = ...,
        on_error: Callback,
        on_item_error: Raise | None = ...,
        **options: Unpack[IndexOptions],
    ) -> list[str | None]: ...

    @overload
    async def aindex(
        self,
        content: Iterable[Any] | AsyncIterable[Any],
        *,
        on_done: None = ...,
        on_error: Callback | None = ...,
        on_item_error: Return,
        **options: Unpack[IndexOptions],
    ) -> tuple[list[str | None], Failures]: ...

    async def aindex(
        self,
        content: Any,
        *,
        ids: Iterable[Any] | None = None,
        tags: Iterable[Mapping[str, Any]] | None = None,
        batch_size: SupportsIndex | None = None,
        prefetch: SupportsIndex = PREFETCH,
        show_progress: bool = False,
        on_item_error: OnItemError | None = None,
        on_done: Callback | None = None,
        on_error: Callback | None = None,
        on_always: Callback | None = None,
        timeout: float | None = TIMEOUT,
    ) -> Any:
        return await drive_async(
            calls.index(
                self._connection,
                content,
                ids=ids,
                tags=tags,
                batch_size=batch_size,
                prefetch=prefetch,
                show_progress=show_progress,
                on_item_error=on_item_error,
                callbacks=Callbacks(on_done, on_error, on_always),
                timeout=timeout,
            )
        )

    @overload
    def search(
        self,
        content: Iterable[Any],
        *,
        on_done: Callback,
        on_error: Callback | None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[SearchOptions],
    ) -> None: ...

    @overload
    def search(
        self,
        content: Iterable[Any],
        *,
        on_done: Callback,
        on_error: Callback | None = ...,
        on_item_error: Return,
        **options: Unpack[SearchOptions],
    ) -> tuple[None, Failures]: ...

    @overload
    def search(
        self,
        content: Iterable[D],
        *,
        on_done: None = ...,
        on_error: Callback | None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[SearchOptions],
    ) -> list[D]: ...

    @overload
    def search(
        self,
        content: Iterable[D],
        *,
        on_done: None = ...,
        on_error: Callback | None = ...,
        on_item_error: Return,
        **options: Unpack[SearchOptions],
    ) -> tuple[list[D], Failures]: ...

    @overload
    def search(
        self,
        content: Iterable[Any],
        *,
        on_done: None = ...,
        on_error: None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[SearchOptions],
    ) -> list[list[Match]]: ...

    @overload
    def search(
        self,
        content: Iterable[Any],
        *,
        on_done: None = ...,
        on_error: Callback,
        on_item_error: Raise | None = ...,
        **options: Unpack[SearchOptions],
    ) -> list[list[Match] | None]: ...

    @overload
    def search(
        self,
        content: Iterable[Any],
        *,
        on_done: None = ...,
        on_error: Callback | None = ...,
        on_item_error: Return,
        **options: Unpack[SearchOptions],
    ) -> tuple[list[list[Match] | None], Failures]: ...

    def search(
        self,
        content: Any,
        *,
        limit: SupportsIndex | None = 10,
        filter: Mapping[str, Any] | str | None = None,
        target: Target = "both",
        score_threshold: float | None = None,
        min_relevance: float | None = None,
        parameters: Mapping[str, Any] | None = None,
        batch_size: SupportsIndex | None = None,
        prefetch: SupportsIndex = PREFETCH,
        show_progress: bool = False,
        on_item_error: OnItemError | None = None,
        on_done: Callback | None = None,
        on_error: Callback | None = None,
        on_always: Callback | None = None,
        timeout: float | None = TIMEOUT,
    ) -> Any:
        """Searches the server's collection: for each query a list of Match, closest first.

        content: the queries, texts and images as `encode` accepts them.
        limit: matches of each query; None: the server's own setting.
        filter: a condition on tags, such as `{"price": {"$lt": 50}, "colour": "red"}`.
        target: what is found, 'texts', 'images' or 'both'.
        score_threshold: the least score of a match; with the metric L2 the greatest distance.
        min_relevance: from 0 to 1: the least relevance of a match.
        parameters: the same as a dict.
        on_done, on_error, on_always, on_item_error, batch_size, prefetch, show_progress,
        timeout: as for `encode`; `results` of a Batch are the matches.

        The list is None for a query that failed. If all queries are Documents, their `.matches` are
        set, with the scores in `.scores` of each, and the Documents are returned.

        Raises ItemsError, ServerError, ConnectionFailedError, ClientClosedError, InvalidInputError
        or TypeError.
        """
        _refuse_async(content, "search")
        asked = SearchParameters(limit, filter, target, score_threshold, min_relevance)
        return drive_sync(
            calls.search(
                self._connection,
                content,
                parameters=asked.updated(parameters),
                batch_size=batch_size,
                prefetch=prefetch,
                show_progress=show_progress,
                on_item_error=on_item_error,
                callbacks=Callbacks(on_done, on_error, on_always),
                timeout=timeout,
            )
        )

    @overload
    async def asearch(
        self,
        content: Iterable[Any] | AsyncIterable[Any],
        *,
        on_done: Callback,
        on_error: Callback | None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[SearchOptions],
    ) -> None: ...

    @overload
    async def asearch(
        self,
        content: Iterable[Any] | AsyncIterable[Any],
        *,
        on_done: Callback,
        on_error: Callback | None = ...,
        on_item_error: Return,
        **options: Unpack[SearchOptions],
    ) -> tuple[None, Failures]: ...

    @overload
    async def asearch(
        self,
        content: Iterable[D] | AsyncIterable[D],
        *,
        on_done: None = ...,
        on_error: Callback | None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[SearchOptions],
    ) -> list[D]: ...

    @overload
    async def asearch(
        self,
        content: Iterable[D] | AsyncIterable[D],
        *,
        on_done: None = ...,
        on_error: Callback | None = ...,
        on_item_error: Return,
        **options: Unpack[SearchOptions],
    ) -> tuple[list[D], Failures]: ...

    @overload
    async def asearch(
        self,
        content: Iterable[Any] | AsyncIterable[Any],
        *,
        on_done: None = ...,
        on_error: None = ...,
        on_item_error: Raise | None = ...,
        **options: Unpack[SearchOptions],
    ) -> list[list[Match]]: ...

    @overload
    async def asearch(
        self,
        content: Iterable[Any] | AsyncIterable[Any],
        *,
        on_done: None = ...,
        on_error: Callback,
        on_item_error: Raise | None = ...,
        **options: Unpack[SearchOptions],
    ) -> list[list[Match] | None]: ...

    @overload
    async def asearch(
        self,
        content: Iterable[Any] | AsyncIterable[Any],
        *,
        on_done: None = ...,
        on_error: Callback | None = ...,
        on_item_error: Return,
        **options: Unpack[SearchOptions],
    ) -> tuple[list[list[Match] | None], Failures]: ...

    async def asearch(
        self,
        content: Any,
        *,
        limit: SupportsIndex | None = 10,
        filter: Mapping[str, Any] | str | None = None,
        target: Target = "both",
        score_threshold: float | None = None,
        min_relevance: float | None = None,
        parameters: Mapping[str, Any] | None = None,
        batch_size: SupportsIndex | None = None,
        prefetch: SupportsIndex = PREFETCH,
        show_progress: bool = False,
        on_item_error: OnItemError | None = None,
        on_done: Callback | None = None,
        on_error: Callback | None = None,
        on_always: Callback | None = None,
        timeout: float | None = TIMEOUT,
    ) -> Any:
        asked = SearchParameters(limit, filter, target, score_threshold, min_relevance)
        return await drive_async(
            calls.search(
                self._connection,
                content,
                parameters=asked.updated(parameters),
                batch_size=batch_size,
                prefetch=prefetch,
                show_progress=show_progress,
                on_item_error=on_item_error,
                callbacks=Callbacks(on_done, on_error, on_always),
                timeout=timeout,
            )
        )

    def delete(
        self,
        ids: Iterable[str] | None = None,
        *,
        filter: Mapping[str, Any] | str | None = None,
        timeout: float | None = TIMEOUT,
    ) -> int:
        """Removes rows from the server's collection: by their ids, or those that fulfil a filter.

        Returns how many there were. Raises ServerError, ConnectionFailedError, ClientClosedError
        or InvalidInputError.
        """
        return drive_sync(calls.delete(self._connection, ids, filter, timeout))

    async def adelete(
        self,
        ids: Iterable[str] | None = None,
        *,
        filter: Mapping[str, Any] | str | None = None,
        timeout: float | None = TIMEOUT,
    ) -> int:
        return await drive_async(calls.delete(self._connection, ids, filter, timeout))

    def count(
        self,
        *,
        filter: Mapping[str, Any] | str | None = None,
        target: Target = "both",
        timeout: float | None = TIMEOUT,
    ) -> int:
        """The number of rows in the server's collection, all or those that fulfil a filter."""
        return drive_sync(calls.count(self._connection, filter, target, timeout))

    async def acount(
        self,
        *,
        filter: Mapping[str, Any] | str | None = None,
        target: Target = "both",
        timeout: float | None = TIMEOUT,
    ) -> int:
        return await drive_async(calls.count(self._connection, filter, target, timeout))

    def profile(self, content: Any = "", *, timeout: float | None = TIMEOUT) -> dict[str, float]:
        """Prints a latency breakdown of a request as a tree, and returns it in milliseconds.

        content: an item as `encode` accepts it; by default a short text.

        The keys are `Roundtrip`, which consists of `Client-server network` and `Server`, which
        consists of `Gateway-CLIP network` and `CLIP model`. The first request of a Client also
        opens the connection, so another one is sent first. Raises InvalidInputError if the item
        cannot be encoded.
        """
        return drive_sync(calls.profile(self._connection, content, timeout))

    async def aprofile(
        self, content: Any = "", *, timeout: float | None = TIMEOUT
    ) -> dict[str, float]:
        return await drive_async(calls.profile(self._connection, content, timeout))

    def info(self, timeout: float | None = TIMEOUT, *, model: str = "") -> Info:
        """The server's model, runtime, device, `dim`, `logit_scale`, version and limits.

        model: which of the server's models, by its name or that of its executor; by default the
            first.
        """
        return drive_sync(calls.info(self._connection, timeout, model))

    async def ainfo(self, timeout: float | None = TIMEOUT, *, model: str = "") -> Info:
        return await drive_async(calls.info(self._connection, timeout, model))

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


for _name in (
    "encode", "rank", "classify", "index", "search", "delete", "count", "profile", "info"
):  # fmt: skip
    getattr(Client, f"a{_name}").__doc__ = getattr(Client, _name).__doc__


def _refuse_async(items: Any, name: str) -> None:
    if hasattr(items, "__aiter__"):
        raise TypeError(f"an async generator needs the async call: a{name}")


def _one_of(query: Any, docs: Any) -> Any:
    if docs is None:
        return query
    if query is not None:
        raise TypeError("pass either a query and candidates, or docs")
    return docs


def _headers(credential: str | Mapping[str, str] | None) -> dict[str, str]:
    value: str | None = None
    if isinstance(credential, Mapping):
        # clip-as-service's form; the header is sent as it is.
        named = {name.lower(): value for name, value in credential.items()}
        if named.keys() - {"authorization"}:
            raise InvalidInputError("a credential is a str, or {'Authorization': ...}")
        value = named.get("authorization")
    elif credential is not None:
        value = f"Bearer {credential}" if credential else ""
    if value is None:
        value = os.environ.get(_CREDENTIAL_VARIABLE) or None
    if value is None:
        return {}
    if not value or not value.isascii() or not value.isprintable():
        raise InvalidInputError("a credential is of printable ASCII characters")
    return {"authorization": value}


def _compression(name: str | None) -> Compression | None:
    """The format of a name, which may be written as Jina does: `Gzip`, `NoCompression`."""
    lower = name.lower() if isinstance(name, str) else name
    if lower in (None, "nocompression"):
        return None
    for known in get_args(Compression):
        if lower == known:
            return cast("Compression", known)
    raise InvalidInputError(f"compression is gzip, deflate or None, not {name!r}")
