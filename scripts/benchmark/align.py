"""moe_align_block_size."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import routing
import torch

import cupy_moe
from cupy_moe.cpu import align as cpu
from cupy_moe.plans.align import ALIGN_KERNELS, aligned_sizes
from cupy_moe.plans.base import ceil_div

from . import base, plot
from .base import FORCED, Bound, Host, Kernels, Operator, Picture, Results, Sweep, empty, unequal
from .timing import Call

OUTPUTS = ("sorted_token_ids", "expert_ids", "num_tokens_post_pad")
COLD_MIN_IDS = 131_072  # fewer are in L2 whenever a router has just written them
SWEEP_BLOCK_SIZE = 64


class AlignCase(NamedTuple):
    tokens: int
    topk: int
    experts: int
    block_size: int
    target_us: float | None = None

    @property
    def num_ids(self) -> int:
        return self.tokens * self.topk


HOST = AlignCase(64, 8, 256, 64)  # short enough on the GPU that the host is never held up by a full queue


def sweep(experts: Sequence[int] = (8, 64, 256, 512), max_ids: int = 2**20) -> list[AlignCase]:
    """1 to 2^20 ids in powers of two; top-8, or top-2 of a few experts, as models have it."""
    cases = []
    for count in experts:
        num_ids = 1
        while num_ids <= max_ids:
            topk = min(num_ids, 2 if count <= 8 else 8)
            cases.append(AlignCase(num_ids // topk, topk, count, SWEEP_BLOCK_SIZE))
            num_ids *= 2
    return cases


def host_calls(peers: Sequence[str], seed: int) -> dict[str, Call]:
    """By who is called and how."""
    experts, block_size, ids = HOST.experts, HOST.block_size, Align().inputs(HOST, "uniform", seed)
    device = ids.device
    # Half of the experts are on this rank.
    expert_map = torch.arange(experts, dtype=torch.int32, device=device)
    expert_map[experts // 2 :] = -1
    align = cupy_moe.moe_align_block_size
    out = align(ids, block_size, experts)

    def three_tensors() -> list[torch.Tensor]:
        slots = ids.numel() + experts * (block_size - 1)
        if ids.numel() < experts:
            slots = min(ids.numel() * block_size, slots)
        sizes = (slots, (slots + block_size - 1) // block_size, 1)
        return [torch.empty((size,), dtype=torch.int32, device=device) for size in sizes]

    def vllm(expert_map: torch.Tensor | None = None, ignore_invalid_experts: bool = False) -> Any:
        """What vLLM's Python function of this name does."""
        sorted_ids, expert_ids, post_pad = three_tensors()
        operator = torch.ops._moe_C.moe_align_block_size
        if ignore_invalid_experts:
            operator(ids, experts, block_size, sorted_ids, expert_ids, post_pad, expert_map)
        else:
            operator(ids, experts, block_size, sorted_ids, expert_ids, post_pad, *no_map)
        if expert_map is not None and not ignore_invalid_experts:
            expert_ids = expert_map[expert_ids]
        return sorted_ids, expert_ids, post_pad

    calls: dict[str, Call] = {
        "cupy_moe": lambda: align(ids, block_size, experts),
        "cupy_moe, out=": lambda: align(ids, block_size, experts, out=out),
        "cupy_moe, expert_map": lambda: align(ids, block_size, experts, expert_map),
        "cupy_moe, expert_map, ignored": lambda: align(ids, block_size, experts, expert_map, False, True),
        "3 x torch.empty": three_tensors,
    }
    if hasattr(torch.ops.cupy_moe, "moe_align_block_size"):
        registered = torch.ops.cupy_moe.moe_align_block_size
        calls["torch.ops.cupy_moe"] = lambda: registered(ids, block_size, experts)
    if "vllm" in peers:
        no_map = (None,) * _takes_expert_map(torch.ops._moe_C.moe_align_block_size)
        calls["vllm"] = vllm
        calls["vllm, expert_map"] = lambda: vllm(expert_map)
        if no_map:
            calls["vllm, expert_map, ignored"] = lambda: vllm(expert_map, True)
    return calls


def _takes_expert_map(operator: Any) -> bool:
    """vLLM's, in later versions."""
    return len(operator.default._schema.arguments) > 6


