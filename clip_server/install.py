"""What is installed, and how to install what is missing."""

from __future__ import annotations

from importlib.util import find_spec

DISTRIBUTION = "clip-microservice"
# Each extra brings the server and one runtime.
RUNTIME_EXTRAS = ("onnx", "onnx-gpu", "torch", "tensorrt", "tensorrt-rtx")
# The packages of each runtime; where several are joined by |, any of them.
_PACKAGES = {
    "onnx": ["onnxruntime", "onnx"],
    "torch": ["torch", "open_clip"],
    "tensorrt": ["tensorrt|tensorrt_rtx", "pycuda", "onnx"],
}


def missing_package(runtime: str) -> str | None:
    """The first package that a runtime needs and that is not installed; None: all are."""
    for packages in _PACKAGES[runtime]:
        names = packages.split("|")
        if not any(map(find_spec, names)):
            return names[0]
    return None


def install_hint(extra: str) -> str:
    """The command that installs an extra, from the registry or a checkout, to end a message."""
    return f"pip install '{DISTRIBUTION}[{extra}]' (in a checkout: pip install '.[{extra}]')"


def runtimes_hint() -> str:
    """The command that installs the server, and the extras there are for its runtimes."""
    first, *others = RUNTIME_EXTRAS
    return f"{install_hint(first)}, or one of the extras {', '.join(others)}"
