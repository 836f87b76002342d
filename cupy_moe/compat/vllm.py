"""vLLM's MoE alignment, with vLLM's signatures.

    import cupy_moe.compat.vllm
    cupy_moe.compat.vllm.enable()

puts these functions in the place of vLLM's, in every module of vLLM that has imported them. Results are
vLLM's, but for the order inside an expert, which vLLM leaves open and which is ascending here.
"""

from __future__ import annotations

import torch

from ..align import moe_align_block_size as _align
from ..align_batched import batched_moe_align_block_size as _align_batched
from ._engine import Switch, heads


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


_MODULE = "vllm.model_executor.layers.fused_moe.moe_align_block_size"
_switch = Switch(
    "vLLM",
    {
        f"{_MODULE}:moe_align_block_size": moe_align_block_size,
        f"{_MODULE}:batched_moe_align_block_size": batched_moe_align_block_size,
        "vllm._custom_ops:moe_align_block_size": moe_align_block_size_into,
        "vllm._custom_ops:batched_moe_align_block_size": batched_moe_align_block_size_into,
    },
)
enable, disable, enabled = _switch.enable, _switch.disable, _switch.enabled
