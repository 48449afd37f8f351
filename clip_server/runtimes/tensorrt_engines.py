"""Builds TensorRT engines from ONNX graphs, and caches them.

The library is `tensorrt` where that is installed, else `tensorrt_rtx`, which has the same
interface and builds without a GPU. An engine is a file that only the version of the library that
built it can run, and only on the kind of GPU that it was built for.
"""

from __future__ import annotations

import importlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeAlias

from clip_server.commands import console
from clip_server.errors import ConfigurationError, WeightsError
from clip_server.install import install_hint
from clip_server.model_card import ModelCard, Precision
from clip_server.models.converted import Tower
from clip_server.runtimes import prepared

LIBRARIES = ("tensorrt", "tensorrt_rtx")
# Lengths of texts that kernels are optimised for.
_LENGTHS = (16, 32)
# Part of every key; raised when engines are built differently.
_CACHE_VERSION = 1
_SECONDS_BETWEEN_MESSAGES = 10
# TensorRT-RTX builds an engine for a data centre's GPU, and says only when loading it that it
# cannot run there.
_UNSUPPORTED_GPU = "does not support this compute capability"
_MISSING = (
    f"TensorRT is not installed: {install_hint('tensorrt')}; for TensorRT-RTX, on consumer "
    "GPUs, the extra is tensorrt-rtx"
)

Shape: TypeAlias = tuple[int, ...]
LogProgress: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Profile:
    """The shapes that one profile of an engine accepts, from `least` to `most`; it is optimised for
    `best`."""

    least: Shape
    best: Shape
    most: Shape

    def takes(self, shape: Shape) -> bool:
        """Whether a batch of this shape, padded with items if needed, can be computed."""
        enough = all(size >= least for size, least in zip(shape[1:], self.least[1:], strict=True))
        return enough and all(size <= most for size, most in zip(shape, self.most, strict=True))


@dataclass(frozen=True)
class Key:
    """Identifies an engine in the cache by everything that it depends on.

    graph: a hash of the graph and its weights.
    library: with its version.
    gpu: with its compute capability.
    """

    graph: str
    library: str
    gpu: str
    precision: str
    profiles: tuple[Profile, ...]

    @property
    def digest(self) -> str:
        """The name of the file, without its suffix."""
        return blake2b(repr((_CACHE_VERSION, self)).encode(), digest_size=16).hexdigest()


def library() -> Any:
    """Imports the library.

    Raises:
        ConfigurationError: none is installed, or its shared libraries cannot be loaded.
    """
    reasons = []
    for name in LIBRARIES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except Exception as error:  # of the loader, or of the package itself
            reasons.append(f"{name} cannot be loaded: {error}")
    raise ConfigurationError("; ".join(reasons) or _MISSING)


def version() -> str:
    """The library's name and version."""
    found = library()
    return f"{found.__name__} {found.__version__}"


def profiles(card: ModelCard, tower: Tower, batch: int) -> tuple[Profile, ...]:
    """The profiles for batches of 1 to `batch`: for one item and for full batches, and for texts at
    each length."""
    batches = sorted({1, batch})
    if tower == "image":
        side = card.image.size
        return tuple(_profile(most, (3, side, side), (3, side, side)) for most in batches)
    context = card.text.context_length
    lengths = [*(length for length in _LENGTHS if length < context), context]
    if card.text.trim == "fixed":
        return tuple(_profile(most, (context,), (context,)) for most in batches)
    return tuple(_profile(most, (1,), (length,)) for length in lengths for most in batches)


def _profile(batch: int, least: Shape, most: Shape) -> Profile:
    return Profile((1, *least), (batch, *most), (batch, *most))


def build(
    graph: Path | bytes,
    wanted: Sequence[Profile],
    *,
    log_progress: LogProgress,
    threads: int | None = None,
) -> bytes:
    """Builds the engine of an ONNX graph with one input, in the dtypes of the graph.

    graph: serialized, or the path of its file.
    log_progress: called with messages about the progress.
    threads: cores that it may use; by default one.

    Raises:
        ConfigurationError: the library is missing, has no GPU and needs one, or cannot build it.
    """
    trt = library()
    log = _log(trt)
    with _explained("TensorRT cannot build the engine"):
        builder = trt.Builder(log)
        if threads:
            builder.max_threads = threads
        network = builder.create_network(_strongly_typed(trt))
        _parse(trt.OnnxParser(network, log), graph)
        config = builder.create_builder_config()
        # Otherwise products in fp32 would be rounded to the ten bits of TF32.
        config.clear_flag(trt.BuilderFlag.TF32)
        config.progress_monitor = _progress(trt, log_progress)
        for each in wanted:
            profile = builder.create_optimization_profile()
            profile.set_shape(network.get_input(0).name, each.least, each.best, each.most)
            config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise RuntimeError("no engine was built")
        return bytes(engine)


def _parse(parser: Any, graph: Path | bytes) -> None:
    in_file = isinstance(graph, Path)
    read = parser.parse_from_file(str(graph)) if in_file else parser.parse(graph)
    if not read:
        reasons = (parser.get_error(index).desc() for index in range(parser.num_errors))
        raise RuntimeError("; ".join(reasons))


