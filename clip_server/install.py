"""Checks installed packages, and names the commands that install missing ones."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

DISTRIBUTION = "clip-microservice"
# What an import raises if a package is missing, or if a library of it cannot be loaded.
IMPORT_ERRORS = (ImportError, OSError, MemoryError)
# In the system's messages about a shared library that does not fit into memory.
_OUT_OF_MEMORY = ("failed to map segment", "cannot allocate memory")


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


def import_failure(error: BaseException, title: str, extra: str) -> str:
    """Why an import failed, and a remedy, as an error message.

    title: of what was imported. extra: that installs it.
    """
    if isinstance(error, ModuleNotFoundError):
        return f"{title} is not installed: {install_hint(extra)}"
    if is_out_of_memory(error):
        return (
            f"{title} does not fit into the memory that this process may use: raise its limit "
            "(ulimit -v, which counts address space)"
        )
    reason = " ".join(str(error).split())
    return f"{title} is installed but cannot be loaded ({reason}): install it again"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an import failed for lack of memory."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in message for sign in _OUT_OF_MEMORY)


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
