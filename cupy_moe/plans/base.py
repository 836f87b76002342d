"""What plans are made of. Pure, as all plans: no torch, no CuPy, no environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple


class Constant(int):
    """A number that Python and a kernel share; tests/test_structs.py looks for it in the source.

    >>> Constant(128, "align/align_small.cu:kMaxIds") + 1
    129
    """

    declared: ClassVar[list[Constant]] = []
    place: str

    def __new__(cls, value: int, place: str) -> Constant:
        self = super().__new__(cls, value)
        self.place = place
        cls.declared.append(self)
        return self


WARP = Constant(32, "common.cuh:kWarpSize")
MAX_EXPERTS = 65_536


class DeviceLimits(NamedTuple):
    """What plans ask of a device: what it can do, never what it is called."""

    num_sms: int
    shared_bytes: int  # opt-in limit of one block
    # Of a unit, an entry point and the size of its clusters: how many of these run at once if each block
    # fills an SM. The driver's answer, asked for only where clusters are an option, as that loads the kernel.
    max_clusters: Callable[[str, str, int], int]
    runs: Callable[[str], bool]  # whether a unit is made for such devices


class LaunchPlan(NamedTuple):
    unit: str  # a .cu file in kernels_cu
    entry: str  # a __global__ function in it
    grid: int
    block: int
    shared_bytes: int = 0  # dynamic, by the formula at the head of the .cu file
    overlaps: bool = False  # may begin before the kernel before it has ended, which it waits for by itself


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def round_up(value: int, multiple: int) -> int:
    return ceil_div(value, multiple) * multiple


def divisor(value: int) -> tuple[int, int, int]:
    """The fields of `Divisor` in common.cuh: x // value == ((x << 1) * magic >> 32) >> shift for x < 2^31."""
    shift = (value - 1).bit_length()
    return value, (1 << (31 + shift)) // value + 1, shift
