"""A flow's YAML file, made ready to run: defaults filled in, mistakes refused aloud.

What users wrote for clip-as-service runs unchanged. Beside that a flow gets our gateway (unless
it names its own), executors that listen on loopback only, and its models fetched before any
process starts, so that what is wrong is said once, at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from clip_server.errors import ConfigurationError
from clip_server.install import install_hint

DEFAULT_FLOW = "torch-flow.yml"
DEFAULT_MODEL = "ViT-B-32::openai"
DEFAULT_PORTS = {"grpc": 51000, "http": 51001, "websocket": 51002}
ALL_INTERFACES = "0.0.0.0"
LOOPBACK = "127.0.0.1"

_EXECUTORS = "clip_server.executors."
_EXTRAS = {"clip_onnx": "onnx", "clip_tensorrt": "tensorrt", "clip_torch": "torch"}
# Written under `with:`, meant for the gateway.
_GATEWAY_KEYS = (
    "port",
    "protocol",
    "host",
    "cors",
    "prefetch",
    "ssl_keyfile",
    "ssl_certfile",
    "max_request_bytes",
    "max_queued_bytes",
)
_GATEWAY_PARAMETERS = ("max_request_bytes", "max_queued_bytes")
_PROTOCOLS = {"grpcs": "grpc", "https": "http", "ws": "websocket", "wss": "websocket"}


def read(name: str) -> str:
    """The text of a YAML file: a path, or the name of a flow that comes with the server.

    Raises:
        ConfigurationError: there is no such file.
    """
    path = Path(name)
    if path.is_file():
        return path.read_text("utf-8")
    flows = resources.files("clip_server.flows")
    if (built_in := flows.joinpath(path.name)).is_file() and path.suffix == ".yml":
        return built_in.read_text("utf-8")
    known = sorted(each.name for each in flows.iterdir() if each.name.endswith(".yml"))
    raise ConfigurationError(
        f"no flow at {name}; give the path of a YAML file, or one that comes with the server: "
        f"{', '.join(known)}"
    )


def load(text: str) -> dict[str, Any]:
    """A flow's YAML as a dict.

    Raises:
        ConfigurationError: it is not YAML, or not a flow.
    """
    import yaml  # here, since the base install, which is the client's, has none

    try:
        spec = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"the flow is not YAML: {error}") from None
    if not isinstance(spec, dict) or not spec.get("executors"):
        raise ConfigurationError("the flow has no executors: see docs/flows.md for an example")
    return spec


def has_only_encoders(spec: Mapping[str, Any]) -> bool:
    """Whether every executor of a flow is one of ours."""
    return all(
        (modules := _modules(executor))
        and all(_module(each).startswith(_EXECUTORS) for each in modules)
        for executor in spec["executors"]
    )


def expand(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A flow with its variables replaced by the environment's."""
    # The built-in flows take the model's name from here.
    os.environ.setdefault("CLIP_MODEL", DEFAULT_MODEL)
    from jina.jaml import JAML

    expanded: dict[str, Any] = JAML.expand_dict(dict(spec))
    return expanded


def prepare(spec: Mapping[str, Any], host: str | None = None) -> dict[str, Any]:
    """The flow as it will run. Fetches the models that its encoders name.

    host: to listen on, whatever the flow says.

    Raises:
        ConfigurationError: a parameter, a model, a missing extra.
    """
    prepared: dict[str, Any] = {"jtype": "Flow", "version": "1", **spec}
    options = dict(spec.get("with") or {})
    gateway = {key: options.pop(key) for key in _GATEWAY_KEYS if key in options}
    gateway |= spec.get("gateway") or {}
    if host is not None:
        gateway["host"] = host
    prepared["with"] = options
    prepared["gateway"] = _prepare_gateway(gateway)
    prepared["executors"] = [_prepare_executor(dict(each)) for each in spec["executors"]]
    typed: dict[str, Any] = _type_first(prepared)
    return typed


def addresses(spec: Mapping[str, Any]) -> list[str]:
    """Where a prepared flow listens, as URLs."""
    gateway = spec["gateway"]
    secure = bool(gateway.get("ssl_keyfile"))
    schemes = {"grpc": "grpc", "http": "http", "websocket": "ws"}
    return [
        f"{schemes[protocol]}{'s' if secure else ''}://{gateway['host']}:{port}"
        for protocol, port in zip(gateway["protocol"], gateway["port"], strict=True)
    ]


