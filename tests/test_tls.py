"""TLS on every protocol, with the flow's own certificate."""

from __future__ import annotations

import shutil
import socket
import ssl
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from certificates import joined, make_pair, needs_openssl
from conftest import Start, eventually, flow

from clip_client import Client, ConnectionFailedError, InvalidInputError
from clip_server.errors import ConfigurationError
from clip_server.gateway.tls import Tls, TlsFiles
from clip_server.launch import flow as flows


@needs_openssl
def test_the_password_of_a_key(tmp_path: Path) -> None:
    """In either place; a missing or wrong one is one line. Serving with one: tests/promises."""
    key, certificate = make_pair(tmp_path, password="right")

    def prepared(**keys: Any) -> dict[str, Any]:
        spec = flow(ports=[0, 0, 0])
        spec["with"] |= {"ssl_keyfile": str(key), "ssl_certfile": str(certificate), **keys}
        gateway: dict[str, Any] = flows.prepare(spec)["gateway"]
        return gateway

    expected = {"ssl_keyfile_password": "right"}
    assert prepared(ssl_keyfile_password="right")["uvicorn_kwargs"] == expected
    assert prepared(uvicorn_kwargs=expected)["uvicorn_kwargs"] == expected
    with pytest.raises(ConfigurationError, match="password: set ssl_keyfile_password"):
        prepared()
    with pytest.raises(ConfigurationError, match="or ssl_keyfile_password is wrong"):
        prepared(ssl_keyfile_password="wrong")


@needs_openssl
def test_a_password_that_a_new_key_does_not_need(tmp_path: Path) -> None:
    key, certificate = make_pair(tmp_path)
    Tls(TlsFiles(key, certificate, password="of the key before")).grpc_credentials()


@needs_openssl
@pytest.mark.slow
def test_certificates_of_clients_and_renewal(start: Start, tmp_path: Path) -> None:
    """Over all three protocols; open connections go on when the server's files are replaced."""
    authority, stranger = (make_pair(tmp_path, name) for name in ("authority", "stranger"))
    right_pair = make_pair(tmp_path, "right", authority=authority)
    right, wrong = joined(right_pair), joined(make_pair(tmp_path, "wrong", authority=stranger))
    outdated = joined(make_pair(tmp_path, "outdated", authority=authority, days=-1))
    first, second = (joined(make_pair(tmp_path, name)) for name in ("first", "second"))
    served = Path(shutil.copy(first, tmp_path / "served.pem"))
    spec = flow()
    spec["with"] |= {
        "header_timeout": 5,
        "ssl_keyfile": str(served),
        "ssl_certfile": str(served),
        "ssl_ca_certs": str(authority.certificate),
    }
    server = start(spec)
    silent = [socket.create_connection(("localhost", port), 30) for port in server.ports]
    addresses = [
        f"{scheme}://localhost:{port}"
        for scheme, port in zip(("grpcs", "https", "wss"), server.ports, strict=True)
    ]
    both = tmp_path / "both.pem"  # HTTP may have to connect again
    both.write_text(first.read_text() + second.read_text())
    old = [Client(each, ca_file=both, cert_file=right) for each in addresses]
    for client, address in zip(old, addresses, strict=True):
        assert client.encode(["a cat"]).shape == (1, 256)
        with (
            Client(address, ca_file=first) as other,
            pytest.raises(ConnectionFailedError, match="asks for a certificate of the client"),
        ):
            other.encode(["a cat"])
        for refused in (wrong, outdated):
            with (
                Client(address, ca_file=first, cert_file=refused) as other,
                pytest.raises(ConnectionFailedError, match="does not accept the certificate"),
            ):
                other.encode(["a cat"])
    key, chain = right_pair
    with Client(addresses[0], ca_file=first, cert_file=chain, key_file=key) as client:
        assert client.encode(["a cat"]).shape == (1, 256)

    served.write_text("half of a file")
    for _ in range(2):
        time.sleep(1)
        with Client(addresses[1], ca_file=first, cert_file=right) as client:
            assert client.encode(["a cat"]).shape == (1, 256)
    assert server.output().count("TLS certificates stay as they were") == 1
    shutil.copy(second, served)
    expected = ssl.PEM_cert_to_DER_cert(second.with_suffix(".crt").read_text())
    for port in server.ports:
        assert eventually(lambda port=port: shown(port) == expected)  # type: ignore[misc]
    for client, address in zip(old, addresses, strict=True):
        with client:
            assert client.encode(["a dog"]).shape == (1, 256)
        with Client(address, ca_file=second, cert_file=right) as new:
            assert new.encode(["a cat"]).shape == (1, 256)
        with (
            Client(address, ca_file=first, cert_file=right) as late,
            pytest.raises(ConnectionFailedError, match="not trusted"),
        ):
            late.encode(["a cat"])
    for connection in silent:  # closed far sooner than after asyncio's 60 s
        with connection, suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    server.stop()


def shown(port: int) -> bytes:
    """The certificate of the server at a port of this machine."""
    return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("localhost", port)))


@needs_openssl
def test_mistakes_with_certificates_of_clients(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    file = joined(pair)
    spec = flow(ports=[0, 0, 0])
    spec["with"] |= {"ssl_keyfile": str(file), "ssl_certfile": str(file)}
    for wrong, said in ((tmp_path / "none.pem", "No such file"), (pair.key, "no certificate")):
        spec["with"]["ssl_ca_certs"] = str(wrong)
        with pytest.raises(ConfigurationError, match=said):
            flows.prepare(spec)
    spec["with"] = {"port": [0, 0, 0], "ssl_ca_certs": str(file)}
    with pytest.raises(ConfigurationError, match="ssl_keyfile is missing"):
        flows.prepare(spec)
    for options in ({"key_file": file}, {"cert_file": pair.certificate}, {"cert_file": "none.pem"}):
        with pytest.raises(InvalidInputError, match="cert_file"):
            Client("grpcs://localhost:1", **options)  # type: ignore[arg-type]
