"""moe_permute and moe_unpermute: against loops and by example, in the emulator and on a GPU with the bits of
the CPU."""

from __future__ import annotations

import itertools
import re
import textwrap
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

from cupy_moe import (
    MoEPermutation,
    aligned_sizes,
    fused_experts,
    moe_align_block_size,
    moe_permute,
    moe_sum,
    moe_unpermute,
)
from cupy_moe.cpu.permute import as_integers
from cupy_moe.plans.permute import (
    DIRECT_FAST_EXPERTS,
    DIRECT_FAST_IDS,
    MOST_UNITS,
    PERMUTE_KERNELS,
    PERMUTE_THREADS,
    PermutePlan,
    PermuteSizes,
    plan_permute,
)

_generator = torch.Generator().manual_seed(0)
ROWS = torch.randn(5, 8, generator=_generator)
SCALES = torch.randn(5, 2, generator=_generator)
PERMUTED = torch.randn(9, 8, generator=_generator)
SLOTS = torch.randint(-1, 10, (5, 2), generator=_generator, dtype=torch.int32)
WEIGHTS = torch.rand(5, 2, generator=_generator)
OFFSETS = torch.tensor([0, 3, 7], dtype=torch.int32)
CASES = {
    "permute": Case(
        moe_permute,
        {
            "hidden_states": ROWS, "topk_ids": IDS, "num_experts": 8, "block_size": 2, "expert_map": MAP,
            "scales": SCALES, "column_major_scales": False, "fill_tail": True,
        },
    ),
    "unpermute": Case(
        moe_unpermute,
        {
            "permuted": PERMUTED, "inverse_ids": SLOTS, "topk_weights": WEIGHTS, "expert_offsets": OFFSETS,
            "routed_scaling_factor": 2.5, "shared_output": ROWS,
        },
    ),
}  # fmt: skip
GUARD = 77


