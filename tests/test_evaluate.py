"""`python -m clip_server.evaluate`: its scores are those of brute force, over real files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SAMPLES, Server, needs_torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from clip_client import Client
from clip_server import runtimes
from clip_server.convert.writers import writer
from clip_server.evaluate import data, encoders
from clip_server.evaluate.__main__ import main
from clip_server.evaluate.data import DataError
from clip_server.models import converted, weights, zoo
from clip_server.preprocess.image import ImageTransform
from clip_server.preprocess.tokenizer import tokenizer_for
from clip_server.rpc.probes import PROBE_TEXT
from clip_server.runtimes.loading import load_checkpoint
from clip_server.runtimes.onnx import OnnxRuntime
from clip_server.search.relevance import Unrelated

ONNX = ("--runtime", "onnx", "--device", "cpu", "--threads", "1")
CARD = zoo.resolve("embedded")
TOKENIZER, TRANSFORM = tokenizer_for(CARD.text), ImageTransform(CARD.image)


@pytest.fixture(scope="module")
def embedded() -> OnnxRuntime:
    return OnnxRuntime.load("embedded", device="cpu", threads=1)


def evaluate(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    """What the command writes as JSON."""
    file = tmp_path / "scores.json"
    assert main([*map(str, arguments), "--json", str(file)]) == 0
    report: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return report


def captions_of(picture: Path) -> list[str]:
    return picture.with_suffix(".txt").read_text().strip().split("\n\n")


def write_pairs(file: Path, pictures: list[Path]) -> Path:
    """JSONL with a line for a first caption, and one for a list of the others."""
    lines = []
    for picture in pictures:
        first, *others = captions_of(picture)
        lines += [{"image": str(picture), "caption": first}]
        lines += [{"image": str(picture), "caption": others}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def unit(vector: NDArray[np.float32]) -> NDArray[np.float64]:
    return vector.astype(np.float64) / np.linalg.norm(vector.astype(np.float64))


def vector_of(runtime: OnnxRuntime, item: str | Path) -> NDArray[np.float64]:
    """Of a text or a picture, encoded alone."""
    if isinstance(item, str):
        return unit(runtime.encode_text(TOKENIZER.encode(item)[None])[0])
    return unit(runtime.encode_image(TRANSFORM(item.read_bytes())[None])[0])


def places(
    queries: list[NDArray[np.float64]],
    targets: list[NDArray[np.float64]],
    right: list[set[int]],
) -> list[int]:
    """For each query where its first right answer stands among all targets, from 1."""
    found = []
    for query, answers in zip(queries, right, strict=True):
        order = sorted(range(len(targets)), key=lambda index: -float(query @ targets[index]))
        found.append(1 + min(order.index(answer) for answer in answers))
    return found


def share(places: list[int], most: int) -> float:
    return sum(place <= most for place in places) / len(places)


def brute_force(runtime: OnnxRuntime, pictures: list[Path]) -> dict[str, float]:
    pairs = [(index, text) for index, each in enumerate(pictures) for text in captions_of(each)]
    images = [vector_of(runtime, picture) for picture in pictures]
    texts = [vector_of(runtime, text) for _, text in pairs]
    own: list[set[int]] = [set() for _ in pictures]
    for row, (index, _) in enumerate(pairs):
        own[index].add(row)
    ways = {
        "text to image": places(texts, images, [{index} for index, _ in pairs]),
        "image to text": places(images, texts, own),
    }
    scores = {f"{way} R@{k}": share(found, k) for way, found in ways.items() for k in (1, 5, 10)}
    scores["mean recall"] = sum(scores.values()) / 6
    for way, found in ways.items():
        scores[f"{way} MRR"] = sum(1 / place for place in found) / len(found)
    for kind in ("int8", "binary"):
        kept = [nearest(text, images) & nearest(text, images, kind) for text in texts]
        scores[f"{kind} neighbours @10"] = sum(map(len, kept)) / 10 / len(texts)
    return scores


def nearest(
    query: NDArray[np.float64], targets: list[NDArray[np.float64]], kind: str = ""
) -> set[int]:
    """The ten nearest, of whole rows or of quantized ones."""

    def distance(index: int) -> float:
        if kind == "binary":
            return float(((query > 0) != (targets[index] > 0)).sum())
        if kind == "int8":
            near, far = (np.round(127 * row / abs(row).max()) for row in (query, targets[index]))
            return -float(unit(near) @ unit(far))
        return -float(query @ targets[index])

    return set(sorted(range(len(targets)), key=distance)[:10])


def test_retrieval_is_that_of_brute_force(
    gallery: Path, embedded: OnnxRuntime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = sorted(gallery.glob("*.png"))
    pairs = write_pairs(tmp_path / "pairs.jsonl", pictures)
    report = evaluate(tmp_path, "retrieval", pairs, *ONNX)
    (result,) = report["results"]
    expected = brute_force(embedded, pictures)
    assert 0.1 < expected["text to image R@1"] < expected["text to image R@5"] < 1
    assert result["scores"] == pytest.approx(expected)
    assert (report["images"], report["texts"], report["left_out"]) == (24, 48, {})
    assert (report["reference"], result["name"], result["device"]) == (*["onnx fp32"] * 2, "cpu")
    printed = capsys.readouterr().out
    assert "emoji-small::embedded: 24 images, 48 texts, 0 left out" in printed
    for score, value in expected.items():
        assert re.search(rf"^\| {score} +\| +{100 * value:.2f} \|$", printed, re.MULTILINE)


def test_relevance_is_that_of_brute_force(
    gallery: Path, embedded: OnnxRuntime, tmp_path: Path
) -> None:
    pictures = sorted(gallery.glob("*.png"))
    pairs = write_pairs(tmp_path / "pairs.jsonl", pictures)
    images = [vector_of(embedded, picture) for picture in pictures]
    probe = vector_of(embedded, PROBE_TEXT)
    best: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for index, picture in enumerate(pictures):
        for query in (vector_of(embedded, text) for text in captions_of(picture)):
            for half in (0, 1):
                collection = np.array(images[half::2])
                cosines = collection @ query
                score = float(cosines.max())
                found = Unrelated.fitted(cosines, collection @ probe, len(collection))
                assert found is not None
                best[index % 2 == half].append((score, found.relevance(score)))
    duels = [(here, gone) for here in best[True] for gone in best[False]]
    (result,) = evaluate(tmp_path, "relevance", pairs, *ONNX)["results"]
    for place, name in enumerate(("best cosine ROC AUC", "best relevance ROC AUC")):
        expected = sum(here[place] > gone[place] for here, gone in duels) / len(duels)
        assert 0 < expected < 1
        # A draw may be none in the other's arithmetic.
        assert result["scores"][name] == pytest.approx(expected, abs=0.01)


def test_relevance_takes_more_than_a_few_images(gallery: Path, tmp_path: Path) -> None:
    for picture in sorted(gallery.glob("*.png"))[:9]:
        shutil.copy(picture, tmp_path)
        shutil.copy(picture.with_suffix(".txt"), tmp_path)
    task = data.Presence(data.read_pairs(tmp_path))
    images, texts = (np.ones((len(each), 2), np.float32) for each in (task.images, task.texts))
    with pytest.raises(DataError, match="9 images are left to evaluate; relevance takes 16"):
        task.scores(images, texts)


def test_a_folder_is_the_same_as_its_lines(gallery: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", sorted(gallery.glob("*.png")))
    found, expected = (evaluate(tmp_path, "retrieval", path, *ONNX) for path in (gallery, pairs))
    assert found["results"] == expected["results"]


def test_ties_count_against_the_model(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        shutil.copy(SAMPLES / f"{name}.png", tmp_path)
        (tmp_path / f"{name}.txt").write_text("a cat")
    (result,) = evaluate(tmp_path.parent, "retrieval", tmp_path, *ONNX)["results"]
    assert result["scores"]["text to image R@1"] == 0.5
    assert result["scores"]["image to text R@1"] == 0
    assert result["scores"]["image to text MRR"] == 0.5


def test_what_cannot_be_used_is_told_and_left_out(
    gallery: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = sorted(gallery.glob("*.png"))[:12]
    pairs = write_pairs(tmp_path / "pairs.jsonl", pictures)
    expected = evaluate(tmp_path, "retrieval", pairs, *ONNX)
    (tmp_path / "cut.png").write_bytes(pictures[0].read_bytes()[:200])
    (tmp_path / "text.jpg").write_text("this is no picture")
    with pairs.open("ab") as file:
        for line in (
            b'{"image": "cut.png", "caption": "a picture cut short"}',
            b'{"image": "text.jpg", "caption": ["not a picture", "not one either"]}',
            b'{"image": "absent.png", "caption": "not there"}',
            b'{"image": "absent.png", "caption": " "}',
            b'{"image": 7, "caption": "a number"}',
            b'{"image": "cut.png", "caption": [1]}',
            b'["cut.png", "a list"]',
            b"{",
            b'{"image": "cut.png", "caption": "\xff"}',
        ):
            file.write(line + b"\n")
    capsys.readouterr()
    found = evaluate(tmp_path, "retrieval", pairs, *ONNX)
    assert found["results"] == expected["results"]
    printed = capsys.readouterr()
    assert ", 9 left out" in printed.out
    for place, why in {
        "cut.png": "it is cut off",
        "text.jpg": "not a picture|not an image",
        "absent.png": "No such file",
        "pairs.jsonl:28": "the caption is empty",
        "pairs.jsonl:29": "'image' is not a path",
        "pairs.jsonl:30": "'caption' is not a text",
        "pairs.jsonl:31": "not a JSON object",
        "pairs.jsonl:32": "not JSON",
        "pairs.jsonl:33": "not JSON",
    }.items():
        assert re.search(why, found["left_out"][str(tmp_path / place)]), place
        assert f"left out: {tmp_path / place}: " in printed.err


def test_a_folder_with_files_that_have_no_partner(gallery: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for file in gallery.glob("cat.*"):
        shutil.copy(file, folder / "below")
    shutil.copy(gallery / "cat.png", folder / ".hidden")
    for name in ("lonely.png", "twice.png", "empty.png"):
        shutil.copy(gallery / "dog.png", folder / name)
    (folder / "twice.jpg").touch()
    (folder / "twice.txt").write_text("a dog")
    (folder / "empty.txt").write_text("\n")
    report = evaluate(tmp_path, "retrieval", folder, *ONNX)
    assert (report["images"], report["texts"]) == (1, 2)
    assert report["left_out"] == {
        str(folder / "empty.png"): f"{folder / 'empty.txt'} has no lines",
        str(folder / "lonely.png"): "it has no .txt file",
        str(folder / "twice.txt"): "2 images have its name; expected one",
    }


def test_precisions_stand_side_by_side(
    gallery: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate(tmp_path, "retrieval", gallery, *ONNX, "--dtype", "fp32,int8,fp0")
    exact, rounded = report["results"]
    assert (exact["name"], rounded["name"]) == ("onnx fp32", "onnx int8")
    assert "'fp0'" in report["unavailable"]["onnx fp0"]
    assert exact["scores"] != rounded["scores"]
    printed = capsys.readouterr()
    assert "onnx fp0: " in printed.err
    assert "and the difference to onnx fp32" in printed.out
    for score, value in exact["scores"].items():
        percent, other = 100 * value, 100 * rounded["scores"][score]
        row = re.search(rf"^\| {score} +\| +(\S+) \| +(\S+) \((\S+)\) \|$", printed.out, re.M)
        assert row, printed.out
        assert [float(each) for each in row.groups()] == pytest.approx(
            [percent, other, other - percent], abs=0.006
        )


def test_what_was_converted_stands_beside_it(gallery: Path, tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    folder.mkdir()
    card, tensors = load_checkpoint("embedded")
    for tower, file in runtimes.find("onnx").file_names.items():
        writer("onnx", card, tensors, "int8").write(tower, folder / file)
    converted.write(folder, card, "int8")
    report = evaluate(
        tmp_path, "retrieval", gallery, *ONNX, "--dtype", "int8", "--converted", folder
    )
    built, stored = report["results"]
    assert (built["name"], stored["name"]) == ("onnx int8", f"{folder} onnx int8")
    assert stored["scores"] == pytest.approx(built["scores"])


def test_embeddings_that_are_not_finite_are_told(gallery: Path, tmp_path: Path) -> None:
    tensors = load_file(zoo.checkpoint("embedded"))
    of_pizza = TOKENIZER.encode("pizza")[1]
    tensors["token_embedding.weight"][of_pizza] = np.inf
    folder = tmp_path / "broken"
    folder.mkdir()
    save_file(tensors, folder / weights.CHECKPOINT)
    shutil.copy(zoo.EMBEDDED_PATH / weights.CONFIG, folder)
    report = evaluate(tmp_path, "retrieval", gallery, *ONNX, "--model-path", folder)
    assert len(report["left_out"]) == 6
    for text, why in report["left_out"].items():
        assert "pizza" in text
        assert why == "onnx fp32 returned an embedding that is not finite"
    assert 0 < report["results"][0]["scores"]["mean recall"] < 1


@needs_torch
@pytest.mark.usefixtures("one_torch_thread")
def test_the_difference_is_to_torch(
    gallery: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate(tmp_path, "retrieval", gallery, "--device", "cpu")
    torch, onnx = report["results"]
    assert (torch["name"], onnx["name"]) == ("torch fp32", "onnx fp32")
    assert report["reference"] == "torch fp32"
    assert onnx["scores"] == pytest.approx(torch["scores"])
    assert capsys.readouterr().out.count("(+0.00)") == len(torch["scores"])


def test_a_server_has_the_scores_of_its_model(
    gallery: Path, onnx_server: Server, tmp_path: Path
) -> None:
    report = evaluate(tmp_path, "retrieval", gallery, *ONNX, "--server", onnx_server.grpc)
    server, here = report["results"]
    assert (server["name"], here["name"]) == ("server onnx fp32", "onnx fp32")
    assert server["scores"] == pytest.approx(here["scores"])


def test_zero_shot_is_that_of_brute_force(
    gallery: Path, embedded: OnnxRuntime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The sample's name is its class; in the file another name, and classes without pictures.
    names = {path.stem: f"small {path.stem}" for path in sorted(SAMPLES.glob("*.png"))}
    names |= {"none": "upside down pizza", "without": "negative dog"}
    templates = ["a {}.", "{}, a drawing of a {}", "the negative of a {}"]
    labelled = tmp_path / "labelled"
    for picture in gallery.glob("*.png"):
        (labelled / picture.stem.split("-")[-1]).mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, labelled / picture.stem.split("-")[-1])
    (labelled / "cat" / "notes.png").write_text("this is no picture")
    for file, lines in (
        ("classes.tsv", [f"{folder}\t{name}" for folder, name in names.items()]),
        ("templates.txt", templates),
    ):
        (tmp_path / file).write_text("\n".join(lines))
    report = evaluate(
        tmp_path, "zero-shot", labelled, *ONNX,
        "--classes", tmp_path / "classes.tsv", "--templates", tmp_path / "templates.txt",
    )  # fmt: skip
    prompts = [
        [vector_of(embedded, template.replace("{}", name)) for template in templates]
        for name in names.values()
    ]
    classes = [sum(of_one) / np.linalg.norm(sum(of_one)) for of_one in prompts]
    pictures = sorted(gallery.glob("*.png"))
    found = places(
        [vector_of(embedded, picture) for picture in pictures],
        classes,
        [{[*names].index(picture.stem.split("-")[-1])} for picture in pictures],
    )
    expected = {f"top-{k}": share(found, k) for k in (1, 5)}
    assert 0.2 < expected["top-1"] < expected["top-5"] <= 1
    assert report["results"][0]["scores"] == pytest.approx(expected)
    assert [*report["left_out"]] == [str(labelled / "cat" / "notes.png")]
    assert "25 images, 30 texts, 1 left out" in capsys.readouterr().out


def test_classes_are_named_by_their_folders(tmp_path: Path) -> None:
    for name in ("cat", "ice_cream", "rocket"):
        (tmp_path / name).mkdir()
    shutil.copy(SAMPLES / "cat.png", tmp_path / "cat")
    shutil.copy(SAMPLES / "rocket.png", tmp_path / "rocket")
    (result,) = evaluate(tmp_path, "zero-shot", tmp_path, *ONNX)["results"]
    assert result["scores"] == {"top-1": 1, "top-5": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["retrieval", "absent.jsonl"], "absent.jsonl cannot be read: No such file"),
        (["retrieval", "bad.jsonl"], r"no image with a caption \(bad.jsonl:1: it is not JSON"),
        (["retrieval", "lost.jsonl"], "no image with a caption is left to evaluate"),
        (["zero-shot", "absent"], "absent cannot be read: No such file"),
        (["zero-shot", "empty"], "empty has no subfolders"),
        (["zero-shot", ".", "--classes", "classes"], "classes does not name the class of empty"),
        (
            ["zero-shot", ".", "--templates", "classes"],
            "the template 'dog' has no {} for the class",
        ),
        (["retrieval", "lost.jsonl", "--name", "ViT-B-99"], "no model is named 'ViT-B-99'"),
        (["retrieval", "lost.jsonl", "--dtype", "fp0"], "nothing could be evaluated"),
        (["retrieval", "lost.jsonl", "--server", "grpc://127.0.0.1:9"], "127.0.0.1:9"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text("cat.png, a cat\n")
    (tmp_path / "lost.jsonl").write_text('{"image": "lost.png", "caption": "a cat"}\n')
    (tmp_path / "classes").write_text("dog\n")
    monkeypatch.setattr(encoders, "Client", partial(Client, connect_timeout=0.2))
    # A server is asked alone, unless runtimes are named too.
    assert main([*arguments, *(() if "--server" in arguments else ONNX)]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runtime", "caffe"], "no runtime is named 'caffe'"),
        (["--json", "absent/scores.json"], "'absent/scores.json' is not a file in a folder"),
        (["--threads", "0"], "'0' is not a whole number from 1"),
    ],
)
def test_misuse_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["retrieval", ".", *arguments])
    assert message in capsys.readouterr().err


def test_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clip_server.evaluate", "retrieval", "absent"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("clip_server.evaluate: absent cannot be read")
