"""batched_moe_align_block_size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

import cupy_moe
from cupy_moe.cpu import align_batched as cpu
from cupy_moe.plans.base import ceil_div

from . import base
from .base import Bound, Operator, Results, empty, unequal

OUTPUTS = ("sorted_token_ids", "expert_ids", "num_tokens_post_pad")


class BatchedCase(NamedTuple):
    experts: int
    max_tokens: int
    block_size: int
    target_us: float | None = None


class AlignBatched(Operator):
    section = "batched"
    function = "batched_moe_align_block_size"
    theirs: Mapping[str, str] = {"vllm": "batched_moe_align_block_size"}

    cases: Sequence[BatchedCase] = (
        BatchedCase(8, 512, 64),
        BatchedCase(64, 128, 64),
        BatchedCase(128, 256, 128),
        BatchedCase(256, 256, 128),
        BatchedCase(256, 1024, 128),
    )
    checked = ("random", "full", "none")

    title = "batched_moe_align_block_size"
    columns: Mapping[str, Sequence[str]] = {
        "experts x tokens": ("experts", "max_tokens"),
        "block": ("block_size",),
    }
    note = "Every expert has some number of tokens from none to the most, all numbers equally likely."
    size = "{experts} experts, up to {max_tokens} tokens each, blocks of {block_size}"
    telling = (BatchedCase(256, 256, 128),)

    def inputs(self, case: BatchedCase, kind: str, seed: int) -> torch.Tensor:
        low, high = {"random": (0, case.max_tokens), "full": (case.max_tokens,) * 2, "none": (0, 0)}[kind]
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(low, high + 1, (case.experts,), dtype=torch.int32, generator=generator)
        return counts.to(base.device)

    def expected(self, case: BatchedCase, inputs: torch.Tensor) -> Any:
        return cpu.batched_moe_align_block_size(case.max_tokens, case.block_size, inputs)

    def bind(self, contender: str, case: BatchedCase, inputs: torch.Tensor) -> Bound:
        max_tokens, block_size = case.max_tokens, case.block_size
        blocks = case.experts * ceil_div(max_tokens, block_size)
        out = (empty(blocks * block_size), empty(blocks), empty(1))
        if contender == "vllm":
            operator = self.their(contender)
            return Bound(lambda: operator(max_tokens, block_size, inputs, *out), out)
        return Bound(
            lambda: cupy_moe.batched_moe_align_block_size(max_tokens, block_size, inputs, out=out), out
        )

    def wrong(self, contender: str, case: BatchedCase, results: Results, expected: Any) -> str:
        # vLLM, too, keeps the order of the rows and writes padding and tail.
        return unequal(OUTPUTS, results, expected)


OPERATORS = (AlignBatched(),)
