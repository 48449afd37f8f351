"""The servers that an index may come from, and which API each of them has."""

from __future__ import annotations

import json
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, TypeAlias
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

# Makes the JSON of a request for a text or the `data:` URI of an image.
Body: TypeAlias = Callable[[str], Mapping[str, Any]]


class _RefusedError(ComparisonError):
    """A server answered a request with something other than an embedding."""


@dataclass(frozen=True)
class Api:
    """A kind of embedding server over HTTP.

    paths: tried in this order.
    text: the request for a text.
    images: the requests for an image, of which a server knows one or none.
    read: takes the embedding from the JSON of the answer; raises LookupError or TypeError.
    models: the path, next to that of the embeddings, that lists the models by `id`; "": none.
    """

    name: str
    paths: Sequence[str]
    text: Body
    images: Sequence[Body]
    read: Callable[[Any], Any]
    models: str = ""


@dataclass(frozen=True)
class OtherServer:
    """A server to compare with.

    without_images: the reason why it embeds texts only; empty: it embeds images too.
    """

    encoder: Encoder
    api: str
    without_images: str = ""


def _openai(content: Any) -> dict[str, Any]:
    return {"input": [content], "encoding_format": "float"}


def _infinity_image(uri: str) -> Mapping[str, Any]:
    return {**_openai(uri), "modality": "image"}


def _jina_image(uri: str) -> Mapping[str, Any]:
    return _openai({"image": uri})


def _vllm_image(uri: str) -> Mapping[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": uri}}]
    return {"messages": [{"role": "user", "content": parts}], "encoding_format": "float"}


def _tei(content: str) -> Mapping[str, Any]:
    return {"inputs": [content], "truncate": True}


def _clip(field: str) -> Body:
    return lambda content: {"data": [{field: content}], "execEndpoint": "/"}


# In the order of detection: servers of ours have all three, and embeddings of length 1 by the APIs
# of others alone; TEI's also have OpenAI's, without `truncate`.
APIS = (
    Api(
        "clip",
        ("/encode", "/post"),
        _clip("text"),
        (_clip("uri"),),
        lambda answer: answer["data"][0]["embedding"],
    ),
    Api("tei", ("/embed",), _tei, (_tei,), lambda answer: answer[0]),
    Api(
        "openai",
        ("/v1/embeddings", "/embeddings"),
        _openai,
        (_infinity_image, _jina_image, _vllm_image),
        lambda answer: answer["data"][0]["embedding"],
        models="models",
    ),
)


def connect(url: str, api: str | None, model: str | None, key: str | None) -> OtherServer:
    """Finds out which API the server has, by requests for a text and for images.

    api: a name of `APIS`; None: whichever answers.
    model: its name; None: for servers that need one, the first that they list.
    key: sent as `Authorization: Bearer <key>`.

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
        self._api, self._url, self._image = api, url, api.images[0]
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self.name, self.model, self.device = url, model or "", ""
        try:
            first = self._embedding(probes.TEXTS[0])
        except _RefusedError:
            self.model = self.model or self._first_model()
            if model or not self.model:
                raise
            first = self._embedding(probes.TEXTS[0])
        self.dim = len(first)

    def without_images(self) -> str:
        """Finds out how to send images. Returns the reason why the server embeds none; empty: it
        does."""
        reasons = []
        for body in self._api.images:
            self._image = body
            reason = self._why_no_image()
            if not reason:
                return ""
            reasons.append(reason)
        return reasons[0]

    def _why_no_image(self) -> str:
        try:
            self._embedding(probes.images()[0])
        except _RefusedError as error:
            return str(error)
        try:
            self._embedding(probes.BROKEN_IMAGE)
        except _RefusedError:
            return ""
        return f"{self._url} embeds even a broken image: it reads data: URIs as texts"

    def _first_model(self) -> str:
        """The first model that the server lists; empty: it lists none."""
        if not self._api.models:
            return ""
        try:
            listed = self._ask(f"{self._url.rpartition('/')[0]}/{self._api.models}")
            return str(listed["data"][0]["id"])
        except (_RefusedError, LookupError, TypeError):
            return ""

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
        body = self._image(_data_uri(item)) if isinstance(item, bytes) else self._api.text(item)
        answer = self._ask(self._url, {**body, "model": self.model} if self.model else body)
        try:
            embedding = np.asarray(self._api.read(answer), np.float32)
        except (LookupError, TypeError, ValueError):
            raise _RefusedError(
                f"{self._url} answered {_shown(answer)}, not an embedding"
            ) from None
        if embedding.ndim != 1 or not embedding.size or not np.isfinite(embedding).all():
            raise _RefusedError(f"{self._url} answered with no list of finite numbers")
        return embedding

    def _ask(self, url: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that the server answers a POST of `body` with, or without one a GET."""
        content = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(url, content, self._headers)
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                answer = response.read()
        except HTTPError as error:
            with error:
                text = error.read().decode("utf-8", "replace")
            if error.code in (401, 403):
                raise ComparisonError(
                    f"{url} refused the key, or needs one: HTTP {error.code}; pass --key"
                ) from None
            raise _RefusedError(f"{url} answered HTTP {error.code} {_shown(text)}") from None
        # A server may fail over a body of another API.
        except (ConnectionResetError, HTTPException):
            raise _RefusedError(f"{url} closed the connection without an answer") from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise ComparisonError(f"{url} cannot be reached: {reason}") from None
        except ValueError as error:
            raise ComparisonError(f"the address or the key is invalid: {error}") from None
        try:
            return json.loads(answer)
        except ValueError:
            raise _RefusedError(f"{url} answered with something other than JSON") from None


def _data_uri(image: bytes) -> str:
    media_type = "image/png" if image.startswith(b"\x89PNG") else "image/jpeg"
    return f"data:{media_type};base64,{b64encode(image).decode()}"


def _shown(answer: Any) -> str:
    """An answer in one line, shortened."""
    text = answer if isinstance(answer, str) else json.dumps(answer)
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
