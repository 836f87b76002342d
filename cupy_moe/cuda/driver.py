"""Functions of the driver that CuPy does not wrap. It is in the process already, under this name."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable

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
    """One of those above; it returns a CUresult."""
    function: Callable[..., int] = getattr(ctypes.CDLL("libcuda.so.1"), name)
    function.argtypes = _TYPES[name]  # type: ignore[attr-defined]
    return function
