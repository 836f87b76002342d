"""batched_moe_align_block_size: blocks that share a batch where it has many slots."""

from __future__ import annotations

from .base import LaunchPlan, ceil_div

# Writing 8 KB takes a block about as long as adding up the counts of all experts.
BATCHED_SLOTS_PER_BLOCK = 2048
BATCHED_THREADS = 256


def plan_batched(num_batches: int, slots_per_batch: int) -> tuple[LaunchPlan, int]:
    """The launch, and how many blocks share a batch."""
    parts = ceil_div(slots_per_batch, BATCHED_SLOTS_PER_BLOCK)
    return LaunchPlan("align_batched", "align_batched", max(1, num_batches * parts), BATCHED_THREADS), parts
