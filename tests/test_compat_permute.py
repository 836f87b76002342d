"""vLLM's and SGLang's permutations and LoRA alignment, with the engines' signatures."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import routing
import torch

import cupy_moe.compat.sglang
import cupy_moe.compat.vllm
from cupy_moe import aligned_sizes, moe_lora_align_block_size, moe_permute, moe_unpermute

vllm: Any = cupy_moe.compat.vllm
sglang: Any = cupy_moe.compat.sglang
ROWS = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
IDS = routing.make("with_invalid", 6, 3, 8)
WEIGHTS = torch.rand(6, 3, generator=torch.Generator().manual_seed(1))
ADAPTERS = torch.tensor([0, 0, 2, 2, 2, 1], dtype=torch.int32)


@pytest.mark.parametrize("given", [False, True])
def test_vllm_permutes_and_back(given: bool) -> None:
    """As vLLM's own does by a stable sort, for experts 4 to 7 on this rank."""
    expert_map = torch.tensor([-1, -1, -1, -1, 0, 1, 2, 3], dtype=torch.int32)
    scales = torch.rand(6, 2)
    buffer = torch.full((18, 16), 7.0) if given else None
    permuted, moved, offsets, inverse, slots = vllm.moe_permute(
        ROWS, scales, IDS, 8, 4, expert_map, buffer, scratch=object()
    )
    local = torch.where((IDS >= 4) & (IDS < 8), IDS - 4, 99).flatten()
    order = local.argsort(stable=True)
    counts = [(local < expert).sum().item() for expert in range(5)]
    assert offsets.dtype == torch.int64
    assert offsets.tolist() == counts
    used = int(counts[-1])
    assert slots.tolist() == order[:used].tolist() + [18] * (18 - used)
    assert torch.equal(permuted[:used], ROWS[order[:used] // 3])
    assert torch.equal(moved[:used], scales[order[:used] // 3])
    assert inverse.shape == (18,)
    assert [inverse[pair].item() for pair in order] == [*range(used), *[-1] * (18 - used)]
    if given:
        assert permuted is buffer
        assert (buffer[used:] == 7).all()

    out = torch.full_like(ROWS, 7.0)
    vllm.moe_unpermute(out, permuted, WEIGHTS, inverse, offsets)
    assert torch.equal(out, moe_unpermute(permuted[:used], inverse.view(6, 3), topk_weights=WEIGHTS))
    # Indices of another's, whose rows past the last expert's are not there.
    others = torch.where(inverse < 0, 17, inverse)
    vllm.moe_unpermute(
        out.fill_(7), permuted.clone().index_fill_(0, torch.tensor([17]), torch.nan), WEIGHTS, others, offsets
    )
    assert torch.equal(out, moe_unpermute(permuted[:used], inverse.view(6, 3), topk_weights=WEIGHTS))


def test_vllm_scales_of_a_tensor_stay() -> None:
    scale = torch.tensor([2.0])
    assert vllm.moe_permute(ROWS, scale, IDS, 8)[1] is scale
    assert vllm.moe_permute(ROWS, None, IDS, 8)[1] is None
    assert len(vllm.moe_permute(ROWS, None, IDS, 8)[2]) == 9


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_lora_into_buffers(engine: str) -> None:
    enabled = torch.tensor([1, 1, 1, 0, 1], dtype=torch.int32)
    expected = moe_lora_align_block_size(IDS, ADAPTERS, 4, 8, 4, enabled)
    num_slots, num_blocks = aligned_sizes(18, 8, 4)
    segments = torch.tensor([0, 2, 5, 6], dtype=torch.int32), torch.tensor([0, 2, 1], dtype=torch.int32)
    tokens = (ADAPTERS,) if engine == "vllm" else segments
    function = (vllm if engine == "vllm" else sglang).moe_lora_align_block_size
    for more in (0, 5):
        sorted_ids = torch.full((4, num_slots + more), 77, dtype=torch.int32)
        expert_ids = torch.full((4, num_blocks + more), 77, dtype=torch.int32)
        post_pad = torch.full((4,), 77, dtype=torch.int32)
        lora_ids = torch.tensor([-1, 0, 1, 2, 3], dtype=torch.int32)
        sizes = 8, 4, 4, num_slots + more, num_blocks + more
        function(IDS, *tokens, *sizes, sorted_ids, expert_ids, post_pad, enabled, lora_ids)
        assert torch.equal(sorted_ids[:, :num_slots], expected.sorted_token_ids)
        assert torch.equal(expert_ids[:, :num_blocks], expected.expert_ids)
        assert torch.equal(post_pad, expected.num_tokens_post_pad)
        assert (sorted_ids[:, num_slots:] == 18).all()
        assert (expert_ids[:, num_blocks:] == -1).all()
    with pytest.raises(
        ValueError, match=rf"sorted_token_ids: expected at least {num_slots} elements for each of 4"
    ):
        function(IDS, *tokens, *sizes, sorted_ids[:3], expert_ids, post_pad, enabled, lora_ids)


def test_sglang_prepares_and_adds_up() -> None:
    ids = routing.make("uniform", 6, 3, 8)
    offsets, scale_offsets = torch.zeros(9, dtype=torch.int32), torch.zeros(9, dtype=torch.int32)
    first, second = torch.zeros(8, 3, dtype=torch.int32), torch.zeros(8, 3, dtype=torch.int32)
    sources, places = torch.zeros(18, dtype=torch.int32), torch.zeros(18, dtype=torch.int32)
    sglang.prepare_moe_input(ids, offsets, first, second, sources, places, 8, 24, 16, scale_offsets)
    right = moe_permute(ROWS, ids, 8)
    counts = [(ids == expert).sum().item() for expert in range(8)]
    assert torch.equal(offsets, right.expert_offsets)
    assert first.tolist() == [[count, 48, 16] for count in counts]
    assert second.tolist() == [[count, 16, 24] for count in counts]
    assert scale_offsets.tolist() == [0, *itertools.accumulate(-(-count // 128) * 128 for count in counts)]
    assert torch.equal(ROWS[sources.long()], right.permuted)
    assert torch.equal(places.view(6, 3), right.inverse_ids)

    rows = right.permuted.bfloat16()
    for factors in (None, WEIGHTS.bfloat16().flatten(), WEIGHTS.flatten()):
        out = torch.empty(6, 16, dtype=torch.bfloat16)
        sglang.apply_shuffle_mul_sum(rows, out, places, factors)
        weights = None if factors is None else factors.float().view(6, 3)
        assert torch.equal(out, moe_unpermute(rows, right.inverse_ids, topk_weights=weights))


def test_sglang_garbage_leads_to_no_row_that_is_not_there() -> None:
    sizes, places = torch.zeros(8, 3, dtype=torch.int32), torch.zeros(18, dtype=torch.int32)
    sources = torch.full((18,), 77, dtype=torch.int32)
    sglang.prepare_moe_input(
        IDS, torch.zeros(9, dtype=torch.int32), sizes, sizes.clone(), sources, places, 8, 24, 16
    )
    assert ((sources >= 0) & (sources < 6)).all()
    assert (places.view(6, 3)[(IDS < 0) | (IDS >= 8)] == -1).all()
