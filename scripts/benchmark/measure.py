"""Check and time: operators and cases -> rows of figures."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click
import torch

from . import base, timing
from .base import COLD, FORCED, OURS, TORCH, Bound, Operator, Results, Row, WrongResultError, finish, poison


class Failures:
    """Peers that gave wrong results or none, and in which cases. What we do wrong is not among them."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, Any, str]] = set()

    @contextlib.contextmanager
    def leaving_out(self, operator: Operator, case: Any, contender: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a library may fail in any way
            if contender not in operator.theirs:
                raise
            self._seen.add((operator.section, case, contender))
            click.echo(f"left out: {contender} for {case}: {type(error).__name__}: {str(error)[:300]}")

    def without(self, operator: Operator, contenders: Iterable[str], case: Any = None) -> list[str]:
        """Those that did not fail in this case, or in none."""
        failed = {
            name for section, c, name in self._seen if section == operator.section and case in (None, c)
        }
        return [name for name in contenders if name not in failed]


def check(operators: Iterable[Operator], found: Sequence[str], seed: int, failures: Failures) -> int:
    """Compare every contender with the specification on every kind of inputs; returns how many are right."""
    done = 0
    for operator in operators:
        everyone = operator.contenders(found)
        for case in operator.cases:
            for kind in operator.checked:
                inputs = operator.inputs(case, kind, seed)
                expected = operator.expected(case, inputs)
                contenders = [OURS] if kind in operator.ours_only else everyone
                for contender in (*contenders, *_able_kernels(operator, case, inputs)):
                    with failures.leaving_out(operator, case, contender):
                        bound = operator.bind(contender, case, inputs)
                        poison(bound.outputs)
                        bound.call()
                        finish(contender)
                        verify(operator, contender, case, kind, bound.results(), expected)
                        done += 1
    return done


def verify(operator: Operator, contender: str, case: Any, kind: str, results: Results, expected: Any) -> None:
    if problem := operator.wrong(contender, case, results, expected):
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
    failures: Failures,
    seed: int,
    replays: int,
    more: bool = False,
) -> list[Row]:
    """GPU time of every contender on every kind of inputs; `more` is PyTorch's, and that with a cold L2."""
    rows = []
    for case in cases:
        us: dict[str, dict[str, float]] = {}
        errors: dict[str, dict[str, float]] = {}
        for kind in operator.timed:
            inputs = operator.inputs(case, kind, seed)
            turns = operator.turns(case, inputs)
            bound: dict[str, list[Bound]] = {}
            for name in failures.without(operator, contenders, case):
                with failures.leaving_out(operator, case, name):
                    bound[name] = [operator.bind(name, case, turn) for turn in turns]
            references = operator.references(case, inputs)
            calls = {name: [b.call for b in bounds] for name, bounds in bound.items()}
            times = operator.time_us(
                {**calls, **{name: [call] for name, call in references.items()}}, replays
            )
            expected = operator.expected(case, turns[-1])
            for name, bounds in bound.items():  # what replays leave has to be right as well
                with failures.leaving_out(operator, case, name):
                    results = bounds[-1].results()
                    verify(operator, name, case, kind, results, expected)
                    if far := operator.errors(case, results, expected):
                        errors[name] = far
            right = *failures.without(operator, bound, case), *references
            us[kind] = {name: times[name] for name in right}
            if more and operator.times_torch and kind == operator.timed[0]:
                us[kind][TORCH] = timing.eager_us(lambda: operator.expected(case, inputs), replays)  # noqa: B023
        if more and operator.is_timed_cold(case):
            us[COLD] = _cold_us(operator, case, failures.without(operator, contenders, case), seed, replays)
        rows.append({**case._asdict(), "us": us, **({"errors": errors} if errors else {})})
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
        for row in time_cases(operator, [case], [OURS, *able], Failures(), seed, replays):
            us = {name.removeprefix(FORCED): us for name, us in row["us"][kind].items()}
            rows.append({**row, "us": {kind: us}})
    return rows
