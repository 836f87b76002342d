"""Each operator: its inputs, who computes it and how they are called, and what is a wrong result."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import routing
import torch

import cupy_moe
from cupy_moe.cpu import align as cpu_align
from cupy_moe.plans.align import ALIGN_KERNELS, aligned_sizes
from cupy_moe.plans.base import ceil_div

from .cases import (
    ALIGN,
    FACTOR,
    GATE,
    GROUPED,
    NUM_GROUPS,
    SIGMOID,
    SUM,
    TIMED_ROUTINGS,
    TOPK_GROUP,
    AlignCase,
    GateCase,
    SumCase,
)

device = "cuda"  # tests put "cpu"
ours: Any = cupy_moe  # not all of whose operators need exist
FORCED = "kernel "  # begins the names of contenders that are one kernel of ours
FORCED_KERNELS = [FORCED + name for name in ALIGN_KERNELS]


class WrongResultError(Exception):
    """A contender gave a wrong result, or crashed, so no times of this run are worth anything."""


class Bound(NamedTuple):
    """A contender with its inputs, and where it writes."""

    call: Callable[[], Any]
    outputs: tuple[torch.Tensor, ...] = ()  # none: it returns what it allocates

    def results(self) -> tuple[torch.Tensor, ...]:
        """Of the last call, or of another one."""
        return self.outputs or tuple(self.call())


class Operator(Protocol):
    function: str  # in cupy_moe
    cases: Sequence[Any]
    checked: tuple[str, ...] = ("random",)  # kinds of inputs
    timed: tuple[str, ...] = ("random",)

    def inputs(self, case: Any, kind: str, seed: int) -> torch.Tensor: ...
    def expected(self, case: Any, inputs: torch.Tensor) -> Any: ...
    def bind(self, contender: str, case: Any, inputs: torch.Tensor) -> Bound: ...
    def wrong(self, contender: str, case: Any, results: tuple[torch.Tensor, ...], expected: Any) -> str: ...


def poison(outputs: Sequence[torch.Tensor]) -> None:
    """Fill with what no operator writes, so that an element that is left out is noticed."""
    for tensor in outputs:
        tensor.fill_(float("nan") if tensor.is_floating_point() else -77)


def finish(contender: str) -> None:
    """Wait for the GPU, so that a failure is blamed on the one whose it is."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        raise WrongResultError(f"{contender}: {error}") from error


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


