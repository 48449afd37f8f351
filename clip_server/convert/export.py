"""Exports a torch tower as an ONNX graph, with torch's own exporter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from clip_server.errors import ConfigurationError
from clip_server.install import install_hint
from clip_server.towers.builder import OPSET

_OUTPUT = "embedding"


def export(tower: nn.Module, name: str, example: NDArray[Any], axes: list[str]) -> onnx.ModelProto:
    """Exports a tower in float32.

    name: of its input.
    example: a batch of at least two items, for its shape.
    axes: names of the first axes of the input, which become dynamic.

    Raises:
        ConfigurationError: the exporter is not installed, or cannot export the tower.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"torch cannot export graphs: {install_hint('convert')}"
        ) from error
    with _quietly():
        try:
            program: Any = torch.onnx.export(
                tower.eval(),
                (torch.from_numpy(example),),
                dynamo=True,
                opset_version=OPSET,
                input_names=[name],
                dynamic_shapes=(dict(enumerate(axes)),),
                verbose=False,
            )
        except Exception as error:  # the exporter's own, of many kinds
            raise ConfigurationError(f"torch cannot export this model: {error}") from error
    _name_output(program.model.graph)
    model: onnx.ModelProto = program.model_proto
    return model


def _name_output(graph: Any) -> None:
    """Names the output, which the exporter cannot do if an inner value has that name."""
    for node in graph:
        for value in node.outputs:
            if value.name == _OUTPUT:
                value.name = f"{_OUTPUT}.inner"
    graph.outputs[0].name = _OUTPUT


@contextmanager
def _quietly() -> Iterator[None]:
    """Silences the exporter's own log."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
