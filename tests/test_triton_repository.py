"""`convert --to triton`: what it writes, read by Triton's own protobuf."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from clip_server.convert.__main__ import main
from clip_server.convert.triton.config import BACKENDS

MODELS = {
    *("clip_text", "clip_image", "clip_textual", "clip_visual"),
    *("text_embedding", "image_embedding", "zero_shot"),
}
TYPES = {
    onnx.TensorProto.UINT8: pb.TYPE_UINT8,
    onnx.TensorProto.INT32: pb.TYPE_INT32,
    onnx.TensorProto.FLOAT: pb.TYPE_FP32,
}

Export = Callable[..., Path]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports the embedded model, once for each set of options."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*options: str) -> Path:
        if options not in made:
            folder = tmp_path_factory.mktemp("triton")
            assert main(["embedded", "--to", "triton", "--out", str(folder), *options]) == 0
            made[options] = folder
        return made[options]

    return run


def configs(repository: Path) -> dict[str, Any]:
    files = repository.glob("*/config.pbtxt")
    return {
        file.parent.name: text_format.Parse(file.read_text("utf-8"), pb.ModelConfig())
        for file in files
    }


@pytest.mark.parametrize("towers", BACKENDS)
def test_triton_reads_every_configuration(export: Export, towers: str) -> None:
    found = configs(export("--towers", towers))
    assert found.keys() == MODELS
    assert all(config.name == name for name, config in found.items())
    for name in ("clip_textual", "clip_visual"):
        assert found[name].backend == towers
        assert found[name].dynamic_batching.max_queue_delay_microseconds == 0
        assert found[name].model_warmup
    for name in ("clip_text", "clip_image", "zero_shot"):
        assert found[name].backend == "python"
    for name in ("text_embedding", "image_embedding"):
        assert found[name].platform == "ensemble"


@pytest.mark.parametrize("towers", BACKENDS)
def test_dimensions_are_those_of_the_graphs(export: Export, towers: str) -> None:
    repository = export("--towers", towers)
    found = configs(repository)
    for name in ("clip_textual", "clip_visual"):
        graph = onnx.load(repository / name / "1" / "model.onnx").graph
        for ours, theirs in ((found[name].input, graph.input), (found[name].output, graph.output)):
            described = [(each.name, each.data_type, tuple(each.dims)) for each in ours]
            assert described == [(each.name, *shape(each)) for each in theirs]


def shape(value: Any) -> tuple[Any, tuple[int, ...]]:
    of = value.type.tensor_type
    return TYPES[of.elem_type], tuple(axis.dim_value or -1 for axis in of.shape.dim[1:])


@pytest.mark.parametrize("name", ["text_embedding", "image_embedding"])
def test_an_ensemble_connects_tensors_that_fit(export: Export, name: str) -> None:
    found = configs(export())
    ensemble = found[name]
    kinds = {each.name: (each.data_type, list(each.dims)) for each in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = found[step.model_name]
        assert model.max_batch_size == ensemble.max_batch_size
        inputs = {each.name: (each.data_type, list(each.dims)) for each in model.input}
        outputs = {each.name: (each.data_type, list(each.dims)) for each in model.output}
        assert step.input_map.keys() == inputs.keys()
        assert step.output_map.keys() == outputs.keys()
        for there, here in step.input_map.items():
            assert kinds[here] == inputs[there]
        kinds |= {here: outputs[there] for there, here in step.output_map.items()}
    for each in ensemble.output:
        assert kinds[each.name] == (each.data_type, list(each.dims))


def test_towers_run_on_the_gpus_that_are_named(export: Export) -> None:
    found = configs(export("--gpus", "0,2"))
    (group,) = found["clip_visual"].instance_group
    assert (group.kind, list(group.gpus)) == (pb.ModelInstanceGroup.KIND_GPU, [0, 2])
    (group,) = found["clip_image"].instance_group
    assert group.kind == pb.ModelInstanceGroup.KIND_CPU


def test_labels_are_the_default_prompts(export: Export, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text('a "red" apple\n\neine Brücke\n一只猫\n', "utf-8")
    repository = export("--labels", str(labels))
    config = configs(repository)["zero_shot"]
    prompts = '["a \\"red\\" apple", "eine Brücke", "一只猫"]'
    assert config.parameters["prompts"].string_value == prompts
    (named,) = [each for each in config.output if each.label_filename]
    kept = (repository / "zero_shot" / named.label_filename).read_text("utf-8")
    assert kept == 'a "red" apple\neine Brücke\n一只猫\n'


def test_engines_are_built_where_triton_runs(export: Export) -> None:
    script = export("--towers", "tensorrt") / "build_engines.sh"
    subprocess.run(["sh", "-n", script], check=True)
    text = script.read_text()
    assert "--onnx=clip_visual/1/model.onnx --saveEngine=clip_visual/1/model.plan" in text
    assert "--maxShapes=pixels:64x3x64x64" in text
    assert "--maxShapes=tokens:64x77" in text


def test_preprocessing_needs_neither_this_package_nor_torch(export: Export) -> None:
    """The repository's own copy of the code, as Triton's python backend finds it."""
    model = export() / "clip_text"
    program = (
        "import sys\n"
        f"sys.path.append({str(model)!r})\n"
        "for name in ('jina', 'docarray', 'torch', 'huggingface_hub', 'onnx'):\n"
        "    sys.modules[name] = None\n"
        "from clip_server.preprocess import image, tokenizer\n"
        "assert image.__file__.startswith(sys.path[-1]), image.__file__\n"
    )
    # Isolated and outside the checkout; the .pth files of editable packages are not read.
    site = [path for path in sys.path if path.endswith("site-packages")]
    code = f"import sys; sys.path += {site!r}\n{program}"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, cwd=model)


def test_another_version_of_the_same_model_stands_beside_the_first(tmp_path: Path) -> None:
    for version in ("1", "2"):
        arguments = ["embedded", "--to", "triton", "--out", str(tmp_path), "--version", version]
        assert main(arguments) == 0
    for name in MODELS:
        assert {each.name for each in (tmp_path / name).iterdir() if each.name.isdigit()} == {
            *("1", "2")
        }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image"], "leave --image and --text out"),
        (["--labels", "/nowhere/labels.txt"], "--labels /nowhere/labels.txt cannot be read"),
        (["--towers", "tensorrt", "--precision", "int8"], "int8"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["embedded", "--to", "triton", "--out", str(tmp_path / "new"), *options]
    assert main(arguments) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
