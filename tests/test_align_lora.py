"""moe_lora_align_block_size: against an alignment of each adapter, by example; in the
emulator and on a GPU."""

from __future__ import annotations

import itertools
from typing import Any

import emulator
import gpus
import numpy as np
import pytest
import routing
import torch
from cache_helpers import Everything
from emulator import Emulator, cases
from hypothesis import given
from hypothesis import strategies as st
from operator_cases import IDS, MAP, Case

from cupy_moe import aligned_sizes, moe_align_block_size, moe_lora_align_block_size
from cupy_moe.images import targets
from cupy_moe.plans.align import (
    ALIGN_KERNELS,
    CLUSTER8_FAST_IDS,
    SHARED_FAST_IDS,
    SMALL_FAST_IDS,
    plan_align,
)

ADAPTERS = torch.tensor([1, 0, 1, -1, 2], dtype=torch.int32)
ENABLED = torch.tensor([1, 1, 0, 5], dtype=torch.int32)
CASES = {
    "align_lora": Case(
        moe_lora_align_block_size,
        {
            "topk_ids": IDS, "token_lora_mapping": ADAPTERS, "block_size": 4, "num_experts": 8,
            "max_loras": 3, "adapter_enabled": ENABLED, "expert_map": MAP, "pad_sorted_ids": False,
        },
    ),
}  # fmt: skip
GUARD = 0x3C3C3C3C


@given(st.data())
def test_each_adapter_has_the_alignment_of_its_tokens(data: Any) -> None:
    topk, num_experts, max_loras = (data.draw(st.integers(1, most)) for most in (3, 6, 4))
    rows = st.lists(st.integers(-2, 8), min_size=topk, max_size=topk)
    ids = data.draw(st.lists(rows, max_size=12))
    adapters = data.draw(st.lists(st.integers(-2, 6), min_size=len(ids), max_size=len(ids)))
    block_size, pads = data.draw(st.sampled_from([1, 2, 3, 16])), data.draw(st.booleans())
    enabled = data.draw(st.none() | st.lists(st.booleans(), min_size=max_loras, max_size=max_loras + 1))
    topk_ids = torch.tensor(ids, dtype=torch.int32).view(-1, topk)
    result = moe_lora_align_block_size(
        topk_ids, torch.tensor(adapters, dtype=torch.int32), block_size, num_experts, max_loras,
        None if enabled is None else torch.tensor(enabled), None, pads,
    )  # fmt: skip
    num_slots, num_blocks = aligned_sizes(topk_ids.numel(), num_experts, block_size, pads)
    assert result.sorted_token_ids.shape == (max_loras, num_slots)
    assert result.expert_ids.shape == (max_loras, num_blocks)
    for adapter in range(max_loras):
        runs = enabled is None or enabled[adapter]
        its = [row if a == adapter and runs else [-1] * topk for row, a in zip(ids, adapters, strict=True)]
        flat = torch.tensor(its, dtype=torch.int32).view(-1, topk)
        expected = moe_align_block_size(flat, block_size, num_experts, None, pads)
        for of_all, of_one in zip(result, expected, strict=True):
            assert torch.equal(of_all[adapter].view(-1), of_one)


def test_skipped_adapters_are_written_all_the_same() -> None:
    right = moe_lora_align_block_size(IDS, ADAPTERS, 4, 8, 4, ENABLED)
    assert right.num_tokens_post_pad.tolist()[2:] == [0, 0]  # not enabled, and without tokens
    assert (right.sorted_token_ids[2:] == IDS.numel()).all()
    assert (right.expert_ids[2:] == -1).all()
    out: Any = tuple(torch.full_like(tensor, GUARD) for tensor in right)
    result = moe_lora_align_block_size(IDS, ADAPTERS, 4, 8, 4, ENABLED, out=out)
    for got, given_, expected in zip(result, out, right, strict=True):
        assert got is given_
        assert torch.equal(got, expected)


def test_a_map_drops_pairs_of_other_ranks() -> None:
    mapped = moe_lora_align_block_size(IDS, ADAPTERS, 2, 8, 3, expert_map=MAP)
    local = torch.where((MAP >= 0) & (MAP < 8), MAP, -1)
    ids = torch.where((IDS >= 0) & (IDS < 8), local[IDS.clamp(0, 7).long()], -1)
    expected = moe_lora_align_block_size(ids, ADAPTERS, 2, 8, 3)
    assert all(torch.equal(a, b) for a, b in zip(mapped, expected, strict=True))


def test_arrays_of_numpy() -> None:
    result: Any = moe_lora_align_block_size(IDS.numpy(), ADAPTERS.numpy(), 4, 8, 3)
    expected = moe_lora_align_block_size(IDS, ADAPTERS, 4, 8, 3)
    for array, tensor in zip(result, expected, strict=True):
        assert isinstance(array, np.ndarray)
        assert (array == tensor.numpy()).all()


# ---- plans


