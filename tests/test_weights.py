"""Checkpoints: found on disk, read, and refused when bad."""

from __future__ import annotations

import os
import pickle
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from clip_server.errors import ConfigurationError, WeightsError
from clip_server.models import weights, zoo


def saved(path: Path, **tensors: np.ndarray) -> Path:
    save_file(tensors, path)
    return path


def test_half_precision_is_read(tmp_path: Path) -> None:
    values = np.linspace(-3, 3, 12).reshape(3, 4)
    path = saved(
        tmp_path / "half.safetensors",
        half=values.astype(np.float16),
        brain=values.astype(ml_dtypes.bfloat16),
        logit_scale=np.array(np.log(50), dtype=ml_dtypes.bfloat16),
    )
    tensors = weights.read(path)
    assert tensors["half"].dtype == np.float16
    assert tensors["brain"].dtype == np.float32
    np.testing.assert_allclose(tensors["brain"], values, rtol=1 / 128)
    assert weights.read_logit_scale(path) == pytest.approx(50, rel=0.02)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("scale", [np.float32(2), np.array([2], np.float16)], ids=["()", "[1]"])
def test_names_are_read_without_what_a_wrapper_puts_before_them(
    scale: np.ndarray, prefix: str, tmp_path: Path
) -> None:
    tensors = {"visual.proj": np.ones((2, 3), np.float16), "logit_scale": np.asarray(scale)}
    path = tmp_path / "wrapped.safetensors"
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    assert weights.read(path).keys() == tensors.keys()
    assert weights.read_shapes(path) == {name: each.shape for name, each in tensors.items()}
    assert weights.read_logit_scale(path) == pytest.approx(np.exp(2))


