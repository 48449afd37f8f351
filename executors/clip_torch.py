"""The encoder on PyTorch, through open_clip."""

from clip_server.executors.base import BaseCLIPEncoder


class CLIPEncoder(BaseCLIPEncoder):
    """Encodes with PyTorch, through open_clip."""

    runtime = "torch"
    parameter_order = (
        "name", "device", "jit", "num_worker_preprocess", "minibatch_size", "access_paths", "dtype",
    )  # fmt: skip
