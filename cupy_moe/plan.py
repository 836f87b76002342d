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
    per_block: int  # ids that one block places; align_small: slots that one block writes
    num_rows: int  # warps of a block that place ids; align_small: threads that share an id
    per_row: int = 1  # ids that one warp places
    staged: int = 0  # 1: a block sorts its ids in shared memory before it writes them
    scratch_words: int = 0


# ---- align ------------------------------------------------------------------------------------------------

ALIGN_KERNELS = ("small", "shared", "cluster8", "cluster16", "global", "global_large")

# align_small compares all pairs of ids; kMaxIds in align_small.cu.
SMALL_MAX_IDS = 128
# One block writes a few thousand slots in the time that a launch takes; more are spread over more blocks.
SMALL_SLOTS_PER_BLOCK = 1024
# Every block counting all ids needs no barrier between blocks, as long as counting is short.
SHARED_MAX_IDS = 8_192
CLUSTER8_MAX_IDS = 65_536
# A chunk's counts are 16 bits wide where blocks show them to each other.
CHUNK_MAX_IDS = 65_535 // 32 * 32
CLUSTER16_MAX_IDS = 1_000_000
# One SM takes a cycle or two a sector; slots and ids that a block writes in about the time of a barrier.
SLOTS_PER_BLOCK = 1024
IDS_PER_BLOCK = 256
# Fewer ids of an expert in a block would hardly be neighbours.
STAGED_IDS_PER_EXPERT = 2
# Tables in global memory are wide; fewer pieces keep them few.
LARGE_MAX_PIECES = 16
LARGE_NUM_ROWS = 8
STATIC_SHARED = 256  # warp_sums in the .cu files
WARP = 32
MAX_THREADS = 1024


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
    block_size: int,
    reader: str,
    limits: DeviceLimits,
    kernel: str | None = None,
) -> AlignPlan:
    """Choose the kernel and its launch; `kernel`, one of ALIGN_KERNELS, forces one.

    `reader` is the suffix of the entry point: "i32" or "i64" for contiguous ids aligned to 16 bytes, else "any".
    Raises ValueError where the forced kernel cannot do it.
    """
    chosen = kernel or _choose_align(num_ids, num_experts, limits)
    if chosen == "small":
        return _plan_small(num_ids, num_slots, block_size, reader, limits)
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
    if _table_bytes(num_experts, 1, True) + STATIC_SHARED > limits.shared_bytes:
        return "global_large"
    if num_ids <= SHARED_MAX_IDS:
        return "shared"
    if limits.capability < (9, 0) or num_ids > CLUSTER16_MAX_IDS:
        return "global"
    return "cluster8" if num_ids <= CLUSTER8_MAX_IDS else "cluster16"


def _table_bytes(num_experts: int, num_rows: int, cluster: bool = False) -> int:
    return 4 * (num_experts * (num_rows + 3) + (2 * num_experts + ceil_div(num_experts, 2) if cluster else 0))


class _Pieces(NamedTuple):
    per_block: int
    num_rows: int
    per_row: int
    staged: int
    shared_bytes: int


def _cut(num_ids: int, grid: int, num_experts: int, threads: int, shared_bytes: int, cluster: bool) -> _Pieces:
    """A piece of ids for each of `grid` blocks, cut into as many ids for each of its warps."""
    per_block = max(WARP, round_up(ceil_div(num_ids, grid), WARP))
    rows = threads // WARP
    while rows > 1 and _table_bytes(num_experts, rows, cluster) + STATIC_SHARED > shared_bytes:
        rows //= 2
    per_row = round_up(ceil_div(per_block, rows), WARP)
    rows = ceil_div(per_block, per_row)
    table, stage = _table_bytes(num_experts, rows, cluster), 8 * per_block
    staged = per_block >= STAGED_IDS_PER_EXPERT * num_experts and table + stage + STATIC_SHARED <= shared_bytes
    return _Pieces(per_block, rows, per_row, int(staged), table + stage * staged)


