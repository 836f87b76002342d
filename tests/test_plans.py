"""What cupy_moe/plans decides, for GPUs that nobody here needs to have."""

from __future__ import annotations

import re
from bisect import bisect_left
from pathlib import Path

import pytest
from cache_helpers import Everything
from gpus import A100, B200, GPUS, H20, H200, H200_SLICE, RTX4090, RTX5090, T4, TARGETS
from hypothesis import example, given
from hypothesis import strategies as st

from cupy_moe import plans
from cupy_moe.plans import align as align_plans
from cupy_moe.plans import base
from cupy_moe.plans.align import ALIGN_KERNELS, AlignPlan, aligned_sizes, plan_align
from cupy_moe.plans.base import DeviceLimits, divisor
from cupy_moe.values import INT32_MAX

EXPERTS = (1, 2, 8, 31, 64, 257, 1023, 1024, 1025, 4096, 8192, 9000, 20_000, 65_535, 65_536)
IDS = (0, 1, 31, 33, 127, 128, 129, 1023, 1025, 8191, 8193, 16_385, 65_537, 1_000_003)


def make(
    num_ids: int,
    num_experts: int,
    limits: DeviceLimits,
    *,
    block_size: int = 64,
    reader: str = "i32",
    kernel: str | None = None,
) -> AlignPlan:
    num_slots, _ = aligned_sizes(num_ids, num_experts, block_size)
    return plan_align(num_ids, num_experts, num_slots, block_size, reader, limits, kernel)


def is_possible(
    kernel: str, num_ids: int, num_experts: int, limits: DeviceLimits, reader: str = "i32"
) -> bool:
    try:
        make(num_ids, num_experts, limits, reader=reader, kernel=kernel)
    except ValueError:
        return False
    return True


THRESHOLDS = (
    align_plans.SMALL_FAST_IDS,
    align_plans.SHARED_FAST_IDS,
    align_plans.CLUSTER8_FAST_IDS,
    16 * align_plans.CHUNK_MAX_IDS,
)


def chosen_by_ids(num_ids: int, limits: DeviceLimits) -> str:
    """The choice as the constants of plans/align.py tell it, for few experts."""
    of_8, of_16 = (
        limits.max_clusters("align_shared", f"align_shared_cluster{size}_i32", size) for size in (8, 16)
    )
    if num_ids <= align_plans.SMALL_FAST_IDS:
        return "small"
    if num_ids <= align_plans.SHARED_FAST_IDS:
        return "shared"
    if num_ids <= align_plans.CLUSTER8_FAST_IDS:
        return "cluster8" if of_8 else "shared"
    return "cluster16" if of_16 and num_ids <= 16 * align_plans.CHUNK_MAX_IDS else "global"


@pytest.mark.parametrize("gpu", ["A100", "H200", "B200"])
def test_kernel_at_each_threshold(gpu: str) -> None:
    limits = GPUS[gpu]
    assert sorted(THRESHOLDS) == list(THRESHOLDS)
    for threshold in THRESHOLDS:
        for num_ids in (threshold - 1, threshold, threshold + 1):
            assert make(num_ids, 64, limits).kernel == chosen_by_ids(num_ids, limits), f"{num_ids=}"


def test_each_threshold_changes_the_kernel() -> None:
    def around(limits: DeviceLimits) -> list[str]:
        return [make(threshold + step, 64, limits).kernel for threshold in THRESHOLDS for step in (0, 1)]

    changes = "small shared shared cluster8 cluster8 cluster16 cluster16 global"
    assert around(H200) == around(B200) == changes.split()
    changes = "small shared shared shared shared global global global"
    assert around(A100) == changes.split()
    assert around(T4)[:6] == around(RTX4090)[:6] == changes.split()[:6]


@pytest.mark.parametrize("gpu", GPUS)
def test_few_experts_never_take_the_kernel_for_many(gpu: str) -> None:
    for num_ids in (500_000, 1_000_000, 2_000_000, 10_000_000):
        assert make(num_ids, 64, GPUS[gpu]).kernel != "global_large", f"{num_ids=}"


