"""What the commands show: progress and remarks on stderr, tables on stdout."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance: TypeAlias = Callable[[int], None]


def remark(message: str) -> None:
    """Tells the person at the terminal."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """A bar on stderr, where that is a terminal. It draws only when it is advanced: a thread
    that draws would take time from what is measured."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.update(task, advance=count, refresh=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, as Markdown; every column but the first is aligned to the right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for first, *others in (columns, rules, *rows):
        cells = (first.ljust(widths[0]), *map(str.rjust, others, widths[1:]))
        print("|", " | ".join(cells), "|")


def add_argument(parser: ArgumentParser) -> None:
    """Adds the option for `write_json`'s file."""
    parser.add_argument(
        "--json", type=_file_to_be, metavar="FILE", help="write the results there too"
    )


def write_json(file: Path | None, content: Any) -> None:
    """Writes `content` to a file, where one was named."""
    if file is not None:
        text = json.dumps(content, indent=2, ensure_ascii=False)
        file.write_text(f"{text}\n", encoding="utf-8")


def _file_to_be(text: str) -> Path:
    # Said before the work, not after it.
    file = Path(text)
    if file.is_dir() or not file.parent.is_dir():
        raise ArgumentTypeError(f"{text!r} is not a file in a folder that exists")
    return file
