"""batched_moe_align_block_size in plain PyTorch."""

from __future__ import annotations

import torch


def batched_moe_align_block_size(
    max_tokens_per_batch: int, block_size: int, expert_num_tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `cupy_moe.batched_moe_align_block_size`, on the tensor's device; arguments are not checked."""
    device, num_batches = expert_num_tokens.device, len(expert_num_tokens)
    counts = expert_num_tokens.to(torch.int64).clamp(0, max_tokens_per_batch)
    blocks = (counts + block_size - 1) // block_size
    first_slot = (blocks.cumsum(0) - blocks) * block_size
    num_blocks = num_batches * ((max_tokens_per_batch + block_size - 1) // block_size)

    batch = torch.arange(num_batches, device=device).repeat_interleave(counts)  # of each token
    token = torch.arange(len(batch), device=device) - (counts.cumsum(0) - counts)[batch]
    sorted_token_ids = torch.full(
        (num_blocks * block_size,), num_batches * max_tokens_per_batch, dtype=torch.int32, device=device
    )
    sorted_token_ids[first_slot[batch] + token] = (batch * max_tokens_per_batch + token).to(torch.int32)
    expert_ids = torch.full((num_blocks,), -1, dtype=torch.int32, device=device)
    used = torch.arange(num_batches, dtype=torch.int32, device=device).repeat_interleave(blocks)
    expert_ids[: len(used)] = used
    num_tokens_post_pad = (blocks.sum() * block_size).to(torch.int32).reshape(1)
    return sorted_token_ids, expert_ids, num_tokens_post_pad
