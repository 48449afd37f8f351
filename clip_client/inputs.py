"""Converts what a caller passes to items.

A str is an image where it is a path, URL or `data:` URI, else a text:

    'a photo of a cat'        text                 {'text': 'cat.jpg'}     text, whatever it says
    'cat.jpg', 'photos/cat'   file, see `_is_path` {'image': ...}          image: bytes, path,
    'file:///photos/cat'      file                                         URL, PIL, ndarray
    'https://host/cat.jpg'    fetched from there   {'uri': 'https://...'}  the same, of a str
    'data:image/png;base64,'  sent as it is        pathlib.Path            file
    b'...'                    an encoded image     PIL.Image.Image         see images.py
    ndarray, torch.Tensor     an image, HxW or HxWx1 to HxWx4: 0 to 255, or floats of 0 to 1
    docarray Document         what it holds: blob, text, tensor or uri

A dict may have `id` and `tags` too, and other kinds of content that are empty.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import url2pathname

import numpy as np

from clip_client import background, images
from clip_client.data_uri import decode_base64, has_scheme, is_data_uri
from clip_client.documents import CONTENT_FIELDS, is_document
from clip_client.errors import InvalidInputError
from clip_client.proto.clip_pb2 import Item

if TYPE_CHECKING:
    import aiohttp

# The limit of a file or download.
MAX_BYTES = 64 * 2**20
FETCH_SECONDS = 30.0

# Image extensions, also of formats that the server does not read: it says so for the item.
_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".jfi", ".pjpeg", ".pjp", ".mpo"),
    *(".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".avif", ".avifs", ".avci", ".avcs", ".heic", ".heics", ".heif", ".heifs", ".hif"),
    *(".svg", ".ico", ".psd", ".jp2", ".j2k", ".jxl", ".tga", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw"),
)
_URL = re.compile(r"https?://", re.IGNORECASE)
_FILE_URI = re.compile(r"file:(?://(?:localhost(?=/))?)?(?=.)", re.IGNORECASE)
_ANY_URL = re.compile(r"([a-z][a-z0-9+.-]+)://\S", re.IGNORECASE)
# Beginnings of a path that no text has: ~/, ./, ../, /data/, C:\ and \\host.
_PATH = re.compile(r"~/|\.{1,2}[\\/]|/[^/\s]+/|[a-z]:[\\/]|\\\\\w", re.IGNORECASE)
_SEPARATORS = ("/", "\\") if os.name == "nt" else ("/",)
# A longer str names no file.
_MAX_PATH = 4096
# Entries of the current folder that texts are compared with.
_MAX_LISTED = 10_000
_AS_TEXT = " (to mean the text itself, pass {'text': ...})"
_IMAGES = "a path, a URL, the bytes of an image, a PIL image, an array of shape (H, W, 3)"
_ALLOWED = (
    f"pass a text, {_IMAGES}, {{'text': ...}}, {{'image': ...}}, {{'uri': ...}} or a Document"
)
_KEYS = {"text": "text", "image": "image", "blob": "blob", "tensor": "image", "uri": "uri"}
# Keys that a dict may have in addition to its content, as over HTTP.
_OTHER_KEYS = {"id", "tags"}

Read = Callable[[], Item]


def to_item(raw_item: Any) -> Item | Read:
    """Converts what a caller passed to an item, or, if that takes time, returns its reader.

    The content of `raw_item` is copied before this returns: a generator may close its image or
    reuse its array. Both raise InvalidInputError, which says what to pass.
    """
    if isinstance(raw_item, str):
        return _string(raw_item)
    if isinstance(raw_item, Mapping):
        return _mapping(raw_item)
    if is_document(raw_item):
        return _document(raw_item)
    return _image(raw_item)


def as_image(raw_item: Any) -> Any:
    """Marks an item as an image: then no str is a text, and no error suggests to pass one."""
    if isinstance(raw_item, (bytes, Mapping)) or is_document(raw_item):
        return raw_item
    return {"image": raw_item}


class FileNames:
    """Counts texts of a call that are also names of files in the current folder, like 'cat'."""

    def __init__(self) -> None:
        self._first = ""
        self._count = 0

    def check(self, raw_item: Any) -> None:
        """Counts `raw_item`, which is treated as a text, if it is a str that names a file."""
        if isinstance(raw_item, str) and raw_item.strip() in self._files:
            self._first = self._first or raw_item
            self._count += 1

    @cached_property
    def _files(self) -> frozenset[str]:
        # Listed once: asking the system about each text takes longer than sending it. It is only
        # for a warning, so a folder of any size costs no more than this.
        try:
            with os.scandir() as entries:
                some = itertools.islice(entries, _MAX_LISTED)
                return frozenset(entry.name for entry in some if entry.is_file())
        except OSError:
            return frozenset()

    def warn(self) -> None:
        """Warns once, if any were counted."""
        if not self._count:
            return
        others = f" and {self._count - 1:,} more" if self._count > 1 else ""
        warnings.warn(
            f"{self._first!r}{others} were encoded as texts, but there are files of these names: "
            "pass pathlib.Path(...) to mean the image in the file, or {'text': ...} to mean the "
            "text",
            stacklevel=2,
        )


def _string(value: str) -> Item | Read:
    if is_data_uri(value):
        return _uri(value)
    return _location(value, _AS_TEXT) if _is_location(value.strip()) else _text(value)


def _is_location(value: str) -> bool:
    """Whether a str that may be any text is the URL or the path of an image."""
    is_named = value[-8:].lower().endswith(_SUFFIXES)
    if _FILE_URI.match(value):
        return _is_one_word(value) or value[5:7] == "//"
    if _ANY_URL.match(value):
        return _is_one_word(value) or is_named
    is_path = _PATH.match(value) is not None
    if is_path or is_named:
        # What has a blank, as 'a dog beside cat.jpg', may be a sentence.
        return _is_one_word(value) or (is_path and is_named) or _exists(value)
    return any(separator in value for separator in _SEPARATORS) and _exists(value)


def _is_one_word(value: str) -> bool:
    return len(value.split(None, 1)) == 1


def _exists(value: str) -> bool:
    try:
        return len(value) <= _MAX_PATH and _path(value).exists()
    # It has a part that is too long, or holds a NUL.
    except (OSError, ValueError):
        return False


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    # There is no such user.
    except RuntimeError:
        return Path(name)


def _text(value: Any) -> Item:
    if not isinstance(value, str):
        raise InvalidInputError(f"a text is a str, not {type(value).__name__}")
    return Item(text=_unicode(value))


def _uri(value: str) -> Item:
    return Item(uri=_unicode(value))


def _unicode(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidInputError("the text holds a lone surrogate, so it is not Unicode") from None
    return value


def _location(value: Any, advice: str = "") -> Item | Read:
    """The image at a URL, a path or in a `data:` URI. `advice` ends an error's message."""
    if isinstance(value, os.PathLike):
        return partial(_read_file, os.fspath(value), advice)
    # A line of a file ends with a newline.
    value = str(value).strip()
    if has_scheme(value):
        return _uri(value)
    if _URL.match(value):
        return partial(_fetch, value, advice)
    if scheme := _FILE_URI.match(value):
        return partial(_read_file, url2pathname(value[scheme.end() :]), advice)
    if scheme := _ANY_URL.match(value):
        raise InvalidInputError(
            f"{value[:200]!r} cannot be fetched: the client reads http://, https://, file:// and "
            f"data: URIs, not {scheme[1].lower()}://{advice}"
        )
    return partial(_read_file, value, advice)


