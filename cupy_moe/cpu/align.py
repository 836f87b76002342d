"""moe_align_block_size in plain PyTorch: the counts of experts, and a stable sort."""

from __future__ import annotations

import torch

from ..plans.align import aligned_sizes


def moe_align_block_size(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `cupy_moe.moe_align_block_size`, on the tensor's device, with sorts; arguments are not checked."""
    ids = topk_ids.reshape(-1).to(torch.int64)
    num_ids, device = ids.numel(), ids.device
    num_slots, num_blocks = aligned_sizes(num_ids, num_experts, block_size, pad_sorted_ids)

    bucket = torch.where((ids >= 0) & (ids < num_experts), ids, -1)
    block_names = torch.arange(num_experts, device=device)
    if expert_map is not None:
        local = expert_map.to(torch.int64)
        local = torch.where((local >= 0) & (local < num_experts), local, -1)
        if ignore_invalid_experts:
            bucket = torch.where(bucket >= 0, local[bucket.clamp(min=0)], -1)
        else:
            block_names = local

    placed = (bucket >= 0).nonzero().squeeze(1)  # flat indices, ascending
    bucket = bucket[placed]
    counts = torch.bincount(bucket, minlength=num_experts)
    blocks = (counts + block_size - 1) // block_size
    bucket, order = torch.sort(bucket, stable=True)  # so they stay ascending inside each expert
    first_slot = (blocks.cumsum(0) - blocks) * block_size
    first_sorted = counts.cumsum(0) - counts
    slots = first_slot[bucket] + torch.arange(len(bucket), device=device) - first_sorted[bucket]

    sorted_token_ids = torch.full((num_slots,), num_ids, dtype=torch.int32, device=device)
    sorted_token_ids[slots] = placed[order].to(torch.int32)
    expert_ids = torch.full((num_blocks,), -1, dtype=torch.int32, device=device)
    used = block_names.repeat_interleave(blocks)
    expert_ids[: len(used)] = used.to(torch.int32)
    num_tokens_post_pad = (blocks.sum() * block_size).to(torch.int32).reshape(1)
    return sorted_token_ids, expert_ids, num_tokens_post_pad