@pytest.mark.parametrize("name", gpus.GPUS)
def test_teams_share_the_device(name: str) -> None:
    limits = gpus.GPUS[name]
    for num_ids, teams, kernel in itertools.product(
        (8, 500, 40_000, 100_000), (1, 2, 4, 9, 40), (None, *ALIGN_KERNELS)
    ):
        sizes = num_ids, 64, aligned_sizes(num_ids, 64, 16)[0], 16, "i32"
        try:
            plan = plan_align(*sizes, limits, kernel, "lora", teams)
        except ValueError:
            continue
        for launch in plan.launches:
            assert launch.entry.startswith("lora_")
            assert launch.unit == "align_lora"
            assert launch.grid % (teams * plan.cluster) == 0
            in_turn = teams * plan.cluster * (plan.cluster > 1)
            if plan.kernel in ("shared", "cluster8", "cluster16"):
                assert launch.grid <= max(limits.num_sms, in_turn, teams)
        assert plan.scratch_words % teams == 0


def test_too_many_teams_for_a_launch() -> None:
    sizes = 2**31 - 65_536, 1, 2**31 - 65_536, 1, "any"
    with pytest.raises(ValueError, match="too many for one launch"):
        plan_align(*sizes, gpus.H200, "global_large", "lora", 2**28)


def test_kernels_exist(everything: Everything) -> None:
    names = {
        f"lora_{kind}_{r}"
        for kind, r in itertools.product(("small", "shared", "count", "scatter"), ("i32", "any"))
    }
    names |= {"lora_count_large_any", "lora_scatter_large_any"}
    clusters = {"lora_shared_cluster8_i32", "lora_shared_cluster16_i32"}
    for result in everything.results:
        if result.unit == "align_lora":
            has_clusters = targets.number(result.target) >= 90
            assert set(result.kernels) == names | (clusters if has_clusters else set()), result.target


# ---- in the emulator


@pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))
def test_thresholds() -> None:
    for most in (SMALL_FAST_IDS, SHARED_FAST_IDS, CLUSTER8_FAST_IDS):
        for num_ids in (most - 1, most, most + 1):
            ids = routing.make("with_invalid", num_ids, 1, 8)
            adapters = torch.randint(-1, 3, (num_ids,), dtype=torch.int32)
            with Emulator(gpus.H200, 90)() as device:
                result = moe_lora_align_block_size(device.tensor(ids), device.tensor(adapters), 64, 8, 2)
            for got, right in zip(result, moe_lora_align_block_size(ids, adapters, 64, 8, 2), strict=True):
                assert torch.equal(got, right)
            kernel = "shared_cluster16" if num_ids > CLUSTER8_FAST_IDS else "shared_cluster8"
            kernel = (
                kernel if num_ids > SHARED_FAST_IDS else "shared" if num_ids > SMALL_FAST_IDS else "small"
            )
            assert device.launched == [f"lora_{kernel}_i32"]


@pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))
@pytest.mark.parametrize("kernel", ["global", "global_large"])
def test_adapters_have_workspaces_of_their_own(kernel: str) -> None:
    """Of teams of several blocks."""
    ids = routing.make("skewed", 700, 4, 8)
    adapters = torch.randint(-1, 3, (700,), dtype=torch.int32)
    with Emulator(gpus.A100, 80)() as device:
        placed = device.tensor(ids), device.tensor(adapters)
        result = moe_lora_align_block_size(*placed, 16, 8, 3, kernel=kernel)
    for got, right in zip(result, moe_lora_align_block_size(ids, adapters, 16, 8, 3), strict=True):
        assert torch.equal(got, right)
    assert len(device.launched) == 2


# ---- on a GPU


@pytest.mark.gpu
def test_gpu_is_the_cpu() -> None:
    for seed in range(100):
        call = cases.align_lora(seed, 30_000)
        for kernel in (None, *ALIGN_KERNELS):
            try:
                results = call.run(lambda tensor: cases.place(tensor, "cuda").tensor, kernel)
            except ValueError:
                continue
            got = tuple(result.cpu() for result in results)
            assert call.compare(call, got, call.specified()) == "", f"{seed=} {kernel}"


@pytest.mark.gpu
def test_gpu_writes_every_element_and_nothing_beside() -> None:
    for tokens, max_loras in itertools.product((3, 300, 20_000), (1, 4)):
        ids = routing.make("skewed", tokens, 8, 64)
        adapters = torch.randint(-1, max_loras - 1, (tokens,), dtype=torch.int32)  # the last one has none
        expected = moe_lora_align_block_size(ids, adapters, 64, 64, max_loras)
        wholes = [
            torch.full((right.numel() + 64,), GUARD, dtype=torch.int32, device="cuda") for right in expected
        ]
        out: Any = tuple(
            whole[32:-32].view(right.shape) for whole, right in zip(wholes, expected, strict=True)
        )
        moe_lora_align_block_size(ids.cuda(), adapters.cuda(), 64, 64, max_loras, out=out)
        for got, right, whole in zip(out, expected, wholes, strict=True):
            assert torch.equal(got.cpu(), right)
            assert (whole[:32] == GUARD).all()
            assert (whole[-32:] == GUARD).all()


@pytest.mark.gpu
def test_gpu_in_a_graph() -> None:
    ids, adapters = IDS.cuda(), ADAPTERS.cuda()
    moe_lora_align_block_size(ids, adapters, 4, 8, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = moe_lora_align_block_size(ids, adapters, 4, 8, 3)
    adapters.fill_(2)
    graph.replay()
    expected = moe_lora_align_block_size(IDS, torch.full_like(ADAPTERS, 2), 4, 8, 3)
    assert all(torch.equal(got.cpu(), right) for got, right in zip(result, expected, strict=True))
