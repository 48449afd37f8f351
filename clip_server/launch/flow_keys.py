"""The keys of a flow: which there are, where each belongs, and what their values may be.

Jina ignores a key that it does not know, so a misspelled one would go unnoticed. Its own keys are
read from its command-line parsers, which also check their values.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from clip_server.errors import ConfigurationError
from clip_server.launch import jina_internals
from clip_server.launch.gateway_group import MOST_GATEWAYS

TLS_PASSWORD, TLS_CLIENT_CA = "ssl_keyfile_password", "ssl_ca_certs"
# Read by our gateway; everything else under `gateway:` is Jina's.
_GATEWAY_LIMITS = (
    "max_request_bytes",
    "max_queued_bytes",
    "max_connections",
    "max_connections_per_address",
    "grace_seconds",
)
_GATEWAY_SECONDS = (
    "max_wait",
    "header_timeout",
    "body_timeout",
    "max_connection_age",
    "silence_seconds",
)
# The least of those that may not be 0: processes show twice a second that they are alive.
_LEAST_SECONDS = {"silence_seconds": 1.0}
GATEWAY_SWITCHES = ("public_metrics", "page")
GATEWAY_PARAMETERS = (
    *_GATEWAY_LIMITS,
    *_GATEWAY_SECONDS,
    "auth_file",
    TLS_CLIENT_CA,
    *GATEWAY_SWITCHES,
)
# Read by the command, which supervises the processes.
SUPERVISION_PARAMETERS = ("max_restarts", "hang_seconds", "max_batch_seconds")
# Likewise, but about the gateway.
GATEWAYS = "gateways"
# Checked by whoever prepares a flow, not by Jina's parsers.
_PREPARED = {"uses", "host", "port", "protocol"}
# Understood by Jina's cloud, ignored here.
_CLOUD = {"jcloud"}
# Jina would hand these, written under `with:`, to the gateway, too, or to no one.
_OF_EXECUTORS_ONLY = {"replicas", "shards", "uses", "uses_with", "gpus"}
_OF_GATEWAYS_ONLY = {"ssl_keyfile", "ssl_certfile", "cors", "uvicorn_kwargs"}
_METAS = {"name", "description", "workspace", "py_modules"}
# The least value of what Jina reads as a whole number but does not check.
_LEAST = {
    "replicas": 1,
    "shards": 1,
    "prefetch": 0,
    **dict.fromkeys((*_GATEWAY_LIMITS, *SUPERVISION_PARAMETERS, GATEWAYS), 1),
    "max_restarts": 0,
}
_MOST = {GATEWAYS: MOST_GATEWAYS}


@dataclass(frozen=True)
class Section:
    """A part of a flow.

    place: where it stands in the YAML, for messages.
    own: its keys that are not Jina's.
    parsers: of Jina's keys, by name.
    without: keys of those parsers that belong elsewhere.
    """

    place: str
    own: frozenset[str]
    parsers: tuple[str, ...] = ()
    without: frozenset[str] = frozenset()

    def known(self) -> set[str]:
        """Every key that may stand here."""
        jina = {key for parser in self.parsers for key in _aliases(parser).values()}
        return (jina | self.own) - self.without


TOP = Section(
    "the flow",
    frozenset({"jtype", "version", "with", "executors", "deployments", "gateway", *_CLOUD}),
)
WITH = Section(
    "with:",
    frozenset(
        {
            *(*GATEWAY_PARAMETERS, *SUPERVISION_PARAMETERS, GATEWAYS, TLS_PASSWORD),
            *(*_PREPARED, "args", "kwargs", *_CLOUD),
        }
    ),
    ("flow", "gateway", "client", "deployment"),
    frozenset(_OF_EXECUTORS_ONLY),
)
GATEWAY = Section(
    "gateway:",
    frozenset({*GATEWAY_PARAMETERS, GATEWAYS, TLS_PASSWORD, *_PREPARED, "jtype", *_CLOUD}),
    ("gateway",),
)
EXECUTOR = Section(
    "an executor",
    frozenset({"needs", "method", "jtype", *_PREPARED, *_CLOUD}),
    ("deployment",),
    frozenset(_OF_GATEWAYS_ONLY),
)
USES = Section(
    "uses:",
    frozenset(
        {
            *("jtype", "with", "metas", "requests", "dynamic_batching", "py_modules"),
            *("replicas", "workspace"),
        }
    ),
)
METAS = Section("metas:", frozenset(_METAS))


@cache
def encoder_section() -> Section:
    """The parameters of our encoders, whose module needs the server's packages."""
    from clip_server.executors.parameters import EncoderParameters

    names = frozenset({*EncoderParameters.names(), "traversal_paths"})
    return Section("with: of an executor's uses:", names)


@cache
def indexer_section() -> Section:
    """The parameters of our indexer."""
    from clip_server.executors.indexer_parameters import IndexerParameters

    return Section("with: of an indexer's uses:", frozenset(IndexerParameters.names()))


