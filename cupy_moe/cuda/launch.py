"""LaunchPlan -> a function that launches on torch's current stream. No DLPack, no CuPy arrays, no allocation.

A kernel takes one struct by value. It is packed into a buffer that the driver copies before the launch
returns. A call takes a buffer out of the pool for as long: a signal handler or a thread that launches
meanwhile takes another.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..errors import KernelLaunchError
from ..plans.base import LaunchPlan
from . import modules
from .driver import INVALID_CONTEXT, driver_function, explain, pack_launch_config

MAX_ARGUMENT_BYTES = 4096  # of one kernel, on every architecture
# Prepared calls that an operator remembers, of up to 2 kB each; the least recently used is forgotten first.
# With all else that is remembered, those of every operator take less than 40 MB.
CACHED_CALLS = 1024

Launch = Callable[..., None]


def _public_current_stream(device: int) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


# Single calls into torch's C++, 0.1 us where the public functions take 4 to 9.
_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_current_stream)
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


class _Buffer(NamedTuple):
    memory: ctypes.Array[ctypes.c_char]
    pointers: ctypes.Array[ctypes.c_void_p]  # one, to the memory: the kernel's only argument
    address: int  # of `pointers`


def _new_buffer() -> _Buffer:
    memory = ctypes.create_string_buffer(MAX_ARGUMENT_BYTES)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(memory))
    return _Buffer(memory, pointers, ctypes.addressof(pointers))


_pool: list[_Buffer] = []  # those that no call has; one that is interrupted does not bring its own back


def bind(plan: LaunchPlan, device: int, num_pointers: int, constants: bytes) -> Launch:
    """Load a kernel on a device, and return the function that launches it there.

    That takes the first fields of the kernel's argument struct, which are pointers; `constants` are the
    fields after those, packed. A call takes a few microseconds, whatever the current device is. Raises what
    `modules.function` raises, which compiles where no cubin is found; a call raises KernelLaunchError.
    """
    unit, entry, grid, block, shared_bytes, overlaps = plan
    function = modules.function(device, unit, entry)
    from .._cupy import cupy

    launch_kernel, refused = cupy.cuda.driver.launchKernel, cupy.cuda.driver.CUDADriverError
    if overlaps and modules.can_overlap(device, unit):
        launch_kernel = _launch_overlapping
    given = num_pointers
    fixed: tuple[int, ...] = ()
    if given < 4:  # `launch` takes four: words of the constants stand for those that are missing
        num_pointers, missing = 4, 8 * (4 - given)
        constants = constants.ljust(missing, b"\0")
        fixed, constants = struct.unpack(f"@{4 - given}P", constants[:missing]), constants[missing:]
    pack_into = _layout(num_pointers, len(constants)).pack_into

    def launch(a: int, b: int, c: int, d: int, *more: int) -> None:  # at least four; starred ones cost time
        try:
            buffer = _pool.pop()
        except IndexError:
            buffer = _new_buffer()
        memory, _, address = buffer
        if more:
            pack_into(memory, 0, a, b, c, d, *more, constants)
        else:
            pack_into(memory, 0, a, b, c, d, constants)
        stream = _current_stream(device)
        try:
            launch_kernel(function, grid, 1, 1, block, 1, 1, shared_bytes, stream, address, 0)
        except refused as error:
            if error.status != INVALID_CONTEXT:
                raise _failed(unit, entry, device, grid, error) from error
            try:  # a new thread has no context before its first runtime call
                cupy.cuda.runtime.setDevice(device)
                launch_kernel(function, grid, 1, 1, block, 1, 1, shared_bytes, stream, address, 0)
            except (refused, cupy.cuda.runtime.CUDARuntimeError) as again:
                raise _failed(unit, entry, device, grid, again) from again
        _pool.append(buffer)

    if given == num_pointers and torch.cuda.device_count() == 1:
        return launch

    def launch_on_device(*pointers: int) -> None:
        if _current_device() == device:
            launch(*pointers, *fixed)
        else:
            with torch.cuda.device(device):
                launch(*pointers, *fixed)

    return launch_on_device


def _failed(unit: str, entry: str, device: int, grid: int, error: Exception) -> KernelLaunchError:
    return KernelLaunchError(f"{unit}/{entry} on device {device}, {grid} blocks: {explain(error)}")


# A CUlaunchAttribute: programmatic stream serialization, which is allowed
_ATTRIBUTE = ctypes.create_string_buffer(struct.pack("@I4xi60x", 6, 1), 72)


def _launch_overlapping(function: int, *rest: int) -> None:
    """As CuPy's launchKernel, but the kernel may begin while the one before it on the stream ends."""
    *sizes, stream, pointers, _ = rest
    config = pack_launch_config(*sizes, stream, ctypes.addressof(_ATTRIBUTE), 1)
    status = driver_function("cuLaunchKernelEx")(config, function, pointers, None)
    if status:
        from .._cupy import cupy

        raise cupy.cuda.driver.CUDADriverError(status)


@functools.cache
def _layout(num_pointers: int, constant_bytes: int) -> struct.Struct:
    layout = struct.Struct(f"@{num_pointers}P{constant_bytes}s")
    assert layout.size <= MAX_ARGUMENT_BYTES
    return layout
