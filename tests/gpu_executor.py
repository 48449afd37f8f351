"""An encoder that says which GPUs it may see, and computes nothing."""

from __future__ import annotations

import os
import sys

from slow_executor import CLIPEncoder as SlowEncoder
from slow_executor import SlowRuntime

from clip_server.executors.parameters import EncoderParameters


class CLIPEncoder(SlowEncoder):
    """See the module."""

    @classmethod
    def build_runtime(cls, parameters: EncoderParameters, threads: int) -> SlowRuntime:
        print(f"sees GPU {os.environ['CUDA_VISIBLE_DEVICES']}.", file=sys.stderr, flush=True)
        return super().build_runtime(parameters, threads)
