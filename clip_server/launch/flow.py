"""Loads a flow's YAML file and prepares it to run: applies defaults, refuses mistakes.

Flows written for clip-as-service run unchanged. Beyond that a flow gets our gateway (unless it
names its own), executors that listen on loopback only, and its models fetched before any process
starts, so that a mistake is one message within seconds.
"""

from __future__ import annotations

import importlib
import os
import re
import ssl
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clip_server.commands import console
from clip_server.errors import ConfigurationError
from clip_server.keys.keyring import open_keyring
from clip_server.launch import flow_keys, jina_internals, ports
from clip_server.launch.flow_keys import TLS_CLIENT_CA, TLS_PASSWORD, as_mapping, section
from clip_server.launch.supervision import Supervision
from clip_server.runtimes import RuntimeSpec, by_executor

DEFAULT_FLOW = "torch-flow.yml"
DEFAULT_MODEL = "ViT-B-32::openai"
DEFAULT_PORTS = {"grpc": 51000, "http": 51001, "websocket": 51002}
ALL_INTERFACES = ("0.0.0.0", "::")
LOOPBACK = "127.0.0.1"

EXECUTOR_DEFAULTS: Mapping[str, Any] = {
    "host": LOOPBACK,
    # Loading a large model takes longer than Jina's ten minutes on a slow disk.
    "timeout_ready": -1,
    # Jina's gateway pings idle channels more often than gRPC's servers put up with; the next
    # call would then fail.
    "grpc_server_options": {"grpc.http2.max_ping_strikes": 0},
}

_GPUS = "CUDA_VISIBLE_DEVICES"
_EXECUTORS = "clip_server.executors."
_INDEXER = f"{_EXECUTORS}indexer"
_HUB = f"{_EXECUTORS}clip_hub"
# The classes in the modules of our executors; in the others, CLIPEncoder.
_CLASSES = {_INDEXER: ["CLIPIndexer"], _HUB: ["CLIPImageEncoder", "CLIPTextEncoder"]}
# Executors of clip-as-service for which there is no module here.
_DROPPED = {"clip_hg", "clip_nebullvm"}
# The indexer in clip-as-service's examples, whose package no longer installs.
_ANNLITE = ("annlite.executor", "AnnLiteIndexer")
# Written under `with:`, meant for the gateway.
_GATEWAY_KEYS = (
    "port",
    "protocol",
    "host",
    "cors",
    "prefetch",
    "ssl_keyfile",
    "ssl_certfile",
    TLS_PASSWORD,
    "uvicorn_kwargs",
    "compression",
    *flow_keys.GATEWAY_PARAMETERS,
)
_PROTOCOLS = {"grpcs": "grpc", "https": "http", "ws": "websocket", "wss": "websocket"}
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
    import yaml  # here, so that its absence is reported as that of any other package

    try:
        spec = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"the flow is not YAML: {_in_one_line(error)}") from None
    _refuse_repeated_keys(yaml.compose(text))
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


def locate_executors(spec: Mapping[str, Any], flow: str) -> None:
    """Makes the paths of executors' own YAML files absolute, in place: `uses: image/config.yml` is
    relative to the working directory or, as in Jina, to the folder of the flow's file.

    flow: the path of the flow's file.

    Raises:
        ConfigurationError: there is no such file.
    """
    for executor in spec.get("executors") or spec["deployments"]:
        uses = executor.get("uses")
        if not isinstance(uses, str) or Path(uses).suffix not in (".yml", ".yaml"):
            continue
        folders = [Path.cwd(), Path(flow).resolve().parent]
        found = [folder / uses for folder in folders if (folder / uses).is_file()]
        if not found:
            seen_from = " or ".join(dict.fromkeys(map(str, folders)))
            raise ConfigurationError(f"uses: there is no file {uses}, seen from {seen_from}")
        executor["uses"] = str(found[0])


def has_only_encoders(spec: Mapping[str, Any]) -> bool:
    """Whether every executor of a flow is one of ours."""
    return all(
        (modules := _modules(executor))
        and all(_module(str(each)).startswith(_EXECUTORS) for each in modules)
        for executor in spec.get("executors") or spec["deployments"]
    )


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
        **section(spec.get("gateway"), flow_keys.GATEWAY, "gateway"),
        **section(spec.get("with"), flow_keys.WITH, "with"),
    }
    names = (*flow_keys.SUPERVISION_PARAMETERS, "grace_seconds")
    return Supervision(**{name: given[name] for name in names if name in given})


