"""Flows: each key is known or refused, each mistake is one line that names the key."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import flow, free_ports, free_range

from clip_server.__main__ import main
from clip_server.errors import ConfigurationError
from clip_server.executors.parameters import EncoderParameters
from clip_server.launch import flow as flows
from clip_server.launch.flow_gateway import DEFAULT_PORTS
from clip_server.launch.ports import is_free

UNSET = object()


def prepared(spec: dict[str, Any], **options: Any) -> dict[str, Any]:
    """As the command prepares it."""
    return flows.prepare(flows.expand(flows.load(yaml.safe_dump(spec))), **options)


def changed(place: str, value: Any) -> dict[str, Any]:
    """A sound flow with the value at one place, as `executors.0.uses.with.name`, replaced."""
    spec = flow()
    inside: Any = spec
    *way, key = place.split(".")
    for each in way:
        inside = inside[int(each) if each.isdecimal() else each]
    if value is UNSET:
        del inside[key]
    else:
        inside[key] = value
    return spec


CLIP = "executors.0"
USES = f"{CLIP}.uses"


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        # Keys that are unknown, and the likely one.
        ("hosts", "127.0.0.1", ["'hosts'", "did you mean host, under with:"]),
        ("with.hosts", "127.0.0.1", ["with: ", "'hosts'", "did you mean host?"]),
        ("with.ssl_key", "key.pem", ["'ssl_key'", "did you mean ssl_keyfile?"]),
        ("gateway", {"ssl_cert": "a.pem"}, ["gateway: ", "did you mean ssl_certfile?"]),
        (f"{CLIP}.replicaz", 2, ["executor clip", "'replicaz'", "did you mean replicas?"]),
        # Jina's own parsers would take it for the key that begins so.
        (f"{CLIP}.replica", 2, ["'replica'", "did you mean replicas?"]),
        (f"{USES}.wiht", {}, ["uses: ", "'wiht'", "did you mean with?"]),
        (f"{USES}.metas.py_module", "a", ["metas: ", "did you mean py_modules?"]),
        (f"{USES}.with.minibatchsize", 3, ["'minibatchsize'", "did you mean minibatch_size?"]),
        ("colour", "red", ["'colour'", "docs/flows.md"]),
        # Keys that belong elsewhere.
        (f"{CLIP}.with", {"name": "x"}, ["'with'", "belongs under uses:"]),
        (f"{CLIP}.metas", {}, ["'metas'", "belongs under uses:"]),
        (f"{CLIP}.device", "cpu", ["'device'", "belongs under with: of an executor's uses:"]),
        (f"{CLIP}.ssl_keyfile", "a", ["'ssl_keyfile'", "belongs under with:"]),
        (f"{USES}.name", "ViT-L-14", ["'name'", "belongs under with: of an executor's uses:"]),
        (f"{USES}.with.replicas", 2, ["'replicas'", "belongs under an executor"]),
        ("with.replicas", 2, ["'replicas'", "belongs under an executor"]),
        ("device", "cpu", ["'device'", "belongs under with: of an executor's uses:"]),
        # Ports, hosts, protocols.
        ("with.port", [1, 99999, 3], ["port: 99999"]),
        ("with.port", [10101, 10101, 10102], ["port: 10101 is given twice"]),
        ("with.port", [10101, "abc", 10102], ["port: 'abc'"]),
        ("with.port", [10101, -1, 10102], ["port: -1"]),
        ("with.port", [10101, None, 10102], ["port: None"]),
        ("with.port", True, ["port: True"]),
        ("with.port", [10101, 10102], ["one port for each protocol"]),
        (f"{CLIP}.port", 65536, ["port: 65536"]),
        ("with.protocol", ["grpc", "smtp", "http"], ["'smtp'", "websocket"]),
        (f"{CLIP}.protocol", "http", ["executor clip: protocol"]),
        ("with.host", "198.51.100.7", ["host: 198.51.100.7 is not an address of this machine"]),
        ("with.host", ["127.0.0.1", "127.0.0.2"], ["host: "]),
        (f"{CLIP}.host", "198.51.100.7", ["host: 198.51.100.7 is not an address"]),
        # TLS.
        ("with.ssl_keyfile", "nowhere.pem", ["ssl_keyfile: there is no file", "nowhere.pem"]),
        ("with.ssl_certfile", __file__, ["ssl_keyfile is missing"]),
        ("gateway", {"ssl_keyfile": __file__}, ["ssl_certfile is missing"]),
        ("gateway", {"ssl_keyfile": __file__, "ssl_certfile": __file__}, ["as PEM"]),
        # What Jina's parsers would answer with their usage.
        (f"{CLIP}.replicas", -1, ["executor clip: replicas: -1", "from 1"]),
        (f"{CLIP}.replicas", 0, ["replicas: 0"]),
        (f"{CLIP}.replicas", "two", ["replicas: 'two'"]),
        (f"{CLIP}.replicas", True, ["replicas: True"]),
        (f"{CLIP}.timeout_ready", "soon", ["timeout_ready: 'soon'"]),
        (f"{CLIP}.env", 5, ["env: 5"]),
        (f"{CLIP}.monitoring", "yes please", ["monitoring: ", "true or false"]),
        (f"{CLIP}.compression", "zip", ["compression: 'zip'", "Gzip"]),
        (f"{CLIP}.name", "my clip!", ["executor my clip!"]),
        (f"{CLIP}.name", "gateway", ["executor gateway"]),
        (f"{CLIP}.needs", "clipp", ["needs: ", "did you mean clip?"]),
        ("with.cors", "no", ["with: cors: 'no'"]),
        ("with.prefetch", -1, ["with: prefetch: -1"]),
        ("with.max_request_bytes", "1GB", ["max_request_bytes: '1GB'"]),
        ("with.gateways", 0, ["with: gateways: 0", "from 1 to 64"]),
        ("gateway", {"gateways": "two"}, ["gateway: gateways: 'two'", "from 1 to 64"]),
        ("gateway", {"uses": "Mine", "gateways": 2}, ["gateways: 2", "gateway of your own"]),
        (f"{CLIP}.gateways", 2, ["'gateways'", "belongs under with:"]),
        # The shape.
        ("jtype", "Flwo", ["jtype: Flwo"]),
        ("version", "2", ["version: 2"]),
        ("with", 5, ["with: 5"]),
        ("gateway", ["a"], ["gateway: ['a']"]),
        ("executors", UNSET, ["no executors"]),
        ("executors", [], ["no executors"]),
        ("executors", {"clip": {}}, ["executors: is a list"]),
        ("executors", [None], ["number 1"]),
        ("executors", flow()["executors"] * 2, ["two executors have this name"]),
        (USES, UNSET, ["executor clip: uses: is missing"]),
        (USES, None, ["executor clip: uses: is missing"]),
        (USES, ["CLIPEncoder"], ["executor clip: uses: ['CLIPEncoder']"]),
        (f"{USES}.with", "embedded", ["executor clip: uses: with: 'embedded'"]),
        (f"{USES}.metas", None, ["py_modules", "clip_server.executors.clip_onnx"]),
        (f"{USES}.metas.py_modules", None, ["py_modules", "clip_server.executors.clip_onnx"]),
        (f"{USES}.metas.py_modules", "clip_server.executors.clip_onx", ["mean clip_onnx?"]),
        (f"{USES}.metas.py_modules", "executors/clip_onx.py", ["there is no file"]),
        (f"{USES}.metas.py_modules", "executors/clip_hg.py", ["replaced by clip_torch"]),
        (f"{USES}.metas.py_modules", "clip_server.executors.clip_hg", ["replaced by clip_torch"]),
        (f"{USES}.jtype", None, ["jtype: CLIPEncoder"]),
        (f"{USES}.jtype", "ClipEncoder", ["jtype: ClipEncoder", "CLIPEncoder"]),
        (f"{USES}.with.name", "ViT-B/23", ["'ViT-B/23'", "ViT-B/32"]),
        (f"{USES}.with.name", "${{ ENV.CLIP_NOT_SET }}", ["CLIP_NOT_SET", "is not set"]),
        (f"{USES}.with.exact", "no", ["executor clip: uses: with: exact: 'no'"]),
    ],
)  # fmt: skip
def test_refused(place: str, value: Any, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        prepared(changed(place, value))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"exact": "no"}, ["exact: 'no'", "true or false"]),
        ({"jit": 1}, ["jit: 1", "true or false"]),
        ({"minibatch_size": -1}, ["minibatch_size: -1", "from 1"]),
        ({"minibatch_size": 2.5}, ["minibatch_size: 2.5", "a whole number"]),
        ({"minibatch_size": True}, ["minibatch_size: True"]),
        ({"num_worker_preprocess": 0}, ["num_worker_preprocess: 0"]),
        ({"cache_bytes": -1}, ["cache_bytes: -1", "from 0"]),
        ({"cache_bytes": "1e9"}, ["cache_bytes: '1e9'"]),
        ({"name": 5}, ["name: 5", "a text"]),
        ({"model_path": ["a"]}, ["model_path: ['a']", "a text"]),
        ({"device": "gpu"}, ["device: 'gpu'", "cuda"]),
        ({"device": 0}, ["device: 0"]),
        ({"dtype": "float8"}, ["dtype: 'float8'", "int8"]),
        ({"access_paths": "@x"}, ["'@x'", "@r,c"]),
        ({"naem": "embedded"}, ["'naem'", "did you mean 'name'?", "minibatch_size"]),
    ],
)
def test_parameters_of_the_wrong_type(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        EncoderParameters.parse(given)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_key_left_empty_is_its_default(nothing: Any) -> None:
    """At every place that has one."""
    expected = prepared(flow(ports=[0, 0, 0]))
    for place in ("with.cors", "gateway", f"{CLIP}.replicas", f"{CLIP}.env", f"{USES}.requests",
                  *(f"{USES}.with.{name}" for name in EncoderParameters.names())):  # fmt: skip
        spec = changed(place, nothing)
        spec["with"]["port"] = [0, 0, 0]
        if not place.endswith(".name"):
            spec[CLIP.split(".")[0]][0]["uses"]["with"]["name"] = "embedded"
        else:
            assert EncoderParameters.parse({"name": nothing}).name == flows.DEFAULT_MODEL
            continue
        found = prepared(spec)
        assert EncoderParameters.parse(
            found["executors"][0]["uses"]["with"]
        ) == EncoderParameters.parse(expected["executors"][0]["uses"]["with"])
        assert {key: value for key, value in found["executors"][0].items() if key != "uses"} == {
            key: value for key, value in expected["executors"][0].items() if key != "uses"
        }
    for key, default in (("host", "0.0.0.0"), ("protocol", ["grpc", "http", "websocket"])):
        spec = changed(f"with.{key}", nothing)
        assert prepared(spec)["gateway"][key] == default


def test_an_empty_variable_is_the_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_MODEL", "")
    spec = flows.expand(flows.load(flows.read("onnx-flow.yml")))
    assert spec["executors"][0]["uses"]["with"]["name"] == flows.DEFAULT_MODEL


def test_numbers_and_truth_values_in_quotes_are_read() -> None:
    """As the environment's variables have them."""
    spec = changed(f"{CLIP}.replicas", "2")
    spec["with"]["cors"] = "true"
    spec["executors"][0]["uses"]["with"] |= {"minibatch_size": "16", "exact": "true"}
    found = prepared(spec)
    assert found["executors"][0]["replicas"] == 2
    assert found["gateway"]["cors"] is True
    parameters = EncoderParameters.parse(found["executors"][0]["uses"]["with"])
    assert (parameters.minibatch_size, parameters.exact) == (16, True)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("version", "1.0"),
        ("with.monitoring", True),
        ("with.env", {"A": "b"}),
        ("with.compression", "gzip"),
        ("with.timeout_send", 5000),
        ("with.uvicorn_kwargs", {"timeout_keep_alive": 5}),
        ("with.protocol", ["GRPC", "https", "ws"]),
        ("jcloud", {"version": "3.13"}),
        (f"{CLIP}.jcloud", {"resources": {"memory": "8G"}}),
        (f"{CLIP}.monitoring", True),
        (f"{CLIP}.port_monitoring", 9091),
        (f"{CLIP}.timeout_ready", 3000000),
        (f"{CLIP}.timeout-ready", -1),
        (f"{CLIP}.env", {"CUDA_VISIBLE_DEVICES": "RR"}),
        (f"{CLIP}.gpus", "all"),
        (f"{CLIP}.shards", 1),
        (f"{CLIP}.polling", {"/rank": "ALL"}),
        (f"{CLIP}.needs", ["gateway"]),
        (f"{USES}.replicas", 2),
        (f"{USES}.with.traversal_paths", "@r"),
        (f"{USES}.metas.py_modules", "executors/clip_onnx.py"),
        (f"{USES}.metas.workspace", "./here"),
        (f"{USES}.requests", {"/encode": "encode"}),
    ],
)
@pytest.mark.filterwarnings("ignore:traversal_paths")
def test_taken(place: str, value: Any) -> None:
    """Jina's own keys, and what users of clip-as-service have in their flows."""
    assert prepared(changed(place, value))["executors"][0]["uses"]["with"]["name"] == "embedded"


