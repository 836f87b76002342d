"""quantize: some lanes of a warp for each group of columns, or a block for each row."""

from __future__ import annotations

from typing import NamedTuple

from ..values import INT32_MAX
from .base import WARP, Constant, DeviceLimits, LaunchPlan, ceil_div, round_up

QUANTIZE_CHUNK = Constant(16, "quantize/quantize.cu:kChunk")  # elements of a thread: 16 bytes of codes
QUANTIZE_GROUP_THREADS = Constant(128, "quantize/quantize.cu:kMaxGroupThreads")
QUANTIZE_ROW_THREADS = Constant(1024, "quantize/quantize.cu:kMaxRowThreads")


class QuantizePlan(NamedTuple):
    launch: LaunchPlan
    lane_bits: int  # a group has 2^lane_bits lanes; these, and the units, are of the kernels for groups
    units_per_row: int
    num_units: int


def plan_quantize(
    num_rows: int,
    hidden: int,
    group_size: int,
    element: str,
    vectors: bool,
    gated: bool,
    limits: DeviceLimits,
) -> QuantizePlan:
    """One launch. `hidden` are the columns of the result; a group may be as wide as these.

    `vectors`: strides and pointers are multiples of 16 bytes, and groups of 16 elements.
    """
    chunks = ceil_div(group_size, QUANTIZE_CHUNK)
    kind = f"any_{element}" if not vectors else element
    if chunks > WARP:
        threads = min(QUANTIZE_ROW_THREADS, round_up(chunks, WARP))
        return QuantizePlan(LaunchPlan("quantize", f"quantize_rows_{kind}", num_rows, threads), 0, 1, 0)
    lane_bits = max(0, chunks - 1).bit_length()
    units_per_row = max(1, hidden // max(1, group_size)) << lane_bits
    num_units = num_rows * units_per_row
    # Where SMs get no more than one block, blocks of half the size reach twice as many.
    few = ceil_div(num_units, limits.num_sms) <= QUANTIZE_GROUP_THREADS
    threads = QUANTIZE_GROUP_THREADS // 2 if few else QUANTIZE_GROUP_THREADS
    if num_units > INT32_MAX - threads:
        raise ValueError(f"x: {num_rows} rows of {hidden} are more than one launch can number")
    entry = f"quantize_{'gated' if gated else 'groups'}_{kind}"
    launch = LaunchPlan("quantize", entry, ceil_div(num_units, threads), threads)
    return QuantizePlan(launch, lane_bits, units_per_row, num_units)
