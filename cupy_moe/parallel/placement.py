"""Which rank has which experts: linear, round robin, anything else, and with hot experts on several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..dispatch.tensors import check_layout
from ..plans.base import MAX_EXPERTS, ceil_div
from ..plans.parallel import MAX_RANKS
from ..values import as_float, as_int, check_choice, check_range, kind_of

PLACEMENTS = ("linear", "round_robin")
_MAP_TYPES = (torch.int8, torch.int16, torch.int32, torch.int64)

Placement = list[list[int]]  # the experts of each rank, in the order of its weights


def place_experts(num_experts: int, num_ranks: int, placement: Any = "linear") -> Placement:
    """The experts of each rank, in the order of their weights there.

    num_experts    1 to 65 536   of the whole layer
    num_ranks                    of the process group; some may be left without experts
    placement      "linear"      neighbours; the first ranks have one more where they do not come out even
                   "round_robin" expert e on rank e % num_ranks
                   lists of ints the experts of each rank; one may be on several, but once on each
                   tensor [num_ranks, num_experts]  the `expert_map` of each rank: local ids, -1: not there

    >>> place_experts(5, 2), place_experts(5, 2, "round_robin")
    ([[0, 1, 2], [3, 4]], [[0, 2, 4], [1, 3]])
    >>> place_experts(3, 2, torch.tensor([[1, -1, 0], [-1, 0, 1]]))
    [[2, 0], [1, 2]]

    Raises TypeError and ValueError for what is no placement. A tensor on a GPU is waited for. Semantics:
    vLLM's `determine_expert_map`, with the redundant experts of DeepSeek's EPLB.
    """
    num_experts, num_ranks = as_int("num_experts", num_experts), as_int("num_ranks", num_ranks)
    check_range("num_experts", num_experts, MAX_EXPERTS)
    if isinstance(placement, torch.Tensor):
        return _of_maps(placement, num_experts, num_ranks)
    if isinstance(placement, str):
        check_choice("placement", placement, PLACEMENTS)
        if placement == "round_robin":
            return [list(range(rank, num_experts, num_ranks)) for rank in range(num_ranks)]
        each, more = divmod(num_experts, num_ranks)
        ends = [(rank + 1) * each + min(rank + 1, more) for rank in range(num_ranks)]
        return [list(range(begin, end)) for begin, end in zip([0, *ends], ends, strict=False)]
    try:
        lists = [list(experts) for experts in placement]
    except TypeError:
        raise TypeError(
            f"placement: expected a name, a tensor or the experts of each rank, got {kind_of(placement)}"
        ) from None
    ranks = [[as_int("placement", expert) for expert in experts] for experts in lists]
    if len(ranks) != num_ranks:
        raise ValueError(f"placement: expected the experts of {num_ranks} ranks, got {len(ranks)} lists")
    for rank, experts in enumerate(ranks):
        for expert in experts:
            check_range(f"placement: experts of rank {rank}", expert, num_experts - 1, 0)
        if len(set(experts)) < len(experts):
            raise ValueError(f"placement: rank {rank} has an expert twice: {experts}")
    return ranks


def _of_maps(maps: torch.Tensor, num_experts: int, num_ranks: int) -> Placement:
    check_layout("placement", maps)
    if maps.shape != (num_ranks, num_experts) or maps.dtype not in _MAP_TYPES or maps.is_meta:
        raise ValueError(
            f"placement: expected the expert_map of each rank, integers of shape"
            f" [{num_ranks}, {num_experts}], got {maps.dtype} {list(maps.shape)} on {maps.device}"
        )
    ranks: Placement = []
    for rank, row in enumerate(maps.tolist()):
        here = sorted((local, expert) for expert, local in enumerate(row) if local >= 0)
        if [local for local, _ in here] != list(range(len(here))):
            raise ValueError(
                f"placement: the local ids of rank {rank} are not 0 to {len(here) - 1}, once each"
            )
        ranks.append([expert for _, expert in here])
    return ranks


def replicate_experts(loads: Sequence[float], num_ranks: int, num_redundant: int = 0) -> Placement:
    """A placement for experts of unequal load, the hottest of which get replicas: `num_redundant` in all.

    loads           [num_experts]   of each expert, such as how many tokens went to it
    num_ranks                       of which none gets more than ceil(experts and replicas / num_ranks)
    num_redundant                   experts beside those that there are

    A replica goes, again and again, to the expert with most load for each that it has; then the replica
    with most load to the rank with least that has room and has not that expert. It is the same on every rank.

    >>> replicate_experts([6.0, 1.0, 1.0, 1.0, 1.0], 2, 1)
    [[0, 1, 3], [0, 2, 4]]

    Raises TypeError and ValueError for wrong arguments, such as more replicas than there are ranks for them.
    Semantics: DeepSeek's EPLB for a group without nodes.
    """
    try:
        loads = [as_float("loads", load) for load in loads]
    except TypeError:
        raise TypeError(f"loads: expected a list of floats, got {kind_of(loads)}") from None
    num_ranks, num_redundant = as_int("num_ranks", num_ranks), as_int("num_redundant", num_redundant)
    if not all(load >= 0 for load in loads):
        raise ValueError(f"loads: expected numbers from 0 on, got {loads}")
    check_range("loads: length", len(loads), MAX_EXPERTS)
    check_range("num_ranks", num_ranks, MAX_RANKS)
    check_range("num_redundant", num_redundant, len(loads) * (num_ranks - 1), 0)
    num_experts, replicas = len(loads), [1] * len(loads)
    for _ in range(num_redundant):
        open_ones = [expert for expert in range(num_experts) if replicas[expert] < num_ranks]
        replicas[max(open_ones, key=lambda expert: (loads[expert] / replicas[expert], -expert))] += 1
    most = ceil_div(num_experts + num_redundant, num_ranks)
    ranks: Placement = [[] for _ in range(num_ranks)]
    carried = [0.0] * num_ranks
    # Experts with most replicas first: each has to find that many ranks.
    order = sorted(range(num_experts), key=lambda e: (replicas[e] == 1, -loads[e] / replicas[e], e))
    for expert in order:
        free = [rank for rank in range(num_ranks) if len(ranks[rank]) < most]
        for rank in sorted(free, key=lambda rank: (carried[rank], rank))[: replicas[expert]]:
            ranks[rank].append(expert)
            carried[rank] += loads[expert] / replicas[expert]
    return ranks


def replica_table(placement: Placement, num_experts: int) -> tuple[list[list[int]], int]:
    """Where each expert is, as kernels read it: [num_experts, 1 + most replicas], the number of replicas and
    a place for each, rank * most_local + local id; and most_local, the most experts of a rank."""
    most_local = max(1, *map(len, placement))
    places: list[list[int]] = [[] for _ in range(num_experts)]
    for rank, experts in enumerate(placement):
        for local, expert in enumerate(experts):
            places[expert].append(rank * most_local + local)
    width = max(1, *map(len, places))
    return [[len(of_one), *of_one, *[-1] * (width - len(of_one))] for of_one in places], most_local
