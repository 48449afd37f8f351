"""Recognises a gateway of Jina's own, which does not speak clip.v1."""

from __future__ import annotations

from clip_client.address import Address
from clip_client.errors import ServerError, server_error
from clip_client.tls import Trust

# The method of its gRPC port that it answers by itself, whatever its executors do.
STATUS = "/jina.JinaInfoRPC/_status"
_SECONDS = 5.0


def jina_gateway_error(address: Address) -> ServerError:
    """The error for a request to such a gateway."""
    return server_error(
        "UNIMPLEMENTED",
        f"{address} is a Jina gateway without clip.v1: start the flow with "
        "`python -m clip_server flow.yml`, or with `clip_server.Flow` instead of `jina.Flow`",
    )


async def is_jina_gateway(address: Address, trust: Trust, proxy: str | None) -> bool:
    """Whether the server at an HTTP or WebSocket address is one."""
    # The transports of gRPC and WebSocket need no aiohttp otherwise.
    import aiohttp

    from clip_client.sessions import open_session

    scheme = "https" if address.secure else "http"
    timeout = aiohttp.ClientTimeout(total=_SECONDS)
    try:
        async with (
            open_session(timeout, trust if address.secure else Trust(verify=False)) as session,
            session.get(f"{scheme}://{address.target}/status", proxy=proxy) as reply,
        ):
            status = await reply.json()
            return isinstance(status, dict) and "jina" in status
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return False
