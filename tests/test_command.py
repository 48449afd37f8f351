"""The command: starts soon, says what is wrong, leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import (
    GPU_EXECUTOR,
    PATIENCE_SECONDS,
    SLOW_EXECUTOR,
    Server,
    Start,
    eventually,
    flow,
    free_ports,
    is_alive,
    needs_ipv6,
)

from clip_client import Client
from clip_client.errors import ClipError
from clip_server.__main__ import main
from clip_server.launch.overrides import override_encoders

LARGE = 300  # items of a request, which take half a second


def run(
    *arguments: str, stdin: str | None = None, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command, for cases in which it ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "clip_server", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
    )


Capture = pytest.CaptureFixture[str]
Refused = Callable[[dict[str, Any]], str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> Refused:
    """What the command says of a flow it does not start: one message, no traceback."""

    def refused(spec: dict[str, Any]) -> str:
        monkeypatch.setattr("sys.stdin", StringIO(yaml.safe_dump(spec)))
        assert main(["-i"]) == 1
        said = capfd.readouterr().err
        assert said.startswith("clip_server: ")
        assert "Traceback" not in said
        return said

    return refused


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def listens(process: psutil.Process, ports: list[int]) -> bool:
    return any(
        connection.laddr.port in ports
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    )


def assert_gone(family: list[psutil.Process], ports: list[int]) -> None:
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_SECONDS)
    assert not alive
    assert eventually(lambda: not any(map(is_listening, ports)))


def test_no_hub_reachable(tmp_path: Path) -> None:
    """The hub is a port nobody listens on; the cache is empty."""
    done = run(
        *("onnx-flow.yml", "--port", "0"),
        HF_ENDPOINT=f"http://127.0.0.1:{free_ports(1)[0]}",
        HF_HOME=str(tmp_path),
        CLIP_MODEL="ViT-B-32::openai",
    )
    assert done.returncode == 1
    for word in ("open_clip_model.safetensors", "127.0.0.1", str(tmp_path), "embedded"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_wrong_is_said_at_once(refused: Refused, tmp_path: Path) -> None:
    assert "named 'ViT-B/23'" in refused(flow(name="ViT-B/23"))
    assert "no checkpoint" in refused(flow(model_path=str(tmp_path / "nowhere")))
    done = run("nowhere.yml")
    assert done.returncode == 1
    assert "onnx-flow.yml" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "ViT-B/23"], "named 'ViT-B/23'"),
        (["--model", "embedded", "--dtype", "fp17"], "fp17"),
        (["--model", "embedded", "--device", "gpu-of-mine"], "gpu-of-mine"),
    ],
)
def test_options_override_the_flow(options: list[str], message: str, capfd: Capture) -> None:
    assert main(["onnx-flow.yml", "--port", "0", *options]) == 1
    assert message in capfd.readouterr().err


_ONNX = "clip_server.executors.clip_onnx"
# Encoders of the built-in model as flows write them.
_WRITTEN = (
    {"uses": "CLIPEncoder", "py_modules": [_ONNX]},
    {"uses": "CLIPEncoder", "uses_with": {"name": "embedded"}, "py_modules": [_ONNX]},
    {"uses": f"{_ONNX}.CLIPEncoder", "uses_with": {"name": "embedded"}},
    {**flow(ports=[0, 0, 0])["executors"][0], "uses_with": {"name": "embedded"}},
    {"uses": "own.yml"},
    {"uses": "own.yml", "uses_with": {"model-path": "/nowhere"}, "py_modules": [_ONNX]},
    {"uses": "tagged.yml"},
)


def refusal(
    folder: Path, executors: Sequence[Mapping[str, Any]], capfd: Capture, *options: str
) -> str:
    """What the command says about a flow that it does not serve, with options."""
    (folder / "own.yml").write_text(
        f"jtype: CLIPEncoder\nwith: {{name: embedded, model_path: /nowhere}}\n"
        f"metas: {{py_modules: {_ONNX}}}\n"
    )
    (folder / "tagged.yml").write_text(f"!CLIPEncoder\nmetas:\n  py_modules: [{_ONNX}]\n")
    spec = {"jtype": "Flow", "executors": [dict(each) for each in executors]}
    (folder / "flow.yml").write_text(yaml.safe_dump(spec))
    assert main([str(folder / "flow.yml"), "--port", "0", *options]) == 1
    return capfd.readouterr().err


@pytest.mark.parametrize("executor", _WRITTEN)
def test_options_override_an_encoder_however_it_is_written(
    executor: dict[str, Any], tmp_path: Path, capfd: Capture
) -> None:
    executors = [{"name": "clip", **executor}]
    for name in ("ViT-B/23", "clip=ViT-B/23"):
        assert "named 'ViT-B/23'" in refusal(tmp_path, executors, capfd, "--model", name)
    options = ("--model", "embedded", "--dtype", "fp17")
    assert "fp17" in refusal(tmp_path, executors, capfd, *options)


def test_of_several_encoders_an_option_names_one(tmp_path: Path, capfd: Capture) -> None:
    def refused(*options: str) -> str:
        executors = [{"name": "first", "uses": "own.yml"}, {"uses": "tagged.yml"}]
        return refusal(tmp_path, executors, capfd, *options)

    said = refused("--model", "ViT-B/32")
    assert "2 encoders, first, executor1" in said
    assert "--model first=ViT-B/32 or --model executor1=ViT-B/32" in said
    assert "no executor of this flow is named third; it has first, executor1" in refused(
        "--model", "third=embedded"
    )
    models = ("--model", "first=embedded", "--model", "executor1=ViT-B/23")
    assert "named 'ViT-B/23'" in refused(*models)
    good = ("--model", "first=embedded", "--model", "executor1=embedded")
    for devices in (["odd"], ["cpu", "executor1=odd"], ["executor1=odd", "cpu"]):
        given = [word for device in devices for word in ("--device", device)]
        assert "odd" in refused(*good, *given)


def test_encoders_of_one_modality_share_a_model() -> None:
    """The one that the flow names is forgotten, with all that is about it."""
    own = {"pretrained_model_name_or_path": "a", "base-tokenizer-model": "a", "batch_size": 8}
    executors = [
        {"uses": {"jtype": f"CLIP{kind}Encoder", "with": dict(own)}} for kind in ("Image", "Text")
    ]
    override_encoders({"executors": executors}, {"model": ["b"], "dtype": ["executor1=int8"]})
    for executor, dtype in zip(executors, ({}, {"dtype": "int8"}), strict=True):
        assert executor["uses_with"] == {"name": "b", **dtype}
        kept = {"pretrained_model_name_or_path": "a", "batch_size": 8}
        assert executor["uses"]["with"] == kept  # `name` goes before its alias


def test_options_for_a_flow_without_encoders(tmp_path: Path, capfd: Capture) -> None:
    executors = [{"name": "mine", "uses": {"jtype": "Mine", "metas": {"py_modules": "mine.py"}}}]
    said = refusal(tmp_path, executors, capfd, "--device", "cpu")
    assert "no CLIPEncoder" in said
    assert "EXECUTOR is mine" in said


def test_a_device_that_is_not_there() -> None:
    """Never silently another one."""
    spec = flow(device="cuda")
    spec["executors"][0]["replicas"] = 2
    done = run("-i", stdin=yaml.safe_dump(spec), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "device 'cuda' cannot be used" in done.stderr
    # Though two replicas say it, and Jina that they could not start.
    assert (done.stdout.strip(), done.stderr.count("\n")) == ("", 1)


@pytest.mark.slow
def test_a_missing_extra(tmp_path: Path) -> None:
    """An import that is made to fail, as where the package is not installed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nfor name in os.environ['MISSING'].split(): sys.modules[name] = None\n"
    )

    def without(name: str, runtime: str = "onnx") -> str:
        spec = yaml.safe_dump(flow(runtime))
        done = run("-i", stdin=spec, PYTHONPATH=str(tmp_path), MISSING=name)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "pip install 'clip-microservice[onnx]'" in without("onnxruntime")
    assert "pip install 'clip-microservice[torch]'" in without("torch", "torch")
    # Whatever runtime is wanted.
    assert "onnx-gpu, tensorrt, tensorrt-rtx, torch" in without("jina")
    # The default flow, of which another runtime is installed.
    missing = {"PYTHONPATH": str(tmp_path), "MISSING": "torch", "CLIP_MODEL": "embedded"}
    said = run("--port", "0", **missing).stderr
    assert "python -m clip_server onnx-flow.yml" in said
    assert said.count("\n") == 1


