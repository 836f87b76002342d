"""Functions of the driver that CuPy does not wrap, and what its errors mean."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import struct
from collections.abc import Callable, Iterator

from ..errors import KernelLoadError

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_uint
_TYPES = {
    "cuLaunchKernelEx": [ctypes.c_char_p, _POINTER, _POINTER, _POINTER],
    "cuOccupancyMaxActiveClusters": [_POINTER, _POINTER, ctypes.c_char_p],
    "cuTensorMapEncodeTiled": [_POINTER, _NUMBER, _NUMBER, *[_POINTER] * 5, *[_NUMBER] * 4],
}
# CUlaunchConfig: grid, block, bytes of shared memory, stream, attributes, number of attributes
pack_launch_config = struct.Struct("@7I4xPPI4x").pack


@functools.cache
def driver_function(name: str) -> Callable[..., int]:
    """One of those above; it returns a CUresult. The driver is in the process already, under this name."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL("libcuda.so.1"), name)
    except (OSError, AttributeError) as error:
        raise KernelLoadError(f"the driver has no {name}, as newer ones have: {error}") from error
    function.argtypes = _TYPES[name]  # type: ignore[attr-defined]
    return function


# ---- errors

INVALID_CONTEXT = 201  # CUresult
_NOT_INITIALIZED = 3  # of the driver and of the runtime
# What any call may return, whatever it is asked: no memory, a device, a process or an operating system that
# cannot go on, the fault of an earlier kernel, of whatever library.
_OF_NO_CALL = {2, 3, 4, 46, 100, 101, 201, 214, 220, 226, 304, 401, *range(700, 720), *range(802, 810)}
_forked: list[bool] = []  # whether this process is a child that began without exec
os.register_at_fork(after_in_child=lambda: _forked.append(True))


def is_general(status: int) -> bool:
    """Whether a CUresult says nothing about what was asked for, and may be another one the next time."""
    return status in _OF_NO_CALL


def explain(error: Exception) -> str:
    """What CuPy says, and what it means where that cannot be seen."""
    if _forked and getattr(error, "status", 0) == _NOT_INITIALIZED:
        return (
            f"{error}: CUDA cannot be used in a process that was forked after it was initialised; start"
            " processes by spawn"
        )
    return str(error)


@contextlib.contextmanager
def current(device: int) -> Iterator[None]:
    """Inside, a device is the current one, and has its context: a new thread of that device has none."""
    from .._cupy import cupy

    with cupy.cuda.Device(device):
        cupy.cuda.runtime.setDevice(device)
        yield


@contextlib.contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Errors of CuPy, the driver's and the runtime's, are KernelLoadErrors that begin with `what`."""
    from .._cupy import cupy

    try:
        yield
    except (cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError) as error:
        raise KernelLoadError(f"{what}: {explain(error)}") from error
