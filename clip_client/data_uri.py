"""`data:` URIs (RFC 2397) and base64, read the same way by the client and the server."""

from __future__ import annotations

import base64
import re
from encodings import normalize_encoding
from encodings.aliases import aliases
from urllib.parse import unquote

import numpy as np

# What stands before the content is no longer than this, names of files in it included.
_MOST_HEADER = 4096
_QUOTED = r'"(?:[^"\\]|\\.)*"'
# A comma may stand in a quoted value; where a quote is never closed, the first comma ends it.
_HEADERS = (
    re.compile(rf'\s*data:((?:[^,"]|{_QUOTED})*),', re.IGNORECASE | re.DOTALL),
    re.compile(r"\s*data:([^,]*),", re.IGNORECASE),
)
_PARAMETER = re.compile(rf'(?:[^;"]|{_QUOTED}|")+', re.DOTALL)
# A text may begin with "data:" too. These do not: a media type, a parameter or a comma next to
# the colon, or base64 before the first comma. Any `data:image/` is meant as an image.
_DATA_URI = re.compile(
    r"\s*data:(?:image/|,|;|[\w.+*-]+/[\w.+*-]+\s*[;,]|\s{0,9}base64\s*,|[^,]{0,4096}?;\s*base64\s*,)",
    re.IGNORECASE,
)
_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
_CODECS = set(aliases.values())


def is_data_uri(value: str) -> bool:
    """Whether a str that may be any text is meant as a `data:` URI, a malformed one included.

    'data:,hello' and 'data:image/png' are; 'data: we need more, please' is not.
    """
    return _DATA_URI.match(value) is not None


def has_scheme(value: str) -> bool:
    """Whether a location is a `data:` URI, not a path or another URL."""
    return value[:64].lstrip()[:5].lower() == "data:"


def read_data_uri(uri: str) -> str | bytes:
    """The content of a `data:` URI: a str where its media type is text/*, else bytes.

    Without a media type it is text/plain; without a charset, UTF-8. Base64 without a media type
    that is not UTF-8 is taken for an image. Raises ValueError, which says what is wrong.
    """
    header = next(filter(None, (form.match(uri, 0, _MOST_HEADER) for form in _HEADERS)), None)
    if header is None:
        raise ValueError(
            "the data: URI has no comma between its type and its content: write it as "
            "data:image/png;base64,..."
        )
    media_type, _, rest = header[1].partition(";")
    media_type = unquote(media_type).strip().lower()
    parameters = [unquote(each).strip() for each in _PARAMETER.findall(rest)]
    is_base64 = "base64" in (media_type, *(each.lower() for each in parameters))
    content = _percent_decoded(uri[header.end() :].strip())
    if is_base64:
        content = decode_base64(content)
    has_type = media_type not in ("", "base64")
    if has_type and not media_type.startswith("text/"):
        return content
    charset = _charset(parameters)
    try:
        return content.decode(charset)
    except UnicodeError:
        if is_base64 and not has_type:
            return content
        name = charset.upper().replace("_", "-")
        raise ValueError(
            f"the text in the data: URI is not {name}: name its charset, as in "
            "data:text/plain;charset=iso-8859-1,..."
        ) from None


def decode_base64(value: str | bytes) -> bytes:
    """The bytes of base64 in either alphabet (RFC 4648), with line ends and blanks in it, with
    or without padding. Raises ValueError, which says that it is not valid."""
    try:
        digits = value.encode("ascii") if isinstance(value, str) else value
        digits = digits.translate(_STANDARD_ALPHABET, delete=b" \t\r\n\v\f").rstrip(b"=")
        return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    # It may be a binascii.Error or a UnicodeEncodeError.
    except ValueError:
        raise ValueError(
            "the image is not valid base64: it is cut off, or holds characters that base64 has not"
        ) from None


def _charset(parameters: list[str]) -> str:
    """The codec that the parameters name, of those that decode text."""
    for each in parameters:
        name, _, value = each.partition("=")
        if name.strip().lower() == "charset":
            return _codec(value.strip().strip("\"'"))
    return "utf-8"


def _codec(charset: str) -> str:
    name = normalize_encoding(charset).lower()
    codec = aliases.get(name, name)
    try:
        # Only names that Python lists: it remembers each that it ever had to look for.
        if codec not in _CODECS:
            raise LookupError
        "".encode(codec)
    except LookupError:
        raise ValueError(f"the data: URI has an unknown charset, {charset[:40]!r}") from None
    return "utf-8" if codec == "ascii" else codec


def _percent_decoded(text: str) -> bytes:
    """As urllib's `unquote_to_bytes`, which needs seconds for megabytes of %20 and lets no other
    thread run meanwhile."""
    encoded = text.encode()
    if b"%" not in encoded:
        return encoded
    values = np.frombuffer(encoded, np.uint8)
    digits = _HEX_DIGITS[values]
    starts = np.flatnonzero(values[:-2] == ord("%")) if len(values) > 2 else np.empty(0, np.int64)
    starts = starts[(digits[starts + 1] < 16) & (digits[starts + 2] < 16)]
    decoded = values.copy()
    decoded[starts] = digits[starts + 1] * 16 + digits[starts + 2]
    kept = np.ones(len(values), bool)
    kept[starts + 1] = kept[starts + 2] = False
    result: bytes = decoded[kept].tobytes()
    return result


# The value of each byte as a hexadecimal digit; 16 for those that are none.
_HEX_DIGITS = np.full(256, 16, np.uint8)
for _digit in range(16):
    _HEX_DIGITS[[ord(f"{_digit:x}"), ord(f"{_digit:X}")]] = _digit
