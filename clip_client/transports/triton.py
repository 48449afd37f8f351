"""NVIDIA's Triton Inference Server, with a repository of `clip_server.convert --to triton`.

Needs the extra `triton`: tritonclient, over HTTP (`triton://`) or gRPC (`triton+grpc://`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from clip_client import scores
from clip_client.address import Address
from clip_client.data_uri import read_data_uri
from clip_client.errors import ClipError, InvalidInputError, server_error
from clip_client.proto import clip_pb2
from clip_client.tls import Trust
from clip_client.transports.base import STATUS_CODES, Compression

# The ensembles, and their inputs.
_MODELS: Mapping[type, tuple[str, str]] = {
    str: ("text_embedding", "TEXT"),
    bytes: ("image_embedding", "IMAGE"),
}
# The lines of a request's error that name its items.
_ITEM_ERROR = re.compile(r"^(?:in ensemble '\w+', )?item (\d+): (.*)$", re.MULTILINE)
# The most requests in flight.
_CONCURRENCY = 32


def open_transport(
    address: Address,
    headers: dict[str, str],
    trust: Trust,
    compression: Compression | None = None,
) -> TritonTransport:
    """The transport for `triton://`, `triton+grpc://` and both with TLS (`tritons`).

    Raises:
        InvalidInputError: requests to Triton are not compressed.
    """
    if compression:
        raise InvalidInputError(f"{address}: compression is for CLIP servers, not Triton")
    return TritonTransport(address, headers, trust)


@dataclass
class _Encoded:
    """The embeddings of some items by their indices, and why the others failed."""

    embeddings: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    truncated: int = 0

    def rows(self, count: int, dim: int) -> NDArray[np.float32]:
        """[count, dim]; the row of an item that failed is NaN."""
        rows = np.full((count, dim), np.nan, np.float32)
        for index, embedding in self.embeddings.items():
            rows[index] = embedding
        return rows


class TritonTransport:
    """Encodes with the ensembles `text_embedding` and `image_embedding`. Ranks here: Triton has no
    model for it that takes any number of images."""

    def __init__(self, address: Address, headers: dict[str, str], trust: Trust) -> None:
        self._address, self._headers = address, headers
        self._is_grpc = "grpc" in address.scheme
        self._library = _library("grpc" if self._is_grpc else "http")
        self._client = self._open_client(trust)
        self._free = asyncio.Semaphore(_CONCURRENCY)
        self._info: clip_pb2.InfoResponse | None = None

    async def send(self, request: clip_pb2.Request) -> clip_pb2.Response:
        response = clip_pb2.Response(id=request.id)
        kind = request.WhichOneof("body")
        if kind == "encode":
            await self._encode(request.encode, response.encode)
        elif kind == "rank":
            await self._rank(request.rank, response.rank)
        elif kind == "info":
            response.info.CopyFrom(await self._describe())
        else:
            raise server_error("UNIMPLEMENTED", f"{self._address}: Triton has no call {kind!r}")
        return response

    async def close(self) -> None:
        await self._client.close()

    def _open_client(self, trust: Trust) -> Any:
        address = self._address
        place = f"{address.target}{address.path}"
        if self._is_grpc:
            roots = (
                grpc.ssl_channel_credentials(trust.roots(), *trust.own_pair())
                if address.secure
                else None
            )
            return self._library.InferenceServerClient(place, creds=roots)
        return self._library.InferenceServerClient(
            place,
            conn_limit=_CONCURRENCY,
            conn_timeout=None,  # a call has its own deadline, above the transports
            ssl=address.secure,
            ssl_context=trust.context() if address.secure else None,
        )

    async def _encode(
        self, request: clip_pb2.EncodeRequest, response: clip_pb2.EncodeResponse
    ) -> None:
        encoded = await self._embed(request.items)
        rows = encoded.rows(len(request.items), (await self._describe()).dim)
        if request.options.normalize:
            rows = scores.normalize(rows)
        response.embeddings = rows.astype("<f4", copy=False).tobytes()
        response.count, response.dim = rows.shape
        response.errors.extend(_item_errors(encoded.errors))
        response.truncated = encoded.truncated

    async def _rank(self, request: clip_pb2.RankRequest, response: clip_pb2.RankResponse) -> None:
        info = await self._describe()
        items = [request.query, *request.candidates]
        encoded = await self._embed(items)
        if 0 in encoded.errors:
            raise server_error(
                "INVALID_ARGUMENT", f"the query cannot be encoded: {encoded.errors[0]}"
            )
        rows, good = encoded.rows(len(items), info.dim), sorted(encoded.embeddings)[1:]
        cosines = scores.cosines(rows[:1], rows[good])
        probabilities = scores.probabilities(cosines, info.logit_scale, scores.logit_bias_of(info))[
            0
        ]
        response.matches.extend(
            clip_pb2.Match(index=good[i] - 1, probability=probabilities[i], cosine=cosines[0, i])
            for i in np.argsort(-cosines[0], kind="stable")
        )
        response.errors.extend(
            _item_errors({index - 1: why for index, why in encoded.errors.items()})
        )

    async def _embed(self, items: Sequence[clip_pb2.Item]) -> _Encoded:
        encoded = _Encoded()
        contents: dict[type, dict[int, str | bytes]] = {str: {}, bytes: {}}
        for index, item in enumerate(items):
            try:
                content = _content(item)
            except ValueError as error:
                encoded.errors[index] = str(error)
            else:
                contents[type(content)][index] = content
        batch_size = (await self._describe()).max_request_items
        await asyncio.gather(
            *(
                self._embed_batch(kind, dict(batch), encoded)
                for kind, found in contents.items()
                for batch in _batches(list(found.items()), batch_size)
            )
        )
        return encoded

    async def _embed_batch(
        self, kind: type, batch: dict[int, str | bytes], encoded: _Encoded
    ) -> None:
        """Embeds items of one kind. An item that cannot be read fails its whole request, whose
        error names every such item: the others are sent again."""
        while batch:
            try:
                embeddings, truncated = await self._infer(kind, list(batch.values()))
            except self._library.InferenceServerException as error:
                failed = {int(at): why for at, why in _ITEM_ERROR.findall(error.message() or "")}
                if not failed:
                    raise self._explained(error) from None
                indices = list(batch)
                for at, why in failed.items():
                    encoded.errors[indices[at]] = why
                    del batch[indices[at]]
            else:
                encoded.embeddings.update(zip(batch, embeddings, strict=True))
                encoded.truncated += truncated
                return

    async def _infer(
        self, kind: type, contents: Sequence[str | bytes]
    ) -> tuple[NDArray[np.float32], int]:
        """Embeddings [B, D], and how many of the texts were cut."""
        model, name = _MODELS[kind]
        data = [each.encode() if isinstance(each, str) else each for each in contents]
        tensor = self._library.InferInput(name, [len(data), 1], "BYTES")
        tensor.set_data_from_numpy(np.array(data, dtype=object).reshape(-1, 1))
        async with self._free:
            result = await self._call("infer", model, [tensor])
        truncated = result.as_numpy("TRUNCATED")
        return result.as_numpy("EMBEDDING"), 0 if truncated is None else int(truncated.sum())

    async def _describe(self) -> clip_pb2.InfoResponse:
        if self._info is None:
            try:
                config = await self._config("image_embedding")
            except self._library.InferenceServerException:
                # It may be unloaded; the other knows as much of the model.
                try:
                    config = await self._config("text_embedding")
                except self._library.InferenceServerException as error:
                    raise self._explained(error) from None
            self._info = _info(config)
        return self._info

    async def _config(self, model: str) -> dict[str, Any]:
        config: dict[str, Any]
        if self._is_grpc:
            config = (await self._call("get_model_config", model, as_json=True))["config"]
        else:
            config = await self._call("get_model_config", model)
        return config

    async def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            return await getattr(self._client, method)(
                *arguments, headers=self._headers or None, **options
            )
        except (OSError, asyncio.TimeoutError) as error:
            raise self._address.unreachable(error) from None

    def _explained(self, error: Any) -> ClipError:
        """Triton's error as one of ours."""
        status, message = str(error.status()).rpartition(".")[2], error.message()
        code = STATUS_CODES.get(int(status), "UNKNOWN") if status.isdigit() else status
        if code == "UNAVAILABLE" and "no available versions" not in message:
            return self._address.unreachable(message)
        if status in ("404", "NOT_FOUND") or "unknown model" in message:
            message += (
                "; does this Triton serve a repository of `python -m clip_server.convert NAME "
                "--to triton`?"
            )
        return server_error(code, f"{self._address}: {message}")