def _plan_small(num_ids: int, num_slots: int, block_size: int, reader: str, limits: DeviceLimits) -> AlignPlan:
    if num_ids > SMALL_MAX_IDS:
        raise ValueError(f"kernel='small' takes at most {SMALL_MAX_IDS} ids, got {num_ids}")
    per_block = max(1, SMALL_SLOTS_PER_BLOCK // block_size) * block_size
    grid = max(1, ceil_div(num_slots, per_block))
    lanes = 1 if num_ids <= 16 else 2 if num_ids <= 32 else 4  # a thread compares with 16 to 32 ids
    block = round_up((num_ids + 1) * lanes, WARP)
    return AlignPlan((LaunchPlan(f"align_small/align_small_{reader}", grid, block, 0),), per_block, lanes)


def _plan_shared(
    num_ids: int, num_experts: int, num_slots: int, reader: str, limits: DeviceLimits, cluster: int
) -> AlignPlan:
    if cluster > 1 and limits.capability < (9, 0):
        raise ValueError(f"kernel='cluster{cluster}' needs compute capability 9.0, got {limits.capability}")
    if cluster > 1 and num_ids > cluster * CHUNK_MAX_IDS - limits.num_sms * WARP:
        raise ValueError(f"kernel='cluster{cluster}' cannot count {num_ids} ids in 16 bits a block")
    most = limits.num_sms if cluster == 1 else max(1, limits.num_sms // cluster - 1) * cluster
    wanted = max(ceil_div(num_ids, IDS_PER_BLOCK), ceil_div(num_slots, SLOTS_PER_BLOCK), 1)
    grid = round_up(min(wanted, most), cluster)
    counted = ceil_div(num_ids, cluster)  # by each block
    threads = 256 if counted <= 1024 else 512 if counted <= 4096 or cluster > 1 else 1024
    pieces = _cut(num_ids, grid, num_experts, threads, limits.shared_bytes, cluster > 1)
    if pieces.shared_bytes + STATIC_SHARED > limits.shared_bytes:
        raise ValueError(
            f"{num_experts} experts need {pieces.shared_bytes} bytes of shared memory; kernel='global_large' does not"
        )
    suffix = f"cluster{cluster}_{reader}" if cluster > 1 else reader
    launch = LaunchPlan(f"align_shared/align_shared_{suffix}", grid, threads, pieces.shared_bytes)
    return AlignPlan((launch,), pieces.per_block, pieces.num_rows, pieces.per_row, pieces.staged)


def _plan_global(
    num_ids: int, num_experts: int, reader: str, limits: DeviceLimits, large: bool
) -> AlignPlan:
    most = LARGE_MAX_PIECES if large else limits.num_sms
    grid = min(most, max(1, ceil_div(num_ids, 1024)))
    threads = 1024 if large else 512
    pieces = _cut(num_ids, grid, num_experts, threads, limits.shared_bytes, False)
    table = _table_bytes(num_experts, pieces.num_rows)
    if large:
        pieces = pieces._replace(staged=0, shared_bytes=0)
    if pieces.shared_bytes + STATIC_SHARED > limits.shared_bytes:
        raise ValueError(f"{num_experts} experts do not fit shared memory; kernel='global_large' does without")
    infix = "large_" if large else ""
    launches = (
        LaunchPlan(f"align_global/align_count_{infix}{reader}", grid, threads, 0 if large else 4 * num_experts),
        LaunchPlan(f"align_global/align_scatter_{infix}{reader}", grid, threads, pieces.shared_bytes),
    )
    scratch_words = grid * (num_experts + (table // 4 if large else 0))
    return AlignPlan(launches, pieces.per_block, pieces.num_rows, pieces.per_row, pieces.staged, scratch_words)


# ---- moe_sum ----------------------------------------------------------------------------------------------

# Blocks of 128 threads leave no thread idle at the usual hidden sizes, multiples of 1024 elements of 16 bits.
SUM_THREADS = 128


class SumPlan(NamedTuple):
    kernel: str
    units_per_token: int  # a unit is what one thread makes: 16 bytes of the output, or one element
    tokens_per_launch: int  # units of one launch are numbered below 2^31

    def launch(self, num_tokens: int) -> LaunchPlan:
        grid = ceil_div(num_tokens * self.units_per_token, SUM_THREADS)
        return LaunchPlan(self.kernel, grid, SUM_THREADS, 0)


@functools.cache
def plan_sum(
    topk: int, hidden: int, element: str, element_bytes: int, vectors: bool, extended: bool
) -> SumPlan:
    """`vectors`: rows, strides and pointers are multiples of 16 bytes. `extended`: more than the plain sum."""
    # As many slots at a time as there are: registers for more would keep threads off the SM.
    slots = next(n for n in (2, 4, 8) if n >= min(topk, 8))
    kind = "any" if not vectors else "ext" if extended else str(slots)
    units = hidden * element_bytes // 16 if vectors else hidden
    if units > INT32_MAX:
        raise ValueError(f"input: a hidden size of {hidden} is more than one launch can number")
    return SumPlan(f"moe_sum/moe_sum_{kind}_{element}", units, INT32_MAX // units)


# ---- gating -----------------------------------------------------------------------------------------------

GATE_KERNELS = ("plain", "full", "several", "wide")
MAX_TOPK = 64
# gate_warp.cu, Mode and kShare. Lane k of a row keeps the k-th winner.
GATE_SHARES = {"plain": (4, 8, 16), "full": (8, 16), "several": (4, 8)}
# A warp to itself is the quickest for a row; several in one are quicker once the GPU is full of warps.
SEVERAL_MIN_TOKENS = 1024
SEVERAL_MAX_LANES = 32
# A row or two for every SM; above, blocks of four warps, as an SM holds more warps than blocks.
GATE_WARPS = 4
# Threads of `wide` look at pieces of 8 experts and more; more threads only make barriers slower.
WIDE_MIN_SHARE = 8
WIDE_MAX_THREADS = 512
WIDE_STATIC_SHARED = 192


class GatePlan(NamedTuple):
    launch: LaunchPlan
    lanes_per_row: int = WARP
    vector_bytes: int = 0  # of the loads of the logits, where these are aligned to it; 0: one logit at a time


@functools.cache
def plan_gate(
    num_tokens: int,
    num_experts: int,
    topk: int,
    num_groups: int,
    element_bytes: int,
    with_bias: bool,
    with_softcap: bool,
    limits: DeviceLimits,
    kernel: str | None = None,
) -> GatePlan:
    """Choose the kernel and its launch; `kernel`, one of GATE_KERNELS, forces one.

    Raises ValueError where the kernel cannot do it.
    """
    if kernel is None:
        kernel = "full" if with_bias or num_groups > 1 else "plain"
        if num_tokens >= SEVERAL_MIN_TOKENS and _several_lanes(num_experts, topk) <= SEVERAL_MAX_LANES:
            kernel = "several" if num_groups == 1 else kernel
        if with_softcap or not _gate_share(kernel, num_experts, topk, num_groups):
            kernel = "wide"
    if kernel == "wide":
        return _plan_wide(num_tokens, num_experts, topk, num_groups, limits)
    if kernel not in GATE_KERNELS:
        raise ValueError(f"kernel={kernel!r}: expected one of {', '.join(GATE_KERNELS)}")
    share = _gate_share(kernel, num_experts, topk, num_groups)
    fits = share and (num_groups == 1 or kernel == "full") and (not with_bias or kernel != "plain")
    if not fits or with_softcap:
        raise ValueError(f"kernel={kernel!r} cannot do this (see gate_warp.cu); kernel='wide' can")
    lanes_per_row = _several_lanes(num_experts, topk) if kernel == "several" else WARP
    num_warps = ceil_div(num_tokens * lanes_per_row, WARP)
    warps = 1 if num_warps <= 2 * limits.num_sms else GATE_WARPS
    launch = LaunchPlan(f"gate_warp/gate_{kernel}_{share}", ceil_div(num_warps, warps), WARP * warps, 0)
    group_size, vector = num_experts // num_groups, min(16, share * element_bytes)
    whole = num_groups == 1 or ceil_div(group_size, _group_lanes(num_groups)) == share
    return GatePlan(launch, lanes_per_row, vector if whole and group_size * element_bytes % vector == 0 else 0)


def _gate_share(kernel: str, num_experts: int, topk: int, num_groups: int) -> int:
    """The smallest kShare that holds a row; 0: none does."""
    lanes = _several_lanes(num_experts, topk) if kernel == "several" else _group_lanes(num_groups)
    if topk > WARP or lanes == 0 or (kernel == "several" and lanes > SEVERAL_MAX_LANES):
        return 0
    return next((share for share in GATE_SHARES[kernel] if num_experts // num_groups <= share * lanes), 0)


def _group_lanes(num_groups: int) -> int:
    return WARP >> (num_groups - 1).bit_length()


def _several_lanes(num_experts: int, topk: int) -> int:
    """Enough lanes to hold a row, and its winners."""
    return 1 << (max(ceil_div(num_experts, GATE_SHARES["several"][-1]), topk) - 1).bit_length()


def _plan_wide(
    num_tokens: int, num_experts: int, topk: int, num_groups: int, limits: DeviceLimits
) -> GatePlan:
    shared_bytes = 4 * (num_experts + num_groups + 2 * topk)
    if shared_bytes + WIDE_STATIC_SHARED > limits.shared_bytes:
        raise ValueError(
            f"gating_output: {num_experts} experts need {shared_bytes} bytes of shared memory, of which the device"
            f" has {limits.shared_bytes}"
        )
    threads = min(WIDE_MAX_THREADS, round_up(ceil_div(num_experts, WIDE_MIN_SHARE), WARP))
    return GatePlan(LaunchPlan("gate_wide/gate_wide", num_tokens, threads, shared_bytes))


# ---- batched align ----------------------------------------------------------------------------------------

# Writing 8 KB takes a block about as long as adding up the counts of all experts.
BATCHED_SLOTS_PER_BLOCK = 2048
BATCHED_THREADS = 256


def plan_batched(num_batches: int, slots_per_batch: int) -> tuple[LaunchPlan, int]:
    """The launch, and how many blocks share a batch."""
    parts = ceil_div(slots_per_batch, BATCHED_SLOTS_PER_BLOCK)
    return LaunchPlan("align_batched/align_batched", max(1, num_batches * parts), BATCHED_THREADS, 0), parts
