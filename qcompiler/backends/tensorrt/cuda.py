"""The CUDA driver through ctypes: what GPUs there are, and memory on them.

TensorRT's runtime ends the process when it is used without a driver, so the driver is asked first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from qcompiler.errors import TargetError

_MAJOR, _MINOR = 75, 76
"""CUdevice_attribute: compute capability (cuda.h)."""
_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")


class Driver(Protocol):
    """The functions of libcuda, each of which returns a status."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        """Return a function."""
        ...


def load_driver() -> Driver | None:
    """Return libcuda, initialized, or None where it is missing or finds no GPU that it can use."""
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        return library if library.cuInit(0) == 0 else None
    return None


def device_sms(driver: Driver | None) -> tuple[int, ...]:
    """Return the compute capability of each GPU (89 is 8.9), none without a driver."""
    if driver is None:
        return ()
    count = ctypes.c_int(0)
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    found = []
    for ordinal in range(count.value):
        device, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
        asked = (
            driver.cuDeviceGet(ctypes.byref(device), ordinal),
            driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
            driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
        )
        if any(asked):
            return ()
        found.append(10 * major.value + minor.value)
    return tuple(found)


@dataclass
class Memory:
    """Memory and one stream on the first GPU; `close` gives all of it back.

    Attributes:
        driver: libcuda.
    """

    driver: Driver
    stream: int = field(init=False, default=0)
    _blocks: dict[str, tuple[int, int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Take the GPU's primary context, which is also the one of TensorRT and torch, and make a stream."""
        self._device, self._context = ctypes.c_int(0), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.enter()
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), 0)
        self.stream = int(stream.value or 0)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.driver, name)(*arguments)
        if status != 0:
            raise TargetError(f"the cuda driver could not {name}: status {status}")

    def enter(self) -> None:
        """Make the GPU's context the calling thread's."""
        self._call("cuCtxSetCurrent", self._context)

    def block(self, name: str, size: int) -> int:
        """Return the address of at least ``size`` bytes kept under a name; asking for more frees the old ones."""
        address, length = self._blocks.get(name, (0, 0))
        if length >= max(size, 1):
            return address
        if address:
            self._call("cuMemFree_v2", ctypes.c_uint64(address))
            del self._blocks[name]
        made = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(made), ctypes.c_size_t(max(size, 1)))
        self._blocks[name] = (int(made.value), max(size, 1))
        return int(made.value)

    def upload(self, address: int, source: int, size: int) -> None:
        """Copy ``size`` bytes from the host's address to the GPU's, in the stream's order."""
        self._call(
            "cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), ctypes.c_void_p(source), ctypes.c_size_t(size),
            ctypes.c_void_p(self.stream),
        )  # fmt: skip

    def download(self, target: int, address: int, size: int) -> None:
        """Copy ``size`` bytes from the GPU's address to the host's, in the stream's order."""
        self._call(
            "cuMemcpyDtoHAsync_v2", ctypes.c_void_p(target), ctypes.c_uint64(address), ctypes.c_size_t(size),
            ctypes.c_void_p(self.stream),
        )  # fmt: skip

    def wait_for_device(self) -> None:
        """Wait for all of the context's work: arrays that a caller hands over may still be being written."""
        self._call("cuCtxSynchronize")

    def wait(self) -> None:
        """Wait for the stream."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def close(self) -> None:
        """Free all memory and the stream, and let go of the context."""
        if not self._context:
            return
        self.enter()
        for address, _ in self._blocks.values():
            self._call("cuMemFree_v2", ctypes.c_uint64(address))
        self._blocks.clear()
        self._call("cuStreamDestroy_v2", ctypes.c_void_p(self.stream))
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)
        self._context = ctypes.c_void_p()


def require_device(sms: Sequence[int]) -> int:
    """Return the first GPU's compute capability.

    Raises:
        TargetError: there is none.
    """
    if not sms:
        raise TargetError(
            "found no CUDA device; TensorRT engines run on an NVIDIA GPU with its driver (the ONNX output runs on "
            "ONNX Runtime anywhere)"
        )
    return sms[0]
