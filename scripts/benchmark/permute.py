"""moe_permute and moe_unpermute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import routing
import torch

import cupy_moe
from cupy_moe.cpu import permute as cpu
from cupy_moe.plans.permute import PERMUTE_KERNELS

from . import base, peers
from .base import FORCED, OURS, Bound, Kernels, Operator, Results, Row, empty, unequal


class PermuteCase(NamedTuple):
    tokens: int
    topk: int
    experts: int
    hidden: int
    target_us: float | None = None

    @property
    def num_ids(self) -> int:
        return self.tokens * self.topk


class Rows(NamedTuple):
    hidden_states: torch.Tensor
    topk_ids: torch.Tensor
    weights: torch.Tensor


def terabytes(row: Row) -> str:
    moved = 2 * row["tokens"] * row["hidden"] * (row["topk"] + 1)
    return f"{moved / row['us']['random'][OURS] / 1e6:.2f}"


SIZES = (
    (1, 8, 256, 7168),
    (64, 8, 256, 7168),
    (512, 8, 256, 7168),
    (4096, 8, 256, 7168),
    (16384, 8, 256, 7168),
    (4096, 2, 8, 4096),
    (4096, 8, 128, 2048),
)


def cases(targets: Sequence[float]) -> list[PermuteCase]:
    return [PermuteCase(*size, target) for size, target in zip(SIZES, targets, strict=True)]


class Permute(Operator):
    section = "permute"
    function = "moe_permute"
    theirs: Mapping[str, str] = {"vllm": "moe_permute", "sglang": "shuffle_rows"}

    cases: Sequence[PermuteCase] = cases((2.8, 4.5, 20.0, 128.0, 500.0, 26.0, 42.0))
    kernels: Kernels | None = Kernels("permute_kernels", PERMUTE_KERNELS)

    title = "moe_permute, bf16"
    columns: Mapping[str, Sequence[str]] = {
        "tokens x topk": ("tokens", "topk"), "experts": ("experts",), "hidden": ("hidden",)
    }  # fmt: skip
    more_columns: Mapping[str, Callable[[Row], str]] = {"TB/s": terabytes}
    note = (
        '"TB/s" is what is read, each row once, and written. sglang prepares its input, then shuffles rows.'
    )
    size = "{tokens} tokens, top-{topk} of {experts}, hidden {hidden}, bf16"
    telling: Sequence[PermuteCase] = (PermuteCase(4096, 8, 256, 7168),)

    def inputs(self, case: PermuteCase, kind: str, seed: int) -> Rows:
        generator = torch.Generator(base.device).manual_seed(seed)
        options: dict[str, Any] = {"device": base.device, "generator": generator}
        ids = routing.make("uniform", case.tokens, case.topk, case.experts, device=base.device, seed=seed)
        rows = torch.randn(case.tokens, case.hidden, dtype=torch.bfloat16, **options)
        return Rows(rows, ids, torch.rand(case.tokens, case.topk, **options))

    def expected(self, case: PermuteCase, inputs: Rows) -> Results:
        results = cpu.moe_permute(inputs.hidden_states, inputs.topk_ids, case.experts)
        return tuple(result for result in results if result is not None)

    def bind(self, contender: str, case: PermuteCase, inputs: Rows) -> Bound:
        rows, ids, num_ids, experts = inputs.hidden_states, inputs.topk_ids, case.num_ids, case.experts
        permuted = empty(num_ids, case.hidden, dtype=torch.bfloat16)
        inverse, slots = empty(case.tokens, case.topk), empty(num_ids)
        if contender == "vllm":
            operator, offsets = self.their(contender), empty(experts + 1, dtype=torch.int64)
            source = torch.arange(num_ids, dtype=torch.int32, device=base.device).view(ids.shape)
            slots.fill_(num_ids)
            local = rows, ids, source, None, experts, experts, case.topk
            outputs = permuted, offsets, inverse, slots
            return Bound(lambda: operator(*local, *outputs), (permuted, inverse, offsets))
        if contender == "sglang":
            shuffle, prepare = self.their(contender), peers.function("sglang", "prepare_moe_input")
            offsets, (first, second) = empty(experts + 1), (empty(experts, 3) for _ in range(2))
            sizes = inverse.view(-1), experts, 2048, case.hidden

            def both() -> None:
                prepare(ids, offsets, None, first, second, slots, *sizes)
                shuffle(rows, slots, permuted)

            return Bound(both, (permuted, inverse, offsets))
        kernel = contender.removeprefix(FORCED) if contender.startswith(FORCED) else None
        out = permuted, inverse, empty(experts + 1), slots, empty(num_ids)
        return Bound(lambda: cupy_moe.moe_permute(rows, ids, experts, out=(*out, None), kernel=kernel), out)

    def wrong(self, contender: str, case: PermuteCase, results: Results, expected: Results) -> str:
        names = cupy_moe.MoEPermutation._fields
        if contender not in self.theirs:
            return unequal(names[:5], results, expected)
        permuted, inverse, offsets = results
        if not torch.equal(offsets.int(), expected[2]):
            return "expert_offsets"
        if contender == "vllm":
            return unequal(names[:2], (permuted, inverse), expected[:2])
        # SGLang promises no order inside an expert.
        slots, right = inverse.flatten().long(), expected[1].flatten().long()
        if not torch.equal(slots.sort().values, right.sort().values):
            return "inverse_ids"
        if not torch.equal(expected[4][slots], expected[4][right]):
            return "the expert of a pair"
        return "" if torch.equal(permuted[slots], expected[0][right]) else "permuted"


class Unpermute(Permute):
    section = "unpermute"
    function = "moe_unpermute"
    theirs: Mapping[str, str] = {"vllm": "moe_unpermute", "sglang": "apply_shuffle_mul_sum"}

    cases: Sequence[PermuteCase] = cases((1.8, 3.0, 17.0, 122.0, 475.0, 25.5, 36.0))
    kernels = None

    title = "moe_unpermute, bf16, with weights"
    telling: Sequence[PermuteCase] = ()
    note = '"TB/s" is what has to be read and written.'

    def inputs(self, case: PermuteCase, kind: str, seed: int) -> Rows:
        rows, ids, weights = super().inputs(case, kind, seed)
        permutation = cupy_moe.moe_permute(rows, ids, case.experts)
        self.offsets = permutation.expert_offsets.long()
        return Rows(permutation.permuted, permutation.inverse_ids, weights)

    def expected(self, case: PermuteCase, inputs: Rows) -> Results:
        total = torch.zeros(case.tokens, case.hidden, device=base.device)
        for k in range(case.topk):
            total += inputs.weights[:, k, None] * inputs.hidden_states[inputs.topk_ids[:, k].long()].float()
        return (total,)

    def bind(self, contender: str, case: PermuteCase, inputs: Rows) -> Bound:
        permuted, slots, weights = inputs
        out = empty(case.tokens, case.hidden, dtype=torch.bfloat16)
        if contender == "vllm":
            operator, offsets = self.their(contender), self.offsets
            return Bound(lambda: operator(permuted, weights, slots, offsets, case.topk, out), (out,))
        if contender == "sglang":
            operator, factors = self.their(contender), weights.to(torch.bfloat16)
            return Bound(lambda: operator(permuted, out, slots.view(-1), factors), (out,))
        return Bound(lambda: cupy_moe.moe_unpermute(permuted, slots, out, topk_weights=weights), (out,))

    def wrong(self, contender: str, case: PermuteCase, results: Results, expected: Results) -> str:
        if contender not in self.theirs:
            return unequal(("output",), results, (expected[0].to(torch.bfloat16),))
        # SGLang's weights are of bf16, and others may fuse products and sums.
        return "" if torch.allclose(results[0].float(), expected[0], rtol=0.02, atol=0.05) else "output"


OPERATORS = (Permute(), Unpermute())
