"""What images are made for, and which of them a device runs.

A *target* is `sm_90` (a cubin for compute capability 9.0 and later 9.x), `sm_90a` (one for 9.0 alone, with
what only that has) or `compute_90` (PTX for 9.0 and all that is newer, compiled by the driver at load).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import ConfigError

TARGETS = tuple(f"sm_{n}" for n in (75, 80, 86, 87, 89, 90, 100, 120))
# Those of one capability alone, which units have to ask for.
SPECIFIC_TARGETS = tuple(f"sm_{n}a" for n in (90, 100, 120))
# What has no cubin of its own: it would be the other one, which such devices run, but for the order of code.
_SAME = {"sm_103": "sm_100", "sm_121": "sm_120"}
# PTX serves devices newer than every cubin. They have clusters, which code below compute_90 cannot use.
PTX_TARGET = "compute_90"
DEFAULT_TARGETS = (*TARGETS, PTX_TARGET)
# Jetson and DRIVE: numbered like desktop parts, but cubins of the one do not run on the other.
_TEGRA = {53, 62, 72, 87, 101, 110}


def parse_target(text: str) -> str:
    """`sm_90`, `90`, `9.0`, `sm_90a`, `compute_90` -> target; `sm_103` -> `sm_100`, which such devices run.
    Raises ConfigError, which lists all."""
    match = re.fullmatch(r"(sm_|compute_)?(\d+)\.?(\d)(a?)", text)
    if match:
        kind, name = match[1] or "sm_", f"sm_{match[2]}{match[3]}{match[4]}"
        if kind == "sm_":
            name = _SAME.get(name, name)
        if name in TARGETS or (kind == "sm_" and name in SPECIFIC_TARGETS):
            return kind + name.removeprefix("sm_")
    known = ", ".join((*TARGETS, *_SAME, *SPECIFIC_TARGETS))
    raise ConfigError(f"unknown architecture {text!r}; known: {known} (and compute_XY for PTX)")


def number(target: str) -> int:
    """90 of `sm_90`, `sm_90a` and `compute_90`."""
    return int(target.rpartition("_")[2].removesuffix("a"))


def is_ptx(target: str) -> bool:
    return target.startswith("compute_")


def is_specific(target: str) -> bool:
    return target.endswith("a")


def made_for(wanted: Iterable[str], asked: str) -> list[str]:
    """Of the targets that a unit wants, those that are meant by one of the command line: `sm_90` is all that
    devices of 9.0 look for, so `sm_90a`, too; PTX is made for any number, if for one."""
    if is_ptx(asked):
        return [asked] if PTX_TARGET in wanted else []
    return [target for target in wanted if target in (asked, f"{asked}a")]


def native_targets(capability: tuple[int, int], wanted: Iterable[str] = TARGETS) -> list[str]:
    """Of the targets that a unit wants, those whose cubins run on a device, best first: what is for it alone,
    its own, then those of lower minors of its major."""
    own = 10 * capability[0] + capability[1]

    def runs(target: str) -> bool:
        if is_ptx(target) or is_specific(target) or number(target) == own:
            return not is_ptx(target) and number(target) == own
        is_lower = number(target) // 10 == capability[0] and number(target) < own
        return is_lower and not {own, number(target)} & _TEGRA

    return sorted(filter(runs, wanted), key=lambda target: (number(target), target), reverse=True)


def runs_somehow(capability: tuple[int, int], wanted: Iterable[str]) -> bool:
    """Whether a unit is for a device at all: as a cubin, or as PTX of no lower number than its cubins."""
    wanted = tuple(wanted)
    if native_targets(capability, wanted):
        return True
    least = min((number(target) for target in wanted if not is_ptx(target)), default=0)
    return PTX_TARGET in wanted and 10 * capability[0] + capability[1] >= least
