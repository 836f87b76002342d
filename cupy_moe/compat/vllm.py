"""vLLM's MoE alignment, gating and sum, with vLLM's signatures.

    import cupy_moe.compat.vllm
    cupy_moe.compat.vllm.enable()

puts these functions in the place of vLLM's, in every module of vLLM that has imported them. Results are
vLLM's, but for what vLLM leaves open: the order inside an expert is ascending, blocks past the last hold -1
with an `expert_map`, too, and scores differ by rounding. Rows of `grouped_topk` without a finite score have
weights of 0 here. Parameters that only some versions of vLLM have come last.
"""

from __future__ import annotations

import torch

from ..operators.align import moe_align_block_size as _align
from ..operators.align_batched import batched_moe_align_block_size as _align_batched
from ..operators.gate import grouped_topk as _grouped_topk
from ..operators.gate import topk_sigmoid as _topk_sigmoid
from ..operators.gate import topk_softmax as _topk_softmax
from ..operators.moe_sum import moe_sum as _sum
from ._engine import Switch, fp32, heads, pad_tails, require


def moe_align_block_size(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    return_scatter_idx: bool = False,
) -> tuple[torch.Tensor, ...]:
    """As in vllm.model_executor.layers.fused_moe.moe_align_block_size."""
    if return_scatter_idx and expert_map is not None and not ignore_invalid_experts:
        raise ValueError("scatter_idx with expert_map requires ignore_invalid_experts")
    aligned = _align(topk_ids, block_size, num_experts, expert_map, pad_sorted_ids, ignore_invalid_experts)
    if not return_scatter_idx:
        return aligned
    scatter_idx = torch.empty((topk_ids.numel(), 1), dtype=torch.int32, device=topk_ids.device)
    _fill_scatter_idx(scatter_idx, topk_ids, num_experts, expert_map)
    return *aligned, scatter_idx


def batched_moe_align_block_size(
    max_tokens_per_batch: int, block_size: int, expert_num_tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As in vllm.model_executor.layers.fused_moe.moe_align_block_size."""
    return _align_batched(max_tokens_per_batch, block_size, expert_num_tokens)


def moe_align_block_size_into(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    scatter_idx: torch.Tensor | None = None,
) -> None:
    """As `moe_align_block_size` in vllm._custom_ops, which fills tensors that are at least long enough."""
    out = heads(topk_ids.numel(), num_experts, block_size, sorted_token_ids, experts_ids, num_tokens_post_pad)
    _align(topk_ids, block_size, num_experts, expert_map, ignore_invalid_experts=True, out=out)
    pad_tails(out, topk_ids.numel(), sorted_token_ids, experts_ids)
    if scatter_idx is not None:
        _fill_scatter_idx(scatter_idx, topk_ids, num_experts, expert_map)


def batched_moe_align_block_size_into(
    max_tokens_per_batch: int,
    block_size: int,
    expert_num_tokens: torch.Tensor,
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
) -> None:
    """As `batched_moe_align_block_size` in vllm._custom_ops."""
    out = sorted_ids, expert_ids, num_tokens_post_pad
    _align_batched(max_tokens_per_batch, block_size, expert_num_tokens, out=out)


def _fill_scatter_idx(
    scatter_idx: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None
) -> None:
    """The index of each id that is placed, -1 for the others."""
    ids = topk_ids.reshape(-1).long()
    placed = (ids >= 0) & (ids < num_experts)
    if expert_map is not None:
        local = expert_map[torch.where(placed, ids, 0)]
        placed &= (local >= 0) & (local < num_experts)
    indices = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
    scatter_idx.copy_(torch.where(placed, indices, -1).view_as(scatter_idx))


def moe_sum(
    input: torch.Tensor,
    output: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> None:
    """As in vllm._custom_ops."""
    require("output", output)
    _sum(input, output, topk_ids=topk_ids, expert_map=expert_map)


def topk_softmax(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor | None,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
) -> None:
    """As in vllm._custom_ops. `token_expert_indices` takes two more launches, and None none."""
    require("topk_ids", topk_ids, 2)
    _topk_softmax(
        gating_output, topk_ids.shape[1], renormalize, e_score_correction_bias=fp32(e_score_correction_bias),
        padding_mask=is_padding, out=(topk_weights, topk_ids),
    )  # fmt: skip
    _fill_source_rows(token_expert_indices)


def topk_sigmoid(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor | None,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    is_padding: torch.Tensor | None = None,
) -> None:
    """As in vllm._custom_ops. `token_expert_indices` takes two more launches, and None none."""
    require("topk_ids", topk_ids, 2)
    _topk_sigmoid(
        gating_output, topk_ids.shape[1], renormalize, e_score_correction_bias=fp32(e_score_correction_bias),
        routed_scaling_factor=routed_scaling_factor, padding_mask=is_padding, out=(topk_weights, topk_ids),
    )  # fmt: skip
    _fill_source_rows(token_expert_indices)


def grouped_topk(
    scores: torch.Tensor,
    num_expert_group: int,
    topk_group: int,
    topk: int,
    renormalize: bool,
    routed_scaling_factor: float,
    bias: torch.Tensor,
    scoring_func: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in vllm._custom_ops: `scoring_func` 0 takes `scores` as they are, 1 takes their sigmoid."""
    if scoring_func not in (0, 1):
        raise ValueError(f"scoring_func: expected 0 (none) or 1 (sigmoid), got {scoring_func!r}")
    scoring = "sigmoid" if scoring_func else "none"
    return _grouped_topk(
        scores, topk, renormalize, num_expert_group, topk_group, scoring, routed_scaling_factor, fp32(bias)
    )


def _fill_source_rows(rows: torch.Tensor | None) -> None:
    """Slot k of token t holds k * tokens + t."""
    if rows is not None:
        tokens, topk = rows.shape
        rows.copy_(torch.arange(tokens * topk, device=rows.device).view(topk, tokens).T)


_MODULE = "vllm.model_executor.layers.fused_moe.moe_align_block_size"
_switch = Switch(
    "vLLM",
    {
        f"{_MODULE}:moe_align_block_size": moe_align_block_size,
        f"{_MODULE}:batched_moe_align_block_size": batched_moe_align_block_size,
        "vllm._custom_ops:moe_align_block_size": moe_align_block_size_into,
        "vllm._custom_ops:batched_moe_align_block_size": batched_moe_align_block_size_into,
        "vllm._custom_ops:moe_sum": moe_sum,
        "vllm._custom_ops:topk_softmax": topk_softmax,
        "vllm._custom_ops:topk_sigmoid": topk_sigmoid,
        "vllm._custom_ops:grouped_topk": grouped_topk,
    },
)
enable, disable, enabled = _switch.enable, _switch.disable, _switch.enabled
