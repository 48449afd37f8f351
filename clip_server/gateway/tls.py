"""TLS of the listeners: certificates, read again when their files change."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from clip_server.watched_files import WatchedFiles


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of a server.

    key, certificate: its key, and its chain of certificates.
    password: of the key; None: it is not encrypted.
    client_ca: the authorities of clients, which then need a certificate; None: they need none.
    """

    key: Path
    certificate: Path
    password: str | None = None
    client_ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Settings for connections. Raises OSError, of which ssl.SSLError is a kind."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.certificate, self.key, self.password or "")
        if self.client_ca:
            context.load_verify_locations(self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
            # A session that is resumed is not verified again.
            context.options |= ssl.OP_NO_TICKET
            context.num_tickets = 0
        return context

    def for_grpc(self) -> Any:
        """The same for gRPC."""
        pair = (self._decrypted_key(), self.certificate.read_bytes())
        roots = self.client_ca.read_bytes() if self.client_ca else None
        return grpc.ssl_server_certificate_configuration([pair], roots)

    def paths(self) -> list[Path]:
        """All of the files."""
        return [*filter(None, (self.key, self.certificate, self.client_ca))]

    def _decrypted_key(self) -> bytes:
        """The key as PEM without password, which is the only kind that gRPC takes."""
        pem = self.key.read_bytes()
        if self.password is None:
            return pem
        from cryptography.hazmat.primitives import serialization

        try:
            key = serialization.load_pem_private_key(pem, self.password.encode())
        except TypeError:  # it has no password any more
            return pem
        decrypted: bytes = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return decrypted


class Tls:
    """The certificates of new connections; those that are open keep theirs. Files that do not
    belong together, as while they are being replaced, change nothing.

    Raises:
        OSError, ValueError: the files cannot be read, or are no key and certificate.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._watched = WatchedFiles(
            "TLS certificates", files.paths(), lambda: (files.context(), files.for_grpc())
        )

    def context(self) -> ssl.SSLContext:
        """Settings for a listener, each of whose handshakes uses the current certificate."""

        def choose(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context, _ = self._watched.current()

        context = self._files.context()
        context.sni_callback = choose
        return context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """The same for a gRPC server, which asks from threads of its own."""

        def current() -> Any:
            _, configuration = self._watched.current()
            return configuration

        return grpc.dynamic_ssl_server_credentials(
            current(), current, require_client_authentication=self._files.client_ca is not None
        )