class Align(Operator):
    function = "moe_align_block_size"
    cases = ALIGN
    checked = routing.NAMES
    timed = TIMED_ROUTINGS

    def inputs(self, case: AlignCase, kind: str, seed: int) -> torch.Tensor:
        return _routed(kind, case.tokens, case.topk, case.experts, device, seed)

    def expected(self, case: AlignCase, inputs: torch.Tensor) -> Any:
        return cpu_align.moe_align_block_size(inputs, case.block_size, case.experts)

    def bind(self, contender: str, case: AlignCase, inputs: torch.Tensor) -> Bound:
        num_ids, experts, block_size = case.num_ids, case.experts, case.block_size
        if contender == "sglang":
            buckets = experts + 1  # the first is for ids of -1
            slots = num_ids * block_size if num_ids < buckets else num_ids + buckets * (block_size - 1)
            out = (empty(slots + 3)[:slots], empty(ceil_div(slots, block_size)), empty(1))  # it writes int4
            arguments = (inputs, buckets, block_size, *out, empty(experts + 2), True)
            return Bound(lambda: torch.ops.sgl_kernel.moe_align_block_size(*arguments), out)
        slots, blocks = aligned_sizes(num_ids, experts, block_size)
        out = (empty(slots), empty(blocks), empty(1))
        if contender == "vllm":
            operator = torch.ops._moe_C.moe_align_block_size
            last = (None,) * (len(operator.default._schema.arguments) - 6)  # expert_map, in later versions
            return Bound(lambda: operator(inputs, experts, block_size, *out, *last), out)
        kernel = contender.removeprefix(FORCED) if contender.startswith(FORCED) else None
        return Bound(
            lambda: cupy_moe.moe_align_block_size(inputs, block_size, experts, out=out, kernel=kernel), out
        )

    def wrong(self, contender: str, case: AlignCase, results: tuple[torch.Tensor, ...], expected: Any) -> str:
        if contender not in ("vllm", "sglang"):
            names = ("sorted_token_ids", "expert_ids", "num_tokens_post_pad")
            pairs = zip(names, results, expected, strict=True)
            return ", ".join(name for name, got, want in pairs if not torch.equal(got, want))
        # Peers promise no order inside an expert, and do not agree on what is past the slots in use.
        num_ids, used = case.num_ids, int(expected[2])
        experts = expected[1][: used // case.block_size]
        if not torch.equal(results[2], expected[2]):
            return "num_tokens_post_pad"
        if not torch.equal(results[1][: len(experts)], experts):
            return "expert_ids"
        owner = experts.repeat_interleave(case.block_size).long() * (num_ids + 1)
        got, want = (sorted_ids[:used].long() for sorted_ids in (results[0], expected[0]))
        in_range = bool(((got >= 0) & (got <= num_ids)).all())
        same = in_range and torch.equal((owner + got).sort().values, (owner + want).sort().values)
        return "" if same else "sorted_token_ids"

    def kernels(self, case: AlignCase, inputs: torch.Tensor) -> list[str]:
        """The kernels that can do this case on this device."""
        return [name for name in FORCED_KERNELS if inputs.is_cuda and self._can(name, case, inputs)]

    def _can(self, contender: str, case: AlignCase, inputs: torch.Tensor) -> bool:
        try:
            self.bind(contender, case, inputs).call()
        except ValueError:
            return False
        finish(contender)
        return True


@functools.cache
def _routed(kind: str, tokens: int, topk: int, experts: int, device: str, seed: int) -> torch.Tensor:
    return routing.make(kind, tokens, topk, experts, device=device, seed=seed)


class Sum(Operator):
    function = "moe_sum"
    cases = SUM

    def inputs(self, case: SumCase, kind: str, seed: int) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        shape = (case.tokens, case.topk, case.hidden)
        return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)

    def expected(self, case: SumCase, inputs: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(case.tokens, case.hidden, dtype=torch.float64, device=device)
        for k in range(case.topk):
            total += inputs[:, k]
        return total

    def bind(self, contender: str, case: SumCase, inputs: torch.Tensor) -> Bound:
        out = empty(case.tokens, case.hidden, dtype=torch.bfloat16)
        if contender == "sglang":
            return Bound(lambda: torch.ops.sgl_kernel.moe_sum_reduce(inputs, out, 1.0), (out,))
        if contender == "vllm":
            return Bound(lambda: torch.ops._moe_C.moe_sum(inputs, out), (out,))
        return Bound(lambda: ours.moe_sum(inputs, out=out), (out,))

    def wrong(self, contender: str, case: SumCase, results: tuple[torch.Tensor, ...], expected: Any) -> str:
        # Sums in fp32, rounded to bf16 once.
        error = (results[0] - expected).abs_()
        return "" if bool((error <= expected.abs() * 2**-8 + 1e-4).all()) else "output"


class Routing(NamedTuple):
    """What gating is to find, in float64: the k experts of the highest `choice`, weighed by their scores."""

    scores: torch.Tensor
    choice: torch.Tensor


class Gate(Operator):
    """topk_softmax; the other two differ in how they score, what they choose from, and in their arguments."""

    function = "topk_softmax"
    cases: Sequence[GateCase] = GATE
    factor = 1.0
    ambiguous = 0.0  # rows, of all, that may have other experts

    def inputs(self, case: GateCase, kind: str, seed: int) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(case.tokens, case.experts, device=device, generator=generator)

    def expected(self, case: GateCase, inputs: torch.Tensor) -> Routing:
        scores = inputs.double().softmax(-1)
        return Routing(scores, scores)

    def bind(self, contender: str, case: GateCase, inputs: torch.Tensor) -> Bound:
        out = self.outputs(case)
        if contender == "sglang":
            return Bound(lambda: torch.ops.sgl_kernel.topk_softmax(*out, inputs, True, 0.0, None), out)
        if contender == "vllm":
            rows = empty(case.tokens, case.topk)  # a third output, which nobody reads any more
            return Bound(lambda: torch.ops._moe_C.topk_softmax(*out, rows, inputs, True, None), out)
        return Bound(lambda: ours.topk_softmax(inputs, case.topk, True, out=out), out)

    def outputs(self, case: GateCase) -> tuple[torch.Tensor, torch.Tensor]:
        return empty(case.tokens, case.topk, dtype=torch.float32), empty(case.tokens, case.topk)

    def wrong(
        self, contender: str, case: GateCase, results: tuple[torch.Tensor, ...], expected: Routing
    ) -> str:
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


class Sigmoid(Gate):
    function = "topk_sigmoid"
    cases = SIGMOID

    def expected(self, case: GateCase, inputs: torch.Tensor) -> Routing:
        scores = inputs.double().sigmoid()
        return Routing(scores, scores + _bias(case.experts, device))

    def bind(self, contender: str, case: GateCase, inputs: torch.Tensor) -> Bound:
        out, bias = self.outputs(case), _bias(case.experts, device)
        if contender == "sglang":
            return Bound(lambda: torch.ops.sgl_kernel.topk_sigmoid(*out, inputs, True, bias), out)
        if contender == "vllm":
            rows = empty(case.tokens, case.topk)
            return Bound(lambda: torch.ops._moe_C.topk_sigmoid(*out, rows, inputs, True, bias, 1.0), out)
        return Bound(
            lambda: ours.topk_sigmoid(inputs, case.topk, True, e_score_correction_bias=bias, out=out), out
        )


class Grouped(Sigmoid):
    function = "grouped_topk"
    cases = GROUPED
    factor = FACTOR
    ambiguous = 0.001  # two groups that fp32 cannot tell apart

    def expected(self, case: GateCase, inputs: torch.Tensor) -> Routing:
        scores, choice = super().expected(case, inputs)
        groups = choice.unflatten(-1, (NUM_GROUPS, -1))
        best = groups.topk(2).values.sum(-1).topk(TOPK_GROUP).indices
        kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
        return Routing(scores, groups.masked_fill(~kept[..., None], -math.inf).flatten(1))

    def bind(self, contender: str, case: GateCase, inputs: torch.Tensor) -> Bound:
        bias = _bias(case.experts, device)
        if contender == "sglang":
            theirs = inputs, bias, NUM_GROUPS, TOPK_GROUP, case.topk, 0, FACTOR, True
            return Bound(lambda: torch.ops.sgl_kernel.moe_fused_gate(*theirs))
        if contender == "vllm":
            vllms = inputs, NUM_GROUPS, TOPK_GROUP, case.topk, True, FACTOR, bias, 1
            return Bound(lambda: torch.ops._moe_C.grouped_topk(*vllms))
        out = self.outputs(case)
        arguments = inputs, case.topk, True, NUM_GROUPS, TOPK_GROUP, "sigmoid", FACTOR, bias
        return Bound(lambda: ours.grouped_topk(*arguments, out=out), out)


@functools.cache
def _bias(experts: int, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(experts)
    return torch.rand(experts, device=device, generator=generator)


OPERATORS: dict[str, Operator] = {
    "align": Align(),
    "sum": Sum(),
    "gate": Gate(),
    "sigmoid": Sigmoid(),
    "grouped": Grouped(),
}
