"""Jina's own protocol: for its clients, and for executors that speak no other."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeAlias

import grpc
from docarray import DocList
from google.protobuf import empty_pb2, json_format
from google.protobuf.struct_pb2 import Struct
from jina.excepts import InternalNetworkError
from jina.proto import jina_pb2
from jina.serve.runtimes.gateway.request_handling import GatewayRequestHandler
from jina.types.request.data import DataRequest

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.gateway.access import admitted
from clip_server.gateway.admission import Work
from clip_server.gateway.docarray_1 import Docarray1Request, Docarray1Response
from clip_server.gateway.documents import FlowDoc
from clip_server.gateway.lifecycle import Lifecycle
from clip_server.gateway.observation import Observer, current
from clip_server.gateway.topology import Route, Topology
from clip_server.rpc.errors import FAILED
from clip_server.rpc.grpc_service import Context, Observe, abort, parse, unary_handler

log = logging.getLogger(__name__)

Response: TypeAlias = DataRequest | Docarray1Response

# The services that a gateway of Jina has.
JINA_SERVICES = {
    name: jina_pb2.DESCRIPTOR.services_by_name[name].full_name
    for name in (
        "JinaRPC",
        "JinaSingleDataRequestRPC",
        "JinaGatewayDryRunRPC",
        "JinaDiscoverEndpointsRPC",
    )
}
# The name of the exception with which an executor refuses a request, its message for the client.
_REFUSAL = RequestError.__name__


class JinaRequestHandler:
    """Sends requests through the flow; errors carry nothing of the server's internals.

    handler: Jina's own, which visits the executors in the order of the flow.
    topology: the executors.
    observer: observes the requests of streams; who calls `answer` or `send` observes that.
    lifecycle: whether requests of Jina's clients are taken.
    prefetch: requests of one stream that may be in flight.
    """

    def __init__(
        self,
        handler: GatewayRequestHandler,
        topology: Topology,
        observer: Observer,
        lifecycle: Lifecycle,
        prefetch: int,
    ) -> None:
        self._handler, self._topology = handler, topology
        self._lifecycle = lifecycle
        self._observer, self._prefetch = observer, prefetch

    async def answer(self, message: bytes) -> Response:
        """The response to a serialized `jina.DataRequestProto`, in the form of either docarray.

        An error of the flow is in the response, as Jina's clients expect it.

        Raises:
            RequestError: the request cannot be read.
        """
        if docarray_1 := Docarray1Request.parse(message):
            _refuse_unfit(docarray_1.parameters)
            answer = await self._answered(docarray_1.to_jina(), docarray_1.count)
            return docarray_1.answer(answer)
        request = _read(message)
        return await self._answered(request, len(request.proto_with_data.data.docs.docs))

    async def answer_all(self, messages: AsyncIterator[bytes]) -> AsyncIterator[Response]:
        """The responses to a stream of requests, in their order.

        Not by Jina's own streamer: asked for that order, it waits forever if the last answer is
        there before it hears that there are no more requests.

        Raises:
            RequestError: a request cannot be read.
        """
        in_flight: asyncio.Queue[asyncio.Task[Response] | None] = asyncio.Queue()
        free = asyncio.Semaphore(self._prefetch)

        async def begin() -> None:
            try:
                async for message in messages:
                    await free.acquire()
                    in_flight.put_nowait(asyncio.create_task(self._observed_answer(message)))
            finally:
                in_flight.put_nowait(None)

        beginning = asyncio.create_task(begin())
        try:
            while (task := await in_flight.get()) is not None:
                yield await task
                free.release()
            await beginning
        finally:
            beginning.cancel()
            while not in_flight.empty():
                if (task := in_flight.get_nowait()) is not None:
                    task.cancel()

    async def _observed_answer(self, message: bytes) -> Response:
        with self._observer.request("/") as observed:
            try:
                return await self.answer(message)
            except RequestError as error:
                observed.code = error.code
                raise

    async def _answered(self, request: DataRequest, items: int) -> DataRequest:
        try:
            with admitted(items), self._lifecycle.request():
                return await self.send(request)
        except RequestError as error:
            if observed := current():
                observed.code = error.code
            return _refusal(request, error)

    async def send(self, request: DataRequest) -> DataRequest:
        """The flow's response to `request`.

        Raises:
            RequestError: it would wait for too long, no executor answers it, or one failed.
        """
        if observed := current():
            observed.endpoint = request.header.exec_endpoint or "/"
            observed.items += len(request.proto_with_data.data.docs.docs)
            observed.rename(request.header.request_id)
            request.header.request_id = observed.request_id
        route = self._route(request)
        if route.encoder is None:
            return await self._visit(request, route)
        async with route.encoder.backlog.hold(_work(request)):
            return await self._visit(request, route)

    def _route(self, request: DataRequest) -> Route:
        header, parameters = request.header, request.parameters
        model = parameters.get("model_name") or parameters.get("model")
        return self._topology.route(
            header.exec_endpoint, model if isinstance(model, str) else "", header.target_executor
        )

    async def _visit(self, request: DataRequest, route: Route) -> DataRequest:
        """The response of the executors on a route."""
        header = request.header
        header.exec_endpoint, header.target_executor = route.endpoint, route.target
        try:
            response = await self._handler.process_single_data(request, None)
        except InternalNetworkError as error:
            raise _network_error(error) from None
        except RequestError:
            raise
        except Exception:
            log.exception("a request failed in the flow")
            raise RequestError(FAILED, "INTERNAL") from None
        if is_error(response):
            raise _executor_error(response)
        return response

    async def is_ready(self) -> bytes:
        """A serialized `jina.StatusProto` that says whether the flow answers."""
        status = await self._handler.dry_run(empty_pb2.Empty(), None)
        status.ClearField("exception")
        serialized: bytes = status.SerializeToString()
        return serialized

    def endpoints(self) -> bytes:
        """A serialized `jina.EndpointsProto`: the endpoints and the schemas of their documents."""
        schemas: dict[str, Any] = {}
        for executor in self._topology.executors:
            for endpoint, schema in executor.endpoints.items():
                first = schemas.setdefault(endpoint, {"input": schema["input"]["model"]})
                schemas[endpoint] = {
                    **first,
                    "output": schema["output"]["model"],
                    "is_generator": schema["is_generator"],
                    "is_singleton_doc": schema["is_singleton_doc"],
                }
        found = jina_pb2.EndpointsProto(endpoints=sorted(schemas))
        found.schemas.update(schemas)
        serialized: bytes = found.SerializeToString()
        return serialized

    async def post(
        self, endpoint: str, docs: DocList[Any], parameters: Mapping[str, Any]
    ) -> Sequence[FlowDoc]:
        """The documents with which the flow answers `docs`.

        Raises:
            RequestError: no executor answers `endpoint`, or one failed.
        """
        # Whoever calls it has counted them as in flight.
        request = DataRequest()
        request.document_array_cls = DocList[docs.doc_type]  # type: ignore[name-defined]
        request.data.docs = docs
        request.header.exec_endpoint = endpoint
        request.parameters = dict(parameters)
        response = await self._visit(request, self._route(request))
        response.document_array_cls = DocList[FlowDoc]
        answered: Sequence[FlowDoc] = response.docs
        return answered


def jina_handlers(
    jina: JinaRequestHandler, observe: Observe, begin: Callable[[Context], None]
) -> list[grpc.GenericRpcHandler]:
    """Jina's services for a gRPC server, on serialized messages.

    observe: observes a unary call.
    begin: called with the context of a stream that begins.
    """

    async def process(message: bytes, _: Context) -> bytes:
        return serialize(await jina.answer(message))

    async def call(messages: AsyncIterator[bytes], context: Context) -> None:
        begin(context)
        try:
            async for response in jina.answer_all(messages):
                await context.write(serialize(response))
        except RequestError as error:
            await abort(context, error)

    async def dry_run(message: bytes, _: Context) -> bytes:
        parse(empty_pb2.Empty, message)
        return await jina.is_ready()

    async def discover(message: bytes, _: Context) -> bytes:
        parse(empty_pb2.Empty, message)
        return jina.endpoints()

    methods = {
        "JinaRPC": {"Call": grpc.stream_stream_rpc_method_handler(call)},
        "JinaSingleDataRequestRPC": {"process_single_data": unary_handler(process, "/", observe)},
        "JinaGatewayDryRunRPC": {"dry_run": unary_handler(dry_run)},
        "JinaDiscoverEndpointsRPC": {"endpoint_discovery": unary_handler(discover)},
    }
    return [
        grpc.method_handlers_generic_handler(JINA_SERVICES[name], handlers)
        for name, handlers in methods.items()
    ]


def serialize(response: Response) -> bytes:
    """The bytes of a response."""
    serialized: bytes = response.SerializeToString()
    return serialized


def is_error(response: Response) -> bool:
    """Whether a response says that its request failed."""
    failed: bool = response.header.status.code == jina_pb2.StatusProto.ERROR
    return failed


def _read(message: bytes) -> DataRequest:
    """A request whose parts can all be read, which Jina itself finds out too late."""
    proto = parse(jina_pb2.DataRequestProto, message)
    _refuse_unfit(proto.parameters)
    return DataRequest(proto)


def _refuse_unfit(parameters: Struct) -> None:
    try:
        json_format.MessageToDict(parameters)
    except (json_format.Error, ValueError):
        raise RequestError(
            "parameters hold a number that is not finite, or a value without content: send JSON's "
            "values"
        ) from None


def _work(request: DataRequest) -> Work:
    """The documents of a request: those without a text are images."""
    documents = request.proto_with_data.data.docs.docs
    texts = sum("text" in each.data and bool(each.data["text"].text) for each in documents)
    return Work(texts, len(documents) - texts)


def _refusal(request: DataRequest, error: RequestError) -> DataRequest:
    """A response without documents that says why."""
    proto = jina_pb2.DataRequestProto(header=request.header)
    proto.header.target_executor = ""
    proto.header.status.code = jina_pb2.StatusProto.ERROR
    proto.header.status.description = str(error)
    return DataRequest(proto)


def _executor_error(response: DataRequest) -> RequestError:
    """The exception of an executor, with what was meant for the client."""
    exception = response.header.status.exception
    if exception.name == _REFUSAL and exception.args:
        message, code, retry_after = (*exception.args, "", "")[:3]
        if code in pb.Error.Code.keys() and _is_number(retry_after):  # noqa: SIM118 - not a mapping
            return RequestError(message, code, float(retry_after))
        return RequestError(message)
    failed = [
        route.executor
        for route in response.routes
        if route.status.code == jina_pb2.StatusProto.ERROR
    ]
    log.error("executor %s failed: %s", ", ".join(failed), response.header.status.description)
    if not failed:
        return RequestError(FAILED, "INTERNAL")
    return RequestError(
        f"executor {failed[0]} failed on this request; the server's log says why", "INTERNAL"
    )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _network_error(error: InternalNetworkError) -> RequestError:
    log.error("the flow did not answer: %s", error.details())
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return RequestError("an executor did not answer in time", "DEADLINE_EXCEEDED")
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return RequestError("an executor is not ready: try again in a moment", "UNAVAILABLE")
    return RequestError(FAILED, "INTERNAL")
