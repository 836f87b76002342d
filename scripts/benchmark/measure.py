"""Check and time: operators and cases -> rows of figures.

A row is the case's own fields and "us": kind of inputs -> contender -> microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

import cupy_moe

from . import timing
from .cases import COLD_MIN_IDS, HOST, AlignCase
from .operators import FORCED, OPERATORS, Align, Bound, Operator, WrongResultError, finish, poison

Row = dict[str, Any]
OURS, TORCH = "cupy_moe", "torch"


def available(operator: Operator) -> bool:
    return hasattr(cupy_moe, operator.function)


def check(names: Iterable[str], peers: Sequence[str], seed: int) -> int:
    """Compare every contender with the specification on every kind of inputs; returns how many times."""
    done = 0
    for name in names:
        operator = OPERATORS[name]
        for case in operator.cases:
            for kind in operator.checked:
                inputs = operator.inputs(case, kind, seed)
                expected = operator.expected(case, inputs)
                contenders = [OURS, *(() if kind == "with_invalid" else peers)]  # which peers may crash on
                if isinstance(operator, Align):
                    contenders += operator.kernels(case, inputs)
                for contender in contenders:
                    bound = operator.bind(contender, case, inputs)
                    poison(bound.outputs)
                    bound.call()
                    finish(contender)
                    verify(operator, contender, case, kind, bound, expected)
                    done += 1
    return done


def verify(operator: Operator, contender: str, case: Any, kind: str, bound: Bound, expected: Any) -> None:
    if problem := operator.wrong(contender, case, bound.results(), expected):
        raise WrongResultError(f"{contender}: wrong {problem} for {case}, {kind} inputs")


def time_cases(
    operator: Operator,
    cases: Iterable[Any],
    contenders: Sequence[str],
    seed: int,
    replays: int,
    torch_too: bool,
) -> list[Row]:
    """GPU time of every contender on every kind of inputs; also with a cold L2 where that makes sense."""
    rows = []
    for case in cases:
        us: dict[str, dict[str, float]] = {}
        for kind in operator.timed:
            inputs = operator.inputs(case, kind, seed)
            bound = {name: operator.bind(name, case, inputs) for name in contenders}
            us[kind] = timing.gpu_us({name: [b.call] for name, b in bound.items()}, replays)
            expected = operator.expected(case, inputs)
            for name, b in bound.items():  # what replays leave has to be right as well
                verify(operator, name, case, kind, b, expected)
            if torch_too and kind == operator.timed[0]:
                us[kind][TORCH] = timing.eager_us(lambda: operator.expected(case, inputs), replays)  # noqa: B023
        if isinstance(case, AlignCase) and case.num_ids >= COLD_MIN_IDS and torch_too:
            us["cold"] = _cold_us(operator, case, contenders, seed, replays)
        rows.append({**case._asdict(), "us": us})
    return rows


def _cold_us(
    operator: Operator, case: AlignCase, contenders: Sequence[str], seed: int, replays: int
) -> dict[str, float]:
    """Time over so many sets of inputs and outputs that each is out of L2 when its turn comes again."""
    inputs = operator.inputs(case, operator.timed[0], seed)
    bytes_of_set = sum(t.nbytes for t in (inputs, *operator.bind(OURS, case, inputs).outputs))
    sets = max(timing.CALLS_PER_GRAPH, math.ceil(2 * timing.l2_bytes() / bytes_of_set))
    shuffled = [inputs[torch.randperm(case.tokens, device=inputs.device)] for _ in range(sets)]
    return timing.gpu_us(
        {name: [operator.bind(name, case, ids).call for ids in shuffled] for name in contenders}, replays
    )


def time_kernels(seed: int, replays: int) -> list[Row]:
    """Each kernel of ours that can do the case, beside the one that the plan chooses."""
    operator, rows = Align(), []
    for case in operator.cases:
        able = operator.kernels(case, operator.inputs(case, "uniform", seed))
        for row in time_cases(operator, [case], [OURS, *able], seed, replays, torch_too=False):
            us = {name.removeprefix(FORCED): us for name, us in row["us"]["uniform"].items()}
            rows.append({**row, "us": {"uniform": us}})
    return rows


def time_host(peers: Sequence[str], seed: int) -> dict[str, float]:
    """How long a call of the align operator keeps the host busy, by who is called and how."""
    case, ids = HOST, Align().inputs(HOST, "uniform", seed)
    experts, block_size, device = case.experts, case.block_size, ids.device
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

    contenders: dict[str, timing.Call] = {
        "cupy_moe": lambda: align(ids, block_size, experts),
        "cupy_moe, out=": lambda: align(ids, block_size, experts, out=out),
        "cupy_moe, expert_map": lambda: align(ids, block_size, experts, expert_map),
        "cupy_moe, expert_map, ignored": lambda: align(ids, block_size, experts, expert_map, False, True),
        "3 x torch.empty": three_tensors,
    }
    if hasattr(torch.ops.cupy_moe, "moe_align_block_size"):
        registered = torch.ops.cupy_moe.moe_align_block_size
        contenders["torch.ops.cupy_moe"] = lambda: registered(ids, block_size, experts)
    if "vllm" in peers:
        has_map = len(torch.ops._moe_C.moe_align_block_size.default._schema.arguments) > 6
        no_map = (None,) if has_map else ()
        contenders["vllm"] = vllm
        contenders["vllm, expert_map"] = lambda: vllm(expert_map)
        if has_map:
            contenders["vllm, expert_map, ignored"] = lambda: vllm(expert_map, True)
    return timing.host_us(contenders)
