"""The base of the preprocessing models: items in, arrays out, and errors that name their items.

Triton's python backend finds this module, and the code of clip_server that the repository carries,
because it appends the folders of a model and of its version to the search path.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import triton_python_backend_utils as pb_utils

from clip_server.errors import ItemError

VERSION = Path(__file__).parent


class PreprocessingModel(ABC):
    """Preprocesses the items of each request in a few threads.

    A request gets a response of its own, so an item that cannot be read fails its request and no
    other of the batch. input: the name of the tensor of items, [B, 1].
    """

    input: ClassVar[str]

    def initialize(self, args: dict[str, Any]) -> None:
        """Reads the card of the model."""
        del args
        self.card = json.loads((VERSION / "card.json").read_text("utf-8"))
        self._threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers a batch of requests, in their order."""
        begun = [
            [self._threads.submit(self._prepared, item) for item in self._items(request)]
            for request in requests
        ]
        return [self._respond([each.result() for each in futures]) for futures in begun]

    @abstractmethod
    def prepare(self, item: bytes) -> Any:
        """One item; raises ItemError."""

    @abstractmethod
    def outputs(self, prepared: list[Any]) -> list[Any]:
        """The output tensors of a request's items."""

    def _items(self, request: Any) -> list[bytes]:
        tensor = pb_utils.get_input_tensor_by_name(request, self.input)
        items: list[bytes] = tensor.as_numpy().ravel().tolist()
        return items

    def _prepared(self, item: bytes) -> Any:
        try:
            return self.prepare(item)
        except ItemError as error:
            return error

    def _respond(self, prepared: list[Any]) -> Any:
        errors = [(i, each) for i, each in enumerate(prepared) if isinstance(each, ItemError)]
        if not errors:
            return pb_utils.InferenceResponse(self.outputs(prepared))
        # Our client reads these lines, to send the other items again.
        lines = "\n".join(f"item {index}: {error}" for index, error in errors)
        code = pb_utils.TritonError.INVALID_ARG
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(lines, code))
