"""The encoder on ONNX Runtime."""

from clip_server.executors.base import BaseCLIPEncoder


class CLIPEncoder(BaseCLIPEncoder):
    """Encodes with ONNX Runtime."""

    runtime = "onnx"
