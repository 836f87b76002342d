"""Sizes and device limits -> what to launch. Pure Python: no torch, no CuPy, no environment.

Every threshold stands here, with its reason. The sizes of shared memory follow the formulas at the head of
the `.cu` files; `scratch_words` is what `align_global` needs beside the outputs, and nothing else does.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

MAX_EXPERTS = MAX_BLOCK_SIZE = 65_536
INT32_MAX = 2**31 - 1


class DeviceLimits(NamedTuple):
    capability: tuple[int, int]
    num_sms: int
    shared_bytes: int  # opt-in limit of one block


class LaunchPlan(NamedTuple):
    kernel: str  # "<unit>/<entry point>"
    grid: int
    block: int
    shared_bytes: int


class AlignPlan(NamedTuple):
    launches: tuple[LaunchPlan, ...]
    ids_per_block: int = 0
    num_rows: int = 1
    scratch_words: int = 0


# ---- align ------------------------------------------------------------------------------------------------

ALIGN_KERNELS = ("small", "shared", "cluster8", "cluster16", "global", "global_large")

# align_small compares all pairs of ids; kMaxIds in align_small.cu.
SMALL_MAX_IDS = 128
# One block writes a few thousand slots in the time that a launch takes; more are spread over more blocks.
SMALL_SLOTS_PER_BLOCK = 1024
# Every block counting all ids needs no barrier between blocks, as long as counting is short.
SHARED_MAX_IDS = 8_192
CLUSTER8_MAX_IDS = 16_384
# A warp ranks at most 4 * 32 ids at a time (kMaxIdsPerRow in align.cuh); more rows cost more to clear and scan.
MAX_ROWS = 32
WARP = 32
# Tables in global memory are wide; fewer pieces keep them few.
LARGE_MAX_PIECES = 16
STATIC_SHARED = 128  # warp_sums


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def round_up(value: int, multiple: int) -> int:
    return ceil_div(value, multiple) * multiple


def aligned_sizes(
    num_ids: int, num_experts: int, block_size: int, pad_sorted_ids: bool = False
) -> tuple[int, int]:
    """Lengths of `sorted_token_ids` and `expert_ids`: the most that any routing of `num_ids` ids can take.

    >>> aligned_sizes(12, 5, 4)
    (27, 7)

    Raises ValueError where they do not fit int32. Source of the rule: vLLM's `moe_align_block_size`.
    """
    num_slots = num_ids + num_experts * (block_size - 1)
    if pad_sorted_ids:
        num_slots = round_up(num_slots, block_size)
    if num_ids < num_experts:
        num_slots = min(num_ids * block_size, num_slots)
    if num_slots > INT32_MAX:
        raise ValueError(
            f"{num_ids} ids, num_experts={num_experts} and block_size={block_size} need {num_slots} slots,"
            f" more than int32 can number ({INT32_MAX}); split the batch or take a smaller block_size"
        )
    return num_slots, ceil_div(num_slots, block_size)


def divisor(value: int) -> tuple[int, int, int]:
    """The fields of `Divisor` in common.cuh: x // value == ((x << 1) * magic >> 32) >> shift for x < 2^31."""
    shift = (value - 1).bit_length()
    return value, (1 << (31 + shift)) // value + 1, shift


@functools.cache
def plan_align(
    num_ids: int,
    num_experts: int,
    num_slots: int,
    reader: str,
    limits: DeviceLimits,
    kernel: str | None = None,
) -> AlignPlan:
    """Choose the kernel and its launch; `kernel`, one of ALIGN_KERNELS, forces one.

    `reader` is the suffix of the entry point: "i32" or "i64" for contiguous ids, else "any".
    Raises ValueError where the forced kernel cannot do it.
    """
    chosen = kernel or _choose_align(num_ids, num_experts, limits)
    if chosen == "small":
        return _plan_small(num_ids, num_slots, reader, limits)
    if chosen == "shared":
        return _plan_shared(num_ids, num_experts, num_slots, reader, limits, cluster=1)
    if chosen in ("cluster8", "cluster16"):
        return _plan_shared(num_ids, num_experts, num_slots, reader, limits, cluster=int(chosen[7:]))
    if chosen in ("global", "global_large"):
        return _plan_global(num_ids, num_experts, reader, limits, large=chosen == "global_large")
    raise ValueError(f"kernel={kernel!r}: expected one of {', '.join(ALIGN_KERNELS)}")


