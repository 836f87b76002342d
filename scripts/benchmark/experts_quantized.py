"""fused_experts with quantised weights: whole layers, as those of 16 bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

import cupy_moe
from cupy_moe import Quantization
from cupy_moe.cpu.experts import activate

from . import base, peers
from .base import OURS, Bound, Operator, Results, Row
from .experts import (
    BYTES_PER_US,
    COMPARED_TOKENS,
    MODELS,
    LayerCase,
    flops,
    memory_of,
    random_routing,
    relative_errors,
)
from .timing import CALLS_PER_GRAPH

BLOCK = 128  # rows and columns with one scale of fp8, columns of int4
FP8_FLOPS_PER_US = 1580e6


class Stored(NamedTuple):
    w1: torch.Tensor
    w2: torch.Tensor
    quantization: Quantization


def _random(rows: int, columns: int) -> torch.Tensor:
    return torch.empty(rows, columns, device=base.device).normal_(std=0.02)


def _fp8(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = _random(rows, columns).view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).view(rows, columns)
    return codes.to(torch.float8_e4m3fn), scale


def _int8(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = _random(rows, columns)
    scale = values.abs().amax(dim=1) / 127
    return (values / scale[:, None]).round().to(torch.int8), scale


def _int4(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    groups = _random(rows, columns).view(rows, columns // BLOCK, BLOCK)
    scale = (groups.abs().amax(dim=2) / 7).bfloat16()
    codes = ((groups / scale[:, :, None]).round() + 8).clamp(0, 15).to(torch.uint8).view(rows, columns)
    return codes[:, ::2] | codes[:, 1::2] << 4, scale


Make = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
FORMATS: dict[str, tuple[Make, Callable[..., Quantization], float]] = {  # and bytes of a weight
    "fp8": (_fp8, Quantization.fp8_block, 1),
    "int8": (_int8, Quantization.int8, 1),
    "int4": (_int4, Quantization.int4, 0.5),
}


@functools.lru_cache(1)
def stored_weights(weight_format: str, model: str, device: str) -> Stored:
    """One model's at a time, made expert by expert."""
    experts, _, hidden, inner = MODELS[model]
    make, quantization, _ = FORMATS[weight_format]
    made = []
    for shape in ((2 * inner, hidden), (hidden, inner)):
        made.append(
            [torch.stack(parts) for parts in zip(*(make(*shape) for _ in range(experts)), strict=True)]
        )
    (w1, scale1), (w2, scale2) = made
    return Stored(w1, w2, quantization(scale1, scale2))


class Inputs(NamedTuple):
    hidden: torch.Tensor
    stored: Stored
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


