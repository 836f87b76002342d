"""fused_experts: whole layers, from given ids and weights to the summed output."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

import cupy_moe
from cupy_moe.cpu.experts import activate

from . import base, peers, plot
from .base import OURS, Bound, Host, Operator, Picture, Results, Row, empty
from .timing import CALLS_PER_GRAPH, Call

MODELS = {  # experts, topk, hidden, intermediate
    "Qwen3-30B": (128, 8, 2048, 768),
    "Mixtral 8x7B": (8, 2, 4096, 14336),
    "DeepSeek-V3/64": (64, 8, 7168, 2048),
}
BYTES_PER_US, FLOPS_PER_US = 4.48e6, 790e6  # of an H200's memory, and of its tensor cores in bf16
COMPARED_TOKENS = 16  # of the outputs; all would take too long in fp64
DENSE, DENSE_TOKENS = "dense", 16384


class LayerCase(NamedTuple):
    model: str
    tokens: int
    target_us: float | None = None


HOST = LayerCase("Qwen3-30B", 1)


class Weights:
    def __init__(self, model: str, device: str) -> None:
        experts, _, hidden, inner = MODELS[model]
        shapes = (experts, 2 * inner, hidden), (experts, hidden, inner)
        self.w1, self.w2 = (
            torch.empty(s, dtype=torch.bfloat16, device=device).normal_(std=0.02) for s in shapes
        )

    @functools.cached_property
    def interleaved(self) -> torch.Tensor:
        """w1 with gate and up rows in turn, as one of the peers wants it."""
        gate, up = self.w1.chunk(2, dim=1)
        return torch.stack((gate, up), dim=2).flatten(1, 2)


# One model's at a time: those of all sizes that follow each other are the same.
weights_of = functools.lru_cache(1)(Weights)


class Routing(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


class Inputs(NamedTuple):
    hidden: torch.Tensor
    weights: Weights
    routing: Routing

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.hidden, self.weights.w1, self.weights.w2, *self.routing


def random_routing(case: LayerCase) -> Routing:
    """Any experts, all equally likely; weights of a token add up to one, as some peers take for granted."""
    experts, topk, _, _ = MODELS[case.model]
    ids = torch.rand(case.tokens, experts, device=base.device).topk(topk, dim=1).indices
    return Routing(torch.randn(case.tokens, topk, device=base.device).softmax(1), ids.int())


@functools.lru_cache(1)
def memory_of(model: str, tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and workspace: the same ones at every call of a graph, as the peers' allocations are."""
    experts, topk, hidden, inner = MODELS[model]
    size = cupy_moe.experts_workspace_bytes(tokens, topk, hidden, inner, experts)
    out = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=device)
    return out, torch.empty(size, dtype=torch.uint8, device=device)


def flops(row: Row, products: int) -> float:
    """Of so many of the three products of equal size: gate, up and down."""
    _, topk, hidden, inner = MODELS[row["model"]]
    return 2.0 * products * row["tokens"] * topk * hidden * inner


def floor_us(row: Row) -> float:
    """What the bytes of the weights, or the products, take at the least."""
    experts, topk, hidden, inner = MODELS[row["model"]]
    hit = experts * (1 - (1 - topk / experts) ** row["tokens"])
    return max(hit * 6 * inner * hidden / BYTES_PER_US, flops(row, 3) / FLOPS_PER_US)


def _share(row: Row) -> str:
    return f"{floor_us(row) / row['us']['random'][OURS]:.0%}"


def _teraflops(row: Row) -> str:
    return f"{flops(row, 3) / row['us']['random'][OURS] / 1e6:.0f}"


def _dense_teraflops(row: Row) -> str:
    us = row["us"]["random"].get(DENSE)
    return f"{flops(row, 2) / us / 1e6:.0f}" if us else "-"


def host_calls(found: Sequence[str], seed: int) -> dict[str, Call]:
    operator = Experts()
    inputs = operator.inputs(HOST, "random", seed)
    arguments = inputs.arguments()
    calls: dict[str, Call] = {
        "cupy_moe": lambda: cupy_moe.fused_experts(*arguments),
        "cupy_moe, workspace= and out=": operator.bind(OURS, HOST, inputs).call,
    }
    if "vllm" in found:
        calls["vllm"] = operator.bind("vllm", HOST, inputs).call
    return calls


