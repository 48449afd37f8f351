"""`python -m clip_server.benchmark [NAME ...]`: times the runtimes alone.

Without server, tokenizer and decoder: each call is a runtime's `encode_image` on random pixels or
`encode_text` on random tokens. Both return arrays in the host's memory, so a call ends when the
device is done, and a GPU's queue cannot hide work from the timer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_server.commands import console, model_options
from clip_server.errors import ClipServerError, ConfigurationError
from clip_server.launch.process_setup import tolerate_closed_output
from clip_server.model_card import ModelCard
from clip_server.models import zoo
from clip_server.runtimes.protocol import Runtime

# Calls that are not timed: the first ones allocate memory and choose kernels for the shape.
_WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """A tower, the size of a batch, and the tokens of each text (0: images)."""

    tower: str
    batch_size: int
    tokens: int = 0

    def batch(self, card: ModelCard) -> NDArray[Any]:
        """Random pixels [B, 3, S, S] uint8, or texts [B, L] int32; the same each time."""
        rng = np.random.default_rng(0)
        if not self.tokens:
            size = card.image.size
            return rng.integers(0, 256, (self.batch_size, 3, size, size), dtype=np.uint8)
        # The last two ids of the vocabulary are the start token and the end token.
        end = card.text.vocab_size - 1
        texts = rng.integers(1, end - 1, (self.batch_size, self.tokens), dtype=np.int32)
        texts[:, 0], texts[:, -1] = end - 1, end
        return texts


@dataclass(frozen=True)
class Result:
    """The milliseconds of each call of a case. The runtime need no longer be loaded."""

    model: str
    runtime: str
    precision: str
    device: str
    case: Case
    milliseconds: NDArray[np.float64]

    @property
    def median(self) -> float:
        """Milliseconds of a call; robust against a few calls that other work delayed."""
        return float(np.median(self.milliseconds))

    @property
    def items_per_second(self) -> float:
        """Items per second at the median."""
        return 1000 * self.case.batch_size / self.median

    def figures(self) -> dict[str, float]:
        """Statistics of the calls, in milliseconds; `sd` is the population's (divided by N)."""
        values = self.milliseconds
        return {
            "mean": float(values.mean()),
            "sd": float(values.std()),
            "min": float(values.min()),
            "max": float(values.max()),
            "median": self.median,
            "95p": float(np.percentile(values, 95)),
            "99p": float(np.percentile(values, 99)),
        }

    def line(self) -> str:
        """The statistics, for people."""
        figures = ", ".join(f"{name}={value:.2f}ms" for name, value in self.figures().items())
        what = f"{self.runtime.upper()} {self.case.tower} inference speed"
        return f"[{what} (batch-size: {self.case.batch_size}):] {figures}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Exit status: 0 on success, 1 on failure, 2 on wrong arguments."""
    options = _parser().parse_args(arguments)
    results: list[Result] = []
    unavailable: list[dict[str, str]] = []
    try:
        for name in options.names:
            measured = _measure(name, options, unavailable)
            _print_table(measured)
            results += measured
    except ClipServerError as error:
        console.log(f"clip_server.benchmark: {error}")
        return 1
    console.write_json(
        options.json,
        {"results": [_record(each) for each in results], "unavailable": unavailable},
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clip_server.benchmark",
        description="Times a model's two towers, by runtime, precision and batch size.",
    )
    parser.add_argument(
        "names", nargs="*", default=["embedded"], metavar="NAME", help="models (default: embedded)"
    )
    model_options.add_arguments(parser)
    parser.add_argument(
        "--batch-sizes",
        type=lambda text: [model_options.positive(each) for each in text.split(",")],
        default=[1, 4, 16, 32],
        metavar="N,...",
        help="default: 1,4,16,32",
    )
    parser.add_argument(
        "--repeat",
        type=model_options.positive,
        default=30,
        metavar="N",
        help="number of timed calls (default: 30)",
    )
    parser.add_argument(
        "--tokens",
        type=model_options.positive,
        default=16,
        metavar="N",
        help="tokens per text, including special tokens (default: 16); the full context is timed "
        "as well",
    )
    console.add_argument(parser)
    return parser


