"""Whether the gateway takes requests: ready, or draining those in flight because it is to end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from clip_server.errors import RequestError
from clip_server.launch.gateway_group import SharedTime

# A request is as good as begun when its client decides to send it. So the gateway goes on taking
# requests when it is told to end: until none came for so long, and at most for this long, or this
# share of the grace period.
_QUIET_SECONDS, _ACCEPTING_SECONDS, _ACCEPTING_SHARE = 0.3, 2.0, 0.25
_LOOK_SECONDS = 0.02


class Lifecycle:
    """Counts the requests in flight, and refuses new ones once it is draining.

    can_answer: whether an encoder answers.
    last_request: when one came to any gateway.
    """

    def __init__(self, can_answer: Callable[[], bool], last_request: SharedTime) -> None:
        self._can_answer, self._last_request = can_answer, last_request
        self._in_flight = 0
        self.is_draining = False
        self._refuses = False

    def why_not_ready(self) -> str:
        """Why load balancers should send no requests; empty if they may."""
        if self.is_draining:
            return "the server is shutting down"
        return "" if self._can_answer() else "no replica of an encoder answers"

    def refusal(self) -> RequestError | None:
        """Why a new request is refused; None: it is taken."""
        if not self._refuses:
            return None
        return RequestError(
            "the server is shutting down: send the request to another one, or again in a moment",
            "UNAVAILABLE",
            retry_after=1.0,
        )

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts a request, which is in flight in this context.

        Raises:
            RequestError: it is refused.
        """
        if refusal := self.refusal():
            raise refusal
        self._in_flight += 1
        self._last_request.note()
        try:
            yield
        finally:
            self._in_flight -= 1

    async def drain(self, seconds: float) -> None:
        """Waits until no request is in flight, for so long at most."""
        self.is_draining = True
        started = time.monotonic()
        accepting = min(_ACCEPTING_SECONDS, _ACCEPTING_SHARE * seconds)
        while (now := time.monotonic()) < started + seconds:
            self._refuses = now > started + accepting
            is_quiet = now > max(started, self._last_request.latest()) + _QUIET_SECONDS
            if not self._in_flight and (is_quiet or self._refuses):
                break
            await asyncio.sleep(_LOOK_SECONDS)
        self._refuses = True
