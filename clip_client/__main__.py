"""`python -m clip_client encode|rank|classify|info URL ...`: the client on the shell."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

from clip_client.callbacks import Batch
from clip_client.calls import TIMEOUT, EncodeOptions
from clip_client.client import Client
from clip_client.collector import progress
from clip_client.errors import ClipError, ItemFailure
from clip_client.lines import (
    ARRAY,
    JSON_LINES,
    STDIN,
    TEXT_LINES,
    ItemReader,
    describe,
    output_file,
    read_lines,
    record_writer,
    save_array,
)

# Images per call of `classify`, whose results are written together.
_CLASSIFIED_TOGETHER = 128
_INTERRUPTED = 130
# As shells report a program that SIGPIPE ended.
_BROKEN_PIPE = 141
_ITEM_HELP = (
    "a text, or the path or URL of an image; a .txt file stands for its lines, a .jsonl file for "
    'the string or object ({"text": ...} or {"image": ...}, and "id") on each of its lines, - for '
    "the lines of stdin, which is the default"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. The exit status: 0 on success, 1 if an item, a request or the connection
    failed, 2 on wrong arguments, 130 on Ctrl-C, 141 if the reader of the output went away."""
    options = _parse(arguments)
    try:
        with (
            _warnings_in_one_line(),
            Client(options.server, ca_file=options.ca_file, verify=not options.no_verify) as client,
        ):
            failures: list[ItemFailure] = options.run(client, options)
    except BrokenPipeError:
        # At its end Python would flush stdout, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except ClipError as error:
        _log(error)
        return 1
    except OSError as error:  # of the output, such as a full disk
        _log(f"the output cannot be written: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    for failure in failures:
        _log(failure)
    return 1 if failures else 0


def _encode(client: Client, options: argparse.Namespace) -> list[ItemFailure]:
    items = _items(options)
    call: EncodeOptions = {
        "normalize": options.normalize or None,
        "batch_size": options.batch_size,
        "model": options.model,
        "show_progress": _shows_progress(options),
        "timeout": options.timeout,
    }
    if options.output and options.output.endswith(ARRAY):
        embeddings, failures = client.encode(items, on_item_error="return", **call)
        save_array(options.output, embeddings)
        return list(failures)
    sent: dict[int, Any] = {}
    with record_writer(options.output) as write:

        def record(batch: Batch) -> None:
            errors = {failure.index: failure.message for failure in batch.errors}
            for index, embedding in zip(batch.indices, batch.embeddings, strict=True):
                known = describe(index, sent.pop(index))
                if index in errors:
                    write({**known, "error": errors[index]})
                elif batch.exception is None:
                    write({**known, "embedding": embedding.tolist()})

        call["on_always"] = record
        # With on_done the Client keeps no embeddings.
        _, failures = client.encode(
            _remember(items, sent), on_done=lambda _: None, on_item_error="return", **call
        )
    return failures


def _rank(client: Client, options: argparse.Namespace) -> list[ItemFailure]:
    candidates = list(_items(options))
    rankings, failures = client.rank(
        options.query,
        candidates,
        on_item_error="return",
        batch_size=options.batch_size,
        model=options.model,
        show_progress=_shows_progress(options),
        timeout=options.timeout,
    )
    with record_writer(options.output) as write:
        for each in rankings:
            scores = {"probability": each.probability, "cosine": each.cosine}
            write({**describe(each.index, each.item), **scores})
        for failure in failures:
            item = describe(failure.index, candidates[failure.index])
            write({**item, "error": failure.message})
    return failures


def _classify(client: Client, options: argparse.Namespace) -> list[ItemFailure]:
    items = _items(options)
    labels = _labels(options.labels)
    failures: list[ItemFailure] = []
    with (
        record_writer(options.output) as write,
        progress(_shows_progress(options), items, "classifying") as advance,
    ):
        for start, images in _chunks(items):
            results, failed = client.classify(
                images,
                labels,
                prompt=options.prompt,
                model=options.model,
                on_item_error="return",
                timeout=options.timeout,
            )
            errors = {failure.index: failure.message for failure in failed}
            for place, (image, result) in enumerate(zip(images, results, strict=True)):
                found: dict[str, Any] = {"error": errors.get(place)}
                if result is not None:
                    found = {"labels": [dataclasses.asdict(each) for each in result]}
                write({**describe(start + place, image), **found})
            failures += [dataclasses.replace(each, index=start + each.index) for each in failed]
            advance(len(images))
    return failures


def _info(client: Client, options: argparse.Namespace) -> list[ItemFailure]:
    info = client.info(options.timeout, model=options.model or "")
    with record_writer(None) as write:
        write(dataclasses.asdict(info))
    return []


def _items(options: argparse.Namespace) -> list[Any] | Iterator[Any]:
    return ItemReader(options.items, options.jsonl, options.texts).items()


def _labels(given: Sequence[str]) -> list[str]:
    """The labels of a command line; `.txt` files of labels are replaced by their lines."""
    lists = (read_lines(each) if each.endswith(TEXT_LINES) else each.split(",") for each in given)
    return [label for labels in lists for each in labels if (label := each.strip())]


def _remember(items: Iterable[Any], sent: dict[int, Any]) -> Iterator[Any]:
    """The same items; each is in `sent`, by its index, once it was taken."""
    for index, item in enumerate(items):
        sent[index] = item
        yield item


def _chunks(items: Iterable[Any]) -> Iterator[tuple[int, list[Any]]]:
    """Lists of items, each with the index of its first."""
    rest, start = iter(items), 0
    while chunk := list(islice(rest, _CLASSIFIED_TOGETHER)):
        yield start, chunk
        start += len(chunk)


def _shows_progress(options: argparse.Namespace) -> bool:
    """Whether a bar would be seen, and would not mix with records on the same terminal."""
    return sys.stderr.isatty() and bool(options.output or not sys.stdout.isatty())


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: _log(f"warning: {message}")
        yield


def _log(message: object) -> None:
    print("clip_client:", " ".join(str(message).split()), file=sys.stderr)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m clip_client",
        description="Encodes, ranks and classifies texts and images on a server.",
        epilog="Results are written as JSON, one object per line; errors go to stderr, and the "
        "exit status is 1 if an item failed. The environment variable CLIP_AUTH_TOKEN holds the "
        "credential, if the server asks for one.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_encode(commands)
    _add_rank(commands)
    _add_classify(commands)
    _add_info(commands)
    options, others = parser.parse_known_args(arguments)
    # To argparse the items end at an option, as in `encode URL --normalize cat.png`.
    if hasattr(options, "items"):
        options.items += [each for each in others if not _is_option(each)]
        others = list(filter(_is_option, others))
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return options


def _add_encode(commands: Any) -> None:
    parser = _command(
        commands,
        "encode",
        _encode,
        "embeddings of texts and images",
        'Writes {"index", "item", "embedding"} for each item, in order; "error" in place of the '
        "embedding of one that failed.",
    )
    _add_items(parser, (*JSON_LINES, ARRAY))
    _add_request_options(parser)
    parser.add_argument("--normalize", action="store_true", help="scale embeddings to length 1")


def _add_rank(commands: Any) -> None:
    parser = _command(
        commands,
        "rank",
        _rank,
        "candidates by how well they match a query",
        'Writes {"index", "item", "probability", "cosine"} for each candidate, best first.',
    )
    parser.add_argument("query", metavar="QUERY", help="a text, or the path or URL of an image")
    _add_items(parser)
    _add_request_options(parser)


def _add_classify(commands: Any) -> None:
    parser = _command(
        commands,
        "classify",
        _classify,
        "images by labels",
        'Writes {"index", "item", "labels"} for each image; the labels, best first, have "label", '
        '"probability" and "cosine".',
    )
    _add_items(parser)
    _add_model(parser)
    parser.add_argument(
        "--labels",
        action="append",
        required=True,
        metavar="LABEL,...",
        help="labels, separated by commas, or a .txt file with one on each line (repeatable)",
    )
    parser.add_argument(
        "--prompt",
        default="a photo of a {}",
        help="the text that is encoded for a label, which replaces {} (default: %(default)s)",
    )


def _add_info(commands: Any) -> None:
    help_ = "the model and limits of the server"
    _add_model(_command(commands, "info", _info, help_, "Writes them as one JSON object."))


def _command(
    commands: Any, name: str, run: Callable[..., Any], help_: str, description: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help_, description=description)
    parser.set_defaults(run=run)
    parser.add_argument(
        "server",
        metavar="URL",
        help="grpc://host:port, http://host:port or ws://host:port, or with TLS grpcs, https, wss",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=TIMEOUT,
        metavar="SECONDS",
        help="per request (default: %(default)g)",
    )
    parser.add_argument("--ca-file", metavar="FILE", help="certificates in PEM to trust")
    parser.add_argument(
        "--no-verify", action="store_true", help="accept any certificate: for tests only"
    )
    return parser


def _add_items(parser: argparse.ArgumentParser, suffixes: Sequence[str] = JSON_LINES) -> None:
    parser.add_argument("items", nargs="*", metavar="ITEM", help=_ITEM_HELP)
    parser.add_argument("--texts", action="store_true", help="every ITEM and line is a text")
    parser.add_argument("--jsonl", action="store_true", help="the lines of stdin are JSON")
    parser.add_argument(
        "-o",
        "--output",
        type=partial(output_file, suffixes=suffixes),
        metavar="FILE",
        help=f"write to this file ({', '.join(suffixes)}), not to stdout"
        + "; .npy is an array [N, D], with NaN in the rows of items that failed"
        * (ARRAY in suffixes),
    )


def _add_request_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=_count, metavar="N", help="items per request")
    _add_model(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", help="one of several models of the server")


def _count(word: str) -> int:
    if not word.isdecimal() or not int(word):
        raise argparse.ArgumentTypeError(f"{word} is not a whole number from 1")
    return int(word)


def _seconds(word: str) -> float:
    try:
        seconds = float(word)
    except ValueError:
        seconds = 0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{word} is not a number of seconds above 0")
    return seconds


def _is_option(argument: str) -> bool:
    return argument.startswith("-") and argument != STDIN


if __name__ == "__main__":
    sys.exit(main())
