"""`python -m benchmarks.gpu`: every runtime and precision on a GPU, in one run and one table.

It needs no network: the weights are random ones of ViT-B/32, seeded. "raw" is a ready batch in
the host's memory to vectors there; "end to end" is texts and JPEG files to vectors, in one
process, with no server and no network around it. clip-as-service stands for torch in fp16 used as
its executor uses it; see `contestants`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import candidates, workload
from benchmarks.contestants import PEER, Contestant, candidate, named
from benchmarks.drivers.driver import captions
from benchmarks.report import Goal, shown
from clip_server.commands import console
from clip_server.convert.parity import Parity
from clip_server.errors import ConfigurationError
from clip_server.preprocess.tokenizer import pad, tokenizer_for
from clip_server.runtimes.loading import load_checkpoint
from clip_server.runtimes.samples import samples

# The source of truth for vectors, and the cosine that each precision has to reach with it.
SOURCE = "torch fp32"
LEAST_COSINE = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.99}
LEAST_RUNS = 3
BEST = "tensorrt fp16"

Work = Callable[[Contestant], int]
Rates = dict[str, dict[str, list[float]]]


def main() -> int:
    """Runs the command. The exit status: 0 done, 1 some vectors are not what they should be."""
    options = _parser().parse_args()
    checkpoint = options.model_path or workload.checkpoint()
    contestants = _loaded(options, checkpoint)
    works = _works(checkpoint, options)
    near = _report_parity(contestants, checkpoint)
    rates = _measured(contestants, works, options.rounds, options.seconds)
    for each in contestants.values():
        each.close()
    columns = list(contestants)
    print("\nItems a second, the median of the rounds:\n")
    rows = [
        [what, *(shown(statistics.median(rates[what][name])) for name in columns)] for what in works
    ]
    console.print_table(["", *columns], rows)
    print()
    goals = [goal.line() for goal in _goals(rates)]
    console.print_table(["goal", "wanted", "found", "met"], goals)
    console.write_json(options.json, rates)
    return 0 if near else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1; cpu to try it")
    parser.add_argument(
        "--batches",
        type=lambda text: [int(each) for each in text.split(",")],
        default=[1, 8, 32, 128],
        help="1,8,32,128 by default",
    )
    parser.add_argument("--texts", type=int, default=1024, help="of a run end to end; 1024")
    parser.add_argument("--photos", type=int, default=96, help="of a run end to end; 96")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1, help="of each measurement")
    parser.add_argument("--only", help="contestants, such as 'torch fp32,tensorrt fp16'")
    parser.add_argument(
        "--candidates", action="store_true", help="also what the runtimes might do in its place"
    )
    parser.add_argument("--model-path", type=Path, help="another checkpoint's folder")
    console.add_argument(parser)
    return parser


def _loaded(options: argparse.Namespace, checkpoint: Path) -> dict[str, Contestant]:
    """Those contestants that can run here; the others say why not."""
    found = {}
    wanted = options.only.split(",") if options.only else None
    makers = named(options.device)
    if options.candidates:
        possible = candidates.named(options.device)
        makers |= {name: candidate(make) for name, make in possible.items()}
    for name, make in makers.items():
        if wanted and name not in wanted:
            continue
        start = time.perf_counter()
        try:
            found[name] = make(checkpoint)
        except (ConfigurationError, ImportError) as error:
            console.log(f"{name} is left out: {error}")
        else:
            console.log(f"{name}: loaded in {time.perf_counter() - start:.1f} s")
    if not found:
        raise SystemExit("nothing can run here")
    return found


def _works(checkpoint: Path, options: argparse.Namespace) -> dict[str, Work]:
    """Measured tasks. Each does its work once and returns the number of items."""
    card, _ = load_checkpoint("", checkpoint)
    tokenizer = tokenizer_for(card.text)
    texts = list(itertools.islice(captions(seed=0), options.texts))
    pictures = itertools.islice(workload.pictures(workload.PHOTO_SIZE), options.photos)
    photos = [workload.jpeg(each, workload.PHOTO_QUALITY, "4:2:0") for each in pictures]
    rng, size = np.random.default_rng(0), card.image.size
    works: dict[str, Work] = {}
    for batch in options.batches:
        pixels = rng.integers(0, 256, (batch, 3, size, size), dtype=np.uint8)
        chosen = list(itertools.islice(itertools.cycle(texts), batch))
        tokens = pad([tokenizer.encode(text) for text in chosen], tokenizer.spec)
        works[f"raw pictures, batches of {batch}"] = _work(
            lambda who, p=pixels: who.encode_image(p)
        )
        works[f"raw texts, batches of {batch}"] = _work(lambda who, t=tokens: who.encode_text(t))
    works["end to end, texts"] = _work(lambda who: who.encode(texts))
    works["end to end, photos"] = _work(lambda who: who.encode(photos))
    return works


def _work(encode: Callable[[Contestant], NDArray[np.float32]]) -> Work:
    return lambda who: len(encode(who))


def _report_parity(contestants: Mapping[str, Contestant], checkpoint: Path) -> bool:
    """Prints how near everyone's vectors are to the source's, and says whether near enough."""
    card, _ = load_checkpoint("", checkpoint)
    source = contestants.get(SOURCE)
    if source is None:
        console.log(f"vectors are NOT COMPARED: there is no {SOURCE}")
        return True
    pixels, tokens = samples(card, "image"), samples(card, "text")
    expected = source.encode_image(pixels), source.encode_text(tokens)
    rows, near = [], True
    for name, each in contestants.items():
        least = LEAST_COSINE.get(name.split()[-1], LEAST_COSINE["fp16"])
        found = (each.encode_image(pixels), each.encode_text(tokens))
        cosines = [Parity.of(*pair).cosine for pair in zip(found, expected, strict=True)]
        near &= min(cosines) >= least
        verdict = "yes" if min(cosines) >= least else "**no**"
        rows.append([name, *(f"{cosine:.6f}" for cosine in cosines), f"{least}", verdict])
    columns = [f"lowest cosine with {SOURCE}", "pictures", "texts", "wanted", "near enough"]
    console.print_table(columns, rows)
    return near


def _measured(
    contestants: Mapping[str, Contestant], works: Mapping[str, Work], rounds: int, seconds: float
) -> Rates:
    """Items a second of everyone at everything in every round, in which they take turns."""
    rates: Rates = {what: {name: [] for name in contestants} for what in works}
    for what, work in works.items():
        for who in contestants.values():
            _rate(work, who, seconds)  # to warm up
        for _ in range(rounds):
            for name, who in contestants.items():
                rates[what][name].append(_rate(work, who, seconds))
        console.log(f"{what}: measured")
    return rates


def _rate(work: Work, who: Contestant, seconds: float) -> float:
    start, items, runs = time.perf_counter(), 0, 0
    while runs < LEAST_RUNS or time.perf_counter() - start < seconds:
        items += work(who)
        runs += 1
    return items / (time.perf_counter() - start)


def _goals(rates: Rates) -> list[Goal]:
    def ratio(what: str, other: str) -> float | None:
        """The speed of the best runtime, relative to the others."""
        found = rates.get(what, {})
        if BEST not in found or other not in found:
            return None
        pairs = zip(found[BEST], found[other], strict=True)
        return statistics.median(one / two for one, two in pairs)

    wanted = [
        ("raw pictures, batches of 1", "torch fp16", 2.0),
        ("raw texts, batches of 1", "torch fp16", 2.0),
        ("raw pictures, batches of 32", "torch fp16", 1.2),
        ("raw texts, batches of 32", "torch fp16", 1.2),
        ("end to end, texts", PEER, 3.0),
        ("end to end, photos", PEER, 2.0),
    ]
    return [
        Goal(f"{what}: {BEST} over {other}", ">=", bound, ratio(what, other))
        for what, other, bound in wanted
    ]


if __name__ == "__main__":
    raise SystemExit(main())
