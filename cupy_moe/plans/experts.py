"""fused_experts: kernels, tiles and grids of the two products.

There is no table of sizes. A handful of pairs goes straight from ids to the summed output. Else pairs are
aligned: on Hopper, wgmma takes blocks of 128 of them, and multiplies only where half a block has rows; on
other devices a tile has about as many rows as an expert, since more are padding, and fewer read the weights
again. What a row becomes does not depend on the tile, only on the kind of its products.
"""

from __future__ import annotations

from typing import NamedTuple

from .base import Constant, DeviceLimits, LaunchPlan, ceil_div, round_up

MAX_LOCAL_EXPERTS = Constant(1024, "experts/wgmma.cuh:kMaxLocalExperts")
ROW_BYTES = 2 * Constant(64, "experts/experts.cuh:kDepth")

DIRECT_MAX_PAIRS = Constant(128, "experts/swapped.cuh:kMaxPairs")
DIRECT_GROUP_PAIRS = Constant(8, "experts/swapped.cuh:kGroupPairs")
DIRECT_WEIGHT_ROWS = Constant(64, "experts/experts_direct.cu:kTileWeights")
DIRECT_STAGES = Constant(10, "experts/experts_direct.cu:kStages")
DIRECT_THREADS = DIRECT_MAX_PAIRS  # one for each
# Of an expert, on average: groups of 8 pairs read its weights, and few experts should have two of them.
DIRECT_MEAN_PAIRS = 4
# Two blocks find room on an SM, but with so much each: one.
DIRECT_ALONE_BYTES = 116 * 1024
DIRECT_STATIC_BYTES = 6 * 1024  # `Groups`, rounded up
RESERVED_BYTES = 1024  # of a block, by CUDA

QUANTIZED_FEW_ROWS = Constant(64, "experts/quantized.cuh:kFewWeights")
QUANTIZED_MANY_ROWS = Constant(128, "experts/quantized.cuh:kManyWeights")
QUANTIZED_STAGES = Constant(3, "experts/quantized.cuh:kStages")
QUANTIZED_BIG_STAGES = Constant(2, "experts/quantized.cuh:kBigStages")
QUANTIZED_BIG_PAIRS = Constant(48, "experts/quantized.cuh:kBigPairs")
# Of an expert, on average, up to which blocks of 16 take less time than those of 48 on an H200.
QUANTIZED_MEAN_PAIRS = 32
# On an SM, at most, by the pairs of a block.
QUANTIZED_BLOCKS = {
    8: Constant(6, "experts/quantized.cuh:kFewBlocks"),
    16: Constant(3, "experts/quantized.cuh:kManyBlocks"),
    48: Constant(2, "experts/quantized.cuh:kBigBlocks"),
}
QUANTIZED_BITS = {"fp8": 8, "int8": 8, "int4": 4}

WGMMA_ROWS = Constant(128, "experts/wgmma.cuh:kTileRows")
WGMMA_WEIGHT_ROWS = Constant(256, "experts/wgmma.cuh:kWeightRows")
WGMMA_BOX_ROWS = Constant(128, "experts/wgmma.cuh:kBoxRows")
WGMMA_STAGES = Constant(4, "experts/wgmma.cuh:kStages")
WGMMA_THREADS = Constant(384, "experts/wgmma.cuh:kThreads")
WGMMA_RING = Constant(2, "experts/wgmma.cuh:kRing")
WGMMA_PRODUCT_WARPS = Constant(8, "experts/wgmma.cuh:kProductWarps")
WGMMA_WRITE_ROWS = Constant(16, "experts/wgmma.cuh:kWriteRows")
# About as many rows as columns of the output are then worked on at once, which reads the least from memory.
WGMMA_GROUP_TWOS = 8

# Blocks of pairs that take the tiles of columns together, where an expert has several: more read its weights
# from L2 once, fewer the rows.
MMA_GROUP_BLOCKS = 8
# Blocks of a kernel that begins early go where there is room first: a few would share some SMs, and leave
# others idle.
MMA_OVERLAP_ROUNDS = 4


class Tile(NamedTuple):
    """As in the ENTRIES of experts_mma.cu, and of experts_mma_fp8.cu the only one."""

    rows: int
    weight_rows: int
    stages: int
    mean_rows: float = float("inf")  # of an expert, up to which it is taken
    threads: int = 128
    scale_bytes: int = 0  # of a stage


