"""The wheels, in clean environments, away from the checkout, on every Python there is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES, Server, flow
from guard import popen

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


def copy_checkout(folder: Path) -> Path:
    """A copy without what was built before or is left in the checkout."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, folder / "source", ignore=ignored))


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheels of the client and the server, each built from its sdist."""
    folder = tmp_path_factory.mktemp("wheels")
    source = copy_checkout(folder)
    for project in (source / "clip_client", source):
        run(sys.executable, "-m", "build", "-q", "-n", "-o", str(folder), cwd=project)
    (client,) = folder.glob("clip_microservice_client-*.whl")
    (server,) = folder.glob("clip_microservice-*.whl")
    return client, server


@pytest.mark.slow
def test_what_the_wheels_hold(wheels: tuple[Path, Path]) -> None:
    client, server = (set(zipfile.ZipFile(wheel).namelist()) for wheel in wheels)
    assert {"clip_client/py.typed", "clip_client/proto/clip.proto"} <= client
    assert {
        "clip_server/executors/clip_onnx.py",
        "clip_server/flows/onnx-flow.yml",
        "clip_server/models/embedded/open_clip_model.safetensors",
        "clip_server/models/embedded/samples/cat.png",
    } <= server
    assert {name.split("/")[0].split("-")[0] for name in client} == {
        "clip_client",
        "clip_microservice_client",
    }
    assert {name.split("/")[0].split("-")[0] for name in server} == {
        "clip_server",
        "clip_microservice",
    }
    assert wheels[0].stat().st_size < 200_000


@pytest.mark.slow
def test_the_server_requires_the_client_of_its_version(wheels: tuple[Path, Path]) -> None:
    client, server = wheels
    version = client.name.split("-")[1]
    assert server.name.split("-")[1] == version
    archive = zipfile.ZipFile(server)
    (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    required = f"Requires-Dist: clip-microservice-client=={version}"
    assert required in archive.read(metadata).decode().splitlines()


def test_executors_and_flows_are_found_in_a_checkout() -> None:
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f)]\n"
        "import clip_server.flows, importlib.util as u\n"
        "print(clip_server.flows.__file__, u.find_spec('clip_server.executors').origin,"
        " u.find_spec('clip_server.tests'))"
    )
    found = [str(ROOT / each / "__init__.py") for each in ("flows", "executors")]
    assert run(sys.executable, "-c", code, cwd=ROOT).split() == [*found, "None"]


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "clip_client/pyproject.toml", "requirements.lock"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return subprocess.run(
        # The tests themselves may run under make.
        ["make", "--no-print-directory", *arguments],
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_make_checks_the_version_of_python_first(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.18\n')
    old.chmod(0o755)
    said = make(tmp_path, "serve", f"PYTHON={old}")
    assert said.returncode == 2
    first = said.stderr.splitlines()[0]
    assert first.startswith(f"Python 3.10 to 3.13 is needed, and {old} is Python 3.9.18: make")
    assert "nowhere is not found" in make(tmp_path, "serve", "PYTHON=nowhere").stderr
    assert not (tmp_path / ".venv").exists()


def test_make_replaces_an_environment_that_cannot_be_used(tmp_path: Path) -> None:
    created = f"{sys.executable} -m venv --clear .venv"
    run(sys.executable, "-m", "venv", "--without-pip", ".venv", cwd=tmp_path)
    (tmp_path / ".venv" / ".serve").touch()
    assert created in make(tmp_path, "-n", "serve", f"PYTHON={sys.executable}").stdout
    # One that can be used stays.
    python = tmp_path / ".venv" / "bin" / "python"
    python.unlink()
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    (tmp_path / ".venv" / ".serve").touch()
    said = make(tmp_path, "-n", "serve", "FLOW=", f"PYTHON={sys.executable}").stdout
    assert created not in said
    assert said.endswith(".venv/bin/python -m clip_server --host 127.0.0.1 onnx-flow.yml\n")


def test_make_serves_the_embedded_model_where_no_model_is_named(tmp_path: Path) -> None:
    report = "--eval=report:;@echo $(CLIP_MODEL)"
    assert make(tmp_path, report, "report", CLIP_MODEL="").stdout == "embedded\n"
    assert make(tmp_path, report, "report", CLIP_MODEL="RN50").stdout == "RN50\n"


@pytest.mark.slow
@pytest.mark.parametrize("minor", MINORS)
def test_installed_from_a_checkout_with_the_bundled_pip(tmp_path: Path, minor: int) -> None:
    """README's line, with no constraints; run inside the checkout, whose folders come first."""
    python = interpreter(minor)
    if python is None:
        pytest.skip(f"there is no Python 3.{minor} on this machine")
    source = copy_checkout(tmp_path)
    run(python, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path)
    inside = str(tmp_path / "venv" / "bin" / "python")
    install = (inside, "-m", "pip", "install", "-q", "./clip_client", ".[onnx]")
    if sys.version_info[1] != minor:
        run(*install, "--dry-run", cwd=source)  # resolves everything, as an install does first
        return
    run(*install, cwd=source)
    run(inside, "-c", "import clip_server.executors.clip_onnx, clip_server.flows", cwd=source)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "runtime"), [("torch", "torch"), ("onnx-gpu", "onnxruntime_gpu")]
)
def test_the_other_lines_of_readme_resolve(tmp_path: Path, extra: str, runtime: str) -> None:
    """With the bundled pip and no constraints, at the first version of the runtime that it tries.
    They are gigabytes, so they are not installed; TensorRT comes from NVIDIA's own index, and is
    left out."""
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path)
    inside = str(tmp_path / "venv" / "bin" / "python")
    line = ("./clip_client", f".[{extra}]")
    assert " ".join(("pip install", line[0], f"'{line[1]}'")) in (ROOT / "README.md").read_text()
    said = run(inside, "-m", "pip", "install", "--dry-run", *line, cwd=ROOT)
    assert len(set(re.findall(rf"\b{runtime}-[^-\s]+-cp", said))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("minor", MINORS)
def test_served_from_wheels(wheels: tuple[Path, Path], tmp_path: Path, minor: int) -> None:
    python = interpreter(minor)
    if python is None:
        pytest.skip(f"there is no Python 3.{minor} on this machine")
    inside = environment(tmp_path, python, str(wheels[0]), f"{wheels[1]}[onnx]")
    spec = flow()
    import yaml

    (tmp_path / "flow.yml").write_text(yaml.safe_dump(spec))
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = popen(
            [Path(inside).with_name("clip-server"), "flow.yml"],
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
def test_the_client_beside_pydantic_2(
    wheels: tuple[Path, Path], tmp_path: Path, onnx_server: Server
) -> None:
    folder = tmp_path
    run(sys.executable, "-m", "venv", str(folder / "venv"), cwd=folder)
    inside = str(folder / "venv" / "bin" / "python")
    run(inside, "-m", "pip", "install", "-q", str(wheels[0]), "pydantic>=2", cwd=folder)
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
    assert "No module named clip_server" in said.stderr
