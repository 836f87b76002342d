"""LaunchPlan -> a function that launches on torch's current stream. No DLPack, no CuPy arrays, no allocation.

A kernel takes one struct by value. It is packed into a buffer of the calling thread, which the driver copies
before the launch returns.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch

from . import modules
from .plan import DeviceLimits, LaunchPlan

MAX_ARGUMENT_BYTES = 4096  # of one kernel, on every architecture

Launch = Callable[..., None]


def _public_current_stream(device: int) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


# Single calls into torch's C++, 0.1 us where the public functions take 4 to 9.
_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_current_stream)
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


class _Arguments(threading.local):
    """The calling thread's argument buffer, and the address of an array of one pointer to it."""

    def __init__(self) -> None:
        # cuLaunchKernel needs a current context, which a new thread gets from its first runtime call.
        torch.cuda.set_device(torch.cuda.current_device())
        buffer = ctypes.create_string_buffer(MAX_ARGUMENT_BYTES)
        self.pointers = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        # One attribute, since each look-up in a thread's own dictionary takes a while.
        self.buffer_and_address = memoryview(buffer).cast("B"), ctypes.addressof(self.pointers)


_arguments = functools.cache(_Arguments)  # one, made with the first kernel: it needs a GPU


def bind(plan: LaunchPlan, device: int, layout: struct.Struct, constants: bytes = b"") -> Launch:
    """Load a kernel on a device, and return the function that launches it there.

    That takes the first fields of the kernel's argument struct, in the order of `layout`; `constants` are the
    fields after those, packed. A call takes a few microseconds, whatever the current device is. Raises what
    `modules.kernel` raises, which compiles where no cubin is found.
    """
    kernel, grid, block, shared_bytes = plan
    unit, _, entry = kernel.partition("/")
    function = modules.kernel(device, unit, entry)
    from ._cupy import cupy

    launch_kernel, arguments, pack_into = cupy.cuda.driver.launchKernel, _arguments(), layout.pack_into
    rest, several_devices = slice(layout.size, layout.size + len(constants)), torch.cuda.device_count() > 1
    assert rest.stop <= MAX_ARGUMENT_BYTES

    def launch(*values: int) -> None:
        if several_devices and _current_device() != device:
            with torch.cuda.device(device):
                launch(*values)
            return
        buffer, address = arguments.buffer_and_address
        pack_into(buffer, 0, *values)
        buffer[rest] = constants
        launch_kernel(function, grid, 1, 1, block, 1, 1, shared_bytes, _current_stream(device), address, 0)

    return launch


@functools.cache
def device_limits(device: int) -> DeviceLimits:
    properties: Any = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )
