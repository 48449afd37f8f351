"""Checks installed packages, and names the commands that install missing ones."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

DISTRIBUTION = "clip-microservice"


def missing_package(packages: Sequence[str]) -> str | None:
    """The first of these packages that is not installed; None: all are.

    packages: import names; where several are joined by |, any of them will do.
    """
    for package in packages:
        names = package.split("|")
        if not any(map(_is_installed, names)):
            return names[0]
    return None


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


def install_hint(extra: str) -> str:
    """The command that installs an extra, from the registry or a checkout, to end a message."""
    from_checkout = f"pip install ./clip_client '.[{extra}]'"
    return f"pip install '{DISTRIBUTION}[{extra}]' (in a checkout: {from_checkout})"


def conflict() -> str | None:
    """Advice if clip-as-service's packages own the folders of ours; None if they are absent."""
    found = [name for name in ("clip-client", "clip-server") if _owns_our_folders(name)]
    if not found:
        return None
    return (
        f"{' and '.join(found)} of clip-as-service installed into the same folders: "
        f"pip uninstall {' '.join(found)}, then install this server again with "
        "pip install --force-reinstall --no-deps"
    )


def _owns_our_folders(name: str) -> bool:
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return False
    # Clip-as-service ended with 0.8; 1.0.0 is an older checkout of ours.
    ours = ("clip_client", "clip_server")
    return found.version.startswith("0.") and any(
        file.parts[0] in ours for file in found.files or []
    )
