"""`clip_textual` and `clip_visual` without Triton's ONNX Runtime backend: the same graph, run by
onnxruntime in the python backend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The tower's input to `embedding`, float32 [B, D]."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Opens the session, on the GPU of this instance if it has one."""
        config = json.loads(args["model_config"])
        self._input = config["input"][0]["name"]
        self._session = onnxruntime.InferenceSession(
            str(Path(__file__).with_name("model.onnx")), providers=_providers(args)
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Computes the requests of a batch together: their shapes are alike."""
        batches = [
            pb_utils.get_input_tensor_by_name(request, self._input).as_numpy()
            for request in requests
        ]
        (embeddings,) = self._session.run(None, {self._input: np.concatenate(batches)})
        ends = np.cumsum([len(batch) for batch in batches])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("embedding", rows)])
            for rows in np.split(embeddings.astype(np.float32, copy=False), ends)
        ]


def _providers(args: dict[str, Any]) -> list[Any]:
    if args["model_instance_kind"] != "GPU":
        return ["CPUExecutionProvider"]
    return [("CUDAExecutionProvider", {"device_id": args["model_instance_device_id"]})]
