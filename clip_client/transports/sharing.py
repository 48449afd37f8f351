"""Lets requests that are ready at the same moment share one exchange with the server."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from clip_client.proto import clip_pb2

# Requests of one exchange, whose cost is small among so many.
_MAX_SHARED = 32
# Exchanges among which the requests in flight are divided, so that client and server work at the
# same time.
_MIN_EXCHANGES = 4
# A request in flight, and where its response goes.
_Sent: TypeAlias = tuple[clip_pb2.Request, "asyncio.Future[clip_pb2.Response]"]
Exchange: TypeAlias = Callable[[Sequence[clip_pb2.Request]], Awaitable[Sequence[clip_pb2.Response]]]


class Sharing:
    """Sends the requests of one turn of the event loop together.

    exchange: sends requests, and returns their responses in the same order.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._waiting: list[_Sent] = []
        self._in_flight = 0
        self._exchanges: set[asyncio.Task[None]] = set()

    async def send(self, request: clip_pb2.Request) -> clip_pb2.Response:
        """The response to a request, which waits for those that it shares the exchange with."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._begin)
        answer: asyncio.Future[clip_pb2.Response] = loop.create_future()
        self._waiting.append((request, answer))
        self._in_flight += 1
        try:
            return await answer
        finally:
            self._in_flight -= 1

    def _begin(self) -> None:
        waiting, self._waiting = self._waiting, []
        size = min(_MAX_SHARED, max(1, self._in_flight // _MIN_EXCHANGES))
        for start in range(0, len(waiting), size):
            sent = waiting[start : start + size]
            task = asyncio.create_task(self._answer(sent))
            self._exchanges.add(task)  # the loop alone does not keep it
            task.add_done_callback(self._exchanges.discard)

    async def _answer(self, sent: Sequence[_Sent]) -> None:
        task = asyncio.current_task()
        assert task is not None

        def cancel_if_unwanted(_: object) -> None:
            if all(answer.cancelled() for _, answer in sent):
                task.cancel()

        for _, answer in sent:
            answer.add_done_callback(cancel_if_unwanted)
        try:
            responses = await self._exchange([request for request, _ in sent])
        except Exception as error:
            for answer in _unanswered(sent):
                answer.set_exception(copy.copy(error))
        else:
            for (_, answer), response in zip(sent, responses, strict=True):
                if not answer.done():
                    answer.set_result(response)
        finally:
            for answer in _unanswered(sent):  # the exchange was cancelled
                answer.cancel()


def _unanswered(sent: Sequence[_Sent]) -> list[asyncio.Future[clip_pb2.Response]]:
    return [answer for _, answer in sent if not answer.done()]
