"""moe_permute and moe_unpermute in plain PyTorch: an alignment, and rows by its indices."""

from __future__ import annotations

import torch

from . import align, moe_sum


@torch.no_grad()  # as on a GPU
def moe_permute(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int = 1,
    expert_map: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    offsets_dtype: torch.dtype = torch.int32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `cupy_moe.moe_permute`, on the tensors' device; arguments are not checked."""
    sorted_ids, expert_ids, _ = align.moe_align_block_size(
        topk_ids, block_size, num_experts, expert_map, ignore_invalid_experts=True
    )
    num_ids, topk = topk_ids.numel(), topk_ids.shape[1]
    has_pair = sorted_ids < num_ids
    tokens = sorted_ids[has_pair].long() // topk

    def moved(rows: torch.Tensor) -> torch.Tensor:
        result = torch.zeros((len(sorted_ids), rows.shape[1]), dtype=rows.dtype, device=rows.device)
        as_integers(result)[has_pair] = as_integers(rows)[tokens]
        return result

    inverse_ids = torch.full((num_ids,), -1, dtype=torch.int32, device=topk_ids.device)
    slots = torch.arange(len(sorted_ids), dtype=torch.int32, device=topk_ids.device)
    inverse_ids[sorted_ids[has_pair].long()] = slots[has_pair]
    blocks = torch.bincount(expert_ids[expert_ids >= 0], minlength=num_experts)
    offsets = torch.nn.functional.pad(blocks.cumsum(0) * block_size, (1, 0)).to(offsets_dtype)
    return (
        moved(hidden_states),
        inverse_ids.view(topk_ids.shape),
        offsets,
        sorted_ids,
        expert_ids,
        None if scales is None else moved(scales),
    )


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same bits, of a type that every function of torch knows."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()])


@torch.no_grad()  # as on a GPU
def moe_unpermute(
    permuted: torch.Tensor,
    inverse_ids: torch.Tensor,
    topk_weights: torch.Tensor | None = None,
    expert_offsets: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    shared_output: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `cupy_moe.moe_unpermute`, on the tensors' device; arguments are not checked."""
    slots = inverse_ids.long()
    exists = (slots >= 0) & (slots < len(permuted))
    if expert_offsets is not None:
        exists &= slots < (expert_offsets[-1].long() & 0xFFFFFFFF)
    rows = permuted.new_zeros((*slots.shape, permuted.shape[1]))
    rows[exists] = permuted[slots[exists]]
    ids = torch.where(exists, slots, -1)
    return moe_sum.moe_sum(rows, topk_weights, ids, None, routed_scaling_factor, shared_output)
