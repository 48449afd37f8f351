"""The encoder on TensorRT."""

from clip_server.executors.base import BaseCLIPEncoder


class CLIPEncoder(BaseCLIPEncoder):
    """Encodes with TensorRT."""

    runtime = "tensorrt"
