"""Loads a flow's YAML file and prepares it to run: applies defaults, refuses mistakes.

Flows written for clip-as-service run unchanged. Beyond that a flow gets our gateway (unless it
names its own), executors that listen on loopback only, and its models fetched before any process
starts, so that a mistake is one message within seconds.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from clip_server.errors import ConfigurationError
from clip_server.keys.keyring import open_keyring
from clip_server.launch import flow_keys, jina_internals, ports
from clip_server.launch.flow_executors import (
    OUR_EXECUTORS,
    check_executor,
    hand_out_gpus,
    is_ours,
    prepare_executor,
)
from clip_server.launch.flow_gateway import prepare_gateway
from clip_server.launch.flow_keys import as_list, port_number, section, whole_number
from clip_server.launch.supervision import Supervision

DEFAULT_FLOW = "torch-flow.yml"
DEFAULT_MODEL = "ViT-B-32::openai"
_ENVIRONMENT = re.compile(r"\$\{\{\s*ENV\.(\w+)\s*\}\}", re.IGNORECASE)


def built_in() -> list[str]:
    """The names of the flows that come with the server."""
    flows = resources.files("clip_server.flows")
    return sorted(each.name for each in flows.iterdir() if each.name.endswith(".yml"))


def read(name: str) -> str:
    """The text of a YAML file: a path, - for stdin, or the name of a flow that comes with the
    server.

    Raises:
        ConfigurationError: there is no such file, or it cannot be read.
    """
    path = Path(name)
    try:
        if name == "-":
            return sys.stdin.read()
        if path.exists():
            return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise ConfigurationError(f"{name} is not YAML: it is not text in UTF-8") from None
    except OSError as error:
        raise ConfigurationError(f"{name} cannot be read: {error.strerror}") from None
    if path.name in built_in():
        return resources.files("clip_server.flows").joinpath(path.name).read_text("utf-8")
    raise ConfigurationError(
        f"no flow at {name}: give the path of a YAML file, or one that comes with the server: "
        + ", ".join(built_in())
        + flow_keys.likely(path.name, built_in())
    )


def load(text: str) -> dict[str, Any]:
    """A flow's YAML as a dict.

    Raises:
        ConfigurationError: it is not YAML, or not a flow.
    """
    spec = _parse(text, "the flow")
    if not isinstance(spec, dict):
        spec = {}
    executors = spec.get("executors") or spec.get("deployments")
    if not executors:
        raise ConfigurationError("the flow has no executors: see docs/flows.md for an example")
    if not isinstance(executors, list):
        raise ConfigurationError("executors: is a list, where each executor begins with `- name:`")
    for index, executor in enumerate(executors):
        if not isinstance(executor, dict):
            raise ConfigurationError(
                f"executors: number {index + 1} holds no keys: it needs at least uses:"
            )
    loaded: dict[str, Any] = spec
    return loaded


def include_executors(spec: Mapping[str, Any], flow: str) -> None:
    """Writes executors that are defined elsewhere into the flow, in place.

    `uses: image/config.yml` is replaced by the content of that file, which is relative to the
    working directory or, as in Jina, to the folder of the flow's file; the dotted name of a class
    of ours by the class and its module.

    flow: the path of the flow's file.

    Raises:
        ConfigurationError: there is no such file, or it does not define an executor.
    """
    for executor in written_executors(spec):
        uses = executor.get("uses")
        if not isinstance(uses, str):
            continue
        if Path(uses).suffix in (".yml", ".yaml"):
            executor["uses"] = _read_executor(uses, [Path.cwd(), Path(flow).resolve().parent])
        elif uses.startswith(OUR_EXECUTORS):
            module, _, name = uses.rpartition(".")
            executor["uses"] = {"jtype": name, "metas": {"py_modules": [module]}}


def written_executors(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The executors of a flow that is not yet prepared."""
    executors: list[dict[str, Any]] = spec.get("executors") or spec["deployments"]
    return executors


def has_only_encoders(spec: Mapping[str, Any]) -> bool:
    """Whether every executor of a flow is one of ours."""
    return all(map(is_ours, written_executors(spec)))


