"""The encoder on PyTorch, through open_clip."""

from clip_server.executors.base import BaseCLIPEncoder


class CLIPEncoder(BaseCLIPEncoder):
    """Encodes with PyTorch, through open_clip."""

    runtime = "torch"