def test_modules_beside_uses() -> None:
    """And the class by its name alone."""
    spec = flow()
    executor = spec["executors"][0]
    modules = executor["uses"].pop("metas")["py_modules"]
    executor["py_modules"] = modules
    expected = prepared(flow())["executors"][0]["uses"]
    assert prepared(spec)["executors"][0]["uses"] == expected
    executor["uses_with"] = executor["uses"].pop("with")
    executor["uses"] = "CLIPEncoder"
    assert prepared(spec)["executors"][0]["uses"] == expected
    executor["uses_with"]["exact"] = "no"
    with pytest.raises(ConfigurationError, match="exact: 'no'"):
        prepared(spec)


@pytest.mark.parametrize("place", ["with.env", f"{CLIP}.env"])
@pytest.mark.parametrize(
    ("gpus", "devices", "expected"),
    [
        ("2", "RR", "RR"),
        ("2", "RR0:2", "RR0:2"),
        ("2", "RR5:9", "-1"),
        ("2", "RRa:b", "-1"),
        ("0", "RR", "-1"),
        ("0", "1", "1"),
    ],
)
def test_gpus_are_handed_out(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    gpus: str,
    devices: str,
    expected: str,
) -> None:
    """Of the flow as a whole, or of an executor; `RR` without GPUs is a warning."""
    monkeypatch.setenv("CUDA_TOTAL_DEVICES", gpus)
    monkeypatch.setenv("PATH", "")  # no driver
    found = prepared(changed(place, {"CUDA_VISIBLE_DEVICES": devices, "A": "b"}))
    env = found["executors"][0]["env"]
    assert str(env["CUDA_VISIBLE_DEVICES"]) == expected
    assert "CUDA_VISIBLE_DEVICES" not in found["with"].get("env", {})
    assert {**found["with"].get("env", {}), **env}["A"] == "b"
    warned = f"CUDA_VISIBLE_DEVICES: {devices} selects none" in capsys.readouterr().err
    assert warned is (expected == "-1")


