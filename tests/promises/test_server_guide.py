"""The server's page of clip-as-service's guide, sentence by sentence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from certificates import make_pair, needs_openssl
from conftest import GPU_EXECUTOR, Http, Server, Start, flow, free_ports
from guard import popen
from guide import CAT, DIM, SENTENCES

from clip_client import Client

# The guide's table of models: name and output dimension.
MODELS = {
    "RN50::openai": 1024,
    "RN50::yfcc15m": 1024,
    "RN50::cc12m": 1024,
    "RN101::openai": 512,
    "RN101::yfcc15m": 512,
    "RN50x4::openai": 640,
    "RN50x16::openai": 768,
    "RN50x64::openai": 1024,
    "ViT-B-32::openai": 512,
    "ViT-B-32::laion2b_e16": 512,
    "ViT-B-32::laion400m_e31": 512,
    "ViT-B-32::laion400m_e32": 512,
    "ViT-B-32::laion2b-s34b-b79k": 512,
    "ViT-B-16::openai": 512,
    "ViT-B-16::laion400m_e31": 512,
    "ViT-B-16::laion400m_e32": 512,
    "ViT-B-16-plus-240::laion400m_e31": 640,
    "ViT-B-16-plus-240::laion400m_e32": 640,
    "ViT-L-14::openai": 768,
    "ViT-L-14::laion400m_e31": 768,
    "ViT-L-14::laion400m_e32": 768,
    "ViT-L-14::laion2b-s32b-b82k": 768,
    "ViT-L-14-336::openai": 768,
    "ViT-H-14::laion2b-s32b-b79k": 1024,
    "ViT-g-14::laion2b-s12b-b42k": 1024,
    "M-CLIP/LABSE-Vit-L-14": 768,
    "M-CLIP/XLM-Roberta-Large-Vit-B-32": 512,
    "M-CLIP/XLM-Roberta-Large-Vit-B-16Plus": 640,
    "M-CLIP/XLM-Roberta-Large-Vit-L-14": 768,
    # As earlier versions called them.
    "RN50": 1024,
    "RN101": 512,
    "RN50x4": 640,
    "RN50x16": 768,
    "RN50x64": 1024,
    "ViT-B/32": 512,
    "ViT-B/16": 512,
    "ViT-L/14": 768,
    "ViT-L/14@336px": 768,
    "ViT-L/14-336px": 768,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_models_and_their_dimensions(name: str) -> None:
    from clip_server.models import zoo

    assert zoo.resolve(name).dim == MODELS[name]


@pytest.mark.parametrize("runtime", ["torch", "onnx", "tensorrt"])
def test_three_flows_are_built_in(runtime: str) -> None:
    from clip_server.launch import flow as flows

    spec = flows.load(flows.read(f"{runtime}-flow.yml"))
    (executor,) = spec["executors"]
    assert executor["uses"]["jtype"] == "CLIPEncoder"
    assert executor["uses"]["metas"]["py_modules"] == [f"clip_server.executors.clip_{runtime}"]
    assert flows.DEFAULT_FLOW == "torch-flow.yml"


def test_vit_b_32_is_the_default_and_is_downloaded(tmp_path: Path) -> None:
    """The guide's own YAML, `with:` left empty; without a network it says what is missing."""
    spec = f"""
jtype: Flow
version: '1'
with:
  port: {free_ports(1)[0]}
executors:
  - name: clip_o
    uses:
      jtype: CLIPEncoder
      with:
      metas:
        py_modules:
          - executors/clip_onnx.py
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("CLIP_MODEL", None)
    done = subprocess.run(
        [sys.executable, "-m", "clip_server", "-i"],
        input=spec,
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "vit_base_patch32_clip_224.openai" in done.stderr
    assert "Traceback" not in done.stderr


# One flow with the guide's keys


@pytest.fixture(scope="module")
def piped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`cat my.yml | python -m clip_server -i`, with more verbose logging."""
    ports = free_ports(1)
    spec = f"""
jtype: Flow
version: '1'
with:
  port: {ports[0]}
  protocol: websocket
  prefetch: 10
executors:
  - name: clip_t
    replicas: 2
    uses:
      jtype: CLIPEncoder
      with:
        name: embedded
        device: cpu
        num_worker_preprocess: 2
        minibatch_size: 16
        access_paths: '@r'
      metas:
        py_modules:
          - executors/clip_onnx.py
"""
    folder = tmp_path_factory.mktemp("piped")
    with (folder / "log").open("wb") as log:
        process = popen(
            [sys.executable, "-m", "clip_server", "-i"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "JINA_LOG_LEVEL": "DEBUG"},
        )
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(spec.encode())
    server = Server(process, folder / "log", ports)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def test_the_configuration_may_be_piped(piped: Server) -> None:
    with Client(f"websocket://0.0.0.0:{piped.ports[0]}") as client:
        assert client.encode([*SENTENCES, str(CAT)]).shape == (4, DIM)


