"""The callbacks of a call, and their argument.

A `Batch` also answers to the attributes of Jina's `DataRequest`, which callbacks written for
clip-as-service read: `docs`, `data.docs`, `parameters` and `header.status`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_client.documents import in_own_list, is_document
from clip_client.errors import AuthenticationError, ItemFailure, ServerError
from clip_client.proto.clip_pb2 import Item

_SUCCESS, _ERROR = 0, 1


@dataclass
class PlainDocument:
    """The Document that stands for an item which is none."""

    # That of a dict, or a random one.
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    text: str = ""
    # The path or the URL of an image.
    uri: str = ""
    # The bytes of an image, if the parameter drop_image_content is False.
    blob: bytes = b""
    tags: dict[str, Any] = field(default_factory=dict)
    # [D] float32.
    embedding: NDArray[np.float32] | None = None
    # Why there is no embedding.
    error: str | None = None

    @classmethod
    def of(cls, raw_item: Any) -> PlainDocument:
        """The Document for an item that is not read yet."""
        if not isinstance(raw_item, Mapping):
            raw_item = {"uri": raw_item}
        document = cls(tags=dict(raw_item.get("tags") or {}))
        document.id = str(raw_item.get("id") or document.id)
        locations = (raw_item.get(key) for key in ("uri", "image", "blob"))
        named = (each for each in locations if isinstance(each, (str, os.PathLike)))
        document.uri = os.fsdecode(next(named, ""))
        return document

    def fill(self, item: Item, keeps_image: bool) -> None:
        """Adds the content that is sent."""
        if item.HasField("text"):
            self.text, self.uri = item.text, ""
        elif keeps_image:
            self.blob = item.image


class DocumentList(list[Any]):
    """Documents, and the embeddings of all of them."""

    @property
    def embeddings(self) -> NDArray[np.float32]:
        """[n, D] float32."""
        return np.array([each.embedding for each in self], np.float32)

    @property
    def texts(self) -> list[str]:
        """The texts, '' for images."""
        return [getattr(each, "text", None) or "" for each in self]


@dataclass(frozen=True)
class Status:
    """Whether a request succeeded, in Jina's terms."""

    # 0: success, 1: error.
    code: int
    description: str = ""


@dataclass(frozen=True)
class Header:
    """The endpoint and status of a request, in Jina's terms."""

    exec_endpoint: str
    status: Status


@dataclass(frozen=True)
class Batch(Sequence[Any]):
    """The argument of a callback: the items of one request, answered or failed.

    `on_done` gets those that have an embedding; `on_error` and `on_always` get all. As a sequence
    it is what the call would return for these items: Documents, if all of them are, else the rows
    of `embeddings`. For `rank` the items are the Documents, or the candidates of one query, and
    the sequence is the Documents or the Rankings.
    """

    # The items' places in the input.
    indices: Sequence[int]
    # [n, D] float32, NaN in the rows of items that failed; [n, 0] if no item succeeded.
    embeddings: NDArray[np.float32]
    # The items that failed, by their places in the input.
    errors: Sequence[ItemFailure]
    # Why the whole request failed; else None.
    exception: Exception | None = None
    # The items as Documents: those that were passed, or a `PlainDocument` for each other item.
    # A DocumentArray for docarray 1's, else a list; both have `.embeddings`, [n, D] float32.
    docs: Any = ()
    # Of the call.
    parameters: Mapping[str, Any] = field(default_factory=dict)
    endpoint: str = "/encode"
    # Of `index` and `search`: the id of each item, or its matches; None for items that failed.
    results: Sequence[Any] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self._result[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._result)

    def __array__(self, *arguments: Any, **options: Any) -> NDArray[Any]:
        return np.asarray(self.embeddings, *arguments, **options)

    @property
    def data(self) -> Batch:
        """The batch itself: Jina has the Documents in `response.data.docs` as well."""
        return self

    @property
    def header(self) -> Header:
        """The endpoint, and `status.code` and `status.description`."""
        reasons = [self.exception] if self.exception else self.errors
        code = _ERROR if reasons else _SUCCESS
        return Header(self.endpoint, Status(code, "; ".join(map(str, reasons))))

    def succeeded(self) -> Batch | None:
        """A copy with only the items that have an embedding; None if there are none."""
        failed = {failure.index for failure in self.errors}
        rows = [row for row, index in enumerate(self.indices) if index not in failed]
        if self.exception is not None or not rows:
            return None
        return replace(
            self,
            indices=[self.indices[row] for row in rows],
            embeddings=self.embeddings[rows],
            errors=[],
            docs=document_list([self.docs[row] for row in rows]),
            results=[self.results[row] for row in rows] if self.results else (),
        )

    @property
    def _result(self) -> Any:
        is_plain = not len(self.docs) or isinstance(self.docs[0], PlainDocument)
        own = self.results or self.embeddings
        return own if is_plain else self.docs


Callback = Callable[[Batch], Any]


def document_list(documents: list[Any]) -> Any:
    """Documents with `.embeddings`."""
    own = in_own_list(documents) if documents and is_document(documents[0]) else documents
    return DocumentList(documents) if own is documents else own


def is_of_request(error: Exception | None) -> bool:
    """Whether an error concerns one request, so that callbacks are called for it.

    Every other request would meet an error of the connection or of the credential too.
    """
    return isinstance(error, ServerError) and not isinstance(error, AuthenticationError)


@dataclass(frozen=True)
class Callbacks:
    """The callbacks of one call."""

    on_done: Callback | None = None
    on_error: Callback | None = None
    on_always: Callback | None = None

    def __bool__(self) -> bool:
        return any((self.on_done, self.on_error, self.on_always))

    def call(self, batch: Batch, done: Batch | None) -> None:
        """Calls them for a request. done: the part of it that succeeded, if any."""
        if self.on_done and done is not None:
            self.on_done(done)
        failed = batch.exception or batch.errors
        called = (self.on_error if failed else None, self.on_always)
        if any(called):  # callbacks may write to the array, and a message is read-only
            batch = replace(batch, embeddings=batch.embeddings.copy())
        for callback in filter(None, called):
            callback(batch)
