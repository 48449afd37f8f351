"""The encoder on ONNX Runtime, which loads no model while a file named `hold` is in the server's
working directory."""

from __future__ import annotations

import time
from pathlib import Path

from clip_server.executors.clip_onnx import CLIPEncoder as OnnxEncoder
from clip_server.executors.parameters import EncoderParameters
from clip_server.runtimes.protocol import Runtime


class CLIPEncoder(OnnxEncoder):
    """See the module."""

    @classmethod
    def build_runtime(cls, parameters: EncoderParameters, threads: int) -> Runtime:
        while Path("hold").exists():
            time.sleep(0.02)
        return super().build_runtime(parameters, threads)
