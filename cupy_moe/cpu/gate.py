"""The gating functions in plain PyTorch: scores in fp64, and stable sorts."""

from __future__ import annotations

from collections.abc import Callable

import torch

LEAST_NORMAL = 2.0**-126  # of fp32


@torch.no_grad()  # as on a GPU
def gate(
    gating_output: torch.Tensor,
    e_score_correction_bias: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    hash_table: torch.Tensor | None = None,
    *,
    topk: int,
    renormalize: bool = False,
    scoring_func: str = "softmax",
    num_expert_group: int = 1,
    topk_group: int = 1,
    routed_scaling_factor: float = 1.0,
    softcap: float = 0.0,
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the public functions; ids are int64, arguments are not checked."""
    logits = gating_output.to(torch.float32)
    num_tokens, num_experts = logits.shape
    capped = logits.to(torch.float64)  # in which fp32 results are exact but for their own rounding
    if softcap:
        capped = softcap * torch.tanh(capped / softcap)
    scores = capped
    if scoring_func != "none":
        scores = _SCORES[scoring_func](capped)
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
    if input_ids is not None and hash_table is not None:
        known = (input_ids >= 0) & (input_ids < len(hash_table))
        padding_mask = ~known if padding_mask is None else padding_mask | ~known
        ids = torch.full((num_tokens, topk), -1, device=logits.device)
        ids[known] = hash_table[input_ids[known].long()].long()
        ids = torch.where((ids >= 0) & (ids < num_experts), ids, -1)
    weights = torch.where(ids < 0, 0.0, scores.gather(1, ids.clamp(min=0)))
    if renormalize:
        total = weights.sum(dim=1, keepdim=True, dtype=torch.float64)
        is_divisor = (total >= LEAST_NORMAL) & (total <= 1 / LEAST_NORMAL)
        weights = torch.where(is_divisor, weights / total, weights).to(torch.float32)
    weights = weights * routed_scaling_factor
    if num_fused_shared_experts:
        shared = torch.arange(num_experts, num_experts + num_fused_shared_experts, device=ids.device)
        shared = shared.expand(num_tokens, -1)
        ids = torch.cat([ids, shared], dim=1)
        weights = torch.cat([weights, torch.full_like(shared, shared_expert_weight, dtype=torch.float32)], 1)
    if padding_mask is not None:
        weights = torch.where(padding_mask[:, None], 0.0, weights)
        ids = torch.where(padding_mask[:, None], -1, ids)
    return weights, ids


_SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: torch.softmax(logits, dim=1),
    "sigmoid": torch.sigmoid,
    "softplus_sqrt": lambda logits: torch.sqrt(torch.logaddexp(logits, torch.zeros_like(logits))),
}
