"""The cache of prepared models: files that a runtime maps into memory as they are.

A runtime converts weights to the types and layouts that it computes with. That is done once; the
result is one folder per checkpoint, precision and kind of processor, with a manifest that holds its
key and a checksum of each file. A folder of another key, or with a damaged file, is not loaded but
replaced. Replicas on one machine share the pages of these files.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

import clip_server.towers

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Bytes that are read at a time, and the rows in which they are looked at.
_BLOCK, _ROWS = 1 << 20, 256
_DIGEST_BYTES = 16


class CacheError(Exception):
    """The cache cannot keep a model; the message says why."""


def caches() -> Path:
    """The folder of all caches of the server."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen, "clip-server")
    try:
        home = Path.home()
    except RuntimeError:  # the user is unknown to the system, as in containers
        home = Path("/")
    return home / ".cache" / "clip-server"


def folder() -> Path:
    """The folder of prepared models."""
    return caches() / "towers"


def size() -> int:
    """The bytes that prepared models take on the disk, as far as they can be read."""
    found = 0
    for place, _, names in os.walk(folder()):
        for name in names:
            with suppress(OSError):  # a server may just be replacing it
                found += Path(place, name).lstat().st_size
    return found


def clear() -> None:
    """Removes every prepared model. Servers that use one keep it until they end."""
    shutil.rmtree(folder(), ignore_errors=True)


def find_or_make(
    name: str,
    files: Sequence[Path],
    settings: Mapping[str, Any],
    make: Callable[[Path], None],
    needed_bytes: int,
    external: Sequence[Path] = (),
) -> Path:
    """The folder of a prepared model, made unless the cache has it.

    Replicas that start concurrently make it once.

    name: the model's, for people. files: its checkpoint, or its graphs and their weights.
    settings: everything else that its prepared files depend on, as JSON.
    make: writes them into a folder. needed_bytes: that it takes on the disk while it does.
    external: those of the files that the graphs name, by any names.

    Raises:
        CacheError: the folder cannot be written to, or has too little space.
    """
    from filelock import FileLock

    key = _key(files, settings)
    own = [file for file in files if file not in external]
    entry = folder() / _entry_name(name, own, settings)
    if _is_intact(entry, key):
        return entry
    part = entry.with_name(f"{entry.name}.part")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(entry.with_name(f"{entry.name}.lock")):
            if _is_intact(entry, key):  # another replica made it meanwhile
                return entry
            for stale in (part, entry):
                _remove(stale)
            free = shutil.disk_usage(entry.parent).free
            if free < needed_bytes:
                raise CacheError(
                    f"{entry.parent} has {free >> 20:,} MiB of free space, and preparing takes "
                    f"{needed_bytes >> 20:,} MiB"
                )
            part.mkdir()
            try:
                make(part)
                _write_manifest(part, key)
                part.rename(entry)
            finally:
                _remove(part)
    except OSError as error:
        raise CacheError(f"{entry.parent}: {error.strerror or error}") from error
    return entry


def _remove(place: Path) -> None:
    """Removes what is at a place, whatever it is, as far as this process may."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with suppress(OSError):
            place.unlink()


def _entry_name(name: str, files: Sequence[Path], settings: Mapping[str, Any]) -> str:
    """The folder of a checkpoint or of graphs: their place, not their content, so that a model that
    is trained on and saved again replaces what was prepared of it before."""
    # Not resolved: a file of the hub's cache is a link, which keeps its name.
    place = [*(str(file.absolute()) for file in files), settings["precision"], processor()]
    readable = re.sub(r"[^\w.-]+", "-", name)
    return f"{readable}-{_digest('|'.join(place).encode())[:12]}"


def _key(files: Sequence[Path], settings: Mapping[str, Any]) -> str:
    """A digest of all that prepared files depend on.

    Checkpoints are recognised by their size, times and place on the disk, none of which stays the
    same if the content changes: reading them would take longer than all else.
    """
    states = [file.stat() for file in files]
    read = [[each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino] for each in states]
    parts = [read, settings, _graph_sources(), processor()]
    return _digest(json.dumps(parts, sort_keys=True, default=str).encode())


@cache
def _graph_sources() -> str:
    """A digest of the code that builds graphs."""
    sources = sorted(Path(clip_server.towers.__path__[0]).glob("*.py"))
    return _digest(b"".join(source.read_bytes() for source in sources))


@cache
def processor() -> str:
    """A digest of the kind of processor, for which weights are laid out."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    kinds = {line for line in lines if line.lower().startswith(("flags", "features", "model name"))}
    known = [platform.machine(), *(sorted(kinds) or [platform.processor()])]
    return _digest("|".join(known).encode())


def _write_manifest(place: Path, key: str) -> None:
    sums = {file.name: _checksum(file) for file in sorted(place.iterdir())}
    content = json.dumps({"key": key, "files": sums}, indent=2)
    place.joinpath(MANIFEST).write_text(content, "utf-8")


def _is_intact(entry: Path, key: str) -> bool:
    """Whether a folder holds the files of a key, as they were written."""
    try:
        manifest = json.loads(entry.joinpath(MANIFEST).read_text("utf-8"))
        files = {entry / name: known for name, known in manifest["files"].items()}
        if manifest["key"] != key or not files:
            return False
        with ThreadPoolExecutor(max_workers=len(files)) as threads:
            return list(threads.map(_checksum, files)) == list(files.values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _checksum(file: Path) -> str:
    """A checksum of a file's content, at the speed of memory: a digest of sums of the words in each
    block, of its rows and of its columns, so that their order matters. It finds damage, not
    forgery."""
    sums = blake2b(digest_size=_DIGEST_BYTES)
    block = np.empty((_ROWS, _BLOCK // _ROWS // 8), np.uint64)
    content = block.reshape(-1).view(np.uint8)
    with file.open("rb", buffering=0) as source:
        while count := source.readinto(content.data):
            content[count:] = 0
            for axis in (0, 1):
                sums.update(block.sum(axis, dtype=np.uint64).data)
            sums.update(count.to_bytes(8, "little"))
    return sums.hexdigest()


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()