def _library(protocol: str) -> Any:
    try:
        return import_module(f"tritonclient.{protocol}.aio")
    except ImportError as error:
        raise InvalidInputError(
            f"to reach Triton, install tritonclient: pip install "
            f"'clip-microservice-client[triton]' ({error})"
        ) from None


def _content(item: clip_pb2.Item) -> str | bytes:
    """A text, or the bytes of an image. Raises ValueError."""
    kind = item.WhichOneof("content")
    if kind is None:
        raise ValueError("an empty item: it holds one of text, image or uri")
    content: str | bytes = getattr(item, kind)
    return read_data_uri(str(content)) if kind == "uri" else content


def _batches(
    items: Sequence[tuple[int, str | bytes]], size: int
) -> Iterable[Sequence[tuple[int, str | bytes]]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _info(config: Mapping[str, Any]) -> clip_pb2.InfoResponse:
    """Reads facts about the model from the configuration of an ensemble."""
    facts = {key: each["string_value"] for key, each in config["parameters"].items()}
    bias = facts.get("logit_bias")
    return clip_pb2.InfoResponse(
        model=facts["model"],
        runtime=f"triton ({facts['towers']})",
        dtype=facts["precision"],
        dim=int(config["output"][0]["dims"][0]),
        image_size=int(facts["image_size"]),
        context_length=int(facts["context_length"]),
        logit_scale=float(facts["logit_scale"]),
        logit_bias=None if bias is None else float(bias),
        max_request_items=int(config["max_batch_size"]),
    )


def _item_errors(errors: Mapping[int, str]) -> list[clip_pb2.ItemError]:
    return [clip_pb2.ItemError(index=i, message=errors[i]) for i in sorted(errors)]
