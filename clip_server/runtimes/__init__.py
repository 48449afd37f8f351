"""The registry of runtimes: their names, requirements and capabilities.

Everything that names runtimes reads this table: executors, flows, commands, the model list and
the tests of the docs. A runtime's module is imported only when it is loaded, since what it needs
may not be installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from clip_server.errors import ConfigurationError
from clip_server.install import install_hint, missing_package
from clip_server.model_card import Precision
from clip_server.models import exported, zoo
from clip_server.models.converted import Tower, TowerFiles

if TYPE_CHECKING:
    from clip_server.runtimes.protocol import Runtime

# Short names for device types, as docs and errors list them.
DeviceType = Literal["CPU", "CUDA", "Apple"]


class OwnTowers(NamedTuple):
    """The files of both towers of a person's own model, and its folder.

    precision: of graphs whose name says it.
    """

    folder: Path
    files: Mapping[Tower, Path]
    precision: Precision | None = None


@dataclass(frozen=True)
class RuntimeSpec:
    """One runtime.

    name: as executors (`clip_<name>`), options and metrics call it.
    title: for people.
    implementation: the import path of its class, `module:Class`, whose `load` takes what
        `load_runtime` does.
    extras: the package extras that install its requirements, the usual one first.
    packages: that it imports; of several joined by |, any one.
    devices: types of devices that it runs on.
    precisions: that it builds a checkpoint in, the default first.
    files: the converted towers that it serves from a folder; None if it takes checkpoints only.
    serves_exported: whether it also serves graphs that others exported (see `models.exported`).
    flow: the built-in flow that serves it.
    any_architecture: whether it serves every architecture from its checkpoint, or only those
        whose graphs we build.
    options: parameters of the executor that its `load` takes beyond the common ones.
    preloads: modules whose import takes long, and which a process may import before it forks.
    arena_precisions: those in which activations come from memory of its own, not from malloc's.
    """

    name: str
    title: str
    implementation: str
    extras: tuple[str, ...]
    packages: tuple[str, ...]
    devices: tuple[DeviceType, ...]
    precisions: tuple[Precision, ...]
    files: TowerFiles | None
    flow: str
    any_architecture: bool = False
    serves_exported: bool = False
    options: tuple[str, ...] = ()
    preloads: tuple[str, ...] = ()
    arena_precisions: tuple[Precision, ...] = ()

    @property
    def executor(self) -> str:
        """The name of its executor's module."""
        return f"clip_{self.name}"

    @property
    def file_names(self) -> Mapping[Tower, str]:
        """The names of the files that the convert command writes for it."""
        return self.files.names if self.files else {}

    @property
    def install_hint(self) -> str:
        """The command that installs its requirements."""
        return install_hint(self.extras[0])

    def preload(self) -> None:
        """Imports what replicas need, which they share if they are forked later: each then only
        loads its model, also when it is restarted.

        Raises:
            ConfigurationError: the runtime is not installed.
        """
        for module in self.preloads:
            importlib.import_module(module)

    def missing_package(self) -> str | None:
        """The first required package that is not installed; None if all are."""
        return missing_package(self.packages)

    def check_precision(self, wanted: str | None) -> Precision:
        """The precision to build a checkpoint in.

        Raises:
            ConfigurationError: the runtime does not support it.
        """
        for precision in self.precisions:
            if wanted in (None, precision):
                return precision
        raise ConfigurationError(
            f"dtype {wanted!r} is not one that {self.title} supports: use "
            f"{', '.join(self.precisions)}"
        )

    def find_towers(self, folder: str | Path | None) -> Mapping[Tower, Path] | None:
        """The files of both towers in a folder, if they were converted for this runtime."""
        return self.files.find(folder) if folder is not None and self.files is not None else None

    def own_towers(
        self, name: str, model_path: str | Path | None, precision: str | None = None
    ) -> OwnTowers | None:
        """The towers of a person's own model, or of a repository of the hub, from which they are
        downloaded if necessary; None if the model is a checkpoint.

        name, model_path: as in `zoo.resolve`. precision: that is wanted of several.

        Raises:
            ConfigurationError: the model cannot be found or downloaded.
        """
        folder = zoo.own_path(name, model_path)
        if folder is None:
            return None
        if files := self.find_towers(folder):
            return OwnTowers(folder, files)
        if not self.serves_exported:
            return None
        repository = zoo.repository(name, model_path)
        found = (
            exported.fetch(repository, folder, precision)
            if repository
            else exported.find(folder, precision)
        )
        return OwnTowers(folder, *found) if found else None


