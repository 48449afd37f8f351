"""The memory that the system lets this process use, asked before a model is loaded.

A process that takes more is killed without a word, or fails somewhere in a library.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from clip_server.errors import ConfigurationError

# What computing takes beyond the weights.
_BEYOND_WEIGHTS = 128 << 20
_CGROUPS = Path("/sys/fs/cgroup")
# Files of a cgroup, of the versions 2 and 1: its limit, its usage, and what of that are pages of
# files, which the system takes back when it needs them.
_FILES = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


def check(model: str, weight_bytes: int) -> None:
    """Checks that this process may use what a model with so many bytes of weights takes.

    Raises:
        ConfigurationError: it may use less; says how much, and what bounds it.
    """
    available, _ = _available()
    if available < weight_bytes + _BEYOND_WEIGHTS:
        raise ConfigurationError(f"{model} does not fit into memory: {describe(weight_bytes)}")


def describe(weight_bytes: int) -> str:
    """What a model needs, what is available, and a remedy, as the rest of an error message."""
    available, bound = _available()
    return (
        f"it needs about {(weight_bytes + _BEYOND_WEIGHTS) >> 20:,} MiB, and {available >> 20:,} "
        f"MiB are available ({bound}); raise the limit, or use dtype int8 or a smaller model"
    )


def _available() -> tuple[int, str]:
    """The bytes that this process may still use, and what bounds them, for people."""
    bounds = [*_machine(), *_cgroups(), *_address_space()]
    # Where nothing is known, as on macOS and Windows, there is nothing to check.
    return min(bounds, default=(1 << 62, "no limit is known"))


def _machine() -> Iterator[tuple[int, str]]:
    with suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        fields = dict(line.split(":") for line in lines)
        yield int(fields["MemAvailable"].split()[0]) << 10, "the memory of this machine"


def _cgroups() -> Iterator[tuple[int, str]]:
    """The bounds of this process's cgroup and of those around it."""
    for folder in _cgroup_folders():
        for limit, usage, reclaimable in _FILES:
            # Without a limit it says `max`, or a number beyond any machine's memory.
            with suppress(OSError, ValueError):
                most, used = (int((folder / name).read_text("ascii")) for name in (limit, usage))
                lines = (folder / "memory.stat").read_text("ascii").splitlines()
                counts = dict(line.split() for line in lines)
                used -= sum(int(counts.get(name, 0)) for name in reclaimable)
                yield max(0, most - used), f"the limit of {most >> 20:,} MiB of its cgroup"


def _cgroup_folders() -> Iterator[Path]:
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                root = _CGROUPS / controllers
                # In a container the path may be the one that the host sees: the root is then ours.
                inner = root / path.lstrip("/")
                yield root
                yield from (each for each in (inner, *inner.parents) if root in each.parents)


def _address_space() -> Iterator[tuple[int, str]]:
    with suppress(ImportError, OSError, ValueError):
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        if most != resource.RLIM_INFINITY:
            used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * mmap.PAGESIZE
            yield max(0, most - used), f"ulimit -v of {most >> 20:,} MiB"
