"""Prepares the executors of a flow: completes and checks what is written of each."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clip_server import logs
from clip_server.errors import ConfigurationError
from clip_server.launch import flow_keys, jina_internals
from clip_server.launch.flow_keys import as_list, as_mapping, section
from clip_server.runtimes import RuntimeSpec, by_executor

EXECUTOR_DEFAULTS: Mapping[str, Any] = {
    "host": "127.0.0.1",
    # Loading a large model takes longer than Jina's ten minutes on a slow disk.
    "timeout_ready": -1,
    # Jina's gateway pings idle channels more often than gRPC's servers put up with; the next
    # call would then fail.
    "grpc_server_options": {"grpc.http2.max_ping_strikes": 0},
}

_GPUS = "CUDA_VISIBLE_DEVICES"
# The package of our executors, as a prefix of their modules.
OUR_EXECUTORS = "clip_server.executors."
_INDEXER = f"{OUR_EXECUTORS}indexer"
_HUB = f"{OUR_EXECUTORS}clip_hub"
# The classes in the modules of our executors; in the others, CLIPEncoder.
_CLASSES = {_INDEXER: ["CLIPIndexer"], _HUB: ["CLIPImageEncoder", "CLIPTextEncoder"]}
# Executors of clip-as-service for which there is no module here.
_DROPPED = {"clip_hg", "clip_nebullvm"}
# The indexer in clip-as-service's examples, whose package no longer installs.
_ANNLITE = ("annlite.executor", "AnnLiteIndexer")


def is_ours(executor: Mapping[str, Any]) -> bool:
    """Whether an executor is one of those that come with the server."""
    modules = _modules(executor)
    return bool(modules) and all(_module(str(each)).startswith(OUR_EXECUTORS) for each in modules)


def prepare_executor(written: Mapping[str, Any], place: str) -> dict[str, Any]:
    """An executor as it will run: with its defaults, and everything under `uses:`.

    place: where it is in the flow, for messages.

    Raises:
        ConfigurationError: a key is unknown, missing or in the wrong place.
    """
    executor = section(written, flow_keys.EXECUTOR, place)
    if executor.get("external"):
        return executor
    if executor.get("protocol") not in (None, "grpc"):
        raise ConfigurationError(
            f"{place}: protocol: an executor speaks grpc; what clients speak stands under with:"
        )
    uses = executor.get("uses")
    if not uses:
        raise ConfigurationError(f"{place}: uses: is missing, which says what encodes")
    executor = {**EXECUTOR_DEFAULTS, **executor}
    if isinstance(uses, str):
        if "py_modules" not in executor:
            return executor
        uses = {"jtype": uses}
    uses = section(uses, flow_keys.USES, f"{place}: uses")
    _lift(executor, uses, place)
    metas = section(uses.get("metas"), flow_keys.METAS, f"{place}: uses: metas")
    uses["metas"] = {**metas, "py_modules": _named_modules(executor, uses, place)}
    uses["with"] = as_mapping(uses.get("with"), f"{place}: uses: with") | as_mapping(
        executor.pop("uses_with", None), f"{place}: uses_with"
    )
    executor.pop("py_modules", None)
    executor["uses"] = uses
    if uses["metas"]["py_modules"] == [_INDEXER]:
        _prepare_indexer(executor, place)
    return executor


def _lift(executor: dict[str, Any], uses: dict[str, Any], place: str) -> None:
    """Moves what is an executor's own from under `uses:`, where clip-as-service's pages have it."""
    if "replicas" in uses:
        # Jina would ignore it there without a word.
        executor.setdefault("replicas", uses.pop("replicas"))
        message = f"{place}: replicas belongs next to uses:, not under it"
        logs.announce(message, logging.WARNING)
    if "workspace" in uses:
        executor.setdefault("workspace", uses.pop("workspace"))


def _named_modules(executor: Mapping[str, Any], uses: Mapping[str, Any], place: str) -> list[str]:
    modules = _modules(executor)
    for module in modules:
        if not isinstance(module, str):
            raise ConfigurationError(f"{place}: py_modules: {module!r} is no module's name or file")
    if not modules or "jtype" not in uses:
        raise ConfigurationError(
            f"{place}: uses: needs jtype: CLIPEncoder and, under metas: py_modules:, its module, "
            f"one of {', '.join(OUR_EXECUTORS + each for each in by_executor())}"
        )
    return [_module(each) for each in modules]


def _prepare_indexer(executor: dict[str, Any], place: str) -> None:
    uses = executor["uses"]
    if uses["jtype"] == _ANNLITE[1]:
        uses["jtype"] = "CLIPIndexer"
        logs.announce(
            f"{place}: {_ANNLITE[1]} is replaced by CLIPIndexer; the collection begins empty"
        )
    # Where AnnLite kept its rows.
    if "workspace" in executor and not uses["with"].keys() & {"path", "uri"}:
        uses["with"]["path"] = executor["workspace"]
    if executor.get("replicas", 1) > 1 and "uri" not in uses["with"]:
        raise ConfigurationError(
            f"{place}: replicas: a collection in a folder has one process: serve it from a Milvus "
            "server, with uri:, to have several"
        )


def hand_out_gpus(options: dict[str, Any], executors: list[dict[str, Any]]) -> None:
    """Makes `CUDA_VISIBLE_DEVICES: RR` work wherever it is set.

    Jina reads it in the `env` of an executor and in the environment of the command, but not in
    the `env` of a flow.
    """
    of_flow = as_mapping(options.pop("env", None), "with: env")
    devices = of_flow.pop(_GPUS, None)
    if of_flow:
        options["env"] = of_flow
    for executor in executors:
        env = as_mapping(executor.get("env"), "env")
        if devices is not None:
            env.setdefault(_GPUS, devices)
        if env:
            executor["env"] = _without_missing_gpus(env)
    if str(os.environ.get(_GPUS)).startswith("RR"):
        os.environ |= _without_missing_gpus({_GPUS: os.environ[_GPUS]})


def _without_missing_gpus(env: dict[str, Any]) -> dict[str, Any]:
    """An environment in which `RR` that selects no GPU hides them all."""
    devices = str(env.get(_GPUS, ""))
    if not devices.startswith("RR") or jina_internals.selects_gpus(devices):
        return env
    logs.announce(
        f"{_GPUS}: {devices} selects none of this machine's NVIDIA GPUs; using the CPU",
        logging.WARNING,
    )
    return {**env, _GPUS: "-1"}  # empty, Jina would make it None


def check_executor(executor: Mapping[str, Any], place: str) -> None:
    """Checks a prepared executor: its module, its class, the parameters of one of ours. Fetches the
    model that an encoder names.

    Raises:
        ConfigurationError: a parameter, a package, a model or a module is wrong or missing.
    """
    uses = executor["uses"] if isinstance(executor.get("uses"), dict) else {}
    for module in uses.get("metas", {}).get("py_modules", []):
        if module.startswith(OUR_EXECUTORS):
            _check_our_executor(module, uses, place)
        elif not ("extra_search_paths" in executor or Path(module).exists() or _is_module(module)):
            kind = "file" if module.endswith(".py") else "module or file"
            raise ConfigurationError(
                f"{place}: py_modules: there is no {kind} {module}, seen from {Path.cwd()}"
            )


def _check_our_executor(module: str, uses: Mapping[str, Any], place: str) -> None:
    classes = _CLASSES.get(module, ["CLIPEncoder"])
    if uses["jtype"] not in classes:
        raise ConfigurationError(
            f"{place}: jtype: {uses['jtype']}: the class in {module} is {' or '.join(classes)}"
        )
    parameters, where = uses["with"], f"{place}: uses: with"
    if module == _HUB:
        _check_hub_encoder(uses["jtype"], parameters, where)
    elif module == _INDEXER:
        _check_indexer(parameters, where)
    else:
        _check_encoder(module, parameters, where)


def _check_encoder(module: str, parameters: Mapping[str, Any], place: str) -> None:
    from clip_server.executors.parameters import EncoderParameters

    name = module.removeprefix(OUR_EXECUTORS)
    runtime = by_executor().get(name)
    if runtime is None:
        raise ConfigurationError(
            f"py_modules: there is no {module}{flow_keys.likely(name, _executors())}"
        )
    given = section(parameters, flow_keys.encoder_section(), place)
    with _errors_placed(place):
        EncoderParameters.parse(given)
    if package := runtime.missing_package():
        raise ConfigurationError(_not_installed(runtime, package))
    importlib.import_module(module).CLIPEncoder.prepare(given)


def _check_hub_encoder(name: str, parameters: Mapping[str, Any], place: str) -> None:
    with _errors_placed(place):
        getattr(importlib.import_module(_HUB), name).prepare(parameters)


def _check_indexer(parameters: Mapping[str, Any], place: str) -> None:
    from clip_server.executors.indexer_parameters import IndexerParameters

    given = section(parameters, flow_keys.indexer_section(), place)
    with _errors_placed(place):
        IndexerParameters.parse(given)


@contextmanager
def _errors_placed(place: str) -> Iterator[None]:
    """Puts the place in the flow in front of an error's message."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{place}: {error}") from None