class Align(Operator):
    section = "align"
    function = "moe_align_block_size"
    theirs: Mapping[str, str] = {"vllm": "moe_align_block_size", "sglang": "moe_align_block_size"}

    cases: Sequence[AlignCase] = (
        AlignCase(1, 2, 8, 16, 2.0),
        AlignCase(1, 8, 256, 16, 2.4),
        AlignCase(8, 8, 256, 16, 2.5),
        AlignCase(64, 2, 8, 64, 2.2),
        AlignCase(64, 8, 256, 64, 2.8),
        AlignCase(128, 8, 128, 64, 2.8),
        AlignCase(512, 8, 256, 128, 3.5),
        AlignCase(4096, 2, 64, 128, 3.5),
        AlignCase(16384, 2, 8, 128, 4.0),
        AlignCase(4096, 8, 256, 128, 4.6),
        AlignCase(4096, 10, 512, 128, 5.8),
        AlignCase(16384, 8, 256, 128, 6.0),
        AlignCase(32768, 8, 128, 128, 8.0),
        AlignCase(32768, 8, 256, 64, 8.0),
        AlignCase(65536, 8, 256, 128, 12.0),
    )
    checked = routing.NAMES
    timed = ("uniform", "skewed", "all_to_one")
    ours_only = ("with_invalid",)
    quick = True
    times_torch = True
    kernels = Kernels("kernels", ALIGN_KERNELS)
    sweep = Sweep("sweep", sweep())
    pictures = (
        Picture(
            "sweep", ".svg", f"GPU time of {function} over its size",
            functools.partial(
                plot.over_size, panel="experts", x=("tokens", "topk"),
                x_label=f"ids (tokens x topk); blocks of {SWEEP_BLOCK_SIZE}",
                y_label=f"{function}, GPU time of a call, us",
            ),
        ),
    )  # fmt: skip
    host = Host(
        "host", f"{HOST.tokens} x {HOST.topk}, {HOST.experts} experts", host_calls,
        {"cupy_moe": 0.6, "cupy_moe, out=": 0.25},
    )  # fmt: skip

    title = "moe_align_block_size"
    columns: Mapping[str, Sequence[str]] = {
        "tokens x topk": ("tokens", "topk"),
        "experts": ("experts",),
        "block": ("block_size",),
    }
    note = (
        'Routing is uniform where nothing else is said; "skewed" (the weight of an expert is 1/rank) and'
        ' "all to one" are times against our uniform one.'
    )
    size = "{tokens} tokens, top-{topk} of {experts}, blocks of {block_size}"
    telling = (AlignCase(8, 8, 256, 16), AlignCase(4096, 8, 256, 128), AlignCase(65536, 8, 256, 128))

    def inputs(self, case: AlignCase, kind: str, seed: int) -> torch.Tensor:
        return _routed(kind, case.tokens, case.topk, case.experts, base.device, seed)

    def expected(self, case: AlignCase, inputs: torch.Tensor) -> Any:
        return cpu.moe_align_block_size(inputs, case.block_size, case.experts)

    def bind(self, contender: str, case: AlignCase, inputs: torch.Tensor) -> Bound:
        num_ids, experts, block_size = case.num_ids, case.experts, case.block_size
        if contender == "sglang":
            operator, buckets = self.their(contender), experts + 1  # the first is for ids of -1
            slots = num_ids * block_size if num_ids < buckets else num_ids + buckets * (block_size - 1)
            out = (empty(slots + 3)[:slots], empty(ceil_div(slots, block_size)), empty(1))  # it writes int4
            arguments = (inputs, buckets, block_size, *out, empty(experts + 2), True)
            return Bound(lambda: operator(*arguments), out)
        slots, blocks = aligned_sizes(num_ids, experts, block_size)
        out = (empty(slots), empty(blocks), empty(1))
        if contender == "vllm":
            operator = self.their(contender)
            no_map = (None,) * _takes_expert_map(operator)
            return Bound(lambda: operator(inputs, experts, block_size, *out, *no_map), out)
        kernel = contender.removeprefix(FORCED) if contender.startswith(FORCED) else None
        return Bound(
            lambda: cupy_moe.moe_align_block_size(inputs, block_size, experts, out=out, kernel=kernel), out
        )

    def wrong(self, contender: str, case: AlignCase, results: Results, expected: Any) -> str:
        if contender not in self.theirs:
            return unequal(OUTPUTS, results, expected)
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

    def is_timed_cold(self, case: AlignCase) -> bool:
        return case.num_ids >= COLD_MIN_IDS


@functools.cache
def _routed(kind: str, tokens: int, topk: int, experts: int, device: str, seed: int) -> torch.Tensor:
    return routing.make(kind, tokens, topk, experts, device=device, seed=seed)


OPERATORS = (Align(),)
