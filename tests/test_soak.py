"""scripts/soak for seconds on the CPU; what it has to notice, and a name that makes a call again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _fuzz
import _soak
import pytest
import random_calls
import torch
from click.testing import CliRunner
from emulator.cases import Call

ROOT = Path(__file__).parents[1]


def options(seconds: float) -> list[str]:
    minutes, warm = str(seconds / 60), str(seconds / 120)
    given = ("--on", "cpu", "--minutes", minutes, "--warm-up", warm, "--first", "0", "--calls", "2")
    return [*given, "--every", "0.5"]


def test_every_operator_is_called_and_memory_is_flat() -> None:
    """In a process of its own, as memory that others have left is filled and emptied here."""
    environment = os.environ | {"PYTHONPATH": ".:tests:scripts"}
    command = [sys.executable, "scripts/_soak.py", *options(1)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    said, errors = run.stdout, run.stderr
    assert (run.returncode, errors) == (0, ""), said
    for operator in set(random_calls.CALLS) - {*_soak.NOT_ON_CPU, _soak.ALONE}:
        assert re.search(rf"^{operator} +[1-9]\d* calls$", said, re.MULTILINE), operator
    total = re.search(
        r"^(\d+) calls, (\d+) of them of (\d+) sizes, 0 replays of 0 graphs, 0 wrong$", said, re.M
    )
    assert total
    assert int(total[1]) > int(total[2]) >= int(total[3]) > 20
    assert re.search(r"^ +\d s  \d+ calls, .* 0 wrong; host \d+ MB$", said, re.MULTILINE)
    assert re.search(r"^host( +-?\d+\.\d){4} +48$", said, re.MULTILINE)


def test_each_operator_has_a_tensor_whose_rows_are_tokens() -> None:
    assert _soak.SIZES.keys() == random_calls.CALLS.keys() - {"messages", _soak.ALONE}
    for operator, (like, _) in _soak.SIZES.items():
        call = next(call for seed in range(99) if len((call := make(operator, seed)).tensors[like]))
        assert len(random_calls.repeated(call, like, 77).tensors[like]) == 77


UNBROKEN = dict(random_calls.CALLS)


def make(operator: str, seed: int) -> Call:
    return UNBROKEN[operator](seed)


def test_a_call_of_another_size_is_told_by_its_name() -> None:
    call = random_calls.make("sort:0:topk_ids=5000").call
    assert len(call.tensors["topk_ids"]) == 5000
    assert _fuzz.check("sort:0:topk_ids=5000", "cpu") == ""


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests have left lets memory grow."""
    monkeypatch.setitem(_soak.TOLERANCE, "host", 10_000)


def soak(seconds: float, *operators: str) -> tuple[str, str]:
    """That ends in a failure: what it says, and of which."""
    chosen = [word for operator in operators for word in ("--operator", operator)]
    result = CliRunner().invoke(_soak.main, [*options(seconds), *chosen])
    assert result.exit_code == 1, result.output + repr(result.exception)
    return result.stdout, result.stderr


def break_operator(monkeypatch: pytest.MonkeyPatch, operator: str, harm: Any) -> None:
    """After the warm-up, `harm` changes its results."""
    warm: list[bool] = []

    def broken(seed: int) -> Call:
        call = make(operator, seed)
        return call._replace(
            function=lambda **given: (harm if warm else lambda result: result)(call.function(**given))
        )

    at_rest = _soak.Soak.at_rest

    def measure(soak: _soak.Soak) -> dict[str, float]:
        warm.append(True)
        return at_rest(soak)

    monkeypatch.setattr(_soak.Soak, "at_rest", measure)
    monkeypatch.setitem(random_calls.CALLS, operator, broken)


@pytest.mark.usefixtures("threads", "roomy")
def test_a_wrong_result_is_told_as_fuzz_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    break_operator(monkeypatch, "moe_sum", torch.neg)
    _, errors = soak(0.5, "moe_sum", "align")
    assert re.fullmatch(r"other results\n  scripts/fuzz --on cpu --replay 'moe_sum:\d+\S*'\n", errors)


@pytest.mark.usefixtures("threads", "roomy")
def test_an_error_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> Any:
        raise TypeError("no more")

    break_operator(monkeypatch, "moe_sum", fail)
    _, errors = soak(0.5, "moe_sum")
    assert errors.startswith("TypeError: no more\n  scripts/fuzz --on cpu --replay 'moe_sum:")


@pytest.mark.usefixtures("threads")
def test_a_leak_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    leaked: list[bytes] = []

    def leak(result: Any) -> Any:
        if len(leaked) < 300:
            leaked.append(b"1" * 1_000_000)
        return result

    break_operator(monkeypatch, "align", leak)
    said, errors = soak(1, "align")
    assert "0 wrong" in said
    assert re.fullmatch(r"memory has grown: host, by \d+\.\d MB\n", errors)


@pytest.mark.usefixtures("threads", "roomy")
def test_an_operator_that_is_never_called_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_soak, "NOT_ON_CPU", ())
    _, errors = soak(0.1, "fp8_rows", "gate")
    assert errors == "fp8_rows was not called\n"
