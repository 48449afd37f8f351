"""The executors of a flow, and which of them a request goes to."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import ConfigurationError, RequestError
from clip_server.gateway.admission import Backlog
from clip_server.gateway.replicas import ReplicaPool

# An executor that binds it answers every endpoint that it does not bind by name.
_DEFAULT_ENDPOINT = "/default"
# Of the name of an endpoint.
_LONGEST = 1024
# Of a pattern for executors. It is matched on the event loop, where repetitions in one another, and
# many of them or of alternatives in a row, would take for ever.
_PATTERN = re.compile(r"[^\s#]{0,256}")
_REPETITION, _REPEATED_GROUP = re.compile(r"(?<!\()[*+?{]"), re.compile(r"\)[*+{]")
_MOST_REPETITIONS, _MOST_BARS = 3, 8
# `/encode/MODEL` names a model, as clip-as-service's client does.
_WITH_MODEL = re.compile(r"(/encode|/rank)/(.+)", re.DOTALL)


class UnansweredError(RequestError):
    """A request for an endpoint that no executor answers."""


class UnservedModelError(RequestError):
    """A request for a model that no executor has."""


@dataclass(frozen=True)
class FlowExecutor:
    """One executor of the flow, as it describes itself when the gateway starts.

    pool: its replicas.
    endpoints: those that it binds, with their schemas as Jina discovers them.
    info: its model, if it encodes and speaks clip.v1; else None.
    is_indexer: whether it holds a collection, and speaks clip.v1.
    backlog: the work in flight on it.
    """

    pool: ReplicaPool
    endpoints: Mapping[str, Any]
    info: pb.InfoResponse | None
    is_indexer: bool
    backlog: Backlog

    @property
    def name(self) -> str:
        """Its name in the flow."""
        return self.pool.name

    def answers(self, endpoint: str) -> bool:
        """Whether Jina would send a request for `endpoint` to it."""
        return endpoint in self.endpoints or _DEFAULT_ENDPOINT in self.endpoints

    @property
    def model_names(self) -> list[str]:
        """The names of its model, with and without the tag; empty if it does not encode."""
        if self.info is None:
            return []
        model = self.info.model
        return [model, model.partition("::")[0], *self.info.model_names]


@dataclass(frozen=True)
class Route:
    """The way of one request.

    endpoint: what the executors are asked for.
    target: a pattern of the names of those that get it, as Jina's `target_executor`; "": all.
    encoder: the one of the flow's encoders that takes part, if any.
    is_direct: the encoder alone answers, so the request needs no other way through the flow.
    """

    endpoint: str
    target: str
    encoder: FlowExecutor | None
    is_direct: bool


class Topology:
    """Chooses the executors that answer a request.

    executors: in the order of the flow.
    conditional: names of executors that get only some documents, by the flow's `when:`.

    Raises:
        ConfigurationError: no executor encodes, or an alias is another executor's name.
    """

    def __init__(
        self, executors: Sequence[FlowExecutor], conditional: Collection[str] = ()
    ) -> None:
        self.executors = executors
        self.encoders = [each for each in executors if each.info is not None]
        self._conditional = conditional
        # A route costs 30 µs to find, and clients ask for few different ones.
        self._routes = functools.lru_cache(maxsize=256)(self._find_route)
        if not self.encoders:
            raise ConfigurationError("no executor of this flow is a CLIPEncoder")
        self._by_name = _by_name(self.encoders)

    def encoder(self, model: str = "") -> FlowExecutor:
        """The encoder of this name, or whose model or an alias has it; without a name the first.

        Raises:
            UnservedModelError: there is none.
        """
        if not model:
            return self.encoders[0]
        found = self._by_name.get(_simplified(model))
        if found is None:
            known = ", ".join(
                f"{each.info.model} ({', '.join([each.name, *each.info.aliases])})"
                for each in self.encoders
                if each.info
            )
            raise UnservedModelError(
                f"no model here is named {model[:100]!r}; this server has {known}"
            )
        return found

    def can_answer(self) -> bool:
        """Whether a replica of an encoder answers."""
        return any(each.pool.can_answer for each in self.encoders)

    def binds(self, endpoint: str) -> bool:
        """Whether an executor answers `endpoint` by name, not only as any other."""
        return any(endpoint in each.endpoints for each in self.executors)

    def endpoints(self) -> set[str]:
        """The endpoints that executors bind by name."""
        return {name for each in self.executors for name in each.endpoints if name.startswith("/")}

    def route(self, endpoint: str, model: str = "", target: str = "") -> Route:
        """The way of a request for `endpoint`.

        model: the encoder or model to use, where the flow has several.
        target: a pattern of the executors that get it.

        Raises:
            UnansweredError: no executor answers it.
            RequestError: the pattern or the endpoint is invalid, or no encoder has that name.
        """
        return self._routes(endpoint, model, target)

    def _find_route(self, endpoint: str, model: str, target: str) -> Route:
        # It travels to the executors as metadata of gRPC, which holds nothing else.
        if not (endpoint.isascii() and endpoint.isprintable() and len(endpoint) <= _LONGEST):
            raise RequestError(
                f"the endpoint {endpoint[:100]!r} is not one of up to {_LONGEST} ASCII characters"
            )
        named = _WITH_MODEL.fullmatch(endpoint)
        if named and not model and not self.binds(endpoint):
            endpoint, model = named.groups()
            if len(self.encoders) == 1:  # it answers for any model, as in clip-as-service
                model = ""
        chosen = self._together(self.encoder(model)) if not model else [self.encoder(model)]
        answering = [
            each
            for each in self._targeted(target)
            if each.answers(endpoint) and (target or each.info is None or each in chosen)
        ]
        if not answering:
            raise UnansweredError(self._unanswered(endpoint, target))
        encoder = next((each for each in answering if each.info is not None), None)
        return Route(
            endpoint,
            target or self._all_but_encoders_besides(chosen),
            encoder,
            answering == [encoder] and answering[0].name not in self._conditional,
        )

    def _targeted(self, target: str) -> Sequence[FlowExecutor]:
        if not _is_simple(target):
            raise RequestError(
                f"target_executor {target[:100]!r} is too complex: allowed are 256 characters "
                f"without blanks and #, {_MOST_BARS} times | and {_MOST_REPETITIONS} repetitions "
                "(* + ? {), none of them of a group"
            )
        try:
            pattern = re.compile(target)
        except (re.error, RecursionError, OverflowError):
            raise RequestError(
                f"target_executor {target[:100]!r} is not a regular expression"
            ) from None
        return [each for each in self.executors if pattern.match(each.name)]

    def _together(self, encoder: FlowExecutor) -> Sequence[FlowExecutor]:
        """An encoder and, if it takes only texts or only images, the others of one modality."""
        if encoder.info is None or not encoder.info.modality:
            return [encoder]
        return [each for each in self.encoders if each.info and each.info.modality]

    def _all_but_encoders_besides(self, chosen: Sequence[FlowExecutor]) -> str:
        others = [re.escape(each.name) for each in self.encoders if each not in chosen]
        return f"(?!({'|'.join(others)})$)" if others else ""

    def _unanswered(self, endpoint: str, target: str) -> str:
        if target:
            names = ", ".join(each.name for each in self.executors)
            return (
                f"target_executor {target[:100]!r} names no executor that answers "
                f"{endpoint[:100]}; this flow has {names}"
            )
        known = ", ".join(sorted(self.endpoints()))
        return f"no executor of this flow answers {endpoint[:100]}; there is {known}"


def _is_simple(pattern: str) -> bool:
    """Whether a regular expression of a client takes little time, whatever it is matched with."""
    return bool(
        _PATTERN.fullmatch(pattern)
        and not _REPEATED_GROUP.search(pattern)
        and len(_REPETITION.findall(pattern)) <= _MOST_REPETITIONS
        and pattern.count("|") <= _MOST_BARS
    )


def _by_name(encoders: Sequence[FlowExecutor]) -> dict[str, FlowExecutor]:
    """The encoder that each name chooses: executors' names and aliases come before models' own,
    and of encoders with the same model the first."""
    found: dict[str, FlowExecutor] = {_simplified(each.name): each for each in encoders}
    for each in encoders:
        for alias in each.info.aliases if each.info else ():
            other = found.setdefault(_simplified(alias), each)
            if other is not each:
                raise ConfigurationError(
                    f"{each.name}: the alias {alias!r} is a name of {other.name} as well"
                )
    for each in encoders:
        for name in each.model_names:
            found.setdefault(_simplified(name), each)
    return found


def _simplified(name: str) -> str:
    """A model's name in the one spelling of `ViT-L/14@336px` and `ViT-L-14-336`, and of
    `ViT-B-32::openai` and `ViT-B-32__openai`."""
    return re.sub("[/@]", "-", name.replace("__", "::")).removesuffix("px").casefold()
