"""The concepts (base emoji) with their names, and the words people use for them."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.fetch import MODULES

SHORTCODE_SETS = ("emojibase", "github", "cldr", "iamcal", "joypixels")
FLAG_GROUP = 9
DIRECTED = re.compile(r"\b(left|right|arrow|clockwise|o’clock|thirty|button|keycap|flag|input)\b")


@dataclass(frozen=True)
class Concept:
    """One thing that can be drawn: an emoji with its skin-tone variants merged."""

    code: str
    label: str
    group: int
    names: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    unique_tags: tuple[str, ...] = field(default=())

    @property
    def flippable(self) -> bool:
        """Whether a mirrored drawing still shows the same thing."""
        return DIRECTED.search(self.label) is None and self.group not in (FLAG_GROUP, 8)


def load_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def normal_code(code: str) -> str:
    """Upper-case code points joined by dashes, without variation selectors."""
    return "-".join(p.lstrip("0") or "0" for p in code.upper().split("-") if p != "FE0F")


def slug(text: str) -> str:
    """Letters and digits only, for joining names of different sets."""
    return re.sub(r"[^a-z0-9]+", "", text.lower().replace("&", "and").replace("ñ", "n"))


def _as_list(value: str | list[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _clean(name: str) -> str:
    return re.sub(r"\s+", " ", name.replace("_", " ").replace("-", " ")).strip().lower()


def _shortcodes(root: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in SHORTCODE_SETS:
        table = load_json(root / f"shortcodes/{name}.json")
        for code, value in table.items():
            found.setdefault(normal_code(code), []).extend(map(_clean, _as_list(value)))
    return found


def _annotations(modules: Path) -> dict[str, list[str]]:
    path = modules / "cldr-annotations-full/annotations/en/annotations.json"
    table = load_json(path)["annotations"]["annotations"]
    return {
        normal_code("-".join(f"{ord(c):X}" for c in text)): entry.get("default", [])
        for text, entry in table.items()
    }


def load_concepts(modules: Path = MODULES) -> list[Concept]:
    """All base emoji of emojibase, in its order, components left out."""
    root = modules / "emojibase-data/en"
    entries = [e for e in load_json(root / "data.json") if e.get("group", 2) != 2]
    codes, words = _shortcodes(root), _annotations(modules)
    raw: list[tuple[str, str, int, list[str], list[str]]] = []
    for entry in entries:
        code, label = normal_code(entry["hexcode"]), entry["label"].lower()
        names = [n for n in dict.fromkeys(codes.get(code, [])) if n != label and len(n) > 2]
        tags = [*entry.get("tags", []), *words.get(code, [])]
        tags = list(dict.fromkeys(t.lower() for t in tags if t.lower() != label))
        raw.append((code, label, entry["group"], names, tags))
    uses = Counter(text for row in raw for text in {row[1], *row[3], *row[4]})
    return [_concept(row, uses) for row in raw]


def _concept(row: tuple[str, str, int, list[str], list[str]], uses: Counter[str]) -> Concept:
    code, label, group, names, tags = row
    own = tuple(n for n in names if uses[n] == 1)
    few = tuple(t for t in tags if uses[t] <= 2)
    return Concept(code, label, group, own, tuple(tags), few)


def name_index(concepts: list[Concept], modules: Path = MODULES) -> dict[str, int]:
    """Slug of every known name to the position of its concept; labels win."""
    index = {slug(c.label): i for i, c in enumerate(concepts)}
    place = {c.code: i for i, c in enumerate(concepts)}
    for code, names in _shortcodes(modules / "emojibase-data/en").items():
        for name in names:
            if code in place and len(slug(name)) > 1:
                index.setdefault(slug(name), place[code])
    for name in ("noto", "twemoji"):
        _add_set_names(index, place, modules / "@iconify-json" / name)
    return index


def _add_set_names(index: dict[str, int], place: dict[str, int], folder: Path) -> None:
    icons = load_json(folder / "icons.json")
    parents: dict[str, list[str]] = {}
    for alias, entry in icons.get("aliases", {}).items():
        parents.setdefault(entry["parent"], []).append(alias)
    for code, name in load_json(folder / "chars.json").items():
        found = place.get(normal_code(code))
        if found is None:
            continue
        for each in (name, *parents.get(name, [])):
            index.setdefault(slug(each), found)
