"""moe_sort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import routing
import torch

import cupy_moe
from cupy_moe.cpu import sort as cpu
from cupy_moe.plans.align import ALIGN_KERNELS

from . import base
from .align import AlignCase
from .base import FORCED, Bound, Kernels, Operator, Results, unequal


class Sort(Operator):
    section = "sort"
    function = "moe_sort"
    theirs: Mapping[str, str] = {}

    cases: Sequence[AlignCase] = (
        AlignCase(1, 8, 256, 16),
        AlignCase(64, 8, 256, 64),
        AlignCase(512, 8, 256, 128),
        AlignCase(4096, 8, 256, 128),
        AlignCase(16384, 8, 256, 128),
    )
    kernels = Kernels("sort_kernels", ALIGN_KERNELS[1:])

    title = "moe_sort, with all by-products but weights"
    columns: Mapping[str, Sequence[str]] = {
        "tokens x topk": ("tokens", "topk"),
        "experts": ("experts",),
        "block": ("block_size",),
    }
    size = "{tokens} tokens, top-{topk} of {experts}, blocks of {block_size}"
    telling = ()

    def inputs(self, case: AlignCase, kind: str, seed: int) -> torch.Tensor:
        return routing.make("uniform", case.tokens, case.topk, case.experts, device=base.device, seed=seed)

    def expected(self, case: AlignCase, inputs: torch.Tensor) -> Any:
        results = cpu.moe_sort(inputs, case.block_size, case.experts, fine_block_size=1)
        return tuple(result for result in results if result is not None)

    def bind(self, contender: str, case: AlignCase, inputs: torch.Tensor) -> Bound:
        asked: dict[str, Any] = {f"return_{name}": True for name in ("inverse", "offsets", "counts")}
        asked["fine_block_size"] = 1
        out = cupy_moe.moe_sort(inputs, case.block_size, case.experts, **asked)
        kernel = contender.removeprefix(FORCED) if contender.startswith(FORCED) else None
        return Bound(
            lambda: cupy_moe.moe_sort(inputs, case.block_size, case.experts, **asked, out=out, kernel=kernel),
            tuple(tensor for tensor in out if tensor is not None),
        )

    def wrong(self, contender: str, case: AlignCase, results: Results, expected: Any) -> str:
        names = (name for name in cupy_moe.MoESorting._fields if name != "sorted_weights")
        return unequal(tuple(names), results, expected)


OPERATORS = (Sort(),)
