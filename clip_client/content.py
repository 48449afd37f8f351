"""What a person passes -> Item.

A str is a picture where it is a path, URL or `data:` URI of one, else a text:

    'a photo of a cat'        text                 {'text': 'cat.jpg'}     text, whatever it says
    'cat.jpg', 'my cat.jpg'   file (the second     {'image': ...}          picture: bytes, path,
                              only if it exists)                           URL, PIL, ndarray
    'https://host/cat.jpg'    fetched from there   {'uri': 'https://...'}  the same, of a str
    'data:image/png;base64,'  sent as it is        pathlib.Path            file
    b'...'                    an encoded picture   PIL.Image.Image         sent as PNG
    ndarray                   uint8 HxW, HxWx1, HxWx3 or HxWx4, sent as PNG
    docarray Document         what it holds: blob, text, tensor or uri
"""

from __future__ import annotations

import io
import os
import re
import stat
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np

from clip_client import background
from clip_client.errors import InvalidInputError
from clip_client.proto.clip_pb2 import Item

if TYPE_CHECKING:
    import aiohttp

# A file or download above this is no picture that anyone wants encoded.
MAX_BYTES = 64 * 2**20
FETCH_SECONDS = 30.0

_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif"),
)
_URL = re.compile(r"https?://\S+", re.IGNORECASE)
_DATA = re.compile(r"data:\w+/[\w.+-]+(;[\w.=+-]+)*,", re.IGNORECASE)
_AS_TEXT = "to mean the text itself, pass {'text': ...}"
_ALLOWED = (
    "pass a text, a path, a URL, the bytes of a picture, a PIL image, a uint8 ndarray, "
    "{'text': ...}, {'image': ...}, {'uri': ...} or a Document"
)
# In this order: what is there already goes before what must be fetched.
_DOCUMENT_FIELDS = {
    "blob": "image",
    "bytes_": "image",
    "text": "text",
    "tensor": "image",
    "uri": "uri",
    "url": "uri",
}
_KEYS = {"text": "text", "image": "image", "blob": "image", "tensor": "image", "uri": "uri"}

Read = Callable[[], Item]


def prepare(thing: Any) -> Item | Read:
    """The item for what a person passed, or, where that takes time, what reads it.

    What `thing` holds is taken or copied before this returns: a generator may close its image
    or fill its array anew. Both raise InvalidInputError, which says what to pass.
    """
    if isinstance(thing, str):
        return _string(thing)
    if isinstance(thing, Mapping):
        return _mapping(thing)
    if is_document(thing):
        return _document(thing)
    return _picture(thing)


def as_picture(thing: Any) -> Any:
    """The same thing, where a str cannot mean a text."""
    return {"image": thing} if isinstance(thing, str) else thing


def is_document(thing: Any) -> bool:
    """Whether it is a Document of docarray, of either version, or as good as one."""
    # `dir` asks no property for its value.
    return hasattr(thing, "embedding") and not _DOCUMENT_FIELDS.keys().isdisjoint(dir(thing))


def _string(value: str) -> Item | Read:
    if _DATA.match(value):
        return Item(uri=value)
    if _URL.fullmatch(value) or _is_path(value):
        return _location(value)
    return _text(value)


def _is_path(value: str) -> bool:
    if not value.lower().endswith(_SUFFIXES):
        return False
    # 'a dog beside cat.jpg' is a sentence, unless there is such a file.
    return not any(character.isspace() for character in value) or _is_file(value)


def _is_file(value: str) -> bool:
    try:
        return Path(value).is_file()
    # It is too long for a path, or holds a NUL.
    except (OSError, ValueError):
        return False


def _text(value: Any) -> Item:
    if not isinstance(value, str):
        raise InvalidInputError(f"a text is a str, not {type(value).__name__}")
    try:
        return Item(text=value)
    except UnicodeEncodeError:
        raise InvalidInputError("the text holds a lone surrogate, so it is not Unicode") from None


def _location(value: Any) -> Item | Read:
    """The picture at a URL, a path or in a `data:` URI."""
    if not isinstance(value, (str, os.PathLike)):
        value = str(value)
    if isinstance(value, str):
        if value[:5].lower() == "data:":
            return Item(uri=value)
        if _URL.match(value):
            return partial(_fetch, value)
        if value.lower().startswith("file://"):
            value = url2pathname(urlsplit(value).path)
    return partial(_read_file, Path(value))


def _mapping(thing: Mapping[Any, Any]) -> Item | Read:
    known = [(_KEYS[key], value) for key, value in thing.items() if key in _KEYS]
    if len(thing) != 1 or not known:
        names = ", ".join(repr(key) for key in thing)
        raise InvalidInputError(
            f"a dict holds one of 'text', 'image' or 'uri'; this one has {names or 'nothing'}"
        )
    return _of_kind(*known[0])


