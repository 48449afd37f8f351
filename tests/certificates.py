"""Certificates for the tests of TLS, made with openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")


class Pair(NamedTuple):
    """The PEM files of a key and its certificate."""

    key: Path
    certificate: Path


def make_pair(
    folder: Path,
    name: str = "localhost",
    *,
    names: str = "DNS:localhost,IP:127.0.0.1",
    days: int = 2,
    password: str = "",
    authority: Pair | None = None,
) -> Pair:
    """A key and its certificate, in files of this name.

    names: whom the certificate is for.
    days: that it is valid for; below 0: it is out of date.
    password: of the key; empty: it has none.
    authority: what signs the certificate; None: its own key.
    """
    pair = Pair(folder / f"{name}.key", folder / f"{name}.crt")
    request, extensions = folder / f"{name}.request", folder / f"{name}.extensions"
    extensions.write_text(
        f"basicConstraints=CA:TRUE\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        f"subjectAltName={names}\n"
    )
    _openssl(
        *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-subj", f"/CN={name}"),
        *("-keyout", pair.key, "-out", request),
        *(("-passout", f"pass:{password}") if password else ("-nodes",)),
    )
    signer = authority or pair
    _openssl(
        *("x509", "-req", "-in", request, "-days", str(days), "-extfile", extensions),
        *("-out", pair.certificate),
        *(("-CA", signer.certificate, "-CAkey", signer.key) if authority else
          ("-signkey", signer.key)),
        *(("-passin", f"pass:{password}") if password else ()),
    )  # fmt: skip
    return pair


def joined(pair: Pair) -> Path:
    """One file with both."""
    file = pair.key.with_suffix(".pem")
    file.write_text(pair.key.read_text() + pair.certificate.read_text())
    return file


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
