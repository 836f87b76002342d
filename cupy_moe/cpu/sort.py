"""moe_sort in plain PyTorch: an alignment, and what it tells about ids and experts."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..plans.base import ceil_div
from . import align


class Sorted(NamedTuple):
    """An alignment with all by-products but those of arguments that are None."""

    sorted_token_ids: torch.Tensor
    expert_ids: torch.Tensor
    num_tokens_post_pad: torch.Tensor
    inverse_ids: torch.Tensor
    expert_offsets: torch.Tensor
    counts: torch.Tensor
    sorted_weights: torch.Tensor | None
    fine_expert_ids: torch.Tensor | None


@torch.no_grad()  # as on a GPU
def moe_sort(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    topk_weights: torch.Tensor | None = None,
    fine_block_size: int | None = None,
    offsets_dtype: torch.dtype = torch.int32,
) -> Sorted:
    """As `cupy_moe.moe_sort`, on the tensors' device; arguments are not checked."""
    options = expert_map, pad_sorted_ids, ignore_invalid_experts
    aligned = align.moe_align_block_size(topk_ids, block_size, num_experts, *options)
    sorted_ids, expert_ids, _ = aligned
    num_ids, num_slots, device = topk_ids.numel(), len(sorted_ids), sorted_ids.device
    slots = torch.arange(num_slots, device=device)
    placed = sorted_ids < num_ids
    ids = sorted_ids[placed].long()

    inverse_ids = torch.full((num_ids,), -1, dtype=torch.int32, device=device)
    inverse_ids[ids] = slots[placed].to(torch.int32)
    # In blocks of one slot, expert_ids are the experts of ids; a map counts only where it drops some.
    used_map = expert_map if ignore_invalid_experts else None
    _, experts, _ = align.moe_align_block_size(topk_ids, 1, num_experts, used_map, False, True)
    counts = torch.bincount(experts[experts >= 0], minlength=num_experts)
    widths = (counts + block_size - 1) // block_size * block_size
    offsets = torch.nn.functional.pad(widths.cumsum(0), (1, 0))

    weights = fine = None
    if topk_weights is not None:
        weights = torch.zeros(num_slots, dtype=torch.float32, device=device)
        weights[placed] = topk_weights.reshape(-1)[ids]
    if fine_block_size is not None:
        first_slots = torch.arange(ceil_div(num_slots, fine_block_size), device=device) * fine_block_size
        fine = expert_ids[first_slots // block_size]
    return Sorted(
        *aligned, inverse_ids.view(topk_ids.shape), offsets.to(offsets_dtype), counts.to(torch.int32),
        weights, fine,
    )  # fmt: skip
