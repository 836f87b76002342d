"""moe_permute: how rows are shared out over blocks, and whether these sort the ids by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any, NamedTuple

from ..values import INT32_MAX
from .align import STATIC_SHARED, table_bytes
from .base import WARP, Constant, DeviceLimits, LaunchPlan, ceil_div, divisor, round_up

PERMUTE_KERNELS = ("direct", "sorted")

PERMUTE_HELD = Constant(4, "permute/permute.cuh:kHeld")
PERMUTE_THREADS = Constant(256, "permute/permute.cuh:kMaxThreads")
MOST_UNITS = PERMUTE_HELD * PERMUTE_THREADS  # of a block
# One SM takes a cycle or two for each sector that it writes, so few units are spread over all of them.
LEAST_UNITS = 128
# Up to here, each block counting all ids takes less time than a launch that sorts them; each block also
# clears and sums up the counters of all experts.
DIRECT_FAST_IDS, DIRECT_FAST_EXPERTS = 4096, 1024
# Blocks for an SM where rows without a pair are cleared, of which there may be more than of all others.
CLEARING_BLOCKS = 4
_IDS_PER_LOAD = {"i32": 4, "i64": 2, "any": 1}


class PermutePlan(NamedTuple):
    kernel: str  # one of PERMUTE_KERNELS
    launch: LaunchPlan  # the one that moves rows; with "sorted", others come before it
    arguments: Mapping[str, Any]  # what the plan chooses of PermuteArgs, by name


class PermuteSizes(NamedTuple):
    num_tokens: int
    topk: int
    num_experts: int
    num_slots: int
    units_per_row: int
    vectors: bool  # a unit is 16 bytes, of which rows, strides and pointers are multiples; else an element
    has_padding: bool  # between the experts
    reader: str  # as for plan_align


def plan_permute(sizes: PermuteSizes, limits: DeviceLimits, kernel: str | None = None) -> PermutePlan:
    """Choose the kernel and its launch; `kernel`, one of PERMUTE_KERNELS, forces one.

    Raises ValueError where the forced kernel cannot do it, or there are too many rows for one launch.
    """
    direct = _plan_direct(sizes, limits)
    is_fast = sizes.num_tokens * sizes.topk <= DIRECT_FAST_IDS and sizes.num_experts <= DIRECT_FAST_EXPERTS
    if kernel == "direct" and isinstance(direct, str):
        raise ValueError(f"kernel='direct' {direct}")
    if kernel != "sorted" and isinstance(direct, PermutePlan) and (is_fast or kernel == "direct"):
        return direct
    parts, grid, block = _cut(sizes, limits, 1)
    if sizes.has_padding:
        warps = block // WARP
        grid = max(grid, min(CLEARING_BLOCKS * limits.num_sms, ceil_div(sizes.num_slots, warps)))
    if grid > INT32_MAX:
        raise ValueError(f"hidden_states: {sizes.num_tokens} rows are more than one launch can number")
    entry = "permute_rows" if sizes.vectors else "permute_rows_any"
    launch = LaunchPlan("permute_rows", entry, grid, block, overlaps=True)
    return PermutePlan("sorted", launch, {**parts, "per_block": 0, "per_row": divisor(1), "num_rows": 0})


def _plan_direct(sizes: PermuteSizes, limits: DeviceLimits) -> PermutePlan | str:
    if not sizes.vectors:
        return "takes rows of whole 16 bytes, aligned to 16 bytes"
    if sizes.has_padding:
        return "takes a block_size of 1 only"
    # Ids that are loaded together are of one block.
    together = _IDS_PER_LOAD[sizes.reader]
    parts, grid, block = _cut(sizes, limits, together // gcd(together, sizes.topk))
    pairs = parts["tokens_per_block"] * sizes.topk
    per_row = round_up(ceil_div(max(1, pairs), block // WARP), WARP)
    rows = ceil_div(max(1, pairs), per_row)
    shared_bytes = table_bytes(sizes.num_experts, rows) + 4 * pairs
    if shared_bytes + STATIC_SHARED > limits.shared_bytes:
        return (
            f"has no room: {sizes.num_experts} experts and {pairs} pairs of a block need {shared_bytes} bytes"
            " of shared memory"
        )
    if grid > INT32_MAX:
        return "takes fewer rows"
    launch = LaunchPlan("permute_direct", f"permute_direct_{sizes.reader}", grid, block, shared_bytes)
    counted = {"per_block": pairs, "per_row": divisor(per_row), "num_rows": rows}
    return PermutePlan("direct", launch, {**parts, **counted})


def _cut(sizes: PermuteSizes, limits: DeviceLimits, step: int) -> tuple[dict[str, Any], int, int]:
    """Rows to blocks: a multiple of `step` tokens, and a part of their rows, for each; grid and block."""
    units_per_row, num_tokens = max(1, sizes.units_per_row), max(1, sizes.num_tokens)
    share = ceil_div(num_tokens * units_per_row, limits.num_sms)
    units = min(MOST_UNITS, max(LEAST_UNITS, round_up(share, WARP)))
    tokens = min(max(1, units // units_per_row // step) * step, round_up(num_tokens, step))
    parts = ceil_div(units_per_row, max(1, units // tokens))
    units_per_part = ceil_div(units_per_row, parts)
    block = min(PERMUTE_THREADS, round_up(tokens * units_per_part, WARP))
    arguments = {
        "tokens_per_block": tokens,
        "parts": divisor(parts),
        "units_per_part": divisor(units_per_part),
    }
    return arguments, ceil_div(num_tokens, tokens) * parts, block
