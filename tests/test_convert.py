"""`python -m clip_server.convert`: folders that are served as they are, as near as they claim."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import seeded
from conftest import Start, flow, needs_torch

from clip_client import Client
from clip_server.convert import chinese_clip
from clip_server.convert.__main__ import main
from clip_server.convert.parity import LEAST_COSINE, Parity
from clip_server.convert.rewrite import rewrite
from clip_server.errors import ConfigurationError
from clip_server.model_card import PRECISIONS, Precision
from clip_server.models import zoo
from clip_server.preprocess.tokenizer import pad, tokenizer_for
from clip_server.runtimes.onnx import OnnxRuntime, open_tower
from clip_server.towers import onnx_file, quantize

BUILT = {"vision transformer": seeded.SMALL_VIT, "residual network": seeded.SMALL_RESNET}
# Of CLIP's own kind, but for what the graph builder does not know.
EXPORTED = {
    "embed_dim": 32,
    "vision_cfg": seeded.SMALL_VIT["vision_cfg"] | {"layers": 1, "pool_type": "avg"},
    "text_cfg": seeded.SMALL_TEXT | {"layers": 1, "pool_type": "eos", "eos_id": 599},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a seeded checkpoint of a configuration."""
    pytest.importorskip("open_clip")

    folders: dict[str, Path] = {}

    def saved(config: dict[str, Any]) -> Path:
        described = repr(config)
        if described not in folders:
            folder = tmp_path_factory.mktemp("source")
            folders[described] = seeded.save(seeded.open_clip_model(config), folder, config)
        return folders[described]

    return saved


def assert_equal(found: Any, source: Path, precision: Precision) -> None:
    """A runtime gives the vectors of torch, for batches and texts of several lengths."""
    from clip_server.runtimes.torch import TorchRuntime

    expected = TorchRuntime.load("small", model_path=source, device="cpu")
    config, text = expected.card.config, expected.card.text
    least = min(5, text.context_length)
    for batch in (1, 3):
        pixels = seeded.random_pixels(config, batch)
        of_images = Parity.of(found.encode_image(pixels), expected.encode_image(pixels))
        assert of_images.suffices(precision)
        for longest in (least, text.context_length):
            tokens = seeded.random_tokens(config, batch, longest)
            if text.trim != "fixed":
                tokens = tokens[:, :longest]
            of_texts = Parity.of(found.encode_text(tokens), expected.encode_text(tokens))
            assert of_texts.suffices(precision)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *(("vision transformer", precision) for precision in PRECISIONS),
        ("residual network", "fp32"),
        *(
            pytest.param("residual network", each, marks=pytest.mark.slow)
            for each in PRECISIONS[1:]
        ),
    ],
)
def test_a_folder_needs_nothing_else(
    name: str, precision: Precision, sources: Any, tmp_path: Path
) -> None:
    source, out = sources(BUILT[name]), tmp_path / "new" / "folder"
    assert main([str(source), "--precision", precision, "--out", str(out)]) == 0
    runtime = OnnxRuntime.load("any name", model_path=out, device="cpu", threads=1)
    assert runtime.precision == precision
    assert runtime.card == zoo.resolve("", source)
    assert_equal(runtime, source, precision)
    with pytest.raises(ConfigurationError, match=f"run unchanged, in {precision}"):
        OnnxRuntime.load("any name", model_path=out, precision="bf16")


