"""Executors that answer clip.v1 and Jina's protocol on the same port."""

import sys
from abc import abstractmethod
from typing import Any

import grpc
from jina import Executor

from clip_client.proto import clip_pb2 as pb
from clip_server import logs
from clip_server.launch import heartbeats, jina_internals
from clip_server.launch.process_setup import (
    die_with_parent,
    return_memory_regularly,
    spare_garbage_collector,
)
from clip_server.rpc.grpc_service import clip_handlers
from clip_server.rpc.items import count_items
from clip_server.rpc.multiplexing import StreamServer

# Arguments that Jina passes to an executor in addition to its parameters.
_JINA_ARGUMENTS = {"metas", "requests", "runtime_args", "workspace", "dynamic_batching"}


class ClipExecutor(Executor):
    """An executor whose `handle` answers the gateway's messages."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{k: v for k, v in arguments.items() if k in _JINA_ARGUMENTS})
        # Jina passes runtime_args when it starts an executor in a process of its own. An executor
        # made in Python belongs to its caller's process, whose signals and memory are not ours.
        self.is_served = bool(arguments.get("runtime_args"))
        if self.is_served:
            logs.configure()
            die_with_parent()
            return_memory_regularly()

    def is_stuck(self, seconds: float) -> bool:
        """Whether a piece of work, which may take so long, does not come to an end."""
        del seconds
        return False

    @staticmethod
    def own_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
        """Selects the parameters of a flow's YAML from the arguments of `__init__`."""
        return {k: v for k, v in arguments.items() if k not in _JINA_ARGUMENTS}

    @abstractmethod
    async def handle(self, request: pb.Request) -> pb.Response:
        """Answers a request; errors are in the response."""


class _ClipCalls(grpc.aio.ServerInterceptor):
    """Answers the calls of clip.v1 on a server that has no handlers of its own for them."""

    def __init__(self, executor: ClipExecutor, timed: jina_internals.TimeCall, port: int) -> None:
        async def handle(request: pb.Request) -> pb.Response:
            logs.request_id.set(request.request_id)
            items = count_items(request)
            if items is None:
                return await executor.handle(request)
            endpoint = f"/{request.WhichOneof('body')}"
            with timed(endpoint, items, request.traceparent) as trace:
                answer = executor.handle(request)
                del request  # see `Service.handle`
                response = await answer
                kind = response.WhichOneof("body")
                if trace and kind in ("encode", "rank"):
                    trace.add_stages(getattr(response, kind).timings)
                return response

        heartbeats.beat_in_background(port, executor.is_stuck)
        # Only the gateway connects here, and it limits what it forwards.
        self._handlers = clip_handlers(handle, StreamServer(handle, sys.maxsize))
        spare_garbage_collector()

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Returns the handler of a call."""
        ours = self._handlers.service(handler_call_details)
        return ours or await continuation(handler_call_details)


jina_internals.intercept_calls(ClipExecutor, _ClipCalls)
jina_internals.use_our_gateway(ClipExecutor)
