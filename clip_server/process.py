"""What every process of the server does about its parent and the outside world."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Makes this process get SIGTERM when its parent ends, however that ends (Linux only).

    Jina's own clean-up runs in the parent, so a parent that is killed would leave its
    children behind, holding their ports.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the call above took hold
        os.kill(os.getpid(), signal.SIGTERM)


def stay_silent() -> None:
    """Keeps every library from calling home. Call it before Jina is imported."""
    os.environ["JINA_OPTOUT_TELEMETRY"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("DO_NOT_TRACK", "1")
