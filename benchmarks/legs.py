"""The legs: each measures one thing and gives a table and goals."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks import workload
from benchmarks.cost import cost
from benchmarks.faults import faults
from benchmarks.options import Options
from benchmarks.peers import (
    CLIP_AS_SERVICE,
    EMBEDDED,
    INFINITY,
    INT8,
    NULL,
    OURS,
    RAW,
    SCHEMES,
    SIGLIP2,
    SIGLIP2_INFINITY,
    SIGLIP2_INT8,
    THIN,
    THIN_INFINITY,
    TRITON,
    Peers,
)
from benchmarks.processes import Driver
from benchmarks.report import Figures, Goal, Leg
from benchmarks.search import search
from benchmarks.soak import soak
from benchmarks.triton import stages
from clip_client import scores
from clip_server.preprocess.image import ImageTransform
from clip_server.runtimes.onnx import OnnxRuntime

T = TypeVar("T")

WARM_UP_SECONDS = 2.0
PERCENTILES = (50, 95, 99)
IN_FLIGHT = (1, 8, 64)
# Requests at once that keep each busy; clip-as-service computes one after the other.
TEXTS_IN_FLIGHT = {OURS: 8, INT8: 8, INFINITY: 8, CLIP_AS_SERVICE: 2, RAW: 1, TRITON: 8}
PHOTOS_IN_FLIGHT = {OURS: 4, INT8: 4, INFINITY: 4, CLIP_AS_SERVICE: 2, RAW: 1, TRITON: 4}
# OpenAI's API, as the null runtime's table has it.
EMBEDDINGS = "/v1/embeddings"
# Between two queries of a person, in seconds.
PAUSE = 0.05
# Of JPEG files, as Pillow names them.
SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
QUALITIES = (50, 75, 90, 95)
SIZES = ((640, 480), (1024, 768), (1600, 1200), (2400, 1800), (4000, 3000))
PHOTOGRAPHS = 4
LEAST_COSINE = 0.999
PHOTO, NOISE = "photograph", "off by one at random"


def texts(peers: Peers, options: Options) -> Leg:
    """Texts a second, many and one a request."""
    drivers = peers.available(OURS, INFINITY, CLIP_AS_SERVICE, RAW)
    many = _rates("texts/s, 32 a request", drivers, TEXTS_IN_FLIGHT, options, "texts", 32)
    del drivers[RAW]
    single = _rates(
        "texts/s, 1 a request, 64 in flight",
        drivers,
        dict.fromkeys(drivers, 64),
        options,
        "texts",
        1,
    )
    peer = CLIP_AS_SERVICE
    goals = [
        Goal("32 texts a request, of infinity's", ">=", 1.5, many.ratio(OURS, INFINITY)),
        Goal("32 texts a request, of clip-as-service's", ">=", 10, many.ratio(OURS, peer)),
        Goal("32 texts a request, of the raw runtime's", ">=", 0.9, many.ratio(OURS, RAW)),
        Goal("1 text a request, of infinity's", ">=", 2, single.ratio(OURS, INFINITY)),
    ]
    return Leg("rate (ours is so many times as fast)", [many, single], goals)


def photos(peers: Peers, options: Options) -> Leg:
    """Photos a second, 16 a request."""
    drivers = peers.available(OURS, INT8, INFINITY, CLIP_AS_SERVICE, RAW)
    rate = _rates("photos/s, 16 a request", drivers, PHOTOS_IN_FLIGHT, options, "photos", 16)
    goals = [
        Goal("photos, of infinity's", ">=", 1.35, rate.ratio(OURS, INFINITY)),
        Goal("photos, of clip-as-service's", ">=", 1.8, rate.ratio(OURS, CLIP_AS_SERVICE)),
        Goal("photos with int8, of infinity's", ">=", 1.9, rate.ratio(INT8, INFINITY)),
    ]
    return Leg("rate (ours is so many times as fast)", [rate], goals)


def latency(peers: Peers, options: Options) -> Leg:
    """Percentiles of the time that one text takes, at 1, 8 and 64 in flight."""
    drivers = peers.available(OURS, INFINITY, RAW)
    rows = []
    for in_flight in IN_FLIGHT:
        rows += _latencies(f"{in_flight} in flight", drivers, options, in_flight=in_flight)
        drivers.pop(RAW, None)  # it takes one text after the other
    median = rows[0].rounds
    pairs = zip(median[OURS], median[RAW], strict=True)
    more = statistics.median(ours - raw for ours, raw in pairs)
    goals = [Goal("1 in flight, median ms above the raw runtime's", "<=", 5, more)]
    return Leg("one text (ours is so many times as fast)", rows, goals)


def capacity(peers: Peers, options: Options) -> Leg:
    """The capacity of the server alone, with a runtime that answers immediately."""
    drivers = {protocol: peers.driver(NULL, protocol) for protocol in SCHEMES}
    many = _rates(
        "texts/s, 128 a request", drivers, dict.fromkeys(drivers, 8), options, "texts", 128
    )
    # Our client sends small requests over HTTP together; others send each by itself.
    apis = {"http": drivers["http"], EMBEDDINGS: peers.openai_driver(NULL)}
    single = _rates(
        "requests/s of 1 text, 64 in flight",
        drivers | apis,
        dict.fromkeys(drivers | apis, 64),
        options,
        "texts",
        1,
    )
    idle, *others = _latencies("1 in flight", drivers, options, in_flight=1)
    by_api = _rates("texts/s, 32 a request", apis, dict.fromkeys(apis, 8), options, "texts", 32)
    goals = [
        Goal("texts/s, 128 a request, gRPC", ">=", 30_000, many.median("grpc")),
        Goal("requests/s of 1 text, 64 in flight, gRPC", ">=", 2_000, single.median("grpc")),
        Goal("idle latency, median ms, gRPC", "<=", 3, idle.median("grpc")),
        Goal("requests/s of 1 text, 64 in flight, HTTP", ">=", 2_400, single.median("http")),
        Goal("the same, of gRPC's", ">=", 0.9, single.ratio("http", "grpc")),
        Goal(
            f"texts/s, 32 a request, {EMBEDDINGS}, of /encode's",
            ">=",
            0.9,
            by_api.ratio(EMBEDDINGS, "http"),
        ),
    ]
    return Leg("null runtime", [many, single, by_api, idle, *others], goals)


def siglip2(peers: Peers, options: Options) -> Leg:
    """Texts and photos a second with ViT-B-16-SigLIP2."""
    names = {OURS: SIGLIP2, INT8: SIGLIP2_INT8, INFINITY: SIGLIP2_INFINITY}
    drivers = _by_column(peers, names)
    rows = [
        _rates("texts/s, 32 a request", drivers, TEXTS_IN_FLIGHT, options, "texts", 32),
        _rates("photos/s, 16 a request", drivers, PHOTOS_IN_FLIGHT, options, "photos", 16),
    ]
    return Leg("rate (ours is so many times as fast)", rows, [])


def _by_column(peers: Peers, names: dict[str, str]) -> dict[str, Driver]:
    """The drivers of those that run here.

    names: of the peers, by column of the table.
    """
    found = peers.available(*names.values())
    return {column: found[name] for column, name in names.items() if name in found}


def overhead(peers: Peers, options: Options) -> Leg:
    """The server around the model: a CLIP of one thin layer, over OpenAI's API on both sides."""
    drivers = _by_column(peers, {OURS: THIN, INFINITY: THIN_INFINITY})
    rows, goals = [], []
    for batch, in_flight in ((1, 64), (32, 16), (1, 1)):
        what = f"texts/s, {batch} a request, {in_flight} in flight"
        row = _rates(what, drivers, dict.fromkeys(drivers, in_flight), options, "texts", batch)
        rows.append(row)
        goals.append(Goal(f"{what}, of infinity's", ">=", 4, row.ratio(OURS, INFINITY)))
    return Leg("one thin layer (ours is so many times as fast)", rows, goals)


