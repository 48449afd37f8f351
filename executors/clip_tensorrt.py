"""The encoder on TensorRT."""

from clip_server.executors.base import BaseCLIPEncoder


class CLIPEncoder(BaseCLIPEncoder):
    """Encodes with TensorRT."""

    runtime = "tensorrt"
    parameter_order = (
        "name", "device", "num_worker_preprocess", "minibatch_size", "access_paths", "dtype",
    )  # fmt: skip
