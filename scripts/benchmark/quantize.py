"""The functions that quantise to fp8."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

import cupy_moe
from cupy_moe.cpu import quantize as cpu

from . import base
from .base import OURS, Bound, Operator, Results, Row, empty, unequal


class QuantizeCase(NamedTuple):
    tokens: int
    hidden: int
    target_us: float | None = None


class PerGroup(Operator):
    section = "quantize"
    function = "per_token_group_quant_fp8"
    theirs: Mapping[str, str] = {"sglang": "sgl_per_token_group_quant_8bit_v2"}
    group_size, gated = 128, False

    cases: Sequence[QuantizeCase] = (
        QuantizeCase(1, 7168, 1.3),
        QuantizeCase(64, 7168, 1.5),
        QuantizeCase(512, 7168, 3.0),
        QuantizeCase(4096, 7168, 21.0),
        QuantizeCase(32768, 7168, 160.0),
        QuantizeCase(32768, 2048, 46.0),
    )

    columns: Mapping[str, Sequence[str]] = {"tokens x hidden": ("tokens", "hidden")}
    note = (
        '"TB/s" is what we read and write, which can be more than the memory gives where inputs stay in L2.'
    )
    telling: Sequence[QuantizeCase] = (QuantizeCase(4096, 7168),)

    @property
    def title(self) -> str:  # type: ignore[override]
        return f"{self.function}, bf16"

    @property
    def size(self) -> str:  # type: ignore[override]
        return "{tokens} x {hidden}, bf16" + (f", groups of {self.group_size}" if self.group_size else "")

    @property
    def more_columns(self) -> Mapping[str, Callable[[Row], str]]:  # type: ignore[override]
        return {"TB/s": self._terabytes}

    def _terabytes(self, row: Row) -> str:
        moved = row["tokens"] * row["hidden"] * (5 if self.gated else 3)
        return f"{moved / row['us']['random'][OURS] / 1e6:.2f}"

    def inputs(self, case: QuantizeCase, kind: str, seed: int) -> torch.Tensor:
        generator = torch.Generator(base.device).manual_seed(seed)
        shape = case.tokens, case.hidden * (2 if self.gated else 1)
        return torch.randn(shape, dtype=torch.bfloat16, device=base.device, generator=generator)

    def expected(self, case: QuantizeCase, inputs: torch.Tensor) -> Results:
        return cpu.quantize(inputs, self.group_size, self.gated)

    def bind(self, contender: str, case: QuantizeCase, inputs: torch.Tensor) -> Bound:
        num_groups = case.hidden // self.group_size if self.group_size else 1
        q = empty(case.tokens, case.hidden, dtype=torch.float8_e4m3fn)
        scales = empty(case.tokens, num_groups, dtype=torch.float32)
        if contender in self.theirs:
            operator, rest = self.their(contender), self._rest()
            return Bound(lambda: operator(inputs, q, scales, *rest), (q, scales))
        function = getattr(cupy_moe, self.function)
        return Bound(lambda: function(inputs, out=(q, scales)), (q, scales))

    def _rest(self) -> tuple[object, ...]:
        """What SGLang's takes after the tensors: eps, limits of codes, no powers of two, no mask."""
        return self.group_size, 1e-10, -448.0, 448.0, False, self.gated, None

    def wrong(self, contender: str, case: QuantizeCase, results: Results, expected: Results) -> str:
        if contender not in self.theirs:
            (q, scales), (right, right_scales) = results, expected
            codes = q.view(torch.uint8), right.view(torch.uint8)
            return unequal(("q", "scales"), (codes[0], scales), (codes[1], right_scales))
        # Theirs may divide, take exponentials or round products in another way: by one code at most.
        (q, scales), (right, right_scales) = ((q.float(), s) for q, s in (results, expected))
        near = (
            ((q - right).abs() <= right.abs() / 8 + 2**-9).all(),
            torch.allclose(scales, right_scales, 1e-2, 0),
        )
        return ", ".join(name for name, is_near in zip(("q", "scales"), near, strict=True) if not is_near)


class PerToken(PerGroup):
    section = "quantize_rows"
    function = "per_token_quant_fp8"
    telling = ()
    theirs: Mapping[str, str] = {"sglang": "sgl_per_token_quant_fp8"}
    group_size = 0

    def _rest(self) -> tuple[object, ...]:
        return ()


class SiluAndMul(PerGroup):
    section = "quantize_silu"
    function = "silu_and_mul_per_token_group_quant_fp8"
    telling = ()
    gated = True

    cases: Sequence[QuantizeCase] = tuple(case._replace(target_us=None) for case in PerGroup.cases)


OPERATORS = (PerGroup(), PerToken(), SiluAndMul())
