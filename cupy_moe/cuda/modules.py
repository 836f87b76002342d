"""Images -> functions on a device. Modules stay loaded for the life of the process."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..errors import KernelLoadError, KernelNotPrebuiltError
from ..images import lookup, sources
from ..images.targets import number, runs_somehow
from ..values import as_int
from .driver import current, errors_of, explain, is_general

log = logging.getLogger("cupy_moe")

_lock = threading.RLock()


def _begin_child() -> None:
    """The thread that had it is not in this process, and would never give it back."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_begin_child)
_modules: dict[tuple[int, str], tuple[Any, lookup.Image]] = {}
_functions: dict[tuple[int, str, str], Any] = {}  # a module is unloaded with the last reference to it

# CU_FUNC_ATTRIBUTE_* and CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH
_STATIC_SHARED, MAX_DYNAMIC_SHARED, _CLUSTER_WIDTH, _NON_PORTABLE_CLUSTER = 1, 8, 11, 14
_CLUSTER_LAUNCH = 120
_PORTABLE_CLUSTER = 8
_NO_BINARY_FOR_GPU, _UNSUPPORTED_PTX, _NOT_FOUND = 209, 222, 500  # CUresult
_DAMAGED = {200, 218, 300}
_CAPTURE = range(900, 908)
_OVERLAP_IN_GRAPHS = 12_030  # CUDA 12.3


def function(device: int, unit: str, entry: str) -> int:
    """The CUfunction of an entry point on a device, loaded (and, if need be, compiled) at the first call.

    It may use all the dynamic shared memory that the device has beside its static shared memory, and be
    launched in clusters larger than those that every device takes. The first call of a unit takes 1 ms with a
    prebuilt cubin and up to a second from source, later ones a dictionary look-up.
    Raises KernelNotPrebuiltError, KernelLoadError, CompileError, DependencyError, ConfigError.
    """
    key = (device, unit, entry)
    if key not in _functions:
        with _lock:
            if key not in _functions:
                with errors_of(f"device {device}: {unit}/{entry} cannot be loaded"):
                    _functions[key] = _get_function(device, unit, entry)
    return int(_functions[key].ptr)


def warmup(devices: int | Iterable[int] | None = None) -> int:
    """Load every kernel on the devices (default: the current one), so that no later call has to, e.g. one
    inside a CUDA graph capture. Returns how many kernels are ready, and logs where they came from.
    Raises what `function` raises, and KernelLoadError where there is no such device or no GPU at all."""
    from .._cupy import cupy

    if devices is None:
        try:
            devices = cupy.cuda.runtime.getDevice()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise KernelLoadError(f"no GPU to load kernels on: {explain(error)}") from error
    total = 0
    for device in devices if isinstance(devices, Iterable) else [devices]:
        device = as_int("devices", device)
        start = time.perf_counter()
        origins: Counter[str] = Counter()
        for used in images(device):
            unit = used.sidecar.unit
            for entry in used.sidecar.kernels:
                function(device, unit, entry)
            origins[f"{used.origin} {used.sidecar.target}"] += len(used.sidecar.kernels)
        ready, ms = sum(origins.values()), (time.perf_counter() - start) * 1e3
        sources = ", ".join(f"{count} from {origin}" for origin, count in sorted(origins.items()))
        log.info("%d kernels ready on device %d in %.1f ms: %s", ready, device, ms, sources)
        total += ready
    return total


def images(device: int) -> list[lookup.Image]:
    """What the device runs of each unit that is for it; loads what is not loaded yet."""
    own = capability(device)
    return [
        _load(device, name)[1] for name, unit in sources.units().items() if runs_somehow(own, unit.targets)
    ]


def capability(device: int) -> tuple[int, int]:
    """Raises KernelLoadError where there is no such device."""
    from .._cupy import cupy

    try:
        digits = cupy.cuda.Device(device).compute_capability
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise KernelLoadError(f"device {device} cannot be used: {explain(error)}") from error
    return int(digits[:-1]), int(digits[-1])


