"""The way from the gateway to the encoder: kept channels straight to its replicas.

Jina's own streamer costs 5.5 ms a call and tops out below 400 calls a second; a kept channel
costs a quarter of that and lets a cancelled request cancel its work.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from docarray import DocList
from google.protobuf.empty_pb2 import Empty
from jina.proto import jina_pb2
from jina.types.request.data import DataRequest

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import ConfigurationError, RequestError
from clip_server.executors.documents import Frame
from clip_server.service import FAILED, error_response

log = logging.getLogger(__name__)

ENDPOINT = "/clip.v1"
_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
_DISCOVERY_SECONDS = 1.0
_NOT_YET = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class _Replica:
    """A kept channel to one replica, and how many calls are under way on it."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address.split("://")[-1], options=_OPTIONS)
        self.under_way = 0
        self.call = self.channel.unary_unary(
            "/jina.JinaSingleDataRequestRPC/process_single_data",
            request_serializer=jina_pb2.DataRequestProto.SerializeToString,
            response_deserializer=jina_pb2.DataRequestProto.FromString,
        )
        self.discover = self.channel.unary_unary(
            "/jina.JinaDiscoverEndpointsRPC/endpoint_discovery",
            request_serializer=Empty.SerializeToString,
            response_deserializer=jina_pb2.EndpointsProto.FromString,
        )


class Encoder:
    """The encoder of a flow: the deployment that answers clip.v1.

    deployments: addresses of replicas by deployment.
    timeout: seconds until a call is given up; None: never.
    """

    def __init__(self, deployments: Mapping[str, Sequence[str]], timeout: float | None) -> None:
        self._deployments = {
            name: [_Replica(address) for address in addresses]
            for name, addresses in deployments.items()
        }
        self._timeout = timeout
        self._replicas: list[_Replica] = []

    async def find(self, is_cancelled: asyncio.Event) -> None:
        """Waits until the encoder answers. Raises ConfigurationError where the flow has none."""
        for name, replicas in self._deployments.items():
            endpoints = await self._endpoints(replicas, is_cancelled)
            if ENDPOINT in endpoints:
                self._replicas = replicas
                log.debug("the encoder is %s, with %d replicas", name, len(replicas))
                return
        if not is_cancelled.is_set():
            raise ConfigurationError("no executor of this flow is a CLIPEncoder")

    @staticmethod
    async def _endpoints(
        replicas: Sequence[_Replica], is_cancelled: asyncio.Event
    ) -> Sequence[str]:
        while not is_cancelled.is_set():
            for replica in replicas:
                try:
                    found = await replica.discover(Empty(), timeout=_DISCOVERY_SECONDS)
                    return list(found.endpoints)
                except grpc.aio.AioRpcError as error:
                    if error.code() not in _NOT_YET:
                        raise ConfigurationError(f"an executor does not answer: {error}") from None
            await asyncio.sleep(0.02)
        return ()

    async def call(self, request: pb.Request) -> pb.Response:
        """The encoder's response to `request`; what goes wrong on the way is in it too."""
        started = time.perf_counter()
        try:
            response = await self._call(request)
        except RequestError as error:
            response = error_response(request.id, error)
        kind = response.WhichOneof("body")
        if kind in ("encode", "rank"):
            timings = getattr(response, kind).timings
            timings.gateway = (time.perf_counter() - started) * 1e3 - timings.total
        return response

    async def _call(self, request: pb.Request) -> pb.Response:
        message = DataRequest()
        message.header.exec_endpoint = ENDPOINT
        message.data.docs = DocList[Frame]([Frame(payload=request.SerializeToString())])
        for replica in sorted(self._replicas, key=lambda each: each.under_way):
            replica.under_way += 1
            try:
                answer = await replica.call(message.proto, timeout=self._timeout)
                return _unpack(answer)
            except grpc.aio.AioRpcError as error:
                # A replica that is gone: the next one may serve.
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise _refusal(error) from None
            finally:
                replica.under_way -= 1
        raise RequestError("no encoder is ready: try again in a moment", "UNAVAILABLE")

    async def close(self) -> None:
        """Closes the channels."""
        for replicas in self._deployments.values():
            for replica in replicas:
                await replica.channel.close()


def replica_addresses(deployments: Mapping[str, Any]) -> dict[str, list[str]]:
    """The gRPC addresses of each deployment, from how Jina hands them to a gateway."""
    return {
        name: addresses if isinstance(addresses, list) else addresses["grpc"]
        for name, addresses in deployments.items()
    }


def _unpack(answer: jina_pb2.DataRequestProto) -> pb.Response:
    data = DataRequest(answer)
    if answer.header.status.code == jina_pb2.StatusProto.ERROR:
        log.error("the encoder failed: %s", answer.header.status.description)
        raise RequestError(FAILED, "INTERNAL")
    data.document_array_cls = DocList[Frame]
    return pb.Response.FromString(data.docs[0].payload)


def _refusal(error: grpc.aio.AioRpcError) -> RequestError:
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return RequestError("the encoder did not answer in time", "DEADLINE_EXCEEDED")
    log.error("a call to the encoder failed: %s", error)
    return RequestError(FAILED, "INTERNAL")
