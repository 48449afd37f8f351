"""`zero_shot`: an image and prompts to logits and probabilities, by way of the two ensembles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray


class TritonPythonModel:
    """IMAGE, the bytes of a file [1], and TEXTS, UTF-8 [N], to LOGITS and PROBABILITIES, [N].

    Logits are cosines times the logit scale, and probabilities their softmax (Radford et al. 2021,
    figure 3). Models with a logit bias, such as SigLIP, add it to the logits, and probabilities are
    sigmoids, of each prompt by itself. TEXTS may be left out where the repository has labels, whose
    prompts are then meant.
    """

    def initialize(self, args: dict[str, Any]) -> None:
        """Reads the logit scale, the logit bias and the labels."""
        config = json.loads(args["model_config"])
        values = {key: each["string_value"] for key, each in config["parameters"].items()}
        self._logit_scale = float(values["logit_scale"])
        bias = values.get("logit_bias")
        self._logit_bias = None if bias is None else float(bias)
        self._max_batch_size = int(values["max_batch_size"])
        self._prompts = np.array(json.loads(values["prompts"]), dtype=object)
        self._prompt_embeddings: NDArray[np.float32] | None = None

    async def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers each request."""
        return [await self._answer(request) for request in requests]

    async def _answer(self, request: Any) -> Any:
        image = pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy()
        texts = pb_utils.get_input_tensor_by_name(request, "TEXTS")
        try:
            query = await self._embed("image_embedding", "IMAGE", image)
            targets = await self._targets(None if texts is None else texts.as_numpy())
        except pb_utils.TritonModelException as error:
            code = pb_utils.TritonError.INVALID_ARG
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
        logits = self._logit_scale * (query @ targets.T)[0]
        if self._logit_bias is None:
            exponentials = np.exp(logits - logits.max(initial=-np.inf))
            probabilities = exponentials / exponentials.sum()
        else:
            logits += np.float32(self._logit_bias)
            probabilities = 1 / (1 + np.exp(-logits))
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("LOGITS", logits), pb_utils.Tensor("PROBABILITIES", probabilities)]
        )

    async def _targets(self, texts: NDArray[np.object_] | None) -> NDArray[np.float32]:
        if texts is not None and texts.size:
            return await self._embed("text_embedding", "TEXT", texts)
        if not self._prompts.size:
            raise pb_utils.TritonModelException("TEXTS is empty, and this repository has no labels")
        if self._prompt_embeddings is None:
            self._prompt_embeddings = await self._embed("text_embedding", "TEXT", self._prompts)
        return self._prompt_embeddings

    async def _embed(
        self, model: str, name: str, items: NDArray[np.object_]
    ) -> NDArray[np.float32]:
        """Embeddings of length 1, [N, D]."""
        parts = []
        for start in range(0, items.size, self._max_batch_size):
            batch = items.ravel()[start : start + self._max_batch_size].reshape(-1, 1)
            request = pb_utils.InferenceRequest(
                model_name=model,
                requested_output_names=["EMBEDDING"],
                inputs=[pb_utils.Tensor(name, batch)],
            )
            response = await request.async_exec()
            if response.has_error():
                raise pb_utils.TritonModelException(response.error().message())
            parts.append(pb_utils.get_output_tensor_by_name(response, "EMBEDDING").as_numpy())
        embeddings = np.concatenate(parts)
        unit: NDArray[np.float32] = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        return unit