def test_ids_of_another_type_take_no_clusters() -> None:
    for num_ids in IDS:
        kernel = make(num_ids, 64, H200, reader="any").kernel
        assert kernel == make(num_ids, 64, A100, reader="any").kernel, f"{num_ids=}"
    with pytest.raises(ValueError, match="kernel='cluster8' takes contiguous int32 or int64 ids"):
        make(20_000, 64, H200, reader="any", kernel="cluster8")


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("num_ids", [1000, 200_000])
def test_more_experts_than_shared_memory_has_room_for(gpu: str, num_ids: int) -> None:
    limits = GPUS[gpu]
    most = bisect_left(
        range(1, base.MAX_EXPERTS), True, key=lambda e: make(num_ids, e, limits).kernel == "global_large"
    )
    assert 1024 <= most < base.MAX_EXPERTS  # vLLM stops at 992
    for num_experts in (most - 1, most):
        assert make(num_ids, num_experts, limits).kernel != "global_large", f"{num_experts=}"
    for num_experts in (most + 1, base.MAX_EXPERTS):
        assert make(num_ids, num_experts, limits).kernel == "global_large", f"{num_experts=}"
    assert make(align_plans.SMALL_MAX_IDS, base.MAX_EXPERTS, limits).kernel == "small"
    assert make(align_plans.SMALL_MAX_IDS + 1, base.MAX_EXPERTS, limits).kernel == "global_large"


@pytest.mark.parametrize("gpu", GPUS)
def test_every_plan_can_be_launched(gpu: str) -> None:
    limits = GPUS[gpu]
    count = 0
    for num_experts in EXPERTS:
        for num_ids in IDS:
            for block_size in (1, 16, 128):
                for kernel in (None, *ALIGN_KERNELS):
                    if kernel is None or is_possible(kernel, num_ids, num_experts, limits):
                        planned = make(num_ids, num_experts, limits, block_size=block_size, kernel=kernel)
                        case = f"{gpu=} {num_ids=} {num_experts=} {block_size=} {kernel=} {planned}"
                        assert kernel in (None, planned.kernel), case
                        check(planned, num_ids, num_experts, block_size, limits, case)
                        count += 1
    assert count > 3 * len(EXPERTS) * len(IDS) * 3


def check(
    planned: AlignPlan, num_ids: int, num_experts: int, block_size: int, limits: DeviceLimits, case: str
) -> None:
    kernel, chosen = planned.kernel, planned.arguments
    for launch in planned.launches:
        assert launch.grid >= 1, case
        assert launch.block % 32 == 0, case
        assert 32 <= launch.block <= 1024, case
        assert 0 <= launch.shared_bytes <= limits.shared_bytes - align_plans.STATIC_SHARED, case
    if kernel == "small":
        (launch,) = planned.launches
        num_slots, _ = aligned_sizes(num_ids, num_experts, block_size)
        assert launch.grid * chosen["slots_per_block"] >= num_slots, case
        assert chosen["slots_per_block"] % block_size == 0, case
        assert (num_ids + 1) * chosen["lanes_per_id"] <= launch.block, case
        return
    # Every id belongs to a block, and in it to a warp.
    per_block, num_rows, per_row = chosen["per_block"], chosen["num_rows"], chosen["per_row"][0]
    assert all(launch.grid * per_block >= num_ids for launch in planned.launches), case
    assert per_block % 32 == 0, case
    assert 1 <= num_rows <= planned.launches[-1].block // 32, case
    assert num_rows * per_row >= per_block, case
    if kernel.startswith("cluster"):
        (launch,) = planned.launches
        grid, cluster = launch.grid, int(kernel.removeprefix("cluster"))
        assert grid % cluster == 0, case
        # Each waits for the others of its cluster, so all of them had better run at once.
        assert grid // cluster <= limits.max_clusters(launch.unit, launch.entry, cluster), case
        assert grid // cluster * per_block < 2**16, case  # ids that one block counts, in 16 bits
    if kernel in ("cluster16", "global"):  # sort the ids of a piece, whose numbers in it have 16 bits
        assert per_block <= 2**16, case
        assert planned.launches[-1].shared_bytes >= 4 * per_block, case
    if kernel.startswith("global"):
        count, scatter = planned.launches
        assert count.grid == scatter.grid, case
        assert planned.scratch_words >= count.grid * num_experts, case
    else:
        assert len(planned.launches) == 1, case
        assert planned.scratch_words == 0, case


