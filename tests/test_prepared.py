"""The cache of prepared models: made once, and never loaded when it is not what was written."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeded
from exported import write_immich
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from test_exported import CLIP, IMAGE, tensors_of

from clip_server.errors import ConfigurationError
from clip_server.models import converted, zoo
from clip_server.models.__main__ import main
from clip_server.runtimes import prepared
from clip_server.runtimes.loading import load_checkpoint
from clip_server.runtimes.onnx import OnnxRuntime
from clip_server.runtimes.samples import samples
from clip_server.towers import graph, onnx_file

pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The caches, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches"


def embedding(model_path: Path | None = None) -> NDArray[np.float32]:
    """Of a text, by a model that has just been loaded."""
    runtime = OnnxRuntime.load("embedded", model_path=model_path, device="cpu", threads=1)
    return runtime.encode_text(samples(runtime.card, "text")[:1])


def weights_of(folder: Path) -> Path:
    return max(folder.rglob("*.data"), key=lambda file: file.stat().st_size)


def flip_a_bit(folder: Path) -> None:
    file = weights_of(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(folder: Path) -> None:
    os.truncate(weights_of(folder), 4096)


def fill_with_zeros(folder: Path) -> None:
    file = weights_of(folder)
    file.write_bytes(bytes(file.stat().st_size))


def swap_the_towers(folder: Path) -> None:
    (image,), (text,) = folder.rglob("image.onnx"), folder.rglob("text.onnx")
    content = image.read_bytes()
    image.write_bytes(text.read_bytes())
    text.write_bytes(content)


def swap_words(folder: Path) -> None:
    file = weights_of(folder)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2 & ~7
    content[middle : middle + 16] = content[middle + 8 : middle + 16] + content[middle : middle + 8]
    file.write_bytes(content)


def put_a_link_there(folder: Path) -> None:
    (entry,) = (each for each in folder.iterdir() if each.is_dir())
    shutil.rmtree(entry)
    entry.symlink_to(folder / "nowhere")
    entry.with_name(f"{entry.name}.part").write_text("")


def remove_a_file(folder: Path) -> None:
    weights_of(folder).unlink()


def garble_the_manifest(folder: Path) -> None:
    next(folder.rglob(prepared.MANIFEST)).write_text("[1]")


def leave_it_half_written(folder: Path) -> None:
    (entry,) = (each for each in folder.iterdir() if each.is_dir())
    shutil.copytree(entry, entry.with_name(f"{entry.name}.part"))
    (entry / prepared.MANIFEST).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        swap_words,
        put_a_link_there,
        garble_the_manifest,
        leave_it_half_written,
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (flip_a_bit, cut, fill_with_zeros, swap_the_towers, remove_a_file)
        ),
    ],
)
def test_what_is_damaged_is_made_again(damage: Callable[[Path], None]) -> None:
    expected = embedding()
    intact = {file: file.read_bytes() for file in prepared.folder().rglob("*") if file.is_file()}
    damage(prepared.folder())
    np.testing.assert_array_equal(embedding(), expected)
    found = {file: file.read_bytes() for file in prepared.folder().rglob("*") if file.is_file()}
    assert found == intact


@pytest.mark.parametrize(
    "damage", [flip_a_bit, pytest.param(shutil.rmtree, marks=pytest.mark.slow)]
)
def test_what_is_damaged_while_a_tower_is_unloaded_is_made_again(
    damage: Callable[[Path], None],
) -> None:
    runtime = OnnxRuntime.load("embedded", device="cpu", threads=1)
    tokens = samples(runtime.card, "text")[:1]
    expected = runtime.encode_text(tokens)
    assert runtime.towers["text"].unload(0)
    assert runtime.towers["image"].unload(0)
    damage(prepared.folder())
    np.testing.assert_array_equal(runtime.encode_text(tokens), expected)
    assert len(list(prepared.folder().rglob(prepared.MANIFEST))) == 1


@pytest.mark.parametrize("apart", [False, True])
def test_converted_towers_are_prepared_like_a_checkpoint(
    apart: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if apart:
        request.getfixturevalue("prepared_apart")
    expected = embedding()
    card, tensors = load_checkpoint("embedded")
    folder = tmp_path / "converted"
    folder.mkdir()
    for name, model in (
        ("visual", graph.build_visual(card.config, tensors, card.image)),
        ("textual", graph.build_textual(card.config, tensors)),
    ):
        onnx_file.save(model, folder / f"{name}.onnx")
    converted.write(folder, card, "fp32")
    np.testing.assert_allclose(embedding(folder), expected, atol=1e-5)
    assert len(list(prepared.folder().rglob(prepared.MANIFEST))) == 2
    shutil.rmtree(prepared.folder())
    prepared.folder().write_text("")  # it cannot be cached any more
    np.testing.assert_allclose(embedding(folder), expected, atol=1e-5)


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_graphs_of_others_are_prepared_like_a_checkpoint(
    apart: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if apart:
        request.getfixturevalue("prepared_apart")
    folder = tmp_path / "ViT-B-32__mine"
    tensors, others = tensors_of(CLIP), tables()

    def embeddings() -> NDArray[np.float32]:
        runtime = OnnxRuntime.load("mine", model_path=folder, device="cpu", threads=1)
        found = [runtime.encode_text(samples(runtime.card, "text")[:1])]
        found.append(runtime.encode_image(samples(runtime.card, "image")[:1]))
        if sys.platform == "linux":
            mapped = Path("/proc/self/maps").read_text()
            assert tables().keys() - others
            assert sum(str(file) in mapped for file in prepared.folder().rglob("*.data")) == 2
        return np.concatenate(found)

    write_immich(folder, CLIP, tensors, image=IMAGE, external=not apart)
    first = embeddings()
    before = {file: file.stat().st_mtime_ns for file in prepared.folder().rglob("*.data")}
    assert len(before) == 2
    np.testing.assert_array_equal(embeddings(), first)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    shutil.rmtree(folder)  # and exported again, after training, with other names of files
    tensors["ln_final.bias"] = tensors["ln_final.bias"] + 1
    write_immich(folder, CLIP, tensors, image=IMAGE, external=False if apart else "model.weights")
    assert np.abs(embeddings() - first)[0].max() > 0.01
    assert len([each for each in prepared.folder().iterdir() if each.is_dir()]) == 1


def tables(item_bytes: int = 4) -> dict[str, int]:
    """The tables of token embeddings in this process that are loaded row by row, by address: their
    resident KiB. item_bytes: of their numbers."""
    smaps = Path("/proc/self/smaps")
    content = smaps.read_text("utf-8") if smaps.exists() else ""
    found = {}
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", content, flags=re.MULTILINE):
        # Not in huge pages, as the stacks of threads, which have other sizes.
        size = rf"^Size: +{table_size(item_bytes)} kB"
        if all(re.search(each, mapping, re.MULTILINE) for each in (size, r"^VmFlags:.* nh\b")):
            found[mapping.split()[0]] = int(mapping.split("Rss:")[1].split()[0])
    return found


def table_size(item_bytes: int) -> int:
    """KiB of the table of SMALL_CLIP."""
    text = seeded.SMALL_CLIP["text_cfg"]
    return int(text["vocab_size"] * text["width"] * item_bytes) >> 10


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere tables are mapped")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_of_a_table_of_tokens_only_the_used_rows_are_in_memory(
    precision: str, tmp_path: Path
) -> None:
    text = seeded.SMALL_CLIP["text_cfg"]
    folder = seeded.save_drawn(tmp_path / "model", seeded.SMALL_CLIP)

    def load() -> OnnxRuntime:
        return OnnxRuntime.load("mine", model_path=folder, precision=precision, device="cpu")

    item_bytes = 4 if precision == "fp32" else 2
    others = tables(item_bytes)
    runtime = load()
    (table,) = tables(item_bytes).keys() - others
    runtime.encode_text(seeded.random_tokens(seeded.SMALL_CLIP, 8, 20))
    assert 0 < tables(item_bytes)[table] < table_size(item_bytes) / 10

    # Texts with every token, from several threads, each token in two of them.
    start, end = text["vocab_size"] - 2, text["vocab_size"] - 1
    ids = np.random.default_rng(1).permutation(start).astype(np.int32)
    ids = np.resize(ids, (-(-start // 64), 64))
    texts = np.pad(ids, ((0, 0), (1, 1)), constant_values=((0, 0), (start, end)))
    batches = [*np.array_split(texts, 20), *np.array_split(texts[::-1], 20)]
    with ThreadPoolExecutor(4) as threads:
        found = np.concatenate([*threads.map(runtime.encode_text, batches)])
    shutil.rmtree(prepared.folder())
    prepared.folder().write_text("")  # it cannot be cached any more, and is whole in memory
    expected = load().encode_text(texts)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found[: len(texts)] / scale, expected / scale, atol=1e-4)
    np.testing.assert_allclose(found[len(texts) :][::-1] / scale, expected / scale, atol=1e-4)


def test_it_is_made_once() -> None:
    embedding()
    before = {file: file.stat().st_mtime_ns for file in prepared.folder().rglob("*.data")}
    embedding()
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_a_checkpoint_that_is_replaced_is_prepared_again(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(zoo.EMBEDDED_PATH, folder)
    checkpoint = folder / "open_clip_model.safetensors"
    tensors = load_file(checkpoint)
    save_file(tensors, checkpoint)
    first, times = embedding(folder), checkpoint.stat()
    save_file(tensors | {"ln_final.bias": tensors["ln_final.bias"] + 1}, checkpoint)
    assert checkpoint.stat().st_size == times.st_size
    os.utime(checkpoint, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert np.abs(embedding(folder) - first).max() > 0.01
    assert len([each for each in prepared.folder().iterdir() if each.is_dir()]) == 1
    save_file(tensors, checkpoint)
    np.testing.assert_array_equal(embedding(folder), first)


@pytest.mark.parametrize("problem", ["not a folder", "full"])
def test_without_a_cache_it_is_served_with_one_warning(
    problem: str, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = embedding()
    shutil.rmtree(home)
    if problem == "full":
        usage = shutil.disk_usage(home.parent)._replace(free=1_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    else:
        home.write_text("")
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(embedding(), expected)
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "cannot be cached" in warning
    assert "XDG_CACHE_HOME" in warning


@pytest.mark.skipif(sys.platform == "win32", reason="users of Windows are known by variables")
def test_a_user_without_a_home_has_the_root_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def unknown(number: int) -> Any:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert prepared.folder() == Path("/.cache/clip-server/towers")


def test_the_list_of_models_shows_the_cache_and_clears_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    embedding()
    assert main(["embedded"]) == 0
    shown = capsys.readouterr().err
    assert str(prepared.folder()) in shown
    assert f"{prepared.size() / 2**20:,.0f} MiB" in shown
    assert main(["--clear-cache"]) == 0
    assert prepared.size() == 0


def test_replicas_that_start_together_make_it_once() -> None:
    program = (
        "from clip_server.runtimes.onnx import OnnxRuntime\n"
        "OnnxRuntime.load('embedded', device='cpu', threads=1)"
    )
    started = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    assert len(list(prepared.folder().rglob(prepared.MANIFEST))) == 1


@pytest.fixture
def prepared_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of any size are prepared in a process of their own, as large ones are."""
    monkeypatch.setattr("clip_server.runtimes.onnx_towers._LARGE", 0)


