"""`python -m clip_server.benchmark`: the lines that people read, the table and the JSON agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import needs_torch

from clip_server.benchmark import main

CPU = ("--device", "cpu", "--batch-sizes", "1,3", "--repeat", "4")
NAMES = ("mean", "sd", "min", "max", "median", "95p", "99p")
FIGURES = ", ".join(rf"{name}=(\d+\.\d\d)ms" for name in NAMES)
LINE = re.compile(
    rf"^\[(\w+) (image|text) inference speed \(batch-size: (\d+)\):\] {FIGURES}$", re.MULTILINE
)


def benchmark(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What the command writes as JSON."""
    file = tmp_path / "speed.json"
    assert main([*arguments, "--json", str(file)]) == 0
    report: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return report


def test_lines_table_and_json_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = benchmark(
        tmp_path, "--runtime", "onnx", "--threads", "1", "--dtype", "fp32,int8", *CPU
    )
    printed = capsys.readouterr().out
    cases = [
        (dtype, tower, size, tokens)
        for dtype in ("fp32", "int8")
        for tower, tokens in (("image", 0), ("text", 16), ("text", 77))
        for size in (1, 3)
    ]
    results, lines = report["results"], LINE.findall(printed)
    assert len(results) == len(lines) == len(cases)
    for result, line, (dtype, tower, size, tokens) in zip(results, lines, cases, strict=True):
        assert (result["model"], result["device"]) == ("emoji-small::embedded", "cpu")
        assert (result["runtime"], result["dtype"], result["calls"]) == ("onnx", dtype, 4)
        assert (result["tower"], result["batch_size"], result["tokens"]) == (tower, size, tokens)
        assert line[:3] == ("ONNX", tower, str(size))
        figures = result["milliseconds"]
        assert tuple(figures) == NAMES
        assert [float(each) for each in line[3:]] == pytest.approx([*figures.values()], abs=0.006)
        assert 0 < figures["min"] <= figures["median"] <= figures["95p"] <= figures["99p"]
        assert figures["99p"] <= figures["max"]
        assert figures["min"] <= figures["mean"] <= figures["max"]
        assert 0 <= figures["sd"] <= figures["max"] - figures["min"]
        rate = result["items_per_second"]
        assert rate == pytest.approx(1000 * size / figures["median"])
        row = re.search(rf"^\| onnx +\| {dtype} +\| cpu +\| +{size} \| (.*) \|$", printed, re.M)
        assert row, printed
        cells = [each.strip() for each in row.group(1).split("|")]
        place = 2 * [("image", 0), ("text", 16), ("text", 77)].index((tower, tokens))
        assert cells[place : place + 2] == [f"{figures['median']:.2f}", f"{rate:,.0f}"]
    assert "image ms | image /s | text(16) ms | text(16) /s | text(77) ms |" in printed


@needs_torch
@pytest.mark.usefixtures("one_torch_thread")
def test_every_runtime_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = benchmark(tmp_path, "--tokens", "77", "--dtype", "fp32,fp0", *CPU)
    assert [each["runtime"] for each in report["results"]] == ["torch"] * 4 + ["onnx"] * 4
    assert {line[0] for line in LINE.findall(capsys.readouterr().out)} == {"TORCH", "ONNX"}
    assert [each["variant"] for each in report["unavailable"]] == ["torch fp0", "onnx fp0"]
    assert all("'fp0'" in each["why"] for each in report["unavailable"])


def test_what_cannot_be_timed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["ViT-B-99"], "no model is named 'ViT-B-99'"),
        (["--runtime", "onnx", "--dtype", "fp0"], "nothing of embedded could be timed"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
    for arguments, message in (
        (["--batch-sizes", "1,0"], "'0' is not a whole number from 1"),
        (["--json", "/"], "'/' is not a file in a folder that exists"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert message in capsys.readouterr().err