def test_replicas_run_several_models(piped: Server) -> None:
    assert len(piped.family()) == 4  # the command, the gateway and two encoders


def test_the_address_is_told(piped: Server) -> None:
    assert str(piped.ports[0]) in piped.output()


def test_the_log_level_is_jinas(piped: Server, onnx_server: Server) -> None:
    assert "DEBUG" in piped.output()
    assert "DEBUG" not in onnx_server.output()


# Custom models in ONNX


def export(
    path: Path,
    inputs: dict[str, tuple[int, list[Any]]],
    build: Callable[[Any], list[Any]],
    weights: dict[str, np.ndarray[Any, Any]],
) -> None:
    """A graph with these inputs (type and shape) and the output `output` [batch, 512]."""
    onnx = pytest.importorskip("onnx")
    given = [
        onnx.helper.make_tensor_value_info(name, kind, shape)
        for name, (kind, shape) in inputs.items()
    ]
    result = onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["batch", 512])
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = onnx.helper.make_graph(build(onnx.helper), "model", given, [result], constants)
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), path)


@pytest.mark.parametrize("integers", ["INT64", pytest.param("INT32", marks=pytest.mark.slow)])
def test_a_custom_model(start: Start, tmp_path: Path, integers: str) -> None:
    """As the guide's fine-tuning exports them: input_ids and attention_mask, and pixel_values."""
    onnx = pytest.importorskip("onnx")
    folder = tmp_path / "custom-model"
    folder.mkdir()
    kind = getattr(onnx.TensorProto, integers)
    # The embedding of a token is its row of one number, times 512 columns.
    rows = np.random.default_rng(0).normal(size=(49_408, 1)).astype(np.float32)
    columns = np.random.default_rng(1).normal(size=(3, 512)).astype(np.float32)
    export(
        folder / "textual.onnx",
        {"input_ids": (kind, ["batch", "length"]), "attention_mask": (kind, ["batch", "length"])},
        lambda make: [
            make.make_node("Gather", ["rows", "input_ids"], ["tokens"]),
            make.make_node("Cast", ["attention_mask"], ["seen"], to=onnx.TensorProto.FLOAT),
            make.make_node("Unsqueeze", ["seen", "last"], ["mask"]),
            make.make_node("Mul", ["tokens", "mask"], ["masked"]),
            make.make_node("ReduceSum", ["masked", "middle"], ["summed"], keepdims=0),
            make.make_node("MatMul", ["summed", "columns"], ["output"]),
        ],
        {"rows": rows, "last": np.array([2]), "middle": np.array([1]), "columns": columns[:1]},
    )
    export(
        folder / "visual.onnx",
        {"pixel_values": (onnx.TensorProto.FLOAT, ["batch", 3, 224, 224])},
        lambda make: [
            make.make_node("ReduceMean", ["pixel_values"], ["colours"], axes=[2, 3], keepdims=0),
            make.make_node("MatMul", ["colours", "columns"], ["output"]),
        ],
        {"columns": columns},
    )
    spec = flow(name="ViT-B/32", model_path=str(folder))
    server = start(spec)
    with Client(server.grpc) as client:
        found = client.encode(["hello", "hello world", str(CAT)])
        assert found.shape == (3, 512)
        # <|startoftext|>, hello, world and <|endoftext|> of CLIP's vocabulary.
        for row, tokens in zip(found, ([3306], [3306, 1002]), strict=False):
            expected = rows[[49_406, *tokens, 49_407]].sum() * columns[0]
            np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-5)
    server.stop()


