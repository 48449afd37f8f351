"""NVIDIA GPUs: how many there are, and memory and streams of one through pycuda."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_server.errors import ConfigurationError
from clip_server.install import install_hint
from clip_server.runtimes.protocol import OutOfMemoryError

_EXTRA = (
    "pycuda cannot be imported; what installs it, and needs CUDA's nvcc, is "
    f"{install_hint('tensorrt')}"
)


class Gpu:
    """A GPU by its number, through its primary context, which torch and others share.

    name: with its compute capability, such as `NVIDIA A10 (8.6)`.

    Raises:
        ConfigurationError: pycuda or the GPU is not there.
    """

    def __init__(self, index: int = 0) -> None:
        # First: without NVIDIA's driver pycuda, too, cannot be imported.
        count = device_count()
        if count <= index:
            raise ConfigurationError(
                f"device 'cuda:{index}' cannot be used: {count} NVIDIA GPUs can be seen "
                "on this machine"
            )
        self.driver = _driver()
        self.driver.init()
        device = self.driver.Device(index)
        capability = ".".join(map(str, device.compute_capability()))
        self.name, self.device = f"{device.name()} ({capability})", f"cuda:{index}"
        self._context = device.retain_primary_context()

    @contextmanager
    def active(self) -> Iterator[None]:
        """This thread's calls go to this GPU. Its out-of-memory errors become ours."""
        self._context.push()
        try:
            yield
        except self.driver.MemoryError as error:
            raise OutOfMemoryError(str(error)) from error
        finally:
            self._context.pop()


class Buffer:
    """A place on the GPU, and one in pinned host memory that is copied to it or from it.

    Both grow with what is asked of them, and never shrink. For one thread at a time.
    """

    def __init__(self, driver: Any, dtype: np.dtype[Any]) -> None:
        self._driver, self._dtype = driver, dtype
        self._items = 0
        self._host: Any = None
        self._device: Any = None

    @property
    def address(self) -> int:
        """On the GPU."""
        return int(self._device)

    def reserve(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """The host's place as an array of this shape; what it held before is lost."""
        items = math.prod(shape)
        if items > self._items:
            self._items, self._host, self._device = 0, None, None
            self._device = self._driver.mem_alloc(items * self._dtype.itemsize)
            self._host = self._driver.pagelocked_empty(items, self._dtype)
            self._items = items
        array: NDArray[Any] = self._host[:items].reshape(shape)
        return array

    def upload(self, array: NDArray[Any], stream: Any) -> None:
        """Starts the copy of what `reserve` gave to the GPU."""
        self._driver.memcpy_htod_async(self._device, array, stream)

    def download(self, array: NDArray[Any], stream: Any) -> None:
        """Starts the copy from the GPU into what `reserve` gave."""
        self._driver.memcpy_dtoh_async(array, self._device, stream)


def device_count() -> int:
    """GPUs that NVIDIA's driver shows to this process."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def _driver() -> Any:
    try:
        import pycuda.driver
    except ImportError as error:
        raise ConfigurationError(f"{_EXTRA} ({error})") from error
    return pycuda.driver
