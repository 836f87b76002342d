"""What scripts/fuzz and scripts/sanitize run: calls of every operator, and how a failure becomes small."""

from __future__ import annotations

import _fuzz
import emulator
import pytest
import random_calls
from operator_cases import STEMS


def test_every_operator_has_random_calls() -> None:
    assert set(STEMS) <= set(random_calls.CALLS)


@pytest.mark.parametrize("operator", random_calls.CALLS)
def test_calls_on_the_cpu(operator: str) -> None:
    for seed in range(8):
        name = f"{operator}:{seed}"
        if random_calls.make(name).call.plans:
            assert _fuzz.check(name, "cpu") == ""


@pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))
def test_calls_in_the_emulator() -> None:
    right = 0
    for name in random_calls.names(range(6, 7), random_calls.CALLS):
        try:
            assert _fuzz.check(name, "emulator") == "", name
            right += 1
        except _fuzz.CannotDoError:
            assert name.count(":") == 2, name
    assert right > len(random_calls.CALLS)


def test_a_failure_is_made_smaller_and_can_be_told_by_its_name() -> None:
    def fails(name: str) -> bool:
        """A bug with maps, from the third id on."""
        call = random_calls.make(name).call
        return "expert_map" in call.tensors and len(call.tensors["topk_ids"]) > 2

    name = next(name for name in random_calls.names(range(100), ["align"]) if fails(name))
    small = random_calls.smaller(name, fails)
    assert small.startswith(f"{name}:")
    call = random_calls.make(small).call
    assert list(call.tensors) == ["topk_ids", "expert_map"]
    assert len(call.tensors["topk_ids"]) == 3
    assert len(call.tensors["expert_map"]) in (0, 3)
    assert call.rest == {}


def test_a_wrong_result_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    call = random_calls.CALLS["moe_sum"](3)
    monkeypatch.setitem(
        random_calls.CALLS, "moe_sum", lambda _: call._replace(expected=lambda **k: call.expected(**k) + 1)
    )
    assert _fuzz.check("moe_sum:3", "cpu") == "other results"
