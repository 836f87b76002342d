"""batched_moe_align_block_size: the CPU against a loop, the kernel against the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_cases import Case

from cupy_moe import MoEAlignment, batched_moe_align_block_size
from cupy_moe.cpu import align_batched as cpu_align_batched
from cupy_moe.plans.align_batched import plan_batched

COUNTS = torch.tensor([2, 0, 5], dtype=torch.int32)
CASES = {
    "batched": Case(
        batched_moe_align_block_size,
        {"max_tokens_per_batch": 8, "block_size": 4, "expert_num_tokens": COUNTS},
    )
}

GUARD = 0x3C3C3C3C


def naive(max_tokens: int, block_size: int, counts: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    blocks_per_batch = -(-max_tokens // block_size)
    nothing = len(counts) * max_tokens
    sorted_token_ids: list[int] = []
    expert_ids: list[int] = []
    for batch, count in enumerate(counts):
        tokens = [batch * max_tokens + token for token in range(min(count, max_tokens))]
        for first in range(0, len(tokens), block_size):
            block = tokens[first : first + block_size]
            sorted_token_ids += block + [nothing] * (block_size - len(block))
            expert_ids.append(batch)
    post_pad = len(sorted_token_ids)
    num_blocks = len(counts) * blocks_per_batch
    sorted_token_ids += [nothing] * (num_blocks * block_size - post_pad)
    return sorted_token_ids, expert_ids + [-1] * (num_blocks - len(expert_ids)), [post_pad]


def as_lists(aligned: Any) -> tuple[list[int], ...]:
    return tuple(result.tolist() for result in aligned)


def test_example_of_vllm() -> None:
    aligned = batched_moe_align_block_size(8, 4, torch.tensor([2, 3, 0, 6, 8], dtype=torch.int32))
    assert aligned.sorted_token_ids[:24].tolist() == [
        *(0, 1, 40, 40, 8, 9, 10, 40, 24, 25, 26, 27, 28, 29, 40, 40, 32, 33, 34, 35, 36, 37, 38, 39)
    ]
    assert aligned.sorted_token_ids[24:].tolist() == [40] * 16
    assert aligned.expert_ids.tolist() == [0, 1, 3, 3, 4, 4, -1, -1, -1, -1]
    assert aligned.num_tokens_post_pad.tolist() == [24]


@given(st.integers(1, 40), st.integers(1, 40), st.lists(st.integers(-3, 45), max_size=12))
def test_any_counts(max_tokens: int, block_size: int, counts: list[int]) -> None:
    expert_num_tokens = torch.tensor(counts, dtype=torch.int32)
    expected = naive(max_tokens, block_size, counts)
    aligned = batched_moe_align_block_size(max_tokens, block_size, expert_num_tokens)
    assert all(result.dtype == torch.int32 for result in aligned)
    assert as_lists(aligned) == expected
    out = MoEAlignment(*(torch.full_like(result, GUARD) for result in aligned))
    assert batched_moe_align_block_size(max_tokens, block_size, expert_num_tokens, out=out) == out
    assert as_lists(out) == expected


def test_out_of_other_shapes() -> None:
    out: Any = (
        torch.empty(3, 8, dtype=torch.int32),
        torch.empty(6, 1, dtype=torch.int32),
        torch.tensor(0).int(),
    )
    aligned = batched_moe_align_block_size(8, 4, COUNTS, out=out)
    assert [result.flatten().tolist() for result in aligned] == [*naive(8, 4, COUNTS.tolist())]


def test_numpy() -> None:
    aligned: Any = batched_moe_align_block_size(8, 4, np.array([2, 0, 5], dtype=np.int32))
    assert all(isinstance(result, np.ndarray) for result in aligned)
    assert as_lists(aligned) == naive(8, 4, [2, 0, 5])


def test_plan() -> None:
    for num_batches, slots in itertools.product((0, 1, 8, 1024, 65_536), (1, 16, 2048, 2049, 2**31 - 1)):
        if num_batches * slots < 2**31:
            launch, parts = plan_batched(num_batches, slots)
            assert parts >= 1
            assert launch.grid == max(1, num_batches * parts) < 2**31
            assert launch.block % 32 == 0


# ---- on a GPU ---


def check(max_tokens: int, block_size: int, counts: torch.Tensor) -> None:
    expected = cpu_align_batched.batched_moe_align_block_size(max_tokens, block_size, counts)
    buffers = [
        torch.full((len(wanted) + 16,), GUARD, dtype=torch.int32, device="cuda") for wanted in expected
    ]
    out = [buffer[8:-8] for buffer in buffers]
    for runs in range(2):
        for tensor in out:
            tensor.fill_(0x5A5A5A5A)
        batched_moe_align_block_size(max_tokens, block_size, counts, out=tuple(out))  # type: ignore[arg-type]
        case = f"{max_tokens=} {block_size=} {len(counts)=} {runs=}"
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True)), case
        guards = torch.cat([part for buffer in buffers for part in (buffer[:8], buffer[-8:])])
        assert bool((guards == GUARD).all()), case


def draw(num_batches: int, low: int, high: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(num_batches + high)
    return torch.randint(low, high, (num_batches,), dtype=torch.int32, device="cuda", generator=generator)


@pytest.mark.gpu
def test_grid_of_vllm() -> None:
    for max_tokens, num_batches, block_size in itertools.product(
        (13, 16, 512), (8, 16, 32, 64), (8, 16, 32, 64)
    ):
        counts = draw(num_batches, 0, max_tokens + 1)
        check(max_tokens, block_size, counts)
        counts[::3] = 0
        check(max_tokens, block_size, counts)
        check(max_tokens, block_size, torch.zeros_like(counts))
        check(max_tokens, block_size, torch.full_like(counts, max_tokens))


@pytest.mark.gpu
def test_batched_beyond_the_grid_of_vllm() -> None:
    for max_tokens, num_batches, block_size in (
        *(
            (1, 1, 1),
            (7, 0, 4),
            (100, 1025, 3),
            (3, 65_536, 1),
            (5000, 9, 128),
            (8, 5, 65_536),
            (4097, 2, 1000),
        ),
    ):
        check(max_tokens, block_size, draw(num_batches, 0, max_tokens + 1))
        check(max_tokens, block_size, draw(num_batches, -5, 2 * max_tokens + 5))
    limits = torch.tensor([2**31 - 1, -(2**31), 3, -1], dtype=torch.int32, device="cuda")
    check(10, 4, limits)
    check(10, 4, limits.repeat(2)[::2])


@pytest.mark.gpu
def test_in_a_graph() -> None:
    counts = draw(64, 0, 513)
    batches = [draw(64, 0, high) for high in (513, 100, 1)]
    batched_moe_align_block_size(512, 64, counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        aligned = batched_moe_align_block_size(512, 64, counts)
    for batch in batches:
        counts.copy_(batch)
        graph.replay()
        expected = cpu_align_batched.batched_moe_align_block_size(512, 64, batch)
        assert all(torch.equal(a, b) for a, b in zip(aligned, expected, strict=True))
