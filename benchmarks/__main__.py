"""`python -m benchmarks [leg ...]`: measures, prints, and keeps the results."""

from __future__ import annotations

import argparse
import time

from benchmarks import report
from benchmarks.legs import LEGS
from benchmarks.options import QUICK, Options
from benchmarks.peers import Peers

# All but the soak, which takes its time.
DEFAULT = [name for name in LEGS if name != "soak"]


def main() -> None:
    options = _parser().parse_args()
    how = f"{options.rounds} rounds of {options.seconds:g} s"
    chosen = Options(
        options.rounds, options.seconds, options.bulk, options.minutes, tuple(options.sizes)
    )
    if options.quick:
        chosen = QUICK
    print(report.machine(), flush=True)
    for name in options.legs or DEFAULT:
        print(f"\n{name}", flush=True)
        started = time.monotonic()
        with Peers(options.port) as peers:  # those of other legs would take memory and caches
            leg = LEGS[name](peers, chosen)
        report.show(leg)
        if not options.quick:  # a trial is no result
            report.save(name, leg, how)
        print(f"\n  {time.monotonic() - started:.0f} s", flush=True)
    if options.docs:
        report.write_docs(LEGS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    legs = ", ".join(LEGS)
    parser.add_argument(
        "legs", nargs="*", type=_leg, metavar="LEG", help=f"of {legs}; all but the soak by default"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--bulk", type=int, default=100_000, help="texts of the bulk job")
    parser.add_argument("--minutes", type=float, default=20, help="of the soak")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[10_000, 50_000],
        metavar="ROWS",
        help="of the collections that are searched",
    )
    parser.add_argument("--port", type=int, default=9600, help="the first of those to listen on")
    parser.add_argument("--quick", action="store_true", help="little of everything, to try it")
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks.md and its plot")
    return parser


def _leg(name: str) -> str:
    if name not in LEGS:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(LEGS)}")
    return name


if __name__ == "__main__":
    main()
