"""Write the held-out style as pictures and captions, for ``python -m clip_server.evaluate``.

Run as ``python -m training.heldout``; fetches what it needs, and writes ``.cache/heldout``: a
PNG for each drawing, on white, and ``pairs.jsonl`` with its label.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from training.concepts import load_concepts
from training.evaluate import RENDER_SIZE, held_out_drawings, on_background
from training.fetch import CACHE, PACKAGES, install
from training.render import HELD_OUT, render_svg

# The drawings, and the names of the concepts.
NEEDED = (f"@iconify-json/{HELD_OUT}@", "emojibase-data@", "cldr-annotations-full@")


def write_pairs(folder: Path) -> int:
    """Render the drawings into ``folder``; returns how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    concepts = load_concepts()
    lines = []
    for place, svg in held_out_drawings(concepts):
        concept = concepts[place]
        name = f"{concept.code}.png"
        on_background(render_svg(svg, RENDER_SIZE)).save(folder / name)
        lines.append(json.dumps({"image": name, "caption": concept.label}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(lines)


def main() -> None:
    """Fetch, and write the pairs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=CACHE / "heldout")
    args = parser.parse_args()
    install(tuple(package for package in PACKAGES if package.startswith(NEEDED)))
    print(f"{args.out / 'pairs.jsonl'}: {write_pairs(args.out)} pairs")


if __name__ == "__main__":
    main()
