"""Drivers and disks that fail, at each call of them; processes that are killed, at each step; and forks."""

from __future__ import annotations

import ast
import ctypes
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cache_helpers import PACKAGE, Sandbox
from made_up_driver import Driver, Refused, made_up

from cupy_moe import _cupy
from cupy_moe.cuda import driver as driver_module
from cupy_moe.cuda import launch, limits, modules, tensor_map
from cupy_moe.cuda.driver import INVALID_CONTEXT
from cupy_moe.errors import CupyMoeError, KernelLaunchError, KernelLoadError, KernelNotPrebuiltError
from cupy_moe.images import compiler
from cupy_moe.plans.base import LaunchPlan

# ---- a driver that fails

STATUSES = {"out of memory": 2, "illegal address": 700, "launch failure": 719}
PLAN = LaunchPlan("tiny", "tiny_add", 3, 64, 128)


class RuntimeRefused(Refused):
    """CuPy's runtime has errors of its own."""


class Fallible:
    """Stands before all functions of CuPy and of libcuda: counts their calls, and fails one of them."""

    def __init__(self) -> None:
        self.driver = Driver()
        self.calls: Counter[str] = Counter()
        self.failing: tuple[str, int, int] = "", 0, 0  # which function, which of its calls, by which status
        self.launches: list[int] = []
        self.has_no_context = False  # until the runtime makes one, as in a new thread
        cuda, driver = made_up(self.driver).cuda, self.driver
        runtime, device = vars(cuda.runtime), cuda.Device
        runtime |= dict.fromkeys(("setDevice", "free"), self.make_context)
        runtime["CUDARuntimeError"] = RuntimeRefused
        self.cupy = SimpleNamespace(
            cuda=SimpleNamespace(
                runtime=SimpleNamespace(**self.wrapped("runtime", RuntimeRefused, runtime)),
                driver=SimpleNamespace(
                    CUDADriverError=Refused,
                    launchKernel=self.wrap("driver.launchKernel", Refused, self.launch),
                    funcGetAttribute=self.wrap("driver.funcGetAttribute", Refused, self.attribute),
                    funcSetAttribute=self.wrap("driver.funcSetAttribute", Refused, driver.funcSetAttribute),
                ),
                function=SimpleNamespace(Module=self.module),
                Device=lambda index: self.device(device, index),
            )
        )
        self.library = SimpleNamespace(
            cuLaunchKernelEx=lambda *given: self.status("cuLaunchKernelEx", lambda: self.launch(*given)),
            cuOccupancyMaxActiveClusters=lambda count, *_: self.status(
                "cuOccupancyMaxActiveClusters", lambda: ctypes.memmove(count, b"\7\0\0\0", 4)
            ),
            cuTensorMapEncodeTiled=lambda *_: self.status("cuTensorMapEncodeTiled", self.use_context),
        )

    def step(self, name: str, kind: type[Refused]) -> None:
        self.calls[name] += 1
        failing, call, status = self.failing
        if (name, self.calls[name]) == (failing, call):
            raise kind(status)

    def wrap(self, name: str, kind: type[Refused], function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.step(name, kind)
            return function(*arguments)

        return call

    def wrapped(self, name: str, kind: type[Refused], functions: dict[str, Any]) -> dict[str, Any]:
        return {
            key: value if isinstance(value, (type, int)) else self.wrap(f"{name}.{key}", kind, value)
            for key, value in functions.items()
        }

    def status(self, name: str, function: Callable[[], Any]) -> int:
        """A function of libcuda, which returns its status."""
        try:
            self.step(name, Refused)
            function()
        except Refused as refused:
            return refused.status
        return 0

    def device(self, kind: Any, index: int) -> Any:
        self.step("Device", RuntimeRefused)
        made = kind(index)
        faults, enter, leave = self, made.__enter__, made.__exit__

        class Device:
            __enter__ = staticmethod(self.wrap("Device.__enter__", RuntimeRefused, enter))

            def __exit__(self, *given: object) -> None:
                leave(*given)
                faults.step("Device.__exit__", RuntimeRefused)

            @property
            def compute_capability(self) -> str:
                faults.step("Device.compute_capability", RuntimeRefused)
                return str(made.compute_capability)

        return Device()

    def module(self) -> Any:
        return SimpleNamespace(
            load=self.wrap("Module.load", Refused, self.driver.load),
            get_function=self.wrap("Module.get_function", Refused, self.driver.get_function),
        )

    def attribute(self, attribute: int, function: int) -> int:
        known = attribute != modules.MAX_DYNAMIC_SHARED
        return self.driver.funcGetAttribute(attribute, function) if known else 231_424

    def make_context(self, _: int) -> None:
        self.has_no_context = False

    def use_context(self) -> None:
        if self.has_no_context:
            raise Refused(INVALID_CONTEXT)

    def launch(self, *_: Any) -> None:
        self.use_context()
        self.launches.append(len(self.launches))


@pytest.fixture
def fallible(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fallible]:
    """With an image for device 0, another that would do for it as well, and none for device 1."""
    for target in ("sm_90", "compute_90"):
        sandbox.publish(sandbox.prebuilt, target)
    monkeypatch.setenv("CUPY_MOE_PREBUILT_DIR", str(sandbox.prebuilt))
    monkeypatch.setenv("CUPY_MOE_DISABLE_JIT", "1")
    compiler.toolchain()
    fallible = Fallible()
    monkeypatch.setattr(_cupy, "cupy", fallible.cupy)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(launch, "_current_stream", lambda device: 99)
    libraries = {"libcuda.so.1": fallible.library}
    monkeypatch.setattr(
        driver_module, "ctypes", SimpleNamespace(**{**vars(ctypes), "CDLL": libraries.__getitem__})
    )
    forget(monkeypatch)
    yield fallible
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a process has found out of its devices."""
    for name in ("_modules", "_functions"):
        monkeypatch.setattr(modules, name, {})
    for cache in (driver_module.driver_function, limits.device_limits, tensor_map.tensor_map):
        cache.cache_clear()


def everything(fallible: Fallible) -> list[Any]:
    """All that is asked of a driver, from the first call in a process to a launch; what comes of it."""
    results: list[Any] = [modules.warmup()]
    found = limits.device_limits(0)
    results += [found.num_sms, found.max_clusters("tiny", "tiny_cluster", 16)]
    for overlaps in (False, True):
        call = launch.bind(PLAN._replace(overlaps=overlaps), 0, 4, struct.pack("@2I", 7, 8))
        for fallible.has_no_context in (False, True):
            call(1, 2, 3, 4)
    fallible.has_no_context = True
    tensor_map.tensor_map(4096, "bf16", (64, 8, 1, 1, 1), (128, 1024, 16, 16), (64, 8, 1, 1, 1))
    try:
        modules.function(1, "tiny", "tiny_add")
    except KernelNotPrebuiltError as error:
        results.append("device 1 (Imaginary)" in str(error))
    return [*results, [image.sidecar.target for image in modules.images(0)]]


RIGHT = [3, 132, 7, True, ["sm_90"]]


def functions_of_the_driver() -> set[str]:
    """Those that the code names."""
    found = set[str]()
    for path in sorted((PACKAGE / "cuda").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
                if owner in ("driver", "runtime") and not node.attr.lower().startswith("cuda"):
                    found.add(f"{owner}.{node.attr}")
                if owner == "cuda" and node.attr not in ("driver", "runtime", "function"):
                    found.add(node.attr)
                if node.attr == "compute_capability":
                    found.add(f"Device.{node.attr}")
                if owner == "module":
                    found.add(f"Module.{node.attr}")
            if isinstance(node, ast.withitem) and "Device" in ast.dump(node):
                found |= {"Device.__enter__", "Device.__exit__"}
    return found | set(driver_module._TYPES)


FUNCTIONS = sorted(functions_of_the_driver() - {"device", "current_stream", "device_count", "current_device"})


def test_all_functions_of_the_driver_are_called_here(fallible: Fallible) -> None:
    assert everything(fallible) == RIGHT
    assert sorted(fallible.calls) == FUNCTIONS
    assert len(FUNCTIONS) > 15


def fails(fallible: Fallible, status: int) -> CupyMoeError | None:
    try:
        assert everything(fallible) == RIGHT
    except (KernelLoadError, KernelLaunchError) as error:
        return error if re.search(rf"(CUDA_ERROR_|error ){status}\b", str(error)) else pytest.fail(str(error))
    return None


@pytest.mark.parametrize("fault", STATUSES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_driver_that_fails_once(
    fallible: Fallible, monkeypatch: pytest.MonkeyPatch, name: str, fault: str
) -> None:
    """At each call: an error of ours that says so, and a process that goes on as if nothing had been."""
    for call in range(1, 100):
        fallible.calls.clear()
        fallible.failing = name, call, STATUSES[fault]
        forget(monkeypatch)
        if fails(fallible, STATUSES[fault]) is None:
            assert fallible.calls[name] < call  # there are no more
            break
        fallible.failing = "", 0, 0
        fallible.driver.current = [0]
        assert everything(fallible) == RIGHT
    assert call > 1


def test_a_driver_without_a_function_is_told(fallible: Fallible) -> None:
    del fallible.library.cuTensorMapEncodeTiled
    with pytest.raises(KernelLoadError, match="the driver has no cuTensorMapEncodeTiled"):
        driver_module.driver_function("cuTensorMapEncodeTiled")
