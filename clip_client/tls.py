"""TLS: which certificates are trusted, and why a connection with or without it fails."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_client.address import Address
from clip_client.errors import ConnectionFailedError, InvalidInputError

_PROBE_SECONDS = 5.0
_EXPIRED, _NOT_YET_VALID = 10, 9
_OTHER_NAME = {62, 64}  # of a host, of an IP address
_VARIABLE = "SSL_CERT_FILE"
# Alerts of a server that does not accept the client's certificate, as OpenSSL names them.
_OWN_ALERTS = ("CERTIFICATE_REQUIRED", "UNKNOWN_CA", "UNKNOWN CA", "BAD_CERTIFICATE",
               "BAD CERTIFICATE", "CERTIFICATE_EXPIRED", "CERTIFICATE EXPIRED",
               "CERTIFICATE_UNKNOWN", "CERTIFICATE UNKNOWN")  # fmt: skip
_REFUSAL_SECONDS = 0.5


@dataclass(frozen=True)
class Trust:
    """The certificates that a Client accepts.

    Those of the system or of the file that SSL_CERT_FILE names; those in `ca_file` instead, where
    it is given; any certificate, where `verify` is False. To servers that ask for one, it shows the
    Client's own certificate in `cert_file`, whose key is in `key_file` or in the same file. Raises
    InvalidInputError.
    """

    ca_file: str | os.PathLike[str] | None = None
    verify: bool = True
    cert_file: str | os.PathLike[str] | None = None
    key_file: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.verify, bool):
            raise InvalidInputError(
                f"verify is True or False, not {self.verify!r}; ca_file names a file to trust"
            )
        if self.ca_file is not None:
            _check("ca_file", self.ca_file)
        if self.key_file is not None and self.cert_file is None:
            raise InvalidInputError("key_file is the key of a certificate: pass cert_file, too")
        _check_own(self.cert_file, self.key_file)

    def context(self) -> ssl.SSLContext:
        """The settings for a connection. Raises InvalidInputError for a wrong SSL_CERT_FILE."""
        context = self._verifying()
        if self.cert_file is not None:
            context.load_cert_chain(self.cert_file, self.key_file)
        return context

    def _verifying(self) -> ssl.SSLContext:
        if not self.verify:
            return _unverified()
        if self.ca_file is None:
            _environment_file()
            return ssl.create_default_context()
        context = ssl.create_default_context(cafile=self.ca_file)
        # As gRPC has it: a file may hold the server's own certificate, and one made by hand need
        # not have every extension.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        return context

    def own_pair(self) -> tuple[bytes | None, bytes | None]:
        """The Client's own key and certificate in PEM; None where it has none."""
        if self.cert_file is None:
            return None, None
        return Path(self.key_file or self.cert_file).read_bytes(), Path(self.cert_file).read_bytes()

    def roots(self) -> bytes | None:
        """The same certificates in PEM; None for gRPC's own."""
        file = self.ca_file or _environment_file() or ssl.get_default_verify_paths().cafile
        return Path(file).read_bytes() if file else None


def server_certificate(address: Address) -> tuple[bytes, str]:
    """The certificate that a server shows, in PEM, and a name that it holds.

    gRPC always verifies: without `verify` it is told to trust this certificate under this name.
    Raises OSError, of which ssl.SSLError is a kind.
    """
    place = (address.host, address.port)
    pem = ssl.get_server_certificate(place, timeout=_PROBE_SECONDS)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=pem)
    with (
        socket.create_connection(place, _PROBE_SECONDS) as connection,
        context.wrap_socket(connection, server_hostname=address.host) as secured,
    ):
        names: Any = secured.getpeercert() or {}
    held = [name for _, name in names.get("subjectAltName", ())]
    held += [
        value for part in names.get("subject", ()) for key, value in part if key == "commonName"
    ]
    return pem.encode(), held[0].replace("*", "any") if held else address.host


