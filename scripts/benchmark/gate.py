"""topk_softmax, topk_sigmoid, topk_softplus_sqrt and grouped_topk."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

import cupy_moe

from . import base
from .base import Bound, Operator, Results, empty

NUM_GROUPS, TOPK_GROUP, FACTOR = 8, 4, 2.5  # as in DeepSeek's models


class GateCase(NamedTuple):
    tokens: int
    experts: int
    topk: int
    target_us: float | None = None


class Routing(NamedTuple):
    """What gating is to find, in float64: the k experts of the highest `choice`, weighed by their scores."""

    scores: torch.Tensor
    choice: torch.Tensor


class Softmax(Operator):
    """The other two differ in how they score, what they choose from, and in their arguments."""

    section = "gate"
    function = "topk_softmax"
    theirs: Mapping[str, str] = {"vllm": "topk_softmax", "sglang": "topk_softmax"}

    cases: Sequence[GateCase] = (
        GateCase(1, 256, 8, 2.5),
        GateCase(64, 256, 8, 2.8),
        GateCase(4096, 64, 2, 2.2),
        GateCase(4096, 128, 8, 4.0),
        GateCase(4096, 256, 8, 4.5),
        GateCase(4096, 512, 10, 7.5),
        GateCase(16384, 256, 8, 12.0),
    )
    factor = 1.0
    ambiguous = 0.0  # rows, of all, that may have other experts

    title = "topk_softmax, fp32, renormalized"
    columns: Mapping[str, Sequence[str]] = {"tokens x experts": ("tokens", "experts"), "topk": ("topk",)}
    size = "{tokens} tokens, top-{topk} of {experts}"
    telling: Sequence[GateCase] = (GateCase(4096, 256, 8),)

    def inputs(self, case: GateCase, kind: str, seed: int) -> torch.Tensor:
        generator = torch.Generator(base.device).manual_seed(seed)
        return torch.randn(case.tokens, case.experts, device=base.device, generator=generator)

    def expected(self, case: GateCase, inputs: torch.Tensor) -> Routing:
        scores = inputs.double().softmax(-1)
        return Routing(scores, scores)

    def bind(self, contender: str, case: GateCase, inputs: torch.Tensor) -> Bound:
        out = self.outputs(case)
        if contender == "sglang":
            operator = self.their(contender)
            return Bound(lambda: operator(*out, inputs, True, 0.0, None), out)
        if contender == "vllm":
            operator = self.their(contender)
            rows = empty(case.tokens, case.topk)  # a third output, which nobody reads any more
            return Bound(lambda: operator(*out, rows, inputs, True, None), out)
        return Bound(lambda: cupy_moe.topk_softmax(inputs, case.topk, True, out=out), out)

    def outputs(self, case: GateCase) -> tuple[torch.Tensor, torch.Tensor]:
        return empty(case.tokens, case.topk, dtype=torch.float32), empty(case.tokens, case.topk)

    def wrong(self, contender: str, case: GateCase, results: Results, expected: Routing) -> str:
        weights, ids = results[0].double(), results[1].long()
        if bool(((ids < 0) | (ids >= case.experts)).any()):
            return "topk_ids out of range"
        best = expected.choice.topk(case.topk).values
        distinct = bool((ids.sort().values.diff() > 0).all())
        # Two scores that fp32 cannot tell apart may come in either order.
        other = ~torch.isclose(expected.choice.gather(1, ids), best, rtol=1e-5, atol=0).all(-1)
        if not distinct or float(other.double().mean()) > self.ambiguous:
            return "topk_ids"
        scores = expected.scores.gather(1, ids)
        scores *= self.factor / scores.sum(-1, keepdim=True)
        return "" if torch.allclose(weights, scores, rtol=1e-5, atol=0) else "topk_weights"


class Sigmoid(Softmax):
    """With a bias for the selection, as models with sigmoid scores have it."""

    section = "sigmoid"
    function = "topk_sigmoid"
    theirs: Mapping[str, str] = {"vllm": "topk_sigmoid", "sglang": "topk_sigmoid"}
    cases: Sequence[GateCase] = (
        GateCase(1, 256, 8),
        GateCase(64, 256, 8),
        GateCase(4096, 128, 8),
        GateCase(4096, 256, 8),
        GateCase(16384, 256, 8),
    )
    title = "topk_sigmoid, fp32, renormalized, with a bias"

    def expected(self, case: GateCase, inputs: torch.Tensor) -> Routing:
        scores = inputs.double().sigmoid()
        return Routing(scores, scores + _bias(case.experts, base.device))

    def bind(self, contender: str, case: GateCase, inputs: torch.Tensor) -> Bound:
        out, bias = self.outputs(case), _bias(case.experts, base.device)
        if contender == "sglang":
            operator = self.their(contender)
            return Bound(lambda: operator(*out, inputs, True, bias), out)
        if contender == "vllm":
            operator, rows = self.their(contender), empty(case.tokens, case.topk)
            return Bound(lambda: operator(*out, rows, inputs, True, bias, 1.0), out)
        return Bound(
            lambda: cupy_moe.topk_sigmoid(inputs, case.topk, True, e_score_correction_bias=bias, out=out), out
        )


class SoftplusSqrt(Sigmoid):
    section = "softplus_sqrt"
    function = "topk_softplus_sqrt"
    theirs: Mapping[str, str] = {"vllm": "topk_softplus_sqrt"}
    cases = (GateCase(1, 256, 8), GateCase(64, 256, 8), GateCase(4096, 256, 8), GateCase(16384, 256, 8))
    telling = ()
    title = "topk_softplus_sqrt, fp32, renormalized, with a bias"

    def expected(self, case: GateCase, inputs: torch.Tensor) -> Routing:
        logits = inputs.double()
        scores = torch.logaddexp(logits, torch.zeros_like(logits)).sqrt()
        return Routing(scores, scores + _bias(case.experts, base.device))

    def bind(self, contender: str, case: GateCase, inputs: torch.Tensor) -> Bound:
        out, bias = self.outputs(case), _bias(case.experts, base.device)
        if contender == "vllm":
            operator, rows = self.their(contender), empty(case.tokens, case.topk)
            theirs = *out, rows, inputs, True, 1.0, bias, None, None
            return Bound(lambda: operator(*theirs), out)
        ours = functools.partial(cupy_moe.topk_softplus_sqrt, e_score_correction_bias=bias, out=out)
        return Bound(lambda: ours(inputs, case.topk, True), out)


class Grouped(Sigmoid):
    section = "grouped"
    function = "grouped_topk"
    theirs: Mapping[str, str] = {"vllm": "grouped_topk", "sglang": "moe_fused_gate"}
    cases = (
        GateCase(1, 256, 8),
        GateCase(64, 256, 8),
        GateCase(512, 256, 8),
        GateCase(4096, 256, 8),
        GateCase(16384, 256, 8),
    )
    factor = FACTOR
    ambiguous = 0.001  # two groups that fp32 cannot tell apart
    title = f"grouped_topk, sigmoid, fp32, renormalized, with a bias, {TOPK_GROUP} of {NUM_GROUPS} groups"
    size = f"{Softmax.size}, {TOPK_GROUP} of {NUM_GROUPS} groups"

    def expected(self, case: GateCase, inputs: torch.Tensor) -> Routing:
        scores, choice = super().expected(case, inputs)
        groups = choice.unflatten(-1, (NUM_GROUPS, -1))
        best = groups.topk(2).values.sum(-1).topk(TOPK_GROUP).indices
        kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
        return Routing(scores, groups.masked_fill(~kept[..., None], -math.inf).flatten(1))

    def bind(self, contender: str, case: GateCase, inputs: torch.Tensor) -> Bound:
        bias = _bias(case.experts, base.device)
        if contender == "sglang":
            operator = self.their(contender)
            theirs = inputs, bias, NUM_GROUPS, TOPK_GROUP, case.topk, 0, FACTOR, True
            return Bound(lambda: operator(*theirs))
        if contender == "vllm":
            operator = self.their(contender)
            vllms = inputs, NUM_GROUPS, TOPK_GROUP, case.topk, True, FACTOR, bias, 1
            return Bound(lambda: operator(*vllms))
        out = self.outputs(case)
        arguments = inputs, case.topk, True, NUM_GROUPS, TOPK_GROUP, "sigmoid", FACTOR, bias
        return Bound(lambda: cupy_moe.grouped_topk(*arguments, out=out), out)


@functools.cache
def _bias(experts: int, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(experts)
    return torch.rand(experts, device=device, generator=generator)


OPERATORS = (Softmax(), Sigmoid(), SoftplusSqrt(), Grouped())