@pytest.mark.usefixtures("prepared_apart")
def test_a_process_of_its_own_prepares_the_same() -> None:
    expected = embedding()
    found = {file.name: file.read_bytes() for file in prepared.folder().rglob("*.data")}
    assert len(found) == 2
    np.testing.assert_array_equal(embedding(), expected)


def broken_python(folder: Path, end: str) -> str:
    """A Python that ends at once."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{end}\n")
    python.chmod(0o755)
    return str(python)


@pytest.mark.usefixtures("prepared_apart")
@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("kill -SEGV $$", "preparing it ended by SIGSEGV"),
        ("echo MemoryError >&2; exit 1", "preparing it failed: MemoryError"),
        ("echo 'other embeddings' >&2; exit 73", "other embeddings"),
    ],
)
def test_where_preparing_fails_it_is_served_without_the_cache(
    end: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sys, "executable", broken_python(tmp_path, end))
    with caplog.at_level(logging.WARNING):
        assert np.isfinite(embedding()).all()
    (warning,) = (record.getMessage() for record in caplog.records)
    assert reason in warning
    assert not list(prepared.folder().rglob("*.onnx"))


@pytest.mark.usefixtures("prepared_apart")
def test_preparing_that_is_killed_names_the_memory_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", broken_python(tmp_path, "kill -KILL $$"))
    with pytest.raises(ConfigurationError, match=r"needs about \d+ MiB, and [\d,]+ MiB are"):
        embedding()


@pytest.mark.parametrize(
    ("more_mebibytes", "load", "message"),
    [
        (
            90,
            "OnnxRuntime.load('embedded', device='cpu', threads=1)",
            r"embedded does not fit into memory: it needs about .* are available \(ulimit -v of",
        ),
        (
            12,
            "weights.read(zoo.checkpoint('embedded'))",
            r"safetensors cannot be mapped: its 16 MiB do not fit into .* \(ulimit -v\)",
        ),
        (
            8,
            "onnx_towers.Sessions('cpu', 1)",
            r"ONNX Runtime does not fit into the memory that this process may use: .*ulimit -v",
        ),
        (
            8,
            "raise SystemExit(main(['onnx-flow.yml', '--port', '0']))",
            r"the server does not fit into the memory that it may use: .*ulimit -v",
        ),
    ],
)
def test_a_limit_that_is_too_small_is_an_error_before_the_model_is_loaded(
    more_mebibytes: int, load: str, message: str
) -> None:
    program = (
        "import resource\n"
        "from pathlib import Path\n"
        "from clip_server.__main__ import main\n"
        "from clip_server.models import weights, zoo\n"
        "from clip_server.runtimes import onnx_towers\n"
        "from clip_server.runtimes.onnx import OnnxRuntime\n"
        "used = 4096 * int(Path('/proc/self/statm').read_text().split()[0])\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (used + ({more_mebibytes} << 20),) * 2)\n"
        f"{load}"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1
    assert re.search(message, ended.stderr.splitlines()[-1])
