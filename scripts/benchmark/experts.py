"""fused_experts: whole layers, from given ids and weights to the summed output."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

import cupy_moe
from cupy_moe.cpu import experts as cpu

from . import base
from .base import Bound, Operator, Results, Row, empty

MODELS = {  # experts, topk, hidden, intermediate
    "small": (4, 2, 64, 32),
    "Qwen3-30B": (128, 8, 2048, 768),
    "Mixtral 8x7B": (8, 2, 4096, 14336),
    "DeepSeek-V3/64": (64, 8, 7168, 2048),
}
BYTES_PER_US, FLOPS_PER_US = 4.48e6, 790e6  # of an H200's memory, and of its tensor cores in bf16
# Routings that calls take in turn, so that weights come from memory as they do in a model.
ROUTINGS = 8


class LayerCase(NamedTuple):
    model: str
    tokens: int
    target_us: float | None = None


class Inputs(NamedTuple):
    hidden: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    routings: list[tuple[torch.Tensor, torch.Tensor]]


@functools.lru_cache(1)
def weights_of(model: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    experts, _, hidden, inner = MODELS[model]
    shapes = (experts, 2 * inner, hidden), (experts, hidden, inner)
    w1, w2 = (torch.empty(s, dtype=torch.bfloat16, device=device).normal_(std=0.02) for s in shapes)
    return w1, w2


def floor_us(row: Row) -> float:
    """What the bytes of the weights, or the products, take at the least."""
    experts, topk, hidden, inner = MODELS[row["model"]]
    hit = experts * (1 - (1 - topk / experts) ** row["tokens"])
    return max(
        hit * 6 * inner * hidden / BYTES_PER_US, 6 * row["tokens"] * topk * inner * hidden / FLOPS_PER_US
    )


class Experts(Operator):
    section = "experts"
    function = "fused_experts"
    theirs: Mapping[str, str] = {}

    cases: Sequence[LayerCase] = (
        LayerCase("small", 3),
        LayerCase("Qwen3-30B", 1, 20),
        LayerCase("Qwen3-30B", 8, 116),
        LayerCase("Qwen3-30B", 64, 278),
        LayerCase("Qwen3-30B", 512, 295),
        LayerCase("Qwen3-30B", 4096, 560),
        LayerCase("Qwen3-30B", 16384, 1850),
        LayerCase("Mixtral 8x7B", 1, 166),
        LayerCase("Mixtral 8x7B", 8, 576),
        LayerCase("Mixtral 8x7B", 64, 640),
        LayerCase("Mixtral 8x7B", 512, 760),
        LayerCase("Mixtral 8x7B", 4096, 4200),
        LayerCase("Mixtral 8x7B", 16384, 15800),
        LayerCase("DeepSeek-V3/64", 1, 166),
        LayerCase("DeepSeek-V3/64", 8, 830),
        LayerCase("DeepSeek-V3/64", 64, 1280),
        LayerCase("DeepSeek-V3/64", 512, 1380),
        LayerCase("DeepSeek-V3/64", 4096, 4300),
        LayerCase("DeepSeek-V3/64", 16384, 15800),
    )
    title = "fused_experts, bf16"
    columns: Mapping[str, Sequence[str]] = {"model": ("model",), "tokens": ("tokens",)}
    more_columns: Mapping[str, Callable[[Row], str]] = {"floor": lambda row: f"{floor_us(row):.0f}"}
    note = (
        "The floor is what reading the weights of the experts hit takes at 4.48 TB/s, or the products at 790"
        " TFLOP/s. Calls take other routings in turn, so weights come from memory."
    )
    size = "{model}, {tokens} tokens"
    telling = (LayerCase("Qwen3-30B", 1), LayerCase("Qwen3-30B", 64), LayerCase("Mixtral 8x7B", 4096))

    def inputs(self, case: LayerCase, kind: str, seed: int) -> Inputs:
        experts, topk, hidden, _ = MODELS[case.model]
        torch.manual_seed(seed)
        x = torch.randn(case.tokens, hidden, dtype=torch.bfloat16, device=base.device)
        routings = []
        for _ in range(ROUTINGS if case.tokens <= 512 else 2):
            scores = torch.rand(case.tokens, experts, device=base.device)
            weights, ids = scores.topk(topk, dim=1)
            routings.append((weights, ids.int()))
        return Inputs(x, *weights_of(case.model, base.device), routings)

    def expected(self, case: LayerCase, inputs: Inputs) -> Any:
        """Of some tokens, as all would take too long."""
        some = torch.linspace(0, case.tokens - 1, min(case.tokens, 8)).long().to(base.device)
        weights, ids = inputs.routings[0]
        return some, cpu.fused_experts(inputs.hidden[some], inputs.w1, inputs.w2, weights[some], ids[some])

    def bind(self, contender: str, case: LayerCase, inputs: Inputs) -> Bound:
        experts, topk, hidden, inner = MODELS[case.model]
        size = cupy_moe.experts_workspace_bytes(case.tokens, topk, hidden, inner, experts)
        out, workspace = empty(case.tokens, hidden, dtype=torch.bfloat16), empty(size, dtype=torch.uint8)
        turns = itertools.cycle(inputs.routings)
        given = inputs.hidden, inputs.w1, inputs.w2

        def call() -> Any:
            return cupy_moe.fused_experts(*given, *next(turns), workspace=workspace, out=out)

        return Bound(call, (out,))

    def wrong(self, contender: str, case: LayerCase, results: Results, expected: Any) -> str:
        some, right = expected
        error = (results[0][some].float() - right.float()).abs().max()
        return "" if error <= 0.02 * right.float().abs().max() else "output"


OPERATORS = (Experts(),)
