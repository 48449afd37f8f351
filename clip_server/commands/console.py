"""Output of the commands: messages and progress on stderr, tables on stdout."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

Advance: TypeAlias = Callable[[int], None]


def log(message: str) -> None:
    """Prints a message on stderr."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Advance]:
    """Shows a progress bar on stderr, if that is a terminal.

    It is drawn only when it advances: a thread that draws would distort what is measured.
    """
    # Imported here: a server's processes log, and show no progress.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

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
    """Prints a table as Markdown, with columns of numbers aligned to the right."""
    numeric = [all(cell[:1].isdigit() for cell in cells) for cells in zip(*rows, strict=True)]
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    rules = [
        "-" * (width - 1) + (":" if right else "-")
        for width, right in zip(widths, numeric, strict=True)
    ]
    for row in (columns, rules, *rows):
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
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
    # Checked before the work, not after it.
    file = Path(text)
    if file.is_dir() or not file.parent.is_dir():
        raise ArgumentTypeError(f"{text!r} is not a file in a folder that exists")
    return file