def _document(document: Any) -> Item | Read:
    for name, kind in _DOCUMENT_FIELDS.items():
        value = getattr(document, name, None)
        if value is None or (isinstance(value, (str, bytes)) and not value):
            continue
        return _of_kind(kind, value)
    raise InvalidInputError(f"the {type(document).__name__} has no text, blob, tensor or uri")


def _of_kind(kind: str, value: Any) -> Item | Read:
    if kind == "text":
        return _text(value)
    return _location(value) if kind == "uri" or isinstance(value, str) else _picture(value)


def _picture(thing: Any) -> Item | Read:
    if isinstance(thing, (bytes, bytearray, memoryview)):
        return _bounded("the picture", bytes(thing))
    if isinstance(thing, os.PathLike):
        return _location(thing)
    pillow = sys.modules.get("PIL.Image")
    if pillow is not None and isinstance(thing, pillow.Image):
        return _pillow_image(thing)
    if hasattr(thing, "__array__") or hasattr(thing, "__array_interface__"):
        return _array(_asarray(thing))
    raise InvalidInputError(f"{type(thing).__name__} cannot be encoded: {_ALLOWED}")


def _pillow_image(image: Any) -> Read:
    try:
        return partial(_png, image.copy())
    except Exception as error:
        raise InvalidInputError(f"the PIL image cannot be read: {error}") from error


def _asarray(thing: Any) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(thing)
    except Exception as error:
        name = type(thing).__name__
        raise InvalidInputError(f"the {name} cannot be read as an array: {error}") from error


def _array(array: np.ndarray[Any, Any]) -> Read:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise InvalidInputError(
            f"an array of {array.dtype} and shape {array.shape} is no picture: pass uint8 of "
            "shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), red first"
        )
    if not array.size:
        raise InvalidInputError(f"an array of shape {array.shape} has no pixels")
    try:
        from PIL import Image
    except ImportError:
        raise InvalidInputError("pictures in arrays need Pillow: pip install pillow") from None
    shape = array.shape[:2] if channels == 1 else array.shape
    return partial(_png, Image.fromarray(array.reshape(shape).copy()))


def _png(image: Any) -> Item:
    """A PIL image as PNG: nothing is lost, and little time goes into making it small."""
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = image.convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return Item(image=file.getvalue())


def _read_file(path: Path) -> Item:
    try:
        # A pipe or a device might never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InvalidInputError(f"{str(path)!r} is not a file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InvalidInputError(
            f"{str(path)!r} looks like a picture's path, but there is no such file ({_AS_TEXT})"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(f"{str(path)[:200]!r} cannot be read: {reason}") from None
    return _bounded(str(path), content)


def _fetch(url: str) -> Item:
    import aiohttp

    try:
        return _bounded(url, background.submit(_download(url)).result())
    except InvalidInputError:
        raise
    except (aiohttp.ClientError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise InvalidInputError(f"{url} cannot be fetched: {reason} ({_AS_TEXT})") from None


@lru_cache(maxsize=1)
def _http(pid: int) -> aiohttp.ClientSession:
    """What fetches, on the shared event loop; another one in a forked child."""
    import aiohttp

    from clip_client.sessions import open_session

    timeout = aiohttp.ClientTimeout(total=None, connect=10, sock_read=10)
    session = open_session(timeout)
    # At the interpreter's end.
    weakref.finalize(_http, _close, session, pid)
    return session


def _close(session: aiohttp.ClientSession, pid: int) -> None:
    if pid == os.getpid():
        background.submit(session.close())


async def _download(url: str) -> bytes:
    from yarl import URL

    from clip_client.sessions import environment_proxy

    deadline = time.monotonic() + FETCH_SECONDS
    content = bytearray()
    # As it is written, since it may be signed, where it is written as URLs are.
    location = URL(url, encoded=url.isascii())
    proxy = environment_proxy(url)
    async with _http(os.getpid()).get(location, proxy=proxy, max_redirects=20) as reply:
        if not 200 <= reply.status < 300:
            raise InvalidInputError(f"{url} answered with status {reply.status}")
        if reply.content_type.startswith("text/"):
            raise InvalidInputError(f"{url} is a page, not a picture ({_AS_TEXT})")
        async for chunk in reply.content.iter_any():
            content += chunk
            if len(content) > MAX_BYTES:
                break
            if time.monotonic() > deadline:
                raise InvalidInputError(f"{url} took more than {FETCH_SECONDS:g} s")
    return bytes(content)


def _bounded(name: str, content: bytes) -> Item:
    if not content:
        raise InvalidInputError(f"{name} is empty")
    if len(content) > MAX_BYTES:
        raise InvalidInputError(f"{name} is larger than {MAX_BYTES >> 20} MiB")
    return Item(image=content)
