"""What the client raises.

ClipError
├── InvalidInputError (ValueError)   what was passed cannot be sent at all
├── ItemsError                       some items failed; `.errors` has every one of them
├── ServerError                      the server refused or failed a request; `.code` says how
│   ├── AuthenticationError
│   ├── OverloadedError              the server is full: try again later
│   └── DeadlineExceededError
└── ConnectionFailedError (ConnectionError)  no server answered, or the connection broke
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class ClipError(Exception):
    """The root of the tree."""


class InvalidInputError(ClipError, ValueError):
    """What was passed cannot be sent at all."""


@dataclass(frozen=True)
class ItemFailure:
    """One item that has no embedding: its place in the input and why."""

    index: int
    message: str

    def __str__(self) -> str:
        return f"item {self.index}: {self.message}"


class ItemsError(ClipError):
    """Some items failed. `.errors` holds them all, in order of their place.

    `.embeddings` holds what the others gave, [N, D] float32 with NaN rows for those that
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

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code or type(self).code


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


_BY_CODE: dict[str, type[ServerError]] = {
    kind.code: kind for kind in (AuthenticationError, OverloadedError, DeadlineExceededError)
}


def server_error(code: str, message: str) -> ServerError:
    """The error for a code of clip.v1's `Error.Code`."""
    return _BY_CODE.get(code, ServerError)(message or code, code)
