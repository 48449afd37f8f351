"""What is installed, and how to install what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

DISTRIBUTION = "clip-microservice"


def missing_package(packages: Sequence[str]) -> str | None:
    """The first of these packages that is not installed; None: all are.

    packages: import names; where several are joined by |, any of them will do.
    """
    for package in packages:
        names = package.split("|")
        if not any(map(find_spec, names)):
            return names[0]
    return None


def install_hint(extra: str) -> str:
    """The command that installs an extra, from the registry or a checkout, to end a message."""
    return f"pip install '{DISTRIBUTION}[{extra}]' (in a checkout: pip install '.[{extra}]')"
