"""Expert parallelism: what messages between ranks look like, and the launches that write and read them."""

from __future__ import annotations

from typing import NamedTuple

from .base import WARP, Constant, LaunchPlan, ceil_div, round_up

MAX_TOPK = Constant(64, "parallel/message.cuh:kMaxTopk")
# Of which each has a thread in a block.
MAX_RANKS = Constant(256, "parallel/message.cuh:kMaxRanks")
MESSAGE_THREADS = Constant(256, "parallel/message.cuh:kThreads")
# Of 16 bytes, that a thread of `ep_pack` and `ep_expand` has asked for at once.
MESSAGE_HELD = Constant(4, "parallel/message.cuh:kHeld")
ROUTE_THREADS = Constant(128, "parallel/ep_route.cu:kThreads")
# Which one block sorts, too.
FEW_PAIRS = Constant(1024, "parallel/ep_route.cu:kFewPairs")
FEW_RANKS = Constant(32, "parallel/ep_route.cu:kFewRanks")
BLOCKS_PER_SM = 2


class MessageLayout(NamedTuple):
    """A row in a message, in bytes; words are of 32 bits.

    The row itself, a multiple of 16 bytes; K words, the local id of each of its token's pairs, -1 if that is
    of another rank; K words, the weights; a word, where the first of its pairs comes back; its scales.
    """

    row_bytes: int
    topk: int
    scale_bytes: int

    @property
    def first_pair(self) -> int:
        """In words, from the end of the row on."""
        return 2 * self.topk

    @property
    def scales(self) -> int:
        return self.row_bytes + 4 * (2 * self.topk + 1)

    @property
    def pitch(self) -> int:
        return round_up(self.scales + self.scale_bytes, 16)


def plan_route(num_pairs: int, num_ranks: int) -> LaunchPlan:
    """With `ep_route_few`, which sorts, too; `ep_route` leaves that to moe_sort."""
    if num_pairs <= FEW_PAIRS and num_ranks <= FEW_RANKS:
        threads = round_up(max(num_pairs, 2 * num_ranks), WARP)
        return LaunchPlan("ep_route", "ep_route_few", 1, threads, overlaps=True)
    return LaunchPlan(
        "ep_route", "ep_route", max(1, ceil_div(num_pairs, ROUTE_THREADS)), ROUTE_THREADS, overlaps=True
    )


class RowsPlan(NamedTuple):
    launch: LaunchPlan
    parts: int  # of a row, a block for each
    units_per_part: int  # of 16 bytes


def plan_rows(unit: str, num_rows: int, row_bytes: int, num_sms: int) -> RowsPlan:
    """A block for each row, or for a part of each, where they are few or long."""
    units = row_bytes // 16
    wanted = ceil_div(BLOCKS_PER_SM * num_sms, max(1, num_rows))
    most = ceil_div(units, WARP)  # a unit for each thread of a warp
    least = ceil_div(units, MESSAGE_THREADS * MESSAGE_HELD)
    parts = max(1, least, min(wanted, most))
    units_per_part = ceil_div(units, parts)
    launch = LaunchPlan(unit, unit, max(1, num_rows * parts), MESSAGE_THREADS, overlaps=True)
    return RowsPlan(launch, parts, units_per_part)


def plan_sync() -> LaunchPlan:
    return LaunchPlan("ep_sync", "ep_sync", 1, MESSAGE_THREADS, overlaps=True)