def override_encoders(spec: dict[str, Any], parameters: Mapping[str, Any]) -> None:
    """Sets parameters of a flow's encoders, whatever the flow says. Indexers keep theirs.

    parameters: None leaves what the flow says.

    Raises:
        ConfigurationError: there are some, and the flow has no CLIPEncoder.
    """
    given = {key: value for key, value in parameters.items() if value is not None}
    if not given:
        return
    encoders = [
        executor
        for executor in spec.get("executors") or spec["deployments"]
        if _class_name(executor) == "CLIPEncoder"
    ]
    if not encoders:
        raise ConfigurationError(f"{', '.join(given)}: the flow has no CLIPEncoder to set this for")
    for executor in encoders:
        # It has precedence over `with:` under `uses:`.
        executor["uses_with"] = as_mapping(executor.get("uses_with"), "uses_with") | given


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
    gateway = {key: options.pop(key) for key in _GATEWAY_KEYS if key in options}
    gateway |= section(prepared.get("gateway"), flow_keys.GATEWAY, "gateway")
    gateway["host"] = _host(host or gateway.get("host") or ALL_INTERFACES[0])
    prepared["with"] = options
    prepared["gateway"] = _prepare_gateway(gateway, port)
    executors = prepared.pop("deployments", None) or prepared["executors"]
    prepared["executors"] = [
        _prepare_executor(each, _place(each, index)) for index, each in enumerate(executors)
    ]
    _hand_out_gpus(options, prepared["executors"])
    _check_names(prepared["executors"])
    _check_addresses(prepared)
    for index, executor in enumerate(prepared["executors"]):
        _check_encoders(executor, _place(executor, index))
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


def _refuse_repeated_keys(node: Any) -> None:
    """Raises ConfigurationError where YAML would keep the last of several values of a key."""
    import yaml

    seen = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if key.value in seen:
            line = key.start_mark.line + 1
            raise ConfigurationError(f"line {line} of the flow: {key.value}: is given twice")
        seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        _refuse_repeated_keys(value)
    for each in node.value if isinstance(node, yaml.SequenceNode) else []:
        _refuse_repeated_keys(each)


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


def _prepare_gateway(gateway: dict[str, Any], wanted: Sequence[int]) -> dict[str, Any]:
    given = [_port(each, "port") for each in _as_list(gateway.get("port"))]
    # A lone port is gRPC's, as it was for clip-as-service.
    default = ["grpc"] if len(given) == 1 else list(DEFAULT_PORTS)
    protocols = [_protocol(each) for each in _as_list(gateway.get("protocol")) or default]
    if len(wanted) == 1:
        # 0, which means any free port, remains so.
        given = [wanted[0] and wanted[0] + offset for offset in range(len(protocols))]
    elif wanted:
        given = list(wanted)
    chosen = given or [DEFAULT_PORTS[protocol] for protocol in protocols]
    if len(chosen) != len(protocols):
        raise ConfigurationError(
            f"port: {', '.join(map(str, chosen))}, protocol: {', '.join(protocols)}: there must be "
            "one port for each protocol"
        )
    _prepare_tls(gateway)
    _check_access(gateway)
    ours: dict[str, Any] = {} if "uses" in gateway else dict(jina_internals.GATEWAY_DEFAULTS)
    parameters = {key: gateway.pop(key) for key in flow_keys.GATEWAY_PARAMETERS if key in gateway}
    if parameters:
        ours["uses_with"] = parameters
    return {**ours, **gateway, "protocol": protocols, "port": chosen}


def _port(value: Any, place: str) -> int:
    return flow_keys.whole_number(value, place, most=65535)


def _host(value: Any) -> Any:
    """An address to listen on. IPv6 may stand in brackets, which YAML reads as a list."""
    host = value[0] if isinstance(value, list) and len(value) == 1 else value
    return host.strip("[]") if isinstance(host, str) else host


def _protocol(name: Any) -> str:
    protocol = str(name).lower()
    protocol = _PROTOCOLS.get(protocol, protocol)
    if protocol not in DEFAULT_PORTS:
        raise ConfigurationError(
            f"protocol {name!r}: the allowed are {', '.join(DEFAULT_PORTS)}, or a list of them"
        )
    return protocol