def test_clusters_only_where_the_driver_says_they_run() -> None:
    for limits in (T4, A100, RTX4090):
        for num_ids in IDS:
            assert not make(num_ids, 64, limits).kernel.startswith("cluster"), f"{limits} {num_ids=}"
        for size in (8, 16):
            with pytest.raises(ValueError, match=f"'cluster{size}' .* runs no cluster of {size}"):
                make(10_000, 64, limits, kernel=f"cluster{size}")
    for limits in (H20, H200_SLICE, RTX5090):
        assert make(10_000, 64, limits).kernel == "cluster8", limits
        assert make(100_000, 64, limits).kernel == "global", limits
        with pytest.raises(ValueError, match=r"'cluster16' .* runs no cluster of 16 blocks"):
            make(10_000, 64, limits, kernel="cluster16")
    assert make(10_000, 64, H200_SLICE).launches[0].grid == 8
    assert make(10_000, 64, H200).launches[0].grid > 8


def test_few_ids_ask_the_driver_for_nothing() -> None:
    limits = H200._replace(max_clusters=lambda *_: pytest.fail("a kernel was loaded to ask"))
    assert make(align_plans.SHARED_FAST_IDS, 64, limits).kernel == "shared"


def test_forced_kernels_that_cannot() -> None:
    with pytest.raises(
        ValueError, match=rf"at most {align_plans.SMALL_MAX_IDS} ids, got {align_plans.SMALL_MAX_IDS + 1}"
    ):
        make(align_plans.SMALL_MAX_IDS + 1, 64, H200, kernel="small")
    for kernel in ("shared", "cluster8", "cluster16", "global"):
        with pytest.raises(ValueError, match=r"65536 experts .*kernel='global_large'"):
            make(1000, 65_536, H200, kernel=kernel)
    for cluster in (8, 16):
        make(cluster * align_plans.CHUNK_MAX_IDS, 64, H200, kernel=f"cluster{cluster}")
        with pytest.raises(ValueError, match=f"kernel='cluster{cluster}' counts at most"):
            make(cluster * align_plans.CHUNK_MAX_IDS + 1, 64, H200, kernel=f"cluster{cluster}")


