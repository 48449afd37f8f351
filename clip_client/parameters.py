"""The `parameters` of a call, as clip-as-service's clients pass them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import numpy as np

from clip_client.documents import parse_access_paths
from clip_client.errors import InvalidInputError
from clip_client.proto import clip_pb2

_ALIASES = {
    "batch_size": "minibatch_size",
    "traversal_paths": "access_paths",
    "model": "model_name",
}
_ROOT = ["r"]


@dataclass(frozen=True)
class Parameters:
    """The parsed `parameters` of a call.

    model: the name of a model, of its executor, or an alias, where the server has several; "": the
        first.
    access_paths: which Documents are encoded, below those that are passed.
    drop_image_content: whether the Documents of callbacks come without the bytes of images.
    options: sent with each request.
    given: as passed.
    """

    model: str = ""
    access_paths: list[str] = field(default_factory=lambda: _ROOT)
    drop_image_content: bool = True
    options: clip_pb2.Options = field(default_factory=clip_pb2.Options)
    given: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(
        cls,
        given: Mapping[str, Any] | None,
        normalize: bool | None = None,
        model: str | None = None,
    ) -> Parameters:
        """From the `parameters` of a call, in which None is the default.

        normalize, model: the arguments of those names, which go before the parameters.

        Raises InvalidInputError for an unknown name or a wrong value.
        """
        values = {_ALIASES.get(name, name): value for name, value in (given or {}).items()}
        if normalize is not None:
            values["normalize"] = normalize
        if model is not None:
            values["model_name"] = model
        for name in values:
            if name not in _READERS:
                raise InvalidInputError(
                    f"no parameter is named {name!r}; there are {', '.join(_READERS)}"
                )
        read: dict[str, Any] = {
            name: _READERS[name](f"the parameter {name}", value)
            for name, value in values.items()
            if value is not None
        }
        options = clip_pb2.Options(
            normalize=read.get("normalize", False), minibatch_size=read.get("minibatch_size", 0)
        )
        return cls(
            read.get("model_name", ""),
            read.get("access_paths", _ROOT),
            read.get("drop_image_content", True),
            options,
            given or {},
        )

    @property
    def descends(self) -> bool:
        """Whether other Documents than those passed are encoded."""
        return self.access_paths != _ROOT


def positive(name: str, value: SupportsIndex) -> int:
    """`value` as an int. Raises InvalidInputError unless it is a whole number from 1."""
    try:
        number = 0 if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise InvalidInputError(f"{name} is a whole number from 1, not {value!r}")
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise InvalidInputError(f"{name} is True or False, not {value!r}")
    return bool(value)


def _size(name: str, value: Any) -> int:
    size = positive(name, value) if value != 0 or isinstance(value, bool) else 0
    if size >= 2**31:
        raise InvalidInputError(f"{name} is below 2**31, not {size}")
    return size


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidInputError(f"{name} is a str, not {value!r}")
    return value


def _paths(name: str, value: Any) -> list[str]:
    return parse_access_paths(_name(name, value))


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "normalize": _flag,
    "minibatch_size": _size,
    "model_name": _name,
    "access_paths": _paths,
    "drop_image_content": _flag,
}