class Experts(Operator):
    section = "experts"
    function = "fused_experts"
    theirs: Mapping[str, str] = peers.EXPERTS

    cases: Sequence[LayerCase] = (
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
    host = Host("experts_host", f"{HOST.model}, one token", host_calls, {})
    pictures = (
        Picture(
            "experts", "-experts.svg", f"GPU time of {function} over tokens, beside the roofline",
            functools.partial(
                plot.beside_floor, panel="model", x="tokens", floor_us=floor_us, as_share=False,
                y_label=f"{function}, us",
            ),
        ),
        Picture(
            "experts", "-roofline.svg", f"Share of the roofline that {function} reaches, over tokens",
            functools.partial(
                plot.beside_floor, panel="model", x="tokens", floor_us=floor_us, as_share=True,
                y_label=f"{function}, % of the roofline",
            ),
        ),
    )  # fmt: skip

    title = "fused_experts, bf16"
    columns: Mapping[str, Sequence[str]] = {"model": ("model",), "tokens": ("tokens",)}
    more_columns: Mapping[str, Callable[[Row], str]] = {
        "roofline": lambda row: f"{floor_us(row):.0f}",
        "share": _share,
        "TFLOP/s": _teraflops,
        "dense": _dense_teraflops,
    }
    note = (
        "With SiLU. The calls of a graph have other routings in turn, so that weights come from memory."
        ' "roofline" is what reading the weights of the experts hit takes at 4.48 TB/s, or the products at'
        ' 790 TFLOP/s, which is an H200; "share" is what part of our time that is. "TFLOP/s" are ours, and'
        ' "dense" those of cuBLAS in one product of the size of GEMM 1, without experts. The routing of'
        " triton_kernels is not timed. Errors are those of 16 tokens against fp64: the rms of the difference"
        " over that of the result, and the largest difference over the largest value. vLLM's host time is"
        " that of its Python function, which calls the activation by way of Python here."
    )
    size = "{model}, {tokens} tokens"
    telling = (LayerCase("Qwen3-30B", 1), LayerCase("Qwen3-30B", 64), LayerCase("Mixtral 8x7B", 4096))

    def inputs(self, case: LayerCase, kind: str, seed: int) -> Inputs:
        torch.manual_seed(seed)
        hidden = torch.randn(case.tokens, MODELS[case.model][2], dtype=torch.bfloat16, device=base.device)
        return Inputs(hidden, weights_of(case.model, base.device), random_routing(case))

    def turns(self, case: LayerCase, inputs: Inputs) -> list[Inputs]:
        # Many tokens hit all experts, whose weights are more than L2 holds.
        others = CALLS_PER_GRAPH - 1 if case.tokens <= 64 else 1
        return [inputs, *(inputs._replace(routing=random_routing(case)) for _ in range(others))]

    def references(self, case: LayerCase, inputs: Inputs) -> dict[str, Call]:
        """cuBLAS's product of GEMM 1's size."""
        if case.tokens != DENSE_TOKENS:
            return {}
        rows = inputs.hidden.repeat(MODELS[case.model][1], 1)
        weight = inputs.weights.w1[0].T
        out = empty(len(rows), weight.shape[1], dtype=rows.dtype)
        return {DENSE: lambda: torch.mm(rows, weight, out=out)}

    def expected(self, case: LayerCase, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Some tokens, and what they get in fp64."""
        some = torch.linspace(0, case.tokens - 1, min(case.tokens, COMPARED_TOKENS)).long().to(base.device)
        hidden, w1, w2, weights, ids = inputs.arguments()
        x, weights, ids = hidden[some].double(), weights[some].double(), ids[some]
        total = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            rows, slots = (ids == expert).nonzero(as_tuple=True)
            inner = activate("silu", x[rows] @ w1[expert].double().T)
            total[rows] += weights[rows, slots, None] * (inner @ w2[expert].double().T)
        return some, total

    def bind(self, contender: str, case: LayerCase, inputs: Inputs) -> Bound:
        if contender in self.theirs:
            layer = self.their(contender)(_problem(case, inputs), inputs.routing)["layer"]
            return Bound(lambda: (layer(),))
        out, workspace = memory_of(case.model, case.tokens, base.device)
        arguments = inputs.arguments()
        return Bound(lambda: cupy_moe.fused_experts(*arguments, workspace=workspace, out=out), (out,))

    def their(self, peer: str) -> Any:
        return peers.adapters.get(peer)

    def wrong(self, contender: str, case: LayerCase, results: Results, expected: Any) -> str:
        return "" if self.errors(case, results, expected)["max"] <= 0.02 else "output"

    def errors(self, case: LayerCase, results: Results, expected: Any) -> dict[str, float]:
        return relative_errors(results, *expected)


def relative_errors(results: Results, some: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    """Of some tokens' outputs."""
    difference = results[0][some].double() - right
    return {
        "rms": float(difference.norm() / right.norm()),
        "max": float(difference.abs().max() / right.abs().max()),
    }


def _problem(case: LayerCase, inputs: Inputs) -> SimpleNamespace:
    """As the adapters of the peers take it; GEMM 2 by itself, whose rows `act` makes, is not timed."""
    experts, topk, hidden, inner = MODELS[case.model]
    weights = inputs.weights
    return SimpleNamespace(
        E=experts, K=topk, H=hidden, I=inner, hidden=inputs.hidden, hidden_q=None,
        w1=weights.w1, w2=weights.w2, w1_scale=None, w2_scale=None,
        w1_interleaved=lambda: weights.interleaved, act=lambda rows: (None, None),
    )  # fmt: skip


OPERATORS = (Experts(),)
