"""The other gateways of the server: each answers scrapes for all, and asks them for their metrics.

They share the HTTP port, so that a scrape reaches one of them by chance. Each has a Unix socket in
a folder of the command that no other user may enter.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily, Metric

from clip_server.launch.gateway_group import GatewayGroup
from clip_server.rpc.metrics import read_text

_ANSWER_SECONDS = 1.0


class Siblings:
    """Exchanges metrics with the other gateways of a group.

    number: of this gateway.
    text: its own metrics, in Prometheus's format.
    """

    def __init__(self, group: GatewayGroup, number: int, text: Callable[[], str]) -> None:
        self._number, self._text = number, text
        folder = group.folder
        self._sockets = [folder / str(each) for each in range(group.size)] if folder else []
        self._server: asyncio.AbstractServer | None = None

    @property
    def exist(self) -> bool:
        """Whether there are any."""
        return bool(self._sockets)

    async def serve(self) -> None:
        """Begins to answer them."""
        if self._sockets:
            socket = self._sockets[self._number]
            socket.unlink(missing_ok=True)  # of one that was killed
            self._server = await asyncio.start_unix_server(self._answer, str(socket))

    async def metrics(self) -> list[Metric]:
        """Metrics of each gateway that answers, this one too, labelled with its number."""
        up = GaugeMetricFamily(
            "clip_gateway_up", "1 if the gateway answered this scrape, else 0", labels=["gateway"]
        )

        async def ask(number: int, socket: Path) -> list[Metric]:
            try:
                text = await asyncio.wait_for(_read(socket), _ANSWER_SECONDS)
            except (OSError, asyncio.TimeoutError):
                text = ""
            up.add_metric([str(number)], bool(text))
            return [*read_text(text, {"gateway": str(number)})]

        found = await asyncio.gather(*itertools.starmap(ask, enumerate(self._sockets)))
        return [up, *itertools.chain.from_iterable(found)]

    async def close(self) -> None:
        """Stops to answer."""
        if self._server is None:
            return
        self._server.close()
        socket = self._sockets[self._number]
        with contextlib.suppress(OSError):  # the command has removed it, or others are there
            socket.unlink()
            socket.parent.rmdir()

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self._text().encode())
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()


async def _read(socket: Path) -> str:
    reader, writer = await asyncio.open_unix_connection(str(socket))
    try:
        return (await reader.read()).decode()
    finally:
        writer.close()