def engine_of(
    model: Any,
    card: ModelCard,
    tower: Tower,
    precision: Precision,
    gpu: str,
    *,
    batch: int,
    threads: int | None = None,
) -> bytes:
    """The engine of a tower, from the cache or newly built.

    model: its ONNX graph, in this precision. gpu: as in `Key`. batch: as in `profiles`.

    Raises:
        ConfigurationError: as `build`.
    """
    from clip_server.towers import onnx_file

    wanted = profiles(card, tower, batch)
    key = Key(onnx_file.digest(model), version(), gpu, precision, wanted)
    log_progress = progress_logger(f"{tower} engine of {card.name} in {precision}")

    def make() -> bytes:
        log_progress(f"not built yet for {gpu}: this takes minutes, once")
        with onnx_file.packed(model) as graph:
            return build(graph, wanted, log_progress=log_progress, threads=threads)

    return cached(key, make, log_progress)


def cached(key: Key, make: Callable[[], bytes], log_progress: LogProgress) -> bytes:
    """The engine of a key, built with `make` unless the cache has it, undamaged.

    Replicas that start concurrently build it once.

    Raises:
        ConfigurationError: it cannot be built, or not be cached.
    """
    from filelock import FileLock

    path = folder() / f"{key.digest}.engine"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if (engine := read(path, key)) is not None:
                return engine
            start = time.perf_counter()
            engine = make()
            log_progress(f"built in {time.perf_counter() - start:.1f} s, cached in {path}")
            write(path, key, engine)
            return engine
    except OSError as error:
        raise ConfigurationError(
            f"the engine cannot be cached in {path.parent}: {error}; "
            "set XDG_CACHE_HOME to another folder"
        ) from error


def folder() -> Path:
    """The folder of cached engines."""
    return prepared.caches() / "engines"


def read(path: Path, key: Key) -> bytes | None:
    """Reads an engine that `write` wrote; None if it is missing, of another key, or damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    head, _, engine = content.partition(b"\n")
    return engine if head == _head(key, engine) else None


def write(path: Path, key: Key, engine: bytes) -> None:
    """Writes an engine atomically, preceded by its key and checksum."""
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(_head(key, engine) + b"\n")
            file.write(engine)
            file.flush()
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _head(key: Key, engine: bytes) -> bytes:
    return f"{key.digest} {blake2b(engine, digest_size=16).hexdigest()}".encode()


def take_errors() -> str:
    """The errors that the library logged since the last call; empty if none."""
    errors = _log(library()).errors
    messages = "; ".join(errors.copy())  # another thread may add to them
    errors.clear()
    return messages


def load(engine: bytes, name: str) -> Any:
    """Loads an engine into the library. name: its origin, for people.

    Raises:
        WeightsError: it is damaged, or was built by another version or for another GPU.
        ConfigurationError: the library does not support this GPU.
    """
    trt = library()
    take_errors()
    loaded = trt.Runtime(_log(trt)).deserialize_cuda_engine(engine)
    if loaded is None:
        reason = take_errors()
        if _UNSUPPORTED_GPU in reason:
            raise ConfigurationError(
                f"{version()} does not support this GPU; serve onnx-flow.yml or torch-flow.yml, or "
                f"{install_hint('tensorrt')} ({reason})"
            )
        raise WeightsError(
            f"{name} is not an engine that {version()} can run on this GPU; rebuild it with "
            f"python -m clip_server.convert --to tensorrt ({reason})"
        )
    return loaded


def profiles_of(engine: Any, tensor: str) -> list[Profile]:
    """The profiles of a loaded engine for its input."""
    return [
        Profile(*(tuple(shape) for shape in engine.get_tensor_profile_shape(tensor, index)))
        for index in range(engine.num_optimization_profiles)
    ]


def progress_logger(what: str) -> LogProgress:
    """Returns a function that prints messages about an engine on stderr."""
    return lambda message: console.log(f"clip_server: {what}: {message}")


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns exceptions into a ConfigurationError with the errors that the library logged."""
    take_errors()
    try:
        yield
    except Exception as error:  # the library's have no class of their own
        raise ConfigurationError(f"{what} ({version()}): {error}; {take_errors()}") from error


def _strongly_typed(trt: Any) -> int:
    """The flag for networks that compute in their own dtypes; newer versions have no others."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


@cache
def _log(trt: Any) -> Any:
    """The library's only log. errors: the last few logged."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def _progress(trt: Any, log_progress: LogProgress) -> Any:
    """Reports the current phase of a build every ten seconds."""

    class Progress(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._started = self._reported = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            del parent_phase
            self._steps[phase_name] = num_steps

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            now = time.monotonic()
            if now - self._reported > _SECONDS_BETWEEN_MESSAGES:
                self._reported = now
                total = self._steps.get(phase_name, 0)
                log_progress(
                    f"{phase_name}, {step + 1} of {total}, after {now - self._started:.0f} s"
                )
            return True  # go on

    return Progress()
