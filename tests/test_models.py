"""The list of models, and a checkpoint of one's own served by its path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import seeded

from clip_server.errors import WeightsError
from clip_server.models import __main__ as command
from clip_server.models import zoo
from clip_server.runtimes.onnx import OnnxRuntime


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert command.main([*arguments, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_the_list_has_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    models = listed(capsys)
    assert [each["name"] for each in models] == zoo.names()
    assert models[0] == {
        "name": zoo.EMBEDDED,
        "dimensions": 256,
        "context": 77,
        "image": 64,
        "language": "en",
        "cost": models[0]["cost"],
        "runtimes": ["torch", "onnx", "tensorrt"],
        "licence": "Apache-2.0",
        "cached": True,
        "other_names": ["embedded"],
    }


def test_a_model_is_found_by_any_of_its_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert [each["name"] for each in listed(capsys, "vit-l/14@")] == ["ViT-L-14-336::openai"]
    assert [each["name"] for each in listed(capsys, "siglip2", "b-32")] == [
        "ViT-B-32-SigLIP2-256::webli"
    ]
    assert len(listed(capsys, "openai")) == 9


def test_models_are_filtered_by_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys, "--runtime", "onnx", "--dimensions", "768", "--licence", "apache")
    names = {each["name"] for each in found}
    assert {"ViT-B-16-SigLIP2::webli", "ViT-B-16-SigLIP::webli"} <= names
    assert all("onnx" in each["runtimes"] and each["dimensions"] == 768 for each in found)
    assert {each["licence"] for each in found} == {"Apache-2.0"}
    german = {each["name"] for each in listed(capsys, "--language", "de")}
    assert {"ViT-B-16-SigLIP2::webli", "M-CLIP/LABSE-Vit-L-14"} <= german
    assert not {"ViT-B-16-SigLIP::webli", "CN-CLIP/RN50", "ViT-B-32::openai"} & german
    chinese = {each["name"] for each in listed(capsys, "--language", "zh")}
    assert chinese == german | {each["name"] for each in listed(capsys, "cn-clip")}
    assert command.main(["--dimensions", "7"]) == 1
    assert "no model has all of these properties" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "parameters", "image_macs", "text_macs"),
    [
        ("ViT-L-14::openai", 427_616_513, 81_012_768_768, 6_649_841_664),
        ("MobileCLIP2-S0::dfndr2b", 74_835_073, 2_385_149_952, 2_979_770_368),
    ],
)
def test_a_model_says_what_it_costs(
    name: str, parameters: int, image_macs: int, text_macs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torch counts parameters, and its FlopCounterMode the multiply-accumulates."""
    (model,) = listed(capsys, name)
    cost = model["cost"]
    assert cost["parameters"] == parameters
    assert cost["image_macs"] == pytest.approx(image_macs, rel=1e-3)
    assert cost["text_macs"] == pytest.approx(text_macs, rel=1e-3)
    assert cost["memory"]["fp32"] == 2 * cost["memory"]["fp16"] == 4 * cost["parameters"]
    assert 0.25 < cost["memory"]["int8"] / cost["memory"]["fp32"] < 0.4


def test_every_model_runs_on_onnx_from_its_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    every = listed(capsys)
    assert len(every) > 170
    assert [each["name"] for each in every if "onnx" not in each["runtimes"]] == []


def test_the_list_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["RN50x4", "ViT-B-16-SigLIP::"]) == 1
    assert "no name contains 'RN50x4' and 'ViT-B-16-SigLIP::'" in capsys.readouterr().err
    assert command.main(["ViT-B-16-SigLIP::"]) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    columns = ["name", "dimensions", "context", "image", "language", "parameters", "runtimes"]
    columns += ["licence", "cached"]
    assert header.replace("|", " ").split() == columns
    served = ["torch,", "onnx,", "tensorrt"]
    *cells, cached = row.replace("|", " ").split()
    assert cells == [
        "ViT-B-16-SigLIP::webli",
        "768",
        "64",
        "224",
        "en",
        "203M",
        *served,
        "Apache-2.0",
    ]
    assert cached in ("yes", "no")


def test_a_trainers_checkpoint_is_served_by_its_path(tmp_path: Path) -> None:
    """The same vectors as from the weights themselves, in both runtimes."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("open_clip")
    from clip_server.runtimes.torch import TorchRuntime

    model = seeded.open_clip_model(seeded.SMALL_VIT)
    file = tmp_path / "epoch_10.pt"
    tensors = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 10, "name": "mine", "state_dict": tensors}, file)
    seeded.describe(tmp_path, seeded.SMALL_VIT)
    pixels = seeded.random_pixels(seeded.SMALL_VIT, 2)
    tokens = seeded.random_tokens(seeded.SMALL_VIT, 2, longest=9)
    for runtime in (TorchRuntime.load(str(file)), OnnxRuntime.load(str(file))):
        assert runtime.card.name == "epoch_10"
        assert runtime.card.logit_scale == pytest.approx(model.logit_scale.exp().item())
        images, texts = runtime.encode_image(pixels), runtime.encode_text(tokens[:, :9])
        assert seeded.relative(images, seeded.reference_images(model, pixels)) < 1e-4
        assert seeded.relative(texts, seeded.reference_texts(model, tokens)) < 1e-4


def test_a_path_to_nothing_is_an_error() -> None:
    with pytest.raises(WeightsError, match="no checkpoint at /no/such/folder"):
        zoo.resolve("/no/such/folder")
