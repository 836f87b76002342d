"""moe_sum: one launch for as many tokens as it can take."""

from __future__ import annotations

from typing import NamedTuple

from ..values import INT32_MAX
from .base import Constant, DeviceLimits, LaunchPlan, ceil_div

# Blocks that leave no thread idle at the usual hidden sizes, multiples of 1024 16-bit elements. Where SMs get
# no more than one, blocks of half the size reach twice as many.
SUM_THREADS = Constant(128, "moe_sum/moe_sum.cu:kMaxThreads")
# 8 loads in flight are best for a few threads on an SM, and for more than it holds at once. In between, and
# where memory is the limit (from 16 rounds on), threads with 4 are lighter, and up to 4 % faster on an H200.
SUM_THREADS_AT_ONCE = 1024
SUM_MANY_UNITS = 16 * 1024


class SumPlan(NamedTuple):
    launch: LaunchPlan
    units_per_token: int  # a unit is what one thread makes: 16 bytes of the output, or one element
    num_tokens: int  # fewer than asked for, where their units have no 31-bit numbers


def plan_sum(
    num_tokens: int,
    topk: int,
    hidden: int,
    element: str,
    element_bytes: int,
    vectors: bool,
    extended: bool,
    limits: DeviceLimits,
    overlaps: bool = False,
    rows: bool = False,
) -> SumPlan:
    """One launch for as many tokens as it can take.

    `vectors`: rows, strides and pointers are multiples of 16 bytes. `extended`: more than the plain sum.
    `rows`: that, of rows that have to be looked up.
    """
    per_token = hidden * element_bytes // 16 if vectors else hidden
    if per_token > INT32_MAX:
        raise ValueError(f"input: a hidden size of {hidden} is more than one launch can number")
    num_tokens = min(num_tokens, INT32_MAX // per_token)
    num_units = num_tokens * per_token
    per_sm = ceil_div(num_units, limits.num_sms)
    threads = SUM_THREADS // 2 if per_sm <= SUM_THREADS else SUM_THREADS
    light = SUM_THREADS < per_sm <= SUM_THREADS_AT_ONCE or per_sm >= SUM_MANY_UNITS
    sizes = (4, 2) if light else (8, 4, 2)
    exact = [slots for slots in sizes if topk % slots == 0 and topk <= 2 * slots]
    kind = "any" if not vectors else "ext" if extended else str(exact[0]) if exact else "n"
    if rows:
        in_flight = 8 if per_sm <= SUM_THREADS else 4 if topk % 4 == 0 else 2
        kind = f"rows_{in_flight}" if vectors else "rows_any"
    entry = f"moe_sum_{kind}_{element}"
    launch = LaunchPlan("moe_sum", entry, ceil_div(num_units, threads), threads, overlaps=overlaps)
    return SumPlan(launch, per_token, num_tokens)