def _mapping(raw_item: Mapping[Any, Any]) -> Item | Read:
    unknown = [key for key in raw_item if key not in _KEYS and key not in _OTHER_KEYS]
    contents = [key for key in raw_item if key in _KEYS]
    # Rows of a table have empty values in the columns that do not apply.
    filled = [key for key in contents if not _is_empty(raw_item[key])] or contents[:1]
    if unknown or len(filled) != 1:
        names = ", ".join(map(repr, unknown or filled)) or "nothing"
        raise InvalidInputError(
            "a dict holds one of 'text', 'image' or 'uri', and optionally 'id' and 'tags'; this "
            f"one has {names}"
        )
    begun = _of_kind(_KEYS[filled[0]], raw_item[filled[0]])
    return _identified(begun, raw_item.get("id"), raw_item.get("tags"))


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, bytes)) and not value.strip())


def _document(document: Any) -> Item | Read:
    for name, kind in CONTENT_FIELDS.items():
        value = getattr(document, name, None)
        if not _is_empty(value):
            begun = _of_kind(kind, value)
            return _identified(
                begun, getattr(document, "id", None), getattr(document, "tags", None)
            )
    raise InvalidInputError(f"the {type(document).__name__} has no text, blob, tensor or uri")


def _identified(begun: Item | Read, id_: Any, tags: Any) -> Item | Read:
    """The same with an id and tags, which executors other than the encoder may need."""
    given = Item(id=str(id_ or ""))
    if tags:
        # Those that JSON cannot hold are not sent: the embedding does not depend on them.
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            given.tags.update(tags)
    if not given.ByteSize():
        return begun
    if isinstance(begun, Item):
        begun.MergeFrom(given)
        return begun
    read = begun

    def identified() -> Item:
        item = read()
        item.MergeFrom(given)
        return item

    return identified


