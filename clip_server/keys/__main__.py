"""`python -m clip_server.keys`: adds, lists and removes keys of the server's callers."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_server.commands import console
from clip_server.errors import ConfigurationError
from clip_server.keys.keyring import (
    FILE_VARIABLE,
    check_name,
    digest_of,
    read_entries,
    read_file,
)

_DEFAULT_FILE = "keys.yml"
_RANDOM_BYTES = 32
_HEAD = "# Keys of CLIP as a microservice, written by `python -m clip_server.keys`.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. The exit status: 0 done, 1 refused, 2 misused."""
    options = _parse(arguments)
    file = Path(options.file)
    try:
        if options.command == "add":
            print(_add(file, options.name, options.max_in_flight_items))
            console.log(f"clip_server: {file} holds its hash; the key itself is not kept anywhere")
        elif options.command == "remove":
            _remove(file, options.name)
        else:
            for key in read_file(file):
                limit = key.max_in_flight_items
                print(f"{key.name}  {limit:,} items in flight" if limit else key.name)
    except (ConfigurationError, OSError) as error:
        console.log(f"clip_server: {error}")
        return 1
    return 0


def _add(file: Path, name: str, limit: int | None) -> str:
    """Makes a key and stores its hash; returns the key."""
    check_name(name)
    content = read_entries(file) if file.exists() else {"keys": {}}
    if name in content["keys"]:
        raise ConfigurationError(
            f"{file}: there is a key {name}: remove it first, or add another name while both are "
            "in use"
        )
    key = secrets.token_urlsafe(_RANDOM_BYTES)
    entry: dict[str, Any] = {"sha256": digest_of(key).hex()}
    if limit is not None:
        entry["max_in_flight_items"] = limit
    content["keys"][name] = entry
    _write(file, content)
    return key


def _remove(file: Path, name: str) -> None:
    content = read_entries(file)
    if name not in content["keys"]:
        raise ConfigurationError(f"{file}: there is no key {name}")
    del content["keys"][name]
    _write(file, content)


def _write(file: Path, content: dict[str, Any]) -> None:
    """Replaces the file in one step, so that a server never reads half of it."""
    import yaml

    target = file.resolve()  # a link stays one
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o600
    written = target.with_name(f".{target.name}.{os.getpid()}")
    written.touch(mode=0o600)
    written.write_text(_HEAD + yaml.safe_dump(content, sort_keys=False), "utf-8")
    written.chmod(mode)
    written.replace(target)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m clip_server.keys",
        description="Adds, lists and removes the keys that callers of a server need. A running "
        "server reads the file again by itself.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser("add", help="make a key, print it, and store its hash")
    remove = commands.add_parser("remove", help="remove a key: it is refused from then on")
    for command in (add, remove, commands.add_parser("list", help="print the names of the keys")):
        command.add_argument(
            "--file",
            default=os.environ.get(FILE_VARIABLE) or _DEFAULT_FILE,
            help=f"the file of keys (default: {FILE_VARIABLE}, or {_DEFAULT_FILE})",
        )
    for command in (add, remove):
        command.add_argument("name", help="the name of the key, for logs and metrics")
    add.add_argument(
        "--max-in-flight-items",
        type=_count,
        metavar="N",
        help="refuse more items of this key in flight at the same time (default: the file's)",
    )
    return parser.parse_args(arguments)


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} is not a whole number from 1")
    return int(word)


if __name__ == "__main__":
    sys.exit(main())
