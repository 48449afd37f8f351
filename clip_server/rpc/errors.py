"""Requests that are refused or failed, and how clip.v1 says so."""

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


def request_error(error: pb.Error) -> RequestError:
    """The exception that a response's error stands for."""
    return RequestError(error.message, pb.Error.Code.Name(error.code), error.retry_after / 1e3)


def check_count(count: int, most: int) -> None:
    """Raises RequestError if a request has more items than the server takes."""
    if count > most:
        raise RequestError(
            f"{count:,} items in one request; the server takes at most {most:,}: send fewer in "
            f"one, with the Python client by a batch_size of {most} or less"
        )
