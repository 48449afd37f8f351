"""Inflates requests of all protocols within bounds, so that a small one cannot fill the memory; and
compresses responses over WebSocket."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
from websockets.extensions import Extension
from websockets.extensions.permessage_deflate import (
    PerMessageDeflate,
    ServerPerMessageDeflateFactory,
)
from websockets.frames import CTRL_OPCODES, Frame, Opcode
from websockets.typing import ExtensionParameter

from clip_server.errors import RequestError
from clip_server.rpc.grpc_service import Context, abort

# Of responses: float32 embeddings shrink by a tenth, and no more at the slower levels.
LEVEL = 1
# Responses up to this size, which take about 1 ms, are compressed on the event loop, others in a
# thread.
FAST_RESPONSE = 16 << 10
# A request may grow by this factor: texts and images stay below it, bombs reach 1,000.
_MOST_GROWTH = 32
# Requests of up to so many inflated bytes may grow by any factor.
_HARMLESS_BYTES = 16 << 20
# Compressed bodies up to this size are inflated on the event loop, others in a thread.
_FAST_BYTES = 8 << 10
# Compressed bytes inflated at a time, and inflated bytes made at a time.
_STEP, _PIECE = 64 << 10, 1 << 20
# Values of zlib's `wbits`.
GZIP, _ZLIB = zlib.MAX_WBITS | 16, zlib.MAX_WBITS
# By the names of the formats in `Content-Encoding`.
_WINDOW_BITS = {"gzip": GZIP, "x-gzip": GZIP, "deflate": _ZLIB}


# An option of gRPC servers that leaves it to `GrpcInflation`.
NO_GRPC_INFLATION = {"grpc.per_message_decompression": 0}


class TooLargeError(RequestError):
    """A request over a limit on its size."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "RESOURCE_EXHAUSTED")


class UnknownEncodingError(RequestError):
    """A body in an encoding that the server does not read."""


def too_large(most: int) -> TooLargeError:
    """The error for a request with more than `most` bytes."""
    return TooLargeError(
        f"the body has more than {most / 2**20:.0f} MiB, the most the server takes: "
        "send fewer items a request, as the client does by itself"
    )


def window_bits(encoding: str) -> int | None:
    """The format of a body for zlib.

    encoding: the header `Content-Encoding`.

    Returns:
        zlib's `wbits`; None: the body is not compressed.

    Raises:
        UnknownEncodingError: it is neither gzip nor deflate.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return None
    if name not in _WINDOW_BITS:
        raise UnknownEncodingError(
            f"content-encoding: {name[:60]!r} is not supported; allowed are gzip, deflate (in "
            "zlib's format) and identity, one of them at a time"
        )
    return _WINDOW_BITS[name]


async def inflate(body: bytes, bits: int, most: int) -> bytes:
    """`_inflate`, in a thread where it may take long."""
    if len(body) <= _FAST_BYTES:
        return _inflate(body, bits, most)
    return await asyncio.to_thread(_inflate, body, bits, most)


def _inflate(body: bytes, bits: int, most: int) -> bytes:
    """Inflates a compressed body.

    bits: zlib's `wbits`.
    most: bytes that it may have then.

    Raises:
        TooLargeError: it has more, or has grown too much.
        RequestError: it is damaged or incomplete.
    """
    limit = _inflated_limit(len(body), most)
    pieces: list[bytes] = []
    size, decoder = 0, zlib.decompressobj(bits)
    for start in range(0, len(body), _STEP):
        rest = body[start : start + _STEP]
        while rest:
            if decoder.eof:  # gzip files may follow each other
                decoder = zlib.decompressobj(bits)
            try:
                piece = decoder.decompress(rest, _PIECE)
            except zlib.error:
                raise _damaged() from None
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise too_large(most) if limit == most else _grown_too_much(limit)
            rest = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
    if not decoder.eof:
        raise _damaged()
    return b"".join(pieces)


class GrpcInflation(grpc.aio.ServerInterceptor):
    """Inflates the messages of gRPC calls: gRPC itself looks at their size only afterwards.

    most: bytes that a message may have then.
    """

    def __init__(self, most: int) -> None:
        self._most = most

    async def intercept_service(
        self, continuation: Callable[..., Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Returns the handler of a call, with messages that are inflated."""
        handler = await continuation(handler_call_details)
        # Those of health and reflection, which do not read bytes, are too short to be compressed.
        if handler is None or handler.request_deserializer is not None:
            return handler
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(self._stream(handler.stream_stream))
        return grpc.unary_unary_rpc_method_handler(self._unary(handler.unary_unary))

    def _unary(self, answer: Callable[[bytes, Context], Awaitable[bytes]]) -> Any:
        async def answer_inflated(message: bytes, context: Context) -> bytes:
            return await answer(await self._inflated(message, context), context)

        return answer_inflated

    def _stream(self, serve: Callable[[AsyncIterator[bytes], Context], Awaitable[None]]) -> Any:
        async def serve_inflated(messages: AsyncIterator[bytes], context: Context) -> None:
            await serve((await self._inflated(each, context) async for each in messages), context)

        return serve_inflated

    async def _inflated(self, message: bytes, context: Context) -> bytes:
        if (bits := _bits_of_message(message)) is None:
            return message
        try:
            return await inflate(message, bits, self._most)
        except RequestError as error:
            await abort(context, error)
            raise