async def explain(address: Address, trust: Trust) -> ConnectionFailedError | None:
    """Why no connection with, or without, TLS was made, where the reason is TLS itself.

    Shakes hands with the server once more: the transports' own errors hide the reason.
    """
    scheme = address.scheme[:-1] if address.secure else address.scheme
    try:
        context = trust.context() if address.secure else _unverified()
        if address.scheme.startswith("grpc"):
            context.set_alpn_protocols(["h2"])  # without it, gRPC's servers break off
        await _shake_hands(address, context)
    except ssl.SSLCertVerificationError as error:
        return ConnectionFailedError(f"{address}: {_about_certificate(error)}")
    except _OwnCertificateError:
        if address.secure:
            return ConnectionFailedError(f"{address}: {_about_own_certificate(trust)}")
        return _speaks_tls(address)
    except (ssl.SSLError, ConnectionResetError):
        if address.secure:
            plain = ConnectionFailedError(
                f"{address}: the server does not speak TLS at this port; without it, the address "
                f"is {scheme}://{address.target}{address.path}"
            )
            plain.away = True  # one that is just ending breaks off like this too
            return plain
    except (OSError, asyncio.TimeoutError):
        pass
    else:
        if not address.secure:
            return _speaks_tls(address)
    return None


def _speaks_tls(address: Address) -> ConnectionFailedError:
    return ConnectionFailedError(
        f"{address}: the server speaks TLS at this port, so the address is "
        f"{address.scheme}s://{address.target}{address.path}"
    )


async def _shake_hands(address: Address, context: ssl.SSLContext) -> None:
    opening = asyncio.open_connection(address.host, address.port, ssl=context)
    reader, writer = await asyncio.wait_for(opening, _PROBE_SECONDS)
    try:
        # A server that refuses the client's certificate says so after the handshake; gRPC's breaks
        # off without a word.
        if not await asyncio.wait_for(reader.read(1), _REFUSAL_SECONDS):
            raise _OwnCertificateError
    except asyncio.TimeoutError:
        pass
    except ssl.SSLError as error:
        if any(alert in str(error).upper() for alert in _OWN_ALERTS):
            raise _OwnCertificateError from None
        raise
    finally:
        writer.transport.abort()  # an orderly end would wait 30 s for a server that takes no part


class _OwnCertificateError(Exception):
    """The server does not accept the client's certificate, or its lack."""


def _about_own_certificate(trust: Trust) -> str:
    if trust.cert_file is None:
        return (
            "the server asks for a certificate of the client: pass Client(..., "
            "cert_file='client.pem', key_file='client-key.pem')"
        )
    return "the server does not accept the certificate in cert_file: is it of the right authority?"


def _about_certificate(error: ssl.SSLCertVerificationError) -> str:
    code, message = error.verify_code, error.verify_message.rstrip(".")
    if code in _OTHER_NAME:
        return (
            f"the server's certificate is for another name ({message}): use a name that it "
            "holds, or a certificate that holds this one"
        )
    if code == _EXPIRED:
        return f"the server's certificate is out of date ({message}): it needs a new one"
    if code == _NOT_YET_VALID:
        return f"the server's certificate is not valid yet ({message}): check this machine's clock"
    return (
        f"the server's certificate is not trusted ({message}). To trust it, pass "
        "Client(..., ca_file='certificate.pem') with its certificate or that of its authority, "
        f"or name that file in {_VARIABLE}; verify=False accepts any certificate"
    )


def _unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _environment_file() -> str | None:
    file = os.environ.get(_VARIABLE) or None
    if file:
        _check(_VARIABLE, file)
    return file


def _check_own(
    cert_file: str | os.PathLike[str] | None, key_file: str | os.PathLike[str] | None
) -> None:
    """Raises InvalidInputError unless the files hold a certificate and its key, or are None."""
    if cert_file is None:
        return
    try:
        # Without a password: gRPC takes no key that has one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert_file, key_file, "")
    except (OSError, TypeError, ValueError) as error:
        files = " and ".join(os.fspath(file) for file in (cert_file, key_file) if file)
        raise InvalidInputError(
            f"cert_file and key_file: {files} are not a certificate and its key in PEM, without a "
            f"password ({error})"
        ) from None


def _check(name: str, file: str | os.PathLike[str]) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=file)
    except ssl.SSLError:
        reason = "holds no certificate in PEM (-----BEGIN CERTIFICATE-----)"
    except (OSError, TypeError, ValueError) as error:
        reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    else:
        return
    raise InvalidInputError(f"{name} names {os.fspath(file)!r}, which {reason}")