def _of_kind(kind: str, value: Any) -> Item | Read:
    if kind == "text":
        return _text(value)
    if kind == "blob" and isinstance(value, str):
        return _blob(value)
    if kind == "uri" or isinstance(value, str):
        return _location(value)
    return _image(value, f"pass {_IMAGES}")


def _blob(value: str) -> Item | Read:
    """The image in base64, as over HTTP, or at a location."""
    if has_scheme(value) or _exists(value.strip()):
        return _location(value)
    try:
        content = decode_base64(value)
    except ValueError as error:
        raise InvalidInputError(f"{error}, and the 'blob' names no file") from None
    return _bounded("the blob", content)


def _image(raw_item: Any, allowed: str = _ALLOWED) -> Item | Read:
    if isinstance(raw_item, (bytes, bytearray, memoryview)):
        return _bounded("the image", bytes(raw_item))
    if isinstance(raw_item, os.PathLike):
        return _location(raw_item)
    pillow = sys.modules.get("PIL.Image")
    if pillow is not None and isinstance(raw_item, pillow.Image):
        return _pillow_image(raw_item)
    if hasattr(raw_item, "__array__") or hasattr(raw_item, "__array_interface__"):
        return _array(raw_item)
    raise InvalidInputError(f"{type(raw_item).__name__} cannot be encoded: {allowed}")


def _pillow_image(image: Any) -> Item | Read:
    try:
        file = images.undecoded(image)
        return Item(image=file) if file else partial(_encoded, image.copy())
    except Exception as error:
        raise InvalidInputError(f"the PIL image cannot be read: {error}") from error


def _array(raw_item: Any) -> Read:
    if hasattr(raw_item, "detach"):  # a tensor of torch, which may need a gradient or be on a GPU
        raw_item = raw_item.detach().cpu()
    try:
        array = np.asarray(raw_item)
    except Exception as error:
        name = type(raw_item).__name__
        raise InvalidInputError(f"the {name} cannot be read as an array: {error}") from error
    return partial(_encoded, images.of_array(array))


def _encoded(image: Any) -> Item:
    return Item(image=images.encode(image))


def _read_file(name: str, advice: str) -> Item:
    path = _path(name)
    try:
        # A pipe or a device might never end.
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InvalidInputError(
                f"{name!r} is not a file but a folder: pass the paths of the images in it{advice}"
            )
        if not stat.S_ISREG(mode):
            raise InvalidInputError(f"{name!r} is not a file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        looks = f"{name!r} looks like the path of an image, but " if advice else f"{name!r}: "
        raise InvalidInputError(f"{looks}there is no such file{advice}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(f"{name[:200]!r} cannot be read: {reason}{advice}") from None
    return _bounded(name, content)


def _fetch(url: str, advice: str) -> Item:
    import aiohttp

    from clip_client.proxies import environment_proxy, through
    from clip_client.sessions import reason

    way = ""
    try:
        way = through(environment_proxy(url))
        return _bounded(url, background.submit(_download(url, advice)).result())
    except InvalidInputError:
        raise
    except (aiohttp.ClientError, ValueError) as error:
        raise InvalidInputError(f"{url} cannot be fetched{way}: {reason(error)}{advice}") from None


@lru_cache(maxsize=1)
def _http(pid: int) -> aiohttp.ClientSession:
    """The session for downloads, on the shared event loop; a forked child has its own."""
    import aiohttp

    from clip_client.sessions import open_session
    from clip_client.tls import Trust

    timeout = aiohttp.ClientTimeout(total=None, connect=10, sock_read=10)
    session = open_session(timeout, Trust())
    # At the interpreter's end.
    weakref.finalize(_http, _close, session, pid)
    return session


def _close(session: aiohttp.ClientSession, pid: int) -> None:
    if pid == os.getpid():
        background.submit(session.close())


async def _download(url: str, advice: str) -> bytes:
    from yarl import URL

    from clip_client.proxies import environment_proxy, through

    deadline = time.monotonic() + FETCH_SECONDS
    content = bytearray()
    # As it is written, since it may be signed, where it is written as URLs are.
    location = URL(url, encoded=url.isascii() and " " not in url)
    proxy = environment_proxy(url)
    async with _http(os.getpid()).get(location, proxy=proxy, max_redirects=20) as reply:
        if not 200 <= reply.status < 300:
            answered = f"{url}{through(proxy)} answered"
            raise InvalidInputError(f"{answered} with status {reply.status}{advice}")
        if reply.content_type.startswith("text/"):
            raise InvalidInputError(f"{url} is a web page, not an image{advice}")
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