TILES = {
    "mma_16": Tile(16, 64, 8, 10),
    "mma_32": Tile(32, 128, 4, 40),
    "mma_64": Tile(64, 128, 4, 80),
    "mma_128": Tile(128, 128, 3),
}
EXPERTS_KERNELS = ("direct", "wgmma", *TILES)

MMA_FP8_ROWS = Constant(128, "experts/experts_mma_fp8.cu:kTileRows")
MMA_FP8_TILE = Tile(
    int(MMA_FP8_ROWS),
    int(Constant(256, "experts/experts_mma_fp8.cu:kTileWeights")),
    int(Constant(2, "experts/experts_mma_fp8.cu:kStages")),
    threads=int(Constant(256, "experts/experts_mma_fp8.cu:kThreads")),
    scale_bytes=4 * (MMA_FP8_ROWS + 4),  # sizeof(StageScales)
)
# Of an expert, on average: quantized_16 and quantized_48 leave rows as they are, but take more time then.
# From where on mma_fp8 takes less time, nobody has measured yet.
MMA_FP8_MEAN_ROWS = 32

# Which take products of fp8, as rows are then, too: one or the other by what a device has.
FP8_KERNELS = ("wgmma_fp8", "mma_fp8")
# By the pairs that share what is read and decoded of the weights.
QUANTIZED_KERNELS = ("quantized_8", "quantized_16", "quantized_48", *FP8_KERNELS)


class Reading(NamedTuple):
    """How fast a kernel reads weights: bytes a microsecond of a tile, and of all together, and what it takes
    beside that. Of an H200; on others, what they have to each other is about the same."""

    tile: float
    most: float
    beside_us: float


READING_8 = Reading(8e3, 3.7e6, 2)
READING_FP8 = Reading(50e3, 4.1e6, 18)


class ExpertsPlan(NamedTuple):
    kernel: str  # one of EXPERTS_KERNELS, or of QUANTIZED_KERNELS
    block_size: int  # of the alignment; 0 where there is none
    group_blocks: int  # of pairs that take the tiles of columns together; of wgmma, twos of them
    products: tuple[LaunchPlan, LaunchPlan]
    columns: tuple[int, int]  # of the output, that a tile of each product makes


def plan_experts(
    num_pairs: int,
    num_experts: int,
    all_experts: int,
    hidden: int,
    intermediate: int,
    element: str,
    gated: bool,
    limits: DeviceLimits,
    kernel: str | None = None,
    weight_format: str | None = None,
    multiplies_fp8: bool = False,
) -> ExpertsPlan:
    """Choose kernels; `kernel`, one of EXPERTS_KERNELS, or of QUANTIZED_KERNELS if weights have a format of
    QUANTIZED_BITS, forces one. `num_experts` are those that are here, `all_experts` those that a map may
    name; `multiplies_fp8`: sizes and scales are such that rows may become fp8, too.

    Raises ValueError where the device cannot do it, or the forced kernel not these sizes.
    """
    if not limits.runs("experts_mma"):
        raise ValueError("hidden_states: fused_experts needs a GPU of compute capability 8.0 or newer")
    kinds = "gated" if gated else "plain", "plain"
    widths = intermediate, hidden
    if weight_format:
        few = num_pairs <= DIRECT_MAX_PAIRS and num_pairs <= DIRECT_MEAN_PAIRS * num_experts
        reads = few and _reads_faster_by_8(num_pairs, num_experts, hidden, intermediate, gated)
        if kernel == "wgmma_fp8" or (kernel is None and multiplies_fp8 and not reads):
            plan = _plan_wgmma(kinds, element, limits, True)
            if plan:
                return plan
            if kernel:
                raise ValueError("kernel='wgmma_fp8': this device has no wgmma, or no clusters of two blocks")
        many = num_pairs >= MMA_FP8_MEAN_ROWS * all_experts
        if kernel == "mma_fp8" or (kernel is None and multiplies_fp8 and many):
            if limits.runs("experts_mma_fp8"):
                return _plan_mma(
                    "mma_fp8", num_pairs, num_experts, all_experts, widths, kinds, element, limits
                )
            if kernel:
                raise ValueError(
                    "kernel='mma_fp8' is for compute capability 8.9, 10.0, 10.3, 12.0 and 12.1; on Hopper,"
                    " 'wgmma_fp8' does the same"
                )
        return _plan_quantized(
            num_pairs,
            num_experts,
            all_experts,
            widths,
            kinds,
            element,
            weight_format,
            limits,
            kernel,
            few,
        )
    if kernel in (None, "direct"):
        entries = tuple(f"experts_direct_{kind}_{element}" for kind in kinds)
        plan = _plan_direct(num_pairs, hidden, intermediate, entries, limits)
        if plan and (kernel or num_pairs <= DIRECT_MEAN_PAIRS * num_experts):
            return plan
        if kernel:
            raise ValueError(f"kernel='direct': at most {DIRECT_MAX_PAIRS} pairs, got {num_pairs}")
    if kernel in (None, "wgmma"):
        plan = _plan_wgmma(kinds, element, limits, False)
        if plan:
            return plan
        if kernel:
            raise ValueError("kernel='wgmma': this device has no wgmma, or no clusters of two blocks")
    mean = num_pairs / num_experts
    name = kernel or next(name for name, tile in TILES.items() if mean <= tile.mean_rows)
    return _plan_mma(name, num_pairs, num_experts, all_experts, widths, kinds, element, limits)