# TLS, and requests of other origins


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A certificate of localhost, and a key that a password protects, as keys of a flow."""
    key, certificate = make_pair(tmp_path_factory.mktemp("tls"), password="blahblah")
    return {
        "cors": True,
        "uvicorn_kwargs": {"ssl_keyfile_password": "blahblah"},
        "ssl_certfile": str(certificate),
        "ssl_keyfile": str(key),
    }


@needs_openssl
@pytest.mark.parametrize(
    "schemes",
    [
        pytest.param(["websockets"], marks=pytest.mark.slow),
        ["grpcs", "https", "wss"],
    ],
    ids="+".join,
)
def test_tls_with_a_key_that_has_a_password(
    start: Start, certificate: dict[str, Any], schemes: list[str]
) -> None:
    protocols = {"grpcs": "grpc", "https": "http", "wss": "websocket", "websockets": "websocket"}
    ports = free_ports(len(schemes))
    spec = flow()
    spec["with"] = {"host": "127.0.0.1", **certificate}
    chosen = [protocols[scheme] for scheme in schemes]
    spec["with"] |= {
        "protocol": chosen if len(chosen) > 1 else chosen[0],
        "port": ports if len(ports) > 1 else ports[0],
    }
    server = start(spec)
    for scheme, port in zip(schemes, ports, strict=True):
        address = f"{scheme}://localhost:{port}"
        assert f"{scheme.replace('websockets', 'wss')}://127.0.0.1:{port}" in server.output()
        with Client(address, ca_file=certificate["ssl_certfile"]) as client:
            assert client.encode(SENTENCES).shape == (3, DIM)
    if "https" in schemes:
        with Http(f"https://localhost:{ports[schemes.index('https')]}") as http:
            http.trust_env, http.verify = False, certificate["ssl_certfile"]
            check_cross_origin_requests(http)
    server.stop()


def check_cross_origin_requests(http: Http) -> None:
    """`cors: true` lets web pages of other origins ask."""
    page = {"Origin": "https://a.web.page"}
    asking = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    for path in ("/post", "/encode"):
        asked = http.options(path, headers=page | asking)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] in ("*", page["Origin"])
        answer = http.post(path, json={"data": [{"text": "hello"}]}, headers=page)
        assert "access-control-allow-origin" in answer.headers
        assert len(answer.json()["data"][0]["embedding"]) == DIM


# GPUs


@pytest.mark.slow
def test_each_replica_sees_its_gpu(start: Start, tmp_path: Path) -> None:
    """`CUDA_VISIBLE_DEVICES=RR python -m clip_server`, where the driver lists the GPUs."""
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nfor i in 1 2; do echo 'GPU: NVIDIA (UUID: GPU)'; done\n")
    driver.chmod(0o755)
    spec = flow(module=GPU_EXECUTOR)
    (executor,) = spec["executors"]
    executor["replicas"] = 3
    server = start(
        spec,
        CUDA_VISIBLE_DEVICES="RR",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        PYTHONPATH=str(Path(__file__).parents[1]),
    )
    assert sorted(re.findall(r"sees GPU (\w+)\.", server.output())) == ["0", "0", "1"]
    server.stop()


# Docker


def test_the_image_takes_a_flow_and_a_configuration_from_standard_input() -> None:
    """`docker run … onnx-flow.yml` and `cat my.yml | docker run -i … -i`: Docker appends both."""
    lines = (Path(__file__).parents[2] / "Dockerfile").read_text().splitlines()
    (entrypoint,) = [line for line in lines if line.startswith("ENTRYPOINT")]
    assert yaml.safe_load(entrypoint.removeprefix("ENTRYPOINT"))[-3:] == [
        "python",
        "-m",
        "clip_server",
    ]