def _type_first(value: Any) -> Any:
    """`jtype` before its sister keys, in dicts at every depth: Jina reads it only there."""
    if isinstance(value, list):
        return [_type_first(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {key: _type_first(value[key]) for key in sorted(value, key=lambda k: k != "jtype")}


def _prepare_gateway(gateway: dict[str, Any]) -> dict[str, Any]:
    protocols = _as_list(gateway.get("protocol"))
    ports = [int(port) for port in _as_list(gateway.get("port"))]
    if not protocols:
        # A lone port is gRPC's, as it was for clip-as-service.
        protocols = ["grpc"] if len(ports) == 1 else list(DEFAULT_PORTS)
    protocols = [_protocol(each) for each in protocols]
    if not ports:
        ports = [DEFAULT_PORTS[protocol] for protocol in protocols]
    if len(ports) != len(protocols):
        raise ConfigurationError(
            f"the flow names {len(protocols)} protocols ({', '.join(protocols)}) but "
            f"{len(ports)} ports: one port for each protocol"
        )
    ours = {} if "uses" in gateway else {
        "uses": "ClipGateway",
        "py_modules": ["clip_server.gateway"],
        # Jina would try a call again that was only slow.
        "retries": 0,
    }  # fmt: skip
    given = {key: int(gateway.pop(key)) for key in _GATEWAY_PARAMETERS if key in gateway}
    if given:
        ours["uses_with"] = given
    return {"host": ALL_INTERFACES, **ours, **gateway, "protocol": protocols, "port": ports}


def _protocol(name: Any) -> str:
    protocol = str(name).lower()
    protocol = _PROTOCOLS.get(protocol, protocol)
    if protocol not in DEFAULT_PORTS:
        raise ConfigurationError(
            f"protocol {name!r}: the allowed are {', '.join(DEFAULT_PORTS)}, or a list of them"
        )
    return protocol


def _prepare_executor(executor: dict[str, Any]) -> dict[str, Any]:
    uses = executor.get("uses")
    if executor.get("external"):
        return executor
    executor.setdefault("host", LOOPBACK)
    if not isinstance(uses, dict):
        return executor
    uses = executor["uses"] = dict(uses)
    if "replicas" in uses:
        # Jina would ignore it here without a word; clip-as-service's own pages show it so.
        executor.setdefault("replicas", uses.pop("replicas"))
        uses.pop("replicas", None)
        _say("replicas stands under uses: in the flow; taken as written beside uses:")
    # Loading a large model takes longer than Jina's ten minutes on a slow disk.
    executor.setdefault("timeout_ready", -1)
    # Jina's gateway pings idle channels more often than gRPC's servers put up with; the next
    # call would then fail.
    executor.setdefault("grpc_server_options", {"grpc.http2.max_ping_strikes": 0})
    metas = uses["metas"] = dict(uses.get("metas") or {})
    metas["py_modules"] = [_module(each) for each in _modules(executor)]
    for module in metas["py_modules"]:
        if module.startswith(_EXECUTORS):
            _check_encoder(module, uses.get("with") or {})
    return executor


def _modules(executor: Mapping[str, Any]) -> list[str]:
    """The `py_modules` of an executor, wherever they stand."""
    uses = executor.get("uses")
    metas = (uses.get("metas") if isinstance(uses, dict) else None) or {}
    return _as_list(metas.get("py_modules") or executor.get("py_modules"))


def _module(name: str) -> str:
    """clip-as-service's two spellings of an executor as one, unless a file of that name is
    there."""
    path = Path(name)
    ours = path.suffix == ".py" and path.stem in _EXTRAS and not path.is_file()
    return _EXECUTORS + path.stem if ours else name


def _check_encoder(module: str, parameters: Mapping[str, Any]) -> None:
    try:
        encoder = importlib.import_module(module).CLIPEncoder
    except ModuleNotFoundError as error:
        name = module.removeprefix(_EXECUTORS)
        if error.name and error.name.startswith("clip_server"):
            raise ConfigurationError(f"{module} does not exist") from None
        raise ConfigurationError(
            f"{name} needs the package {error.name}: {install_hint(_EXTRAS.get(name, name))}"
        ) from None
    encoder.prepare(parameters)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _say(message: str) -> None:
    print(f"clip_server: {message}", file=sys.stderr)
