"""The APIs of other servers, by their own clients, in an environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLES, Server

from clip_client import Client
from clip_client.quantization import quantize

PACKAGES = (
    "openai",
    "cohere",
    "huggingface-hub",
    "infinity-client",
    "langchain-openai",
    "litellm",
    "llama-index-embeddings-openai",
)
CAT = SAMPLES / "cat.png"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clients") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    inside = folder / "bin" / "python"
    subprocess.run([inside, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return inside


@pytest.mark.slow
def test_their_clients_get_our_embeddings(two_models: Server, python: Path) -> None:
    program = Path(__file__).with_name("api_clients.py")
    command = [python, program, two_models.http, CAT]
    # LiteLLM otherwise asks the internet for prices.
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    with Client(two_models.grpc) as client:
        text, image = client.encode(["a cat", CAT], normalize=True)
    quantized = found.pop("cohere int8")
    np.testing.assert_allclose(quantized, quantize(text[None], "int8")[0], atol=1)
    for name, embedding in found.items():
        expected = image if name.endswith("image") else text
        np.testing.assert_allclose(embedding, expected, rtol=1e-3, atol=1e-5, err_msg=name)
