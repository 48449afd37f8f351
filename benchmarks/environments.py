"""A virtual environment for each peer, made once, with every version pinned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.processes import NotAvailableError
from benchmarks.workload import CACHE

REQUIREMENTS = Path(__file__).parent / "requirements"
# What two of them need, and is too large to install twice.
SHARED, SHARING = "torch", {"infinity", "clip_as_service"}


def python(name: str) -> Path:
    """The interpreter of an environment with `requirements/NAME.txt` and the shared packages.

    Raises:
        NotAvailableError: the packages cannot be installed here.
    """
    folder = CACHE / "environments" / name
    wanted = (REQUIREMENTS / f"{name}.txt").read_text("utf-8")
    installed = folder / "installed.txt"
    interpreter = folder / "bin" / "python"
    if name in SHARING:
        shared = site_packages(python(SHARED))
    if not installed.is_file() or installed.read_text("utf-8") != wanted:
        print(f"installing {name} into {folder} (once; this takes minutes)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        if name in SHARING:
            (site_packages(interpreter) / "shared.pth").write_text(f"{shared}\n")
        _install(interpreter, REQUIREMENTS / f"{name}.txt")
        installed.write_text(wanted)
    return interpreter


def _install(interpreter: Path, requirements: Path) -> None:
    # The files list every package there is to be, so nothing is left to resolve.
    options = ["--quiet", "--no-deps", "--requirement", requirements]
    try:
        subprocess.run([interpreter, "-m", "pip", "install", *options], check=True)
    except subprocess.CalledProcessError as error:
        raise NotAvailableError(f"pip could not install {requirements.name}") from error


def site_packages(interpreter: Path) -> Path:
    """The folder of an environment's packages."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return interpreter.parent.parent / "lib" / version / "site-packages"


def version(package: str) -> str:
    """The pinned version of a package."""
    pins = "".join(file.read_text("utf-8") for file in sorted(REQUIREMENTS.glob("*.txt")))
    return dict(line.split("==") for line in pins.split())[package]
