"""The encoder on PyTorch."""

from __future__ import annotations

from clip_server.executors.base import BaseCLIPEncoder
from clip_server.executors.parameters import EncoderParameters
from clip_server.runtimes.torch import TorchRuntime, has_towers


class CLIPEncoder(BaseCLIPEncoder):
    """Encodes with PyTorch, through open_clip."""

    @staticmethod
    def has_own_graphs(parameters: EncoderParameters) -> bool:
        """See BaseCLIPEncoder."""
        return has_towers(parameters.model_path)

    @classmethod
    def build_runtime(cls, parameters: EncoderParameters, threads: int) -> TorchRuntime:
        """See BaseCLIPEncoder."""
        return TorchRuntime.load(
            parameters.name,
            model_path=parameters.model_path,
            device=parameters.device,
            dtype=parameters.dtype,
            jit=parameters.jit,
            threads=threads,
        )
