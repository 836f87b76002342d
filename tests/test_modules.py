"""Loading images on a device: with a driver made up for the purpose, then (gpu) with a real one."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from cache_helpers import PACKAGE, Everything, Sandbox, copy_package, run_python
from made_up_driver import Driver, Refused, made_up

import cupy_moe
from cupy_moe import _cupy
from cupy_moe.cuda import limits, modules
from cupy_moe.errors import KernelLoadError, KernelNotPrebuiltError
from cupy_moe.images import compiler, elf, lookup, sources, targets


@pytest.fixture
def fresh(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded yet."""
    monkeypatch.setattr(modules, "_modules", {})
    monkeypatch.setattr(modules, "_functions", {})


# ---- a made-up driver


@pytest.fixture
def driver(fresh: None, monkeypatch: pytest.MonkeyPatch) -> Driver:
    compiler.toolchain()  # with CuPy itself: the made-up one has no compiler
    driver = Driver()
    monkeypatch.setattr(_cupy, "cupy", made_up(driver))
    return driver


def test_a_kernel_is_loaded_once_per_device_and_made_ready(driver: Driver) -> None:
    pointers = {modules.function(device, "tiny", "tiny_add") for device in (0, 1, 0, 1)}
    assert pointers == {1008, 2008}
    assert [elf.number(data) for data in driver.loads] == [90, 80]
    shared = modules.MAX_DYNAMIC_SHARED
    assert driver.attributes == [(1008, shared, 231424), (2008, shared, 231424)]


def test_a_kernel_of_large_clusters_is_allowed_them_where_there_are_any(driver: Driver) -> None:
    for device in (0, 1):
        modules.function(device, "tiny", "tiny_cluster")
    shared, clusters = modules.MAX_DYNAMIC_SHARED, modules._NON_PORTABLE_CLUSTER
    assert driver.attributes == [(1012, shared, 231424), (1012, clusters, 1), (2012, shared, 231424)]


def test_a_device_that_allows_no_large_clusters_loads_the_kernel_all_the_same(driver: Driver) -> None:
    driver.refused_attribute = modules._NON_PORTABLE_CLUSTER
    assert modules.function(0, "tiny", "tiny_cluster") == 1012


def test_a_device_without_clusters_is_asked_for_none(driver: Driver) -> None:
    assert limits.max_clusters(1, "tiny", "tiny_cluster", 16) == 0
    assert driver.loads == []


