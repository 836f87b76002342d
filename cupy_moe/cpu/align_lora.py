"""moe_lora_align_block_size in plain PyTorch: an alignment for each adapter, of the ids of its tokens."""

from __future__ import annotations

import torch

from . import align


def moe_lora_align_block_size(
    topk_ids: torch.Tensor,
    token_lora_mapping: torch.Tensor,
    block_size: int,
    num_experts: int,
    max_loras: int,
    adapter_enabled: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `cupy_moe.moe_lora_align_block_size`, on the tensors' device; arguments are not checked."""
    ids = topk_ids.to(torch.int64)
    alignments = []
    for adapter in range(max_loras):
        is_its = token_lora_mapping == adapter
        if adapter_enabled is not None:
            is_its &= adapter_enabled[adapter] != 0
        of_adapter = torch.where(is_its[:, None], ids, -1)
        alignments.append(
            align.moe_align_block_size(of_adapter, block_size, num_experts, expert_map, pad_sorted_ids, True)
        )
    sorted_ids, expert_ids, post_pad = (torch.stack(parts) for parts in zip(*alignments, strict=True))
    return sorted_ids, expert_ids, post_pad.view(-1)