def _not_installed(runtime: RuntimeSpec, package: str) -> str:
    runnable = [spec.flow for spec in by_executor().values() if not spec.missing_package()]
    hint = f"; python -m clip_server {runnable[0]} runs with what is installed" if runnable else ""
    return f"{runtime.executor} needs the package {package}: {runtime.install_hint}{hint}"


def _modules(executor: Mapping[str, Any]) -> list[str]:
    """The `py_modules` of an executor, wherever they stand."""
    uses = executor.get("uses")
    uses = uses if isinstance(uses, dict) else {}
    metas = uses.get("metas")
    metas = metas if isinstance(metas, dict) else {}
    return as_list(metas.get("py_modules") or uses.get("py_modules") or executor.get("py_modules"))


def _module(name: str) -> str:
    """clip-as-service's two spellings of an executor as one, unless a file of that name is
    there."""
    if name == _ANNLITE[0] and not _is_module(name):
        return _INDEXER
    path = Path(name)
    if path.is_file():
        return name
    stem = path.stem if path.suffix == ".py" else name.removeprefix(OUR_EXECUTORS)
    if stem in _DROPPED:
        raise ConfigurationError(
            f"py_modules: {name} of clip-as-service is replaced by clip_torch and clip_onnx: name "
            "one of them, and under with: name: the model or a folder of Hugging Face's"
        )
    return OUR_EXECUTORS + stem if path.suffix == ".py" and stem in _executors() else name


def _executors() -> list[str]:
    """The names of our executors' modules."""
    return [*by_executor(), *(module.removeprefix(OUR_EXECUTORS) for module in _CLASSES)]


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
