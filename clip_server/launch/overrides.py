"""Sets parameters of a flow's encoders from the command line, whatever the flow says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clip_server.errors import ConfigurationError
from clip_server.launch.flow import written_executors
from clip_server.launch.flow_keys import as_mapping

_ENCODER = "CLIPEncoder"
# Several of these are one encoder together, and share its model.
_OF_ONE_MODALITY = ("CLIPImageEncoder", "CLIPTextEncoder")
# Parameters that are about the model that the flow names, and not about another.
_ABOUT_THE_MODEL = {
    "model_path",
    "matryoshka_dimensions",
    "base_tokenizer_model",
    "base_feature_extractor",
}


def override_encoders(spec: Mapping[str, Any], options: Mapping[str, Sequence[str]]) -> None:
    """Sets parameters of a flow's encoders, in place.

    options: the values of each option of the command, `model`, `device` and `dtype`: `VALUE` is for
        every encoder, `EXECUTOR=VALUE` for the executor of that name.

    Raises:
        ConfigurationError: the flow has no such executor, no encoder, or several where the model of
            one is given.
    """
    executors = {
        str(each.get("name") or f"executor{index}"): each  # as Jina names it
        for index, each in enumerate(written_executors(spec))
    }
    for option, values in options.items():
        split = [_split(value) for value in values]
        for name, value in sorted(split, key=lambda pair: bool(pair[0])):  # those of one win
            given = f"--{option} {name and f'{name}='}{value}"
            chosen = _named(executors, name, given) if name else _encoders(executors, given)
            if option == "model" and not name:
                _refuse_several(chosen, given)
            for executor in chosen.values():
                _set(executor, "name" if option == "model" else option, value)


def _split(value: str) -> tuple[str, str]:
    """The executor, if one is named, and the value for it. A path may contain = as well."""
    name, separator, rest = value.partition("=")
    return (name, rest) if separator and name.isidentifier() else ("", value)


def _named(executors: Mapping[str, Any], name: str, given: str) -> Mapping[str, Any]:
    if name not in executors:
        raise ConfigurationError(
            f"{given}: no executor of this flow is named {name}; it has {', '.join(executors)} "
            "(a path that contains = begins with ./)"
        )
    return {name: executors[name]}


def _encoders(executors: Mapping[str, Any], given: str) -> Mapping[str, Any]:
    classes = (_ENCODER, *_OF_ONE_MODALITY)
    found = {name: each for name, each in executors.items() if _class_name(each) in classes}
    if not found:
        raise ConfigurationError(
            f"{given}: the flow has no {_ENCODER} to set this for; name an executor of your own "
            f"as EXECUTOR=VALUE, where EXECUTOR is {' or '.join(executors)}"
        )
    return found


def _refuse_several(encoders: Mapping[str, Any], given: str) -> None:
    kinds = [_class_name(each) for each in encoders.values()]
    if kinds.count(_ENCODER) + any(kind in _OF_ONE_MODALITY for kind in kinds) > 1:
        option, value = given.split(" ", 1)
        choices = " or ".join(f"{option} {name}={value}" for name in encoders)
        raise ConfigurationError(
            f"{given}: this flow has {len(encoders)} encoders, {', '.join(encoders)}; choose one: "
            f"{choices}"
        )


def _class_name(executor: Mapping[str, Any]) -> Any:
    """`uses: CLASS`, or `uses: {jtype: CLASS}`."""
    uses = executor.get("uses")
    return uses.get("jtype") if isinstance(uses, dict) else uses


def _set(executor: dict[str, Any], parameter: str, value: str) -> None:
    uses = executor.get("uses")
    if parameter == "name":
        _forget_model(executor, "uses_with")
        if isinstance(uses, dict):
            _forget_model(uses, "with")
    # It has precedence over `with:` under `uses:`.
    given = as_mapping(executor.get("uses_with"), "uses_with")
    executor["uses_with"] = given | {parameter: value}


def _forget_model(keys: dict[str, Any], place: str) -> None:
    """Removes what is about the model that the flow names."""
    parameters = as_mapping(keys.get(place), place)
    keys[place] = {
        key: value
        for key, value in parameters.items()
        if str(key).replace("-", "_") not in _ABOUT_THE_MODEL
    }
