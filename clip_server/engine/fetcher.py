"""Fetches images for `uri` items, from the hosts that the flow allows and from nowhere else.

A server that opens any address can be made to read its own network. So a URI has to name an allowed
host, each redirect too, and the address of each connection is checked where it is made: what a name
resolved to a moment before does not matter.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias, get_type_hints

from clip_server.errors import ConfigurationError, ItemError

if TYPE_CHECKING:
    import aiohttp
    from yarl import URL

log = logging.getLogger(__name__)

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_SCHEMES = ("https", "http")
_LONGEST_URI = 4096
# At the same time, in all and for one request: slow hosts of one do not delay the others.
_CONCURRENT_FETCHES, _CONCURRENT_OF_REQUEST = 64, 16
_CHUNK_BYTES = 1 << 16
# Of all that is fetched for one request.
_MOST_BYTES = 128 << 20
_REDIRECTS = {301, 302, 303, 307, 308}
# Control characters and blanks, and what parsers of URLs disagree about.
_UNFIT = re.compile(r"[\x00-\x20\x7f-\xa0\\]")
_HOST = re.compile(r"(\*\.)?[^\s*/@\\?#]+|\*")
# In addition to what Python's ipaddress does not call global: networks that lead to others (NAT64,
# 6to4, Teredo), and the address at which Azure's machines ask for their metadata.
_CLOSED = [
    ipaddress.ip_network(each)
    for each in (
        *("0.0.0.0/8", "100.64.0.0/10", "168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24"),
        *("198.18.0.0/15", "224.0.0.0/3"),
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
]
# Everything else in IPv6 is no address of a machine on the internet.
_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")


@dataclass(frozen=True)
class UriPolicy:
    """An encoder's `allow_uri:`: which URIs the server fetches.

    hosts: `images.example.com`, `*.example.com` for every name below it, `*` for all; with a port,
        for that port only.
    schemes: `https`, `http`.
    networks: private ones, such as 10.1.0.0/16, that allowed hosts may lie in.
    timeout: seconds of one fetch, redirects included.
    max_redirects: of one fetch.
    max_uris: that are fetched for one request.
    """

    hosts: tuple[str, ...]
    schemes: tuple[str, ...] = ("https",)
    networks: tuple[Network, ...] = ()
    timeout: float = 10.0
    max_redirects: int = 3
    max_uris: int = 100

    @classmethod
    def parse(cls, given: Any) -> UriPolicy:
        """From a flow's YAML. Raises ConfigurationError."""
        if not isinstance(given, Mapping):
            raise ConfigurationError(
                f"allow_uri: {given!r} is not keys with values, as "
                "{schemes: [https], hosts: [images.example.com]}"
            )
        known = [each.name for each in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigurationError(
                    f"allow_uri: unknown key {name!r}; there is {', '.join(known)}"
                )
        values = {name: value for name, value in given.items() if value not in (None, "", [])}
        if "hosts" not in values:
            raise ConfigurationError(
                "allow_uri: hosts: is missing: list the hosts to fetch from, such as "
                "images.example.com, *.example.com, or '*' for all"
            )
        types = get_type_hints(cls)
        for name, value in values.items():
            read = _SEVERAL.get(name)
            values[name] = (
                tuple(map(read, _listed(value))) if read else _number(name, value, types[name])
            )
        return cls(**values)

    def refuse(self, url: URL) -> str | None:
        """Why a URL is not fetched; None: it is."""
        if url.scheme not in self.schemes:
            return f"the server fetches only {' and '.join(self.schemes)} URIs"
        if url.user is not None or url.password is not None:
            return "a URI with a user's name or a password is not fetched"
        host = (url.raw_host or "").lower().rstrip(".")
        if not host or "%" in host:
            return "the URI has no host"
        if not any(_matches(pattern, host, url.port) for pattern in self.hosts):
            return f"the server does not fetch from {host[:100]!r}"
        return None

    def allows(self, address: str) -> bool:
        """Whether a connection to an IP address may be made."""
        parsed = ipaddress.ip_address(address.partition("%")[0])
        parsed = getattr(parsed, "ipv4_mapped", None) or parsed
        return _is_public(parsed) or any(parsed in network for network in self.networks)


@dataclass
class _Budget:
    """Bytes that may still be fetched for one request."""

    left: int

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise ItemError(
                f"the images of one request have more than {_MOST_BYTES / 2**20:.0f} MiB together: "
                "send fewer URIs in one"
            )


class Fetcher:
    """Fetches the images that a policy allows. Use it from one event loop.

    max_bytes: of one image.
    """

    def __init__(self, policy: UriPolicy, max_bytes: int) -> None:
        self._policy, self._max_bytes = policy, max_bytes
        self._free = asyncio.Semaphore(_CONCURRENT_FETCHES)
        self._tls = ssl.create_default_context()

    async def fetch(
        self, uris: Iterable[str], timeout: float | None = None
    ) -> dict[str, bytes | ItemError]:
        """What is at each URI, or why it is not fetched. Each is fetched once.

        timeout: seconds for all of them together; None: only the policy bounds the time of each.
        """
        import aiohttp

        wanted = list(dict.fromkeys(uris))
        if not wanted:
            return {}
        fetched, refused = wanted[: self._policy.max_uris], wanted[self._policy.max_uris :]
        connector = aiohttp.TCPConnector(
            limit=0,
            ssl=self._tls,
            # Not aiodns, which would not ask this machine's own list of hosts.
            resolver=aiohttp.ThreadedResolver(),
            use_dns_cache=False,
            socket_factory=self._open_socket,
        )
        budget, turns = _Budget(_MOST_BYTES), asyncio.Semaphore(_CONCURRENT_OF_REQUEST)

        async def follow(uri: str) -> bytes:
            async with turns, self._free:
                followed = self._follow(session, uri, budget)
                return await asyncio.wait_for(followed, self._policy.timeout)

        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            # Compressed images are images already; anything else could be a bomb.
            auto_decompress=False,
            headers={
                "Accept": "image/*",
                "Accept-Encoding": "identity",
                "User-Agent": "clip-server",
            },
            timeout=aiohttp.ClientTimeout(total=self._policy.timeout),
            trust_env=False,
        ) as session:
            contents = await asyncio.gather(
                *(self._fetch(uri, follow(uri), timeout) for uri in fetched)
            )
        too_many = ItemError(
            f"the server fetches at most {self._policy.max_uris:,} URIs for one request: send fewer"
        )
        return {**dict(zip(fetched, contents, strict=True)), **dict.fromkeys(refused, too_many)}

    async def _fetch(
        self, uri: str, content: Awaitable[bytes], timeout: float | None
    ) -> bytes | ItemError:
        """`content`, or why it did not come within `timeout` seconds."""
        import aiohttp

        try:
            return await asyncio.wait_for(content, timeout)
        except ItemError as error:
            return error
        except (asyncio.TimeoutError, TimeoutError):
            seconds = min(timeout or self._policy.timeout, self._policy.timeout)
            return ItemError(f"the URI was not fetched within {seconds:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # The same for all: what else a client could learn is about the server's network.
            log.info("%s was not fetched: %s", uri[:200], error)
            return ItemError("the host of the URI cannot be reached")

    async def _follow(self, session: aiohttp.ClientSession, uri: str, budget: _Budget) -> bytes:
        """What is at a URI, redirects followed. Raises ItemError."""
        url = _parse(uri)
        for _ in range(1 + self._policy.max_redirects):
            if fault := self._policy.refuse(url):
                raise ItemError(fault)
            async with session.get(url, allow_redirects=False) as answer:
                if answer.status not in _REDIRECTS:
                    return await self._read(answer, budget)
                url = url.join(_parse(answer.headers.get("location", "")))
        raise ItemError(f"the URI redirects more than {self._policy.max_redirects} times")

    async def _read(self, answer: aiohttp.ClientResponse, budget: _Budget) -> bytes:
        if answer.status != 200:
            raise ItemError(f"the host of the URI answers with status {answer.status}")
        if answer.headers.get("content-encoding", "identity").lower() != "identity":
            raise ItemError(
                "the host of the URI answers with a compressed body, though not asked to"
            )
        content = bytearray()
        size = answer.content_length or 0
        while size <= self._max_bytes:
            chunk = await answer.content.read(_CHUNK_BYTES)
            if not chunk:
                return bytes(content)
            budget.take(len(chunk))
            content += chunk
            size = max(size, len(content))
        raise ItemError(
            f"the image has more than {self._max_bytes / 2**20:.0f} MiB, the most the server takes"
        )

    def _open_socket(self, address_info: Sequence[Any]) -> socket.socket:
        """A socket for a connection to an address that is allowed; aiohttp connects it next."""
        family, kind, protocol, _, address = address_info
        if not self._policy.allows(address[0]):
            raise PermissionError(f"{address[0]} is not an address to fetch from")
        return socket.socket(family, kind, protocol)


def _parse(uri: str) -> URL:
    """Raises ItemError unless `uri` is a URL, absolute or relative."""
    from yarl import URL

    if len(uri) > _LONGEST_URI:
        raise ItemError(f"the URI is longer than {_LONGEST_URI:,} characters")
    if not uri or _UNFIT.search(uri):
        raise ItemError("the URI is empty, or holds blanks, backslashes or control characters")
    try:
        url = URL(uri)
        _ = url.port  # which may be no number
    except ValueError:
        raise ItemError("the URI is not a URL") from None
    return url


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and address not in _GLOBAL_IPV6:
        return False
    return address.is_global and not any(address in network for network in _CLOSED)


def _matches(pattern: str, host: str, port: int | None) -> bool:
    name, separator, wanted = pattern.rpartition(":")
    if separator and wanted.isdecimal() and not (":" in name and not name.endswith("]")):
        if port != int(wanted):
            return False
        pattern = name
    pattern = pattern.strip("[]")
    if pattern.startswith("*."):
        return host.endswith(pattern[1:])
    return pattern in ("*", host)


def _host(value: Any) -> str:
    """A host, as URLs hold it."""
    if not isinstance(value, str) or not _HOST.fullmatch(value):
        raise ConfigurationError(
            f"allow_uri: hosts: {value!r} is not a host, such as images.example.com, "
            "*.example.com or localhost:8000"
        )
    try:
        return value.lower().rstrip(".").encode("idna" if not value.isascii() else "ascii").decode()
    except UnicodeError:
        raise ConfigurationError(f"allow_uri: hosts: {value!r} is not a host") from None


def _scheme(value: Any) -> str:
    if value not in _SCHEMES:
        raise ConfigurationError(
            f"allow_uri: schemes: {value!r} is not allowed: there is {', '.join(_SCHEMES)}"
        )
    return str(value)


def _network(value: Any) -> Network:
    try:
        return ipaddress.ip_network(value)
    except (ValueError, TypeError):
        raise ConfigurationError(
            f"allow_uri: networks: {value!r} is not a network, such as 10.1.0.0/16"
        ) from None


def _number(name: str, value: Any, kind: type) -> Any:
    least = 0 if name == "max_redirects" else 1
    fits = type(value) is int or (kind is float and type(value) is float)
    if not fits or value < least:
        raise ConfigurationError(f"allow_uri: {name}: {value!r} is not a number from {least}")
    return value


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


_SEVERAL = {"hosts": _host, "schemes": _scheme, "networks": _network}