def _plan_mma(
    name: str,
    num_pairs: int,
    num_experts: int,
    all_experts: int,
    widths: tuple[int, int],
    kinds: tuple[str, str],
    element: str,
    limits: DeviceLimits,
) -> ExpertsPlan:
    if name == "mma_fp8":
        unit, tile, names = "experts_mma_fp8", MMA_FP8_TILE, (f"first_{kinds[0]}", "second")
    else:
        unit, tile = "experts_mma", TILES[name]
        names = f"{kinds[0]}_{tile.rows}", f"{kinds[1]}_{tile.rows}"
    # The most blocks, where every expert has a pair, and all others go to one.
    blocks = min(num_pairs, all_experts) + max(0, num_pairs - all_experts) // tile.rows
    group_blocks = 1 if num_pairs <= tile.rows * num_experts else MMA_GROUP_BLOCKS
    columns = tile.weight_rows // 2 if kinds[0] == "gated" else tile.weight_rows, tile.weight_rows
    shared_bytes = tile.stages * ((tile.rows + tile.weight_rows) * ROW_BYTES + tile.scale_bytes)

    def launch(name: str, width: int, tile_columns: int) -> LaunchPlan:
        grid = round_up(blocks, group_blocks) * ceil_div(width, tile_columns)
        overlaps = grid >= MMA_OVERLAP_ROUNDS * limits.num_sms
        return LaunchPlan(unit, f"{unit}_{name}_{element}", grid, tile.threads, shared_bytes, overlaps)

    first, second = map(launch, names, widths, columns)
    return ExpertsPlan(name, tile.rows, group_blocks, (first, second), columns)


def _reads_faster_by_8(num_pairs: int, num_experts: int, hidden: int, intermediate: int, gated: bool) -> bool:
    """Whether quantized_8 takes less time than wgmma_fp8, where that depends on how weights are read."""
    hit = num_experts * (1 - (1 - 1 / num_experts) ** num_pairs)
    rows = 2 * intermediate if gated else intermediate

    def us(kernel: Reading, tile_rows: int) -> float:
        sizes = (rows, hidden), (hidden, intermediate)
        return kernel.beside_us + sum(
            hit * height * depth / min(kernel.most, kernel.tile * hit * ceil_div(height, tile_rows))
            for height, depth in sizes
        )

    return us(READING_8, QUANTIZED_FEW_ROWS) <= us(READING_FP8, WGMMA_WEIGHT_ROWS)


