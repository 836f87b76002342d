"""route: gating and alignment, beside the two functions of each library, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

import cupy_moe
from cupy_moe.cpu import align as cpu
from cupy_moe.plans.route import ROUTE_KERNELS

from . import peers
from .align import Align, AlignCase
from .base import FORCED, OURS, Bound, Kernels, Operator, Results
from .gate import GateCase, Routing, Softmax


class RouteCase(NamedTuple):
    tokens: int
    topk: int
    experts: int
    block_size: int = 128
    target_us: float | None = None

    @property
    def gate(self) -> GateCase:
        return GateCase(self.tokens, self.experts, self.topk)

    @property
    def align(self) -> AlignCase:
        return AlignCase(self.tokens, self.topk, self.experts, self.block_size)


class Route(Operator):
    """Alignments are checked against the ids that a contender itself has found."""

    section = "route"
    function = "route"
    theirs: Mapping[str, str] = {"vllm": "topk_softmax", "sglang": "topk_softmax"}

    cases: Sequence[RouteCase] = (
        RouteCase(1, 8, 256, target_us=2.7),
        RouteCase(8, 8, 256),
        RouteCase(64, 8, 256, target_us=3.3),
        RouteCase(128, 8, 128),
        RouteCase(512, 8, 256, target_us=4.5),
        RouteCase(4096, 2, 8, target_us=4.5),
        RouteCase(4096, 8, 256, target_us=7.5),
        RouteCase(16384, 8, 256, target_us=16.0),
    )
    kernels = Kernels("route_kernels", ROUTE_KERNELS)

    title = "route: topk_softmax, fp32, renormalized, and moe_align_block_size"
    columns: Mapping[str, Sequence[str]] = {
        "tokens x topk": ("tokens", "topk"), "experts": ("experts",), "block": ("block_size",),
    }  # fmt: skip
    note = "The others, and the kernel `separate`, are two calls."
    size = "{tokens} tokens, top-{topk} of {experts}, blocks of {block_size}"
    telling: Sequence[RouteCase] = ()

    def inputs(self, case: RouteCase, kind: str, seed: int) -> torch.Tensor:
        return Softmax().inputs(case.gate, kind, seed)

    def expected(self, case: RouteCase, inputs: torch.Tensor) -> Routing:
        return Softmax().expected(case.gate, inputs)

    def bind(self, contender: str, case: RouteCase, inputs: torch.Tensor) -> Bound:
        if contender in self.theirs:
            gating = Softmax().bind(contender, case.gate, inputs)
            aligning = Align().bind(contender, case.align, gating.outputs[1])

            def call() -> None:
                gating.call()
                aligning.call()

            return Bound(call, (*gating.outputs, *aligning.outputs))
        kernel = None if contender == OURS else contender.removeprefix(FORCED)
        out = tuple(map(torch.empty_like, cupy_moe.route(inputs, case.topk, case.block_size)))
        given = inputs, case.topk, case.block_size, True
        return Bound(lambda: cupy_moe.route(*given, out=out, kernel=kernel), out)

    def wrong(self, contender: str, case: RouteCase, results: Results, expected: Routing) -> str:
        if problem := Softmax().wrong(contender, case.gate, results[:2], expected):
            return problem
        aligned = cpu.moe_align_block_size(results[1], case.block_size, case.experts)
        return Align().wrong(contender, case.align, results[2:], aligned)

    def contenders(self, found: Sequence[str]) -> list[str]:  # type: ignore[override]
        return [
            name
            for name in super().contenders(found)
            if name == OURS or peers.function(name, Align.theirs[name]) is not None
        ]


OPERATORS = (Route(),)
