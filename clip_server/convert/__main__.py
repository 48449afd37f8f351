"""`python -m clip_server.convert NAME|PATH --to onnx --precision fp16 --out DIR`.

Writes a folder that a flow serves with `model_path: DIR` alone, and compares its towers with the
model that they come from.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clip_server import runtimes
from clip_server.commands import console
from clip_server.commands.model_options import positive
from clip_server.convert import chinese_clip
from clip_server.convert.parity import LEAST_COSINE, Parity
from clip_server.convert.triton.config import BACKENDS
from clip_server.errors import ClipServerError, ConfigurationError, UnknownModelError
from clip_server.launch.process_setup import tolerate_closed_output
from clip_server.model_card import PRECISIONS, ModelCard, Precision
from clip_server.models import converted, zoo
from clip_server.models.converted import TOWERS, Tower
from clip_server.runtimes import load_runtime
from clip_server.runtimes.loading import load_checkpoint
from clip_server.runtimes.protocol import Runtime
from clip_server.runtimes.samples import samples
from clip_server.towers import registry

if TYPE_CHECKING:
    from clip_server.convert.writers import Encode, Writer
    from clip_server.models.weights import Tensors

# The kinds of files that towers are converted to.
_FILES = {spec.files.kind: spec.files for spec in runtimes.RUNTIMES if spec.files}
_TRITON = "triton"
_FLOW = """
In a flow:

    uses:
      jtype: CLIPEncoder
      with:
        model_path: {folder}
      metas:
        py_modules:
          - clip_server.executors.{executor}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Exit status: 0 on success, 1 on failure or low accuracy, 2 on wrong
    arguments."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(chinese_clip.translate(given))
    try:
        passed = _convert(options)
    except ClipServerError as error:
        console.log(f"clip_server.convert: {error}")
        return 1
    return 0 if passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clip_server.convert",
        description="Converts a model to files that a runtime serves, and compares them with their "
        "source.",
        epilog="The flags of Chinese-CLIP's pytorch_to_onnx.py are supported too.",
    )
    parser.add_argument(
        "name",
        metavar="NAME|PATH",
        help="a model's name; a checkpoint or the folder of one; or architecture::PATH",
    )
    parser.add_argument(
        "--to",
        choices=[*sorted(_FILES), _TRITON],
        default="onnx",
        help="onnx by default; triton: a model repository for NVIDIA's Triton Inference Server",
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="fp32 by default")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder to write"
    )
    parser.add_argument("--image", action="store_true", help="convert the image tower only")
    parser.add_argument("--text", action="store_true", help="convert the text tower only")
    parser.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help="truncate texts to N tokens (default: the model's)",
    )
    _add_triton_options(parser.add_argument_group("with --to triton"))
    return parser


def _add_triton_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--towers",
        choices=BACKENDS,
        default=BACKENDS[0],
        help=f"the backend that runs the towers; {BACKENDS[0]} by default",
    )
    group.add_argument(
        "--gpus",
        type=_numbers,
        default=(),
        metavar="0,1",
        help="that run the towers; by default all that Triton sees, or else the CPU",
    )
    group.add_argument(
        "--version", type=positive, default=1, metavar="N", help="version of the models; 1"
    )
    group.add_argument(
        "--labels", type=Path, metavar="FILE", help="default prompts of zero_shot, one per line"
    )


def _numbers(given: str) -> list[int]:
    return [int(number) for number in given.split(",")]


def _convert(options: argparse.Namespace) -> bool:
    """Converts a model; returns whether its towers are accurate enough."""
    name, path = _split_path(options.name)
    card = _with_context(zoo.resolve(name, path), options.context_length)
    if options.to == _TRITON:
        return _convert_to_repository(options, name, path, card)
    from clip_server.convert.writers import writer  # raises where a package is missing

    precision, folder, files = options.precision, options.out, _FILES[options.to].names
    chosen = [tower for tower in TOWERS if getattr(options, tower)] or TOWERS
    paths = {tower: folder / files[tower] for tower in chosen}
    _refuse_mixture(folder, card, precision, paths)
    card, passed = _write_towers(options, name, path, card, paths, partial(writer, options.to))
    converted.write(folder, card, precision)
    print(_FLOW.format(folder=folder.resolve(), executor=runtimes.of_files(options.to).executor))
    return passed


def _convert_to_repository(
    options: argparse.Namespace, name: str, path: Path | None, card: ModelCard
) -> bool:
    """Writes a model repository for Triton; returns whether its towers are accurate enough."""
    from clip_server.convert.triton.repository import Repository
    from clip_server.convert.writers import OnnxWriter, TensorrtGraphWriter

    if options.image or options.text:
        raise ConfigurationError("--to triton writes both towers: leave --image and --text out")
    repository = Repository(
        options.out,
        backend=options.towers,
        version=options.version,
        gpus=options.gpus,
        prompts=_read_lines(options.labels),
    )
    repository.check(card)
    paths = {tower: repository.graph(tower) for tower in TOWERS}
    writer = TensorrtGraphWriter if options.towers == "tensorrt" else OnnxWriter
    card, passed = _write_towers(options, name, path, card, paths, writer)
    repository.write(card, options.precision)
    print(repository.instructions())
    return passed


