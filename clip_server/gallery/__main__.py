"""`python -m clip_server.gallery build|append|remove|query|reindex -c gallery.yml`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

from clip_client import ClipError
from clip_server import runtimes
from clip_server.commands import console
from clip_server.errors import ClipServerError, ConfigurationError
from clip_server.evaluate.encoders import Encoder, EngineEncoder, ServerEncoder
from clip_server.gallery import sources
from clip_server.gallery.config import OPERATIONS, GalleryConfig, differences, read_config
from clip_server.gallery.encoding import Report, batches, embed, fingerprint, to_rows
from clip_server.gallery.sheet import save_sheet
from clip_server.launch.process_setup import tolerate_closed_output
from clip_server.search import filters, open_store, replacement
from clip_server.search.store import Hit, Modality, Query, Row, Store, Vectors

_SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. The exit status: 0 done, 1 could not be done, 2 misused."""
    options = _parser().parse_args(arguments)
    try:
        config = read_config(options.config, options.override)
        for warning in config.warnings:
            console.log(f"clip_server.gallery: {warning}")
        if options.model:
            config = replace(config, model=options.model)
        if options.command == "query":
            _query(config, options.queries, options.sheet)
        elif options.command == "reindex":
            _finish(_reindex(config, options.drop_missing), options.report)
        else:
            _finish(_change(config, _operation(config, options.command)), options.report)
    except (ClipServerError, ClipError) as error:
        console.log(f"clip_server.gallery: {error}")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clip_server.gallery",
        description="Builds and searches collections of images or texts, as PaddleClas' "
        "configuration describes them.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "-c", "--config", type=Path, required=True, metavar="FILE", help="the YAML file"
    )
    shared.add_argument(
        "-o",
        "--override",
        action="append",
        default=[],
        metavar="Section.key=value",
        help="a value in place of the file's, such as IndexProcess.index_method=IVF",
    )
    shared.add_argument("--model", metavar="NAME", help="the model, as `name` of a flow")
    reporting = argparse.ArgumentParser(add_help=False)
    reporting.add_argument(
        "--report", type=Path, metavar="FILE", help="write there, as JSON, what was left out"
    )
    for name, description in (
        ("build", "does what IndexProcess.index_operation says: new, append or remove"),
        ("append", "adds to the collection, replacing rows with the same ids"),
        ("remove", "removes from the collection"),
        ("reindex", "encodes a collection again, by another model, from its sources"),
    ):
        added = commands.add_parser(
            name, parents=[shared, reporting], help=description, description=description
        )
        if name == "reindex":
            added.add_argument(
                "--drop-missing", action="store_true", help="leave out rows whose source is gone"
            )
    query = commands.add_parser(
        "query",
        parents=[shared],
        help="searches the collection",
        description="Prints a JSON list of paths, or of texts, for each query.",
    )
    query.add_argument(
        "queries", nargs="*", help="texts or paths, in place of Global.texts or Global.infer_imgs"
    )
    query.add_argument("--sheet", type=Path, metavar="FILE", help="write a contact sheet there")
    return parser


def _operation(config: GalleryConfig, command: str) -> str:
    return command if command in OPERATIONS else config.index_operation


def _finish(report: Report, file: Path | None) -> None:
    for entry, why in list(report.errors.items())[:_SHOWN]:
        console.log(f"left out: {entry}: {why}")
    if len(report.errors) > _SHOWN:
        console.log(f"left out: {len(report.errors) - _SHOWN:,} more; --report has them all")
    console.write_json(file, asdict(report))
    if report.errors and not report.stored and not report.removed:
        raise ConfigurationError("nothing could be stored")


def _change(config: GalleryConfig, operation: str) -> Report:
    """Builds the collection, adds to it, or removes from it."""
    entries = _entries(config)
    if operation == "remove":
        with closing(open_store(config.settings(), None)) as store:
            removed = store.delete([entry.id for entry in entries])
            store.flush()
            console.log(f"{removed:,} removed; {store.count():,} rows in the collection")
            return Report(removed=removed)
    with closing(_encoder(config)) as encoder:
        model = fingerprint(encoder)
        if operation == "new":
            with replacement(config.settings(), model) as store:
                return _store(config, store, encoder, entries)
        with closing(open_store(config.settings(), model)) as store:
            return _store(config, store, encoder, entries)


def _store(
    config: GalleryConfig, store: Store, encoder: Encoder, entries: Iterator[sources.Entry]
) -> Report:
    """Encodes and stores entries, telling how fast."""
    modality: Modality = "image" if config.modality == "image" else "text"
    report, started = Report(), time.monotonic()
    with console.progress("storing", None) as advance:
        for batch in batches(entries, config.batch_size):
            rows = to_rows(batch, modality, encoder, report.errors)
            store.upsert(rows)
            report.stored += len(rows)
            advance(len(batch))
    store.flush()
    seconds = time.monotonic() - started
    console.log(
        f"{report.stored:,} stored, {len(report.errors):,} left out, "
        f"{report.stored / max(seconds, 1e-3):,.0f} a second; {store.count():,} rows in the "
        f"collection ({store.describe().index_method})"
    )
    return report


