"""TensorRT, pycuda and cuda-core without a GPU: engines are graphs that onnxruntime computes.

As the real ones they take only shapes of the profile that was chosen, and read and write only
memory that was copied to the device.
"""

from __future__ import annotations

import ctypes
import pickle
import sys
from contextlib import suppress
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from clip_server.runtimes import cuda

VERSION = "10.99"
_DTYPES = {"tensor(uint8)": np.uint8, "tensor(int32)": np.int32, "tensor(float)": np.float32}


class FakeGpu:
    """What the fakes share. capacity: bytes that one allocation may have. contexts: made so far.
    builds: engines built so far. depth: of pushed contexts. current: whether one is set for
    good. opened: whether the GPU is in use."""

    def __init__(self) -> None:
        self.capacity = 1 << 40
        self.contexts = self.builds = self.depth = 0
        self.opened = self.current = False
        self.memory: dict[int, NDArray[np.uint8]] = {}

    @property
    def is_active(self) -> bool:
        return self.current or self.depth > 0


def install(monkeypatch: pytest.MonkeyPatch, driver: str = "pycuda") -> FakeGpu:
    """Puts TensorRT's fake, and that of `pycuda` or `cuda-core`, in the place of the real ones."""
    gpu = FakeGpu()
    for name in ("pycuda", "pycuda.driver", "cuda", "cuda.core"):
        monkeypatch.setitem(sys.modules, name, None)
    if driver == "pycuda":
        modules = {"pycuda": ModuleType("pycuda"), "pycuda.driver": _pycuda(gpu)}
        modules["pycuda"].driver = modules["pycuda.driver"]  # type: ignore[attr-defined]
    else:
        modules = {"cuda": ModuleType("cuda"), "cuda.core": _cuda_core(gpu)}
        modules["cuda"].core = modules["cuda.core"]  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "tensorrt", _library(gpu))
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
    return gpu


class FakeMemoryError(Exception):
    """pycuda's."""


def _pycuda(gpu: FakeGpu) -> Any:
    driver: Any = ModuleType("pycuda.driver")

    class Allocation:
        def __init__(self, size: int) -> None:
            assert gpu.depth, "no context is active"
            if size > gpu.capacity:
                raise FakeMemoryError("cuMemAlloc failed: out of memory")
            self.address = max(gpu.memory, default=0) + 1
            gpu.memory[self.address] = np.zeros(size, np.uint8)

        def __int__(self) -> int:
            return self.address

        def __del__(self) -> None:
            with suppress(AttributeError):
                del gpu.memory[self.address]

    class Context:
        def push(self) -> None:
            gpu.depth += 1

        def pop(self) -> None:
            gpu.depth -= 1

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def name(self) -> str:
            return "Imaginary"

        def compute_capability(self) -> tuple[int, int]:
            return 9, 0

        def retain_primary_context(self) -> Context:
            gpu.opened = True
            return Context()

    def upload(target: Allocation, source: NDArray[Any], stream: Any) -> None:
        del stream
        gpu.memory[target.address][: source.nbytes] = np.frombuffer(source.tobytes(), np.uint8)

    def download(target: NDArray[Any], source: Allocation, stream: Any) -> None:
        del stream
        content = gpu.memory[source.address][: target.nbytes]
        target[...] = content.view(target.dtype).reshape(target.shape)

    driver.MemoryError = FakeMemoryError
    driver.init = lambda: None
    driver.Device = Device
    driver.Stream = lambda: SimpleNamespace(handle=7, synchronize=lambda: None)
    driver.mem_alloc = Allocation
    driver.pagelocked_empty = np.empty
    driver.memcpy_htod_async = upload
    driver.memcpy_dtoh_async = download
    return driver


def _cuda_core(gpu: FakeGpu) -> Any:
    core: Any = ModuleType("cuda.core")

    class Stream:
        handle = 7

        def sync(self) -> None: ...

    class Buffer:
        """Memory of the GPU, or by its address of the host; or the beginning of one of them."""

        def __init__(self, handle: int, size: int, owner: object = None) -> None:
            self.handle, self.size, self.owner = handle, size, owner

        @classmethod
        def from_handle(cls, handle: int, size: int, *, owner: object) -> Buffer:
            return cls(handle, size, owner)

        def copy_from(self, source: Buffer, *, stream: Stream) -> None:
            assert isinstance(stream, Stream)
            assert self.size == source.size
            self.content()[...] = source.content()

        def content(self) -> NDArray[np.uint8]:
            if self.handle in gpu.memory:
                return gpu.memory[self.handle][: self.size]
            place = (ctypes.c_uint8 * self.size).from_address(self.handle)
            return np.frombuffer(place, np.uint8)

    class Allocation(Buffer):
        def __del__(self) -> None:
            gpu.memory.pop(self.handle, None)

    class Device:
        name, compute_capability = "Imaginary", (9, 0)

        def __init__(self, index: int) -> None:
            self.index = index

        def set_current(self) -> None:
            # It stays so; nothing has to be undone.
            gpu.opened = gpu.current = True

        def create_stream(self) -> Stream:
            return Stream()

        def allocate(self, size: int, *, stream: Stream) -> Buffer:
            assert isinstance(stream, Stream)
            if size > gpu.capacity:
                raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: not enough memory")
            address = max(gpu.memory, default=0) + 1
            gpu.memory[address] = np.zeros(size, np.uint8)
            return Allocation(address, size)

    class LegacyPinnedMemoryResource:
        def allocate(self, size: int) -> Buffer:
            memory = np.zeros(size, np.uint8)
            return Buffer(memory.ctypes.data, size, owner=memory)

    core.Device, core.Buffer = Device, Buffer
    core.LegacyPinnedMemoryResource = LegacyPinnedMemoryResource
    return core


