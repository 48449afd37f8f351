"""`python -m clip_server.models [FILTER ...]`: lists the models, and the cache of prepared ones."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from clip_server import runtimes
from clip_server.commands import console
from clip_server.launch.process_setup import tolerate_closed_output
from clip_server.model_card import ModelCard
from clip_server.models import weights, zoo
from clip_server.runtimes import prepared
from clip_server.towers import registry

_COLUMNS = (
    *("name", "dimensions", "context", "image", "language", "parameters", "runtimes"),
    *("licence", "cached"),
)


@dataclass(frozen=True)
class Listed:
    """A row of the list.

    image: the side of an image, in pixels.
    language: as `zoo.language` gives it.
    cost: as `zoo.cost` gives it; None for models that only torch builds.
    other_names: in JSON only, as is the rest of the cost.
    cached: whether its weights are on this machine.
    """

    name: str
    dimensions: int
    context: int
    image: int
    language: str
    cost: zoo.Cost | None
    runtimes: tuple[str, ...]
    licence: str
    cached: bool
    other_names: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Exit status: 0 on success, 1 if no model matches, 2 on wrong arguments."""
    options = _options(arguments)
    if options.clear_cache:
        freed = prepared.size()
        prepared.clear()
        console.log(f"clip_server.models: removed {_mebibytes(freed)} from {prepared.folder()}")
        return 0
    names = [name for name in zoo.names() if _fits(name, options.filters)]
    if not names:
        wanted = " and ".join(map(repr, options.filters))
        console.log(f"clip_server.models: no name contains {wanted}")
        return 1
    listed = [each for each in map(_listed, map(zoo.resolve, names)) if _is_wanted(each, options)]
    if not listed:
        console.log("clip_server.models: no model has all of these properties")
        return 1
    if options.json:
        print(json.dumps([asdict(each) for each in listed], indent=2, ensure_ascii=False))
    else:
        console.print_table(_COLUMNS, [*map(_cells, listed)])
        console.log(f"prepared models: {_mebibytes(prepared.size())} in {prepared.folder()}")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m clip_server.models",
        description="List the models that a flow may name.",
    )
    parser.add_argument(
        "filters", nargs="*", metavar="FILTER", help="list only names that contain all of these"
    )
    parser.add_argument(
        "--runtime",
        choices=runtimes.names(),
        help="only those that it serves from their checkpoint",
    )
    parser.add_argument(
        "--dimensions", type=int, metavar="D", help="only those with embeddings of this length"
    )
    parser.add_argument(
        "--licence", metavar="NAME", help="only those whose licence begins so, such as MIT"
    )
    parser.add_argument(
        "--language", metavar="CODE", help="only those for a language, such as en, zh or de"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument(
        "--clear-cache",
        action="store_true",
        help="remove the files that ONNX Runtime prepared, which the next start makes again",
    )
    return parser.parse_args(arguments)


def _fits(name: str, filters: Sequence[str]) -> bool:
    """Whether every filter is in the name, or in another of the model's names."""
    spellings = [each.lower() for each in (name, *zoo.other_names(name))]
    return all(any(wanted.lower() in each for each in spellings) for wanted in filters)


def _is_wanted(each: Listed, options: argparse.Namespace) -> bool:
    """Whether a model has the properties that the options ask for."""
    language = (options.language or each.language).lower()
    return (
        options.runtime in (None, *each.runtimes)
        and options.dimensions in (None, each.dimensions)
        and each.licence.lower().startswith((options.licence or "").lower())
        and each.language in (language, zoo.MULTILINGUAL)
    )


def _listed(card: ModelCard) -> Listed:
    built = registry.builds(card.config)
    served = [spec for spec in runtimes.RUNTIMES if spec.any_architecture or built]
    return Listed(
        name=card.name,
        dimensions=card.dim,
        context=card.text.context_length,
        image=card.image.size,
        language=zoo.language(card),
        cost=zoo.cost(card),
        runtimes=tuple(runtimes.names(served)),
        licence=card.licence,
        cached=card.name == zoo.EMBEDDED or weights.cached(card) is not None,
        other_names=tuple(zoo.other_names(card.name)),
    )


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _cells(each: Listed) -> tuple[str, ...]:
    return (
        each.name,
        str(each.dimensions),
        str(each.context),
        str(each.image),
        each.language,
        f"{each.cost.parameters / 1e6:.0f}M" if each.cost else "-",
        ", ".join(each.runtimes),
        each.licence or "-",
        "yes" if each.cached else "no",
    )


if __name__ == "__main__":
    tolerate_closed_output()
    sys.exit(main())