def can_overlap(device: int, unit: str) -> bool:
    """Whether a unit may be launched to overlap with the kernel before it: on devices of 9.0 and later, where
    its image is for these, too, and so waits; and with drivers of which graphs can capture such a launch."""
    if capability(device) < (9, 0) or number(_load(device, unit)[1].sidecar.target) < 90:
        return False
    from .._cupy import cupy

    with errors_of("no version of the driver"):
        return bool(cupy.cuda.runtime.driverGetVersion() >= _OVERLAP_IN_GRAPHS)


def has_clusters(device: int) -> bool:
    from .._cupy import cupy

    with errors_of(f"device {device} cannot be used"):
        return bool(cupy.cuda.runtime.deviceGetAttribute(_CLUSTER_LAUNCH, device))


def _get_function(device: int, unit: str, entry: str) -> Any:
    from .._cupy import cupy

    driver, runtime = cupy.cuda.driver, cupy.cuda.runtime
    module, used = _load(device, unit)
    with current(device):
        try:
            function = module.get_function(entry)
            static = driver.funcGetAttribute(_STATIC_SHARED, function.ptr)
            limit = runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, device)
            driver.funcSetAttribute(function.ptr, MAX_DYNAMIC_SHARED, limit - static)
            if (
                has_clusters(device)
                and driver.funcGetAttribute(_CLUSTER_WIDTH, function.ptr) > _PORTABLE_CLUSTER
            ):
                try:
                    driver.funcSetAttribute(function.ptr, _NON_PORTABLE_CLUSTER, 1)
                except driver.CUDADriverError as error:
                    if is_general(error.status):
                        raise  # else `max_clusters` is 0
        except driver.CUDADriverError as error:
            if error.status in _CAPTURE:
                raise _in_capture(unit, error) from error
            has = f", which has {', '.join(used.sidecar.kernels)}" if error.status == _NOT_FOUND else ""
            where = f"{entry!r} of the {used.sidecar.target} image of {unit!r}{has}"
            raise KernelLoadError(f"device {device}: {where}: {explain(error)}") from error
    return function


def _load(device: int, unit: str) -> tuple[Any, lookup.Image]:
    """The module of a unit on a device: the first of its images that the driver takes."""
    with _lock:
        if loaded := _modules.get((device, unit)):
            return loaded
        from .._cupy import cupy

        refused = ""
        with errors_of(f"device {device}: {unit!r} cannot be loaded"), current(device):
            candidates = lookup.candidates(unit, capability(device))
            while True:
                try:
                    candidate = next(candidates)
                except KernelNotPrebuiltError as error:
                    name = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()
                    kind = KernelLoadError if refused else KernelNotPrebuiltError
                    raise kind(f"device {device} ({name}): {error}{refused}") from None
                module = cupy.cuda.function.Module()
                try:
                    module.load(candidate.data)
                except cupy.cuda.driver.CUDADriverError as error:
                    if error.status in _CAPTURE:
                        raise _in_capture(unit, error) from error
                    if is_general(error.status):
                        raise  # another image would fare no better, or be taken from now on
                    reason = _explain(candidate, error)
                    expected = error.status == _NO_BINARY_FOR_GPU
                    log.log(
                        logging.INFO if expected else logging.WARNING, "%s: not using the %s", unit, reason
                    )
                    refused += f"\n  refused: {reason}"
                    continue
                log.debug("%s on device %d: %s %s", unit, device, candidate.origin, candidate.sidecar.target)
                _modules[device, unit] = module, candidate
                return module, candidate


def _explain(image: lookup.Image, error: Any) -> str:
    what = f"{image.sidecar.target} image ({image.origin}, {image.path or 'in memory'}): {error}"
    if error.status in _DAMAGED:
        return f"{what}; it is damaged, or NVRTC {image.sidecar.nvrtc} is of a newer CUDA than the driver"
    if error.status == _UNSUPPORTED_PTX:
        return f"{what}; PTX of NVRTC {image.sidecar.nvrtc} needs a driver as new, a cubin does not"
    return what


def _in_capture(unit: str, error: Exception) -> KernelLoadError:
    return KernelLoadError(
        f"kernel {unit!r} cannot be loaded during graph capture ({error}); call cupy_moe.warmup() before it"
    )
