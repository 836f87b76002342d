"""fused_experts: tiles of the two products, from how many rows an expert has on average.

There is no table of sizes: a tile has about as many rows as an expert, since more are padding, and fewer read the
weights again. What a row becomes does not depend on the tile.
"""

from __future__ import annotations

from typing import NamedTuple

from .base import Constant, DeviceLimits, LaunchPlan, ceil_div

MAX_LOCAL_EXPERTS = 1024
MMA_DEPTH = Constant(64, "experts/experts_mma.cu:kDepth")


class Tile(NamedTuple):
    """As in the ENTRIES of experts_mma.cu."""

    rows: int
    weight_rows: int
    warps: int
    stages: int
    mean_rows: float  # of an expert, up to which it is taken

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.rows + self.weight_rows) * MMA_DEPTH * 2


TILES = {
    "mma_16": Tile(16, 64, 4, 8, 12),
    "mma_32": Tile(32, 128, 4, 4, 24),
    "mma_64": Tile(64, 128, 4, 4, 80),
    "mma_128": Tile(128, 128, 8, 3, float("inf")),
}
EXPERTS_KERNELS = tuple(TILES)


class ExpertsPlan(NamedTuple):
    kernel: str  # one of EXPERTS_KERNELS
    block_size: int  # of the alignment
    products: tuple[LaunchPlan, LaunchPlan]
    columns: tuple[int, int]  # of the output, that a tile of each product makes


def plan_experts(
    num_pairs: int,
    num_experts: int,
    hidden: int,
    intermediate: int,
    element: str,
    gated: bool,
    limits: DeviceLimits,
    kernel: str | None = None,
) -> ExpertsPlan:
    """Choose tiles; `kernel`, one of EXPERTS_KERNELS, forces one. `num_experts` are those that are here.

    Raises ValueError where the device cannot do it.
    """
    if not limits.runs("experts_mma"):
        raise ValueError("hidden_states: fused_experts needs a GPU of compute capability 8.0 or newer")
    mean = num_pairs / num_experts
    name = kernel or next(name for name, tile in TILES.items() if mean <= tile.mean_rows)
    tile = TILES[name]
    # Of so many pairs, each expert but the first may begin a block that is not full.
    blocks = max(1, min(num_pairs, ceil_div(num_pairs + num_experts * (tile.rows - 1), tile.rows)))
    columns = tile.weight_rows // 2 if gated else tile.weight_rows, tile.weight_rows

    def launch(kind: str, width: int, tile_columns: int) -> LaunchPlan:
        grid = blocks * ceil_div(width, tile_columns)
        entry = f"experts_mma_{kind}_{tile.rows}_{element}"
        return LaunchPlan("experts_mma", entry, grid, 32 * tile.warps, tile.shared_bytes)

    first = launch("gated" if gated else "plain", intermediate, columns[0])
    second = launch("plain", hidden, columns[1])
    return ExpertsPlan(name, tile.rows, (first, second), columns)
