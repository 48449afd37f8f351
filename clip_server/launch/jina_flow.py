"""Flows in Python: `clip_server.Flow`."""

from __future__ import annotations

from typing import Any

from clip_server.launch import jina_internals
from clip_server.launch.flow_executors import EXECUTOR_DEFAULTS

jina_internals.import_jina()

import jina  # noqa: E402


class Flow(jina.Flow):
    """A Jina Flow that our client can reach, to be started in Python.

        from clip_server import Flow
        from clip_server.executors.clip_onnx import CLIPEncoder

        with Flow(port=51000).add(uses=CLIPEncoder, uses_with={"name": "embedded"}) as flow:
            flow.block()

    It has our gateway, unless `uses` or `config_gateway(uses=...)` names another one, and its
    executors listen on loopback only. Otherwise it is used as `jina.Flow` is.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if "uses" not in self._gateway_kwargs:
            self._gateway_kwargs |= jina_internals.GATEWAY_DEFAULTS

    def add(self, **options: Any) -> Flow:
        """Adds an executor as `jina.Flow.add` does."""
        return super().add(**{**EXECUTOR_DEFAULTS, **options})  # type: ignore[no-any-return]
