"""Check and time: operators and cases -> rows of figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from . import base, timing
from .base import COLD, FORCED, OURS, TORCH, Bound, Operator, Row, WrongResultError, finish, poison


def check(operators: Iterable[Operator], found: Sequence[str], seed: int) -> int:
    """Compare every contender with the specification on every kind of inputs; returns how many times."""
    done = 0
    for operator in operators:
        everyone = operator.contenders(found)
        for case in operator.cases:
            for kind in operator.checked:
                inputs = operator.inputs(case, kind, seed)
                expected = operator.expected(case, inputs)
                contenders = [OURS] if kind in operator.ours_only else everyone
                for contender in (*contenders, *_able_kernels(operator, case, inputs)):
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


def _able_kernels(operator: Operator, case: Any, inputs: Any) -> list[str]:
    """Contenders: the kernels that can do this case on this device."""
    if operator.kernels is None or base.device != "cuda":
        return []
    names = [FORCED + name for name in operator.kernels.names]
    return [name for name in names if _is_able(operator, name, case, inputs)]


def _is_able(operator: Operator, kernel: str, case: Any, inputs: Any) -> bool:
    try:
        operator.bind(kernel, case, inputs).call()
    except ValueError:
        return False
    finish(kernel)
    return True


def time_cases(
    operator: Operator,
    cases: Iterable[Any],
    contenders: Sequence[str],
    seed: int,
    replays: int,
    more: bool = False,
) -> list[Row]:
    """GPU time of every contender on every kind of inputs; `more` is PyTorch's, and that with a cold L2."""
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
            if more and operator.times_torch and kind == operator.timed[0]:
                us[kind][TORCH] = timing.eager_us(lambda: operator.expected(case, inputs), replays)  # noqa: B023
        if more and operator.is_timed_cold(case):
            us[COLD] = _cold_us(operator, case, contenders, seed, replays)
        rows.append({**case._asdict(), "us": us})
    return rows


def _cold_us(
    operator: Operator, case: Any, contenders: Sequence[str], seed: int, replays: int
) -> dict[str, float]:
    """Time over so many sets of inputs and outputs that each is out of L2 when its turn comes again."""
    inputs = operator.inputs(case, operator.timed[0], seed)
    bytes_of_set = sum(t.nbytes for t in (inputs, *operator.bind(OURS, case, inputs).outputs))
    sets = max(timing.CALLS_PER_GRAPH, math.ceil(2 * timing.l2_bytes() / bytes_of_set))
    shuffled = [inputs[torch.randperm(len(inputs), device=inputs.device)] for _ in range(sets)]
    return timing.gpu_us(
        {name: [operator.bind(name, case, rows).call for rows in shuffled] for name in contenders}, replays
    )


def time_kernels(operator: Operator, seed: int, replays: int) -> list[Row]:
    """Each kernel of ours that can do the case, beside the one that the plan chooses."""
    kind, rows = operator.timed[0], []
    for case in operator.cases:
        able = _able_kernels(operator, case, operator.inputs(case, kind, seed))
        for row in time_cases(operator, [case], [OURS, *able], seed, replays):
            us = {name.removeprefix(FORCED): us for name, us in row["us"][kind].items()}
            rows.append({**row, "us": {kind: us}})
    return rows
