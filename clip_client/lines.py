"""The files of the shell client: items from arguments and lines, results to JSONL or .npy."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from clip_client.data_uri import has_scheme
from clip_client.errors import InvalidInputError
from clip_client.labels import brief, label

Write = Callable[[Mapping[str, Any]], None]

STDIN = "-"
ARRAY = ".npy"
TEXT_LINES, JSON_LINES = (".txt",), (".jsonl", ".ndjson")
# Keys of a JSON object that say what the item is, in order of preference.
_CONTENT = ("text", "uri", "image")


class ItemReader:
    """Reads the items that a command line names.

    arguments: texts, paths and URLs as `Client.encode` accepts them; - stands for the lines of
        stdin, a .txt file for its lines, a .jsonl file for the JSON value on each of its lines.
    json_lines: whether the lines of stdin are JSON as well.
    only_texts: whether every string is a text, whatever it looks like.

    Raises InvalidInputError if there is no such file.
    """

    def __init__(self, arguments: Sequence[str], json_lines: bool, only_texts: bool) -> None:
        self._arguments = arguments or [STDIN]
        self._json_lines = json_lines
        self._only_texts = only_texts
        for argument in arguments:
            if is_of_lines(argument) and not Path(argument).is_file():
                raise InvalidInputError(f"there is no file {argument}")

    def items(self) -> list[Any] | Iterator[Any]:
        """A list if their number is known, else an iterator that reads as it goes."""
        if any(argument == STDIN or is_of_lines(argument) for argument in self._arguments):
            return self._read()
        return list(self._read())

    def _read(self) -> Iterator[Any]:
        for argument in self._arguments:
            if argument == STDIN:
                yield from self._parsed(_stdin(), "stdin", self._json_lines)
            elif is_of_lines(argument):
                yield from self._parsed(
                    read_lines(argument), argument, argument.endswith(JSON_LINES)
                )
            else:
                yield self._item(argument)

    def _parsed(self, lines: Iterable[str], name: str, as_json: bool) -> Iterator[Any]:
        for number, line in enumerate(lines, 1):
            if not as_json:
                yield self._item(line)
            elif line.strip():
                yield self._item(_json_value(line, f"{name}, line {number}"))

    def _item(self, value: Any) -> Any:
        return {"text": value} if self._only_texts and isinstance(value, str) else value


def is_of_lines(argument: str) -> bool:
    """Whether an argument names a file of lines, by its suffix."""
    return argument.endswith((*TEXT_LINES, *JSON_LINES))


def read_lines(path: str) -> Iterator[str]:
    """The lines of a file, without their ends. Raises InvalidInputError if it cannot be read."""
    try:
        # Windows' programs begin files with a byte order mark, which is no part of the first line.
        with Path(path).open(encoding="utf-8-sig", errors="surrogateescape") as file:
            yield from _without_ends(file)
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}") from None


def output_file(path: str, suffixes: Sequence[str]) -> str:
    """The path of a file to write, for argparse: checked before the work, not after it."""
    if not path.endswith(tuple(suffixes)):
        raise argparse.ArgumentTypeError(f"the name of {path!r} ends with {' or '.join(suffixes)}")
    if Path(path).is_dir() or not Path(path).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path!r} is not a file in a folder that exists")
    return path


@contextmanager
def record_writer(path: str | None) -> Iterator[Write]:
    """A function that writes one JSON object a line, and flushes it.

    path: the file; None: stdout. Raises InvalidInputError if it cannot be opened.
    """
    if path is None:
        _configure(sys.stdout, "backslashreplace")
        yield _write_to(sys.stdout)
        return
    try:
        file = Path(path).open("w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be written: {error.strerror}") from None
    with file:
        yield _write_to(file)


def save_array(path: str, array: NDArray[np.float32]) -> None:
    """Writes a .npy file, which replaces an older one only when it is complete."""
    unfinished = Path(f"{path}.part")
    try:
        with unfinished.open("wb") as file:
            np.save(file, array)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise InvalidInputError(f"{path} cannot be written: {error.strerror}") from None


def describe(index: int, raw_item: Any) -> dict[str, Any]:
    """The keys of a record that say which item it is of."""
    record: dict[str, Any] = {"index": index}
    if isinstance(raw_item, Mapping):
        if "id" in raw_item:
            record["id"] = raw_item["id"]
        raw_item = next((raw_item[key] for key in _CONTENT if raw_item.get(key)), raw_item)
    # The content of a data: URI is not repeated.
    is_whole = isinstance(raw_item, str) and not has_scheme(raw_item)
    return {**record, "item": raw_item if is_whole else label(brief(raw_item))}


def _stdin() -> Iterator[str]:
    if sys.stdin.isatty():
        print("clip_client: reading lines from the terminal; Ctrl-D ends them", file=sys.stderr)
    _configure(sys.stdin, "surrogateescape", "utf-8-sig")
    return _without_ends(sys.stdin)


def _configure(stream: TextIO, errors: str, encoding: str = "utf-8") -> None:
    """Makes a standard stream UTF-8, whatever the locale.

    Bytes that are not UTF-8 are read as lone surrogates (`surrogateescape`), as Python has them in
    paths, and written as JSON's escapes of these (`backslashreplace`).
    """
    reconfigure = getattr(stream, "reconfigure", None)  # absent where a program replaced it
    if reconfigure is not None:
        reconfigure(encoding=encoding, errors=errors)


def _without_ends(lines: Iterable[str]) -> Iterator[str]:
    return (line.rstrip("\r\n") for line in lines)


def _json_value(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise InvalidInputError(f"{place} is not JSON: {error}") from None


def _write_to(file: TextIO) -> Write:
    def write(record: Mapping[str, Any]) -> None:
        print(json.dumps(record, ensure_ascii=False), file=file, flush=True)

    return write
