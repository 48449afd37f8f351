"""`python -m clip_server.compare URL`: can an index of another server's embeddings be kept?"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_client import ClipError, TruncationWarning
from clip_server.commands import console, model_options
from clip_server.compare import probes
from clip_server.compare.agreement import (
    Agreement,
    ComparisonError,
    Verdict,
    agreement,
    is_normalized,
    verdict,
)
from clip_server.compare.servers import APIS, OtherServer, connect
from clip_server.errors import ClipServerError
from clip_server.evaluate.encoders import Encoder, EngineEncoder, ServerEncoder
from clip_server.launch.process_setup import tolerate_closed_output
from clip_server.models import zoo

_KEY_VARIABLE = "CLIP_COMPARE_KEY"
_NO_COMPARISON = 2
_NORMALIZED = (
    "Their embeddings have length 1: with `normalize: true`, those of this project have it too."
)
_NOT_NORMALIZED = "Their embeddings are not normalized; those of this project are not by default."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Exit status: 0 keep, 1 index again, 2 could not compare."""
    options = _parser().parse_args(arguments)
    key = options.key or os.environ.get(_KEY_VARIABLE)
    try:
        other = connect(options.url, options.api, options.model, key)
        with closing(other.encoder), closing(_ours(options)) as ours:
            return _compare(options, other, ours)
    except (ClipServerError, ClipError) as error:
        console.log(f"clip_server.compare: {error}")
        return _NO_COMPARISON


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clip_server.compare",
        description="Tells whether an index of embeddings that another server made can be kept: "
        "sends the same texts and images to it and to a model of ours, and compares the results.",
        epilog="Exit status: 0 keep the index, 1 index again, 2 they could not be compared.",
    )
    parser.add_argument(
        "url",
        metavar="URL",
        help="the other server: http(s):// for infinity, TEI, clip-as-service, one with OpenAI's "
        "API or of ours; grpc(s):// or ws(s):// for one of ours",
    )
    parser.add_argument(
        "--api",
        choices=[each.name for each in APIS],
        help="its API over HTTP; detected by default",
    )
    parser.add_argument("--model", help="the name of its model, where it needs one")
    parser.add_argument(
        "--key",
        help=f"sent to it as Authorization: Bearer KEY; by default the variable {_KEY_VARIABLE}",
    )
    parser.add_argument(
        "--with",
        dest="ours",
        metavar="URL",
        help="a running server of ours to compare with, in place of --name",
    )
    parser.add_argument("--name", default="embedded", help="our model; embedded by default")
    model_options.add_arguments(parser)
    parser.add_argument(
        "--exact", action="store_true", help="decode images at full size, as exact in a flow"
    )
    console.add_argument(parser)
    return parser


def _ours(options: argparse.Namespace) -> Encoder:
    if options.ours:
        return ServerEncoder(options.ours)
    zoo.resolve(options.name, options.model_path)
    variant, *others = model_options.chosen(options)
    if others and (options.runtime or len(options.precision) > 1):
        raise ComparisonError("one runtime and one precision are compared: name one of each")
    runtime = model_options.load(variant, options.name, options)
    return EngineEncoder(str(variant), runtime, options.exact)


def _compare(options: argparse.Namespace, other: OtherServer, ours: Encoder) -> int:
    """Prints what the comparison finds. Returns the exit status."""
    theirs = other.encoder
    report: dict[str, Any] = {
        "url": options.url,
        "api": other.api,
        "model": ours.model,
        "dimensions": {"theirs": theirs.dim, "ours": ours.dim},
    }
    if theirs.dim != ours.dim:
        print(
            f"{options.url} ({other.api}) has embeddings of {theirs.dim} dimensions, {ours.model} "
            f"of {ours.dim}: the models differ.\n"
        )
        return _conclude(options, report, Verdict.INDEX_AGAIN)
    items = _items(other)
    embeddings = {kind: _embed(theirs, each) for kind, each in items.items()}
    agreements = [
        agreement(kind, embeddings[kind], _embed(ours, each)) for kind, each in items.items()
    ]
    normalized = is_normalized(np.concatenate(list(embeddings.values())))
    print(
        f"{options.url} ({other.api}) and {ours.model} ({ours.name}), {ours.dim} dimensions: "
        "cosines of their embeddings of the same items\n"
    )
    console.print_table(["", "items", "least", "median", "mean"], [_row(a) for a in agreements])
    print(f"\n{_NORMALIZED if normalized else _NOT_NORMALIZED}")
    if other.without_images:
        print("Only texts were compared: that server embeds no images.")
    report |= {
        "normalized": normalized,
        "without_images": other.without_images,
        "agreement": [asdict(each) for each in agreements],
    }
    result = verdict(agreements)
    if result is not Verdict.KEEP:
        lowest = min(agreements, key=lambda each: each.least)
        item = items[lowest.kind][lowest.lowest_index]
        print(f"The least cosine is that of {_named(item, lowest.lowest_index)}.")
    return _conclude(options, report, result)


def _items(other: OtherServer) -> dict[str, Sequence[str | bytes]]:
    """What both servers embed, by kind."""
    if other.without_images:
        console.log(f"no images are compared: {other.without_images}")
        return {"texts": probes.TEXTS}
    return {"texts": probes.TEXTS, "images": probes.images()}


def _embed(encoder: Encoder, items: Sequence[str | bytes]) -> NDArray[np.float32]:
    """Embeddings [N, D], NaN for the items that failed, which are reported."""
    with warnings.catch_warnings():
        # One of the texts is longer than models read on purpose.
        warnings.simplefilter("ignore", TruncationWarning)
        embeddings, errors = encoder.encode(items)
    for index, why in errors.items():
        console.log(f"left out: {_named(items[index], index)}: {why}")
    embeddings[list(errors)] = np.nan
    return embeddings


def _named(item: str | bytes, index: int) -> str:
    return f"the text {item[:60]!r}" if isinstance(item, str) else f"image {index + 1}"


def _row(each: Agreement) -> list[str]:
    values = (each.least, each.median, each.mean)
    return [each.kind, str(each.items), *(f"{value:.6f}" for value in values)]


def _conclude(options: argparse.Namespace, report: dict[str, Any], result: Verdict) -> int:
    """Prints the verdict, writes the report and returns the exit status."""
    print(f"Verdict: {result.value}")
    console.write_json(options.json, {**report, "verdict": result.value})
    return 1 if result is Verdict.INDEX_AGAIN else 0


if __name__ == "__main__":
    tolerate_closed_output()
    sys.exit(main())
