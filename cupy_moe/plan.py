"""Sizes and device limits -> what to launch. Pure Python: no torch, no CuPy, no environment.

Every threshold stands here, with its reason. The sizes of shared memory follow the formulas at the head of
the `.cu` files; `scratch_words` is what `align_global` needs beside the outputs, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .arguments import INT32_MAX, as_bool, as_int, check_range

MAX_EXPERTS = MAX_BLOCK_SIZE = 65_536


class DeviceLimits(NamedTuple):
    num_sms: int
    shared_bytes: int  # opt-in limit of one block
    # Of a kernel and the size of its clusters: how many of these run at once if each block fills an SM. The
    # driver's answer, asked for only where clusters are an option, as that loads the kernel.
    max_clusters: Callable[[str, int], int]


class LaunchPlan(NamedTuple):
    kernel: str  # "<unit>/<entry point>"
    grid: int
    block: int
    shared_bytes: int


class AlignPlan(NamedTuple):
    kernel: str  # one of ALIGN_KERNELS
    launches: tuple[LaunchPlan, ...]
    per_block: int  # ids that one block places; align_small: slots that one block writes
    num_rows: int  # warps of a block that place ids; align_small: threads that share an id
    per_row: int = 1  # ids that one warp places
    scratch_words: int = 0


# ---- align ------------------------------------------------------------------------------------------------

ALIGN_KERNELS = ("small", "shared", "cluster8", "cluster16", "global", "global_large")

# align_small compares all pairs of ids: fast for a few, and independent of E. kMaxIds in align_small.cu.
SMALL_FAST_IDS, SMALL_MAX_IDS = 64, 128
# One block writes a few thousand slots in the time that a launch takes; more are spread over more blocks.
SMALL_SLOTS_PER_BLOCK = 1024
# Every block counting all ids needs no barrier between blocks, as long as counting is short. On GPUs without
# clusters it is the best there is up to CLUSTER8_FAST_IDS.
SHARED_FAST_IDS = 8_192
CLUSTER8_FAST_IDS = 49_152
# Counts are 16 bits wide where blocks tell them each other; a chunk is rounded up to 32 ids for each cluster.
CHUNK_MAX_IDS = 60_000
# The fastest of 384 to 1024 from 65 536 to 262 144 ids on an H200; above, 896 are 3 % faster.
CLUSTER16_THREADS = 640
# More pieces make for longer columns of counts, which every block adds up.
GLOBAL_IDS_PER_BLOCK, GLOBAL_FAST_BLOCKS = 1024, 64
# More blocks only where the ids of a piece, 4 bytes each to sort, would take over half of the shared memory.
GLOBAL_MAX_BLOCKS = 2048
# What one block writes in about the time of a barrier, as one SM takes a cycle or two a sector; and how many
# blocks may count the same ids before that costs more than it saves.
SHARED_SLOTS_PER_BLOCK, SHARED_IDS_PER_BLOCK = 256, 32
SHARED_MAX_BLOCKS = 72
CLUSTER_IDS_PER_BLOCK = 512
# Each instruction of a block's common work is issued for each of its warps, so few ids want few threads.
THREADS_FOR_WORK = ((1_024, 128), (4_096, 256), (12_288, 512), (INT32_MAX, 1024))
# Tables in global memory are wide; fewer pieces keep them few.
LARGE_MAX_BLOCKS = 16
STATIC_SHARED = 144  # warp_sums and the inbox in the .cu files
WARP = 32


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

    Raises TypeError and ValueError for wrong arguments, such as sizes that do not fit int32. Source of the
    rule: vLLM's `moe_align_block_size`.
    """
    num_ids, num_experts = as_int("num_ids", num_ids), as_int("num_experts", num_experts)
    block_size, pad_sorted_ids = as_int("block_size", block_size), as_bool("pad_sorted_ids", pad_sorted_ids)
    if num_ids < 0:
        raise ValueError(f"num_ids: expected 0 or more, got {num_ids}")
    check_range("num_experts", num_experts, MAX_EXPERTS)
    check_range("block_size", block_size, MAX_BLOCK_SIZE)
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

    `reader` is the suffix of the entry point: "i32" or "i64" for contiguous ids aligned to 16 bytes, else
    "any".
    Raises ValueError where the forced kernel cannot do it.
    """
    candidates = [kernel] if kernel else _rank_align(num_ids)
    for candidate in candidates:
        try:
            if candidate == "small":
                return _plan_small(num_ids, num_slots, block_size, reader)
            if candidate.startswith("global"):
                return _plan_global(num_ids, num_experts, reader, limits, large=candidate == "global_large")
            cluster = int(candidate.removeprefix("cluster")) if candidate != "shared" else 1
            return _plan_shared(num_ids, num_experts, num_slots, reader, limits, cluster)
        except _DoesNotFit as error:
            refused = error
    raise refused


class _DoesNotFit(ValueError):
    """This kernel cannot do it on this device; `global_large` can do anything anywhere."""


def _rank_align(num_ids: int) -> list[str]:
    """Kernels from the fastest on; the first that fits the device is taken."""
    if num_ids <= SMALL_FAST_IDS:
        return ["small"]
    if num_ids <= SHARED_FAST_IDS:
        return ["shared", "small", "global_large"]
    if num_ids <= CLUSTER8_FAST_IDS:
        return ["cluster8", "shared", "global_large"]
    return ["cluster16", "global", "global_large"]


def _stride(num_experts: int) -> int:
    return round_up(num_experts + 1, 4)


def _table_bytes(num_experts: int, num_rows: int, cluster: int = 1) -> int:
    exchanged = (cluster + 1) * 2 * round_up(num_experts, 8) if cluster > 1 else 0
    return 4 * (round_up(num_rows + 2, 2) + 1) * _stride(num_experts) + exchanged


class _Pieces(NamedTuple):
    per_block: int
    num_rows: int
    per_row: int
    shared_bytes: int


def _cut(
    num_ids: int, grid: int, num_experts: int, threads: int, shared_bytes: int, cluster: int, is_sorted: bool
) -> _Pieces:
    """A piece of ids for each of `grid` blocks, cut into as many ids for each of its warps."""
    per_block = max(WARP, round_up(ceil_div(num_ids, grid), WARP))
    stage = 4 * per_block if is_sorted else 0
    rows = threads // WARP
    while rows > 1 and _table_bytes(num_experts, rows, cluster) + stage + STATIC_SHARED > shared_bytes:
        rows //= 2
    per_row = round_up(ceil_div(per_block, rows), WARP)
    rows = ceil_div(per_block, per_row)
    return _Pieces(per_block, rows, per_row, _table_bytes(num_experts, rows, cluster) + stage)


def _plan_small(num_ids: int, num_slots: int, block_size: int, reader: str) -> AlignPlan:
    if num_ids > SMALL_MAX_IDS:
        raise _DoesNotFit(f"kernel='small' takes at most {SMALL_MAX_IDS} ids, got {num_ids}")
    per_block = max(1, SMALL_SLOTS_PER_BLOCK // block_size) * block_size
    grid = max(1, ceil_div(num_slots, per_block))
    lanes = 1 if num_ids <= 16 else 2 if num_ids <= 32 else 4  # a thread compares with 16 to 32 ids
    block = round_up((num_ids + 1) * lanes, WARP)
    launch = LaunchPlan(f"align_small/align_small_{reader}", grid, block, 0)
    return AlignPlan("small", (launch,), per_block, lanes)


def _plan_shared(
    num_ids: int, num_experts: int, num_slots: int, reader: str, limits: DeviceLimits, cluster: int
) -> AlignPlan:
    suffix = f"cluster{cluster}_{reader}" if cluster > 1 else reader
    kernel = f"align_shared/align_shared_{suffix}"
    if cluster > 1:
        if reader == "any":
            raise _DoesNotFit(
                f"kernel='cluster{cluster}' takes contiguous int32 or int64 ids aligned to 16 bytes"
            )
        if num_ids > cluster * CHUNK_MAX_IDS:
            raise _DoesNotFit(
                f"kernel='cluster{cluster}' counts at most {cluster * CHUNK_MAX_IDS} ids, got {num_ids}"
            )
        most = limits.max_clusters(kernel, cluster) * cluster
        if most == 0:
            raise _DoesNotFit(f"kernel='cluster{cluster}': the device runs no cluster of {cluster} blocks")
        wanted = ceil_div(num_ids, CLUSTER_IDS_PER_BLOCK)
    else:
        most = min(SHARED_MAX_BLOCKS, limits.num_sms)
        wanted = max(ceil_div(num_ids, SHARED_IDS_PER_BLOCK), ceil_div(num_slots, SHARED_SLOTS_PER_BLOCK))
    grid = round_up(max(1, min(wanted, most)), cluster)
    if cluster == 16:
        threads = CLUSTER16_THREADS
    else:
        # The ids that a block counts, 8 or more a thread.
        work = max(ceil_div(num_ids, cluster), 8 * min(num_experts, 512))
        threads = next(threads for most_work, threads in THREADS_FOR_WORK if work <= most_work)
    pieces = _cut(num_ids, grid, num_experts, threads, limits.shared_bytes, cluster, cluster == 16)
    if pieces.shared_bytes + STATIC_SHARED > limits.shared_bytes:
        raise _DoesNotFit(
            f"{num_experts} experts need {pieces.shared_bytes} bytes of shared memory;"
            " kernel='global_large' does not"
        )
    launch = LaunchPlan(kernel, grid, threads, pieces.shared_bytes)
    name = f"cluster{cluster}" if cluster > 1 else "shared"
    return AlignPlan(name, (launch,), pieces.per_block, pieces.num_rows, pieces.per_row)


def _plan_global(num_ids: int, num_experts: int, reader: str, limits: DeviceLimits, large: bool) -> AlignPlan:
    if large:
        grid = min(LARGE_MAX_BLOCKS, max(1, ceil_div(num_ids, GLOBAL_IDS_PER_BLOCK)))
    else:
        grid = min(GLOBAL_FAST_BLOCKS, limits.num_sms, max(1, ceil_div(num_ids, GLOBAL_IDS_PER_BLOCK)))
        grid = max(grid, ceil_div(num_ids, limits.shared_bytes // 8))
        if grid > GLOBAL_MAX_BLOCKS:
            raise _DoesNotFit(f"kernel='global' would need {grid} blocks for {num_ids} ids")
    threads = 1024
    pieces = _cut(num_ids, grid, num_experts, threads, limits.shared_bytes, 1, is_sorted=not large)
    table = _table_bytes(num_experts, pieces.num_rows)
    if large:
        pieces = pieces._replace(shared_bytes=0)
    if pieces.shared_bytes + STATIC_SHARED > limits.shared_bytes:
        raise _DoesNotFit(
            f"{num_experts} experts do not fit shared memory; kernel='global_large' does without"
        )
    suffix = "large_any" if large else reader
    launches = (
        LaunchPlan(
            f"align_global/align_count_{suffix}", grid, threads, 0 if large else 4 * _stride(num_experts)
        ),
        LaunchPlan(f"align_global/align_scatter_{suffix}", grid, threads, pieces.shared_bytes),
    )
    scratch_words = grid * (_stride(num_experts) + (table // 4 if large else 0))
    kernel = "global_large" if large else "global"
    return AlignPlan(kernel, launches, pieces.per_block, pieces.num_rows, pieces.per_row, scratch_words)


# ---- moe_sum ----------------------------------------------------------------------------------------------

# Blocks that leave no thread idle at the usual hidden sizes, multiples of 1024 16-bit elements. Where SMs get
# no more than one, blocks of half the size reach twice as many.
SUM_THREADS = 128
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
) -> SumPlan:
    """One launch for as many tokens as it can take.

    `vectors`: rows, strides and pointers are multiples of 16 bytes. `extended`: more than the plain sum.
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
    launch = LaunchPlan(f"moe_sum/moe_sum_{kind}_{element}", ceil_div(num_units, threads), threads, 0)
    return SumPlan(launch, per_token, num_tokens)


