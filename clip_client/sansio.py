"""Drives a call of the Client, which is written once, blocking or awaiting.

A call is a generator that yields what it waits for and returns its result. `drive_sync` waits by
blocking, `drive_async` by awaiting; in both, everything else, the user's generators and callbacks
included, runs in the caller's own thread or event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
Step = Future[Any] | Awaitable[Any]
CallGenerator = Generator[Step, Any, T]


def drive_sync(call: CallGenerator[T]) -> T:
    """Runs a call to its end, blocking at each step."""
    try:
        step = next(call)
        while True:
            try:
                assert isinstance(step, Future)
                value = step.result()
            except BaseException as error:
                step = call.throw(error)
            else:
                step = call.send(value)
    except StopIteration as stop:
        result: T = stop.value
        return result


async def drive_async(call: CallGenerator[T]) -> T:
    """Runs a call to its end on the caller's event loop."""
    try:
        step = next(call)
        while True:
            try:
                value = await (asyncio.wrap_future(step) if isinstance(step, Future) else step)
            except BaseException as error:
                step = call.throw(error)
            else:
                step = call.send(value)
    except StopIteration as stop:
        result: T = stop.value
        return result