def _plan_quantized(
    num_pairs: int,
    num_experts: int,
    all_experts: int,
    widths: tuple[int, int],
    kinds: tuple[str, str],
    element: str,
    weight_format: str,
    limits: DeviceLimits,
    kernel: str | None,
    few: bool,
) -> ExpertsPlan:
    is_big = num_pairs > QUANTIZED_MEAN_PAIRS * all_experts
    name = kernel or ("quantized_8" if few else "quantized_48" if is_big else "quantized_16")
    pairs = int(name.removeprefix("quantized_"))
    if pairs == DIRECT_GROUP_PAIRS and num_pairs > DIRECT_MAX_PAIRS:
        raise ValueError(f"kernel={name!r}: at most {DIRECT_MAX_PAIRS} pairs, got {num_pairs}")
    is_few = pairs == DIRECT_GROUP_PAIRS
    rows = int(QUANTIZED_FEW_ROWS if is_few else QUANTIZED_MANY_ROWS)
    stages = QUANTIZED_BIG_STAGES if pairs == QUANTIZED_BIG_PAIRS else QUANTIZED_STAGES
    shared_bytes = stages * ROW_BYTES * (rows + pairs * 16 // QUANTIZED_BITS[weight_format])
    beside = DIRECT_STATIC_BYTES if is_few else RESERVED_BYTES
    per_sm = min(QUANTIZED_BLOCKS[pairs], max(1, limits.shared_bytes // (shared_bytes + beside)))
    columns = tuple(rows // (2 if kind == "gated" else 1) for kind in kinds)
    # The most groups, where every expert has a pair, and all others go to one.
    groups = min(num_pairs, all_experts) + max(0, num_pairs - all_experts) // pairs

    def launch(kind: str, width: int, tile: int) -> LaunchPlan:
        grid = min(per_sm * limits.num_sms, groups * ceil_div(width, tile))
        entry = f"experts_{weight_format}_{kind}_{pairs}_{element}"
        return LaunchPlan(f"experts_{weight_format}", entry, grid, int(DIRECT_THREADS), shared_bytes, True)

    first, second = map(launch, kinds, widths, columns)
    block_size = 0 if is_few else pairs
    return ExpertsPlan(name, block_size, 1, (first, second), (columns[0], columns[1]))


def _plan_direct(
    num_pairs: int, hidden: int, intermediate: int, entries: tuple[str, ...], limits: DeviceLimits
) -> ExpertsPlan | None:
    if num_pairs > DIRECT_MAX_PAIRS:
        return None
    shared_bytes = DIRECT_STAGES * (DIRECT_WEIGHT_ROWS + DIRECT_GROUP_PAIRS) * ROW_BYTES
    is_gated = "gated" in entries[0]
    columns = DIRECT_WEIGHT_ROWS // 2 if is_gated else int(DIRECT_WEIGHT_ROWS), int(DIRECT_WEIGHT_ROWS)

    def launch(entry: str, width: int, tile: int) -> LaunchPlan:
        # Blocks that begin early go where there is room first: a few would share some SMs, and leave others.
        tiles = num_pairs * ceil_div(width, tile)
        is_alone = tiles <= limits.num_sms and limits.shared_bytes > DIRECT_ALONE_BYTES + DIRECT_STATIC_BYTES
        size = DIRECT_ALONE_BYTES if is_alone else shared_bytes
        grid = min(2 * limits.num_sms, tiles)
        return LaunchPlan("experts_direct", entry, grid, DIRECT_THREADS, size, True)

    first, second = launch(entries[0], intermediate, columns[0]), launch(entries[1], hidden, columns[1])
    return ExpertsPlan("direct", 0, 1, (first, second), columns)


def _plan_wgmma(kinds: tuple[str, str], element: str, limits: DeviceLimits, fp8: bool) -> ExpertsPlan | None:
    unit = "experts_wgmma_fp8" if fp8 else "experts_wgmma"
    if not limits.runs(unit):
        return None
    entries = [f"{unit}_{kind}_{element}" for kind in kinds]
    if fp8:
        entries = [f"{unit}_first_{kinds[0]}_{element}", f"{unit}_second_{element}"]
    clusters = limits.max_clusters(unit, entries[1], 2)
    if not clusters:
        return None
    # The stages, what aligns them, and sizeof(Shared): what is written, barriers, jobs, experts, and 34 words
    shared_bytes = WGMMA_STAGES * (WGMMA_ROWS + WGMMA_WEIGHT_ROWS) * ROW_BYTES + 1024
    shared_bytes += WGMMA_PRODUCT_WARPS * WGMMA_WRITE_ROWS * ROW_BYTES
    barriers = 2 * WGMMA_STAGES + 3 * WGMMA_RING
    words = 2 * barriers + WGMMA_RING * (WGMMA_ROWS + 4) + 3 * MAX_LOCAL_EXPERTS + 34
    shared_bytes += round_up(4 * words, 16)
    if fp8:
        shared_bytes += WGMMA_STAGES * 4 * 4  # sizeof(StageScales)
    first, second = (
        LaunchPlan(unit, entry, 2 * clusters, WGMMA_THREADS, shared_bytes, True) for entry in entries
    )
    columns = (
        WGMMA_WEIGHT_ROWS // 2 if kinds[0] == "gated" else int(WGMMA_WEIGHT_ROWS),
        int(WGMMA_WEIGHT_ROWS),
    )
    name = "wgmma_fp8" if fp8 else "wgmma"
    return ExpertsPlan(name, int(WGMMA_ROWS), WGMMA_GROUP_TWOS, (first, second), columns)
