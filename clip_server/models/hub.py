"""Files of the Hugging Face hub: in its cache, or downloaded into it.

A download that broke off is resumed by the next attempt, in this process or another, from a partial
file in the cache; the hub's client deletes what it received.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from clip_server.errors import ConfigurationError, WeightsError

# How long an unreachable hub may hold up the start, in seconds.
_TIMEOUT = 5.0
_SHA256_DIGITS = 64
_BLOCK = 2**20
_MEGABYTE = 1e6
# Bytes that a break may lose; the client's default is 10 MB.
_CHUNK = 2**14
# The second one starts from the beginning: a partial file may be damaged, and a server may resume
# at the wrong place.
_ATTEMPTS = 2


def find_cached(repository: str, file: str) -> Path | None:
    """A file of a repository in the hub's cache; None if it is not there."""
    try:
        path = _client().try_to_load_from_cache(repository, file)
    except OSError:  # a file where a folder of the cache should be
        return None
    return Path(path) if isinstance(path, str) else None


def fetch(repository: str, file: str) -> Path:
    """A file of a repository, from the cache or the hub.

    Raises:
        WeightsError: it is in neither, or the hub cannot be reached.
    """
    return find_cached(repository, file) or download(repository, (file,))


def download(repository: str, files: Sequence[str]) -> Path:
    """The first of these files that the hub has, downloaded into the cache.

    Raises:
        WeightsError: the hub has none or cannot be reached, or the cache cannot keep it.
    """
    for file in files:
        try:
            return _download(repository, file)
        except ConfigurationError:
            raise
        except Exception as error:  # each release of the client raises another library's errors
            if file == files[-1] or not _is_missing(error):
                raise _unreachable(repository, file, error) from error
    raise AssertionError("there is no file to fetch")


def fetch_optional(repository: str, file: str) -> Path | None:
    """A file of a repository, from the cache or the hub; None if the repository lacks it.

    Raises:
        WeightsError: as `download`.
    """
    if found := find_cached(repository, file):
        return found
    try:
        return _download(repository, file)
    except ConfigurationError:
        raise
    except Exception as error:  # each release of the client raises another library's errors
        if _is_missing(error):
            return None
        raise _unreachable(repository, file, error) from error


def _download(repository: str, file: str) -> Path:
    client = _client()
    _refuse_irregular(_entries(repository, file))
    url = client.hf_hub_url(repository, file)
    # hf_hub_download alone retries an unreachable hub for minutes; this asks once.
    known = client.get_hf_file_metadata(url, timeout=_TIMEOUT)
    if len(known.etag or "") == _SHA256_DIGITS and known.size is not None:
        _download_blob(repository, file, url, known)
    # Links a blob that is there, and downloads small files, which have no digest.
    return Path(client.hf_hub_download(repository, file, etag_timeout=_TIMEOUT))


def _is_missing(error: Exception) -> bool:
    """Whether the hub has the repository, but not the file."""
    return isinstance(error, _client().errors.EntryNotFoundError)


def _client() -> ModuleType:
    """The hub's client, which reads its settings when it is first imported."""
    import huggingface_hub
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = _CHUNK
    return huggingface_hub


def _folder(repository: str) -> Path:
    """The folder of a repository in the cache."""
    from huggingface_hub.file_download import repo_folder_name

    name = repo_folder_name(repo_id=repository, repo_type="model")
    return Path(_client().constants.HF_HUB_CACHE, name)


def _entries(repository: str, file: str) -> list[Path]:
    """The possible paths of a file in the cache, one per revision."""
    snapshots = _folder(repository) / "snapshots"
    return [each / file for each in snapshots.iterdir()] if snapshots.is_dir() else []


def _refuse_irregular(paths: Sequence[Path]) -> None:
    """Raises WeightsError if a path is a folder, a pipe or the like.

    A dangling link is accepted, since a download replaces it.
    """
    for path in paths:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise WeightsError(
                f"the cache has {kind} instead of a file, {path}: remove it and start again"
            )


def _download_blob(repository: str, file: str, url: str, known: Any) -> None:
    """Downloads the content of a file into the cache, under its digest.

    known: the hub's metadata; its `etag` is the SHA-256 of the content.

    Raises:
        WeightsError: the download broke off, or the content has another digest.
    """
    from filelock import FileLock

    folder = _folder(repository)
    blob = folder / "blobs" / known.etag
    part = blob.with_suffix(".part")
    lock = folder.parent / ".locks" / folder.name / f"{part.name}.lock"
    for each in (blob, lock):
        each.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        _refuse_irregular([blob, part])
        if blob.exists():
            return
        for _ in range(_ATTEMPTS):
            _continue(part, file, url, known)
            if _digest(part) == known.etag:
                part.replace(blob)
                return
            part.unlink()
    raise WeightsError(f"the download of {file} does not match the hub's checksum: try again")


def _continue(part: Path, file: str, url: str, known: Any) -> None:
    """Downloads the rest of a partial file.

    Raises:
        WeightsError: the download broke off; the partial file is kept.
    """
    from huggingface_hub.file_download import http_get

    headers = _client().utils.build_hf_headers()
    if urlsplit(known.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the hub's token is not for another host
    with part.open("ab") as target:
        begun = target.tell()
        if begun >= known.size:
            return
        try:
            http_get(
                known.location,
                target,
                resume_size=begun,
                headers=headers,
                expected_size=known.size,
                displayed_filename=file,
            )
        except Exception as error:  # each release of the client raises another library's errors
            target.flush()
            received = part.stat().st_size
            if received < known.size:
                raise WeightsError(
                    f"the download of {file} from {known.location} broke off after "
                    f"{received / _MEGABYTE:.1f} of {known.size / _MEGABYTE:.1f} MB "
                    f"({_reason(error)}): start again to resume it"
                ) from error


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _unreachable(repository: str, file: str, error: Exception) -> WeightsError:
    constants = _client().constants
    return WeightsError(
        f"cannot get {file} of {repository}: {_reason(error)}\n"
        f"  looked in the cache {constants.HF_HUB_CACHE} (HF_HOME) and then at "
        f"{constants.ENDPOINT} (HF_ENDPOINT)\n"
        "  with no network, copy the file over and give its model_path, or use the embedded "
        "model, which needs none: name: embedded, or CLIP_MODEL=embedded"
    )
