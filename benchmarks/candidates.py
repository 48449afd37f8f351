"""Ways of running a tower that may be faster on a GPU than those of the runtimes.

Nothing here has been measured yet. `python -m benchmarks.gpu --candidates` puts it beside the
runtimes; what is faster there, and as exact, belongs into these. docs/gpu.md lists those that were
measured, and what became of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from clip_server.model_card import Precision
from clip_server.runtimes import tensorrt_engines
from clip_server.runtimes.cuda import Gpu
from clip_server.runtimes.protocol import Runtime
from clip_server.runtimes.tensorrt import EngineTower, TensorrtRuntime


def named(device: str) -> dict[str, Callable[[Path], Runtime]]:
    """Every candidate of a device, by name; each is made of a checkpoint's folder."""
    if device.startswith("cpu"):
        return {}
    return {"tensorrt cuda-graphs fp16": partial(_cuda_graphs, precision="fp16", device=device)}


def _cuda_graphs(checkpoint: Path, precision: Precision, device: str) -> Runtime:
    """TensorRT-RTX's own capture of each shape's kernels in a graph, launched as one."""

    class GraphedTower(EngineTower):
        def _new_context(self) -> Any:
            config = self._engine.create_runtime_config()
            strategies = tensorrt_engines.library().CudaGraphStrategy
            config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE
            return self._engine.create_execution_context(config)

    class GraphedRuntime(TensorrtRuntime):
        @staticmethod
        def _tower(gpu: Gpu, plan: bytes, origin: str) -> EngineTower:
            return GraphedTower(gpu, plan, origin)

    return GraphedRuntime.load("", model_path=checkpoint, device=device, precision=precision)