def test_clip_as_service_installed_beside_it(tmp_path: Path) -> None:
    """Both own the folders clip_client/ and clip_server/, so uninstalling it would break this."""
    for name in ("clip_client", "clip_server"):
        folder = tmp_path / f"{name}-0.8.3.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.8.3\n")
        (folder / "RECORD").write_text(f"{name}/__init__.py,,\n{name}/other.py,,\n")
    assert "clip-as-service" not in run("nowhere.yml").stderr
    said = run("nowhere.yml", PYTHONPATH=str(tmp_path)).stderr
    assert "clip-client and clip-server of clip-as-service" in said
    assert "pip uninstall clip-client clip-server, then install this server again" in said


@pytest.fixture(scope="module")
def unusual(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server without torch, on any free ports, whose environment names the model, a home
    directory that cannot be, and proxies that do not answer."""
    modules = tmp_path_factory.mktemp("modules")
    (modules / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    dead = f"http://127.0.0.1:{free_ports(1)[0]}"
    names = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
    proxies = {spelling: dead for name in names for spelling in (name, name.upper())}
    return start(
        flow("onnx", ports=[0, 0, 0], name="${{ ENV.CLIP_MODEL }}"),
        PYTHONPATH=str(modules),
        CLIP_MODEL="embedded",
        HOME="/proc/none",
        **proxies,
    )


def test_an_unusual_server_serves_at_the_addresses_that_it_prints(unusual: Server) -> None:
    addresses = re.findall(r"(?:grpc|http|ws)://\S+", unusual.output())
    assert len(addresses) == 3
    for address in addresses:
        with Client(address) as client:
            assert client.encode(["a cat"]).shape == (1, 256)
    assert "emoji-small::embedded" in unusual.output()  # as the encoder says
    assert "Traceback" not in unusual.output()


@pytest.mark.skipif(sys.platform != "linux", reason="only there")
def test_the_command_keeps_no_pages_that_it_only_read_to_start(onnx_server: Server) -> None:
    def mapped(process: psutil.Process) -> int:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(status.split("RssFile:")[1].split()[0])

    command = psutil.Process(onnx_server.process.pid)
    most = max(map(mapped, command.children(recursive=True)))
    assert eventually(lambda: mapped(command) < most / 2)


def test_the_banner(onnx_server: Server) -> None:
    output = onnx_server.output()
    assert re.search(r"ready in \d+\.\d s", output)
    for word in (
        "emoji-small::embedded",
        "256",
        "onnx",
        "cpu",
        "1 replica",
        *onnx_server.addresses,
    ):
        assert word in output
    # Bound to loopback, so there is nothing to warn about.
    assert "WARNING" not in output


def test_only_loopback_where_told(onnx_server: Server) -> None:
    for process in onnx_server.family():
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip.removeprefix("::ffff:") == "127.0.0.1"


def tell(server: Server) -> None:
    """What a supervisor does."""
    server.process.send_signal(signal.SIGTERM)


def press_ctrl_c(server: Server) -> None:
    """What a terminal does: every process of the group gets it."""
    os.killpg(server.process.pid, signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("end", [tell, press_ctrl_c])
def test_requests_in_flight_are_drained(start: Start, end: Callable[[Server], None]) -> None:
    """Over each transport; and a client that never stops sending keeps nothing alive."""
    server = start(flow(module=SLOW_EXECUTOR))
    family = server.family()
    results: list[int] = []

    def large(client: Client) -> None:
        texts = [f"text {i}" for i in range(LARGE)]
        results.append(len(client.encode(texts, batch_size=LARGE)))

    def endless(client: Client) -> None:
        with contextlib.suppress(ClipError):
            while True:
                client.encode(["again"], timeout=1)  # after the end, too

    clients = [Client(address) for address in server.addresses]
    for client in clients:
        client.encode(["warm"])
    threads = [threading.Thread(target=large, args=[client]) for client in clients]
    restless = Client(server.grpc)
    threads.append(threading.Thread(target=endless, args=[restless]))
    for thread in threads:
        thread.start()
    assert eventually(lambda: server.metrics()["in_flight_items"] >= 3 * LARGE)
    end(server)
    for thread in threads:
        thread.join()
    assert server.process.wait(PATIENCE_SECONDS) == 0
    assert_gone(family, server.ports)
    assert results == [LARGE] * 3
    assert "Traceback" not in server.output()
    for client in [*clients, restless]:
        client.close()


def test_ended_while_starting(start: Start) -> None:
    server = start(flow(), wait=False)
    time.sleep(2.5)
    family = server.family()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(PATIENCE_SECONDS)
    assert_gone(family, server.ports)


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("os.kill(os.getpid(), 9)", "was killed (SIGKILL), perhaps because memory ran out"),
        pytest.param("os._exit(3)", "exited by itself (exit code 3)", marks=pytest.mark.slow),
    ],
    ids=["killed", "exited"],
)
def test_an_executor_dies_while_it_starts(end: str, says: str, tmp_path: Path) -> None:
    module = tmp_path / "dies.py"
    module.write_text(
        "import os\nfrom jina import Executor\n\n\nclass Dies(Executor):\n"
        f"    def __init__(self, **_: object) -> None:\n        {end}\n"
    )
    spec = flow()
    uses = {"jtype": "Dies", "metas": {"py_modules": [str(module)]}}
    spec["executors"].append({"name": "other", "uses": uses})
    done = run("-i", stdin=yaml.safe_dump(spec))
    assert done.returncode == 1
    assert done.stderr == f"clip_server: the server could not start: other/rep-0 {says}\n"


def test_replicas(start: Start) -> None:
    spec = flow()
    spec["executors"][0]["uses"]["replicas"] = 2  # where clip-as-service's pages show it
    server = start(spec)
    assert "executor clip: replicas belongs next to uses:" in server.output()
    assert "2 replicas" in server.output()
    assert len(server.family()) == 4  # the command, the gateway, two encoders
    with Client(server.grpc) as client:
        expected = client.encode(["a cat"])
        victim = next(p for p in server.family()[1:] if not listens(p, server.ports))
        victim.kill()
        assert eventually(lambda: not is_alive(victim))
        for _ in range(10):
            assert (client.encode(["a cat"]) == expected).all()
    family = server.family()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE_SECONDS) == 0
    assert_gone(family, server.ports)
    assert "clip/rep-" in server.output()
    assert "was killed (SIGKILL), perhaps because memory ran out" in server.output()


def test_a_flow_of_clip_as_service(start: Start) -> None:
    """As its users wrote it; the port alone is gRPC's."""
    port = free_ports(1)[0]
    spec = yaml.safe_load(f"""
jtype: Flow
version: '1'
with:
  port: {port}
executors:
  - name: clip_o
    uses:
      jtype: CLIPEncoder
      with:
        name: embedded
        traversal_paths: '@r'
      metas:
        py_modules:
          - executors/clip_onnx.py
    timeout_ready: 3000000
    replicas: 1
""")
    server = start(spec)
    assert "rename it" in server.output()
    with Client(f"grpc://127.0.0.1:{port}") as client:
        assert client.encode(["a cat"]).shape == (1, 256)
    server.stop()


def test_built_in_flows_name_the_model_by_the_environment() -> None:
    from importlib import resources

    for name in ("onnx-flow.yml", "torch-flow.yml"):
        spec = yaml.safe_load(resources.files("clip_server.flows").joinpath(name).read_text())
        assert spec["executors"][0]["uses"]["with"]["name"] == "${{ ENV.CLIP_MODEL }}"


@needs_ipv6
@pytest.mark.slow
def test_ipv6_alone(start: Start) -> None:
    spec = flow()
    spec["with"]["host"] = "::1"
    server = start(spec)
    for scheme, port in zip(("grpc", "http", "ws"), server.ports, strict=True):
        assert f"{scheme}://[::1]:{port}" in server.output()
        with Client(f"{scheme}://[::1]:{port}") as client:
            assert client.encode(["a cat"]).shape == (1, 256)
    assert "WARNING" not in server.output()
    for process in server.family():
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert ip_address(connection.laddr.ip.removeprefix("::ffff:")).is_loopback
    server.stop()


@pytest.mark.slow
@needs_ipv6
def test_ipv6_and_ipv4(start: Start) -> None:
    spec = flow()
    spec["with"]["host"] = "[::]"  # as in a URL
    server = start(spec)
    for scheme, port in zip(("grpc", "http", "ws"), server.ports, strict=True):
        assert f"{scheme}://[::]:{port}" in server.output()
        for host in ("[::1]", "127.0.0.1"):
            with Client(f"{scheme}://{host}:{port}") as client:
                assert client.encode(["a cat"]).shape == (1, 256)
    assert "warning: listening on all network interfaces" in server.output()
    server.stop()


@pytest.mark.slow
def test_replicas_without_gpus_to_share(start: Start) -> None:
    spec = flow(module=GPU_EXECUTOR)
    spec["with"]["env"] = {"CUDA_VISIBLE_DEVICES": "RR0:2"}
    (executor,) = spec["executors"]
    executor["replicas"] = 2
    server = start(spec, CUDA_TOTAL_DEVICES="0", PYTHONPATH=str(Path(__file__).parent))
    assert re.findall(r"sees GPU (\S+)\.", server.output()) == ["-1"] * 2
    assert "using the CPU" in server.output()
    server.stop()
