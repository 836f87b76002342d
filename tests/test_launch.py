"""Launching: what a kernel is given, with a driver made up for the purpose, then (gpu) with a real one."""

from __future__ import annotations

import ctypes
import importlib
import math
import pkgutil
import signal
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpus import H200

import cupy_moe
from cupy_moe import _cupy, moe_align_block_size
from cupy_moe.cuda import driver as driver_module
from cupy_moe.cuda import launch, modules, tensor_map
from cupy_moe.cuda.limits import device_limits
from cupy_moe.errors import KernelLaunchError
from cupy_moe.operators import _experts_launches as experts
from cupy_moe.operators import align, align_batched, align_lora, gate, permute, quantize, route, sort
from cupy_moe.operators import moe_sum as moe_sum_operator
from cupy_moe.parallel import messages
from cupy_moe.plans.base import LaunchPlan
from cupy_moe.plans.parallel import MessageLayout
from cupy_moe.quantization import Places, Stored, _check_fits

PLAN = LaunchPlan("tiny", "tiny_add", 3, 64, 128)


class Refused(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"CUDA_ERROR_{status}")
        self.status = status


class Driver:
    """Reads the arguments of each launch as a driver does, from memory."""

    CUDADriverError = Refused

    def __init__(self) -> None:
        self.given: list[tuple[int, ...]] = []
        self.launches: list[tuple[int, ...]] = []
        self.refusals: list[int] = []  # CUresult of the next launches
        self.devices: list[int] = []  # made current

    def launchKernel(self, *arguments: int) -> None:
        if self.refusals:
            raise Refused(self.refusals.pop(0))
        *launch, address, extra = arguments
        assert extra == 0
        self.give(address)
        self.launches.append(tuple(launch))

    def give(self, address: int) -> None:
        (memory,) = (ctypes.c_void_p * 1).from_address(address)
        self.given.append(struct.unpack("@4P2I", ctypes.string_at(memory or 0, 40)))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    runtime = SimpleNamespace(setDevice=driver.devices.append)
    monkeypatch.setattr(_cupy, "cupy", SimpleNamespace(cuda=SimpleNamespace(driver=driver, runtime=runtime)))
    monkeypatch.setattr(modules, "function", lambda device, unit, entry: 4242)
    monkeypatch.setattr(modules, "can_overlap", lambda device, unit: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(launch, "_current_stream", lambda device: 99)
    monkeypatch.setattr(launch, "_pool", [])
    return driver


def bind(*constants: int, device: int = 0) -> Callable[..., None]:
    return launch.bind(PLAN, device, 4, struct.pack("@2I", *constants))


def test_a_launch_is_given_pointers_then_constants(driver: Driver) -> None:
    bind(7, 8)(10, 20, 30, 40)
    assert driver.given == [(10, 20, 30, 40, 7, 8)]
    assert driver.launches == [(4242, 3, 1, 1, 64, 1, 1, 128, 99)]


def test_more_than_four_pointers_come_in_order(driver: Driver) -> None:
    launch.bind(PLAN, 0, 5, struct.pack("@2I", 7, 8))(1, 2, 3, 4, 5)
    (given,) = driver.given
    assert given == (1, 2, 3, 4, 5, 0)  # the fifth where the constants of four are


def test_a_launch_between_packing_and_launching_mixes_nothing(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a signal handler is, which may run between any two steps of a call."""
    first, second = bind(1, 2), bind(3, 4)
    steps = [lambda: second(5, 6, 7, 8), lambda: None]
    monkeypatch.setattr(launch, "_current_stream", lambda device: (steps.pop(0)(), 99)[1])
    first(10, 20, 30, 40)
    assert driver.given == [(5, 6, 7, 8, 3, 4), (10, 20, 30, 40, 1, 2)]


def test_a_call_that_is_interrupted_loses_no_more_than_its_buffer(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(device: int) -> int:
        raise KeyboardInterrupt

    call = bind(1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_current_stream", interrupt)
        with pytest.raises(KeyboardInterrupt):
            call(10, 20, 30, 40)
    for i in range(100):
        call(i, i, i, i)
    assert driver.given == [(i, i, i, i, 1, 2) for i in range(100)]
    assert len(launch._pool) == 1


def test_threads_share_no_arguments(driver: Driver) -> None:
    def work(i: int) -> None:
        call = bind(i, i)
        for _ in range(300):
            call(i, i, i, i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(driver.given) == sorted((i,) * 6 for i in range(8) for _ in range(300))


def test_a_thread_without_a_context_gets_one(driver: Driver) -> None:
    driver.refusals = [driver_module.INVALID_CONTEXT]
    bind(1, 2, device=3)(10, 20, 30, 40)
    assert driver.devices == [3]
    assert driver.given == [(10, 20, 30, 40, 1, 2)]


def test_a_refused_launch_names_the_kernel(driver: Driver) -> None:
    driver.refusals = [912]
    with pytest.raises(KernelLaunchError, match="tiny/tiny_add on device 2, 3 blocks: CUDA_ERROR_912"):
        bind(1, 2, device=2)(10, 20, 30, 40)
    assert driver.given == []
    assert driver.devices == []


def caches() -> list[Any]:
    """What remembers results of functions of the package."""
    modules = pkgutil.walk_packages(cupy_moe.__path__, "cupy_moe.")
    names = [found.name for found in modules if not found.name.endswith("__main__")]
    values = [value for name in names for value in vars(importlib.import_module(name)).values()]
    kept = {id(value): value for value in values if hasattr(value, "cache_info")}
    return [cache for cache in kept.values() if cache.__module__.startswith("cupy_moe")]


def test_what_is_remembered_without_a_bound_is_of_few_kinds() -> None:
    unbounded = {
        f"{cache.__module__.removeprefix('cupy_moe.')}.{cache.__name__}"
        for cache in caches()
        if cache.cache_info().maxsize is None
    }
    assert unbounded == {
        "cuda.driver.driver_function",  # three
        "cuda.launch._layout",  # some for each argument struct
        "cuda.limits.device_limits",  # one for each device
        "images.compiler._load",
        "images.compiler.installed_nvrtc",
        "images.sources._package",
        "images.sources._paths",
        "images.sources._read_header",  # those of kernels_cu
        "images.sources._read_unit",
    }


def test_all_that_is_remembered_of_calls_takes_less_than_40_mb(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As README.md says; of several devices, and of kernels in several launches, it is the most."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    launching = align, gate, moe_sum_operator, experts, quantize, sort, permute, align_lora, route, messages
    for module in launching:
        monkeypatch.setattr(module, "device_limits", lambda device: H200)
    monkeypatch.setattr(tensor_map, "driver_function", lambda name: lambda *arguments: 0)
    cuda = torch.device("cuda", 0)
    bf16, fp32 = torch.bfloat16, torch.float32
    layout = MessageLayout(8192, 8, 28)

    def prepare(i: int) -> None:
        align._prepare(6000 + 8 * i, 16, 256, False, torch.int32, None, 0, 0, None)
        align_batched._prepare(8, i, 16, cuda)
        options = gate.GateOptions(8, True, "softmax", routed_scaling_factor=1.0 + i)
        gate._prepare(i, 256, 256, fp32, cuda, True, options, False, torch.int32, None)
        route._prepare(i, 256, 256, fp32, cuda, True, options, False, False, torch.int32, 16, True, 0, None)
        rows = (i, 8, 4096), (32768, 4096, 1), (4096, 1), fp32
        moe_sum_operator._prepare(*rows, cuda, True, False, 1.0, None, 2**31, False, None)
        quantized = quantize.QuantizeOptions(128, False, 1e-10, False, False, 1)
        quantize._prepare((i, 7168), 7168, (56, 1), i, bf16, cuda, True, quantized)
        strides = 2048, 1536 * 2048, 2048, 2048 * 768, 768
        sizes = 100 + i, 8, 128, 2048, 768, strides, bf16
        places = (
            Places(fp32, cuda, (128, i, 16), (16 * i, 16, 1)),
            Places(fp32, cuda, (128, 16, 6), (96, 6, 1)),
        )
        stored = Stored("fp8", places, (None, None), 128, 128)
        given = "silu", torch.int32, 128, False, (1.0, 0.0, math.inf), None, stored
        experts.prepare_experts(*sizes, cuda, *given)
        moved = permute._Sizes(
            num_tokens=6000 + i, hidden=7168, row_stride=7168, element_bytes=2, topk=8, block_size=1,
            num_experts=256, num_slots=8 * (6000 + i), num_blocks=8 * (6000 + i), maps=False, offset_bytes=4,
            fills_tail=True, num_scales=56, scale_bytes=4, scale_strides=(56, 1),
            moved_scale_strides=(56, 1),
        )  # fmt: skip
        permute._prepare(moved, torch.int32, None, cuda, True, None)  # which sorts, too
        adapted = align_lora._Sizes(6000 + 8 * i, 8, 16, 256, 4, False, False, 4)
        align_lora._prepare(adapted, torch.int32, None, cuda, None)
        messages._prepare_route(8 * i, 8, 1, (256, 4), 64, 8, 0, True, cuda)
        messages._prepare_pack(layout, (i, 8), 8192, 64, 8, 0, True, None, 0, cuda)
        messages._prepare_expand(layout, i, 8, 8 * i, None, 0, cuda)
        messages._prepare_push(i, 8192, i, 8, 8, 0, cuda)
        messages._prepare_sync(8, 0, i, cuda)
        for j in range(4):  # of which more are remembered
            hidden = 128 * (4 * i + j)
            tensor_map.tensor_map(
                4096 * hidden, "bf16", (hidden, 8, 96, 1, 128), (2048,) * 4, (64, 8, 16, 1, 1)
            )
            of_w1 = Places(fp32, cuda, (8, 2, hidden // 128), (1, 1, 1))
            scales = of_w1, of_w1._replace(shape=(8, hidden // 128, 1))
            _check_fits(Stored("fp8", scales, (None, None), 128, 128), 8, hidden, 128, True, cuda)

    bounded = [cache for cache in caches() if cache.cache_info().maxsize is not None]
    for cache in bounded:
        cache.cache_clear()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for i in range(1, launch.CACHED_CALLS + 1):
        prepare(i)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    not_full = [cache for cache in bounded if cache.cache_info().currsize < cache.cache_info().maxsize]
    for cache in bounded:
        cache.cache_clear()
    assert not_full == []
    print(f"{(after - before) / 1e6:.1f} MB")
    assert 2e6 < after - before < 40e6


# ---- launches that overlap


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h, with the one of its values that is used."""

    _fields_ = (("id", ctypes.c_uint), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


PROGRAMMATIC_STREAM_SERIALIZATION = 6  # of CUlaunchAttributeID
OVERLAPPING = PLAN._replace(overlaps=True)


class Library:
    """What of libcuda is called by its address, and reads what it is given as C does."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.launches: list[tuple[int, bytes, bytes]] = []  # function, configuration, attributes
        self.cuLaunchKernelEx = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(self.launch)

    def launch(self, config: int, function: int, pointers: int, extra: int | None) -> int:
        if self.driver.refusals:
            return self.driver.refusals.pop(0)
        described = LaunchConfig.from_address(config)
        size = described.num_attributes * ctypes.sizeof(LaunchAttribute)
        attributes = ctypes.string_at(described.attributes or 0, size)
        described = LaunchConfig.from_buffer_copy(described)
        described.attributes = None  # which lie anywhere
        self.launches.append((function, bytes(described), attributes))
        assert extra is None
        self.driver.give(pointers)
        return 0


@pytest.fixture
def library(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    library = Library(driver)
    libraries = {"libcuda.so.1": library}
    monkeypatch.setattr(
        driver_module, "ctypes", SimpleNamespace(**{**vars(ctypes), "CDLL": libraries.__getitem__})
    )
    monkeypatch.setattr(modules, "can_overlap", lambda device, unit: (device, unit) != (1, "tiny"))
    driver_module.driver_function.cache_clear()
    yield library
    driver_module.driver_function.cache_clear()


def overlapping(device: int = 0) -> Callable[..., None]:
    return launch.bind(OVERLAPPING, device, 4, struct.pack("@2I", 7, 8))


def test_a_launch_that_overlaps_is_described_byte_for_byte(library: Library) -> None:
    assert (ctypes.sizeof(LaunchConfig), ctypes.sizeof(LaunchAttribute)) == (56, 72)
    overlapping()(10, 20, 30, 40)
    config = LaunchConfig((3, 1, 1), (64, 1, 1), 128, 99, None, 1)
    attribute = LaunchAttribute(PROGRAMMATIC_STREAM_SERIALIZATION, b"", (1,))
    assert library.launches == [(4242, bytes(config), bytes(attribute))]
    assert library.driver.given == [(10, 20, 30, 40, 7, 8)]
    assert library.driver.launches == []


def test_only_plans_and_devices_that_can_overlap(library: Library) -> None:
    overlapping(device=1)(10, 20, 30, 40)
    bind(7, 8)(10, 20, 30, 40)
    assert library.launches == []
    assert [launched[0] for launched in library.driver.launches] == [4242, 4242]


@pytest.mark.parametrize(
    ("capability", "target", "cuda", "can"),
    [
        ((9, 0), "sm_90", 12_030, True),
        ((9, 0), "sm_90", 12_020, False),  # graphs cannot capture it
        ((9, 0), "sm_90a", 13_000, True),
        ((12, 1), "compute_90", 12_090, True),
        ((10, 0), "compute_80", 12_080, False),  # compiled without a wait
        ((8, 9), "sm_89", 13_000, False),
        ((7, 5), "sm_75", 13_000, False),
    ],
)
def test_what_can_overlap(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], target: str, cuda: int, can: bool
) -> None:
    runtime = SimpleNamespace(driverGetVersion=lambda: cuda)
    monkeypatch.setattr(_cupy, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    loaded = None, SimpleNamespace(sidecar=SimpleNamespace(target=target))
    monkeypatch.setattr(modules, "capability", lambda device: capability)
    monkeypatch.setattr(modules, "_load", lambda device, unit: loaded)
    assert modules.can_overlap(0, "tiny") == can


def test_a_refused_launch_that_overlaps_names_the_kernel(library: Library) -> None:
    library.driver.refusals = [912]
    with pytest.raises(KernelLaunchError, match="tiny/tiny_add on device 2, 3 blocks: CUDA_ERROR_912"):
        overlapping(device=2)(10, 20, 30, 40)
    assert library.launches == []


def test_a_launch_that_overlaps_gets_a_context_too(library: Library) -> None:
    library.driver.refusals = [driver_module.INVALID_CONTEXT]
    overlapping(device=3)(10, 20, 30, 40)
    assert library.driver.devices == [3]
    assert library.driver.given == [(10, 20, 30, 40, 7, 8)]


# ---- a real one


@pytest.fixture
def ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-1, 65, (60_000,), generator=generator, dtype=torch.int32)


def equal(results: Any, expected: Any) -> bool:
    return all(torch.equal(result.cpu(), want) for result, want in zip(results, expected, strict=True))


@pytest.mark.gpu
def test_the_first_call_of_a_thread_needs_no_context(ids: torch.Tensor) -> None:
    expected, on_gpu = moe_align_block_size(ids, 64, 64), ids.cuda()
    out = moe_align_block_size(on_gpu, 64, 64)
    torch.cuda.synchronize()
    for result in out:
        result.fill_(-77)
    torch.cuda.synchronize()
    errors: list[BaseException] = []

    def work() -> None:  # nothing else of CUDA before it
        try:
            moe_align_block_size(on_gpu, 64, 64, out=out)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    torch.cuda.synchronize()
    assert equal(out, expected)


@pytest.mark.gpu
def test_a_signal_handler_may_launch_at_any_time(ids: torch.Tensor) -> None:
    """Interrupted every 0.2 ms by a handler that calls the same operator."""
    small, large = ids[:500].cuda(), ids[:20_000].cuda()
    expected = [moe_align_block_size(x.cpu(), 16, 64) for x in (small, large)]
    results: list[tuple[int, Any]] = []

    def handler(*_: object) -> None:
        if len(results) < 4000:
            results.append((0, moe_align_block_size(small, 16, 64)))

    handler()
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 2e-4, 2e-4)
    try:
        for _ in range(3000):
            results.append((1, moe_align_block_size(large, 16, 64)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert sum(which == 0 for which, _ in results) > 10
    for which, result in results[::7]:
        assert equal(result, expected[which])


@pytest.fixture
def clusters() -> None:
    limits = device_limits(torch.cuda.current_device())
    if not limits.max_clusters("align_shared", "align_shared_cluster16_i32", 16):
        pytest.skip("this GPU runs no clusters of 16 blocks")


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch, clusters: None) -> Iterator[list[str]]:
    """A driver that refuses clusters at launch; the kernels that were launched."""
    launched: list[str] = []
    real_bind = align.bind

    def bind(plan: LaunchPlan, *arguments: Any) -> Callable[..., None]:
        real = real_bind(plan, *arguments)

        def call(*pointers: int) -> None:
            launched.append(plan.entry)
            if "cluster" in plan.entry:
                raise KernelLaunchError("no room for clusters")
            real(*pointers)

        return call

    monkeypatch.setattr(align, "bind", bind)
    align._prepare.cache_clear()
    yield launched
    align._prepare.cache_clear()


@pytest.mark.gpu
def test_where_the_driver_refuses_clusters_others_step_in(ids: torch.Tensor, refusing: list[str]) -> None:
    for count, fallback in (
        (20_000, "align_shared_i32"),
        (60_000, "align_count_i32"),
    ):
        for _ in range(2):
            refusing.clear()
            result = moe_align_block_size(ids[:count].cuda(), 64, 64)
            assert equal(result, moe_align_block_size(ids[:count], 64, 64))
            assert "cluster" in refusing[0]
            assert refusing[1] == fallback
    with pytest.raises(KernelLaunchError, match="no room"):
        moe_align_block_size(ids.cuda(), 64, 64, kernel="cluster16")


@pytest.mark.gpu
def test_in_a_green_context_too_small_for_clusters(ids: torch.Tensor, clusters: None) -> None:
    if not hasattr(torch.cuda, "GreenContext"):
        pytest.skip("this torch has no green contexts")
    on_gpu, expected = ids.cuda(), moe_align_block_size(ids, 64, 64)
    torch.cuda.synchronize()
    context: Any = torch.cuda.GreenContext.create(num_sms=8, device_id=0)
    context.set_context()
    try:
        results = moe_align_block_size(on_gpu, 64, 64)
        torch.cuda.synchronize()
    finally:
        context.pop_context()
    assert equal(results, expected)
