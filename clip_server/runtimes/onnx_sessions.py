"""Sessions of onnxruntime on one device."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from clip_server import runtimes
from clip_server.errors import ConfigurationError
from clip_server.install import IMPORT_ERRORS, import_failure, install_hint
from clip_server.runtimes import cuda
from clip_server.runtimes.onnx_graph import Graph
from clip_server.runtimes.onnx_tables import Table

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# onnxruntime's level of logging: errors reach us as exceptions.
_LOG_FATAL = 4
# Weights of this many bytes and more are written outside of a model.
_SMALLEST_EXTERNAL = 1024


class SessionError(ConfigurationError):
    """onnxruntime cannot load a model."""


class Sessions:
    """Opens sessions on one device, with no fallback to another."""

    def __init__(self, device: str | None, threads: int | None, precision: str = "fp32") -> None:
        device = _device_for_int8(device) if precision == "int8" else device
        self._ort = _onnxruntime()
        self.threads = threads or _cores()
        self.device = _device(self._ort, device)
        self._has_arena = precision in runtimes.find("onnx").arena_precisions

    def open(
        self, model: Path | bytes, origin: str, arrays: Mapping[str, NDArray[Any]] | None = None
    ) -> Graph:
        """A session of a graph in a file or in memory.

        origin: as in `Graph`. arrays: the weights that the graph refers to by name; none of them
            is used any more when this returns.
        """
        options = self._options()
        if arrays:
            options.add_external_initializers([*arrays], self._values(arrays.values()))
        return self._open(model, origin, options)

    def open_prepared(self, model: Path, origin: str, tables: Sequence[Table] = ()) -> Graph:
        """A session of a graph that `prepare` wrote, whose weights are mapped as they are.

        tables: weights that are not mapped. The session reads them where they are.
        """
        options = self._options()
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        values = self._values(table.values for table in tables)  # which `options` refers to
        for table, value in zip(tables, values, strict=True):
            options.add_initializer(table.name, value)
        return self._open(model, origin, options, tables)

    def prepare(self, model: Path, prepared: Path, origin: str) -> Graph:
        """A session of a graph in a file; also writes the graph as it is computed, with its weights
        in the layout of this processor in `PREPARED.data`."""
        options = self._options()
        options.optimized_model_filepath = str(prepared)
        for setting, value in {
            "save_external_prepacked_constant_initializers": "1",
            "optimized_model_external_initializers_file_name": f"{prepared.name}.data",
            "optimized_model_external_initializers_min_size_in_bytes": str(_SMALLEST_EXTERNAL),
        }.items():
            options.add_session_config_entry(f"session.{setting}", value)
        return self._open(model, origin, options)

    def version(self) -> str:
        """The build of onnxruntime, which the layout of prepared weights depends on."""
        return f"{self._ort.__version__} {self._ort.get_build_info()}"

    def _options(self) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _LOG_FATAL
        # Threads that spin while waiting would compete with preprocessing for cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_cpu_mem_arena = self._has_arena
        # The plan of a batch's activations would be kept for every shape, and fit few batches: how
        # many rows a text tower computes depends on what the texts share.
        options.enable_mem_pattern = False
        return options

    def _values(self, arrays: Iterable[NDArray[Any]]) -> list[Any]:
        """Arrays as onnxruntime's values, without copies."""
        return [self._ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]

    def _run_options(self) -> Any:
        options = self._ort.RunOptions()
        if self._has_arena:
            # After a batch the arena is empty, and returned.
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return options

    def _open(
        self, model: Path | bytes, origin: str, options: Any, tables: Sequence[Table] = ()
    ) -> Graph:
        kind, _, index = self.device.partition(":")
        provider = _PROVIDERS[kind]
        # fp32 is exact: TF32 would round the factors of products to 10 bits.
        settings = {"device_id": index, "use_tf32": "0"} if kind == "cuda" else {}
        source = str(model) if isinstance(model, Path) else model
        try:
            session = self._ort.InferenceSession(source, options, [(provider, settings)])
        except Exception as error:  # onnxruntime's errors have no class of their own
            raise SessionError(f"onnxruntime cannot load the model, {origin}: {error}") from error
        if provider not in session.get_providers():
            raise ConfigurationError(
                f"onnxruntime could not start {provider}: check that the CUDA and cuDNN "
                "libraries it was built for are installed"
            )
        # Or onnxruntime would keep the graph and its weights for a retry on another provider.
        session._model_bytes = session._sess_options = None
        return Graph(session, origin, self._run_options(), tables)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except IMPORT_ERRORS as error:
        raise ConfigurationError(import_failure(error, "ONNX Runtime", "onnx")) from error
    # For programs that imported it before this package set the environment variable.
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def _device(ort: Any, wanted: str | None) -> str:
    """The device to use, as `cpu` or `cuda:0`."""
    kind, _, index = (wanted or "cuda").partition(":")
    if kind not in _PROVIDERS or (index and not index.isdigit()):
        raise ConfigurationError(f"device {wanted!r} is not cpu, cuda or cuda:N")
    if kind == "cpu":
        return "cpu"
    problem = _cuda_problem(ort, int(index or 0))
    if problem and wanted is not None:
        raise ConfigurationError(f"device {wanted!r} cannot be used: {problem}")
    return "cpu" if problem else f"cuda:{index or 0}"


def _device_for_int8(wanted: str | None) -> str:
    """The CPU, the only device with integer products."""
    if wanted not in (None, "cpu"):
        raise ConfigurationError(f"dtype 'int8' runs on the CPU, not on device {wanted!r}")
    return "cpu"


def _cuda_problem(ort: Any, index: int) -> str | None:
    """The reason why CUDA device `index` cannot be used, for people; None if it can."""
    available = ort.get_available_providers()
    if _PROVIDERS["cuda"] not in available:
        return (
            f"the onnxruntime installed here has only {', '.join(available)}; "
            f"pip uninstall onnxruntime, then {install_hint('onnx-gpu')}"
        )
    count = cuda.device_count()
    if count <= index:
        return f"{count} NVIDIA GPUs are visible"
    ort.preload_dlls()  # CUDA's libraries may be Python packages, outside the search path
    return None


def _cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
