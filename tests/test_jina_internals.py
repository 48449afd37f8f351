"""The faults of unpatched Jina, each of which a patch in launch/jina_internals.py works around.

A test that fails here names a patch that is no longer needed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import needs_ipv6, needs_torch

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


def test_it_creates_folders_in_the_home_directory(tmp_path: Path) -> None:
    unpatched("", HOME=str(tmp_path))
    assert list(tmp_path.iterdir())


@needs_torch
def test_it_imports_torch() -> None:
    assert "True" in unpatched("import sys; print('torch' in sys.modules)")


@needs_ipv6
def test_its_search_for_free_ports_fails_on_ipv6() -> None:
    code = (
        "from jina.helper import is_port_free\n"
        "try: is_port_free('::1', 12345)\n"
        "except OSError: print('failed')"
    )
    assert "failed" in unpatched(code)


def test_it_asks_the_internet_for_this_machines_address() -> None:
    code = (
        "import urllib.request\n"
        "from jina.orchestrate.orchestrator import get_public_ip\n"
        "urllib.request.urlopen = lambda request, **_: print(request.full_url)\n"
        "get_public_ip()"
    )
    assert unpatched(code).count("https://") >= 1


def test_its_document_without_annotations_refers_to_itself() -> None:
    code = (
        "from jina.serve.executors import LegacyDocumentJina\n"
        "print(LegacyDocumentJina.__fields__['chunks'].outer_type_)"
    )
    assert "LegacyDocument" in unpatched(code)


def test_its_parser_ends_the_process() -> None:
    code = (
        "from jina.parsers import set_deployment_parser\n"
        "try: set_deployment_parser().parse_args(['--replicas', 'two'])\n"
        "except SystemExit: print('ended')"
    )
    assert "ended" in unpatched(code)
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
    process = subprocess.Popen(
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


def test_its_gateway_makes_a_class_of_each_schema() -> None:
    code = (
        "from docarray import BaseDoc\n"
        "from jina.serve.runtimes.gateway.graph import topology_graph\n"
        "class Image(BaseDoc):\n"
        "    blob: bytes\n"
        "made = topology_graph.create_base_doc_from_schema(Image.schema(), 'Image', {})\n"
        "print(made.__fields__['blob'].type_.__name__)"
    )
    # It cannot hold the image.
    assert unpatched(code).strip() == "str"


def test_it_hides_why_documents_cannot_be_read() -> None:
    code = (
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
        "    print(type(error).__name__)"
    )
    # The gateway learns neither whose fault it is nor, from its message, what was wrong.
    assert unpatched(code).strip() == "ValidationError"
