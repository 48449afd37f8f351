"""The gallery command, with PaddleClas' configuration."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import SAMPLES

from clip_server.gallery.__main__ import main

IMAGES = sorted(SAMPLES.glob("*.png"))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration in a folder with images and texts, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIP_MODEL", "embedded")
    images = tmp_path / "images"
    images.mkdir()
    for image in IMAGES:
        shutil.copy(image, images)
    (tmp_path / "texts.txt").write_text("a smiling cat\na red car\na slice of pizza\n")
    file = tmp_path / "gallery.yml"
    file.write_text(
        yaml.safe_dump(
            {
                "Global": {"mode": "image_index_build", "infer_imgs": "images", "batch_size": 3,
                           "texts": "texts.txt", "use_gpu": False, "cpu_num_threads": 10,
                           "embedding_size": 256},
                "PreProcess": {"transform_ops": [
                    {"ResizeImage": {"resize_short": 64, "interpolation": "bicubic"}},
                    {"NormalizeImage": {"mean": [0.5, 0.5, 0.5]}}, {"ToCHWImage": None}]},
                "IndexProcess": {"index_method": "HNSW32", "image_index_dir": "index/images",
                                 "text_index_dir": "index/texts", "index_operation": "new",
                                 "delimiter": "\t", "dist_type": "IP", "embedding_size": 256,
                                 "return_k": 2},
            }
        )
    )  # fmt: skip
    return file


def run(command: str, *arguments: str) -> int:
    return main([command, "-c", "gallery.yml", *arguments])


def overrides(**values: Any) -> list[str]:
    return [f"--override={key.replace('__', '.')}={value}" for key, value in values.items()]


def changed_model(folder: Path) -> Path:
    """The built-in model with other weights."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(SAMPLES.parent, folder, ignore=shutil.ignore_patterns("samples"))
    weights = load_file(folder / "open_clip_model.safetensors")
    random = np.random.default_rng(0)
    for name in ("text_projection", "visual.attnpool.c_proj.weight"):
        tensor = weights[name]
        noise = random.normal(size=tensor.shape) * np.std(tensor.astype(np.float32))
        weights[name] = (tensor + 0.5 * noise).astype(tensor.dtype)
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def query(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    capsys.readouterr()
    assert run("query", *arguments) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.usefixtures("config")
def test_new_append_remove(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", "--report", "report.json") == 0
    said = capsys.readouterr().err
    assert "Global.cpu_num_threads is not used" in said
    assert "NormalizeImage.mean is [0.5, 0.5, 0.5]; the model's own" in said
    assert "resize_short" not in said
    assert f"{len(IMAGES)} rows in the collection (HNSW32)" in said
    assert json.loads(Path("report.json").read_text())["stored"] == len(IMAGES)
    by_text = overrides(Global__mode="text-to-image")
    found = query(capsys, *by_text)
    assert [each[0] for each in found] == [f"images/{n}.png" for n in ("cat", "car", "pizza")]
    assert [len(each) for each in found] == [2, 2, 2]
    few = overrides(IndexProcess__return_k=1, IndexProcess__score_thres=0.99)
    by_image = overrides(Global__mode="image-to-image")
    assert query(capsys, *by_image, *few, "images/dog.png") == [["images/dog.png"]]
    assert query(capsys, *by_text, *few, "a dog") == [[]]
    # The same path replaces its row, another operation than that of the file by -o.
    shutil.copy("images/cat.png", "another.png")
    more = overrides(Global__infer_imgs="another.png", IndexProcess__index_operation="append")
    assert run("build", *more) == 0
    assert run("append", *more) == 0
    assert f"{len(IMAGES) + 1} rows" in capsys.readouterr().err
    assert sorted(query(capsys, *by_text, "a smiling cat")[0]) == ["another.png", "images/cat.png"]
    assert run("remove", *overrides(Global__infer_imgs="another.png")) == 0
    assert "1 removed" in capsys.readouterr().err
    assert run("build", *overrides(Global__infer_imgs="images/cat.png")) == 0
    assert "1 rows" in capsys.readouterr().err


@pytest.mark.usefixtures("config")
def test_texts_and_a_contact_sheet(capsys: pytest.CaptureFixture[str]) -> None:
    Path("labels.txt").write_text("a dog\tanimal\na house\tthing\n")
    texts = overrides(Global__mode="text_index_build", Global__texts="[texts.txt, labels.txt]",
                      IndexProcess__index_method="IVF", IndexProcess__dist_type="L2")  # fmt: skip
    assert run("build", *texts) == 0
    settings = overrides(Global__mode="image-to-text", IndexProcess__dist_type="L2")
    assert query(capsys, *settings, "images/dog.png")[0][0] == "a dog"
    assert run("build") == 0
    assert run("query", *overrides(Global__mode="text-to-image"), "--sheet", "sheet.png") == 0
    from PIL import Image

    with Image.open("sheet.png") as sheet:
        assert sheet.width > 2 * 128
        assert np.asarray(sheet).std() > 20


@pytest.mark.usefixtures("config")
def test_other_sources(capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    Path("list.txt").write_text("cat.png\tanimal\ncar.png\tthing\nmissing.png\n")
    Path("rows.jsonl").write_text(
        '{"image": "images/dog.png", "id": "dog", "colour": "brown"}\n'
        '{"image": "images/tree.png", "tags": {"colour": "green"}}\n'
    )
    with tarfile.open("shard.tar", "w") as shard:
        for name, content in {"0001.png": (SAMPLES / "pizza.png").read_bytes(),
                              "0001.txt": b"a pizza", "0001.json": b'{"width": 64}',
                              "0002.jpg": b"junk"}.items():  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    vector = np.eye(256, dtype=np.float32)[5].tolist()
    table = {"id": ["own", "short"], "embedding": [vector, [1.0]], "colour": ["blue", "red"]}
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(table), "vectors.parquet")
    everything = "[list.txt, rows.jsonl, shard.tar, vectors.parquet, 'images/r*.png']"
    root = overrides(Global__infer_imgs="list.txt", IndexProcess__image_root="images")
    assert run("build", *root) == 0
    assert "left out: images/missing.png: it cannot be read" in capsys.readouterr().err
    assert run("build", *overrides(Global__infer_imgs=everything), "--report", "out.json") == 0
    report = json.loads(Path("out.json").read_text())
    assert report["stored"] == 5  # dog, tree, pizza, own, rocket
    assert {Path(each).name for each in report["errors"]} == {
        "cat.png", "car.png", "missing.png", "0002", "short",
    }  # fmt: skip
    brown = overrides(IndexProcess__filter='{"colour": "brown"}', Global__mode="text-to-image")
    assert query(capsys, *brown, "anything") == [["images/dog.png"]]
    found = query(capsys, *overrides(Global__mode="text-to-image"), "a slice of pizza")
    assert found[0][0] == "shard.tar/0001"


@pytest.mark.slow
@pytest.mark.usefixtures("config")
def test_reindex_by_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build") == 0
    other = overrides(Global__model_path=changed_model(tmp_path / "other"))
    assert run("append", *other) == 1
    assert "is of another model" in capsys.readouterr().err
    Path("images/dog.png").rename("elsewhere.png")
    assert run("reindex", *other) == 1
    assert "stays as it was" in capsys.readouterr().err
    assert len(query(capsys, *overrides(Global__mode="text-to-image"))[0]) == 2
    assert run("reindex", *other, "--drop-missing") == 0
    assert f"{len(IMAGES) - 1} encoded by" in capsys.readouterr().err
    again = query(capsys, *overrides(Global__mode="image-to-image"), *other, "images/cat.png")
    assert again[0][0] == "images/cat.png"
    assert not list(Path("index").glob("*.new")) + list(Path("index").glob("*.old"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "Global.nobody=1"], "the keys are Global.mode"),
        (["-o", "Global.mode=video"], "none of image_index_build"),
        (["-o", "IndexProcess.index_operation=drop"], "none of new, append, remove"),
        (["-o", "IndexProcess.index_method=PQ"], "none of auto, Flat"),
        (["-o", "Global.batch_size=many"], "is not a whole number"),
        (["-o", "Global.embedding_size=512"], "has 256 dimensions"),
        (["-o", "Global.infer_imgs=nowhere"], "no such file or folder"),
    ],
)
@pytest.mark.usefixtures("config")
def test_mistakes(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", *arguments) == 1
    assert said in capsys.readouterr().err
    assert not Path("index/images").exists()
