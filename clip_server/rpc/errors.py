"""A request that failed, as a clip.v1 response."""

from __future__ import annotations

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError

# What a client learns of a failure whose reason is the server's own affair.
FAILED = "the server failed on this request; its log says why"


def error_response(request_id: int, error: RequestError) -> pb.Response:
    """A response that carries `error`."""
    retry_after = round(error.retry_after * 1e3)
    detail = pb.Error(code=error.code, message=str(error), retry_after=retry_after)
    return pb.Response(id=request_id, error=detail)
