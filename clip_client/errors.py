"""The client's exceptions and warnings.

ClipError
├── InvalidInputError (ValueError)   what was passed cannot be sent at all
├── ItemsError                       some items failed; `.errors` has every one of them
├── ServerError                      the server refused or failed a request; `.code` says how
│   ├── AuthenticationError
│   ├── OverloadedError              the server is full: try again later
│   └── DeadlineExceededError
├── ConnectionFailedError (ConnectionError)  no server answered, or the connection broke
└── ClientClosedError (RuntimeError)  the Client was closed

ClipWarning (UserWarning)            nothing failed, but the result may not be what was meant
└── TruncationWarning                texts were longer than the model reads
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class ClipError(Exception):
    """The root of the tree.

    `.embeddings`, where the error ended an `encode` that returns embeddings: those computed until
    then, [N, D] float32 in the order of the items, NaN in the rows that were not computed ([N, 0]
    where none was). Else None.
    `.request_id` is the name in the server's log of the request that it refused or failed; empty
    where the server named none.
    """

    embeddings: NDArray[np.float32] | None = None
    request_id: str = ""


class InvalidInputError(ClipError, ValueError):
    """The arguments of a call cannot be sent at all."""


@dataclass(frozen=True)
class ItemFailure:
    """One item that has no embedding: its place in the input, why, and which it is."""

    index: int
    message: str
    # The path, the URL, the text, or what kind of image; long ones shortened.
    item: str = field(default="", compare=False)

    def __str__(self) -> str:
        named = not self.item or self.item in self.message
        return f"item {self.index}: {self.message}{'' if named else f' ({self.item})'}"


class ItemsError(ClipError):
    """Some items failed. `.errors` holds them all, in order of their place.

    `.embeddings` holds those of the others, [N, D] float32 with NaN rows for those that
    failed, where the call gives embeddings and `on_done` did not take them.
    """

    def __init__(
        self,
        errors: Sequence[ItemFailure],
        total: int,
        embeddings: NDArray[np.float32] | None = None,
    ) -> None:
        self.errors = list(errors)
        self.total = total
        self.embeddings = embeddings
        shown = "".join(f"\n  {error}" for error in self.errors[:10])
        more = f"\n  ... and {len(self.errors) - 10} more" if len(self.errors) > 10 else ""
        super().__init__(
            f"{len(self.errors)} of {total} items failed "
            f"(on_item_error='return' gives the others):{shown}{more}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errors, self.total, self.embeddings)


class ServerError(ClipError):
    """The server refused or failed a whole request. `.code` is clip.v1's `Error.Code` name."""

    code = "UNKNOWN"
    # Seconds after which the server suggests to try again; 0: it does not.
    retry_after = 0.0

    def __init__(self, message: str, code: str | None = None, request_id: str = "") -> None:
        super().__init__(f"{message} [request {request_id}]" if request_id else message)
        self.code = code or type(self).code
        self.request_id = request_id


class AuthenticationError(ServerError):
    """The credential is missing or wrong."""

    code = "UNAUTHENTICATED"


class OverloadedError(ServerError):
    """The server is full, or the request too large."""

    code = "RESOURCE_EXHAUSTED"


class DeadlineExceededError(ServerError):
    """The server did not answer in time."""

    code = "DEADLINE_EXCEEDED"


class ConnectionFailedError(ClipError, ConnectionError):
    """No server answered at the address, or the connection broke."""

    # Whether trying again may help: no connection was made, or one that had worked broke.
    away = False
    broke = False


class ClientClosedError(ClipError, RuntimeError):
    """The Client was closed, before the call or during it."""

    def __init__(self, message: str = "this Client is closed") -> None:
        super().__init__(message)


class ClipWarning(UserWarning):
    """The root of the client's warnings: nothing failed."""


class TruncationWarning(ClipWarning):
    """Texts were longer than the model's context length. `.count` is how many."""

    def __init__(self, count: int) -> None:
        super().__init__(
            f"{count:,} {'text was' if count == 1 else 'texts were'} truncated: longer than the "
            "model's context length (`client.info().context_length` tokens)"
        )
        self.count = count

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.count,)


_BY_CODE: dict[str, type[ServerError]] = {
    kind.code: kind for kind in (AuthenticationError, OverloadedError, DeadlineExceededError)
}


def server_error(code: str, message: str, request_id: str = "") -> ServerError:
    """The error for a code of clip.v1's `Error.Code`."""
    return _BY_CODE.get(code, ServerError)(message or code, code, request_id)
