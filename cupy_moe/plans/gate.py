"""Gating: rows in the registers of a warp, or of a part of one, where they fit; else in shared memory."""

from __future__ import annotations

from typing import NamedTuple

from .base import WARP, Constant, DeviceLimits, LaunchPlan, ceil_div, round_up

GATE_KERNELS = ("plain", "full", "any", "several", "wide")
MAX_TOPK = 64
# gate_warp.cu, Mode and kShare. Lane k of a row keeps the k-th winner.
GATE_SHARES = {"plain": (4, 8, 16), "full": (8, 16), "any": (8, 16), "several": (4, 8)}
# A warp to itself is the quickest for a row; several in one are quicker once the GPU is full of warps.
SEVERAL_MIN_TOKENS = 1024
SEVERAL_MAX_LANES = Constant(8, "gate/warp.cuh:kSeveralMaxLanes")
# A row or two for every SM; above, blocks of four warps, as an SM holds more warps than blocks.
GATE_WARPS = Constant(128, "gate/gate_warp.cu:kMaxThreads") // WARP
# Their threads have 32-bit numbers.
GATE_WARP_MAX_TOKENS = 2**32 // WARP - GATE_WARPS
# Threads of `wide` look at pieces of 8 experts and more; more threads only make barriers slower.
WIDE_MIN_SHARE = 8
WIDE_MAX_THREADS = Constant(512, "gate/gate_wide.cu:kMaxThreads")
WIDE_STATIC_SHARED = 192
HASH_THREADS = Constant(128, "gate/gate_hash.cu:kMaxThreads")


class GatePlan(NamedTuple):
    launch: LaunchPlan
    lanes_per_row: int = WARP
    vector_bytes: int = 0  # of the loads of the logits, where these are aligned to it; 0: one logit at a time


def plan_gate(
    num_tokens: int,
    num_experts: int,
    topk: int,
    num_groups: int,
    element_bytes: int,
    with_bias: bool,
    with_softcap: bool,
    limits: DeviceLimits,
    kernel: str | None = None,
    num_shared: int = 0,
    with_softplus: bool = False,
) -> GatePlan:
    """Choose the kernel and its launch; `kernel`, one of GATE_KERNELS, forces one.

    Only "any" and "wide" know shared experts and softplus_sqrt.
    Raises ValueError where the kernel cannot do it.
    """
    needs_any, num_results = num_shared > 0 or with_softplus, topk + num_shared
    if kernel is None:
        kernel = "any" if needs_any else "full" if with_bias or num_groups > 1 else "plain"
        if (
            not needs_any
            and num_tokens >= SEVERAL_MIN_TOKENS
            and _several_lanes(num_experts, topk) <= SEVERAL_MAX_LANES
        ):
            kernel = "several" if num_groups == 1 else kernel
        share = _gate_share(kernel, num_experts, num_results, num_groups)
        if with_softcap or not share or num_tokens > GATE_WARP_MAX_TOKENS:
            kernel = "wide"
    if kernel == "wide":
        return _plan_wide(num_tokens, num_experts, topk, num_groups, limits)
    share = _gate_share(kernel, num_experts, num_results, num_groups)
    fits = share and (num_groups == 1 or kernel in ("full", "any")) and (not with_bias or kernel != "plain")
    fits = fits and (kernel == "any" or not needs_any) and num_tokens <= GATE_WARP_MAX_TOKENS
    if not fits or with_softcap:
        raise ValueError(f"kernel={kernel!r} cannot do this (see gate_warp.cu); kernel='wide' can")
    lanes_per_row = _several_lanes(num_experts, topk) if kernel == "several" else WARP
    num_warps = ceil_div(num_tokens * lanes_per_row, WARP)
    warps = 1 if num_warps <= 2 * limits.num_sms else GATE_WARPS
    launch = LaunchPlan("gate_warp", f"gate_{kernel}_{share}", ceil_div(num_warps, warps), WARP * warps)
    group_size, vector = num_experts // num_groups, min(16, share * element_bytes)
    whole = num_groups == 1 or ceil_div(group_size, _group_lanes(num_groups)) == share
    whole = whole and group_size * element_bytes % vector == 0
    return GatePlan(launch, lanes_per_row, vector if whole else 0)


def plan_hash(num_tokens: int, topk: int) -> GatePlan:
    """Lanes for the experts of a token, two of them each where they are many."""
    lanes = min(WARP, 1 << (topk - 1).bit_length())
    grid = ceil_div(num_tokens * lanes, HASH_THREADS)
    return GatePlan(LaunchPlan("gate_hash", "gate_hash", grid, HASH_THREADS), lanes)


def _gate_share(kernel: str, num_experts: int, topk: int, num_groups: int) -> int:
    """The smallest kShare that holds a row; 0: none does."""
    lanes = _several_lanes(num_experts, topk) if kernel == "several" else _group_lanes(num_groups)
    if topk > WARP or lanes == 0 or (kernel == "several" and lanes > SEVERAL_MAX_LANES):
        return 0
    return next((share for share in GATE_SHARES[kernel] if num_experts // num_groups <= share * lanes), 0)


def _group_lanes(num_groups: int) -> int:
    return WARP >> (num_groups - 1).bit_length()


def _several_lanes(num_experts: int, topk: int) -> int:
    """Enough lanes to hold a row, and its winners."""
    return 1 << (max(ceil_div(num_experts, GATE_SHARES["several"][-1]), topk) - 1).bit_length()


def _plan_wide(
    num_tokens: int, num_experts: int, topk: int, num_groups: int, limits: DeviceLimits
) -> GatePlan:
    shared_bytes = 4 * (num_experts + num_groups + 2 * topk)
    if shared_bytes + WIDE_STATIC_SHARED > limits.shared_bytes:
        raise ValueError(
            f"gating_output: {num_experts} experts need {shared_bytes} bytes of shared memory, of which the"
            f" device has {limits.shared_bytes}"
        )
    threads = min(WIDE_MAX_THREADS, round_up(ceil_div(num_experts, WIDE_MIN_SHARE), WARP))
    return GatePlan(LaunchPlan("gate_wide", "gate_wide", num_tokens, threads, shared_bytes))