def test_the_environment_hands_out_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "RR")
    for gpus, expected in (("2", "RR"), ("0", "-1")):
        monkeypatch.setenv("CUDA_TOTAL_DEVICES", gpus)
        prepared(flow(ports=[0, 0, 0]))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_aliases_of_jinas_keys() -> None:
    spec = flow(ports=[0, 0, 0])
    spec["with"]["ports"] = spec["with"].pop("port")
    spec["with"]["host-in"] = spec["with"].pop("host")
    gateway = prepared(spec)["gateway"]
    assert (gateway["host"], len(gateway["port"])) == ("127.0.0.1", 3)


def test_ports_of_the_command_line() -> None:
    def ports(*wanted: int, spec: dict[str, Any] | None = None) -> Any:
        return prepared(spec or flow(), port=wanted)["gateway"]["port"]

    three = free_ports(3)
    assert ports(*three) == three
    first = next(port for port in free_ports(50) if set(free_after(port, 3)) == {True})
    assert ports(first) == [first, first + 1, first + 2]
    assert ports(first, spec=changed("with.protocol", "http")) == [first]
    assert len({0, *ports(0)}) == 4
    with pytest.raises(ConfigurationError, match="one port for each protocol"):
        ports(*three[:2])


def free_after(port: int, count: int) -> list[bool]:
    return [is_free("127.0.0.1", port + offset) for offset in range(count)]


Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """What the command says of a flow that it does not start: one line."""

    def refused(text: str, *arguments: str) -> str:
        monkeypatch.setattr("sys.stdin", StringIO(text))
        assert main([*arguments] or ["-i"]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    return refused


def test_ports_for_metrics_of_several_gateways(refused: Refused) -> None:
    spec, first = flow(), free_range(4)
    spec["with"] |= {"gateways": 3, "monitoring": True, "port_monitoring": first}
    spec["executors"][0]["port_monitoring"] = first + 2
    assert f"port_monitoring: {first + 2} is given to an executor" in refused(yaml.safe_dump(spec))
    spec["executors"][0]["port_monitoring"] = first + 3
    with socket.create_server(("127.0.0.1", first + 1)):
        assert f"in use on 0.0.0.0: port {first + 1}" in refused(yaml.safe_dump(spec))
    spec["with"]["port_monitoring"] = 65534
    assert "from 1 to 65533" in refused(yaml.safe_dump(spec))


def test_ports_in_use(refused: Refused) -> None:
    spec = flow()
    ports = spec["with"]["port"]
    with (
        socket.create_server(("127.0.0.1", ports[1])),
        socket.create_server(("127.0.0.1", ports[2])),
    ):
        said = refused(yaml.safe_dump(spec))
        assert str(ports[0]) not in said
        for port in ports[1:]:
            assert str(port) in said
        if Path("/proc").exists():
            assert f"pid {os.getpid()}" in said
        assert "--port" in said
        spec["with"]["port"] = ports[0]
        spec["with"]["protocol"] = "grpc"
        spec["executors"][0]["port"] = ports[1]
        assert str(ports[1]) in refused(yaml.safe_dump(spec))


def test_what_is_no_flow(refused: Refused, tmp_path: Path) -> None:
    assert "line 2, column" in refused("a: [1\nb")
    assert "line 3 of the flow: with: is given twice" in refused("jtype: Flow\nwith: {}\nwith: {}")
    assert "no executors" in refused("")
    assert "onnx-flow.yml" in refused("", "nowhere.yml")
    assert "did you mean onnx-flow.yml?" in refused("", "onx-flow.yml")
    assert "cannot be read" in refused("", str(tmp_path))
    (tmp_path / "image.yml").write_bytes(b"\x89PNG\xff")
    assert "not text" in refused("", str(tmp_path / "image.yml"))


def test_the_command_line(refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no flow at nowhere.yml" in refused("", "--port", "0", "nowhere.yml")
    assert "no flow at nowhere.yml" in refused("", "nowhere.yml", "--port", "1", "2", "3")
    for wrong in (["--port", "0", "99999"], ["--port", "grpc", "x.yml"], ["-i", "x.yml"]):
        with pytest.raises(SystemExit) as end:
            main(wrong)
        assert end.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for word in (*flows.built_in(), "clip_server.models", *map(str, DEFAULT_PORTS.values())):
        assert word in said


def test_classes_as_tags_are_classes_as_keys() -> None:
    """Jina's older form of a flow."""
    tagged = "!Flow\nwith: {port: 1}\nexecutors:\n- uses: !CLIPEncoder {with: {name: a}}\n"
    keys = "jtype: Flow\nwith: {port: 1}\n"
    keys += "executors:\n- uses: {jtype: CLIPEncoder, with: {name: a}}\n"
    assert flows.load(tagged) == flows.load(keys)


@pytest.mark.parametrize("folder", ["project", "elsewhere"])
def test_an_executors_own_file_is_beside_the_flow_or_here(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "project" / "image"
    image.mkdir(parents=True)
    (image / "resize.py").touch()
    (image / "config.yml").write_text(
        "!Resize\nwith: {size: 32}\nmetas:\n  py_modules: [resize.py, elsewhere.py]\n"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / folder)
    spec = {"executors": [{"uses": "image/config.yml"}, {"uses": {"jtype": "CLIPEncoder"}}]}
    flows.include_executors(spec, str(tmp_path / "project" / "flow.yml"))
    assert spec["executors"][0]["uses"] == {
        "jtype": "Resize",
        "with": {"size": 32},
        "metas": {"py_modules": [str(image / "resize.py"), "elsewhere.py"]},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"uses: there is no file own.yml, seen from"),
        ("with: {name: embedded}", "uses: own.yml does not define an executor"),
        ("jtype: [", "uses: own.yml is not YAML: line 1"),
        ("jtype: A\njtype: B", "line 2 of uses: own.yml: jtype: is given twice"),
    ],
)
def test_an_executors_own_file_that_is_none(
    content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "own.yml").write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        flows.include_executors({"executors": [{"uses": "own.yml"}]}, str(tmp_path / "flow.yml"))