def _choose_align(num_ids: int, num_experts: int, limits: DeviceLimits) -> str:
    if num_ids <= SMALL_MAX_IDS:
        return "small"
    fits = _table_bytes(num_experts, 4, cluster=True) + STATIC_SHARED <= limits.shared_bytes
    if not fits:
        return "global_large"
    if num_ids <= SHARED_MAX_IDS:
        return "shared"
    if limits.capability < (9, 0):
        return "global"
    return "cluster8" if num_ids <= CLUSTER8_MAX_IDS else "cluster16"


def _table_bytes(num_experts: int, num_rows: int, cluster: bool = False) -> int:
    """Table::words in align.cuh, and the counts that a block shows to its cluster."""
    words = 2 * num_experts + ceil_div((num_rows + 1) * num_experts, 2) + (num_experts if cluster else 0)
    return 4 * words


def _rows(ids_per_block: int, num_experts: int, shared_bytes: int, cluster: bool) -> int:
    """As many warps as a block has ids for, then as many as its shared memory has room for."""
    rows = min(MAX_ROWS, ceil_div(ids_per_block, WARP))
    if ids_per_block > 256:
        rows = min(MAX_ROWS, max(8, ceil_div(ids_per_block, 4 * WARP)))
    while rows > 1 and _table_bytes(num_experts, rows, cluster) + STATIC_SHARED > shared_bytes:
        rows //= 2
    return max(rows, 1)


def _plan_small(num_ids: int, num_slots: int, reader: str, limits: DeviceLimits) -> AlignPlan:
    if num_ids > SMALL_MAX_IDS:
        raise ValueError(f"kernel='small' takes at most {SMALL_MAX_IDS} ids, got {num_ids}")
    grid = min(limits.num_sms, max(1, ceil_div(num_slots, SMALL_SLOTS_PER_BLOCK)))
    block = max(WARP, min(512, 8 * (1 << num_ids.bit_length())))
    return AlignPlan((LaunchPlan(f"align_small/align_small_{reader}", grid, block, 0),))


def _plan_shared(
    num_ids: int, num_experts: int, num_slots: int, reader: str, limits: DeviceLimits, cluster: int
) -> AlignPlan:
    if cluster > 1 and limits.capability < (9, 0):
        raise ValueError(f"kernel='cluster{cluster}' needs compute capability 9.0, got {limits.capability}")
    # Enough blocks that none writes more than a few thousand words, in whole clusters.
    wanted = max(ceil_div(num_ids, 1024), ceil_div(num_slots, 1024), 1)
    grid = round_up(min(wanted, limits.num_sms // cluster * cluster or cluster), cluster)
    ids_per_block = max(WARP, round_up(ceil_div(num_ids, grid), WARP))
    rows = _rows(ids_per_block, num_experts, limits.shared_bytes, cluster > 1)
    shared_bytes = _table_bytes(num_experts, rows, cluster > 1)
    if shared_bytes + STATIC_SHARED > limits.shared_bytes:
        raise ValueError(
            f"{num_experts} experts need {shared_bytes} bytes of shared memory; kernel='global_large' does not"
        )
    suffix = f"cluster{cluster}_{reader}" if cluster > 1 else reader
    launch = LaunchPlan(f"align_shared/align_shared_{suffix}", grid, 1024, shared_bytes)
    return AlignPlan((launch,), ids_per_block, rows)


def _plan_global(
    num_ids: int, num_experts: int, reader: str, limits: DeviceLimits, large: bool
) -> AlignPlan:
    pieces = min(LARGE_MAX_PIECES if large else limits.num_sms, max(1, ceil_div(num_ids, 1024)))
    ids_per_block = max(WARP, round_up(ceil_div(num_ids, pieces), WARP))
    shared_bytes = 2**62 if large else limits.shared_bytes
    rows = _rows(ids_per_block, num_experts, shared_bytes, False)
    table = _table_bytes(num_experts, rows)
    if not large and table + STATIC_SHARED > limits.shared_bytes:
        raise ValueError(f"{num_experts} experts do not fit shared memory; kernel='global_large' does without")
    infix = "large_" if large else ""
    count = LaunchPlan(
        f"align_global/align_count_{infix}{reader}", pieces, 1024, 0 if large else 4 * num_experts
    )
    scatter = LaunchPlan(f"align_global/align_scatter_{infix}{reader}", pieces, 1024, 0 if large else table)
    scratch = pieces * (num_experts + (table // 4 if large else 0))
    return AlignPlan((count, scatter), ids_per_block, rows, scratch)
