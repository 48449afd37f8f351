"""The runtimes and precisions to compare, from a command line."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import NamedTuple

from clip_server.errors import ConfigurationError
from clip_server.models import converted
from clip_server.runtimes.base import Runtime

# Imported when they are asked for: what they need may not be installed.
_CLASSES = {
    "torch": ("clip_server.runtimes.torch", "TorchRuntime"),
    "onnx": ("clip_server.runtimes.onnx", "OnnxRuntime"),
    "tensorrt": ("clip_server.runtimes.tensorrt", "TensorrtRuntime"),
}
# Those that run on every machine.
_DEFAULT = ("torch", "onnx")

# The runtime of what `clip_server.convert` writes.
_RUNTIMES = {"onnx": "onnx", "torchscript": "torch", "tensorrt": "tensorrt"}


class Variant(NamedTuple):
    """A runtime in one precision, such as onnx fp32; perhaps of a folder with converted towers."""

    runtime: str
    dtype: str
    folder: Path | None = None

    def __str__(self) -> str:
        place = [str(self.folder)] if self.folder else []
        return " ".join((*place, self.runtime, self.dtype))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which variants, and how they are loaded."""
    parser.add_argument(
        "--runtime",
        type=_runtimes,
        metavar="NAME,...",
        help=f"of {', '.join(_CLASSES)}; {' and '.join(_DEFAULT)} by default",
    )
    parser.add_argument(
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
    runtimes = options.runtime or _DEFAULT
    return [Variant(runtime, dtype) for runtime in runtimes for dtype in options.dtype]


def of_folder(folder: Path) -> Variant:
    """What `python -m clip_server.convert` wrote.

    Raises:
        ConfigurationError: the folder is not one of these.
    """
    described = converted.read(folder)
    for kind, runtime in _RUNTIMES.items():
        if described and converted.has_towers(folder, kind):
            return Variant(runtime, described.precision, folder)
    raise ConfigurationError(
        f"{folder} is not a folder of `python -m clip_server.convert` with both towers"
    )


def load(variant: Variant, name: str, options: argparse.Namespace) -> Runtime:
    """The model on a variant.

    Raises:
        ConfigurationError: the extra, the device, the dtype or the model is not to be had.
    """
    module, kind = _CLASSES[variant.runtime]
    runtime: Runtime = getattr(importlib.import_module(module), kind).load(
        name,
        model_path=variant.folder or options.model_path,
        device=options.device,
        dtype=variant.dtype,
        threads=options.threads,
    )
    return runtime


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _runtimes(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in _CLASSES:
            raise argparse.ArgumentTypeError(
                f"no runtime is named {name!r}; there are {', '.join(_CLASSES)}"
            )
    return names
