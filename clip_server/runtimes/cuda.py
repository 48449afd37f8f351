"""NVIDIA GPUs: how many there are, and the memory and streams of one.

CUDA's driver is called through pycuda where that is installed, which takes a compiler, and
otherwise through NVIDIA's cuda-core, which comes ready-made.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from clip_server.errors import ConfigurationError
from clip_server.install import install_hint
from clip_server.runtimes.protocol import OutOfMemoryError

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Stream:
    """A queue of work on a GPU. handle: CUDA's own. source: the library's object."""

    handle: int
    synchronize: Callable[[], None]
    source: Any


class _Driver(Protocol):
    """A GPU through one of the libraries, by its number."""

    name: str
    capability: tuple[int, int]

    def active(self) -> AbstractContextManager[None]:
        """A context in which this thread's calls go to the GPU, through its primary context, which
        torch and others share. Raises OutOfMemoryError where the library has its own."""
        ...

    def new_stream(self) -> Stream: ...

    def allocate(self, size: int, stream: Stream) -> Any:
        """Memory on the GPU, in bytes, to be used on a stream; free once nobody refers to it."""
        ...

    def address_of(self, memory: Any) -> int: ...

    def allocate_pinned(self, size: int) -> Bytes:
        """Memory of the host that copies need not wait for."""
        ...

    def upload(self, target: Any, source: Bytes, stream: Stream) -> None:
        """Starts a copy to the GPU."""
        ...

    def download(self, target: Bytes, source: Any, stream: Stream) -> None:
        """Starts a copy from the GPU."""
        ...


class _PyCuda:
    """Implements `_Driver`."""

    def __init__(self, index: int) -> None:
        import pycuda.driver as driver

        driver.init()
        self._driver = driver
        device = driver.Device(index)
        self.name, self.capability = device.name(), device.compute_capability()
        self._context = device.retain_primary_context()

    @contextmanager
    def active(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        except self._driver.MemoryError as error:
            raise OutOfMemoryError(str(error)) from error
        finally:
            self._context.pop()

    def new_stream(self) -> Stream:
        stream = self._driver.Stream()
        return Stream(int(stream.handle), stream.synchronize, stream)

    def allocate(self, size: int, stream: Stream) -> Any:
        del stream  # this memory is for any
        return self._driver.mem_alloc(size)

    def address_of(self, memory: Any) -> int:
        return int(memory)

    def allocate_pinned(self, size: int) -> Bytes:
        memory: Bytes = self._driver.pagelocked_empty(size, np.uint8)
        return memory

    def upload(self, target: Any, source: Bytes, stream: Stream) -> None:
        self._driver.memcpy_htod_async(target, source, stream.source)

    def download(self, target: Bytes, source: Any, stream: Stream) -> None:
        self._driver.memcpy_dtoh_async(target, source, stream.source)


class _CudaCore:
    """Implements `_Driver`."""

    def __init__(self, index: int) -> None:
        from cuda import core

        self._core, self._device = core, core.Device(index)
        self._device.set_current()
        self.name, self.capability = self._device.name, tuple(self._device.compute_capability)
        self._pinned = core.LegacyPinnedMemoryResource()

    @contextmanager
    def active(self) -> Iterator[None]:
        self._device.set_current()
        try:
            yield
        except Exception as error:  # the library's have no public class
            if "OUT_OF_MEMORY" in str(error):
                raise OutOfMemoryError(str(error)) from error
            raise

    def new_stream(self) -> Stream:
        stream = self._device.create_stream()
        return Stream(int(stream.handle), stream.sync, stream)

    def allocate(self, size: int, stream: Stream) -> Any:
        return self._device.allocate(size, stream=stream.source)

    def address_of(self, memory: Any) -> int:
        return int(memory.handle)

    def allocate_pinned(self, size: int) -> Bytes:
        buffer = self._pinned.allocate(size)
        memory: Any = (ctypes.c_uint8 * size).from_address(int(buffer.handle))
        memory.buffer = buffer  # so it is not freed before the array
        return np.frombuffer(memory, np.uint8)

    def upload(self, target: Any, source: Bytes, stream: Stream) -> None:
        self._part(target, source.nbytes).copy_from(self._host(source), stream=stream.source)

    def download(self, target: Bytes, source: Any, stream: Stream) -> None:
        self._host(target).copy_from(self._part(source, target.nbytes), stream=stream.source)

    def _part(self, memory: Any, size: int) -> Any:
        """The beginning of memory on the GPU: copies are of whole buffers."""
        return self._core.Buffer.from_handle(int(memory.handle), size, owner=memory)

    def _host(self, array: Bytes) -> Any:
        return self._core.Buffer.from_handle(array.ctypes.data, array.nbytes, owner=array)


class Gpu:
    """A GPU by its number.

    name: with its compute capability, such as `NVIDIA A10 (8.6)`.
    active: see `_Driver`.

    Raises:
        ConfigurationError: neither library can be imported, or the GPU is not there.
    """

    def __init__(self, index: int = 0) -> None:
        # First: without NVIDIA's driver the libraries cannot be imported either.
        count = device_count()
        if count <= index:
            raise ConfigurationError(
                f"device 'cuda:{index}' cannot be used: {count} NVIDIA GPUs are visible"
            )
        self.driver = _open(index)
        capability = ".".join(map(str, self.driver.capability))
        self.name, self.device = f"{self.driver.name} ({capability})", f"cuda:{index}"
        self.active = self.driver.active


class Buffer:
    """Memory on the GPU, and pinned memory of the host that is copied to it or from it.

    Both grow on demand and never shrink. For one thread at a time.

    stream: that the copies are on.
    """

    def __init__(self, driver: _Driver, stream: Stream, dtype: np.dtype[Any]) -> None:
        self._driver, self._stream, self._dtype = driver, stream, dtype
        self._host = np.empty(0, np.uint8)
        self._device: Any = None

    @property
    def address(self) -> int:
        """On the GPU."""
        return self._driver.address_of(self._device)

    def reserve(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """The host's memory as an array of this shape; what it held before is lost."""
        size = math.prod(shape) * self._dtype.itemsize
        if size > len(self._host):
            self._host, self._device = np.empty(0, np.uint8), None
            self._device = self._driver.allocate(size, self._stream)
            self._host = self._driver.allocate_pinned(size)
        return self._host[:size].view(self._dtype).reshape(shape)

    def upload(self, array: NDArray[Any]) -> None:
        """Starts the copy of what `reserve` returned to the GPU."""
        self._driver.upload(self._device, self._host[: array.nbytes], self._stream)

    def download(self, array: NDArray[Any]) -> None:
        """Starts the copy from the GPU into what `reserve` returned."""
        self._driver.download(self._host[: array.nbytes], self._device, self._stream)


def device_count() -> int:
    """GPUs that NVIDIA's driver shows to this process."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def _open(index: int) -> _Driver:
    """A GPU through the first library that can be imported."""
    libraries: tuple[Callable[[int], _Driver], ...] = (_PyCuda, _CudaCore)
    reasons = []
    for library in libraries:
        try:
            return library(index)
        except ImportError as error:
            reasons.append(str(error))
    raise ConfigurationError(
        f"neither pycuda nor cuda-core can be imported ({'; '.join(reasons)}): "
        f"{install_hint('tensorrt')} brings the latter"
    )
