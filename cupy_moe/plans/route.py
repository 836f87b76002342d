"""route: gating and alignment in one launch, as long as this is faster than one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import gcd
from typing import Any, NamedTuple

from .align import (
    SHARED_MAX_BLOCKS,
    SHARED_SLOTS_PER_BLOCK,
    SMALL_MAX_IDS,
    STATIC_SHARED,
    count_threads,
    cut_ids,
    plan_align,
)
from .base import WARP, Constant, DeviceLimits, LaunchPlan, ceil_div, divisor, round_up
from .gate import GatePlan

SMALL_THREADS = Constant(544, "route/route_small.cu:kMaxThreads")
CLUSTER_THREADS = Constant(512, "route/route_cluster8.cu:kMaxThreads")
ROUTE_CLUSTER = Constant(8, "route/route_cluster8.cu:kCluster")
# A warp for each token; but each block gates all of them.
SMALL_MAX_TOKENS, SMALL_FAST_TOKENS = 16, 8
# From there on, gating is faster on all SMs, with a launch of its own, and so it is for all but plain rows.
CLUSTER_FAST_TOKENS = 64
# Twice those of align_shared, as each further cluster gates all tokens again.
CLUSTER_SLOTS_PER_BLOCK = 2 * SHARED_SLOTS_PER_BLOCK
# Of gate_warp, those that are here by their name; "any" does what all others do.
_BODIES = ("plain_4", "plain_8")
_NO_BODY = "takes what a warp can gate"


class RouteSizes(NamedTuple):
    num_tokens: int
    ids_per_token: int  # shared experts, too, as in the next
    num_experts: int
    num_slots: int
    block_size: int


class RoutePlan(NamedTuple):
    kernel: str  # one of ROUTE_KERNELS
    launch: LaunchPlan | None = None  # None: gating and alignment, as they plan themselves
    arguments: Mapping[str, Any] = {}  # what the plan chooses of RouteArgs beside gating's


def plan_route(
    gate: GatePlan | None, sizes: RouteSizes, limits: DeviceLimits, kernel: str | None = None
) -> RoutePlan:
    """Choose the kernel and its launch; `kernel`, one of ROUTE_KERNELS, forces one. `gate` is how gating
    would be done alone, None without a choice of experts.

    Raises ValueError where the forced kernel cannot do it.
    """
    body, refused = _body(gate), ""
    fast = ["separate"]
    if body in _BODIES and sizes.num_tokens <= CLUSTER_FAST_TOKENS:
        fast.insert(0, "cluster8")
    if sizes.num_tokens <= SMALL_FAST_TOKENS:
        fast.insert(0, "small")
    for name in fast if kernel is None else [kernel]:
        plan = _KERNELS[name](body, sizes, limits)
        if isinstance(plan, RoutePlan):
            return plan
        refused = plan
    raise ValueError(f"kernel={kernel!r} {refused}; kernel='separate' does all")


def _body(gate: GatePlan | None) -> str:
    """What gates a row, to the bits of the kernel that would; "": no warp does."""
    if gate is None or gate.launch.unit != "gate_warp":
        return ""
    body = gate.launch.entry.removeprefix("gate_")
    kernel, _, share = body.partition("_")
    if kernel == "several":
        return ""
    return body if body in _BODIES else f"any_{share}"


def _plan_small(body: str, sizes: RouteSizes, limits: DeviceLimits) -> RoutePlan | str:
    num_ids = sizes.num_tokens * sizes.ids_per_token
    if not body:
        return _NO_BODY
    if sizes.num_tokens > SMALL_MAX_TOKENS or num_ids > SMALL_MAX_IDS:
        return f"takes at most {SMALL_MAX_TOKENS} tokens and {SMALL_MAX_IDS} ids"
    aligned = plan_align(num_ids, *sizes[2:], "i32", limits, "small")
    (placing,) = aligned.launches
    block = max(placing.block, WARP * sizes.num_tokens)
    launch = LaunchPlan("route_small", f"route_small_{body}", placing.grid, block)
    unused = {"per_block": 0, "per_row": divisor(1), "num_rows": 0, "rows_per_block": 0}
    return RoutePlan("small", launch, {**aligned.arguments, **unused})


def _plan_cluster(body: str, sizes: RouteSizes, limits: DeviceLimits) -> RoutePlan | str:
    entry = f"route_cluster8_{body}"
    num_ids = sizes.num_tokens * sizes.ids_per_token
    # Ids travel in vectors of 4.
    step = 4 // gcd(4, sizes.ids_per_token)
    rows = max(step, round_up(ceil_div(sizes.num_tokens, ROUTE_CLUSTER), step))
    if not body:
        return _NO_BODY
    ids_bytes = 4 * ROUTE_CLUSTER * rows * sizes.ids_per_token
    if ids_bytes > limits.shared_bytes // 2:
        return "takes fewer tokens"
    most = limits.max_clusters("route_cluster8", entry, ROUTE_CLUSTER)
    if most == 0:
        return "cannot run: the device runs no cluster of 8 blocks"
    wanted = min(SHARED_MAX_BLOCKS, ceil_div(sizes.num_slots, CLUSTER_SLOTS_PER_BLOCK))
    grid = ROUTE_CLUSTER * min(most, max(1, ceil_div(wanted, ROUTE_CLUSTER)))
    threads = min(CLUSTER_THREADS, max(WARP * rows, count_threads(num_ids, sizes.num_experts)))
    room = limits._replace(shared_bytes=limits.shared_bytes - ids_bytes)
    pieces = cut_ids(num_ids, sizes.num_experts, grid, threads, room)
    if pieces.shared_bytes + STATIC_SHARED > room.shared_bytes:
        return f"has no room for {sizes.num_experts} experts and {num_ids} ids in shared memory"
    launch = LaunchPlan("route_cluster8", entry, grid, threads, pieces.shared_bytes + ids_bytes)
    unused = {"slots_per_block": 0, "lanes_per_id": 1}
    return RoutePlan("cluster8", launch, {**pieces.arguments, **unused, "rows_per_block": rows})


def _plan_separate(body: str, sizes: RouteSizes, limits: DeviceLimits) -> RoutePlan | str:
    return RoutePlan("separate")


_KERNELS: dict[str, Callable[[str, RouteSizes, DeviceLimits], RoutePlan | str]] = {  # or why there is none
    "small": _plan_small,
    "cluster8": _plan_cluster,
    "separate": _plan_separate,
}
ROUTE_KERNELS = tuple(_KERNELS)  # the fastest first
