"""Drivers and disks that fail, at each call of them; processes that are killed, at each step; and forks."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import errno
import os
import re
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cache_helpers import PACKAGE, Sandbox, forget_sources, run_python
from click.testing import CliRunner
from failing_disk import CHANGES, WRITES, Disk, compile_once, complete, fill, lacking, leftovers, renew
from made_up_driver import Driver, Refused, made_up

from cupy_moe import _cupy
from cupy_moe.cuda import driver as driver_module
from cupy_moe.cuda import launch, limits, modules, tensor_map
from cupy_moe.cuda.driver import INVALID_CONTEXT
from cupy_moe.errors import CupyMoeError, KernelLaunchError, KernelLoadError, KernelNotPrebuiltError
from cupy_moe.images import compiler, folders, lookup, prebuild, store
from cupy_moe.images.folders import Root
from cupy_moe.plans.base import LaunchPlan
from cupy_moe.tools.cli import main


@pytest.fixture
def quick(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image is compiled once for all tests."""
    compile_once(monkeypatch)
    store.compile_image(sandbox.unit, "sm_90")
    compiler.installed_nvrtc()


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
                "cuOccupancyMaxActiveClusters", lambda: self.count_clusters(count)
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
            get_function=self.wrap("Module.get_function", Refused, self.get_function),
        )

    def get_function(self, entry: str) -> Any:
        self.use_context()
        return self.driver.get_function(entry)

    def attribute(self, attribute: int, function: int) -> int:
        self.use_context()
        known = attribute != modules.MAX_DYNAMIC_SHARED
        return self.driver.funcGetAttribute(attribute, function) if known else 231_424

    def count_clusters(self, place: int) -> None:
        self.use_context()
        ctypes.memmove(place, b"\7\0\0\0", 4)

    def make_context(self, _: int) -> None:
        self.has_no_context = False

    def use_context(self) -> None:
        if self.has_no_context:
            raise Refused(INVALID_CONTEXT)

    def launch(self, *_: Any) -> None:
        self.use_context()
        self.launches.append(len(self.launches))


@pytest.fixture
def fallible(quick: None, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fallible]:
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
    fallible.has_no_context = True  # in another thread
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


# ---- a disk that fails


@pytest.fixture
def disk(quick: None, monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    disk.patch(monkeypatch)
    return disk


FAULTS = {
    "full from then on": (errno.ENOSPC, WRITES),
    "read-only from then on": (errno.EROFS, CHANGES),
    "EIO once": (errno.EIO, ()),
    "EACCES once": (errno.EACCES, ()),
}


Faulty = contextlib.AbstractContextManager[None]


def each_fault(disk: Disk, fault: str, prepare: Callable[[], Any]) -> Iterator[Faulty]:
    """What makes the first call fail, then what makes the second, until there are no more."""
    for call in range(1, 1000):
        prepare()
        yield disk.fails(call, *FAULTS[fault])
        if not disk.failed:
            assert call > 5 or FAULTS[fault][1]
            return
    pytest.fail("no end")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kept", ["nowhere", "by the user", "prebuilt"])
def test_a_look_up_on_a_disk_that_fails(
    disk: Disk, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, kept: str, fault: str
) -> None:
    """It finds the image, wherever that is, or makes it; or says what is wrong with the sources."""
    expected = store.compile_image(sandbox.unit, "sm_90").data
    where = {"nowhere": None, "by the user": sandbox.user, "prebuilt": sandbox.prebuilt}[kept]
    if kept == "prebuilt":
        sandbox.prebuilt.mkdir()
        monkeypatch.setenv("CUPY_MOE_PREBUILT_DIR", str(sandbox.prebuilt))

    def prepare() -> None:
        shutil.rmtree(sandbox.user, ignore_errors=True)
        if where:
            sandbox.publish(where, "sm_90")
        forget_sources()
        lookup._compiled.clear()
        folders._warned.clear()

    for faulty in each_fault(disk, fault, prepare):
        with faulty, contextlib.suppress(CupyMoeError):
            assert next(lookup.candidates("tiny", (9, 0))).data == expected
        assert not leftovers(sandbox.user) or "unlink" in disk.failed
        for root in (sandbox.user, sandbox.prebuilt):
            assert prebuild.problems(Root(root, "user"), strict=False) == [], disk.failed
        assert next(lookup.candidates("tiny", (9, 0))).data == expected


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "EACCES once"])
@pytest.mark.parametrize("before", ["nothing", "the same", "others"])
def test_prebuilding_on_a_disk_that_fails(
    disk: Disk, sandbox: Sandbox, tmp_path: Path, before: str, fault: str
) -> None:
    """Success means that all is there. Else what is there is whole, and the next run adds the rest."""
    out = sandbox.prebuilt
    build = "prebuild", "--arch", "sm_90", "--out", out
    template = fill(tmp_path / "template", sandbox.sources, before)

    def prepare() -> None:
        renew(out, template)
        forget_sources()
        folders._warned.clear()

    for faulty in each_fault(disk, fault, prepare):
        with faulty:
            result = CliRunner().invoke(main, [str(word) for word in build])
        assert isinstance(result.exception, SystemExit | None), (disk.failed, result.exc_info)
        assert result.exit_code in (0, 1)
        assert (result.exit_code == 0) or result.stderr.splitlines()[-1].startswith("Error: ")
        assert not leftovers(out) or "unlink" in disk.failed
        root = Root(out, "prebuilt")
        assert prebuild.problems(root, strict=False) == [], disk.failed
        forget_sources()
        if result.exit_code == 0:
            assert lacking(root) == [], disk.failed
        complete(out)


