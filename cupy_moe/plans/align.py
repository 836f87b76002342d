"""moe_align_block_size: the sizes of its outputs, and the fastest kernel that the device can run.

The sizes of shared memory follow the formulas at the head of the `.cu` files; `scratch_words` is what
`align_global` needs beside the outputs, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from ..values import INT32_MAX, as_bool, as_int, check_range
from .base import MAX_EXPERTS, WARP, Constant, DeviceLimits, LaunchPlan, ceil_div, divisor, round_up

MAX_BLOCK_SIZE = 65_536

# align_small compares all pairs of ids: fast for a few, and independent of E.
SMALL_FAST_IDS, SMALL_MAX_IDS = 64, Constant(128, "align/small.cuh:kMaxIds")
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
# blocks may count the same ids before that costs more than it saves. Padding takes a warp 0.2 us an expert.
SHARED_SLOTS_PER_BLOCK, SHARED_IDS_PER_BLOCK, SHARED_EXPERTS_PER_BLOCK = 256, 32, 32
SHARED_MAX_BLOCKS = 72
CLUSTER_IDS_PER_BLOCK = 512
# Each instruction of a block's common work is issued for each of its warps, so few ids want few threads.
THREADS_FOR_WORK = ((1_024, 128), (4_096, 256), (12_288, 512), (INT32_MAX, 1024))
# Tables in global memory are wide; fewer pieces keep them few.
LARGE_MAX_BLOCKS = 16
STATIC_SHARED = 144  # warp_sums and the inbox in the .cu files


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
            f"block_size: {num_ids} ids, num_experts={num_experts} and block_size={block_size} need"
            f" {num_slots} slots, more than int32 can number ({INT32_MAX}); split the batch or take a smaller"
            " block_size"
        )
    return num_slots, ceil_div(num_slots, block_size)


class AlignPlan(NamedTuple):
    kernel: str  # one of ALIGN_KERNELS
    launches: tuple[LaunchPlan, ...]
    arguments: Mapping[str, Any]  # what the plan chooses of the kernel's argument struct, by name
    scratch_words: int = 0
    cluster: int = 1  # blocks of a cluster


def plan_align(
    num_ids: int,
    num_experts: int,
    num_slots: int,
    block_size: int,
    reader: str,
    limits: DeviceLimits,
    kernel: str | None = None,
    family: str = "align",
    teams: int = 1,
) -> AlignPlan:
    """Choose the kernel and its launch; `kernel`, one of ALIGN_KERNELS, forces one.

    `reader` is the suffix of the entry point: "i32" or "i64" for contiguous ids aligned to 16 bytes, else
    "any". `family` is its prefix: "align", "sort" for the same with by-products, or "lora". With several
    `teams`, each makes an alignment on its share of the device.
    Raises ValueError where the forced kernel cannot do it.
    """
    if teams > 1:
        limits = _share(limits, teams)
    sizes = _Sizes(num_ids, num_experts, num_slots, block_size, reader, family)
    fastest = [name for name, least, most in _RANKING if least <= num_ids <= most]
    refused = ""
    for name in fastest if kernel is None else [kernel]:
        plan = _KERNELS[name](sizes, limits)
        if isinstance(plan, AlignPlan):
            return plan if teams == 1 else _for_teams(plan, teams)
        refused = plan
    raise ValueError(f"kernel={kernel!r} {refused}")


def _share(limits: DeviceLimits, teams: int) -> DeviceLimits:
    """A cluster for each team, if there is any: they do not wait for each other."""

    def max_clusters(unit: str, entry: str, size: int) -> int:
        clusters = limits.max_clusters(unit, entry, size)
        return max(min(1, clusters), clusters // teams)

    return limits._replace(num_sms=max(1, limits.num_sms // teams), max_clusters=max_clusters)


def _for_teams(plan: AlignPlan, teams: int) -> AlignPlan:
    if plan.launches[0].grid * teams > INT32_MAX:
        raise ValueError(f"{teams} alignments of {plan.launches[0].grid} blocks are too many for one launch")
    launches = tuple(launch._replace(grid=launch.grid * teams) for launch in plan.launches)
    return plan._replace(launches=launches, scratch_words=plan.scratch_words * teams)


class _Sizes(NamedTuple):
    num_ids: int
    num_experts: int
    num_slots: int
    block_size: int
    reader: str
    family: str

    def unit(self, of_align: str) -> str:
        """Those of the other families have all their entries in one."""
        return of_align if self.family == "align" else f"align_{self.family}"


def _plan_small(sizes: _Sizes, limits: DeviceLimits) -> AlignPlan | str:
    if sizes.family == "sort":
        return "makes no by-products"
    if sizes.num_ids > SMALL_MAX_IDS:
        return f"takes at most {SMALL_MAX_IDS} ids, got {sizes.num_ids}"
    slots_per_block = max(1, SMALL_SLOTS_PER_BLOCK // sizes.block_size) * sizes.block_size
    grid = max(1, ceil_div(sizes.num_slots, slots_per_block))
    # A thread compares with 16 to 32 ids.
    lanes = 1 if sizes.num_ids <= 16 else 2 if sizes.num_ids <= 32 else 4
    block = round_up((sizes.num_ids + 1) * lanes, WARP)
    launch = LaunchPlan(sizes.unit("align_small"), f"{sizes.family}_small_{sizes.reader}", grid, block)
    return AlignPlan("small", (launch,), {"slots_per_block": slots_per_block, "lanes_per_id": lanes})


def _plan_shared(sizes: _Sizes, limits: DeviceLimits, cluster: int) -> AlignPlan | str:
    """One launch; with clusters, each of these counts all ids together, and a block only its share."""
    num_ids, reader, unit = sizes.num_ids, sizes.reader, sizes.unit("align_shared")
    entry = (
        f"{sizes.family}_shared_cluster{cluster}_{reader}"
        if cluster > 1
        else f"{sizes.family}_shared_{reader}"
    )
    if cluster > 1:
        if reader == "any":
            return "takes contiguous int32 or int64 ids aligned to 16 bytes"
        if num_ids > cluster * CHUNK_MAX_IDS:
            return f"counts at most {cluster * CHUNK_MAX_IDS} ids, got {num_ids}"
        most = limits.max_clusters(unit, entry, cluster) * cluster
        if most == 0:
            return f"cannot run: the device runs no cluster of {cluster} blocks"
        wanted = ceil_div(num_ids, CLUSTER_IDS_PER_BLOCK)
    else:
        most = min(SHARED_MAX_BLOCKS, limits.num_sms)
        wanted = max(
            ceil_div(num_ids, SHARED_IDS_PER_BLOCK),
            ceil_div(sizes.num_slots, SHARED_SLOTS_PER_BLOCK),
            ceil_div(sizes.num_experts, SHARED_EXPERTS_PER_BLOCK),
        )
    grid = round_up(max(1, min(wanted, most)), cluster)
    is_sorted = cluster == 16
    counted = ceil_div(num_ids, cluster)
    threads = CLUSTER16_THREADS if is_sorted else count_threads(counted, sizes.num_experts)
    pieces = cut_ids(sizes.num_ids, sizes.num_experts, grid, threads, limits, cluster, is_sorted)
    if pieces.shared_bytes + STATIC_SHARED > limits.shared_bytes:
        return (
            f"has no room: {sizes.num_experts} experts need {pieces.shared_bytes} bytes of shared memory;"
            " kernel='global_large' does not"
        )
    launch = LaunchPlan(unit, entry, grid, threads, pieces.shared_bytes)
    name = f"cluster{cluster}" if cluster > 1 else "shared"
    return AlignPlan(name, (launch,), pieces.arguments, cluster=cluster)


def _plan_global(sizes: _Sizes, limits: DeviceLimits) -> AlignPlan | str:
    """Two launches: count all pieces, then place them."""
    wanted = max(1, ceil_div(sizes.num_ids, GLOBAL_IDS_PER_BLOCK))
    grid = min(GLOBAL_FAST_BLOCKS, limits.num_sms, wanted)
    grid = max(grid, ceil_div(sizes.num_ids, limits.shared_bytes // 8))
    if grid > GLOBAL_MAX_BLOCKS:
        return f"would need {grid} blocks for {sizes.num_ids} ids"
    pieces = cut_ids(sizes.num_ids, sizes.num_experts, grid, 1024, limits, is_sorted=True)
    if pieces.shared_bytes + STATIC_SHARED > limits.shared_bytes:
        return (
            f"has no room for {sizes.num_experts} experts in shared memory; kernel='global_large' needs none"
        )
    stride, unit = _stride(sizes.num_experts), sizes.unit("align_global")
    launches = (
        LaunchPlan(unit, f"{sizes.family}_count_{sizes.reader}", grid, 1024, 4 * stride),
        LaunchPlan(unit, f"{sizes.family}_scatter_{sizes.reader}", grid, 1024, pieces.shared_bytes),
    )
    return AlignPlan("global", launches, pieces.arguments, grid * stride)


def _plan_global_large(sizes: _Sizes, limits: DeviceLimits) -> AlignPlan:
    """The same with all tables in global memory: anything, anywhere, slowly."""
    grid = min(LARGE_MAX_BLOCKS, max(1, ceil_div(sizes.num_ids, GLOBAL_IDS_PER_BLOCK)))
    pieces = cut_ids(sizes.num_ids, sizes.num_experts, grid, 1024, limits)
    unit = sizes.unit("align_global")
    launches = (
        LaunchPlan(unit, f"{sizes.family}_count_large_any", grid, 1024),
        LaunchPlan(unit, f"{sizes.family}_scatter_large_any", grid, 1024),
    )
    words = _stride(sizes.num_experts) + table_bytes(sizes.num_experts, pieces.num_rows) // 4
    return AlignPlan("global_large", launches, pieces.arguments, grid * words)


_KERNELS: dict[str, Callable[[_Sizes, DeviceLimits], AlignPlan | str]] = {  # a plan, or why there is none
    "small": _plan_small,
    "shared": partial(_plan_shared, cluster=1),
    "cluster8": partial(_plan_shared, cluster=8),
    "cluster16": partial(_plan_shared, cluster=16),
    "global": _plan_global,
    "global_large": _plan_global_large,
}
ALIGN_KERNELS = tuple(_KERNELS)

# The fastest first, and for how many ids; the first that can do it on the device is taken.
_RANKING = (
    ("small", 0, SMALL_FAST_IDS),
    ("cluster8", SHARED_FAST_IDS + 1, CLUSTER8_FAST_IDS),
    ("shared", 0, CLUSTER8_FAST_IDS),  # up to SMALL_FAST_IDS where "small" does not do it
    ("cluster16", CLUSTER8_FAST_IDS + 1, INT32_MAX),
    ("global", CLUSTER8_FAST_IDS + 1, INT32_MAX),
    ("small", SMALL_FAST_IDS + 1, SMALL_MAX_IDS),
    ("global_large", 0, INT32_MAX),
)


# ---- tables of counters, align.cuh ------------------------------------------------------------------------


class _Pieces(NamedTuple):
    per_block: int  # ids that one block places
    num_rows: int  # warps of a block that place ids
    per_row: int  # ids that one warp places
    shared_bytes: int

    @property
    def arguments(self) -> dict[str, Any]:
        return {"per_block": self.per_block, "per_row": divisor(self.per_row), "num_rows": self.num_rows}


def count_threads(num_ids: int, num_experts: int) -> int:
    """For a block that counts so many ids, 8 or more a thread."""
    work = max(num_ids, 8 * min(num_experts, 512))
    return next(threads for most_work, threads in THREADS_FOR_WORK if work <= most_work)


def cut_ids(
    num_ids: int,
    num_experts: int,
    grid: int,
    threads: int,
    limits: DeviceLimits,
    cluster: int = 1,
    is_sorted: bool = False,
) -> _Pieces:
    """A piece of ids for each of `grid` blocks, cut into as many ids for each of its warps."""
    per_block = max(WARP, round_up(ceil_div(num_ids, grid), WARP))
    stage = 4 * per_block if is_sorted else 0
    room = limits.shared_bytes - STATIC_SHARED - stage
    rows = threads // WARP
    while rows > 1 and table_bytes(num_experts, rows, cluster) > room:
        rows //= 2
    per_row = round_up(ceil_div(per_block, rows), WARP)
    rows = ceil_div(per_block, per_row)
    return _Pieces(per_block, rows, per_row, table_bytes(num_experts, rows, cluster) + stage)


def table_bytes(num_experts: int, num_rows: int, cluster: int = 1) -> int:
    exchanged = (cluster + 1) * 2 * round_up(num_experts, 8) if cluster > 1 else 0
    return 4 * (round_up(num_rows + 2, 2) + 1) * _stride(num_experts) + exchanged


def _stride(num_experts: int) -> int:
    return round_up(num_experts + 1, 4)
