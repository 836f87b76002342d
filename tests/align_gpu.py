"""What the tests of moe_align_block_size on a GPU share: inputs, and outputs compared and guarded.

Each case poisons its outputs, checks the words before and after them, and says in its error which case it is.
"""

from __future__ import annotations

import functools

import pytest
import routing
import torch

from cupy_moe import MoEAlignment, aligned_sizes, moe_align_block_size
from cupy_moe.cpu import align as cpu_align
from cupy_moe.plans.align import ALIGN_KERNELS

POISON, GUARD = 0x5A5A5A5A, 0x3C3C3C3C
GUARD_WORDS = 64


class Outputs:
    """Poisoned outputs with guard words before and after each."""

    def __init__(self, lengths: tuple[int, ...], offset: int = 0) -> None:
        self.offset = GUARD_WORDS + offset
        self.buffers = [
            torch.full((GUARD_WORDS + length + GUARD_WORDS + 4,), GUARD, dtype=torch.int32, device="cuda")
            for length in lengths
        ]
        out = [b[self.offset :][:length] for b, length in zip(self.buffers, lengths, strict=True)]
        self.out = MoEAlignment(*out)
        self.poison()

    def poison(self) -> None:
        for tensor in self.out:
            tensor.fill_(POISON)

    def check(self, expected: tuple[torch.Tensor, ...], case: str) -> None:
        for name, tensor, wanted in zip(MoEAlignment._fields, self.out, expected, strict=True):
            if not torch.equal(tensor, wanted):
                wrong = (tensor != wanted).nonzero().flatten()
                few = wrong[:8]
                pytest.fail(
                    f"{case}: {name} differs at {len(wrong)} of {len(wanted)} places, at {few.tolist()} it is"
                    f" {tensor[few].tolist()} instead of {wanted[few].tolist()}",
                    pytrace=False,
                )
            buffer = self.buffers[MoEAlignment._fields.index(name)]
            around = torch.cat([buffer[: self.offset], buffer[self.offset + len(tensor) :]])
            assert bool((around == GUARD).all()), f"{case}: written outside {name}"


def check(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad: bool = False,
    ignore: bool = False,
    *,
    every_kernel: bool = False,
    kernels: tuple[str | None, ...] = (None,),
    runs: int = 1,
    offset: int = 0,
    note: str = "",
) -> None:
    expected = cpu_align.moe_align_block_size(topk_ids, block_size, num_experts, expert_map, pad, ignore)
    outputs = Outputs((*aligned_sizes(topk_ids.numel(), num_experts, block_size, pad), 1), offset)
    if every_kernel:
        kernels = None, *possible(topk_ids, num_experts, block_size)
    for kernel in kernels:
        for run in range(runs):
            case = (
                f"{list(topk_ids.shape)=} {topk_ids.dtype} strides={list(topk_ids.stride())} {num_experts=}"
                f" {block_size=} {pad=} {ignore=} map={expert_map is not None} {kernel=} {run=} {note}"
            )
            outputs.poison()
            moe_align_block_size(
                topk_ids, block_size, num_experts, expert_map, pad, ignore, out=outputs.out, kernel=kernel
            )
            outputs.check(expected, case)


def possible(topk_ids: torch.Tensor, num_experts: int, block_size: int = 16) -> tuple[str, ...]:
    """The kernels that can do it here, as plans/align.py says; test_plans.py looks at the reasons."""

    def is_possible(kernel: str) -> bool:
        try:
            moe_align_block_size(topk_ids, block_size, num_experts, kernel=kernel)
        except ValueError:
            return False
        return True

    return tuple(kernel for kernel in ALIGN_KERNELS if is_possible(kernel))


@functools.lru_cache(maxsize=256)
def make(name: str, tokens: int, topk: int, num_experts: int) -> torch.Tensor:
    return routing.make(name, tokens, topk, num_experts, device="cuda")


def drawn(shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape) + high)
    return torch.randint(low, high, shape, device="cuda", generator=generator).to(dtype)


def half_local(num_experts: int, garbage: bool = False) -> torch.Tensor:
    """Every other expert on this rank, in another order; `garbage` adds entries out of range."""
    local = torch.full((num_experts,), -1, dtype=torch.int32, device="cuda")
    local[::2] = (
        torch.randperm((num_experts + 1) // 2, generator=torch.Generator().manual_seed(0)).int().cuda()
    )
    if garbage:
        wild = torch.tensor([-(2**31), -2, num_experts, 2**31 - 1, num_experts + 31], dtype=torch.int32)
        local[1::3] = wild.repeat(num_experts)[: len(local[1::3])].cuda()
    return local


def equal(results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
