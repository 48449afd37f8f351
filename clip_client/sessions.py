"""Sessions of aiohttp as the HTTP transport and the fetching of pictures both need them."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from clip_client.errors import InvalidInputError


class _Connector(aiohttp.TCPConnector):
    """Does nothing in a forked child, which holds its parent's connections too.

    To close one there would also take it out of the parent's event loop: they share the epoll.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        # Connections below 5 s idle are kept: the server's own limit is that, and a request
        # should not meet a connection that is just being closed.
        super().__init__(limit=0, ssl=context, keepalive_timeout=4)
        self._pid = os.getpid()

    @property
    def closed(self) -> bool:
        return self._closed or self._pid != os.getpid()

    def __del__(self, *_: object) -> None:
        """Without aiohttp's own, which closes: sessions here are closed by their owners."""


def open_session(
    timeout: aiohttp.ClientTimeout, headers: Mapping[str, str] | None = None
) -> aiohttp.ClientSession:
    """A session of the running event loop, with any number of connections.

    TLS goes by the system's certificates, or those in the file that SSL_CERT_FILE names.
    """
    connector = _Connector(ssl.create_default_context())
    return aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers)


def environment_proxy(url: str) -> str | None:
    """The proxy that HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY name for a URL, if any.

    aiohttp would look for it anew at each request, in a thread, and pass over ALL_PROXY. Raises
    InvalidInputError for a proxy of another kind, such as SOCKS.
    """
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parts.netloc):
        return None
    scheme, separator, _ = proxy.partition("://")
    if not separator:
        return f"http://{proxy}"
    if scheme.lower() not in ("http", "https"):
        raise InvalidInputError(
            f"{url} is to be reached through a {scheme} proxy, which is not spoken here: "
            "set HTTP_PROXY, or NO_PROXY"
        )
    return proxy
