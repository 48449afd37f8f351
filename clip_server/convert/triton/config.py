"""Triton's model configurations (`config.pbtxt`), as text-format protobuf.

The fields are those of `model_config.proto` in triton-inference-server/common.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

# What runs the towers.
Backend = Literal["onnxruntime", "tensorrt", "python"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


class Enum(str):
    """A value that is written without quotes, such as TYPE_FP32."""

    __slots__ = ()


STRING, BOOL, FP32 = Enum("TYPE_STRING"), Enum("TYPE_BOOL"), Enum("TYPE_FP32")
CPU, GPU, AUTO = Enum("KIND_CPU"), Enum("KIND_GPU"), Enum("KIND_AUTO")
Fields = Mapping[str, Any]


def to_text(fields: Fields) -> str:
    """The configuration as a file holds it."""
    return "".join(f"{line}\n" for line in _lines(fields, ""))


def tensor(name: str, kind: Enum, *dims: int, **more: Any) -> Fields:
    """An input or output. dims: without the batch's; -1 may have any length."""
    return {"name": name, "data_type": kind, "dims": list(dims), **more}


def parameters(values: Mapping[str, object]) -> list[Fields]:
    """Strings that a model, or its client, reads from the configuration."""
    return [{"key": key, "value": {"string_value": str(value)}} for key, value in values.items()]


def ensemble_steps(*steps: tuple[str, Mapping[str, str], Mapping[str, str]]) -> list[Fields]:
    """The models of an ensemble, in their order.

    Each a model's name, and its inputs and outputs: their names there to those in the ensemble.
    """
    return [
        {
            "model_name": model,
            "model_version": -1,
            "input_map": _entries(inputs),
            "output_map": _entries(outputs),
        }
        for model, inputs, outputs in steps
    ]


def dynamic_batching(preferred: Sequence[int]) -> Fields:
    """Batches whatever is queued, without waiting for more."""
    return {"preferred_batch_size": list(preferred), "max_queue_delay_microseconds": 0}


def _entries(names: Mapping[str, str]) -> list[Fields]:
    return [{"key": key, "value": value} for key, value in names.items()]


def _lines(fields: Fields, indent: str) -> Iterator[str]:
    for name, value in fields.items():
        is_list = isinstance(value, (list, tuple))
        if is_list and value and isinstance(value[0], Mapping):
            for each in value:
                yield from _message(name, each, indent)
        elif is_list:
            yield f"{indent}{name}: [ {', '.join(map(_scalar, value))} ]"
        elif isinstance(value, Mapping):
            yield from _message(name, value, indent)
        else:
            yield f"{indent}{name}: {_scalar(value)}"


def _message(name: str, fields: Fields, indent: str) -> Iterator[str]:
    yield f"{indent}{name} {{"
    yield from _lines(fields, f"{indent}  ")
    yield f"{indent}}}"


def _scalar(value: object) -> str:
    # JSON writes strings, numbers and booleans as protobuf's text format reads them, non-ASCII
    # characters apart: protobuf knows no \u.
    return str(value) if isinstance(value, Enum) else json.dumps(value, ensure_ascii=False)
