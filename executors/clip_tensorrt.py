"""The encoder on TensorRT."""

from __future__ import annotations

from clip_server.executors.base import BaseCLIPEncoder
from clip_server.executors.parameters import EncoderParameters
from clip_server.runtimes.tensorrt import TensorrtRuntime, engine_files


class CLIPEncoder(BaseCLIPEncoder):
    """Encodes with TensorRT."""

    @staticmethod
    def has_own_graphs(parameters: EncoderParameters) -> bool:
        """See BaseCLIPEncoder."""
        return engine_files(parameters.model_path) is not None

    @classmethod
    def build_runtime(cls, parameters: EncoderParameters, threads: int) -> TensorrtRuntime:
        """See BaseCLIPEncoder."""
        return TensorrtRuntime.load(
            parameters.name,
            model_path=parameters.model_path,
            device=parameters.device,
            dtype=parameters.dtype,
            threads=threads,
            batch=parameters.minibatch_size,
        )
