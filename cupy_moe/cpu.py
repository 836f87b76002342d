"""The operators in plain PyTorch: what runs for CPU tensors, and the specification that tests use."""

from __future__ import annotations

import torch

from .plan import aligned_sizes

LEAST_NORMAL = 2.0**-126  # of fp32


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


@torch.no_grad()  # as on a GPU
def gate(
    gating_output: torch.Tensor,
    topk: int,
    scoring_func: str,
    renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    softcap: float = 0.0,
    padding_mask: torch.Tensor | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `cupy_moe.topk_softmax`, `topk_sigmoid` and `grouped_topk`, with sorts; ids are int64, arguments are
    not checked."""
    logits = gating_output.to(torch.float32)
    num_tokens, num_experts = logits.shape
    capped = logits.to(torch.float64)  # in which fp32 results are exact but for their own rounding
    if softcap:
        capped = softcap * torch.tanh(capped / softcap)
    scores = capped
    if scoring_func != "none":
        scores = torch.softmax(capped, dim=1) if scoring_func == "softmax" else torch.sigmoid(capped)
        scores = torch.where(scores < LEAST_NORMAL, 0.0, scores)
    finite = scores.isfinite()
    scores = torch.where(finite, scores, 0.0).to(torch.float32)

    # What selects. Softmax and sigmoid keep the order of the logits, which ties less often than scores do.
    if e_score_correction_bias is not None:
        choice = scores + e_score_correction_bias
    elif scoring_func == "softmax":
        choice = torch.where(finite.all(dim=1, keepdim=True), logits, 0.0)
    else:
        choice = logits
    choice = torch.where(choice.isnan(), -torch.inf, choice)

    order = torch.sort(choice, dim=1, descending=True, stable=True).indices
    if num_expert_group > 1:
        groups = choice.view(num_tokens, num_expert_group, num_experts // num_expert_group)
        num_best = min(2, groups.shape[2]) if e_score_correction_bias is not None else 1
        group_scores = groups.topk(num_best, dim=2).values.sum(dim=2)
        group_scores = torch.where(group_scores.isnan(), -torch.inf, group_scores)
        ranking = torch.sort(group_scores, dim=1, descending=True, stable=True).indices
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, ranking[:, :topk_group], False)
        dropped = dropped.repeat_interleave(groups.shape[2], dim=1)
        last = torch.sort(dropped.gather(1, order).to(torch.int8), dim=1, stable=True).indices
        order = order.gather(1, last)

    ids = order[:, :topk]
    weights = scores.gather(1, ids)
    if renormalize:
        total = weights.sum(dim=1, keepdim=True, dtype=torch.float64)
        is_divisor = (total >= LEAST_NORMAL) & (total <= 1 / LEAST_NORMAL)
        weights = torch.where(is_divisor, weights / total, weights).to(torch.float32)
    weights = weights * routed_scaling_factor
    if padding_mask is not None:
        weights = torch.where(padding_mask[:, None], 0.0, weights)
        ids = torch.where(padding_mask[:, None], -1, ids)
    return weights, ids


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
