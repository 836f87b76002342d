"""moe_align_block_size on a GPU: which kernel runs, as planned or as forced."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from align_cases import kernel_of
from align_gpu import check, drawn, half_local, possible

import cupy_moe.operators.align
from cupy_moe import aligned_sizes, moe_align_block_size
from cupy_moe.cuda.launch import Launch
from cupy_moe.cuda.limits import device_limits
from cupy_moe.plans import align as align_plans
from cupy_moe.plans import base

pytestmark = pytest.mark.gpu


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Grows by the name of each kernel that is launched."""
    names: list[str] = []
    bind = cupy_moe.operators.align.bind

    def bind_recorded(planned: base.LaunchPlan, *arguments: Any) -> Launch:
        launch = bind(planned, *arguments)

        def record(*values: int) -> None:
            names.append(planned.entry)
            launch(*values)

        return record

    cupy_moe.operators.align._prepare.cache_clear()
    monkeypatch.setattr(cupy_moe.operators.align, "bind", bind_recorded)
    yield names
    cupy_moe.operators.align._prepare.cache_clear()


def clusters(size: int) -> bool:
    """Whether the driver runs clusters of so many blocks here."""
    limits = device_limits(torch.cuda.current_device())
    return limits.max_clusters("align_shared", f"align_shared_cluster{size}_i32", size) > 0


def test_every_kernel_at_every_threshold() -> None:
    limits = (
        align_plans.SMALL_FAST_IDS,
        align_plans.SMALL_MAX_IDS,
        align_plans.SHARED_FAST_IDS,
        align_plans.CLUSTER8_FAST_IDS,
    )
    sizes = {0, 1, 2, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 100_003}
    sizes |= {limit + step for limit in limits for step in (-1, 0, 1)}
    for num_ids, num_experts in itertools.product(sorted(sizes), (1, 8, 257, 1500)):
        ids = drawn((num_ids,), -1, num_experts + 1)
        check(ids, 16, num_experts, every_kernel=True, runs=2)


def test_the_kernel_that_is_planned_is_the_one_that_runs(launched: list[str]) -> None:
    limits = device_limits(torch.cuda.current_device())
    of_8, of_16 = clusters(8), clusters(16)
    seen = set()
    for bound, below, above in (
        (align_plans.SMALL_FAST_IDS, "small", "shared"),
        (align_plans.SHARED_FAST_IDS, "shared", "cluster8" if of_8 else "shared"),
        (align_plans.CLUSTER8_FAST_IDS, "cluster8" if of_8 else "shared", "cluster16" if of_16 else "global"),
    ):
        for num_ids, expected in ((bound - 1, below), (bound, below), (bound + 1, above)):
            launched.clear()
            moe_align_block_size(drawn((num_ids,), 0, 64), 16, 64)
            assert kernel_of(launched) == expected, f"{num_ids=}"
            seen.add(expected)
            num_slots, _ = aligned_sizes(num_ids, 64, 16)
            planned = align_plans.plan_align(num_ids, 64, num_slots, 16, "i32", limits)
            assert launched == [launch.entry for launch in planned.launches]
    launched.clear()
    moe_align_block_size(drawn((1000,), 0, 65_536), 16, 65_536)
    assert kernel_of(launched) == "global_large"
    assert len(seen) == 3 + of_8


def test_a_forced_kernel_is_the_one_that_runs(launched: list[str]) -> None:
    ids = drawn((100,), 0, 64)
    for kernel in possible(ids, 64):
        launched.clear()
        moe_align_block_size(ids, 16, 64, kernel=kernel)
        assert kernel_of(launched) == kernel
    assert len(possible(ids, 64)) == 4 + clusters(8) + clusters(16)


def test_one_reader_for_each_kind_of_ids(launched: list[str]) -> None:
    ids = drawn((100, 4), 0, 64)
    i32 = {"int32": ids, "uint32": ids.to(torch.uint32)}
    others = {"int16": ids.short(), "transposed": ids.t(), "every second row": ids[::2]}
    cases = [(i32, "i32"), ({"int64": ids.long()}, "i64"), (others, "any")]
    for name, topk_ids, reader in [
        (name, ids, reader) for kind, reader in cases for name, ids in kind.items()
    ]:
        launched.clear()
        moe_align_block_size(topk_ids, 16, 64)
        assert launched[0].endswith(f"_{reader}"), name


def test_a_kernel_that_cannot() -> None:
    with pytest.raises(ValueError, match="kernel='small' takes at most"):
        moe_align_block_size(drawn((align_plans.SMALL_MAX_IDS + 1,), 0, 5), 4, 5, kernel="small")
    with pytest.raises(ValueError, match="kernel: expected one of 'small', "):
        moe_align_block_size(drawn((12,), 0, 5), 4, 5, kernel="fast")


def test_every_kernel() -> None:
    for num_ids, num_experts in ((0, 5), (1, 5), (100, 7), (1500, 300), (9000, 20), (300, 20_000)):
        for dtype, mapped, ignore in (
            (torch.int32, False, False), (torch.int64, True, False), (torch.int16, True, True)
        ):  # fmt: skip
            expert_map = half_local(num_experts, garbage=True) if mapped else None
            ids = drawn((num_ids,), -1, num_experts + 1, dtype)
            for kernel in possible(ids, num_experts, 7):
                moe_align_block_size(ids, 7, num_experts, expert_map, False, ignore, kernel=kernel)
    torch.cuda.synchronize()
