"""moe_sum in plain PyTorch: slot by slot, in fp32."""

from __future__ import annotations

import torch


@torch.no_grad()  # as on a GPU
def moe_sum(
    input: torch.Tensor,
    topk_weights: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    shared_output: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `cupy_moe.moe_sum`, on the tensor's device; arguments are not checked."""
    num_tokens, topk, hidden = input.shape
    total = torch.zeros(num_tokens, hidden, dtype=torch.float32, device=input.device)
    for k in range(topk):
        slot = input[:, k].to(torch.float32)
        if topk_weights is not None:
            slot = topk_weights[:, k, None] * slot
        if topk_ids is not None:
            slot = torch.where(_is_read(topk_ids[:, k], expert_map)[:, None], slot, 0.0)
        total += slot
    total *= routed_scaling_factor
    if shared_output is not None:
        total += shared_output.to(torch.float32)
    return total.to(input.dtype)


def _is_read(ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    ids = ids.to(torch.int64)
    if expert_map is None:
        return (ids >= 0) & (ids < 2**31)
    num_experts = len(expert_map)
    if num_experts == 0:
        return torch.zeros_like(ids, dtype=torch.bool)
    local = expert_map.to(torch.int64)[ids.clamp(0, num_experts - 1)]
    return (ids >= 0) & (ids < num_experts) & (local >= 0) & (local < num_experts)