@pytest.mark.parametrize("fault", FAULTS)
def test_cleaning_on_a_disk_that_fails(disk: Disk, sandbox: Sandbox, fault: str) -> None:
    """What is in use stays."""
    path = sandbox.publish(sandbox.user, "sm_90")
    stale = path.with_name(path.name.replace("tiny", "gone"))

    def prepare() -> None:
        forget_sources()
        stale.touch()
        os.utime(stale, (0, 0))

    for faulty in each_fault(disk, fault, prepare):
        with faulty:
            result = CliRunner().invoke(main, ["clean"])
        assert isinstance(result.exception, SystemExit | None), (disk.failed, result.exc_info)
        assert next(lookup.candidates("tiny", (9, 0))).path == path.with_suffix(".json"), disk.failed
    assert not stale.exists()


# ---- processes that are killed


def test_prebuilding_that_is_killed(tmp_path: Path, sandbox: Sandbox) -> None:
    """Before each change that it makes, and at any time; see killed.py."""
    script = str(Path(__file__).with_name("killed.py"))
    run = run_python(PACKAGE.parent, script, str(sandbox.sources), str(tmp_path / "out"))
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    killed = dict(re.findall(r"(.*): killed (\d+) times", run.stdout))
    assert killed.keys() == {"nothing before", "others before", "at any time"}
    assert all(int(count) > 5 for count in killed.values())


# ---- forks

FORKED = """
import os, signal, sys, threading, time
import torch
from cupy_moe import moe_align_block_size
from cupy_moe.cuda import modules
from cupy_moe.images import compiler
from cupy_moe.errors import CupyMoeError

torch.set_num_threads(1)
device = sys.argv[1]
ids = torch.arange(500, dtype=torch.int32) % 7
expected = moe_align_block_size(ids, 16, 7)
here = ids.to(device)
outs = moe_align_block_size(here, 16, 7)

def hold():
    with modules._lock, compiler._loading:
        held.set()
        time.sleep(60)

held = threading.Event()
threading.Thread(target=hold, daemon=True).start()
held.wait()

def same(results):
    return all(torch.equal(a.cpu(), b) for a, b in zip(results, expected))

def on_cpu():
    assert same(moe_align_block_size(ids, 16, 7))

def loads():
    modules.function(0, "align_small", "align_small_i32x")

def prepares():
    moe_align_block_size(here[:300], 16, 7)

def launches():
    moe_align_block_size(here, 16, 7, out=outs)

def allocates():
    moe_align_block_size(here, 16, 7)

for call in (on_cpu, *((loads, prepares, launches, allocates) if device == "cuda" else ())):
    child = os.fork()
    if not child:
        signal.alarm(30)
        try:
            call()
            said = "right"
        except CupyMoeError as error:
            said = f"{type(error).__name__}: {error}"
        except RuntimeError as error:  # torch's own
            said = f"torch: {error}"
        print(call.__name__, said.splitlines()[0], flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, (call, status)
print("in the parent", same(moe_align_block_size(here, 16, 7)), flush=True)
os._exit(0)
"""


def run_forked(device: str) -> dict[str, str]:
    run = run_python(PACKAGE.parent, "-W", "ignore", "-c", FORKED, device)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = re.findall(r"^(on_cpu|loads|prepares|launches|allocates|in the parent) (.*)$", run.stdout, re.M)
    return dict(lines)


def test_a_forked_child_takes_tensors_of_the_cpu_whatever_locks_were_held() -> None:
    assert run_forked("cpu") == {"on_cpu": "right", "in the parent": "True"}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12 on, where there are threads
def test_a_forked_child_waits_for_no_thread_that_it_does_not_have(quick: None) -> None:
    """Which was loading a kernel, or NVRTC."""
    with modules._lock, compiler._loading:
        child = os.fork()
        if not child:
            held = modules._lock.acquire(blocking=False) and compiler._loading.acquire(blocking=False)
            os._exit(0 if held and driver_module._forked else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert not driver_module._forked


def test_a_driver_that_a_fork_has_closed_is_explained(
    fallible: Fallible, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_module, "_forked", [True])
    call = launch.bind(PLAN, 0, 4, struct.pack("@2I", 7, 8))
    fallible.calls.clear()
    fallible.failing = "driver.launchKernel", 1, 3
    with pytest.raises(KernelLaunchError, match="forked after it was initialised; start processes by spawn"):
        call(1, 2, 3, 4)
    forget(monkeypatch)
    fallible.failing = "Device", fallible.calls["Device"] + 1, 3
    with pytest.raises(KernelLoadError, match="forked after it was initialised"):
        modules.function(0, "tiny", "tiny_add")


@pytest.mark.gpu
def test_a_forked_child_of_a_process_with_cuda_is_told_so() -> None:
    """By us, or by torch where that comes first; nothing hangs, and the parent goes on."""
    said = run_forked("cuda")
    assert said.pop("on_cpu") == "right"
    assert said.pop("in the parent") == "True"
    assert said.keys() == {"loads", "prepares", "launches", "allocates"}
    for line in said.values():
        assert line == "right" or re.match(r"Kernel\w+Error: |torch: .*(fork|CUDA error)", line), said
    print(said)