# ---- gating -----------------------------------------------------------------------------------------------

GATE_KERNELS = ("plain", "full", "several", "wide")
MAX_TOPK = 64
# gate_warp.cu, Mode and kShare. Lane k of a row keeps the k-th winner.
GATE_SHARES = {"plain": (4, 8, 16), "full": (8, 16), "several": (4, 8)}
# A warp to itself is the quickest for a row; several in one are quicker once the GPU is full of warps.
SEVERAL_MIN_TOKENS = 1024
SEVERAL_MAX_LANES = 8  # kSeveralMaxLanes in gate_warp.cu
# A row or two for every SM; above, blocks of four warps, as an SM holds more warps than blocks.
GATE_WARPS = 4
# Their threads have 32-bit numbers.
GATE_WARP_MAX_TOKENS = 2**32 // WARP - GATE_WARPS
# Threads of `wide` look at pieces of 8 experts and more; more threads only make barriers slower.
WIDE_MIN_SHARE = 8
WIDE_MAX_THREADS = 512
WIDE_STATIC_SHARED = 192


class GatePlan(NamedTuple):
    launch: LaunchPlan
    lanes_per_row: int = WARP
    vector_bytes: int = 0  # of the loads of the logits, where these are aligned to it; 0: one logit at a time


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
        share = _gate_share(kernel, num_experts, topk, num_groups)
        if with_softcap or not share or num_tokens > GATE_WARP_MAX_TOKENS:
            kernel = "wide"
    if kernel == "wide":
        return _plan_wide(num_tokens, num_experts, topk, num_groups, limits)
    share = _gate_share(kernel, num_experts, topk, num_groups)
    fits = share and (num_groups == 1 or kernel == "full") and (not with_bias or kernel != "plain")
    fits = fits and num_tokens <= GATE_WARP_MAX_TOKENS
    if not fits or with_softcap:
        raise ValueError(f"kernel={kernel!r} cannot do this (see gate_warp.cu); kernel='wide' can")
    lanes_per_row = _several_lanes(num_experts, topk) if kernel == "several" else WARP
    num_warps = ceil_div(num_tokens * lanes_per_row, WARP)
    warps = 1 if num_warps <= 2 * limits.num_sms else GATE_WARPS
    launch = LaunchPlan(f"gate_warp/gate_{kernel}_{share}", ceil_div(num_warps, warps), WARP * warps, 0)
    group_size, vector = num_experts // num_groups, min(16, share * element_bytes)
    whole = num_groups == 1 or ceil_div(group_size, _group_lanes(num_groups)) == share
    whole = whole and group_size * element_bytes % vector == 0
    return GatePlan(launch, lanes_per_row, vector if whole else 0)


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
            f"gating_output: {num_experts} experts need {shared_bytes} bytes of shared memory, of which the"
            f" device has {limits.shared_bytes}"
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