def check_permuted(
    result: Any, rows: torch.Tensor, ids: torch.Tensor, num_experts: int, block_size: int, mapped: Any = None
) -> None:
    """Pair by pair."""
    to_expert = dict(enumerate(range(num_experts) if mapped is None else mapped.tolist()))
    topk, flat = ids.shape[1], [to_expert.get(i, -1) for i in ids.flatten().tolist()]
    num_slots, num_blocks = aligned_sizes(len(flat), num_experts, block_size)
    pairs, owners, offsets = [], [], [0]
    for expert in range(num_experts):
        of_expert = [pair for pair, owner in enumerate(flat) if owner == expert]
        padding = -len(of_expert) % block_size
        pairs += of_expert + [len(flat)] * padding
        owners += [expert] * ((len(of_expert) + padding) // block_size)
        offsets.append(len(pairs))
    pairs += [len(flat)] * (num_slots - len(pairs))
    assert result.sorted_token_ids.tolist() == pairs
    assert result.expert_ids.tolist() == owners + [-1] * (num_blocks - len(owners))
    assert result.expert_offsets.tolist() == offsets
    places = {pair: slot for slot, pair in enumerate(pairs)}
    assert result.inverse_ids.flatten().tolist() == [places.get(pair, -1) for pair in range(len(flat))]
    zeros = torch.zeros_like(rows[:1])
    expected = torch.cat(
        [rows[pair // topk : pair // topk + 1] if pair < len(flat) else zeros for pair in pairs] or [rows[:0]]
    )
    assert torch.equal(as_integers(result.permuted), as_integers(expected))


@given(st.data())
def test_any_ids(data: Any) -> None:
    topk, num_experts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    ids = data.draw(st.lists(st.lists(st.integers(-2, 8), min_size=topk, max_size=topk), max_size=12))
    topk_ids = torch.tensor(ids, dtype=data.draw(st.sampled_from([torch.int32, torch.int64]))).view(-1, topk)
    rows = torch.arange(len(ids) * 4, dtype=torch.int16).view(-1, 4)
    block_size = data.draw(st.sampled_from([1, 2, 3, 16]))
    mapped = data.draw(st.none() | st.lists(st.integers(-1, 7), min_size=num_experts, max_size=num_experts))
    expert_map = None if mapped is None else torch.tensor(mapped, dtype=torch.int32)
    result: Any = moe_permute(rows, topk_ids, num_experts, block_size=block_size, expert_map=expert_map)
    check_permuted(result, rows, topk_ids, num_experts, block_size, expert_map)
    assert result.permuted_scales is None


def test_indices_are_those_of_an_alignment() -> None:
    for block_size, expert_map in itertools.product((1, 4), (None, MAP)):
        result = moe_permute(ROWS, IDS, 8, block_size=block_size, expert_map=expert_map)
        aligned = moe_align_block_size(IDS, block_size, 8, expert_map, False, True)
        assert torch.equal(result.sorted_token_ids, aligned.sorted_token_ids)
        assert torch.equal(result.expert_ids, aligned.expert_ids)
        assert result.expert_offsets[-1] == aligned.num_tokens_post_pad


def test_scales_travel_with_their_rows() -> None:
    ids = torch.tensor([[1, 0], [9, 1], [0, 1]])
    rows, scales = torch.arange(3.0)[:, None].expand(3, 16), torch.tensor([[10.0, 20.0], [11, 21], [12, 22]])
    result = moe_permute(rows, ids, 2, scales=scales, offsets_dtype=torch.int64)
    assert result.expert_offsets.dtype == torch.int64
    assert result.permuted_scales.tolist() == [[10, 20], [12, 22], [10, 20], [11, 21], [12, 22], [0, 0]]
    columns = moe_permute(
        rows, ids, 2, scales=scales.t().contiguous().t(), column_major_scales=True
    ).permuted_scales
    assert torch.equal(columns, result.permuted_scales)
    assert (result.permuted_scales.stride(), columns.stride()) == ((2, 1), (1, 6))


def test_a_tail_that_is_not_filled_stays_as_it_was() -> None:
    out = moe_permute(ROWS, IDS, 8, scales=SCALES)
    used = int(out.expert_offsets[-1])
    assert 0 < used < len(out.permuted)
    right = [tensor.clone() for tensor in out]
    for tensor in out:
        tensor.fill_(GUARD)
    moe_permute(ROWS, IDS, 8, scales=SCALES, fill_tail=False, out=out)
    assert torch.equal(out.permuted[:used], right[0][:used])
    assert (out.permuted[used:] == GUARD).all()
    assert torch.equal(out.permuted_scales[:used], right[5][:used])
    assert (out.permuted_scales[used:] == GUARD).all()
    assert all(torch.equal(out[i], right[i]) for i in range(1, 5))


def test_there_and_back() -> None:
    rows = torch.randn(7, 24)
    ids = routing.make("with_invalid", 7, 3, 5)
    weights = torch.rand(7, 3)
    result = moe_permute(rows, ids, 5, block_size=4)
    back = moe_unpermute(result.permuted, result.inverse_ids, topk_weights=weights)
    pairs = rows[:, None].expand(7, 3, 24)
    assert torch.equal(
        back, moe_sum(pairs, topk_weights=weights, topk_ids=torch.where((ids >= 0) & (ids < 5), ids, -1))
    )


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_unpermute_has_the_bits_of_moe_sum(dtype: torch.dtype) -> None:
    for topk, seed in itertools.product((1, 2, 5, 8, 9, 17), range(3)):
        permuted = torch.randn(40, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)
        slots = torch.randint(-3, 43, (9, topk), dtype=torch.int32)
        shared, weights = torch.randn(9, 24).to(dtype), torch.randn(9, topk)
        exists = (slots >= 0) & (slots < 40)
        rows = torch.where(exists[:, :, None], permuted[slots.clamp(0, 39).long()], torch.nan)
        keywords: dict[str, Any] = {
            "topk_weights": weights,
            "routed_scaling_factor": 2.5,
            "shared_output": shared,
        }
        expected = moe_sum(rows, topk_ids=torch.where(exists, slots, -1), **keywords)
        assert torch.equal(moe_unpermute(permuted, slots, **keywords), expected)


def test_rows_that_are_not_in_use_are_not_read() -> None:
    permuted = torch.where(torch.arange(9)[:, None] < 7, PERMUTED, torch.nan)
    inside = torch.where(SLOTS < 7, SLOTS, -1)
    assert not torch.equal(inside, SLOTS)
    for offsets in (OFFSETS, OFFSETS.long()):
        result = moe_unpermute(permuted, SLOTS, expert_offsets=offsets)
        assert torch.equal(result, moe_unpermute(permuted, inside))


def test_the_layer_of_the_docstring() -> None:
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None)
    if grouped_mm is None:
        pytest.skip("this torch has no grouped_mm")
    example = re.search(r":\n\n((?: {8}\S.*\n)+)", str(moe_permute.__doc__))
    assert example
    weights = torch.rand(40, 2)
    names: dict[str, Any] = {
        "grouped_mm": grouped_mm, "silu": torch.nn.functional.silu, "moe_permute": moe_permute,
        "moe_unpermute": moe_unpermute, "num_experts": 5, "topk_weights": weights,
        "hidden_states": torch.randn(40, 16).bfloat16(), "gate_up": torch.randn(5, 48, 16).bfloat16() / 4,
        "down": torch.randn(5, 16, 24).bfloat16() / 4, "topk_ids": routing.make("skewed", 40, 2, 5),
    }  # fmt: skip
    exec(textwrap.dedent(example[1]), names)
    layer = (names[name] for name in ("hidden_states", "gate_up", "down", "topk_weights", "topk_ids"))
    expected = fused_experts(*layer)
    assert torch.allclose(names["output"].float(), expected.float(), rtol=0.03, atol=0.03)


def test_arrays_of_numpy() -> None:
    result: Any = moe_permute(ROWS.numpy(), IDS.numpy(), 8)
    assert result.permuted_scales is None
    assert all(isinstance(array, np.ndarray) for array in result[:5])
    back: Any = moe_unpermute(result.permuted, result.inverse_ids)
    assert isinstance(back, np.ndarray)
    out: Any = [np.zeros_like(array) for array in result[:5]]
    again: Any = moe_permute(ROWS.numpy(), IDS.numpy(), 8, out=(*out, None))
    assert again.permuted_scales is None
    assert all((array == right).all() for array, right in zip(out, result[:5], strict=True))


def test_in_torch_ops_a_result_that_is_none_is_empty() -> None:
    results = torch.ops.cupy_moe.moe_permute(ROWS, IDS, 8)
    assert len(results) == 6
    assert results[5].shape == (0,)
    for options in ({}, {"scales": SCALES}):
        torch.library.opcheck(torch.ops.cupy_moe.moe_permute.default, (ROWS, IDS, 8), options)
    compiled = torch.compile(lambda rows, ids: moe_permute(rows, ids, 8), fullgraph=True, backend="aot_eager")
    result = compiled(ROWS, IDS)
    assert isinstance(result, MoEPermutation)
    assert result.permuted_scales is None
    assert torch.equal(result.permuted, results[0])
    torch.compiler.reset()


# ---- plans


def plan(
    num_tokens: int,
    topk: int = 8,
    num_experts: int = 256,
    units: int = 896,
    limits: Any = gpus.H200,
    **more: Any,
) -> PermutePlan:
    kernel = more.pop("kernel", None)
    sizes = PermuteSizes(num_tokens, topk, num_experts, num_tokens * topk, units, True, False, "i32")
    return plan_permute(sizes._replace(**more), limits, kernel)


def test_which_kernel() -> None:
    for topk in (1, 8):
        tokens = DIRECT_FAST_IDS // topk
        chosen = [plan(n, topk).kernel for n in (1, tokens - 1, tokens, tokens + 1)]
        assert chosen == ["direct", "direct", "direct", "sorted"]
    few = DIRECT_FAST_EXPERTS
    assert [plan(9, num_experts=e).kernel for e in (few - 1, few, few + 1)] == ["direct", "direct", "sorted"]
    assert plan(9, has_padding=True).kernel == plan(9, vectors=False).kernel == "sorted"
    assert plan(9, kernel="sorted").launch.entry == "permute_rows"
    assert plan(9, vectors=False).launch.entry == "permute_rows_any"
    assert plan(40_000, kernel="direct").launch.entry == "permute_direct_i32"
    for options, message in (
        ({"has_padding": True}, "takes a block_size of 1"),
        ({"vectors": False}, "takes rows of whole 16 bytes"),
        ({"num_experts": 60_000}, "has no room"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(9, kernel="direct", **options)
    with pytest.raises(ValueError, match="more than one launch can number"):
        plan(2**31 - 1, 1, units=2**20)


@pytest.mark.parametrize("name", gpus.GPUS)
def test_every_unit_is_of_one_block(name: str) -> None:
    for tokens, topk, units, reader in itertools.product(
        (0, 1, 2, 3, 64, 513, 4096),
        (1, 2, 3, 6, 8),
        (0, 1, 2, 5, 64, 127, 128, 129, 511, 513, 896, 1023, 1025, 9000),
        ("i32", "i64", "any"),
    ):
        for kernel in PERMUTE_KERNELS:
            planned = plan(tokens, topk, 64, units, gpus.GPUS[name], reader=reader, kernel=kernel)
            at_once, (parts, *_), (part, *_) = (
                planned.arguments[n] for n in ("tokens_per_block", "parts", "units_per_part")
            )
            block, grid = planned.launch.block, planned.launch.grid
            assert block % 32 == 0 < block <= PERMUTE_THREADS
            assert at_once * part <= 4 * block <= MOST_UNITS
            assert parts * part >= units > (parts - 1) * part or units <= 1 == parts
            assert grid % parts == 0
            assert grid // parts * at_once >= tokens
            if kernel == "direct":
                per_load = {"i32": 4, "i64": 2, "any": 1}[reader]
                assert at_once * topk % per_load == 0 or grid == parts  # ids loaded together are of one block
                rows, (per_row, *_) = planned.arguments["num_rows"], planned.arguments["per_row"]
                assert rows * 32 <= block
                assert rows * per_row >= planned.arguments["per_block"] == at_once * topk
                assert planned.launch.shared_bytes <= gpus.GPUS[name].shared_bytes


def test_few_rows_are_spread_over_the_device() -> None:
    assert (plan(1).launch.grid, plan(1).launch.block) == (7, 128)
    assert (plan(64).launch.grid, plan(64).launch.block) == (128, 256)
    assert (plan(4096).launch.grid, plan(4096).launch.block) == (4096, 256)
    clearing = plan(1, num_slots=1024, has_padding=True).launch
    assert clearing.grid * clearing.block // 32 >= 1024


def test_kernels_exist(everything: Everything) -> None:
    names = {
        "permute_rows": {"permute_rows", "permute_rows_any"},
        "permute_direct": {f"permute_direct_{reader}" for reader in ("i32", "i64", "any")},
    }
    for result in everything.results:
        assert result.unit not in names or set(result.kernels) == names[result.unit], result.target


# ---- in the emulator

emulated = pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))


@emulated
@pytest.mark.parametrize("kernel", PERMUTE_KERNELS)
def test_blocks_of_parts_and_blocks_of_tokens(kernel: str) -> None:
    """On GPUs with few SMs, whose blocks are large, and with many."""
    for num_sms, (tokens, width), topk in itertools.product(
        (1, 3, 200), ((70, 16), (9, 1200), (3, 9008)), (2, 3)
    ):
        rows = torch.randint(-128, 127, (tokens, width), dtype=torch.int8)
        ids = routing.make("with_invalid", tokens, topk, 9)
        with Emulator(gpus.H200._replace(num_sms=num_sms), 90, tokens)() as device:
            result = moe_permute(device.tensor(rows), device.tensor(ids), 9, kernel=kernel)
        for got, right in zip(result[:5], moe_permute(rows, ids, 9)[:5], strict=True):
            assert torch.equal(got, right)
        rows_by = "permute_rows" if kernel == "sorted" else "permute_direct_i32"
        assert device.launched[-1] == rows_by
        assert len(device.launched) == 1 + (kernel == "sorted")


@emulated
def test_thresholds_of_permute() -> None:
    for tokens in (DIRECT_FAST_IDS // 8 - 1, DIRECT_FAST_IDS // 8, DIRECT_FAST_IDS // 8 + 1):
        rows, ids = (
            torch.arange(tokens * 4, dtype=torch.int32).view(-1, 4),
            routing.make("skewed", tokens, 8, 16),
        )
        with Emulator(gpus.H200, 90)() as device:
            result = moe_permute(device.tensor(rows), device.tensor(ids), 16)
        for got, right in zip(result[:5], moe_permute(rows, ids, 16)[:5], strict=True):
            assert torch.equal(got, right)
        direct = ["permute_direct_i32"]
        assert device.launched == (
            direct if tokens * 8 <= DIRECT_FAST_IDS else ["sort_shared_i32", "permute_rows"]
        )


@emulated
def test_many_pairs_take_clusters() -> None:
    ids = routing.make("uniform", 3000, 4, 8)
    rows = torch.arange(3000 * 16, dtype=torch.int64).to(torch.uint8).view(-1, 16)
    with Emulator(gpus.H200, 90)() as device:
        result = moe_permute(device.tensor(rows), device.tensor(ids), 8)
    assert device.launched == ["sort_shared_cluster8_i32", "permute_rows"]
    for got, right in zip(result[:5], moe_permute(rows, ids, 8)[:5], strict=True):
        assert torch.equal(got, right)


@emulated
def test_every_kernel_that_adds_up_rows() -> None:
    launched = set()
    for dtype, topk, hidden, tokens in itertools.product(
        (torch.float32, torch.float16, torch.bfloat16), (1, 3, 4, 8), (64, 33), (2, 80)
    ):
        rows = torch.randn(40, hidden).to(dtype)
        slots = torch.randint(-2, 42, (tokens, topk), dtype=torch.int32)
        with Emulator(gpus.H200._replace(num_sms=1), 90)() as device:
            result = moe_unpermute(device.tensor(rows), device.tensor(slots))
        assert torch.equal(result, moe_unpermute(rows, slots)), (dtype, topk, hidden, tokens)
        launched |= set(device.launched)
    assert launched == {entry for entry in emulator.library("moe_sum", 90).entries if "rows" in entry}


# ---- on a GPU


def guarded(result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As large a tensor between guards, full of something else, and the whole."""
    whole = torch.full((result.numel() + 64,), GUARD, dtype=as_integers(result).dtype, device="cuda")
    return whole[32:-32].view(result.dtype).view(result.shape), whole


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.float32])
def test_gpu_is_the_cpu_to_the_last_bit(dtype: torch.dtype) -> None:
    for name, (tokens, topk, num_experts, hidden), block_size in itertools.product(
        routing.NAMES, ((1, 8, 256, 7168), (65, 8, 256, 512), (600, 8, 64, 96), (3000, 3, 40, 33)), (1, 16)
    ):
        ids = routing.make(name, tokens, topk, num_experts)
        rows = torch.randint(0, 256, (tokens, hidden * dtype.itemsize), dtype=torch.uint8).view(dtype)
        scales = torch.randn(tokens, 5)
        expected = moe_permute(rows, ids, num_experts, block_size=block_size, scales=scales)
        out, whole = zip(*map(guarded, expected), strict=True)
        for kernel in (None, "sorted"):
            moe_permute(
                rows.cuda(),
                ids.cuda(),
                num_experts,
                block_size=block_size,
                scales=scales.cuda(),
                out=out,
                kernel=kernel,
            )
            for field, got, right, memory in zip(expected._fields, out, expected, whole, strict=True):
                what = f"{field} {name} {tokens} {block_size} {kernel}"
                assert torch.equal(as_integers(got).cpu(), as_integers(right)), what
                assert (memory[:32] == GUARD).all(), what
                assert (memory[-32:] == GUARD).all(), what
                memory.fill_(GUARD)


@pytest.mark.gpu
def test_gpu_random_calls() -> None:
    for seed, operator in itertools.product(range(200), (cases.permute, cases.unpermute)):
        call = operator(seed)
        results = call.run(lambda tensor: cases.place(tensor, "cuda").tensor)
        assert call.compare(call, tuple(r.cpu() for r in results), call.specified()) == "", f"{seed=}"


@pytest.mark.gpu
def test_gpu_beyond_32_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of GPU memory")
    tokens, topk, hidden = 80_000, 8, 16_384
    rows = torch.randint(-128, 127, (tokens, hidden), dtype=torch.int8, device="cuda")
    ids = routing.make("uniform", tokens, topk, 64, device="cuda")
    result = moe_permute(rows, ids, 64)
    slots = torch.randint(0, tokens * topk, (2000,), device="cuda")
    assert torch.equal(result.permuted[slots], rows[result.sorted_token_ids[slots].long() // topk])
    assert torch.equal(result.permuted[-100:], rows[result.sorted_token_ids[-100:].long() // topk])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4, 2000])
def test_gpu_in_a_graph(tokens: int) -> None:
    rows = torch.randn(tokens, 64, device="cuda")
    ids = routing.make("uniform", tokens, 4, 8, device="cuda")
    moe_permute(rows, ids, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = moe_permute(rows, ids, 8)
        back = moe_unpermute(result.permuted, result.inverse_ids)
    rows.normal_()
    ids.copy_(routing.make("with_invalid", tokens, 4, 8, seed=1))
    graph.replay()
    expected = moe_permute(rows.cpu(), ids.cpu(), 8)
    assert torch.equal(result.permuted.cpu(), expected.permuted)
    assert torch.equal(back.cpu(), moe_unpermute(expected.permuted, expected.inverse_ids))
