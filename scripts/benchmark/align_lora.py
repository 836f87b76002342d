"""moe_lora_align_block_size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import routing
import torch

import cupy_moe
from cupy_moe.cpu import align_lora as cpu
from cupy_moe.plans.align import ALIGN_KERNELS, aligned_sizes

from . import base
from .align import OUTPUTS, Align, AlignCase
from .base import FORCED, Bound, Kernels, Operator, Results, empty, unequal


class LoraCase(NamedTuple):
    tokens: int
    topk: int
    experts: int
    block_size: int
    adapters: int
    target_us: float | None = None


class Tokens(NamedTuple):
    topk_ids: torch.Tensor
    adapters: torch.Tensor


SIZES = (
    ((1, 8, 256, 64), 2.6),
    ((64, 8, 256, 64), 3.0),
    ((512, 8, 256, 64), 4.0),
    ((4096, 8, 256, 64), 6.5),
    ((16384, 8, 256, 64), 10.0),
    ((4096, 2, 8, 64), 4.5),
)


class AlignLora(Operator):
    section = "lora"
    function = "moe_lora_align_block_size"
    theirs: Mapping[str, str] = {"vllm": "moe_lora_align_block_size"}

    cases: Sequence[LoraCase] = tuple(
        LoraCase(*size, adapters, target) for size, target in SIZES for adapters in (1, 4)
    )
    kernels = Kernels("lora_kernels", ALIGN_KERNELS)

    title = "moe_lora_align_block_size"
    columns: Mapping[str, Sequence[str]] = {
        "tokens x topk": ("tokens", "topk"), "experts": ("experts",), "block": ("block_size",),
        "adapters": ("adapters",),
    }  # fmt: skip
    size = "{tokens} tokens, top-{topk} of {experts}, blocks of {block_size}, {adapters} adapters"
    telling: Sequence[LoraCase] = ()

    def inputs(self, case: LoraCase, kind: str, seed: int) -> Tokens:
        generator = torch.Generator(base.device).manual_seed(seed)
        ids = routing.make("uniform", case.tokens, case.topk, case.experts, device=base.device, seed=seed)
        adapters = torch.randint(
            0, case.adapters, (case.tokens,), dtype=torch.int32, device=base.device, generator=generator
        )
        return Tokens(ids, adapters)

    def expected(self, case: LoraCase, inputs: Tokens) -> Results:
        return cpu.moe_lora_align_block_size(*inputs, case.block_size, case.experts, case.adapters)

    def bind(self, contender: str, case: LoraCase, inputs: Tokens) -> Bound:
        ids, adapters = inputs
        slots, blocks = aligned_sizes(ids.numel(), case.experts, case.block_size)
        out = empty(case.adapters, slots), empty(case.adapters, blocks), empty(case.adapters)
        if contender in self.theirs:
            operator = self.their(contender)
            enabled = torch.ones(case.adapters + 1, dtype=torch.int32, device=base.device)
            active = torch.arange(-1, case.adapters, dtype=torch.int32, device=base.device)
            sizes = case.experts, case.block_size, case.adapters, slots, blocks
            return Bound(lambda: operator(ids, adapters, *sizes, *out, enabled, active, None), out)
        kernel = contender.removeprefix(FORCED) if contender.startswith(FORCED) else None
        given = ids, adapters, case.block_size, case.experts, case.adapters
        return Bound(lambda: cupy_moe.moe_lora_align_block_size(*given, out=out, kernel=kernel), out)

    def wrong(self, contender: str, case: LoraCase, results: Results, expected: Results) -> str:
        if contender not in self.theirs:
            return unequal(OUTPUTS, results, expected)
        of_one = AlignCase(case.tokens, case.topk, case.experts, case.block_size)
        for adapter in range(case.adapters):
            got, want = (
                [tensor[adapter : adapter + 1].flatten() for tensor in r] for r in (results, expected)
            )
            if problem := Align().wrong(contender, of_one, tuple(got), tuple(want)):
                return f"{problem} of adapter {adapter}"
        return ""


OPERATORS = (AlignLora(),)
