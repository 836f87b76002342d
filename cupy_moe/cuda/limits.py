"""What plans ask of a device."""

from __future__ import annotations

import ctypes
import functools

import torch

from ..errors import DependencyError
from ..images import sources
from ..images.targets import runs_somehow
from ..plans.base import DeviceLimits
from . import modules
from .driver import current, driver_function, errors_of, is_general, pack_launch_config


@functools.cache
def device_limits(device: int) -> DeviceLimits:
    """CUDA's attributes: torch has them under other names in other versions."""
    if torch.version.cuda is None:
        raise DependencyError("kernels need a torch that is built for CUDA; CPU tensors work with any")
    from .._cupy import cupy

    runtime = cupy.cuda.runtime
    with errors_of(f"device {device} cannot be used"):
        return DeviceLimits(
            runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, device),
            runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
            functools.cache(functools.partial(max_clusters, device)),
            functools.partial(_runs, device),
        )


def _runs(device: int, unit: str) -> bool:
    return runs_somehow(modules.capability(device), sources.unit(unit).targets)


def max_clusters(device: int, unit: str, entry: str, size: int) -> int:
    """How many clusters of an entry point that is compiled for `size` blocks run at once, by the driver's
    account, if each block takes an SM for itself. 0: none does, or the device knows no clusters. That is
    remembered, so what the driver says of something else is no answer, but a KernelLoadError."""
    if not modules.has_clusters(device):
        return 0
    from .._cupy import cupy

    function, count = modules.function(device, unit, entry), ctypes.c_int()
    with errors_of(f"device {device}: {unit}/{entry}"), current(device):
        shared_bytes = cupy.cuda.driver.funcGetAttribute(modules.MAX_DYNAMIC_SHARED, function)
        config = pack_launch_config(size, 1, 1, 32, 1, 1, shared_bytes, 0, 0, 0)
        occupancy = driver_function("cuOccupancyMaxActiveClusters")
        status = occupancy(ctypes.addressof(count), function, config)
        if is_general(status):
            raise cupy.cuda.driver.CUDADriverError(status)
    return 0 if status else count.value
