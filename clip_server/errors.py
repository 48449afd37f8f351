"""The server's exceptions. Every message may be shown to a client or a person:
it says what was wrong, what was allowed and what to do, and names no path or internals
of the server unless the person at its own keyboard is the only reader.

    ClipServerError
    ├── ConfigurationError     the server cannot start like this; shown at its terminal only
    │   ├── UnknownModelError
    │   └── WeightsError
    ├── ItemError              one item of a request cannot be encoded; its neighbours can
    └── RequestError           a whole request is refused
"""

from __future__ import annotations


class ClipServerError(Exception):
    """The root of the tree."""


class ConfigurationError(ClipServerError):
    """A parameter, a device or a missing extra keeps the server from starting."""


class UnknownModelError(ConfigurationError):
    """No card has this name."""


class WeightsError(ConfigurationError):
    """The weights of a model cannot be found, fetched or read."""


class ItemError(ClipServerError):
    """One text or image that cannot be encoded."""


class RequestError(ClipServerError):
    """A request that cannot be served.

    code: a name in clip.v1's `Error.Code`.
    retry_after: seconds after which trying again may help; 0: it will not.
    """

    def __init__(
        self, message: str, code: str = "INVALID_ARGUMENT", retry_after: float = 0.0
    ) -> None:
        # All three, since of an exception in an executor Jina passes on its name and arguments.
        super().__init__(message, code, retry_after)
        self.code = code
        self.retry_after = retry_after

    def __str__(self) -> str:
        return str(self.args[0])
