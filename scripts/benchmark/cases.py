"""What is measured. The targets are microseconds of GPU time on an H200."""

from __future__ import annotations

from typing import NamedTuple


class AlignCase(NamedTuple):
    tokens: int
    topk: int
    experts: int
    block_size: int
    target_us: float | None = None

    @property
    def num_ids(self) -> int:
        return self.tokens * self.topk


class SumCase(NamedTuple):
    tokens: int
    topk: int
    hidden: int
    target_us: float | None = None


class GateCase(NamedTuple):
    tokens: int
    experts: int
    topk: int
    target_us: float | None = None


ALIGN = (
    AlignCase(1, 2, 8, 16, 2.0),
    AlignCase(1, 8, 256, 16, 2.4),
    AlignCase(8, 8, 256, 16, 2.5),
    AlignCase(64, 2, 8, 64, 2.2),
    AlignCase(64, 8, 256, 64, 2.8),
    AlignCase(128, 8, 128, 64, 2.8),
    AlignCase(512, 8, 256, 128, 3.5),
    AlignCase(4096, 2, 64, 128, 3.5),
    AlignCase(16384, 2, 8, 128, 4.0),
    AlignCase(4096, 8, 256, 128, 4.6),
    AlignCase(4096, 10, 512, 128, 5.8),
    AlignCase(16384, 8, 256, 128, 6.0),
    AlignCase(32768, 8, 128, 128, 8.0),
    AlignCase(32768, 8, 256, 64, 8.0),
    AlignCase(65536, 8, 256, 128, 12.0),
)
SUM = (
    SumCase(1, 8, 7168, 1.6),
    SumCase(16, 8, 4096, 1.7),
    SumCase(64, 8, 7168, 2.5),
    SumCase(512, 8, 4096, 5.4),
    SumCase(4096, 2, 4096, 24.5),
    SumCase(4096, 8, 7168, 118.0),
    SumCase(16384, 8, 7168, 465.0),
)
GATE = (
    GateCase(1, 256, 8, 2.5),
    GateCase(64, 256, 8, 2.8),
    GateCase(4096, 64, 2, 2.2),
    GateCase(4096, 128, 8, 4.0),
    GateCase(4096, 256, 8, 4.5),
    GateCase(4096, 512, 10, 7.5),
    GateCase(16384, 256, 8, 12.0),
)
# With a bias for the selection, as models with sigmoid scores have it; groups as in DeepSeek's.
SIGMOID = (
    GateCase(1, 256, 8),
    GateCase(64, 256, 8),
    GateCase(4096, 128, 8),
    GateCase(4096, 256, 8),
    GateCase(16384, 256, 8),
)
GROUPED = (
    GateCase(1, 256, 8),
    GateCase(64, 256, 8),
    GateCase(512, 256, 8),
    GateCase(4096, 256, 8),
    GateCase(16384, 256, 8),
)
NUM_GROUPS, TOPK_GROUP, FACTOR = 8, 4, 2.5

TIMED_ROUTINGS = ("uniform", "skewed", "all_to_one")
COLD_MIN_IDS = 131_072  # fewer are in L2 whenever a router has just written them

SWEEP_EXPERTS = (8, 64, 256, 512)
SWEEP_BLOCK_SIZE = 64
SWEEP_MAX_IDS = 2**20

HOST = AlignCase(64, 8, 256, 64)  # short enough on the GPU that the host is never held up by a full queue
HOST_TARGETS = {"cupy_moe": 0.6, "cupy_moe, out=": 0.25}  # of the time of vLLM's wrapper


def sweep() -> list[AlignCase]:
    """1 to 2^20 ids in powers of two; top-8, or top-2 of a few experts, as models have it."""
    cases = []
    for experts in SWEEP_EXPERTS:
        num_ids = 1
        while num_ids <= SWEEP_MAX_IDS:
            topk = min(num_ids, 2 if experts <= 8 else 8)
            cases.append(AlignCase(num_ids // topk, topk, experts, SWEEP_BLOCK_SIZE))
            num_ids *= 2
    return cases