# The first runs every architecture, and is the default.
RUNTIMES: tuple[RuntimeSpec, ...] = (
    RuntimeSpec(
        "torch",
        "PyTorch",
        "clip_server.runtimes.torch:TorchRuntime",
        extras=("torch",),
        packages=("torch", "open_clip"),
        devices=("CPU", "CUDA", "Apple"),
        precisions=("fp32", "fp16", "bf16"),
        files=TowerFiles("torchscript", (".pt",), described=True),
        flow="torch-flow.yml",
        any_architecture=True,
        options=("jit",),
        preloads=("clip_server.runtimes.torch",),
    ),
    RuntimeSpec(
        "onnx",
        "ONNX Runtime",
        "clip_server.runtimes.onnx:OnnxRuntime",
        extras=("onnx", "onnx-gpu"),
        packages=("onnxruntime", "onnx"),
        devices=("CPU", "CUDA"),
        precisions=("fp32", "fp16", "int8"),
        files=TowerFiles("onnx", (".onnx",)),
        flow="onnx-flow.yml",
        preloads=("onnxruntime", "clip_server.runtimes.onnx", "clip_server.runtimes.onnx_towers"),
        serves_exported=True,
        # In int8, ViT-B/32 takes 46 MiB less under load, and as long. In fp32 it would take 35 MiB
        # less, and a tenth more of the processor's time for each photo.
        arena_precisions=("int8",),
    ),
    RuntimeSpec(
        "tensorrt",
        "TensorRT",
        "clip_server.runtimes.tensorrt:TensorrtRuntime",
        extras=("tensorrt", "tensorrt-rtx"),
        packages=("tensorrt|tensorrt_rtx", "cuda.core|pycuda", "onnx"),
        devices=("CUDA",),
        precisions=("fp16", "fp32"),
        # The second suffix is that of NVIDIA's own tools.
        files=TowerFiles("tensorrt", (".trt", ".engine")),
        flow="tensorrt-flow.yml",
        options=("minibatch_size",),
    ),
)


def find(name: str) -> RuntimeSpec:
    """The runtime of a name.

    Raises:
        ConfigurationError: there is none; the message lists those there are.
    """
    for spec in RUNTIMES:
        if spec.name == name:
            return spec
    raise ConfigurationError(f"no runtime is named {name!r}; there are {', '.join(names())}")


def first_installed() -> RuntimeSpec:
    """The first runtime in the table whose packages are installed.

    Raises:
        ConfigurationError: there is none; the message says how to install one.
    """
    for spec in RUNTIMES:
        if spec.missing_package() is None:
            return spec
    raise ConfigurationError(f"no runtime is installed; on this machine: {install_options()}")


def of_files(kind: str) -> RuntimeSpec:
    """The runtime that serves towers converted to a kind of file, such as `torchscript`."""
    return next(spec for spec in RUNTIMES if spec.files and spec.files.kind == kind)


def load_runtime(
    runtime: str,
    name: str,
    *,
    model_path: str | Path | None = None,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Runtime:
    """Loads a model on a runtime.

    runtime: a name in `RUNTIMES`.
    name: of the model, canonical or an alias.
    model_path: a checkpoint as in `weights.find`, or a folder of towers converted for this
        runtime, which run unchanged.
    device: `cpu`, `cuda`, `cuda:1`, `mps`; by default the best available.
    precision: of a checkpoint's weights; by default the runtime's first.
    threads: CPU cores that one call may use; by default all that this process may run on.
    options: parameters of the executor; those in the runtime's `options` are passed on.

    Raises:
        ConfigurationError: the extra, the device, the precision or the model is unavailable.
    """
    spec = find(runtime)
    module, _, implementation = spec.implementation.partition(":")
    load = getattr(importlib.import_module(module), implementation).load
    extra = {key: value for key, value in (options or {}).items() if key in spec.options}
    loaded: Runtime = load(
        name, model_path=model_path, device=device, precision=precision, threads=threads, **extra
    )
    return loaded


def by_executor() -> dict[str, RuntimeSpec]:
    """The runtimes by the names of their executors' modules, such as `clip_onnx`."""
    return {spec.executor: spec for spec in RUNTIMES}


def install_options() -> str:
    """The command that installs the server, and the extras for its runtimes."""
    # Those that need no torch, and so are small, come first.
    ordered = sorted(RUNTIMES, key=lambda spec: "torch" in spec.packages)
    first, *others = (extra for spec in ordered for extra in spec.extras)
    return f"{install_hint(first)}, or one of the extras {', '.join(others)}"


def names(specs: Sequence[RuntimeSpec] = RUNTIMES) -> list[str]:
    """The names of runtimes, in order."""
    return [spec.name for spec in specs]