def triton(peers: Peers, options: Options) -> Leg:
    """The same model, exported for NVIDIA's Triton, with its towers in the python backend."""
    drivers = peers.available(OURS, TRITON, RAW)
    many = _rates("texts/s, 32 a request", drivers, TEXTS_IN_FLIGHT, options, "texts", 32)
    photos = _rates("photos/s, 16 a request", drivers, PHOTOS_IN_FLIGHT, options, "photos", 16)
    single = {name: drivers[name] for name in (OURS, TRITON) if name in drivers}
    rates = _rates(
        "texts/s, 1 a request, 64 in flight",
        single,
        dict.fromkeys(single, 64),
        options,
        "texts",
        1,
    )
    rows = [many, photos, rates, *_latencies("1 in flight", drivers, options, in_flight=1)]
    notes = _ensembles(peers, drivers[TRITON], options) if TRITON in drivers else []
    return Leg("rate (ours is so many times as fast)", rows, [], notes)


def _ensembles(peers: Peers, driver: Driver, options: Options) -> list[str]:
    """What an ensemble adds to the models it consists of, for texts and for photos."""
    url = peers.started(TRITON).addresses["http"]
    one = {"batch": 1, "in_flight": 1, "seconds": options.seconds, "seed": 1}
    kinds = {"text_embedding": "texts", "image_embedding": "photos"}
    return [
        stages(url, ensemble, lambda kind=kind: driver("throughput", kind=kind, **one))
        for ensemble, kind in kinds.items()
    ]