def _prepare_tls(gateway: dict[str, Any]) -> None:
    """Raises ConfigurationError unless there is no TLS, or a key and its certificate.

    The password of the key may be given on its own or, as in clip-as-service, under
    uvicorn_kwargs, the only place where Jina lets it through.
    """
    files = {key: str(gateway.get(key) or "") for key in ("ssl_keyfile", "ssl_certfile")}
    uvicorn = as_mapping(gateway.get("uvicorn_kwargs"), "uvicorn_kwargs")
    password = str(gateway.pop(TLS_PASSWORD, None) or uvicorn.get(TLS_PASSWORD) or "")
    client_ca = gateway.get(TLS_CLIENT_CA)
    if not any((*files.values(), client_ca)):
        return
    for key, name in files.items():
        if not name:
            raise ConfigurationError(f"TLS needs ssl_keyfile and ssl_certfile: {key} is missing")
        if not Path(name).is_file():
            raise ConfigurationError(f"{key}: there is no file {Path(name).absolute()}")
    if password:
        gateway["uvicorn_kwargs"] = {**uvicorn, TLS_PASSWORD: password}
    elif b"ENCRYPTED" in Path(files["ssl_keyfile"]).read_bytes():
        raise ConfigurationError(
            f"ssl_keyfile: {files['ssl_keyfile']} is protected by a password: set {TLS_PASSWORD}, "
            f"for example to ${{{{ ENV.{TLS_PASSWORD.upper()} }}}}"
        )
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            files["ssl_certfile"], files["ssl_keyfile"], password=password
        )
    except OSError as error:
        wrong = f", or {TLS_PASSWORD} is wrong" if password else ""
        raise ConfigurationError(
            f"ssl_keyfile and ssl_certfile: {files['ssl_keyfile']} and {files['ssl_certfile']} "
            f"are not a key and its certificate, as PEM{wrong} ({error})"
        ) from None
    if client_ca:
        _check_client_ca(str(client_ca))


