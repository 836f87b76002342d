"""moe_sort: against loops and by example, and what others make of it; in the emulator and
on a GPU."""

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

from cupy_moe import MoESorting, moe_align_block_size, moe_permute, moe_sort
from cupy_moe.plans.align import ALIGN_KERNELS, CLUSTER8_FAST_IDS, SHARED_FAST_IDS, SMALL_FAST_IDS

WEIGHTS = torch.rand(5, 2, generator=torch.Generator().manual_seed(0))
ALL: dict[str, Any] = {"return_inverse": True, "return_offsets": True, "return_counts": True}
CASES = {
    "sort": Case(
        moe_sort,
        {
            "topk_ids": IDS, "block_size": 4, "num_experts": 8, "expert_map": MAP, "pad_sorted_ids": False,
            "ignore_invalid_experts": True, "topk_weights": WEIGHTS, "fine_block_size": 2, **ALL,
        },
    ),
}  # fmt: skip


@given(st.data())
def test_any_ids(data: Any) -> None:
    num_experts = data.draw(st.integers(1, 6))
    ids = data.draw(st.lists(st.integers(-2, 8), max_size=30))
    block_size, fine = data.draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (16, 4)]))
    mapped = data.draw(st.none() | st.lists(st.integers(-1, 7), min_size=num_experts, max_size=num_experts))
    ignores = data.draw(st.booleans())
    expert_map = None if mapped is None else torch.tensor(mapped, dtype=torch.int32)
    topk_ids = torch.tensor(ids, dtype=torch.int32)
    weights = torch.arange(len(ids), dtype=torch.float32) + 1
    arguments = topk_ids, block_size, num_experts, expert_map, False, ignores
    result: Any = moe_sort(*arguments, topk_weights=weights, fine_block_size=fine, **ALL)

    aligned = moe_align_block_size(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(result, aligned, strict=False))
    valid = [i if 0 <= i < num_experts else -1 for i in ids]
    if mapped is not None and ignores:
        local = [m if 0 <= m < num_experts else -1 for m in mapped]
        valid = [local[i] if i >= 0 else -1 for i in valid]
    counts = [valid.count(expert) for expert in range(num_experts)]
    assert result.counts.tolist() == counts
    widths = [-(-count // block_size) * block_size for count in counts]
    assert result.expert_offsets.tolist() == [sum(widths[:expert]) for expert in range(num_experts + 1)]
    pairs = aligned.sorted_token_ids.tolist()
    assert result.inverse_ids.tolist() == [pairs.index(i) if valid[i] >= 0 else -1 for i in range(len(ids))]
    assert result.sorted_weights.tolist() == [pair + 1 if pair < len(ids) else 0 for pair in pairs]
    blocks = aligned.expert_ids.tolist()
    assert result.fine_expert_ids.tolist() == [
        blocks[slot // block_size] for slot in range(0, len(pairs), fine)
    ]


def test_what_is_not_asked_for_is_none() -> None:
    result: Any = moe_sort(IDS, 4, 8)
    assert result[3:] == (None,) * 5
    for name, field in (("inverse", "inverse_ids"), ("offsets", "expert_offsets"), ("counts", "counts")):
        asked: dict[str, Any] = {f"return_{name}": True}
        result = moe_sort(IDS, 4, 8, **asked)
        assert [f for f in MoESorting._fields[3:] if getattr(result, f) is not None] == [field]
    wide: Any = moe_sort(IDS, 4, 8, return_offsets=True, offsets_dtype=torch.int64)
    assert wide.expert_offsets.dtype == torch.int64
    of_numpy: Any = moe_sort(IDS.numpy(), 4, 8, return_counts=True)
    assert isinstance(of_numpy.counts, np.ndarray)
    assert of_numpy.inverse_ids is None


def test_out_has_none_where_nothing_is_asked_for() -> None:
    right: Any = moe_sort(IDS, 4, 8, return_counts=True)
    out = [None if tensor is None else torch.full_like(tensor, 77) for tensor in right]
    result = moe_sort(IDS, 4, 8, return_counts=True, out=tuple(out))
    assert all(a is b for a, b in zip(result, out, strict=True))
    for got, expected in zip(out, right, strict=True):
        assert (got is None) == (expected is None)
        assert got is None or torch.equal(got, expected)
    compiled = torch.compile(
        lambda ids: moe_sort(ids, 4, 8, return_counts=True), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(IDS).counts, right.counts)
    assert compiled(IDS).inverse_ids is None
    torch.compiler.reset()


def test_offsets_and_rows_are_what_grouped_mm_takes() -> None:
    """A product of each expert's rows, from ids to outputs without a wait for the GPU."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    tokens, topk, num_experts = 40, 2, 5
    hidden = torch.randn(tokens, 16).bfloat16()
    weights = torch.randn(num_experts, 24, 16).bfloat16()
    ids = routing.make("skewed", tokens, topk, num_experts)
    for block_size in (1, 8):
        result = moe_permute(hidden, ids, num_experts, block_size=block_size)
        sort: Any = moe_sort(ids, block_size, num_experts, return_offsets=True)
        assert torch.equal(sort.expert_offsets, result.expert_offsets)
        ends = sort.expert_offsets[1:]
        products = torch.nn.functional.grouped_mm(result.permuted, weights.transpose(1, 2), offs=ends)
        of_pairs = products[result.inverse_ids.long()].float()
        expected = torch.einsum("th,tkih->tki", hidden.float(), weights[ids.long()].float())
        assert torch.allclose(of_pairs, expected, rtol=0.02, atol=0.05)


def test_a_kernel_without_a_table_makes_no_by_products() -> None:
    with pytest.raises(ValueError, match="kernel='small' makes no by-products"), Emulator(gpus.H200, 90)():
        moe_sort(IDS, 4, 8, kernel="small")


def test_kernels_exist(everything: Everything) -> None:
    readers, fast = ("i32", "i64", "any"), ("i32", "i64")
    names = {
        f"sort_{kind}_{reader}" for kind, reader in itertools.product(("shared", "count", "scatter"), readers)
    }
    names |= {"sort_count_large_any", "sort_scatter_large_any"}
    clusters = {f"sort_shared_cluster{size}_{reader}" for size, reader in itertools.product((8, 16), fast)}
    for result in everything.results:
        if result.unit == "align_sort":
            has_clusters = result.target not in (
                "sm_75",
                "sm_80",
                "sm_86",
                "sm_87",
                "sm_89",
                "compute_75",
                "compute_80",
            )
            assert set(result.kernels) in (
                (names | clusters,) if has_clusters else (names, names | clusters)
            ), result.target


@pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))
@pytest.mark.parametrize("limits", [gpus.A100, gpus.H200], ids=["A100", "H200"])
def test_thresholds(limits: Any) -> None:
    """The kernels of align, but for the one that has no table."""
    arch = 80 if limits is gpus.A100 else 90
    for most in (SMALL_FAST_IDS, SHARED_FAST_IDS, CLUSTER8_FAST_IDS):
        for num_ids in (most - 1, most, most + 1):
            ids = routing.make("with_invalid", num_ids, 1, 8)
            with Emulator(limits, arch)() as device:
                result = moe_sort(device.tensor(ids), 64, 8, **ALL)
            for got, right in zip(result, moe_sort(ids, 64, 8, **ALL), strict=True):
                assert got is right is None or torch.equal(got, right)
            few, many = ["sort_shared_i32"], ["sort_count_i32", "sort_scatter_i32"]
            if arch == 90:
                many = ["sort_shared_cluster16_i32"]
                few = few if num_ids <= SHARED_FAST_IDS else ["sort_shared_cluster8_i32"]
            assert device.launched == (few if num_ids <= CLUSTER8_FAST_IDS else many)


# ---- on a GPU


@pytest.mark.gpu
def test_gpu_is_the_cpu() -> None:
    for seed in range(100):
        call = cases.sort(seed, 30_000)
        for kernel in (None, *ALIGN_KERNELS[1:]):
            try:
                results = call.run(lambda tensor: cases.place(tensor, "cuda").tensor, kernel)
            except ValueError:
                continue
            assert call.compare(call, tuple(r.cpu() for r in results), call.specified()) == "", (
                f"{seed=} {kernel}"
            )


@pytest.mark.gpu
def test_gpu_in_a_graph() -> None:
    ids = IDS.cuda()
    moe_sort(ids, 4, 8, **ALL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = moe_sort(ids, 4, 8, **ALL)
    ids.fill_(3)
    graph.replay()
    for got, right in zip(result, moe_sort(ids.cpu(), 4, 8, **ALL), strict=True):
        assert got is right is None or torch.equal(got.cpu(), right)
