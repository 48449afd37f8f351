"""Encoders over the servers that an index may come from, and the API that each of them has."""

from __future__ import annotations

import json
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

import numpy as np
from numpy.typing import NDArray

from clip_server.compare import probes
from clip_server.compare.agreement import ComparisonError
from clip_server.evaluate.encoders import Encoder, ServerEncoder

# Seconds for one text or image.
_TIMEOUT = 60
# Characters of another server's answer that a message shows.
_SHOWN = 200


class _RefusedError(ComparisonError):
    """A server answered a request with something other than an embedding."""


@dataclass(frozen=True)
class Api:
    """A kind of embedding server over HTTP.

    paths: tried in this order.
    body: the JSON of a request for one text, or for one image as a `data:` URI.
    read: takes the embedding from the JSON of the answer; raises LookupError or TypeError.
    """

    name: str
    paths: Sequence[str]
    body: Callable[[str, bool, str | None], Mapping[str, Any]]
    read: Callable[[Any], Any]


@dataclass(frozen=True)
class OtherServer:
    """A server to compare with.

    without_images: the reason why it embeds texts only; empty: it embeds images too.
    """

    encoder: Encoder
    api: str
    without_images: str = ""


def _openai(content: str, is_image: bool, model: str | None) -> Mapping[str, Any]:
    body = {"input": [content], "encoding_format": "float", **({"model": model} if model else {})}
    # infinity's way to send images.
    return {**body, "modality": "image"} if is_image else body


def _tei(content: str, _: bool, model: str | None) -> Mapping[str, Any]:
    return {"inputs": [content], "truncate": True, **({"model": model} if model else {})}


def _clip(content: str, is_image: bool, model: str | None) -> Mapping[str, Any]:
    body = {"data": [{"uri" if is_image else "text": content}], "execEndpoint": "/"}
    return {**body, "parameters": {"model": model}} if model else body


# In the order of detection: TEI's servers also have OpenAI's API, without `truncate`.
APIS = (
    Api("tei", ("/embed",), _tei, lambda answer: answer[0]),
    Api(
        "openai",
        ("/v1/embeddings", "/embeddings"),
        _openai,
        lambda answer: answer["data"][0]["embedding"],
    ),
    Api("clip", ("/encode", "/post"), _clip, lambda answer: answer["data"][0]["embedding"]),
)


def connect(url: str, api: str | None, model: str | None, key: str | None) -> OtherServer:
    """Finds out which API the server has, by requests for a text and for images.

    api: a name of `APIS`; None: whichever answers. model: for servers that need its name. key:
    sent as `Authorization: Bearer <key>`.

    Raises:
        ComparisonError: no server answers, or none with an embedding of a text.
        ClipError: likewise, of an address that is not HTTP's.
    """
    if not url.startswith(("http://", "https://")):
        return OtherServer(ServerEncoder(url, key), "clip")
    refusals = []
    for each in APIS:
        for path in each.paths:
            if api in (None, each.name):
                try:
                    encoder = HttpEncoder(each, f"{url.rstrip('/')}{path}", model, key)
                except _RefusedError as error:
                    refusals.append(str(error))
                else:
                    return OtherServer(encoder, each.name, encoder.without_images())
    raise ComparisonError(f"{url} embeds no text: {'; '.join(refusals)}")


class HttpEncoder:
    """A server with one of `APIS`. Items are sent one by one, since servers limit their batches
    differently, and most fail a batch for one bad item.

    Raises ComparisonError where it does not answer a text with its embedding.
    """

    def __init__(self, api: Api, url: str, model: str | None, key: str | None) -> None:
        self._api, self._url, self._model = api, url, model
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self.name, self.model, self.device = url, model or "", ""
        self.dim = len(self._embedding(probes.TEXTS[0]))

    def without_images(self) -> str:
        """The reason why the server embeds no images; empty: it does."""
        try:
            self._embedding(probes.images()[0])
        except _RefusedError as error:
            return str(error)
        try:
            self._embedding(probes.BROKEN_IMAGE)
        except _RefusedError:
            return ""
        return f"{self._url} embeds even a broken image: it reads data: URIs as texts"

    def encode(self, items: Sequence[str | bytes]) -> tuple[NDArray[np.float32], Mapping[int, str]]:
        embeddings = np.full((len(items), self.dim), np.nan, np.float32)
        errors: dict[int, str] = {}
        for index, item in enumerate(items):
            try:
                embedding = self._embedding(item)
            except _RefusedError as error:
                errors[index] = str(error)
                continue
            if len(embedding) != self.dim:
                raise ComparisonError(
                    f"{self._url} returned embeddings of {self.dim} and of {len(embedding)} "
                    "dimensions: texts and images need one model for both"
                )
            embeddings[index] = embedding
        return embeddings, errors

    def close(self) -> None:
        """Nothing is kept open."""

    def _embedding(self, item: str | bytes) -> NDArray[np.float32]:
        is_image = isinstance(item, bytes)
        content = _data_uri(item) if isinstance(item, bytes) else item
        answer = self._post(self._api.body(content, is_image, self._model))
        try:
            embedding = np.asarray(self._api.read(answer), np.float32)
        except (LookupError, TypeError, ValueError):
            raise _RefusedError(
                f"{self._url} answered {_shown(answer)}, not an embedding"
            ) from None
        if embedding.ndim != 1 or not embedding.size or not np.isfinite(embedding).all():
            raise _RefusedError(f"{self._url} answered with no list of finite numbers")
        return embedding

    def _post(self, body: Mapping[str, Any]) -> Any:
        try:
            request = urllib.request.Request(self._url, json.dumps(body).encode(), self._headers)
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                answer = response.read()
        except HTTPError as error:
            with error:
                text = error.read().decode("utf-8", "replace")
            if error.code in (401, 403):
                raise ComparisonError(
                    f"{self._url} refused the key, or needs one: HTTP {error.code}; pass --key"
                ) from None
            raise _RefusedError(f"{self._url} answered HTTP {error.code} {_shown(text)}") from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ComparisonError(f"{self._url} cannot be reached: {reason}") from None
        except ValueError as error:
            raise ComparisonError(f"the address or the key is invalid: {error}") from None
        try:
            return json.loads(answer)
        except ValueError:
            raise _RefusedError(f"{self._url} answered with something other than JSON") from None


def _data_uri(image: bytes) -> str:
    media_type = "image/png" if image.startswith(b"\x89PNG") else "image/jpeg"
    return f"data:{media_type};base64,{b64encode(image).decode()}"


def _shown(answer: Any) -> str:
    """An answer in one line, shortened."""
    text = answer if isinstance(answer, str) else json.dumps(answer)
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