def _library(gpu: FakeGpu) -> Any:
    trt: Any = ModuleType("tensorrt")

    class Context:
        def __init__(self, engine: Engine) -> None:
            gpu.contexts += 1
            self.engine, self.profile, self.shape = engine, 0, (0,)
            self.addresses: dict[str, int] = {}

        def set_optimization_profile_async(self, index: int, stream: int) -> bool:
            assert stream == 7
            self.profile = index
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            assert name == self.engine.source.name
            least, _, most = self.engine.profiles[self.profile]
            assert all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)), shape
            self.shape = shape
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            assert name == self.engine.target.name
            return self.shape[0], self.engine.target.shape[1]

        def set_tensor_address(self, name: str, address: int) -> bool:
            self.addresses[name] = address
            return True

        def execute_async_v3(self, stream: int) -> bool:
            assert stream == 7
            assert gpu.is_active, "no context is active"
            source, target = self.engine.source, self.engine.target
            dtype = np.dtype(_DTYPES[source.type])
            size = int(np.prod(self.shape)) * dtype.itemsize
            content = gpu.memory[self.addresses[source.name]][:size]
            batch = content.view(dtype).reshape(self.shape)
            found = self.engine.session.run(None, {source.name: batch})[0]
            place = gpu.memory[self.addresses[target.name]]
            place[: found.nbytes] = np.frombuffer(found.tobytes(), np.uint8)
            return True

    class Engine:
        def __init__(self, plan: bytes) -> None:
            import onnxruntime

            graph, self.profiles = pickle.loads(plan)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self.session = onnxruntime.InferenceSession(graph, options)
            (self.source,), (self.target,) = self.session.get_inputs(), self.session.get_outputs()
            self.num_io_tensors, self.num_optimization_profiles = 2, len(self.profiles)

        def get_tensor_name(self, index: int) -> str:
            return str((self.source, self.target)[index].name)

        def get_tensor_mode(self, name: str) -> str:
            return "input" if name == self.source.name else "output"

        def get_tensor_dtype(self, name: str) -> Any:
            return _DTYPES[(self.source if name == self.source.name else self.target).type]

        def get_tensor_profile_shape(self, name: str, index: int) -> Any:
            assert name == self.source.name
            return self.profiles[index]

        def create_execution_context(self) -> Context:
            return Context(self)

    class Runtime:
        def __init__(self, log: Any) -> None:
            self.log = log

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            try:
                return Engine(plan)
            except Exception:
                self.log.log("error", "the plan's magic tag does not match")
                return None

    class Builder:
        def __init__(self, log: Any) -> None:
            del log

        def create_network(self, flags: int) -> Any:
            assert flags == 2
            return SimpleNamespace(get_input=lambda index: SimpleNamespace(name=f"input {index}"))

        def create_builder_config(self) -> Any:
            profiles: list[Any] = []
            return SimpleNamespace(
                profiles=profiles,
                clear_flag=lambda _: None,
                add_optimization_profile=lambda profile: profiles.append(profile.shapes),
            )

        def create_optimization_profile(self) -> Any:
            profile = SimpleNamespace()

            def set_shape(name: str, *shapes: tuple[int, ...]) -> None:
                assert name == "input 0"
                profile.shapes = shapes

            profile.set_shape = set_shape
            return profile

        def build_serialized_network(self, network: Any, config: Any) -> bytes:
            assert gpu.is_active or not gpu.opened, "no context is active"
            gpu.builds += 1
            return pickle.dumps((network.graph, config.profiles))

    class OnnxParser:
        def __init__(self, network: Any, log: Any) -> None:
            del log
            self.network = network

        def parse(self, graph: bytes) -> bool:
            self.network.graph = graph
            return True

    trt.__version__ = VERSION
    trt.ILogger = type("ILogger", (), {"ERROR": "error", "INTERNAL_ERROR": "internal"})
    trt.IProgressMonitor = type("IProgressMonitor", (), {})
    trt.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    trt.BuilderFlag = SimpleNamespace(TF32="tf32")
    trt.TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    trt.nptype = lambda dtype: dtype
    trt.Builder, trt.OnnxParser, trt.Runtime = Builder, OnnxParser, Runtime
    return trt
