"""CLIP as a microservice: embeddings of texts and images."""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_server.launch.jina_flow import Flow as Flow

try:
    __version__ = version("clip-microservice")
except PackageNotFoundError:
    __version__ = "0.0.0"

# No dependency calls home or keeps records of its use. They read these when they are imported,
# which happens after this package's import, in every command and in every process.
os.environ |= {
    "ORT_DISABLE_TELEMETRY": "1",
    "JINA_OPTOUT_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}

_CHECKOUT = Path(__file__).parent.parent
_BESIDE = ("clip_server.executors", "clip_server.flows")


class _CheckoutFinder:
    """Finds executors/ and flows/ beside this folder, where they lie in a checkout.

    Python that is started there finds this folder before an installed package.
    """

    @staticmethod
    def find_spec(name: str, *_: object) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(_CHECKOUT)]) if name in _BESIDE else None


if (_CHECKOUT / "flows" / "onnx-flow.yml").is_file():
    # Last: what is installed is found first.
    sys.meta_path.append(_CheckoutFinder)


def __getattr__(name: str) -> Any:
    """`Flow`, for which Jina is imported, once it is asked for."""
    if name != "Flow":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from clip_server.launch.jina_flow import Flow

    return Flow