def _read_lines(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        return [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--labels {file} cannot be read: {error}") from None


def _write_towers(
    options: argparse.Namespace,
    name: str,
    path: Path | None,
    card: ModelCard,
    paths: Mapping[Tower, Path],
    writer: Callable[[ModelCard, Tensors, Precision], Writer],
) -> tuple[ModelCard, bool]:
    """Writes towers and compares them with their source. Returns the card, with the checkpoint's
    logit scale and bias, and whether all are accurate enough."""
    precision: Precision = options.precision
    console.log(f"{card.name} to {options.to} in {precision}: embedding samples with the source")
    source, expected = _embed_samples(name, path, card, list(paths))
    held, tensors = load_checkpoint(name, path)
    card = replace(card, logit_scale=held.logit_scale, logit_bias=held.logit_bias)
    target = writer(card, tensors, precision)
    for file in paths.values():
        file.parent.mkdir(parents=True, exist_ok=True)
    found = [_write_tower(target, card, tower, paths[tower], expected[tower]) for tower in paths]
    shown = {str(path.relative_to(options.out)): path for path in paths.values()}
    _report(source, precision, shown, found)
    return card, all(parity is None or parity.suffices(precision) for parity in found)


def _split_path(given: str) -> tuple[str, Path | None]:
    """A model's name, or the path of a checkpoint."""
    try:
        zoo.resolve(given)
    except UnknownModelError:
        if Path(given).exists():
            return "", Path(given)
        raise
    return given, None


def _with_context(card: ModelCard, length: int | None) -> ModelCard:
    """The card with another context length.

    Raises:
        ConfigurationError: the text tower has fewer positions, or needs all of them.
    """
    if length in (None, card.text.context_length):
        return card
    most = registry.text_tower(card.config).max_length
    if card.text.trim == "fixed" or not 2 < length <= most:
        allowed = f"is {most}" if card.text.trim == "fixed" else f"may be 3 to {most}"
        raise ConfigurationError(f"the context length of {card.name} {allowed}, not {length}")
    return replace(card, text=replace(card.text, context_length=length))


def _refuse_mixture(
    folder: Path, card: ModelCard, precision: Precision, paths: Mapping[Tower, Path]
) -> None:
    """Raises ConfigurationError if a tower of another model or precision would stay in a folder."""
    held = converted.read(folder)
    if held is None or (held.card.name, held.precision) == (card.name, precision):
        return
    every = [folder / name for files in _FILES.values() for name in files.names.values()]
    kept = [path for path in every if path.exists() and path not in paths.values()]
    if kept:
        raise ConfigurationError(
            f"{kept[0]} is of {held.card.name} in {held.precision}: choose another folder"
        )


def _embed_samples(
    name: str, path: Path | None, card: ModelCard, towers: Sequence[Tower]
) -> tuple[str, Mapping[Tower, NDArray[np.float32]]]:
    """The source's runtime and precision, and its embeddings of the samples."""
    source = _source(name, path)
    encode: dict[Tower, Encode] = {"image": source.encode_image, "text": source.encode_text}
    found = {tower: encode[tower](samples(card, tower)) for tower in towers}
    return f"{source.name} {source.precision}", found


def _source(name: str, path: Path | None) -> Runtime:
    """The model in torch, or if that is not installed, in float32 graphs."""
    runtime = "onnx" if runtimes.find("torch").missing_package() else "torch"
    return load_runtime(runtime, name, model_path=path, device="cpu")


def _write_tower(
    target: Writer, card: ModelCard, tower: Tower, path: Path, expected: NDArray[np.float32]
) -> Parity | None:
    """Writes a tower's file, and compares its embeddings with the source's; None if this machine
    cannot run it."""
    console.log(f"{path.name}: converting")
    start = time.perf_counter()
    target.write(tower, path)
    made = f"{path.name}: converted in {time.perf_counter() - start:.1f} s"
    encode = target.open(path)
    if encode is None:
        console.log(f"{made}; NOT COMPARED with its source: there is no GPU here to run it")
        return None
    console.log(f"{made}; comparing")
    return Parity.of(encode(samples(card, tower)), expected)


def _report(
    source: str, precision: Precision, paths: Mapping[str, Path], found: Sequence[Parity | None]
) -> None:
    """Prints a table of the files, each under the name that `paths` has for it."""
    rows = [
        [name, _megabytes(path), *_figures(parity, precision)]
        for (name, path), parity in zip(paths.items(), found, strict=True)
    ]
    columns = ["tower", "size", f"lowest cosine with {source}", "largest difference", precision]
    console.print_table(columns, rows)


def _figures(parity: Parity | None, precision: Precision) -> list[str]:
    if parity is None:
        return ["-", "-", "NOT COMPARED"]
    failed = f"FAIL: below {LEAST_COSINE[precision]}"
    verdict = "PASS" if parity.suffices(precision) else failed
    return [f"{parity.cosine:.7f}", f"{parity.difference:.1e}", verdict]


def _megabytes(path: Path) -> str:
    """The size of a graph, including its separate file of weights."""
    files = [path, path.with_name(f"{path.name}.data")]
    return f"{sum(file.stat().st_size for file in files if file.exists()) / 1e6:.1f} MB"


if __name__ == "__main__":
    tolerate_closed_output()
    sys.exit(main())
