"""Halves batches that do not fit into the device's memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_server.runtimes.protocol import OutOfMemoryError

log = logging.getLogger(__name__)


class Halving:
    """Runs batches; one that does not fit into memory is halved, and both halves are run.

    run: computes embeddings [B, D] of a batch [B, ...]; raises OutOfMemoryError.
    splits: number of batches that were halved.
    """

    def __init__(self, run: Callable[[NDArray[Any]], NDArray[np.float32]]) -> None:
        self._run = run
        self.splits = 0

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Computes a batch's embeddings, [B, D].

        Raises:
            OutOfMemoryError: one item alone does not fit.
        """
        try:
            return self._run(batch)
        except OutOfMemoryError as error:
            if len(batch) == 1:
                raise
            reason = str(error)
        # Outside the handler and without the exception, which keeps alive what the failed attempt
        # allocated, as a log record that is kept would.
        log.warning("out of memory for a batch of %d, which is halved: %s", len(batch), reason)
        self.splits += 1
        half = len(batch) // 2
        return np.concatenate([self(batch[:half]), self(batch[half:])])
