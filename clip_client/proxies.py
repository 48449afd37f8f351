"""The proxy that the environment names for an address, the same for every protocol."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from clip_client.errors import InvalidInputError

# The variables that each scheme goes by, without `_proxy`. ws and gRPC pass through proxies as
# TLS does, with CONNECT.
_VARIABLES = {
    "http": ("http",),
    "https": ("https",),
    "ws": ("ws", "https", "http"),
    "wss": ("wss", "https"),
    "grpc": ("grpc", "https", "http"),
    "grpcs": ("grpc", "https", "http"),
    "triton": ("http",),
    "tritons": ("https",),
    "triton+grpc": ("grpc", "https", "http"),
    "triton+grpcs": ("grpc", "https", "http"),
}


def environment_proxy(url: str) -> str | None:
    """The proxy that HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY name for a URL, if any.

    This machine is reached without one. Raises InvalidInputError for a proxy of another kind,
    such as SOCKS.
    """
    parts = urlsplit(url)
    proxies = getproxies()
    names = (*_VARIABLES[parts.scheme.lower()], "all")
    proxy = next(filter(None, map(proxies.get, names)), None)
    host = parts.hostname or ""
    if not proxy or _is_here(host) or proxy_bypass(host) or proxy_bypass(parts.netloc):
        return None
    scheme, separator, _ = proxy.partition("://")
    if not separator:
        return f"http://{proxy}"
    if scheme.lower() not in ("http", "https"):
        raise InvalidInputError(
            f"{url}: {scheme} proxies are not supported: set HTTP_PROXY and HTTPS_PROXY to an HTTP "
            "proxy, or NO_PROXY to the hosts that need none"
        )
    return proxy


def through(proxy: str | None) -> str:
    """' through the proxy http://host:port', without its password; nothing without a proxy."""
    if not proxy:
        return ""
    parts = urlsplit(proxy)
    shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], "", "", ""))
    return f" through the proxy {shown}"


def _is_here(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified
