"""fused_experts: tiles of the two products, from how many rows an expert has on average.

There is no table of sizes: a tile has about as many rows as an expert, since more are padding, and fewer read
the weights again. What a row becomes does not depend on the tile, only on the kind of its products.
"""

from __future__ import annotations

from typing import NamedTuple

from .base import Constant, DeviceLimits, LaunchPlan, ceil_div, round_up

MAX_LOCAL_EXPERTS = 1024
ROW_BYTES = 2 * Constant(64, "experts/experts.cuh:kDepth")
# Blocks of pairs that take the tiles of columns together, where an expert has several: more read its weights
# from L2 once, fewer the rows.
GROUP_BLOCKS = 8


class Tile(NamedTuple):
    """As in the ENTRIES of the unit."""

    unit: str
    rows: int
    weight_rows: int
    threads: int
    shared_bytes: int
    mean_rows: float  # of an expert, up to which it is taken


def _mma(rows: int, weight_rows: int, stages: int, mean_rows: float) -> Tile:
    shared_bytes = stages * (rows + weight_rows) * ROW_BYTES
    return Tile("experts_mma", rows, weight_rows, 128, shared_bytes, mean_rows)


def _wgmma(rows: int, weight_rows: int, stages: int, mean_rows: float) -> Tile:
    shared_bytes = stages * (rows + weight_rows) * ROW_BYTES + 1024
    return Tile("experts_wgmma", rows, weight_rows, 2 * rows, shared_bytes, mean_rows)


# The first that the device runs and whose rows are enough.
TILES = {
    "mma_16": _mma(16, 64, 8, 10),
    "mma_32": _mma(32, 128, 4, 40),
    "wgmma_64": _wgmma(64, 128, 4, 80),
    "wgmma_128": _wgmma(128, 256, 4, float("inf")),
    "mma_64": _mma(64, 128, 4, 80),
    "mma_128": _mma(128, 128, 3, float("inf")),
}
EXPERTS_KERNELS = tuple(TILES)


class ExpertsPlan(NamedTuple):
    kernel: str  # one of EXPERTS_KERNELS
    block_size: int  # of the alignment
    group_blocks: int
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
) -> ExpertsPlan:
    """Choose tiles; `kernel`, one of EXPERTS_KERNELS, forces one. `num_experts` are those that are here,
    `all_experts` those that a map may name.

    Raises ValueError where the device cannot do it.
    """
    if not limits.runs("experts_mma"):
        raise ValueError("hidden_states: fused_experts needs a GPU of compute capability 8.0 or newer")
    mean = num_pairs / num_experts
    name = kernel or next(n for n, t in TILES.items() if mean <= t.mean_rows and limits.runs(t.unit))
    tile = TILES[name]
    if not limits.runs(tile.unit):
        raise ValueError(f"kernel={name!r}: this device has no {tile.unit.removeprefix('experts_')}")
    # The most blocks, where every expert has a pair, and all others go to one.
    blocks = min(num_pairs, all_experts) + max(0, num_pairs - all_experts) // tile.rows
    group_blocks = 1 if mean <= tile.rows else GROUP_BLOCKS
    columns = tile.weight_rows // 2 if gated else tile.weight_rows, tile.weight_rows

    def launch(kind: str, width: int, tile_columns: int) -> LaunchPlan:
        grid = round_up(blocks, group_blocks) * ceil_div(width, tile_columns)
        entry = f"{tile.unit}_{kind}_{tile.rows}_{element}"
        return LaunchPlan(tile.unit, entry, grid, tile.threads, tile.shared_bytes)

    first = launch("gated" if gated else "plain", intermediate, columns[0])
    second = launch("plain", hidden, columns[1])
    return ExpertsPlan(name, tile.rows, group_blocks, (first, second), columns)
