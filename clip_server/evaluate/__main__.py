"""`python -m clip_server.evaluate retrieval|relevance|zero-shot PATH`: scores of a model, a column
for each runtime and precision."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_client import ClipError
from clip_server.commands import console, model_options
from clip_server.errors import ClipServerError, ConfigurationError
from clip_server.evaluate import data
from clip_server.evaluate.encoders import Encoder, EngineEncoder, ServerEncoder, embed
from clip_server.launch.process_setup import tolerate_closed_output
from clip_server.models import zoo

# Skipped items that are listed one by one; all of them are in the JSON file.
_SHOWN = 20
_REFERENCE = "torch fp32"


@dataclass(frozen=True)
class Column:
    """The embeddings of the data by one encoder."""

    name: str
    model: str
    device: str
    images: NDArray[np.float32]
    texts: NDArray[np.float32]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Exit status: 0 on success, 1 on failure, 2 on wrong arguments."""
    options = _parser().parse_args(arguments)
    try:
        task = _read(options)
        columns, unavailable = _measure(options, task)
        _report(options, task, columns, unavailable)
    except (ClipServerError, ClipError) as error:
        console.log(f"clip_server.evaluate: {error}")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("data", type=Path, metavar="PATH")
    shared.add_argument("--name", default="embedded", help="the model; embedded by default")
    model_options.add_arguments(shared)
    shared.add_argument(
        "--converted",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="also evaluate this folder, written by `python -m clip_server.convert` (repeatable)",
    )
    shared.add_argument(
        "--exact", action="store_true", help="decode images at full size, as exact in a flow"
    )
    shared.add_argument(
        "--server",
        metavar="ADDRESS",
        help="evaluate a running server, such as grpc://127.0.0.1:51000; then only the runtimes "
        "and folders named by --runtime and --converted are loaded",
    )
    console.add_argument(shared)
    parser = argparse.ArgumentParser(
        prog="python -m clip_server.evaluate",
        description="Scores a model on your own images, by runtime and precision.",
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    tasks.add_parser(
        "retrieval",
        parents=[shared],
        help="texts to images and back",
        description="Retrieval over PATH: a JSONL file of images and captions, or a folder of "
        "images, each with a .txt file of captions of the same name.",
    )
    tasks.add_parser(
        "relevance",
        parents=[shared],
        help="texts whose image is there, or is not",
        description="ROC AUC of telling texts whose image is in a collection from those whose "
        "image is not, by the cosine and by the relevance of the best match. PATH as for "
        "retrieval; half of the images are the collection, then the other half.",
    )
    zero_shot = tasks.add_parser(
        "zero-shot",
        parents=[shared],
        help="images to classes",
        description="Zero-shot classification over PATH: a folder with a subfolder of images "
        "for each class.",
    )
    zero_shot.add_argument(
        "--classes", type=Path, metavar="FILE", help="a line each: subfolder, tab, name"
    )
    zero_shot.add_argument(
        "--templates", type=Path, metavar="FILE", help="a line each, such as: a photo of a {}."
    )
    return parser


def _read(options: argparse.Namespace) -> data.Pairs | data.Classes:
    if options.task == "retrieval":
        return data.read_pairs(options.data)
    if options.task == "relevance":
        return data.Presence(data.read_pairs(options.data))
    templates = data.read_templates(options.templates) if options.templates else data.TEMPLATES
    return data.read_classes(options.data, options.classes, templates)


def _measure(
    options: argparse.Namespace, task: data.Pairs | data.Classes
) -> tuple[list[Column], dict[str, str]]:
    """Embeds the data with each encoder: their columns, and the reasons for those unavailable, by
    name. Adds the items that fail to the task's `left_out`."""
    columns: list[Column] = []
    unavailable: dict[str, str] = {}
    if options.server:
        columns.append(_embed_all(ServerEncoder(options.server), task))
    for variant in _variants(options):
        try:
            columns.append(_embed_all(_engine(variant, options), task))
        except ConfigurationError as error:
            console.log(f"{variant}: {error}")
            unavailable[str(variant)] = str(error)
    if not columns:
        raise ConfigurationError("nothing could be evaluated")
    return columns, unavailable


def _variants(options: argparse.Namespace) -> list[model_options.Variant]:
    """The variants to load here; with a server, only those asked for."""
    folders = [model_options.of_folder(folder) for folder in options.converted]
    if options.server and not options.runtime:
        return folders
    zoo.resolve(options.name, options.model_path)
    return [*model_options.chosen(options), *folders]


def _engine(variant: model_options.Variant, options: argparse.Namespace) -> Encoder:
    runtime = model_options.load(variant, options.name, options)
    return EngineEncoder(str(variant), runtime, options.exact)


def _embed_all(encoder: Encoder, task: data.Pairs | data.Classes) -> Column:
    """Embeds the data and closes the encoder, since memory is for one model at a time."""
    work = len(task.images) + len(task.texts)
    with closing(encoder), console.progress(encoder.name, work) as advance:
        images = embed(encoder, task.images, advance)
        texts = embed(encoder, task.texts, advance)
    task.left_out.update({str(task.images[i]): why for i, why in images.errors.items()})
    task.left_out.update({repr(task.texts[i]): why for i, why in texts.errors.items()})
    return Column(encoder.name, encoder.model, encoder.device, images.embeddings, texts.embeddings)


def _report(
    options: argparse.Namespace,
    task: data.Pairs | data.Classes,
    columns: list[Column],
    unavailable: Mapping[str, str],
) -> None:
    for place, why in list(task.left_out.items())[:_SHOWN]:
        console.log(f"left out: {place}: {why}")
    if len(task.left_out) > _SHOWN:
        console.log(f"left out: {len(task.left_out) - _SHOWN:,} more; --json has them all")
    scores = _scores(task, columns)
    reference = next((each.name for each in columns if each.name == _REFERENCE), columns[0].name)
    print(
        f"{', '.join(dict.fromkeys(each.model for each in columns))}: "
        f"{len(task.images):,} images, {len(task.texts):,} texts, "
        f"{len(task.left_out):,} left out; in percent, and the difference to {reference}\n"
    )
    console.print_table(["", *scores], _rows(scores, reference))
    console.write_json(
        options.json,
        {
            "task": options.task,
            "data": str(options.data),
            "images": len(task.images),
            "texts": len(task.texts),
            "left_out": task.left_out,
            "reference": reference,
            "results": [_result(each, scores[each.name]) for each in columns],
            "unavailable": unavailable,
        },
    )


def _scores(
    task: data.Pairs | data.Classes, columns: list[Column]
) -> dict[str, Mapping[str, float]]:
    """The scores of each column, over the items that all of them could embed."""
    failed_images, failed_texts = (
        np.any([np.isnan(rows).any(axis=1) for rows in embeddings], axis=0)
        for embeddings in ([each.images for each in columns], [each.texts for each in columns])
    )
    scores = {}
    for column in columns:
        column.images[failed_images] = np.nan
        column.texts[failed_texts] = np.nan
        scores[column.name] = task.scores(column.images, column.texts)
    return scores


def _rows(scores: Mapping[str, Mapping[str, float]], reference: str) -> list[list[str]]:
    def cell(column: str, score: str) -> str:
        percent = 100 * scores[column][score]
        if column == reference:
            return f"{percent:.2f}"
        # Adding 0.0 makes a zero of -0.0.
        return f"{percent:.2f} ({round(percent - 100 * scores[reference][score], 2) + 0.0:+.2f})"

    return [[score, *(cell(column, score) for column in scores)] for score in scores[reference]]


def _result(column: Column, scores: Mapping[str, float]) -> dict[str, Any]:
    return {
        "name": column.name,
        "model": column.model,
        "device": column.device,
        "scores": dict(scores),
    }


if __name__ == "__main__":
    tolerate_closed_output()
    sys.exit(main())
