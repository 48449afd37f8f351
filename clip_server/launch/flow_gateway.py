"""Prepares the gateway of a flow: its protocols and ports, TLS, and the keys that callers need."""

from __future__ import annotations

import ssl
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_server.errors import ConfigurationError
from clip_server.keys.keyring import open_keyring
from clip_server.launch import flow_keys, jina_internals
from clip_server.launch.flow_keys import (
    TLS_CLIENT_CA,
    TLS_PASSWORD,
    as_list,
    as_mapping,
    port_number,
    section,
)

DEFAULT_PORTS = {"grpc": 51000, "http": 51001, "websocket": 51002}
ALL_INTERFACES = ("0.0.0.0", "::")
# Written under `with:`, meant for the gateway.
_FLOW_KEYS = (
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
    flow_keys.GATEWAYS,
    *flow_keys.GATEWAY_PARAMETERS,
)
_PROTOCOLS = {"grpcs": "grpc", "https": "http", "ws": "websocket", "wss": "websocket"}


def prepare_gateway(
    options: dict[str, Any], written: Any, host: str | None, wanted: Sequence[int]
) -> dict[str, Any]:
    """The gateway as it will run.

    options: the flow's `with:`; keys that are meant for the gateway are taken out of it.
    written: the flow's `gateway:`, which has precedence.
    host, wanted: the address and the ports of the command line, which have precedence over both; a
        single port is the first of consecutive ones.

    Raises:
        ConfigurationError: a key is unknown, or a value is not allowed.
    """
    gateway = {key: options.pop(key) for key in _FLOW_KEYS if key in options}
    gateway |= section(written, flow_keys.GATEWAY, "gateway")
    gateway["host"] = _host(host or gateway.get("host") or ALL_INTERFACES[0])
    protocols, ports = _listeners(gateway, wanted)
    _prepare_tls(gateway)
    _check_access(gateway)
    _check_count(gateway.pop(flow_keys.GATEWAYS, 1), "uses" in gateway)
    ours: dict[str, Any] = {} if "uses" in gateway else dict(jina_internals.GATEWAY_DEFAULTS)
    parameters = {key: gateway.pop(key) for key in flow_keys.GATEWAY_PARAMETERS if key in gateway}
    if parameters:
        ours["uses_with"] = parameters
    return {**ours, **gateway, "protocol": protocols, "port": ports}


def _listeners(gateway: Mapping[str, Any], wanted: Sequence[int]) -> tuple[list[str], list[int]]:
    """The protocols, and a port for each."""
    given = [port_number(each, "port") for each in as_list(gateway.get("port"))]
    # A lone port is gRPC's, as it was for clip-as-service.
    default = ["grpc"] if len(given) == 1 else list(DEFAULT_PORTS)
    protocols = [_protocol(each) for each in as_list(gateway.get("protocol")) or default]
    if len(wanted) == 1:
        # 0, which means any free port, remains so.
        given = [wanted[0] and wanted[0] + offset for offset in range(len(protocols))]
    elif wanted:
        given = list(wanted)
    ports = given or [DEFAULT_PORTS[protocol] for protocol in protocols]
    if len(ports) != len(protocols):
        raise ConfigurationError(
            f"port: {', '.join(map(str, ports))}, protocol: {', '.join(protocols)}: there must be "
            "one port for each protocol"
        )
    return protocols, ports


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


def _check_count(gateways: int, is_custom: bool) -> None:
    """Raises ConfigurationError if there cannot be so many gateways.

    is_custom: whether the flow has a gateway of its own.
    """
    if gateways > 1 and is_custom:
        raise ConfigurationError(
            f"gateways: {gateways}: a gateway of your own (uses: under gateway:) runs once; leave "
            "gateways: out"
        )
    if gateways > 1 and sys.platform != "linux":
        raise ConfigurationError(
            f"gateways: {gateways}: only Linux deals connections out to processes that share a "
            "port; leave gateways: out"
        )