def _entries(config: GalleryConfig) -> Iterator[sources.Entry]:
    written = config.infer_imgs if config.modality == "image" else config.texts
    if not written:
        key = "infer_imgs" if config.modality == "image" else "texts"
        raise ConfigurationError(f"Global.{key} is missing, which says what to store")
    form = sources.Format(config.modality, config.delimiter, Path(config.image_root))
    return chain.from_iterable([sources.read(each, form) for each in written])


def _encoder(config: GalleryConfig) -> Encoder:
    encoder: Encoder
    if config.server:
        encoder = ServerEncoder(config.server)
    else:
        name = "tensorrt" if config.use_tensorrt else _installed()
        precision = "fp16" if config.use_fp16 else "fp32"
        device = None if config.use_gpu is None else "cuda" if config.use_gpu else "cpu"
        runtime = runtimes.load_runtime(
            name,
            config.model,
            model_path=config.model_path,
            device=device,
            precision=precision,
            threads=None,
        )
        for difference in differences(config.transform_ops, runtime.card.image):
            console.log(f"clip_server.gallery: {difference}")
        encoder = EngineEncoder(f"{name} {precision}", runtime, exact=False)
    if config.embedding_size not in (None, encoder.dim):
        encoder.close()
        raise ConfigurationError(
            f"embedding_size is {config.embedding_size}, and {encoder.model} has {encoder.dim} "
            "dimensions"
        )
    return encoder


def _installed() -> str:
    """The first runtime that is installed and runs on any machine."""
    for spec in runtimes.RUNTIMES:
        if "CPU" in spec.devices and not spec.missing_package():
            return spec.name
    raise ConfigurationError(f"no runtime is installed: {runtimes.RUNTIMES[0].install_hint}")


def _query(config: GalleryConfig, queries: Sequence[str], sheet: Path | None) -> None:
    written = list(queries) or (config.infer_imgs if config.queries_are_images else config.texts)
    if not written:
        key = "infer_imgs" if config.queries_are_images else "texts"
        raise ConfigurationError(f"name a query, or Global.{key}")
    if queries and not config.queries_are_images:
        asked = [sources.Entry(each, each, each) for each in queries]
    else:
        form = sources.Format("image" if config.queries_are_images else "text", config.delimiter)
        asked = [entry for each in written for entry in sources.read(each, form)]
    errors: dict[str, str] = {}
    with (
        closing(_encoder(config)) as encoder,
        closing(open_store(config.settings(), fingerprint(encoder))) as store,
    ):
        found = _search(config, store, asked, embed(asked, encoder, errors))
    for entry, hits in zip(asked, found, strict=True):
        if entry.id in errors:
            console.log(f"left out: {entry.id}: {errors[entry.id]}")
        print(json.dumps([_name(hit) for hit in hits], ensure_ascii=False))
    if sheet is not None:
        save_sheet(sheet, [(e.id, [(_name(h), h.score) for h in hits])
                           for e, hits in zip(asked, found, strict=True)])  # fmt: skip
    if len(errors) == len(asked):
        raise ConfigurationError("no query could be encoded")


def _search(
    config: GalleryConfig,
    store: Store,
    asked: Sequence[sources.Entry],
    vectors: Mapping[int, Vectors],
) -> list[list[Hit]]:
    query = Query(
        limit=config.return_k,
        filter=filters.parse(dict(config.filter)),
        threshold=config.score_thres,
    )
    return [
        store.search(vectors[index][None], query)[0] if index in vectors else []
        for index in range(len(asked))
    ]


def _name(hit: Hit) -> str:
    return (hit.text if hit.modality == "text" else hit.uri) or hit.id


def _reindex(config: GalleryConfig, drop_missing: bool) -> Report:
    """Encodes the rows of a collection again, from their texts and the files they came from.

    The collection stays as it was if it fails, or if a source is missing and may not be dropped.
    """
    report = Report()
    with closing(open_store(config.settings(), None)) as old, closing(_encoder(config)) as encoder:
        model = fingerprint(encoder)
        with replacement(config.settings(), model) as new:
            for rows in old.scan(config.batch_size):
                new.upsert(_encoded_again(rows, encoder, report))
            if report.errors and not drop_missing:
                place, why = next(iter(report.errors.items()))
                raise ConfigurationError(
                    f"{len(report.errors):,} rows cannot be encoded again (such as {place}: "
                    f"{why}); the collection stays as it was; --drop-missing leaves them out"
                )
            new.flush()
            old.close()
            console.log(f"{report.stored:,} encoded by {model.name}")
    return report


def _encoded_again(rows: Sequence[Row], encoder: Encoder, report: Report) -> list[Row]:
    entries = [
        sources.Entry(row.id, row.text if row.modality == "text" else Path(row.uri or ""))
        for row in rows
    ]
    vectors = embed(entries, encoder, report.errors)
    report.stored += len(vectors)
    return [replace(row, embedding=vectors[i]) for i, row in enumerate(rows) if i in vectors]


if __name__ == "__main__":
    tolerate_closed_output()
    sys.exit(main())