def _check_client_ca(file: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(file)
    except OSError as error:
        why = "holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigurationError(f"{TLS_CLIENT_CA}: {file}: {why}") from None


def _check_access(gateway: Mapping[str, Any]) -> None:
    """Raises ConfigurationError if the keys that callers need cannot be read."""
    if "auth_file" in gateway and not isinstance(gateway["auth_file"], str):
        raise ConfigurationError(f"auth_file: {gateway['auth_file']!r} is not the path of a file")
    for switch in flow_keys.GATEWAY_SWITCHES:
        if not isinstance(gateway.get(switch, False), bool):
            raise ConfigurationError(f"{switch}: {gateway[switch]!r} is not true or false")
    if "uses" not in gateway:
        open_keyring(gateway.get("auth_file"))


def _class_name(executor: Mapping[str, Any]) -> Any:
    """`uses: CLASS`, or `uses: {jtype: CLASS}`."""
    uses = executor.get("uses")
    return uses.get("jtype") if isinstance(uses, dict) else uses


def _place(executor: Mapping[str, Any], index: int) -> str:
    return f"executor {executor.get('name') or index + 1}"


def _prepare_executor(written: Mapping[str, Any], place: str) -> dict[str, Any]:
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
    if "replicas" in uses:
        # Jina would ignore it here without a word; clip-as-service's own pages show it so.
        executor.setdefault("replicas", uses.pop("replicas"))
        console.log(f"clip_server: warning: {place}: replicas belongs next to uses:, not under it")
    if "workspace" in uses:
        # As clip-as-service's page on retrieval has it.
        executor.setdefault("workspace", uses.pop("workspace"))
    metas = section(uses.get("metas"), flow_keys.METAS, f"{place}: uses: metas")
    modules = _modules(executor)
    for module in modules:
        if not isinstance(module, str):
            raise ConfigurationError(f"{place}: py_modules: {module!r} is no module's name or file")
    modules = [_module(each) for each in modules]
    if not modules or "jtype" not in uses:
        raise ConfigurationError(
            f"{place}: uses: needs jtype: CLIPEncoder and, under metas: py_modules:, its module, "
            f"one of {', '.join(_EXECUTORS + each for each in by_executor())}"
        )
    uses["metas"] = {**metas, "py_modules": modules}
    uses["with"] = as_mapping(uses.get("with"), f"{place}: uses: with") | as_mapping(
        executor.pop("uses_with", None), f"{place}: uses_with"
    )
    executor.pop("py_modules", None)
    executor["uses"] = uses
    if modules == [_INDEXER]:
        _prepare_indexer(executor, place)
    return executor


def _prepare_indexer(executor: dict[str, Any], place: str) -> None:
    uses = executor["uses"]
    if uses["jtype"] == _ANNLITE[1]:
        uses["jtype"] = "CLIPIndexer"
        console.log(
            f"clip_server: {place}: {_ANNLITE[1]} is replaced by CLIPIndexer; the collection "
            "begins empty"
        )
    # Where AnnLite kept its rows.
    if "workspace" in executor and not uses["with"].keys() & {"path", "uri"}:
        uses["with"]["path"] = executor["workspace"]
    if executor.get("replicas", 1) > 1 and "uri" not in uses["with"]:
        raise ConfigurationError(
            f"{place}: replicas: a collection in a folder has one process: serve it from a Milvus "
            "server, with uri:, to have several"
        )


def _hand_out_gpus(options: dict[str, Any], executors: list[dict[str, Any]]) -> None:
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
    console.log(
        f"clip_server: warning: {_GPUS}: {devices} selects none of this machine's NVIDIA GPUs; "
        "using the CPU"
    )
    return {**env, _GPUS: "-1"}  # empty, Jina would make it None


def _modules(executor: Mapping[str, Any]) -> list[str]:
    """The `py_modules` of an executor, wherever they stand."""
    uses = executor.get("uses")
    uses = uses if isinstance(uses, dict) else {}
    metas = uses.get("metas")
    metas = metas if isinstance(metas, dict) else {}
    return _as_list(metas.get("py_modules") or uses.get("py_modules") or executor.get("py_modules"))


def _module(name: str) -> str:
    """clip-as-service's two spellings of an executor as one, unless a file of that name is
    there."""
    if name == _ANNLITE[0] and not _is_module(name):
        return _INDEXER
    path = Path(name)
    if path.is_file():
        return name
    stem = path.stem if path.suffix == ".py" else name.removeprefix(_EXECUTORS)
    if stem in _DROPPED:
        raise ConfigurationError(
            f"py_modules: {name} of clip-as-service is replaced by clip_torch and clip_onnx: name "
            "one of them, and under with: name: the model or a folder of Hugging Face's"
        )
    return _EXECUTORS + stem if path.suffix == ".py" and stem in _executors() else name


def _executors() -> list[str]:
    """The names of our executors' modules."""
    return [*by_executor(), *(module.removeprefix(_EXECUTORS) for module in _CLASSES)]


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
    for needed in {str(name) for each in executors for name in _as_list(each.get("needs"))}:
        if needed not in known:
            raise ConfigurationError(
                f"needs: no executor is named {needed}{flow_keys.likely(needed, known)}"
            )


def _check_addresses(spec: dict[str, Any]) -> None:
    """Replaces each port 0 by a free one, and raises ConfigurationError for a port that is in
    use or named twice and for a host that is not this machine's."""
    taken: set[int] = set()
    for part in [spec["gateway"], *spec["executors"]]:
        hosts = _as_list(part["host"]) if "host" in part else []
        if part.get("external") or not hosts:
            continue
        host = hosts[0]
        if len(hosts) > 1 or not isinstance(host, str):
            raise ConfigurationError(f"host: {part['host']!r} is not one address, as 127.0.0.1")
        ports.check(host, [0])
        chosen = []
        for given in _as_list(part.get("port")):
            port = _port(given, "port")
            while port == 0 or (given == 0 and port in taken):
                port = ports.free_port(host)
            if port in taken:
                raise ConfigurationError(f"port: {port} is given twice")
            taken.add(port)
            chosen.append(port)
        ports.check(host, chosen)
        if chosen:
            part["port"] = chosen


def _check_encoders(executor: Mapping[str, Any], place: str) -> None:
    uses = executor["uses"] if isinstance(executor.get("uses"), dict) else {}
    for module in uses.get("metas", {}).get("py_modules", []):
        if module.startswith(_EXECUTORS):
            names = _CLASSES.get(module, ["CLIPEncoder"])
            if uses["jtype"] not in names:
                raise ConfigurationError(
                    f"{place}: jtype: {uses['jtype']}: the class in {module} is "
                    f"{' or '.join(names)}"
                )
            parameters, where = uses["with"], f"{place}: uses: with"
            if module == _HUB:
                _check_hub_encoder(uses["jtype"], parameters, where)
            elif module == _INDEXER:
                _check_indexer(parameters, where)
            else:
                _check_encoder(module, parameters, where)
        elif not ("extra_search_paths" in executor or Path(module).exists() or _is_module(module)):
            kind = "file" if module.endswith(".py") else "module or file"
            raise ConfigurationError(
                f"{place}: py_modules: there is no {kind} {module}, seen from {Path.cwd()}"
            )


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _check_encoder(module: str, parameters: Mapping[str, Any], place: str) -> None:
    from clip_server.executors.parameters import EncoderParameters

    name = module.removeprefix(_EXECUTORS)
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


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
