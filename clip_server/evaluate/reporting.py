"""What the commands show: progress and remarks on stderr, tables on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Advance: TypeAlias = Callable[[int], None]

# Of a table that goes into a file.
_FILE_WIDTH = 160


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
    table = Table(box=box.MARKDOWN)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(table, width=console.width if console.is_terminal else _FILE_WIDTH)


def write_json(file: Path | None, content: Any) -> None:
    """Writes `content` to a file, where one was named."""
    if file is not None:
        text = json.dumps(content, indent=2, ensure_ascii=False)
        file.write_text(f"{text}\n", encoding="utf-8")