def expand(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A flow with its variables replaced by the environment's.

    A value that then reads as a number or as true or false is one, quoted or not.

    Raises:
        ConfigurationError: a variable is not set.
    """
    # The built-in flows take the model's name from here.
    if not os.environ.get("CLIP_MODEL"):
        os.environ["CLIP_MODEL"] = DEFAULT_MODEL
    for name in _ENVIRONMENT.findall(str(spec)):
        if name not in os.environ:
            raise ConfigurationError(
                f"the flow uses the environment variable {name}, which is not set"
            )
    return jina_internals.expand_variables(spec)


def supervision(spec: Mapping[str, Any]) -> Supervision:
    """How the processes of a flow are supervised.

    Raises:
        ConfigurationError: a key is unknown, or a value is not allowed.
    """
    given = {
        **section(spec.get("with"), flow_keys.WITH, "with"),
        **section(spec.get("gateway"), flow_keys.GATEWAY, "gateway"),
    }
    names = (*flow_keys.SUPERVISION_PARAMETERS, flow_keys.GATEWAYS, "grace_seconds")
    return Supervision(**{name: given[name] for name in names if name in given})


def prepare(
    spec: Mapping[str, Any], host: str | None = None, port: Sequence[int] = ()
) -> dict[str, Any]:
    """The flow as it will run. Fetches the models that its encoders name.

    host: to listen on, whatever the flow says.
    port: likewise, one for each protocol; a single one is the first of consecutive ports.

    Raises:
        ConfigurationError: a key is unknown, a value is not allowed, a port is in use, a model
            or an extra is missing.
    """
    prepared = {"jtype": "Flow", "version": "1", **section(spec, flow_keys.TOP, "the flow")}
    if prepared["jtype"] != "Flow" or str(prepared["version"]).split(".")[0] != "1":
        raise ConfigurationError(
            f"the flow begins with jtype: {prepared['jtype']} and version: {prepared['version']}; "
            "write jtype: Flow and version: '1'"
        )
    options = section(prepared.get("with"), flow_keys.WITH, "with")
    for key in flow_keys.SUPERVISION_PARAMETERS:  # see `supervision`
        options.pop(key, None)
    prepared["gateway"] = prepare_gateway(options, prepared.get("gateway"), host, port)
    prepared["with"] = options
    executors = prepared.pop("deployments", None) or prepared["executors"]
    prepared["executors"] = [
        prepare_executor(each, _place(each, index)) for index, each in enumerate(executors)
    ]
    hand_out_gpus(options, prepared["executors"])
    _check_names(prepared["executors"])
    _check_addresses(prepared)
    _check_monitoring(prepared, supervision(spec).gateways)
    for index, executor in enumerate(prepared["executors"]):
        check_executor(executor, _place(executor, index))
    typed: dict[str, Any] = _type_first(prepared)
    return typed


def addresses(spec: Mapping[str, Any]) -> list[str]:
    """The addresses of a prepared flow, as URLs."""
    gateway = spec["gateway"]
    secure = bool(gateway.get("ssl_keyfile"))
    schemes = {"grpc": "grpc", "http": "http", "websocket": "ws"}
    host = f"[{gateway['host']}]" if ":" in gateway["host"] else gateway["host"]
    return [
        f"{schemes[protocol]}{'s' if secure else ''}://{host}:{port}"
        for protocol, port in zip(gateway["protocol"], gateway["port"], strict=True)
    ]


def needs_key(spec: Mapping[str, Any]) -> bool:
    """Whether callers of a prepared flow need a key."""
    return open_keyring(spec["gateway"].get("uses_with", {}).get("auth_file")) is not None


def _parse(text: str, what: str) -> Any:
    """The content of a YAML document, in which `!CLASS`, Jina's older form, is `jtype: CLASS`.

    what: the document, for messages.

    Raises:
        ConfigurationError: it is not YAML, or gives a key twice.
    """
    import yaml  # here, so that its absence is reported as that of any other package

    class Loader(yaml.SafeLoader):
        pass

    def construct_tagged(loader: Any, jtype: str, node: Any) -> dict[str, Any]:
        is_mapping = isinstance(node, yaml.MappingNode)
        keys = loader.construct_mapping(node, deep=True) if is_mapping else {}
        return {"jtype": jtype, **keys}

    Loader.add_multi_constructor("!", construct_tagged)
    try:
        parsed = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{what} is not YAML: {_in_one_line(error)}") from None
    _refuse_repeated_keys(yaml.compose(text), what)
    return parsed


def _read_executor(name: str, folders: Sequence[Path]) -> dict[str, Any]:
    """The content of an executor's own YAML file, with the paths of its modules made absolute."""
    found = [folder / name for folder in folders if (folder / name).is_file()]
    if not found:
        seen_from = " or ".join(dict.fromkeys(map(str, folders)))
        raise ConfigurationError(f"uses: there is no file {name}, seen from {seen_from}")
    executor = _parse(read(str(found[0])), f"uses: {name}")
    if not isinstance(executor, dict) or "jtype" not in executor:
        raise ConfigurationError(
            f"uses: {name} does not define an executor: it begins with its class, as "
            "`jtype: CLIPEncoder`"
        )
    metas = executor.get("metas")
    for keys in (executor, metas if isinstance(metas, dict) else {}):
        if "py_modules" in keys:
            modules = as_list(keys["py_modules"])
            keys["py_modules"] = [_beside(found[0], each) for each in modules]
    return executor


def _beside(file: Path, module: Any) -> Any:
    """A module of an executor's file: its path, if it is next to the file, else as written."""
    path = file.parent / str(module)
    return str(path) if path.exists() else module


def _refuse_repeated_keys(node: Any, what: str) -> None:
    """Raises ConfigurationError where YAML would keep the last of several values of a key."""
    import yaml

    seen = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if key.value in seen:
            line = key.start_mark.line + 1
            raise ConfigurationError(f"line {line} of {what}: {key.value}: is given twice")
        seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        _refuse_repeated_keys(value, what)
    for each in node.value if isinstance(node, yaml.SequenceNode) else []:
        _refuse_repeated_keys(each, what)


def _in_one_line(error: Any) -> str:
    """A YAML error: the place, and what is wrong there."""
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + (getattr(error, "problem", None) or " ".join(str(error).split()))


def _type_first(value: Any) -> Any:
    """`jtype` before its sister keys, in dicts at every depth: Jina reads it only there."""
    if isinstance(value, list):
        return [_type_first(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {key: _type_first(value[key]) for key in sorted(value, key=lambda k: k != "jtype")}


def _place(executor: Mapping[str, Any], index: int) -> str:
    return f"executor {executor.get('name') or index + 1}"


def _check_names(executors: Sequence[Mapping[str, Any]]) -> None:
    names = [str(each["name"]) for each in executors if "name" in each]
    for name in names:
        if not name.isidentifier() or name == "gateway":
            raise ConfigurationError(
                f"executor {name}: a name is letters, digits and _, begins with a letter and is "
                "not gateway"
            )
        if names.count(name) > 1:
            raise ConfigurationError(f"executor {name}: two executors have this name")
    known = ["gateway", *names, *(f"executor{index}" for index in range(len(executors)))]
    for needed in {str(name) for each in executors for name in as_list(each.get("needs"))}:
        if needed not in known:
            raise ConfigurationError(
                f"needs: no executor is named {needed}{flow_keys.likely(needed, known)}"
            )


def _check_addresses(spec: dict[str, Any]) -> None:
    """Replaces each port 0 by a free one, and raises ConfigurationError for a port that is in
    use or named twice and for a host that is not this machine's."""
    taken: set[int] = set()
    for part in [spec["gateway"], *spec["executors"]]:
        hosts = as_list(part["host"]) if "host" in part else []
        if part.get("external") or not hosts:
            continue
        host = hosts[0]
        if len(hosts) > 1 or not isinstance(host, str):
            raise ConfigurationError(f"host: {part['host']!r} is not one address, as 127.0.0.1")
        ports.check(host, [0])
        chosen = []
        for given in as_list(part.get("port")):
            port = port_number(given, "port")
            while port == 0 or (given == 0 and port in taken):
                port = ports.free_port(host)
            if port in taken:
                raise ConfigurationError(f"port: {port} is given twice")
            taken.add(port)
            chosen.append(port)
        ports.check(host, chosen)
        if chosen:
            part["port"] = chosen


def _check_monitoring(spec: Mapping[str, Any], gateways: int) -> None:
    """Raises ConfigurationError if a port for Jina's metrics of the gateways is not free.

    gateways: the first uses the port that the flow names, each other one the next.
    """
    gateway = {**spec["with"], **spec["gateway"]}
    if not gateway.get("monitoring") or "port_monitoring" not in gateway:
        return
    first = whole_number(gateway["port_monitoring"], "port_monitoring", 1, 65536 - gateways)
    needed = range(first, first + gateways)
    of_executors = [each for each in spec["executors"] if "port_monitoring" in each]
    named = {int(port) for each in of_executors for port in as_list(each["port_monitoring"])}
    if both := named & set(needed):
        raise ConfigurationError(
            f"port_monitoring: {min(both)} is given to an executor, and the gateways use "
            f"{first} to {needed[-1]}"
        )
    ports.check("0.0.0.0", needed)
