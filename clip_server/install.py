"""How to install what is missing."""

from __future__ import annotations

DISTRIBUTION = "clip-microservice"
# Each brings the server and one runtime.
RUNTIME_EXTRAS = ("onnx", "onnx-gpu", "torch", "tensorrt", "tensorrt-rtx")


def install_hint(extra: str) -> str:
    """The command that installs an extra, from the registry or a checkout, to end a message."""
    return f"pip install '{DISTRIBUTION}[{extra}]' (in a checkout: pip install '.[{extra}]')"


def runtimes_hint() -> str:
    """The command that installs the server, and the extras there are for its runtimes."""
    first, *others = RUNTIME_EXTRAS
    return f"{install_hint(first)}, or one of the extras {', '.join(others)}"
