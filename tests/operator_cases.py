"""A call of each operator, which tests of all operators make in many ways.

They are told by the tests of the operators: `CASES` in the test_X.py of each cupy_moe/operators/X.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cupy_moe import operators

STEMS = sorted(path.stem for path in Path(operators.__file__).parent.glob("[!_]*.py"))


def comparable(result: Any) -> Any:
    """A result, or the codes of one in fp8, which torch does not compare, and NumPy does not have."""
    is_fp8 = isinstance(result, torch.Tensor) and result.dtype is torch.float8_e4m3fn
    return (
        result.view(torch.uint8) if is_fp8 and not torch.jit.is_tracing() else result
    )  # which lacks the view


class Case(NamedTuple):
    """An operator, arguments for it, and which of these are tensors."""

    function: Callable[..., Any]
    arguments: dict[str, Any]

    @property
    def tensors(self) -> list[str]:
        return [name for name, value in self.arguments.items() if isinstance(value, torch.Tensor)]

    def on(self, device: str) -> Case:
        moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in self.arguments.items()}
        return Case(self.function, moved)

    def __call__(self, **changes: Any) -> tuple[torch.Tensor, ...]:
        results = self.function(**{**self.arguments, **changes})
        return tuple(map(comparable, results)) if isinstance(results, tuple) else (comparable(results),)

    def out(self) -> tuple[torch.Tensor, ...]:
        return tuple(torch.full_like(result, 77) for result in self())

    def with_out(self, out: tuple[Any, ...], **changes: Any) -> None:
        self(out=out[0] if len(out) == 1 else out, **changes)


def all_cases() -> dict[str, Case]:
    """By name. A module of operators whose tests tell none is an error."""
    return {
        name: case for stem in STEMS for name, case in importlib.import_module(f"test_{stem}").CASES.items()
    }


# Inputs that some of them share, with ids and mapped experts that are none.
_generator = torch.Generator().manual_seed(0)
LOGITS = torch.randn(5, 8, generator=_generator)
BIAS = torch.randn(8, generator=_generator)
MASK = torch.tensor([False, True, False, False, False])
IDS = torch.randint(-1, 9, (5, 2), generator=_generator, dtype=torch.int32)
MAP = torch.tensor([0, -1, 1, 2, -1, 3, 9, 4], dtype=torch.int32)
