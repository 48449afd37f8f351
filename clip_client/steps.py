"""One way of writing a call, two ways of running it.

A call of the Client is a generator that yields what it waits for and returns its result: a
flow. `run` waits by blocking, `arun` by awaiting; everything else, generators and callbacks of
the user included, runs in the caller's own thread or event loop in both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
Step = Future[Any] | Awaitable[Any]
Flow = Generator[Step, Any, T]


def run(flow: Flow[T]) -> T:
    """Runs a flow to its end, blocking at each step."""
    try:
        step = next(flow)
        while True:
            try:
                assert isinstance(step, Future)
                value = step.result()
            except BaseException as error:
                step = flow.throw(error)
            else:
                step = flow.send(value)
    except StopIteration as stop:
        result: T = stop.value
        return result


async def arun(flow: Flow[T]) -> T:
    """Runs a flow to its end on the caller's event loop."""
    try:
        step = next(flow)
        while True:
            try:
                value = await (asyncio.wrap_future(step) if isinstance(step, Future) else step)
            except BaseException as error:
                step = flow.throw(error)
            else:
                step = flow.send(value)
    except StopIteration as stop:
        result: T = stop.value
        return result