def section(value: Any, spec: Section, place: str) -> dict[str, Any]:
    """A section's keys and values: names as Jina's parsers have them, empty ones left out.

    place: where it stands, for messages.

    Raises:
        ConfigurationError: a key is unknown, or the value of one of Jina's keys is not allowed.
    """
    mapping = as_mapping(value, place)
    found: dict[str, Any] = {}
    for written, content in mapping.items():
        key = _canonical(str(written).replace("-", "_"), spec)
        if key not in spec.known():
            raise ConfigurationError(_unknown(str(written), spec, place))
        if content in (None, "", []):
            continue
        if key in found:
            raise ConfigurationError(f"{place}: {key} is given twice, once as {written}")
        found[key] = content
    for key, content in found.items():
        if key not in spec.own:
            found[key] = content = _check_value(key, content, spec, place)
        least = _LEAST.get(key)
        if least is not None:
            found[key] = whole_number(content, f"{place}: {key}", least, _MOST.get(key))
        if key in _GATEWAY_SECONDS:
            found[key] = _seconds(content, f"{place}: {key}", _LEAST_SECONDS.get(key, 0.0))
    return found


def as_mapping(value: Any, place: str) -> dict[Any, Any]:
    """A part of a flow that holds keys and values; nothing at all is an empty one."""
    if value in (None, ""):
        return {}
    if not isinstance(value, Mapping):
        raise ConfigurationError(
            f"{place}: {_shown(value)} is not keys with values, as `key: value`"
        )
    return dict(value)


def as_list(value: Any) -> list[Any]:
    """A value, or the values of a list; none for None."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def port_number(value: Any, place: str) -> int:
    """A port; 0 means any that is free."""
    return whole_number(value, place, most=65535)


def whole_number(value: Any, place: str, least: int = 0, most: int | None = None) -> int:
    """A whole number, which may stand in quotes.

    Raises:
        ConfigurationError: it is not one, or out of range.
    """
    number = int(value) if isinstance(value, str) and re.fullmatch(r"-?\d+", value) else value
    if type(number) is not int or number < least or (most is not None and number > most):
        limits = f"from {least}" if most is None else f"from {least} to {most}"
        raise ConfigurationError(f"{place}: {_shown(value)} is not a whole number {limits}")
    return number


def _seconds(value: Any, place: str, least: float) -> float:
    """A number of seconds, which may stand in quotes.

    Raises:
        ConfigurationError: it is not one, or less than `least`.
    """
    try:
        number = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not least <= number < float("inf"):
        raise ConfigurationError(
            f"{place}: {_shown(value)} is not a number of seconds from {least:g}"
        )
    return number


def likely(written: str, known: Iterable[str], place: str = "") -> str:
    """A suggestion to end a message with; empty if no known key is similar."""
    found = difflib.get_close_matches(written, list(known), 1, cutoff=0.7)
    return f"; did you mean {found[0]}{place}?" if found else ""


def _unknown(written: str, spec: Section, place: str) -> str:
    message = f"{place}: unknown key {written!r}"
    key = written.replace("-", "_")
    elsewhere = {each.place: each.known() for each in _elsewhere(spec)}
    for other, keys in elsewhere.items():
        if key in keys:
            return f"{message}, which belongs under {other}"
    if meant := likely(key, spec.known()):
        return message + meant
    for other, keys in elsewhere.items():
        if meant := likely(key, keys, f", under {other}"):
            return message + meant
    return f"{message}; docs/flows.md lists the keys there are"


def _elsewhere(spec: Section) -> list[Section]:
    """The other sections, likelier ones first."""
    inward = [USES, encoder_section(), METAS, EXECUTOR, WITH, GATEWAY, TOP]
    outward = [WITH, EXECUTOR, USES, encoder_section(), METAS, GATEWAY, TOP]
    order = inward if spec in (EXECUTOR, USES) else outward
    return [each for each in order if each is not spec]


def _check_value(key: str, value: Any, spec: Section, place: str) -> Any:
    """The value of one of Jina's keys; of a choice, as Jina spells it.

    Raises:
        ConfigurationError: Jina's parser would end the process with its usage.
    """
    name = next(each for each in spec.parsers if key in _aliases(each).values())
    parser = _parser(name)
    action = next(each for each in parser._actions if each.dest == key)
    where = f"{place}: {key}"
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigurationError(f"{where}: {_shown(value)} is not true or false")
        return value
    value = next((each for each in action.choices or () if _spells(value, each)), value)
    if action.type is int:
        whole_number(value, where, _LEAST.get(key, -1))
    if isinstance(value, bool) or (isinstance(value, list) and action.nargs is None):
        raise ConfigurationError(f"{where}: {_shown(value)} is not one text or number")
    try:
        jina_internals.check_option(parser, key, value)
    except (TypeError, ValueError, argparse.ArgumentError, argparse.ArgumentTypeError) as error:
        why = re.sub(r"^argument [^:]*: ", "", str(error))
        raise ConfigurationError(f"{where}: {_shown(value)}: {why}") from None
    return value


def _spells(value: Any, choice: Any) -> bool:
    return isinstance(value, str) and value.lower() == str(choice).lower()


def _canonical(key: str, spec: Section) -> str:
    return next((names[key] for each in spec.parsers if key in (names := _aliases(each))), key)


@cache
def _aliases(name: str) -> dict[str, str]:
    """Every spelling of a parser's options, as keys of YAML: {"host_in": "host", ...}."""
    return {
        option.lstrip("-").replace("-", "_"): action.dest
        for action in _parser(name)._actions
        if action.default != argparse.SUPPRESS  # --help and its like
        for option in action.option_strings
        if option.startswith("--")
    }


@cache
def _parser(name: str) -> argparse.ArgumentParser:
    return jina_internals.parser(name)


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
