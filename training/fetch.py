"""Fetch the drawing sets and the name data from the npm registry.

Run as ``python -m training.fetch``; everything lands in ``.cache/npm``.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

CACHE = Path(".cache")
NPM_DIR = CACHE / "npm"
MODULES = NPM_DIR / "node_modules"

PACKAGES = (
    "emojibase-data@17.0.0",
    "cldr-annotations-full@48.2.0",
    "@iconify-json/noto@1.2.9",
    "@iconify-json/noto-v1@1.2.5",
    "@iconify-json/fxemoji@1.2.2",
    "@iconify-json/twemoji@1.2.5",
    "@iconify-json/streamline-emojis@1.2.4",
    "@iconify-json/fluent-emoji-flat@1.2.6",
    "@expo-google-fonts/noto-emoji@0.4.7",
    "emojione@2.2.7",
    "@iconify-json/flat-color-icons@1.2.3",
    "@iconify-json/streamline-color@1.2.2",
    "@iconify-json/streamline-plump-color@1.2.2",
    "@iconify-json/streamline-kameleon-color@1.2.2",
    "@iconify-json/icon-park@1.2.4",
    "@iconify-json/mdi@1.2.3",
    "@iconify-json/ph@1.2.2",
    "@iconify-json/game-icons@1.2.4",
    "@iconify-json/tabler@1.2.41",
)


def install(packages: tuple[str, ...] = PACKAGES, into: Path = NPM_DIR) -> None:
    """Install ``packages`` with npm below ``into``, running none of their scripts."""
    into.mkdir(parents=True, exist_ok=True)
    manifest = into / "package.json"
    if not manifest.exists():
        manifest.write_text('{"name": "training-cache", "private": true}\n', encoding="utf-8")
    flags = ["--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock"]
    subprocess.run(["npm", "install", *flags, *packages], cwd=into, check=True)


if __name__ == "__main__":
    install()
