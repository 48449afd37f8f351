"""The slow encoder on a device that never comes back from a batch, once, when a file named `stuck`
appears in the server's working directory."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from slow_executor import CLIPEncoder as SlowEncoder
from slow_executor import SlowRuntime

from clip_server.executors.parameters import EncoderParameters


class StuckRuntime(SlowRuntime):
    """See the module."""

    def encode_text(self, tokens: NDArray[Any]) -> NDArray[np.float32]:
        with suppress(FileNotFoundError):
            Path("stuck").unlink()
            time.sleep(3600)
        return super().encode_text(tokens)


class CLIPEncoder(SlowEncoder):
    """See the module."""

    @classmethod
    def build_runtime(cls, parameters: EncoderParameters, threads: int) -> SlowRuntime:
        del parameters, threads
        return StuckRuntime()