@pytest.mark.slow
def test_an_exported_family(sources: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    source = sources(EXPORTED)
    assert main([str(source), "--precision", "fp16", "--out", str(tmp_path)]) == 0
    runtime = OnnxRuntime.load("any name", model_path=tmp_path, device="cpu", threads=1)
    assert (runtime.precision, runtime.card) == ("fp16", zoo.resolve("", source))
    assert_equal(runtime, source, "fp16")
    for file in ("visual.onnx", "textual.onnx"):
        model = onnx.load(tmp_path / file)
        onnx.checker.check_model(model, full_check=True)
        assert [value.name for value in model.graph.output] == ["embedding"]
        # Nothing of the machine it was exported on.
        assert str(Path(sys.prefix)).encode() not in (tmp_path / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext", "eva", "mobileclip"])
def test_every_exported_family_in_every_precision(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("open_clip")
    import test_models_parity as families

    config, _ = families.FAMILIES[name]
    source = seeded.save(families.open_clip_model(config), tmp_path / "source", config)
    assert main([str(source), "--out", str(tmp_path)]) == 0
    assert_equal(OnnxRuntime.load("any name", model_path=tmp_path, device="cpu"), source, "fp32")
    inputs = {
        "visual.onnx": seeded.random_pixels(config, 3),
        "textual.onnx": seeded.random_tokens(config, 3, 20),
    }
    for file, batch in inputs.items():
        exact, model = open_tower(tmp_path / file)(batch), onnx.load(tmp_path / file)
        for precision in PRECISIONS[1:]:
            onnx_file.save(rewrite(model, precision), tmp_path / "less.onnx")
            parity = Parity.of(open_tower(tmp_path / "less.onnx")(batch), exact)
            assert parity.difference > 0
            assert parity.suffices(precision)


@needs_torch
@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_torchscript(precision: Precision, sources: Any, tmp_path: Path) -> None:
    from clip_server.runtimes.torch import TorchRuntime

    source = sources(seeded.SMALL_VIT)
    given = [str(source), "--to", "torchscript", "--precision", precision, "--out", str(tmp_path)]
    assert main(given) == 0
    runtime = TorchRuntime.load("any name", model_path=tmp_path, device="cpu")
    assert (runtime.precision, runtime.card) == (precision, zoo.resolve("", source))
    assert_equal(runtime, source, precision)


@pytest.mark.slow
def test_a_server_of_a_converted_model(start: Start, tmp_path: Path) -> None:
    assert main(["embedded", "--precision", "int8", "--out", str(tmp_path)]) == 0
    server = start(flow("onnx", model_path=str(tmp_path), name="any name"))
    found = Client(server.grpc).encode(["a cat", "a smiling dog"])
    spec = zoo.resolve("embedded").text
    tokens = pad([tokenizer_for(spec).encode(text) for text in ("a cat", "a smiling dog")], spec)
    expected = OnnxRuntime.load("embedded", precision="int8", device="cpu").encode_text(tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def convert_without(package: str, out: Path) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from clip_server.convert.__main__ import main\n"
        f"sys.exit(main(['embedded', '--precision', 'fp16', '--out', {str(out)!r}]))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_without_torch_the_source_is_our_own_graph(tmp_path: Path) -> None:
    done = convert_without("torch", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "lowest cosine with onnx fp32" in done.stdout


def test_without_onnx_it_says_what_to_install(tmp_path: Path) -> None:
    done = convert_without("onnx", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "clip_server.convert: the onnx package is not installed: "
        "pip install 'clip-microservice[onnx]' "
        "(in a checkout: pip install ./clip_client '.[onnx]')\n"
    )


def test_what_falls_short_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantize, "LARGEST", 3)  # integers of three bits
    assert main(["embedded", "--text", "--precision", "int8", "--out", str(tmp_path)]) == 1
    assert f"FAIL: below {LEAST_COSINE['int8']}" in capsys.readouterr().out


def test_graphs_too_large_for_one_file(
    sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)
    source = sources(seeded.SMALL_VIT)
    for _ in range(2):
        assert main([str(source), "--out", str(tmp_path)]) == 0
        sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
        assert sizes["visual.onnx"] < 100_000 < sizes["visual.onnx.data"] < 4_000_000
    assert_equal(OnnxRuntime.load("", model_path=tmp_path, device="cpu"), source, "fp32")
    assert_equal(OnnxRuntime.load("", model_path=source, device="cpu"), source, "fp32")


def test_one_tower_and_then_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path)]
    assert main(["embedded", "--text", *out]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["card.json", "textual.onnx"]
    with pytest.raises(ConfigurationError, match="without both towers for this runtime"):
        OnnxRuntime.load("any name", model_path=tmp_path)
    assert main(["embedded", "--image", "--precision", "int8", *out]) == 1
    assert "is of emoji-small::embedded in fp32: choose another folder" in capsys.readouterr().err
    assert main(["embedded", "--image", *out]) == 0
    assert OnnxRuntime.load("any name", model_path=tmp_path).card.dim == 256


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["embedded", "--to", "torchscript", "--precision", "int8"], "TorchScript has no int8"),
        (["embedded", "--context-length", "78"], "may be 3 to 77, not 78"),
        (
            ["M-CLIP/XLM-Roberta-Large-Vit-B-32", "--context-length", "513"],
            "may be 3 to 512, not 513",
        ),
        (["ViT-B-99"], "no model is named 'ViT-B-99'"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "torchscript" in arguments:
        pytest.importorskip("open_clip")
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.onnx"))


def test_texts_may_be_cut_shorter(tmp_path: Path) -> None:
    given = ["embedded", "--text", "--context-length", "20", "--out", str(tmp_path)]
    assert main(given) == 0
    assert zoo.resolve("any name", tmp_path).text.context_length == 20


def test_a_card_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(json.dumps({"precision": "fp32", "name": "x"}))
    with pytest.raises(ConfigurationError, match=r"card\.json is not the card of a model"):
        zoo.resolve("any name", tmp_path)


def test_chinese_clips_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    theirs = [
        *("--model-arch", "ViT-B-16", "--pytorch-ckpt-path", "missing/epoch_3.pt"),
        *("--save-onnx-path", "out/vit", "--convert-text", "--convert-vision"),
    ]
    assert chinese_clip.translate(theirs) == [
        "CN-CLIP/ViT-B-16::missing/epoch_3.pt",
        *("--to", "onnx", "--out", "out/vit", "--context-length", "52", "--text", "--image"),
    ]
    assert main([*theirs, "--precision", "fp16"]) == 1
    assert "no checkpoint at missing/epoch_3.pt" in capsys.readouterr().err
    assert chinese_clip.translate(["embedded", "--out", "x"]) == ["embedded", "--out", "x"]
