"""`python stock_flow.py MODULE PORT PROTOCOL EXECUTOR`: a Flow in Python, as Jina's docs have it.

MODULE is where the Flow comes from, `jina` or `clip_server`.

EXECUTOR is `encoder`, clip-as-service's own way to try its server; `unseen`, the same by the name
of a file; `failing`, the same before an executor of the user's own; or `asking`, one that asks
another server with our client (SERVER in the environment).
It ends with its standard input.
"""

import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

# ruff: noqa: E402

warnings.filterwarnings("ignore")
os.environ["JINA_OPTOUT_TELEMETRY"] = "1"
os.environ["JINA_LOG_LEVEL"] = "ERROR"

import jina.orchestrate.orchestrator
from docarray import DocList
from jina import Executor, requests

from clip_server.executors.clip_onnx import CLIPEncoder
from clip_server.executors.documents import ClipDoc

# Asks three servers in the Internet for this machine's address.
jina.orchestrate.orchestrator.get_public_ip = lambda *_, **__: None


class Failing(Executor):
    """Fails each request."""

    @requests
    def fail(self, docs: DocList[ClipDoc], **_: Any) -> DocList[ClipDoc]:
        del docs
        raise ZeroDivisionError


class Asking(Executor):
    """Has another server encode its documents."""

    def __init__(self, server: str = "", **arguments: Any) -> None:
        super().__init__(**arguments)
        from clip_client import Client

        self._client = Client(server=server)

    @requests
    async def process(self, docs: DocList[ClipDoc], **_: Any) -> DocList[ClipDoc]:
        return await self._client.aencode(docs, batch_size=2)


def main() -> None:
    module, port, protocol, name = sys.argv[1:]
    encoder = {"uses": CLIPEncoder, "uses_with": {"name": "embedded"}}
    executors = {
        "encoder": [encoder],
        # Jina's Flow does not see the class that it is given by the name of a file.
        "unseen": [{"uses": str(Path(__file__).with_name("unseen_encoder.yml"))}],
        "failing": [encoder, {"uses": Failing}],
        "asking": [{"uses": Asking, "uses_with": {"server": os.environ.get("SERVER")}}],
    }[name]
    flow = import_module(module).Flow(port=int(port), protocol=protocol, host="127.0.0.1")
    for number, executor in enumerate(executors):
        flow = flow.add(**executor, name=f"executor{number}", host="127.0.0.1")
    with flow:
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