def test_threads_load_once(driver: Driver) -> None:
    threads = [threading.Thread(target=modules.function, args=(0, "tiny", "tiny_add")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.loads) == 1


@pytest.mark.parametrize("status", [200, 209, 218, 300])
def test_a_refused_image_gives_way_to_the_next(
    driver: Driver,
    sandbox: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    status: int,
) -> None:
    sandbox.publish(sandbox.prebuilt, "sm_90")
    sandbox.publish(sandbox.prebuilt, "compute_90")
    monkeypatch.setenv("CUPY_MOE_PREBUILT_DIR", str(sandbox.prebuilt))
    driver.refuses = {"sm_90": status}
    assert modules.images(0)[0].sidecar.target == "compute_90"
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert bool(warned) == (status != 209)  # a wrong architecture is what the next candidate is for
    assert all("damaged" in record.getMessage() for record in warned)


def test_when_all_are_refused_the_error_tells_each_reason(driver: Driver, sandbox: Sandbox) -> None:
    sandbox.publish(sandbox.user, "compute_80")
    driver.refuses = {"sm_90": 209, "compute": 222}
    with pytest.raises(KernelLoadError) as caught:
        modules.function(0, "tiny", "tiny_add")
    message = str(caught.value)
    assert message.startswith("device 0 (Imaginary): no image of kernel 'tiny'")
    assert "refused: sm_90 image (compiled, in memory): CUDA_ERROR_209" in message
    assert "needs a driver as new" in message


def test_a_missing_image_names_the_device(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_MOE_DISABLE_JIT", "1")
    with pytest.raises(KernelNotPrebuiltError, match=r"device 1 \(Imaginary\).* 8\.0\n"):
        modules.function(1, "tiny", "tiny_add")


def test_a_missing_entry_is_answered_with_those_there_are(driver: Driver) -> None:
    driver.missing = {"tiny_sub": 500}
    with pytest.raises(KernelLoadError, match=r"'tiny_sub' .* has tiny_add, tiny_cluster, tiny_reverse"):
        modules.function(0, "tiny", "tiny_sub")


def test_a_driver_that_loads_nothing_during_capture_is_explained(driver: Driver) -> None:
    driver.refuses = {"sm_90": 900}
    with pytest.raises(KernelLoadError, match=r"capture .*cupy_moe\.warmup\(\)"):
        modules.function(0, "tiny", "tiny_add")
    driver.refuses, driver.missing = {}, {"tiny_add": 906}
    with pytest.raises(KernelLoadError, match=r"capture .*cupy_moe\.warmup\(\)"):
        modules.function(0, "tiny", "tiny_add")
    driver.missing = {}
    assert modules.function(0, "tiny", "tiny_add")


def test_warmup_loads_everything_and_says_so_in_one_line(
    driver: Driver, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sandbox.publish(sandbox.prebuilt, "sm_90")
    monkeypatch.setenv("CUPY_MOE_PREBUILT_DIR", str(sandbox.prebuilt))
    caplog.set_level(logging.INFO, "cupy_moe")
    assert cupy_moe.warmup() == 3
    assert len(caplog.records) == 1
    assert "3 kernels ready on device 0 in" in caplog.text
    assert "3 from prebuilt sm_90" in caplog.text
    monkeypatch.setattr(lookup, "candidates", lambda *_: pytest.fail("looked up again"))
    assert modules.function(0, "tiny", "tiny_cluster")
    assert cupy_moe.warmup([0]) == 3


def test_without_a_gpu_the_error_is_one_of_ours(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    from cupy_moe._cupy import cupy

    def fail(*_: object) -> None:
        raise Refused(100)

    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", fail)
    with pytest.raises(KernelLoadError, match="no GPU to load kernels on: CUDA_ERROR_100"):
        cupy_moe.warmup()
    monkeypatch.setattr(cupy.cuda, "Device", fail)
    with pytest.raises(KernelLoadError, match="device 7 cannot be used: CUDA_ERROR_100"):
        cupy_moe.warmup([7])


# ---- a real one


def _launch(device: int, entry: str, count: int) -> list[int]:
    """Run a kernel of the small unit on 0, 1, 2, ..."""
    import torch

    from cupy_moe._cupy import cupy

    data = torch.arange(count, dtype=torch.int32, device=f"cuda:{device}")
    modules.function(device, "tiny", entry)
    function = modules._functions[device, "tiny", entry]
    stream = SimpleNamespace(ptr=torch.cuda.current_stream(device).cuda_stream)
    clusters = entry == "tiny_cluster"
    grid, block = ((count, 1, 1), (1, 1, 1)) if clusters else ((1, 1, 1), (count, 1, 1))
    with cupy.cuda.Device(device):
        function(grid, block, (data.data_ptr(),), stream=stream)
    return data.tolist()


@pytest.fixture
def native(fresh: None) -> str:
    return targets.native_targets(modules.capability(0))[0]


@pytest.mark.gpu
def test_a_compiled_kernel_runs(native: str, sandbox: Sandbox) -> None:
    assert _launch(0, "tiny_add", 256) == [value + 3 for value in range(256)]
    assert _launch(0, "tiny_reverse", 256) == list(reversed(range(256)))
    assert modules.images(0)[0].origin == "compiled"
    if modules.capability(0) >= (9, 0):
        assert _launch(0, "tiny_cluster", 16) == [16] * 16


@pytest.mark.gpu
def test_dynamic_shared_memory_is_all_that_is_left(native: str) -> None:
    from cupy_moe._cupy import cupy

    runtime = cupy.cuda.runtime
    limit = runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, 0)
    for entry, static in (("tiny_add", 0), ("tiny_reverse", 1024)):
        pointer = modules.function(0, "tiny", entry)
        assert cupy.cuda.driver.funcGetAttribute(modules.MAX_DYNAMIC_SHARED, pointer) == limit - static


@pytest.mark.gpu
def test_a_prebuilt_kernel_runs_without_nvrtc(
    native: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.publish(sandbox.prebuilt, native)
    monkeypatch.setenv("CUPY_MOE_PREBUILT_DIR", str(sandbox.prebuilt))
    monkeypatch.setenv("CUPY_MOE_DISABLE_JIT", "1")
    monkeypatch.setattr(compiler, "_nvrtc", lambda: pytest.fail("the compiler was loaded"))
    assert _launch(0, "tiny_add", 4) == [3, 4, 5, 6]
    assert modules.images(0)[0].origin == "prebuilt"


@pytest.mark.gpu
def test_every_device_runs(native: str) -> None:
    import torch

    for device in range(torch.cuda.device_count()):
        assert _launch(device, "tiny_add", 4) == [3, 4, 5, 6]
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("damage", ["wrong architecture", "other machine", "zeros", "text"])
def test_the_driver_refuses_and_the_compiler_steps_in(
    native: str,
    sandbox: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    caplog.set_level(logging.INFO, "cupy_moe")
    good = lookup.compile_image(sandbox.unit, native)
    other = "sm_80" if native != "sm_80" else "sm_90"
    bad = {
        "wrong architecture": lookup.compile_image(sandbox.unit, other).data,
        "other machine": good.data[:18] + b"\x3e\x00" + good.data[20:],  # x86
        "zeros": bytes(4096),
        "text": b"no PTX",
    }[damage]
    candidates = lookup.candidates

    def first_a_bad_one(unit: str, capability: tuple[int, int]) -> Iterator[lookup.Image]:
        yield replace(good, data=bad, origin="prebuilt")
        yield from candidates(unit, capability)

    monkeypatch.setattr(lookup, "candidates", first_a_bad_one)
    assert _launch(0, "tiny_add", 4) == [3, 4, 5, 6]
    assert "not using the" in caplog.text
    assert modules.images(0)[0].data == good.data


@pytest.mark.gpu
def test_damage_on_disk_is_compiled_around(
    native: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = sandbox.publish(sandbox.prebuilt, native)
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setenv("CUPY_MOE_PREBUILT_DIR", str(sandbox.prebuilt))
    assert _launch(0, "tiny_add", 4) == [3, 4, 5, 6]
    assert caplog.text.count("WARNING") == 1


@pytest.mark.gpu
def test_without_nvrtc_ptx_runs(native: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    ptx = native.replace("sm_", "compute_")
    sandbox.publish(sandbox.prebuilt, ptx)
    monkeypatch.setenv("CUPY_MOE_PREBUILT_DIR", str(sandbox.prebuilt))
    monkeypatch.setenv("CUPY_MOE_DISABLE_JIT", "1")
    assert _launch(0, "tiny_add", 4) == [3, 4, 5, 6]
    assert modules.images(0)[0].sidecar.target == ptx
    if modules.capability(0) >= (9, 0):
        assert _launch(0, "tiny_cluster", 16) == [16] * 16


@pytest.mark.gpu
def test_with_neither_image_nor_compiler_the_error_names_the_gpu(
    native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setenv("CUPY_MOE_DISABLE_JIT", "1")
    with pytest.raises(KernelNotPrebuiltError) as caught:
        modules.function(0, "tiny", "tiny_add")
    assert torch.cuda.get_device_name(0) in str(caught.value)
    assert f"cupy-moe prebuild --arch {native}" in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("prebuilt", [True, False])
def test_the_first_use_may_be_inside_a_capture(
    native: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, prebuilt: bool
) -> None:
    import torch

    from cupy_moe._cupy import cupy

    if prebuilt:
        sandbox.publish(sandbox.prebuilt, native)
        monkeypatch.setenv("CUPY_MOE_PREBUILT_DIR", str(sandbox.prebuilt))
    data = torch.zeros(4, dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        modules.function(0, "tiny", "tiny_add")
        function = modules._functions[0, "tiny", "tiny_add"]
        stream = SimpleNamespace(ptr=torch.cuda.current_stream().cuda_stream)
        with cupy.cuda.Device(0):
            function((1, 1, 1), (4, 1, 1), (data.data_ptr(),), stream=stream)
    for _ in range(3):
        graph.replay()
    assert data.tolist() == [9, 9, 9, 9]


@pytest.mark.gpu
def test_warmup_readies_every_kernel_from_a_prebuilt_folder(
    everything: Everything, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(modules, "_modules", {})
    monkeypatch.setattr(modules, "_functions", {})
    native = {
        name: targets.native_targets(modules.capability(0), unit.targets)[:1]
        for name, unit in sources.units().items()
    }
    results = [result for result in everything.results if result.target in native[result.unit]]
    target = targets.native_targets(modules.capability(0))[0]
    monkeypatch.setenv("CUPY_MOE_PREBUILT_DIR", str(everything.folder))
    monkeypatch.setenv("CUPY_MOE_DISABLE_JIT", "1")
    caplog.set_level(logging.INFO, "cupy_moe")
    assert cupy_moe.warmup() == sum(len(result.kernels) for result in results)
    assert f"from prebuilt {target}" in caplog.text
    print(caplog.text)


COLD = """
import time; start = time.perf_counter()
import torch; torch.zeros(1, device="cuda"); torch.cuda.synchronize()
ready = time.perf_counter()
from cupy_moe._cupy import cupy
imported = time.perf_counter()
from cupy_moe.cuda import limits, modules
from cupy_moe.images import lookup
modules.function(0, "tiny", "tiny_add")
done = time.perf_counter()
print(f"{modules.images(0)[0].origin} torch+context {(ready - start) * 1e3:.0f} ms,"
      f" import cupy {(imported - ready) * 1e3:.1f} ms, first kernel {(done - imported) * 1e3:.1f} ms")
"""


@pytest.mark.gpu
def test_a_cold_start_from_prebuilt_takes_milliseconds(native: str, tmp_path: Path) -> None:
    checkout = copy_package(tmp_path / "checkout")
    home = {"HOME": str(tmp_path)}
    compiled = run_python(checkout, "-c", COLD, env=home)
    cached = run_python(checkout, "-c", COLD, env=home)
    built = run_python(checkout, "-m", "cupy_moe", "prebuild", "--arch", "native")
    assert built.returncode == 0, built.stderr
    prebuilt = run_python(checkout, "-c", COLD, env={**home, "CUPY_MOE_DISABLE_JIT": "1"})
    for run, origin in ((compiled, "compiled"), (cached, "user"), (prebuilt, "checkout")):
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith(origin), run.stdout
        print(run.stdout.strip(), file=sys.stderr)


@pytest.mark.gpu
def test_doctor_examines_the_gpu(tmp_path: Path) -> None:
    run = run_python(PACKAGE.parent, "-m", "cupy_moe", "doctor", "--gpu", env={"HOME": str(tmp_path)})
    assert run.returncode == 0, run.stdout + run.stderr
    assert "gpu 0: compute capability" in run.stdout
