"""TLS on every protocol, with the flow's own certificate."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Start, flow

from clip_client import Client, ConnectionFailedError, InvalidInputError
from clip_server.errors import ConfigurationError
from clip_server.launch import flow as flows

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")


@needs_openssl
def test_the_password_of_a_key(tmp_path: Path) -> None:
    """In either place; a missing or wrong one is one line. Serving with one: tests/promises."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "2", "-passout", "pass:right",
         "-keyout", key, "-out", certificate, "-subj", "/CN=localhost"],
        check=True,
        capture_output=True,
    )  # fmt: skip

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


@pytest.mark.slow
@needs_openssl
def test_tls(start: Start, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-keyout", key, "-out", certificate, "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )  # fmt: skip
    spec = flow()
    spec["with"] |= {
        "ssl_keyfile": str(key),
        "ssl_certfile": str(certificate),
        "prefetch": 10,
    }
    server = start(spec)
    for scheme, port in zip(("grpcs", "https", "wss"), server.ports, strict=True):
        address = f"{scheme}://localhost:{port}"
        assert f"{scheme}://127.0.0.1:{port}" in server.output()
        code = (
            "from clip_client import Client\n"
            f"with Client({address!r}) as c: print(c.encode(['a cat']).shape)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "SSL_CERT_FILE": str(certificate)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.strip() == "(1, 256)", done.stderr
    server.stop()


def certificate(folder: Path, name: str, authority: Path | None = None) -> Path:
    """A file with a key and its certificate: self-signed, or of the authority in such a file."""
    file = folder / f"{name}.pem"
    signed = ["-CA", authority, "-CAkey", authority] if authority else []
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", f"{file}.key",
         "-out", f"{file}.crt", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", *signed],
        check=True,
        capture_output=True,
    )  # fmt: skip
    file.write_text(Path(f"{file}.key").read_text() + Path(f"{file}.crt").read_text())
    return file


@needs_openssl
@pytest.mark.slow
def test_certificates_of_clients_and_renewal(start: Start, tmp_path: Path) -> None:
    """Over all three protocols; open connections go on when the server's files are replaced."""
    authority, stranger = certificate(tmp_path, "authority"), certificate(tmp_path, "stranger")
    right, served = certificate(tmp_path, "right", authority), tmp_path / "server.pem"
    wrong = certificate(tmp_path, "wrong", stranger)
    first, second = certificate(tmp_path, "first"), certificate(tmp_path, "second")
    shutil.copy(first, served)
    spec = flow()
    spec["with"] |= {
        "ssl_keyfile": str(served),
        "ssl_certfile": str(served),
        "ssl_ca_certs": str(authority),
    }
    server = start(spec)
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
        with (
            Client(address, ca_file=first, cert_file=wrong) as other,
            pytest.raises(ConnectionFailedError, match="does not accept the certificate"),
        ):
            other.encode(["a cat"])
    key, chain = f"{right}.key", f"{right}.crt"
    with Client(addresses[0], ca_file=first, cert_file=chain, key_file=key) as client:
        assert client.encode(["a cat"]).shape == (1, 256)

    served.write_text("half of a file")
    time.sleep(1)
    with Client(addresses[1], ca_file=first, cert_file=right) as client:
        assert client.encode(["a cat"]).shape == (1, 256)
    shutil.copy(second, served)
    expected = ssl.PEM_cert_to_DER_cert(Path(f"{second}.crt").read_text())
    for port in server.ports:
        deadline = time.monotonic() + 30
        shown = b""
        while shown != expected:
            assert time.monotonic() < deadline, "the old certificate is still shown"
            shown = ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("localhost", port)))
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
    server.stop()


@needs_openssl
def test_mistakes_with_certificates_of_clients(tmp_path: Path) -> None:
    file = certificate(tmp_path, "own")
    spec = flow(ports=[0, 0, 0])
    spec["with"] |= {"ssl_keyfile": str(file), "ssl_certfile": str(file)}
    for wrong, said in ((tmp_path / "none.pem", "No such file"), (f"{file}.key", "no certificate")):
        spec["with"]["ssl_ca_certs"] = str(wrong)
        with pytest.raises(ConfigurationError, match=said):
            flows.prepare(spec)
    spec["with"] = {"port": [0, 0, 0], "ssl_ca_certs": str(file)}
    with pytest.raises(ConfigurationError, match="ssl_keyfile is missing"):
        flows.prepare(spec)
    for options in ({"key_file": file}, {"cert_file": f"{file}.crt"}, {"cert_file": "none.pem"}):
        with pytest.raises(InvalidInputError, match="cert_file"):
            Client("grpcs://localhost:1", **options)  # type: ignore[arg-type]
