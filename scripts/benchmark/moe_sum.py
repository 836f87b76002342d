"""moe_sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

import cupy_moe

from . import base
from .base import OURS, Bound, Operator, Results, Row, empty


class SumCase(NamedTuple):
    tokens: int
    topk: int
    hidden: int
    target_us: float | None = None


def terabytes(row: Row) -> str:
    moved = 2 * row["tokens"] * row["hidden"] * (row["topk"] + 1)
    return f"{moved / row['us']['random'][OURS] / 1e6:.2f}"


class Sum(Operator):
    section = "sum"
    function = "moe_sum"
    theirs: Mapping[str, str] = {"vllm": "moe_sum", "sglang": "moe_sum_reduce"}

    cases: Sequence[SumCase] = (
        SumCase(1, 8, 7168, 1.6),
        SumCase(16, 8, 4096, 1.7),
        SumCase(64, 8, 7168, 2.5),
        SumCase(512, 8, 4096, 5.4),
        SumCase(4096, 2, 4096, 24.5),
        SumCase(4096, 8, 7168, 118.0),
        SumCase(16384, 8, 7168, 465.0),
    )

    title = "moe_sum, bf16"
    columns: Mapping[str, Sequence[str]] = {"tokens x topk x hidden": ("tokens", "topk", "hidden")}
    more_columns: Mapping[str, Callable[[Row], str]] = {"TB/s": terabytes}
    note = (
        '"TB/s" is what we read and write, which can be more than the memory gives where inputs stay in L2.'
    )
    size = "{tokens} tokens, {topk} x {hidden} each, bf16"
    telling = (SumCase(64, 8, 7168),)

    def inputs(self, case: SumCase, kind: str, seed: int) -> torch.Tensor:
        generator = torch.Generator(base.device).manual_seed(seed)
        shape = (case.tokens, case.topk, case.hidden)
        return torch.randn(shape, dtype=torch.bfloat16, device=base.device, generator=generator)

    def expected(self, case: SumCase, inputs: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(case.tokens, case.hidden, dtype=torch.float64, device=base.device)
        for k in range(case.topk):
            total += inputs[:, k]
        return total

    def bind(self, contender: str, case: SumCase, inputs: torch.Tensor) -> Bound:
        out = empty(case.tokens, case.hidden, dtype=torch.bfloat16)
        if contender in self.theirs:
            operator, last = self.their(contender), (1.0,) if contender == "sglang" else ()  # the factor
            return Bound(lambda: operator(inputs, out, *last), (out,))
        return Bound(lambda: cupy_moe.moe_sum(inputs, out=out), (out,))

    def wrong(self, contender: str, case: SumCase, results: Results, expected: torch.Tensor) -> str:
        # Sums in fp32, rounded to bf16 once.
        error = (results[0] - expected).abs_()
        return "" if bool((error <= expected.abs() * 2**-8 + 1e-4).all()) else "output"


OPERATORS = (Sum(),)