@pytest.mark.parametrize("gpu", GPUS)
def test_more_blocks_for_more_ids_than_can_be_sorted(gpu: str) -> None:
    limits = GPUS[gpu]
    per_block = limits.shared_bytes // 8
    most_at_once = align_plans.GLOBAL_FAST_BLOCKS * per_block
    for num_ids in (most_at_once - 1, most_at_once, most_at_once + 1, 10_000_000):
        planned = make(num_ids, 64, limits, kernel="global")
        blocks = max(min(align_plans.GLOBAL_FAST_BLOCKS, limits.num_sms), -(-num_ids // per_block))
        assert planned.launches[0].grid == planned.launches[1].grid == blocks, f"{num_ids=}"
        check(planned, num_ids, 64, 128, limits, f"{num_ids=}")
    most = align_plans.GLOBAL_MAX_BLOCKS * per_block
    for num_ids in (most - 1, most):
        assert make(num_ids, 64, limits).kernel == "global", f"{num_ids=}"
    assert make(most + 1, 64, limits).kernel == "global_large"
    with pytest.raises(
        ValueError, match=f"kernel='global' would need {align_plans.GLOBAL_MAX_BLOCKS + 1} blocks"
    ):
        make(most + 1, 64, limits, kernel="global")


def test_global_large_can_do_everything() -> None:
    for limits in GPUS.values():
        for num_experts in EXPERTS:
            assert all(is_possible("global_large", n, num_experts, limits) for n in IDS)


def test_readers_are_entry_points() -> None:
    for kernel in ALIGN_KERNELS:
        for reader in ("i32", "i64", "any"):
            if is_possible(kernel, 100, 8, H200, reader):
                name = "any" if kernel == "global_large" else reader
                launches = make(100, 8, H200, reader=reader, kernel=kernel).launches
                assert all(launch.entry.endswith(f"_{name}") for launch in launches)


@pytest.mark.parametrize("gpu", GPUS)
def test_the_image_for_a_gpu_has_what_is_planned_for_it(gpu: str, everything: Everything) -> None:
    limits = GPUS[gpu]
    target = TARGETS[gpu]
    built = {result.unit: result.kernels for result in everything.results if result.target == target}
    if not built:
        pytest.skip(f"this NVRTC does not know {target}")
    for kernel in ALIGN_KERNELS:
        for num_experts in (8, 2048, 65_536):
            for reader in ("i32", "i64", "any"):
                if is_possible(kernel, 100, num_experts, limits, reader):
                    for launch in make(100, num_experts, limits, reader=reader, kernel=kernel).launches:
                        assert launch.entry in built[launch.unit], f"{target}: {launch}"
                        static = built[launch.unit][launch.entry]["smem"]
                        assert launch.shared_bytes + static <= limits.shared_bytes, f"{launch} and {static=}"


@given(st.integers(0, 2**31 - 1), st.integers(1, align_plans.MAX_BLOCK_SIZE))
@example(INT32_MAX, 1)
@example(INT32_MAX, 3)
@example(INT32_MAX, align_plans.MAX_BLOCK_SIZE)
@example(INT32_MAX - 1, align_plans.MAX_BLOCK_SIZE - 1)
def test_divisor_is_exact(x: int, d: int) -> None:
    value, magic, shift = divisor(d)
    assert value == d
    assert max(magic, shift) < 2**32
    assert (((x << 1) % 2**32) * magic >> 32) >> shift == x // d  # as Divisor in common.cuh does it


@given(st.integers(1, align_plans.MAX_BLOCK_SIZE), st.integers(0, 2**31 // align_plans.MAX_BLOCK_SIZE))
def test_divisor_is_exact_where_quotients_change(d: int, multiple: int) -> None:
    for x in (multiple * d - 1, multiple * d, multiple * d + 1):
        if 0 <= x <= INT32_MAX:
            _, magic, shift = divisor(d)
            assert (((x << 1) % 2**32) * magic >> 32) >> shift == x // d, f"{x=}"


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.data())
def test_sizes_hold_any_routing(
    n: int, num_experts: int, block_size: int, pad: bool, data: st.DataObject
) -> None:
    num_slots, num_blocks = aligned_sizes(n, num_experts, block_size, pad)
    assert num_blocks == -(-num_slots // block_size)
    used = data.draw(st.lists(st.integers(0, num_experts - 1), min_size=n, max_size=n))
    post_pad = sum(-(-used.count(e) // block_size) * block_size for e in range(num_experts))
    assert post_pad <= num_slots
    if n >= num_experts:  # and some routing needs all but a block of it
        worst = (num_experts - 1) * block_size + -(-(n - num_experts + 1) // block_size) * block_size
        assert worst <= num_slots < worst + num_experts * block_size + 2 * block_size


def test_sizes_by_hand() -> None:
    assert aligned_sizes(12, 5, 4) == (27, 7)
    assert aligned_sizes(12, 5, 4, True) == (28, 7)
    assert aligned_sizes(3, 5, 4) == (12, 3)  # fewer ids than experts: a block an id
    assert aligned_sizes(4, 5, 2) == (8, 4)
    assert aligned_sizes(4, 5, 2, True) == (8, 4)
    assert aligned_sizes(5, 5, 2) == (10, 5)
    assert aligned_sizes(0, 5, 4, True) == (0, 0)
    assert aligned_sizes(7, 1, 1) == (7, 7)


def test_sizes_beyond_int32() -> None:
    assert aligned_sizes(INT32_MAX, 1, 1) == (INT32_MAX, INT32_MAX)
    assert aligned_sizes(32_767, 65_536, 65_536) == (32_767 * 65_536, 32_767)
    for arguments in (
        (INT32_MAX + 1, 1, 1),
        (32_768, 65_536, 65_536),
        (65_536, 65_536, 65_536),
        (INT32_MAX, 2, 2),
    ):
        with pytest.raises(ValueError, match=r"need \d+ slots, more than int32 can number \(2147483647\)"):
            aligned_sizes(*arguments)


def test_plans_are_pure() -> None:
    for path in Path(plans.__file__).parent.glob("*.py"):
        assert not re.search(r"import (torch|cupy|os|numpy)\b", path.read_text()), path