def _measure(
    name: str, options: argparse.Namespace, unavailable: list[dict[str, str]]
) -> list[Result]:
    """Times a model on every variant that is available, one after the other."""
    zoo.resolve(name, options.model_path)
    results: list[Result] = []
    for variant in model_options.chosen(options):
        try:
            # Loaded here and not kept, since memory is for one model at a time.
            results += _times(model_options.load(variant, name, options), options)
        except ConfigurationError as error:
            console.log(f"{variant}: {error}")
            unavailable.append({"model": name, "variant": str(variant), "why": str(error)})
    if not results:
        raise ConfigurationError(f"nothing of {name} could be timed")
    return results


def _times(runtime: Runtime, options: argparse.Namespace) -> Iterator[Result]:
    """Times every case on a runtime, and prints each result as soon as it is available."""
    kind = f"{runtime.name} {runtime.precision}"
    print(f"{runtime.card.name} on {kind} ({runtime.device})", flush=True)
    cases = list(_cases(runtime.card, options))
    with console.progress(kind, len(cases)) as advance:
        tokens = 0
        for case in cases:
            if case.tokens != tokens:
                tokens = case.tokens
                print(f"texts of {tokens} tokens", flush=True)
            encode = runtime.encode_text if case.tokens else runtime.encode_image
            milliseconds = _timed(encode, case.batch(runtime.card), options.repeat)
            result = Result(
                runtime.card.name,
                runtime.name,
                runtime.precision,
                runtime.device,
                case,
                milliseconds,
            )
            print(result.line(), flush=True)
            yield result
            advance(1)


def _cases(card: ModelCard, options: argparse.Namespace) -> Iterator[Case]:
    context = card.text.context_length
    # A model that takes no shorter texts always gets its full context.
    typical = context if card.text.trim == "fixed" else min(options.tokens, context)
    yield from (Case("image", size) for size in options.batch_sizes)
    for tokens in dict.fromkeys((typical, context)):
        yield from (Case("text", size, tokens) for size in options.batch_sizes)


def _timed(
    encode: Callable[[NDArray[Any]], NDArray[np.float32]], batch: NDArray[Any], repeat: int
) -> NDArray[np.float64]:
    """The milliseconds of each of `repeat` calls."""
    for _ in range(_WARM_UP):
        encode(batch)
    milliseconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        encode(batch)
        milliseconds.append(1000 * (time.perf_counter() - started))
    return np.array(milliseconds)


def _print_table(results: list[Result]) -> None:
    """Prints one model's medians: a row for each runtime, precision and batch size."""
    rows: dict[tuple[str, ...], list[str]] = {}
    columns = ["runtime", "precision", "device", "batch"]
    for each in results:
        what = f"text({each.case.tokens})" if each.case.tokens else "image"
        for unit in ("ms", "/s"):
            if f"{what} {unit}" not in columns:
                columns.append(f"{what} {unit}")
        key = (each.runtime, each.precision, each.device, str(each.case.batch_size))
        rows.setdefault(key, []).extend((f"{each.median:.2f}", f"{each.items_per_second:,.0f}"))
    print(f"\n{results[0].model}: the median of {len(results[0].milliseconds)} calls\n")
    console.print_table(columns, [[*key, *cells] for key, cells in rows.items()])


def _record(result: Result) -> dict[str, Any]:
    return {
        "model": result.model,
        "runtime": result.runtime,
        "dtype": result.precision,
        "device": result.device,
        **asdict(result.case),
        "calls": len(result.milliseconds),
        "milliseconds": result.figures(),
        "items_per_second": result.items_per_second,
    }


if __name__ == "__main__":
    tolerate_closed_output()
    sys.exit(main())