def mixed(peers: Peers, options: Options) -> Leg:
    """The effect of a bulk job on interactive queries."""
    rows, goals, notes = [], [], []
    for name in (OURS, EMBEDDED):
        found, bulk = _idle_and_loaded(peers, name, options)
        rows += found
        slowed = found[1].ratio("under load", "idle")  # p95
        goals.append(Goal(f"{name}, p95 under load, of idle", "<=", 3, slowed))
        notes.append(f"{name}: the bulk job went at {statistics.median(bulk):,.0f} texts/s.")
    return Leg("one text, ms", rows, goals, notes)


def _idle_and_loaded(
    peers: Peers, name: str, options: Options
) -> tuple[list[Figures], list[float]]:
    """Latencies of a person's queries without and with a bulk job, and the job's texts/s."""
    person, job = peers.driver(name), peers.another(name)
    rounds: dict[str, list[Any]] = {"idle": [], "under load": []}
    rates = []
    for number in range(1, options.rounds + 1):
        ask = {"in_flight": 1, "seconds": options.seconds, "pause": PAUSE, "seed": number}
        rounds["idle"].append(person("latency", **ask)["milliseconds"])
        job.send(
            "throughput",
            kind="texts",
            batch=128,
            in_flight=8,
            # Outlasts the queries, unless its texts end before.
            seconds=options.seconds + 2,
            count=options.bulk,
            seed=-number,
        )
        time.sleep(1)
        rounds["under load"].append(person("latency", **ask)["milliseconds"])
        done = job.answer()
        if done["seconds"] < 1 + options.seconds:
            print("  the bulk job ended before the queries: give it more texts", flush=True)
        rates.append(done["items"] / done["seconds"])
    return _percentiles(name, rounds), rates


def decode(peers: Peers, options: Options) -> Leg:
    """Cosines between pictures decoded at a fraction of their size and exactly."""
    del peers, options
    found = _decoded()
    rows = [
        Figures(f"{row}, least", {column: [min(each)] for column, each in of_row.items()})
        for row, of_row in found.items()
    ]
    noise = _together({NOISE: found.pop(NOISE)})
    everything = _together(found)
    photographs = _together({row: each for row, each in found.items() if row.startswith(PHOTO)})
    goals = [
        Goal(f"lowest cosine of {len(cosines)} {which}", ">=", LEAST_COSINE, min(cosines))
        for which, cosines in (("photographs", photographs), ("pictures", everything))
    ]
    share = np.mean(np.array(everything) >= LEAST_COSINE)
    notes = [
        f"Median {statistics.median(everything):.6f}; {share:.1%} are at least {LEAST_COSINE}. "
        f"With as many pixels off by one at random, instead of scaled decoding, the least is "
        f"{min(noise):.5f}."
    ]
    return Leg("cosine", rows, goals, notes)