def test_a_prefix_of_some_names_only_belongs_to_them(tmp_path: Path) -> None:
    tensors = {"module.a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}
    path = saved(tmp_path / "mixed.safetensors", **tensors)
    assert weights.read_shapes(path).keys() == tensors.keys()


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = saved(tmp_path / "cut.safetensors", weight=np.zeros((8, 8), np.float32))
    path.write_bytes(path.read_bytes()[:keep])
    for read in (weights.read, weights.read_logit_scale):
        with pytest.raises(WeightsError, match=r"cut\.safetensors is damaged"):
            read(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_that_cannot_be_opened_is_refused_with_the_reason(
    suffix: str, tmp_path: Path
) -> None:
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    for read in (weights.read, weights.read_shapes, weights.read_logit_scale):
        with pytest.raises(WeightsError, match=rf"folder\{suffix} cannot be read: Is a directory"):
            read(folder)


def test_a_file_without_a_logit_scale_is_no_clip_checkpoint(tmp_path: Path) -> None:
    path = saved(tmp_path / "other.safetensors", weight=np.zeros(3, np.float32))
    with pytest.raises(WeightsError, match="not a CLIP checkpoint"):
        weights.read_logit_scale(path)


def test_another_architecture_is_refused_with_names_and_shapes() -> None:
    tensors = {"a": np.zeros((2, 3)), "c": np.zeros(1), "bn1.num_batches_tracked": np.zeros(())}
    expected = {"a": (3, 2), "b": (4,), **{f"more.{index}": () for index in range(5)}}
    with pytest.raises(WeightsError) as caught:
        weights.check(tensors, expected)
    assert str(caught.value) == (
        "the checkpoint is of another architecture: "
        "b (4,), more.0 (), more.1 () and 3 more (missing); "
        "a is (2, 3), expected (3, 2) (of another shape); c (1,) (not in the model)"
    )


def test_the_right_architecture_passes_whatever_else_a_trainer_left() -> None:
    tensors = {"a": np.zeros((2, 3)), "attn_mask": np.zeros((77, 77)), "vocab_size": np.zeros(())}
    weights.check(tensors, {"a": (2, 3), "bn1.num_batches_tracked": ()})


def test_model_path_may_be_a_file_or_a_folder(tmp_path: Path) -> None:
    card = zoo.resolve("ViT-B/32")
    file = saved(tmp_path / weights.CHECKPOINT, logit_scale=np.zeros((), np.float32))
    assert weights.find(card, tmp_path) == file
    assert weights.find(card, str(file)) == file


def test_model_path_to_nothing_is_refused(tmp_path: Path) -> None:
    card = zoo.resolve("ViT-B/32")
    with pytest.raises(WeightsError, match=r"no checkpoint at .*missing.*: that does not exist"):
        weights.find(card, tmp_path / "missing.safetensors")
    with pytest.raises(WeightsError, match=r"no checkpoint at .* a folder without one"):
        weights.find(card, tmp_path)
    (tmp_path / "link.pt").symlink_to(tmp_path / "gone.pt")
    with pytest.raises(WeightsError, match="a link to something that does not exist"):
        weights.find(card, tmp_path / "link.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(WeightsError, match="not a regular file"):
        weights.find(card, tmp_path / "pipe.pt")
    (tmp_path / "notes.txt").write_text("no checkpoint")
    with pytest.raises(WeightsError, match=r"notes\.txt is not a checkpoint"):
        weights.find(card, tmp_path / "notes.txt")


def test_a_folder_may_hold_one_checkpoint_of_any_name(tmp_path: Path) -> None:
    card = zoo.resolve("ViT-B/32")
    (tmp_path / "epoch_1.pt").touch()
    assert weights.find(card, tmp_path) == tmp_path / "epoch_1.pt"
    (tmp_path / "epoch_2.pt").touch()
    with pytest.raises(WeightsError, match="no checkpoint at"):
        weights.find(card, tmp_path)


class TestPickles:
    """Checkpoints of torch's, in which anything may be."""

    @pytest.fixture(autouse=True)
    def _torch(self) -> None:
        pytest.importorskip("torch")

    def test_a_trainers_checkpoint_is_read(self, tmp_path: Path) -> None:
        """open_clip's trainer: the epoch, the weights of a model on several GPUs, an optimizer."""
        import torch

        values = {"module.weight": torch.arange(6.0).reshape(2, 3), "module.logit_scale": 2.0}
        tensors = {name: torch.as_tensor(value) for name, value in values.items()}
        optimizer = {"state": {0: {"step": torch.tensor(3.0)}}}
        path = tmp_path / "epoch_10.pt"
        torch.save({"epoch": 10, "state_dict": tensors, "optimizer": optimizer}, path)
        found = weights.read(path)
        assert found.keys() == {"weight", "logit_scale"}
        np.testing.assert_array_equal(found["weight"], np.arange(6.0).reshape(2, 3))
        assert weights.read_shapes(path) == {"weight": (2, 3), "logit_scale": ()}
        assert weights.read_logit_scale(path) == pytest.approx(np.exp(2))

    def test_torch_is_not_needed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        numbers = torch.arange(24.0).reshape(2, 3, 4)
        tensors = {
            "views.of_one": numbers[1],
            "views.of_the_same": numbers[:, 1:, ::2],
            "transposed": numbers.permute(2, 0, 1).bfloat16(),
            "parameter": torch.nn.Parameter(torch.ones(2, 2)),
            "number": torch.tensor(7),
            "switches": torch.tensor([True, False]),
            "nothing": torch.zeros(0, 3),
        }
        path = tmp_path / "state.pt"
        saved = torch.nn.Linear(2, 1).state_dict()  # an OrderedDict with attributes
        more = [{"seen", b"\xff"}, torch.device("cuda:1"), torch.bfloat16, torch.Size([2])]
        torch.save({"state_dict": saved | tensors, "trainer": more}, path)
        monkeypatch.setitem(sys.modules, "torch", None)
        found = weights.read(path)
        assert found.keys() == {*tensors, "weight", "bias"}
        for name, tensor in tensors.items():
            expected = tensor.detach().float().numpy()
            np.testing.assert_array_equal(found[name], expected, strict=tensor.is_floating_point())
            assert weights.read_shapes(path)[name] == expected.shape

    @pytest.mark.parametrize(
        ("offset", "shape", "strides"),
        [(0, (5,), (1,)), (1, (4,), (1,)), (0, (2, 2), (1, 3)), (3, (2,), (-1,)), (-1, (), ())],
    )
    def test_a_tensor_outside_of_its_storage_is_refused(
        self,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        tmp_path: Path,
    ) -> None:
        path = tmp_path / "beyond.pt"
        with zipfile.ZipFile(path, "w") as archive, archive.open("a/data.pkl", "w") as file:
            StoragePickler(file).dump({"weight": Beyond(offset, shape, strides)})
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("a/data/0", np.ones(4, np.float32).tobytes())
        with pytest.raises(WeightsError, match=r"beyond\.pt is damaged"):
            weights.read(path)

    @pytest.mark.parametrize("zipped", [True, False], ids=["zipped", "of before torch 1.6"])
    def test_half_precision_is_read(self, zipped: bool, tmp_path: Path) -> None:
        import torch

        tensors = {"half": torch.ones(3).half(), "brain": torch.full((2,), 0.5).bfloat16()}
        path = tmp_path / "state.bin"
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
        found = weights.read(path)
        assert (found["half"].dtype, found["brain"].dtype) == (np.float16, np.float32)
        np.testing.assert_array_equal(found["brain"], [0.5, 0.5])

    @pytest.mark.parametrize("zipped", [True, False])
    def test_code_in_a_checkpoint_is_refused_and_not_run(
        self, zipped: bool, tmp_path: Path
    ) -> None:
        import torch

        path, sign = tmp_path / "evil.pt", tmp_path / "it-ran"
        torch.save(
            {"state_dict": {"weight": torch.ones(2)}, "extra": Code(sign)},
            path,
            _use_new_zipfile_serialization=zipped,
        )
        for read in (weights.read, weights.read_shapes, weights.read_logit_scale):
            with pytest.raises(WeightsError, match=r"evil\.pt .*contains code .*which is not run"):
                read(path)
        assert not sign.exists()
        # That is not because it could not have run.
        torch.load(path, weights_only=False)
        assert sign.exists()

    def test_torchscript_is_refused(self, tmp_path: Path) -> None:
        import torch

        path = tmp_path / "scripted.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its deprecation
            torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
        with pytest.raises(WeightsError, match=r"TorchScript archive.*torch\.jit\.load"):
            weights.read(path)

    def test_a_whole_model_is_refused(self, tmp_path: Path) -> None:
        import torch

        path = tmp_path / "model.pt"
        torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), path)
        with pytest.raises(WeightsError, match=r"contains code .*Sequential.*state_dict\(\) alone"):
            weights.read(path)

    @pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
    def test_the_keys_of_trainers_are_read(self, key: str, tmp_path: Path) -> None:
        import torch

        path = tmp_path / "best.pth"
        torch.save({"loss": torch.ones(()), key: {"clip_model.weight": torch.ones(2)}}, path)
        assert weights.read_shapes(path) == {"weight": (2,)}

    @pytest.mark.parametrize("keep", [0, 5, 300, -10])
    def test_a_truncated_file_is_refused(self, keep: int, tmp_path: Path) -> None:
        import torch

        path = tmp_path / "cut.pt"
        torch.save({"weight": torch.ones(64)}, path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(WeightsError, match=r"cut\.pt is damaged"):
            weights.read(path)

    def test_a_pickle_of_something_else_is_refused(self, tmp_path: Path) -> None:
        import torch

        path = tmp_path / "numbers.pt"
        torch.save([1, 2, 3], path)
        with pytest.raises(WeightsError, match="holds no tensors by name"):
            weights.read(path)

    def test_without_torch_it_says_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "epoch.pt"
        path.touch()
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(ConfigurationError, match=r"pip install 'clip-microservice\[torch\]'"):
            weights.read(path)


class Beyond:
    """A tensor of a storage of four values, as torch pickles it."""

    def __init__(self, *place: object) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, ...]:
        import torch

        return torch._utils._rebuild_tensor_v2, (StoragePickler, *self.place, False, OrderedDict())


class StoragePickler(pickle.Pickler):
    """Pickles itself as a storage."""

    def persistent_id(self, value: object) -> object:
        import torch

        return ("storage", torch.FloatStorage, "0", "cpu", 4) if value is StoragePickler else None


class Code:
    """What a pickle runs when it is read: it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)
