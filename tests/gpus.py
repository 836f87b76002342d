"""GPUs that nobody here needs to have, as plans see them."""

from __future__ import annotations

from dataclasses import dataclass

from cupy_moe.images import sources, targets
from cupy_moe.plans.base import DeviceLimits


@dataclass(frozen=True)
class Clusters:
    """How many clusters of 8, of 16 and of 2 blocks run at once."""

    of_8: int = 0
    of_16: int = 0
    of_2: int = 0

    def __call__(self, unit: str, entry: str, size: int, /) -> int:
        if unit in ("experts_wgmma", "experts_wgmma_fp8"):
            assert entry.startswith("experts_wgmma_")
            assert size == 2
            return self.of_2
        if unit == "route_cluster8":
            assert entry.startswith("route_cluster8_")
            return self.of_8
        family = "align" if unit == "align_shared" else unit.removeprefix("align_")
        assert entry.startswith(f"{family}_shared_cluster{size}_")
        return {8: self.of_8, 16: self.of_16}[size]


@dataclass(frozen=True)
class Runs:
    """What units are for."""

    number: int

    def __call__(self, unit: str, /) -> bool:
        return targets.runs_somehow(divmod(self.number, 10), sources.unit(unit).targets)


T4 = DeviceLimits(40, 65_536, Clusters(), Runs(75))
A100 = DeviceLimits(108, 166_912, Clusters(), Runs(80))
RTX4090 = DeviceLimits(128, 101_376, Clusters(), Runs(89))
H20 = DeviceLimits(78, 232_448, Clusters(8, 0, 39), Runs(90))
H200 = DeviceLimits(132, 232_448, Clusters(15, 7, 66), Runs(90))
H200_SLICE = DeviceLimits(16, 232_448, Clusters(1, 0, 8), Runs(90))
B200 = DeviceLimits(148, 232_448, Clusters(17, 8), Runs(100))
RTX5090 = DeviceLimits(170, 101_376, Clusters(18, 0), Runs(120))
GPUS = {
    "T4": T4,
    "A100": A100,
    "RTX 4090": RTX4090,
    "H20": H20,
    "H200": H200,
    "slice of an H200": H200_SLICE,
    "B200": B200,
    "RTX 5090": RTX5090,
}
TARGETS = {
    "T4": "sm_75",
    "A100": "sm_80",
    "RTX 4090": "sm_89",
    "H20": "sm_90",
    "H200": "sm_90",
    "slice of an H200": "sm_90",
    "B200": "sm_100",
    "RTX 5090": "sm_120",
}
