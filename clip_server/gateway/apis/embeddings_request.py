"""The fields that the dialects of other servers share besides their items, by each dialect's
names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from clip_client.quantization import QUANTIZERS
from clip_server.errors import RequestError
from clip_server.gateway.apis.inputs import PlacedItem
from clip_server.rpc.request_parameters import flag, name_of, read_mapping, shown

# Reads a field of a body, given its name and its value.
FieldReader: TypeAlias = Callable[[str, Any], Any]
_NONE: Mapping[str, Any] = MappingProxyType({})
# The forms of embeddings in a response.
FORMATS = ("float", "base64", *QUANTIZERS)
_MOST_DIMENSIONS = 2**31


@dataclass(frozen=True)
class EmbeddingsRequest:
    """The embeddings that a body asks for.

    model: a name of the model; "": the first.
    dimensions: length to which embeddings are cut; 0: they are not.
    truncate: whether texts longer than the model's context are truncated; else they are an error.
    forms: of `FORMATS`, in which the embeddings are returned, for dialects that have a choice.
    """

    items: Sequence[PlacedItem]
    model: str = ""
    normalize: bool = True
    dimensions: int = 0
    truncate: bool = True
    forms: Sequence[str] = ("float",)

    @classmethod
    def parse(
        cls,
        items: Sequence[PlacedItem],
        body: Mapping[str, Any],
        aliases: Mapping[str, str] = _NONE,
        readers: Mapping[str, FieldReader] = _NONE,
    ) -> EmbeddingsRequest:
        """From a body.

        items: in the body.
        aliases: the dialect's names of the fields of this class.
        readers: the dialect's own, of these fields or of others, which are only checked.

        Raises:
            RequestError: a field has a wrong value.
        """
        values = read_mapping(body, {**_READERS, **readers}, aliases, refuse_unknown=False)
        return cls(items, **{name: value for name, value in values.items() if name in _READERS})


def only(*allowed: Any) -> FieldReader:
    """A reader of a field of which the server supports these values only, and null."""

    def read(name: str, value: Any) -> Any:
        if value not in allowed:
            names = ", ".join(map(shown, allowed)) or "null"
            raise RequestError(f"{name} is {shown(value)}; this server supports only {names}")
        return value

    return read


def _forms(name: str, value: Any) -> list[str]:
    """A form, or a list of at least one."""
    forms = value if isinstance(value, list) else [value]
    if not forms or not all(each in FORMATS for each in forms):
        raise RequestError(f"{name} is {shown(value)}: the allowed are {', '.join(FORMATS)}")
    return list(dict.fromkeys(forms))


def _dimensions(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value < _MOST_DIMENSIONS:
        raise RequestError(f"{name} is {shown(value)}, which is not a whole number from 1")
    return value


_READERS: dict[str, FieldReader] = {
    "model": name_of,
    "normalize": flag,
    "dimensions": _dimensions,
    "truncate": flag,
    "forms": _forms,
}
