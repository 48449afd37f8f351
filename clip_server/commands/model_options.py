"""The runtimes and precisions to compare, from a command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from clip_server import runtimes
from clip_server.errors import ConfigurationError
from clip_server.models import converted
from clip_server.runtimes.protocol import Runtime

# Those that run on every machine.
_DEFAULT = [spec for spec in runtimes.RUNTIMES if "CPU" in spec.devices]


class Variant(NamedTuple):
    """A runtime in one precision, such as onnx fp32; perhaps of a folder with converted towers."""

    runtime: str
    precision: str
    folder: Path | None = None

    def __str__(self) -> str:
        place = [str(self.folder)] if self.folder else []
        return " ".join((*place, self.runtime, self.precision))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which variants, and how they are loaded."""
    parser.add_argument(
        "--runtime",
        type=_runtimes,
        metavar="NAME,...",
        help=f"of {', '.join(runtimes.names())}; by default those installed of "
        f"{' and '.join(runtimes.names(_DEFAULT))}",
    )
    parser.add_argument(
        "--precision",
        "--dtype",
        type=lambda names: names.split(","),
        default=["fp32"],
        metavar="NAME,...",
        help="precisions, such as fp32,int8; fp32 by default",
    )
    parser.add_argument(
        "--model-path",
        type=Path,
        metavar="PATH",
        help="a checkpoint of your own, as model_path in a flow",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1; the best there is by default")
    parser.add_argument("--threads", type=positive, help="cores that one call may use; all")


def chosen(options: argparse.Namespace) -> list[Variant]:
    """Every runtime asked for in every precision asked for."""
    installed = [spec for spec in _DEFAULT if not spec.missing_package()]
    names = options.runtime or runtimes.names(installed or _DEFAULT)
    return [Variant(name, precision) for name in names for precision in options.precision]


def of_folder(folder: Path) -> Variant:
    """A model that `python -m clip_server.convert` wrote.

    Raises:
        ConfigurationError: the folder is not one of these.
    """
    described = converted.read(folder)
    for spec in runtimes.RUNTIMES:
        if described and spec.find_towers(folder):
            return Variant(spec.name, described.precision, folder)
    raise ConfigurationError(
        f"{folder} is not a folder of `python -m clip_server.convert` with both towers"
    )


def load(variant: Variant, name: str, options: argparse.Namespace) -> Runtime:
    """The model on a variant.

    Raises:
        ConfigurationError: the extra, the device, the precision or the model is unavailable.
    """
    return runtimes.load_runtime(
        variant.runtime,
        name,
        model_path=variant.folder or options.model_path,
        device=options.device,
        precision=variant.precision,
        threads=options.threads,
    )


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _runtimes(text: str) -> list[str]:
    names = text.split(",")
    try:
        return [runtimes.find(name).name for name in names]
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
