"""Executors that stand around the encoder in a flow, as users write them."""

from typing import Any, Dict, Optional  # noqa: UP035

from docarray import BaseDoc, DocList
from docarray.typing import NdArray
from jina import Executor, requests

from clip_server.errors import RequestError


class Lowercase(Executor):
    """Stands before the encoder; its endpoint has no annotations."""

    @requests(on="/encode")
    def lower(self, docs, **_):
        for doc in docs:
            doc.text = doc.text and doc.text.lower()


class Found(BaseDoc):
    """The indexer's own class."""

    text: Optional[str] = None  # noqa: UP045
    embedding: Optional[NdArray] = None  # noqa: UP045
    tags: Dict[str, Any] = {}  # noqa: UP006, RUF012


class Indexer(Executor):
    """Stands behind the encoder, with documents of its own class."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._rows: dict[str, Any] = {}

    @requests(on="/index")
    def index(self, docs: DocList[Found], **_: Any) -> DocList[Found]:
        """Keeps the embeddings by id."""
        for doc in docs:
            self._rows[doc.id] = doc.embedding
            doc.tags["rows"] = len(self._rows)
        return docs

    @requests(on="/encode")
    def halve(self, docs: DocList[Found], **_: Any) -> DocList[Found]:
        """Changes the embedding, so that a caller who missed it would notice."""
        for doc in docs:
            doc.tags["encoded"] = doc.embedding is not None
            if doc.embedding is not None:
                doc.embedding = doc.embedding / 2
        return docs

    @requests(on="/filter")
    def keep(self, docs: DocList[Found], **_: Any) -> DocList[Found]:
        """Answers with fewer documents."""
        return DocList[Found](doc for doc in docs if doc.text == "keep")

    @requests(on="/fail")
    def fail(self, **_: Any) -> None:
        """Fails with what no client should read."""
        raise OSError("/etc/secret")

    @requests(on="/refuse")
    def refuse(self, **_: Any) -> None:
        """Fails with what the client should read."""
        raise RequestError("the index is empty")


class Length(Executor):
    """Stands beside the encoder."""

    @requests
    def measure(self, docs, **_):
        for doc in docs:
            doc.tags["length"] = len(doc.blob or doc.text)


class Page(BaseDoc):
    """A part of a Tree."""

    number: int = 1


class Tree(BaseDoc):
    """Refers to itself, and to one class twice."""

    text: Optional[str] = None  # noqa: UP045
    blob: Optional[bytes] = None  # noqa: UP045
    embedding: Optional[NdArray] = None  # noqa: UP045
    tags: Dict[str, Any] = {}  # noqa: UP006, RUF012
    first: Optional[Page] = None  # noqa: UP045
    pages: DocList[Page] = DocList[Page]()
    child: Optional["Tree"] = None


class Join(Executor):
    """Waits for both."""

    @requests
    def join(self, docs: DocList[Tree], **_: Any) -> DocList[Tree]:
        """Notes what came from each."""
        for doc in docs:
            doc.tags["encoded"] = doc.embedding is not None
            doc.embedding = doc.embedding * 2
        return docs
