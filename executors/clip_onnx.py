"""The encoder on ONNX Runtime."""

from __future__ import annotations

from clip_server.executors.base import BaseCLIPEncoder
from clip_server.executors.parameters import EncoderParameters
from clip_server.models import converted
from clip_server.runtimes.onnx import OnnxRuntime


class CLIPEncoder(BaseCLIPEncoder):
    """Encodes with ONNX Runtime."""

    @staticmethod
    def has_own_graphs(parameters: EncoderParameters) -> bool:
        """See BaseCLIPEncoder."""
        return converted.has_towers(parameters.model_path, "onnx")

    @classmethod
    def build_runtime(cls, parameters: EncoderParameters, threads: int) -> OnnxRuntime:
        """See BaseCLIPEncoder."""
        return OnnxRuntime.load(
            parameters.name,
            model_path=parameters.model_path,
            device=parameters.device,
            dtype=parameters.dtype,
            threads=threads,
        )
