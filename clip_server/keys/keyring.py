"""The keys that callers may use: from the environment, and from a file that is read again when it
changes. Only hashes of keys are kept."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_server.errors import ConfigurationError
from clip_server.watched_files import WatchedFiles

TOKEN_VARIABLE, FILE_VARIABLE = "CLIP_AUTH_TOKEN", "CLIP_AUTH_FILE"
# The keys of a file, and of each entry in it.
_FILE_KEYS, _ENTRY_KEYS = {"keys", "max_in_flight_items"}, {"sha256", "max_in_flight_items"}
_NAME = re.compile(r"[\w.@+-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}", re.IGNORECASE)
_LARGEST_LIMIT = 2**31


@dataclass(frozen=True)
class Key:
    """A key that is allowed.

    name: for logs and metrics.
    digest: its SHA-256.
    max_in_flight_items: of all its requests together; None: no limit of its own.
    """

    name: str
    digest: bytes
    max_in_flight_items: int | None = None


class KeyRing:
    """The keys of a server. Safe to call from several threads.

    tokens: keys as callers send them.
    file: YAML with the hashes of others, see docs/security.md.

    Raises:
        ConfigurationError: the file cannot be read, or an entry is invalid.
    """

    def __init__(self, tokens: tuple[str, ...] = (), file: Path | None = None) -> None:
        self._fixed = [
            Key(f"token-{number}", digest_of(token)) for number, token in enumerate(tokens, 1)
        ]
        self._watched = WatchedFiles("keys", [file], lambda: read_file(file)) if file else None

    def find(self, secret: str) -> Key | None:
        """The key that a caller sent, if it is allowed."""
        return self.current(digest_of(secret))

    def current(self, digest: bytes) -> Key | None:
        """The key with this digest as it is now: its limit may have changed, or it was removed."""
        found = None
        for key in self._allowed():  # all of them, so that the time says nothing about any
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _allowed(self) -> list[Key]:
        return [*self._fixed, *(self._watched.current() if self._watched else ())]


def open_keyring(file: str | None) -> KeyRing | None:
    """The keys that the environment and a flow name; None: callers need no key.

    file: `auth_file` of the flow, in place of CLIP_AUTH_FILE.

    Raises:
        ConfigurationError: keys are asked for, but there are none, or they are invalid.
    """
    tokens = _tokens()
    path = file or os.environ.get(FILE_VARIABLE)
    if not tokens and not path:
        return None
    return KeyRing(tokens, Path(path) if path else None)


def digest_of(secret: str) -> bytes:
    """The SHA-256 of a key. A slow hash protects passwords; keys are random and cannot be
    guessed."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def read_file(file: Path) -> list[Key]:
    """The keys in a file.

    Raises:
        ConfigurationError: it cannot be read, or an entry is invalid.
    """
    content = read_entries(file)
    default = _limit(content.get("max_in_flight_items"), str(file))
    return [
        _key(str(name), entry, default, f"{file}: key {name}")
        for name, entry in content["keys"].items()
    ]


def read_entries(file: Path) -> dict[str, Any]:
    """The content of a file of keys: `keys`, by name, and `max_in_flight_items` if it is set.

    Raises:
        ConfigurationError: it cannot be read, or has another form.
    """
    import yaml

    try:
        text = file.read_text("utf-8")
        content = yaml.safe_load(text) or {}
    except OSError as error:
        raise ConfigurationError(f"the file of keys {file}: {error.strerror}") from None
    # PyYAML raises ValueError for what looks like a date and is none.
    except (ValueError, RecursionError, yaml.YAMLError):
        raise ConfigurationError(f"the file of keys {file} is not YAML") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"{file}: it holds `keys:`, see docs/security.md")
    _refuse_unknown(content, _FILE_KEYS, str(file))
    keys = content.get("keys") or {}
    if not isinstance(keys, dict):
        raise ConfigurationError(f"{file}: keys: holds an entry for each name")
    if twice := _twice_named(text):
        # YAML's reader would keep the last without a word.
        raise ConfigurationError(f"{file}: {twice} is there twice")
    return {**content, "keys": keys}


def _twice_named(text: str) -> str:
    """A name that a mapping in some YAML has more than once; empty: none."""
    import yaml

    mappings = [yaml.compose(text, yaml.SafeLoader)]
    while mappings:
        node = mappings.pop()
        if isinstance(node, yaml.MappingNode):
            names = Counter(name.value for name, _ in node.value)
            twice = (str(name) for name, count in names.items() if count > 1)
            if found := next(twice, ""):
                return found
            mappings += [value for _, value in node.value]
    return ""


def check_name(name: str) -> None:
    """Raises ConfigurationError unless `name` can be the name of a key."""
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"the name {name[:64]!r} is not 1 to 64 letters, digits and the characters . _ @ + -"
        )


def _key(name: str, entry: Any, default: int | None, place: str) -> Key:
    check_name(name)
    if not isinstance(entry, Mapping):
        raise ConfigurationError(f"{place}: holds sha256:, see docs/security.md")
    _refuse_unknown(entry, _ENTRY_KEYS, place)
    digest = str(entry.get("sha256") or "")
    if not _SHA256.fullmatch(digest):
        raise ConfigurationError(
            f"{place}: sha256: is the SHA-256 of the key in 64 hexadecimal digits, as "
            "`python -m clip_server.keys add` writes it"
        )
    limit = _limit(entry.get("max_in_flight_items"), place)
    return Key(name, bytes.fromhex(digest), default if limit is None else limit)


def _limit(value: Any, place: str) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not 1 <= value <= _LARGEST_LIMIT:
        raise ConfigurationError(
            f"{place}: max_in_flight_items: {value!r} is not a whole number from 1"
        )
    return value


def _refuse_unknown(mapping: Mapping[Any, Any], known: set[str], place: str) -> None:
    for name in mapping:
        if name not in known:
            raise ConfigurationError(
                f"{place}: unknown key {name!r}; there is {', '.join(sorted(known))}"
            )


def _tokens() -> tuple[str, ...]:
    given = os.environ.get(TOKEN_VARIABLE)
    if given is None:
        return ()
    tokens = tuple(re.split(r"[\s,]+", given.strip(" \t\r\n,")))
    if not tokens[0]:  # a secret that was lost on its way should not open the server
        raise ConfigurationError(
            f"{TOKEN_VARIABLE} is set but empty: set it to one or several keys, or unset it to "
            "serve callers without a key"
        )
    if not all(token.isascii() and token.isprintable() for token in tokens):
        raise ConfigurationError(f"{TOKEN_VARIABLE}: a key is of printable ASCII characters")
    return tokens
