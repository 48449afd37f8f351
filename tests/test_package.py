"""The wheel, in clean environments, away from the checkout, on every Python there is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES, Server, flow

MINORS = (10, 11, 12, 13)


def interpreter(minor: int) -> str | None:
    """A Python 3.`minor`, from PATH or from pyenv."""
    if sys.version_info[1] == minor:
        return sys.executable
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    installed = sorted(versions.glob(f"3.{minor}.*/bin/python"))
    found = [str(path) for path in installed] or [shutil.which(f"python3.{minor}")]
    # What is found may be a shim that leads nowhere.
    if found[-1] and subprocess.run([found[-1], "-c", ""], capture_output=True).returncode == 0:
        return found[-1]
    return None


def run(*command: str, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def environment(folder: Path, python: str, *packages: str) -> str:
    """A clean environment with these packages; its interpreter."""
    run(python, "-m", "venv", str(folder / "venv"), cwd=folder)
    inside = str(folder / "venv" / "bin" / "python")
    lock = str(ROOT / "requirements.lock")
    run(inside, "-m", "pip", "install", "-q", "-c", lock, *packages, cwd=folder)
    return inside


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A copy, so that nothing built before or left in the checkout gets in.
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__"),
    )
    run(sys.executable, "-m", "build", "-q", "--wheel", "-n", "-o", str(folder), cwd=source)
    (built,) = folder.glob("*.whl")
    return built


def test_what_the_wheel_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for name in (
        "clip_client/py.typed",
        "clip_client/proto/clip.proto",
        "clip_server/executors/clip_onnx.py",
        "clip_server/flows/onnx-flow.yml",
        "clip_server/models/embedded/open_clip_model.safetensors",
        "clip_server/models/embedded/samples/cat.png",
    ):
        assert name in names
    assert not any(name.startswith(("tests/", "training/", "executors/")) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("minor", MINORS)
def test_served_from_a_wheel(wheel: Path, tmp_path: Path, minor: int) -> None:
    python = interpreter(minor)
    if python is None:
        pytest.skip(f"there is no Python 3.{minor} on this machine")
    inside = environment(tmp_path, python, f"{wheel}[onnx]")
    spec = flow()
    import yaml

    (tmp_path / "flow.yml").write_text(yaml.safe_dump(spec))
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [inside, "-m", "clip_server", "flow.yml"],
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Server(process, log, spec["with"]["port"])
    try:
        server.wait_until_ready()
        shutil.copy(SAMPLES / "cat.png", tmp_path)
        for address in server.addresses:
            code = (
                "from clip_client import Client\n"
                f"with Client({address!r}) as c: print(c.encode(['a cat', 'cat.png']).shape)"
            )
            assert run(inside, "-c", code, cwd=tmp_path).strip() == "(2, 256)"
        assert "torch" not in run(inside, "-m", "pip", "list", cwd=tmp_path)
    finally:
        server.stop()


@pytest.mark.slow
def test_the_client_beside_pydantic_2(wheel: Path, tmp_path: Path, onnx_server: Server) -> None:
    folder = tmp_path
    run(sys.executable, "-m", "venv", str(folder / "venv"), cwd=folder)
    inside = str(folder / "venv" / "bin" / "python")
    run(inside, "-m", "pip", "install", "-q", str(wheel), "pydantic>=2", cwd=folder)
    code = (
        "import pydantic\nassert pydantic.VERSION.startswith('2')\n"
        "from clip_client import Client\n"
        f"with Client({onnx_server.grpc!r}) as c: print(c.encode(['a cat']).shape)"
    )
    assert run(inside, "-c", code, cwd=folder).strip() == "(1, 256)"
    said = subprocess.run(
        [inside, "-m", "clip_server"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert said.returncode == 1
    assert "pip install 'clip-microservice[onnx]'" in said.stderr
    assert "Traceback" not in said.stderr