def _bits_of_message(message: bytes) -> int | None:
    """zlib's `wbits` for a gRPC message, of which gRPC does not say whether it is compressed.

    No request begins like this: gzip's first byte stands for no type of field in protobuf, and
    zlib's for an integer in field 15, which neither clip.v1's requests nor Jina's have.
    """
    if message[:2] == b"\x1f\x8b":
        return GZIP
    if message[:1] == b"\x78" and int.from_bytes(message[:2], "big") % 31 == 0:
        return _ZLIB
    return None


class BoundedDeflateFactory(ServerPerMessageDeflateFactory):
    """Negotiates WebSocket's permessage-deflate, which connections then use within bounds.

    compresses: whether responses are compressed as well.
    """

    def __init__(self, most: int, compresses: bool) -> None:
        super().__init__(
            # Connections keep no state between messages.
            server_no_context_takeover=True,
            client_no_context_takeover=True,
            compress_settings={"level": LEVEL},
        )
        self._most, self._compresses = most, compresses

    def process_request_params(  # type: ignore[override]
        self, params: Sequence[ExtensionParameter], accepted_extensions: Sequence[Extension]
    ) -> tuple[list[ExtensionParameter], Extension]:
        """Returns the parameters agreed on, and the extension of a connection."""
        agreed, deflate = super().process_request_params(params, accepted_extensions)
        return agreed, _BoundedDeflate(deflate, self._most, self._compresses)


class _BoundedDeflate(Extension):
    """permessage-deflate of one connection, with a bound on how much a message may grow."""

    name = PerMessageDeflate.name

    def __init__(self, deflate: PerMessageDeflate, most: int, compresses: bool) -> None:
        self._deflate, self._most, self._compresses = deflate, most, compresses
        # Of the frames of the current message.
        self._received = self._inflated = 0

    def decode(self, frame: Frame, *, max_size: int | None = None) -> Frame:
        if frame.opcode in CTRL_OPCODES:
            return frame
        if frame.opcode is not Opcode.CONT:
            self._received = self._inflated = 0
        self._received += len(frame.data)
        left = _inflated_limit(self._received, self._most) - self._inflated
        left = left if max_size is None else min(left, max_size)
        # zlib takes 0 for no limit at all.
        decoded = self._deflate.decode(frame, max_size=max(left, 1))
        self._inflated += len(decoded.data)
        return decoded

    def encode(self, frame: Frame) -> Frame:
        if isinstance(frame.data, _Deflated):
            return Frame(frame.opcode, frame.data, frame.fin, rsv1=True)
        return self._deflate.encode(frame) if self._compresses else frame

    async def deflate(self, message: bytes) -> bytes:
        """The message as `encode` leaves it alone, compressed in a thread if it is large."""
        if not self._compresses or len(message) <= FAST_RESPONSE:
            return message
        frame = Frame(Opcode.BINARY, message)
        return _Deflated((await asyncio.to_thread(self._deflate.encode, frame)).data)


class _Deflated(bytes):
    """A message that is compressed already."""


async def deflated(message: bytes, extensions: Sequence[Extension]) -> bytes:
    """A message for a WebSocket with these extensions, compressed in a thread if that takes long.

    Only one of a connection may be compressed at a time.
    """
    for each in extensions:
        if isinstance(each, _BoundedDeflate):
            return await each.deflate(message)
    return message


def _inflated_limit(received: int, most: int) -> int:
    """The most bytes that so many compressed ones may become."""
    return min(most, max(_HARMLESS_BYTES, _MOST_GROWTH * received))


def _grown_too_much(limit: int) -> TooLargeError:
    return TooLargeError(
        f"the compressed request has more than {limit / 2**20:.0f} MiB when inflated, over "
        f"{_MOST_GROWTH} times its size, the most the server takes: send it without compression"
    )


def _damaged() -> RequestError:
    return RequestError(
        "the request is not compressed as it says: it is damaged, incomplete or followed by "
        "something else"
    )
