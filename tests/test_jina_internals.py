"""The faults of unpatched Jina, each of which a patch in launch/jina_internals.py works around.

A test that fails here names a patch that is no longer needed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import needs_ipv6, needs_torch
from guard import popen

from clip_server.launch import jina_internals

# Not `jina_internals`, and nothing else of this project.
JINA = "import warnings\nwarnings.simplefilter('ignore')\nimport jina\n"


def unpatched(code: str, seconds: float = 60, **environment: str) -> str:
    """The output of code that runs with Jina as it is, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", JINA + code],
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**os.environ, "JINA_OPTOUT_TELEMETRY": "1", **environment},
        check=True,
    )
    return done.stdout


# What each fault is, the code that shows it, and what is in its output.
FAULTS = {
    "it imports torch": ("import sys; print('torch' in sys.modules)", "True"),
    "its search for free ports fails on IPv6": (
        "from jina.helper import is_port_free\n"
        "try: is_port_free('::1', 12345)\n"
        "except OSError: print('failed')",
        "failed",
    ),
    "its search for free ports knows of none that processes share": (
        "import socket\n"
        "from jina.helper import is_port_free\n"
        "first = socket.socket()\n"
        "first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n"
        "first.bind(('127.0.0.1', 0))\n"
        "first.listen()\n"
        "print(is_port_free(*first.getsockname()))",
        "False",
    ),
    "its document without annotations refers to itself": (
        "from jina.serve.executors import LegacyDocumentJina\n"
        "print(LegacyDocumentJina.__fields__['chunks'].outer_type_)",
        "LegacyDocument",
    ),
    "its parser ends the process": (
        "from jina.parsers import set_deployment_parser\n"
        "try: set_deployment_parser().parse_args(['--replicas', 'two'])\n"
        "except SystemExit: print('ended')",
        "ended",
    ),
    # It cannot hold the image.
    "its gateway makes a class of each schema": (
        "from docarray import BaseDoc\n"
        "from jina.serve.runtimes.gateway.graph import topology_graph\n"
        "class Image(BaseDoc):\n"
        "    blob: bytes\n"
        "made = topology_graph.create_base_doc_from_schema(Image.schema(), 'Image', {})\n"
        "print(made.__fields__['blob'].type_.__name__)",
        "str",
    ),
    # The gateway learns neither whose fault it is nor, from its message, what was wrong.
    "it hides why documents cannot be read": (
        "from docarray import BaseDoc, DocList\n"
        "from docarray.base_doc import AnyDoc\n"
        "from jina.types.request.data import DataRequest\n"
        "class Parent(BaseDoc):\n"
        "    text: str\n"
        "request = DataRequest()\n"
        "request.data.docs = DocList[AnyDoc]([AnyDoc(text=b'\\xff')])\n"
        "request.document_array_cls = DocList[Parent]\n"
        "try:\n"
        "    request.docs\n"
        "except Exception as error:\n"
        "    print(type(error).__name__)",
        "ValidationError",
    ),
    "it asks the internet for this machine's address": (
        "import urllib.request\n"
        "from jina.orchestrate.orchestrator import get_public_ip\n"
        "urllib.request.urlopen = lambda request, **_: print(request.full_url)\n"
        "get_public_ip()",
        "https://",
    ),
}
MARKS = {
    "it imports torch": needs_torch,
    "its search for free ports fails on IPv6": needs_ipv6,
}


@dataclass
class Shown:
    """The outputs of all faults, by name, and the home directory in which they were shown."""

    home: Path
    outputs: dict[str, str]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """In one process: to import Jina takes seconds."""
    home = tmp_path_factory.mktemp("home")
    code = "\n".join(f"print({f'# {name}'!r})\n{code}" for name, (code, _) in FAULTS.items())
    sections = (part.partition("\n") for part in unpatched(code, HOME=str(home)).split("# ")[1:])
    return Shown(home, {name: output for name, _, output in sections})


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=MARKS.get(name, ()), id=name) for name in FAULTS]
)
def test_a_fault(shown: Shown, fault: str) -> None:
    _, expected = FAULTS[fault]
    assert expected in shown.outputs[fault]


def test_it_creates_folders_in_the_home_directory(shown: Shown) -> None:
    assert list(shown.home.iterdir())


def test_its_options_are_checked_before_its_parser_ends_the_process() -> None:
    with pytest.raises(ValueError, match="replicas"):
        jina_internals.check_option(jina_internals.parser("deployment"), "replicas", "two")


def test_its_executors_offer_no_way_to_add_a_service() -> None:
    from jina.serve.runtimes.servers.grpc import GRPCServer

    arguments = GRPCServer.__init__.__annotations__
    assert set(arguments) == {"grpc_server_options", "ssl_keyfile", "ssl_certfile", "proxy"}


FLOW = """
import multiprocessing, os, signal, sys, tempfile, threading, time
from pathlib import Path
from jina import Executor, Flow, requests

class Slow(Executor):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        if "die" in sys.argv:
            os.kill(os.getpid(), 9)
    @requests
    def slow(self, docs, **_):
        time.sleep(2)
        return docs

flow = Flow(port=0, host="127.0.0.1").add(uses=Slow, host="127.0.0.1")
"""


@pytest.mark.slow
def test_it_prints_a_banner_and_leaves_a_folder_behind(tmp_path: Path) -> None:
    printed = unpatched(FLOW + "with flow: pass", TMPDIR=str(tmp_path))
    assert "Flow is ready" in printed
    assert list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_waits_forever_for_a_process_that_died() -> None:
    code = FLOW + "sys.argv.append('die')\nflow.start()"
    process = popen(
        [sys.executable, "-c", JINA + code],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "JINA_OPTOUT_TELEMETRY": "1"},
        start_new_session=True,
    )
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(20)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_addresses_of_replicas() -> None:
    jina_internals.import_jina()
    from jina import Flow

    flow: Any = Flow(port=12345).add(name="a", replicas=2).add(name="b").build()
    assert jina_internals.flow_processes(flow).keys() == {"gateway", "a", "b"}
    addresses = jina_internals.executor_addresses(flow)
    assert {name: len(each) for name, each in addresses.items()} == {"a": 2, "b": 1}