class QuantizedExperts(Operator):
    function = "fused_experts"
    columns: Mapping[str, Sequence[str]] = {"model": ("model",), "tokens": ("tokens",)}

    def __init__(
        self,
        weight_format: str,
        title: str,
        cases: Sequence[LayerCase],
        theirs: Mapping[str, str],
        note: str,
    ) -> None:
        self.format, self.section, self.title = weight_format, f"experts_{weight_format}", title
        self.cases, self.theirs, self.note = cases, theirs, note
        self.size = f"{{model}}, {{tokens}} tokens, {weight_format}"
        self.telling = [LayerCase("DeepSeek-V3/64", 4096)] if theirs else []
        self.more_columns = {
            "roofline": lambda row: f"{self.floor_us(row):.0f}",
            "share": lambda row: f"{self.floor_us(row) / row['us']['random'][OURS]:.0%}",
            "TFLOP/s": lambda row: f"{flops(row, 3) / row['us']['random'][OURS] / 1e6:.0f}",
        }

    def floor_us(self, row: Row) -> float:
        """What the bytes of the weights, or the products of fp8, take at the least."""
        experts, topk, hidden, inner = MODELS[row["model"]]
        hit = experts * (1 - (1 - topk / experts) ** row["tokens"])
        read_us = hit * 3 * inner * hidden * FORMATS[self.format][2] / BYTES_PER_US
        return max(read_us, flops(row, 3) / FP8_FLOPS_PER_US)

    def inputs(self, case: LayerCase, kind: str, seed: int) -> Inputs:
        torch.manual_seed(seed)
        hidden = torch.randn(case.tokens, MODELS[case.model][2], dtype=torch.bfloat16, device=base.device)
        return Inputs(hidden, stored_weights(self.format, case.model, base.device), *random_routing(case))

    def turns(self, case: LayerCase, inputs: Inputs) -> list[Inputs]:
        others = CALLS_PER_GRAPH - 1 if case.tokens <= 64 else 1
        return [inputs, *(Inputs(*inputs[:2], *random_routing(case)) for _ in range(others))]

    def expected(self, case: LayerCase, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Some tokens, and what they get in fp64 of what the weights stand for."""
        some = torch.linspace(0, case.tokens - 1, min(case.tokens, COMPARED_TOKENS)).long().to(base.device)
        w1, w2, quantization = inputs.stored
        x, weights, ids = (
            inputs.hidden[some].double(),
            inputs.topk_weights[some].double(),
            inputs.topk_ids[some],
        )
        total = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            rows, slots = (ids == expert).nonzero(as_tuple=True)
            first, second = quantization.dequantize(w1, w2, expert)
            inner = activate("silu", x[rows] @ first.double().T)
            total[rows] += weights[rows, slots, None] * (inner @ second.double().T)
        return some, total

    def bind(self, contender: str, case: LayerCase, inputs: Inputs) -> Bound:
        if contender in self.theirs:
            routing = SimpleNamespace(topk_weights=inputs.topk_weights, topk_ids=inputs.topk_ids)
            layer = self.their(contender)(_problem(case, inputs), routing)["layer"]
            return Bound(lambda: (layer(),))
        out, workspace = memory_of(case.model, case.tokens, base.device)
        hidden, (w1, w2, quantization), weights, ids = inputs
        more: Any = {"quantization": quantization, "workspace": workspace, "out": out}
        return Bound(lambda: cupy_moe.fused_experts(hidden, w1, w2, weights, ids, **more), (out,))

    def their(self, peer: str) -> Any:
        return peers.adapters.get(peer)

    def wrong(self, contender: str, case: LayerCase, results: Results, expected: Any) -> str:
        # Rows may become fp8, too, of which 3 bits of mantissa are within a sixteenth.
        most = 0.08 if self.format == "fp8" else 0.02
        return "" if self.errors(case, results, expected)["max"] <= most else "output"

    def errors(self, case: LayerCase, results: Results, expected: Any) -> dict[str, float]:
        return relative_errors(results, *expected)


def _problem(case: LayerCase, inputs: Inputs) -> SimpleNamespace:
    """As the adapters of the peers take it; GEMM 2 by itself is not timed, nor rows that are fp8 already."""
    experts, topk, hidden, inner = MODELS[case.model]
    w1, w2, quantization = inputs.stored
    rows = torch.empty(case.tokens, hidden, dtype=torch.float8_e4m3fn, device=base.device)
    scales = torch.ones(case.tokens, hidden // BLOCK, device=base.device)

    def act(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.empty(rows, inner, dtype=torch.float8_e4m3fn, device=base.device)
        return codes, torch.ones(rows, inner // BLOCK, device=base.device)

    return SimpleNamespace(
        E=experts, K=topk, H=hidden, I=inner, hidden=inputs.hidden, hidden_q=(rows, scales), w1=w1, w2=w2,
        w1_scale=quantization.w1_scale, w2_scale=quantization.w2_scale, act=act,
    )  # fmt: skip


_TARGETS = {
    "Qwen3-30B": (15, 65, 145, 165, 400, 1400),
    "Mixtral 8x7B": (92, 295, 335, 480, 2700, 10300),
    "DeepSeek-V3/64": (88, 425, 650, 740, 2900, 10500),
}
_TOKENS = 1, 8, 64, 512, 4096, 16384
_FP8_CASES = tuple(
    LayerCase(model, tokens, target)
    for model, targets in _TARGETS.items()
    for tokens, target in zip(_TOKENS, targets, strict=True)
)
_INT_CASES = tuple(LayerCase("DeepSeek-V3/64", tokens) for tokens in _TOKENS[:5])
_NOTE = (
    'As in bf16. "roofline" is for weights of so many bits, and products at 1580 TFLOP/s. Errors are'
    " against fp64 of what the weights stand for, with hidden states as they are"
)
OPERATORS = (
    QuantizedExperts(
        "fp8",
        "fused_experts, fp8 weights in blocks of 128 x 128",
        _FP8_CASES,
        peers.EXPERTS_FP8,
        f"{_NOTE}, which the peers quantise at any size, and we where that is faster.",
    ),
    QuantizedExperts("int8", "fused_experts, int8 weights by channels", _INT_CASES, {}, f"{_NOTE}."),
    QuantizedExperts("int4", "fused_experts, int4 weights by groups of 128", _INT_CASES, {}, f"{_NOTE}."),
)
