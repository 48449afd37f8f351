"""TLS on every protocol, with the flow's own certificate."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Start, flow

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