def _decoded() -> dict[str, dict[str, list[float]]]:
    """Cosines between scaled and exact, by content and quality, and by size."""
    runtime = OnnxRuntime.load("embedded", device="cpu")
    scaled, exact = (ImageTransform(runtime.card.image, exact=each) for each in (False, True))
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, list[float]]] = {}
    for size in SIZES:
        column = f"{size[0]} x {size[1]}"
        for content, picture in _contents(size):
            for quality, subsampling in itertools.product(QUALITIES, SUBSAMPLINGS):
                file = workload.jpeg(picture, quality, subsampling)
                pixels = [exact(file), scaled(file)]
                pixels.append(_off_by_one(*pixels, rng))
                embeddings = scores.normalize(runtime.encode_image(np.stack(pixels)))
                _, cosine, noise = (embeddings @ embeddings[0]).tolist()
                for row, value in ((f"{content}, quality {quality}", cosine), (NOISE, noise)):
                    found.setdefault(row, {}).setdefault(column, []).append(value)
        print(f"  {column}: done", flush=True)
    return found


def _together(table: dict[str, dict[str, list[float]]]) -> list[float]:
    """The values of all cells."""
    return [value for row in table.values() for cell in row.values() for value in cell]


def _off_by_one(
    exact: NDArray[np.uint8], scaled: NDArray[np.uint8], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Pixels with noise of the size of the difference, as a measure of the model's own unrest."""
    share = np.abs(exact.astype(int) - scaled).mean()
    noise = rng.choice([-1, 1], exact.shape) * (rng.random(exact.shape) < share)
    return (exact + noise).clip(0, 255).astype(np.uint8)


def _contents(size: tuple[int, int]) -> Iterator[tuple[str, Image.Image]]:
    """Pictures, and what they are: photographs, a smooth field and noise."""
    for picture in itertools.islice(workload.pictures(size, seed=1), PHOTOGRAPHS):
        yield PHOTO, picture
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    yield "smooth", Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    yield "noise", Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


LEGS: dict[str, Callable[[Peers, Options], Leg]] = {
    leg.__name__: leg
    for leg in (
        texts,
        photos,
        latency,
        capacity,
        siglip2,
        overhead,
        triton,
        search,
        mixed,
        decode,
        cost,
        faults,
        soak,
    )
}


def _interleaved(
    drivers: dict[str, Driver], options: Options, ask: Callable[[str, float, int], T]
) -> dict[str, list[T]]:
    """The results of `ask(name, seconds, seed)` for each driver in every round.

    In a round they take turns, so that whatever else the machine does meets all of them. A
    first round warms up and is not kept.
    """
    found: dict[str, list[T]] = {name: [] for name in drivers}
    for name in drivers:
        ask(name, min(WARM_UP_SECONDS, options.seconds), 0)
    for number in range(1, options.rounds + 1):
        for name in drivers:
            found[name].append(ask(name, options.seconds, number))
    return found


def _rates(
    what: str,
    drivers: dict[str, Driver],
    in_flight: dict[str, int],
    options: Options,
    kind: str,
    batch: int,
) -> Figures:
    """Items a second of each."""

    def ask(name: str, seconds: float, seed: int) -> float:
        answer = drivers[name](
            "throughput",
            kind=kind,
            batch=batch,
            in_flight=in_flight[name],
            seconds=seconds,
            seed=seed,
        )
        rate: float = answer["items"] / answer["seconds"]
        print(f"  {what}, round {seed or 'to warm up'}: {name} {rate:,.1f}", flush=True)
        return rate

    return Figures(what, _interleaved(drivers, options, ask))


def _latencies(
    what: str, drivers: dict[str, Driver], options: Options, in_flight: int
) -> list[Figures]:
    """Percentiles of the milliseconds that one text takes, a row for each."""

    def ask(name: str, seconds: float, seed: int) -> list[float]:
        answer = drivers[name]("latency", in_flight=in_flight, seconds=seconds, seed=seed)
        taken: list[float] = answer["milliseconds"]
        return taken

    return _percentiles(what, _interleaved(drivers, options, ask))


def _percentiles(what: str, taken: dict[str, list[list[float]]]) -> list[Figures]:
    """A row for each of PERCENTILES, of the milliseconds taken in each round."""
    rows = []
    for percent in PERCENTILES:
        rounds = {
            name: [float(np.percentile(each, percent)) for each in of_rounds]
            for name, of_rounds in taken.items()
        }
        row = Figures(f"{what}, p{percent} ms", rounds, less_is_better=True)
        found = ", ".join(f"{name} {row.median(name):.4g}" for name in rounds)
        print(f"  {row.what}: {found}", flush=True)
        rows.append(row)
    return rows
