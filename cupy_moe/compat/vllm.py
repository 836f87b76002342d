"""vLLM's experts, MoE alignment, permutation, gating and sum, with vLLM's signatures.

    import cupy_moe.compat.vllm
    cupy_moe.compat.vllm.enable()

puts these functions in the place of vLLM's, in every module of vLLM that has imported them, and the methods
in vLLM's class `TritonExperts`. Call it in every process of vLLM, before it loads a model: the shared
workspace of the experts is larger with it. Results are vLLM's, but for what vLLM leaves open: the order
inside an expert is ascending, blocks past the last hold -1 with an `expert_map`, too, and scores and experts
differ by rounding. Pairs that `moe_permute` drops have an index of -1, and adapters that are skipped have
padding. Rows of `grouped_topk` without a finite score have weights of 0 here. Parameters that only
some versions of vLLM have come last.

Experts run here with the activations, types and sizes of `cupy_moe.fused_experts`, for hidden states of bf16
and fp16. Their weights may be in

    fp8_w8a8      e4m3, with scales of blocks, of channels or of tensors
    int8_w8a16    signed, with scales of channels; not those of GPTQ, which are unsigned
    int4_w4a16    as moe_wna16 has them, in groups of 32, 64 or 128, with zeros and without

and then vLLM does not quantise activations, nor are static scales of theirs used. Zeros of int4 are unpacked
when they are first seen, once for a tensor and a place: others that are later written there are not seen.

All other experts run as vLLM's own, with one warning for each reason: those of other formats, those with LoRA
or another hook, those in fp8 whose activations come from other ranks or by way of another class, classes that
inherit from `TritonExperts` but for `TritonWNA16Experts`, and all with VLLM_BATCH_INVARIANT, as a Hopper GPU
takes other kernels for other numbers of tokens.

vLLM's functions that quantise activations stay its own: they divide by a scale where
`cupy_moe.per_token_group_quant_fp8` and the like multiply by its reciprocal, so that results are not the same
to the bit.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from ..cpu.experts import GATED
from ..operators.align import moe_align_block_size as _align
from ..operators.align_batched import batched_moe_align_block_size as _align_batched
from ..operators.align_lora import moe_lora_align_block_size as _align_lora
from ..operators.experts import ACTIVATIONS, experts_workspace_bytes
from ..operators.experts import fused_experts as _fused_experts
from ..operators.gate import grouped_topk as _grouped_topk
from ..operators.gate import topk_sigmoid as _topk_sigmoid
from ..operators.gate import topk_softmax as _topk_softmax
from ..operators.gate import topk_softplus_sqrt as _topk_softplus_sqrt
from ..operators.moe_sum import moe_sum as _sum
from ..operators.permute import moe_permute as _permute
from ..operators.permute import moe_unpermute as _unpermute
from ..quantization import Quantization
from ._engine import Switch, fill_lora, fp32, heads, lora_heads, pad_tails, require, unless_refused
from ._quantized import quantization_of


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


def moe_lora_align_block_size(
    topk_ids: torch.Tensor,
    token_lora_mapping: torch.Tensor,
    num_experts: int,
    block_size: int,
    max_loras: int,
    max_num_tokens_padded: int,
    max_num_m_blocks: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    adapter_enabled: torch.Tensor,
    lora_ids: torch.Tensor,
    expert_map: torch.Tensor | None = None,
) -> None:
    """As in vllm._custom_ops. `lora_ids` is not needed: an adapter without tokens gets padding. Buffers that
    are longer than results take further launches."""
    given = num_experts, block_size, max_loras, sorted_token_ids, experts_ids, num_tokens_post_pad
    out = lora_heads(topk_ids.numel(), *given)
    _align_lora(
        topk_ids, token_lora_mapping, block_size, num_experts, max_loras, adapter_enabled, expert_map, out=out
    )
    fill_lora(out, topk_ids.numel(), sorted_token_ids, experts_ids)


def moe_permute(
    hidden_states: torch.Tensor,
    a1q_scale: torch.Tensor | None,
    topk_ids: torch.Tensor,
    n_expert: int,
    n_local_expert: int = -1,
    expert_map: torch.Tensor | None = None,
    permuted_hidden_states: torch.Tensor | None = None,
    scratch: Any = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As in vllm.model_executor.layers.fused_moe.moe_permute_unpermute. `scratch` is not needed."""
    scales = a1q_scale if a1q_scale is not None and a1q_scale.dim() > 1 else None
    out = None
    if permuted_hidden_states is not None:
        num_ids, device = topk_ids.numel(), topk_ids.device
        slots, owners, inverse = (torch.empty(num_ids, dtype=torch.int32, device=device) for _ in range(3))
        offsets = torch.empty(n_expert + 1, dtype=torch.int64, device=device)
        moved = None if scales is None else scales.new_empty((num_ids, scales.shape[1]))
        out = permuted_hidden_states, inverse.view(topk_ids.shape), offsets, slots, owners, moved
    permuted, inverse, offsets, slots, _, moved = _permute(
        hidden_states, topk_ids, n_expert, expert_map=expert_map, scales=scales, offsets_dtype=torch.int64,
        fill_tail=False, out=out,
    )  # fmt: skip
    offsets = offsets if n_local_expert == -1 else offsets[: n_local_expert + 1]
    return permuted, a1q_scale if scales is None else moved, offsets, inverse.flatten(), slots


def moe_unpermute(
    out: torch.Tensor,
    permuted_hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    expert_first_token_offset: torch.Tensor | None = None,
) -> None:
    """As in vllm.model_executor.layers.fused_moe.moe_permute_unpermute."""
    require("out", out)
    require("topk_weights", topk_weights, 2)
    _unpermute(
        permuted_hidden_states, inv_permuted_idx.view(topk_weights.shape), out, topk_weights=topk_weights,
        expert_offsets=expert_first_token_offset,
    )  # fmt: skip


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


def topk_hash_softplus_sqrt(
    topk_weights: torch.Tensor,
    topk_indices: torch.Tensor,
    token_expert_indices: torch.Tensor | None,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: torch.Tensor | None = None,
    input_tokens: torch.Tensor | None = None,
    hash_indices_table: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
    bias_vl: torch.Tensor | None = None,
    image_sentinel_lo: int = 0,
    *,
    original: Any = None,
) -> None:
    """As in vllm._custom_ops. A bias has no effect on experts of a table; `token_expert_indices` takes two
    more launches, and None none. `original` is vLLM's own, which takes a bias of images."""
    if bias_vl is not None:
        original(
            topk_weights, topk_indices, token_expert_indices, gating_output, renormalize,
            routed_scaling_factor, e_score_correction_bias, input_tokens, hash_indices_table, is_padding,
            bias_vl, image_sentinel_lo,
        )  # fmt: skip
        return
    require("topk_indices", topk_indices, 2)
    hashed = hash_indices_table is not None
    _topk_softplus_sqrt(
        gating_output, topk_indices.shape[1], renormalize,
        e_score_correction_bias=None if hashed else fp32(e_score_correction_bias),
        routed_scaling_factor=routed_scaling_factor, input_ids=input_tokens if hashed else None,
        hash_table=hash_indices_table, padding_mask=is_padding, out=(topk_weights, topk_indices),
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


def fused_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Any = "silu",
    apply_router_weight_on_input: bool = False,
    global_num_experts: int = -1,
    expert_map: torch.Tensor | None = None,
    quant_config: Any = None,
    *,
    original: Any = None,
) -> torch.Tensor:
    """As in vllm.model_executor.layers.fused_moe.fused_moe. `original` is vLLM's own, which runs instead
    where this would raise TypeError or ValueError."""
    with unless_refused(original):
        _check_mode()
        name, numbers = _check_activation(activation)
        return _fused_experts(
            hidden_states, w1, w2, topk_weights.float(), topk_ids, name, apply_router_weight_on_input,
            **numbers, **_options(w1, global_num_experts, expert_map, quant_config),
        )  # fmt: skip
    if isinstance(activation, str):  # vLLM has no strings here
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation

        activation = MoEActivation(activation)
    return original(
        hidden_states, w1, w2, topk_weights, topk_ids, activation, apply_router_weight_on_input,
        global_num_experts, expert_map, quant_config,
    )  # fmt: skip


def triton_experts_apply(
    self: Any,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Any,
    global_num_experts: int,
    expert_map: torch.Tensor | None,
    a1q_scale: torch.Tensor | None,
    a2_scale: torch.Tensor | None,
    workspace13: torch.Tensor,
    workspace2: torch.Tensor,
    expert_tokens_meta: Any,
    apply_router_weight_on_input: bool,
    *,
    original: Any = None,
) -> None:
    """As `TritonExperts.apply`. All lies in `workspace2`: vLLM's `output` is the head of `workspace13`."""
    if a1q_scale is not None:
        self._cupy_moe_gets_quantised = True
    with unless_refused(original):
        name, numbers = _check_triton_experts(self, activation)
        options = _options(w1, global_num_experts, expert_map, self.quant_config)
        weights = topk_weights.float()
        if apply_router_weight_on_input:  # here, this says that vLLM's `prepare` has multiplied them in
            weights = torch.ones_like(weights)
        _fused_experts(
            hidden_states, w1, w2, weights, topk_ids, name, workspace=workspace2.view(-1).view(torch.uint8),
            out=output, **numbers, **options,
        )  # fmt: skip
        return
    original(
        self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts,
        expert_map, a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta,
        apply_router_weight_on_input,
    )  # fmt: skip


def triton_experts_expects_unquantized_inputs(self: Any, *, original: Any = None) -> bool:
    """As that property of `TritonExperts`, for which vLLM leaves activations in 16 bits: for what runs here.

    `apply` of vLLM's own, where it is left to that all the same, asks this too, and then quantises them. Not
    where they go to other ranks, which take half the bytes in fp8, nor where `self` is a part of an object
    that has them quantised anyway: `apply` finds that out before anybody asks.
    """
    try:
        _check_class(self)
        return _quantization(self.quant_config) is not None and not (
            self.moe_config.moe_parallel_config.use_all2all_kernels
            or getattr(self, "_cupy_moe_gets_quantised", False)
        )
    except (TypeError, ValueError):
        return bool(original(self))


Shape = tuple[int, ...]


def triton_experts_workspace_shapes(
    self: Any,
    M: int,
    N: int,
    K: int,
    topk: int,
    global_num_experts: int,
    local_num_experts: int,
    expert_tokens_meta: Any,
    activation: Any,
    *,
    original: Any = None,
) -> tuple[Shape, Shape, Shape]:
    """As `TritonExperts.workspace_shapes`: vLLM's own, for what `apply` leaves to it, and room for ours in
    the second. Fewer tokens never take more: vLLM allocates for the most of them, and then no longer."""
    first, second, output = original(
        self, M, N, K, topk, global_num_experts, local_num_experts, expert_tokens_meta, activation
    )
    try:
        name, _ = _check_triton_experts(self, activation)
        _quantization(self.quant_config)
    except (TypeError, ValueError):
        return first, second, output
    num_experts = max(global_num_experts, local_num_experts)
    num_bytes = experts_workspace_bytes(M, topk, K, N // 2 if name in GATED else N, num_experts)
    ours = (-(-num_bytes // 2),)  # in elements of 16 bits
    return first, max(second, ours, key=math.prod), output


def _check_triton_experts(self: Any, activation: Any) -> tuple[str, dict[str, Any]]:
    """As `_check_activation`; raises ValueError for more: what no activation makes possible here."""
    _check_class(self)
    if config := getattr(self, "activation_config", None):  # in vLLM 0.33
        return _check_activation(activation, (config.clamp_limit, config.alpha, config.beta))
    return _check_activation(activation, (self.gemm1_clamp_limit, self.gemm1_alpha, self.gemm1_beta))


def _check_class(self: Any) -> None:
    if type(self).__name__ not in ("TritonExperts", "TritonWNA16Experts"):
        raise ValueError("a class that inherits from it, and may change a part of it")
    if self._lora_context is not None:
        raise ValueError("LoRA")
    if getattr(self, "post_gemm2_hook", None) is not None:
        raise ValueError("a hook behind the second product")
    _check_mode()


def _check_mode() -> None:
    if getattr(sys.modules.get("vllm.envs"), "VLLM_BATCH_INVARIANT", False):
        raise ValueError("VLLM_BATCH_INVARIANT")


def _check_activation(
    activation: Any, limits: tuple[Any, ...] = (None, 1.0, 0.0)
) -> tuple[str, dict[str, Any]]:
    """The activation's name and numbers. Raises ValueError for others than those of `cupy_moe.fused_experts`.
    `limits` are vLLM's clamp, alpha and beta, by which two of the activations go."""
    name = str(getattr(activation, "value", activation))
    limit, alpha, beta = limits
    is_limited = name == "swigluoai_uninterleave"
    fits = limit is not None and beta == 1 if is_limited else limit is None or name != "silu"
    if name not in ACTIVATIONS or not fits:
        raise ValueError(f"the activation {name}, with a limit, alpha and beta of {limits}")
    return name, {"swiglu_alpha": alpha, "swiglu_limit": limit} if is_limited else {}


# By the types of activations and of weights.
_FORMATS = {
    (torch.float8_e4m3fn, torch.float8_e4m3fn): "fp8",
    (None, torch.int8): "int8",
    (None, "int4"): "int4",
}


def _quantization(quant_config: Any) -> Quantization | None:
    """Of a FusedMoEQuantConfig; None for weights of 16 bits. Raises TypeError and ValueError for others than
    `cupy_moe.Quantization` has."""
    types = (quant_config.quant_dtype, quant_config.weight_quant_dtype) if quant_config else (None, None)
    if types == (None, None):
        return None
    if types not in _FORMATS:
        raise ValueError(f"activations of {types[0]} and weights of {types[1]}")
    return quantization_of(
        _FORMATS[types], quant_config.block_shape, quant_config.w1_scale, quant_config.w2_scale,
        quant_config.w1_zp, quant_config.w2_zp,
    )  # fmt: skip


def _options(
    w1: torch.Tensor, global_num_experts: int, expert_map: torch.Tensor | None, quant_config: Any
) -> dict[str, Any]:
    """Without a map, vLLM's number of experts says nothing: ids are those of the weights that are here."""
    num_experts = len(w1) if global_num_experts == -1 else global_num_experts
    return {
        "global_num_experts": -1 if expert_map is None else num_experts,
        "expert_map": expert_map,
        "w1_bias": quant_config and quant_config.w1_bias,
        "w2_bias": quant_config and quant_config.w2_bias,
        "quantization": _quantization(quant_config),
    }


_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_ALIGN = f"{_FUSED_MOE}.moe_align_block_size"
_PERMUTE = f"{_FUSED_MOE}.moe_permute_unpermute"
_TRITON = f"{_FUSED_MOE}.experts.triton_moe"
_switch = Switch(
    "vLLM",
    {
        f"{_ALIGN}:moe_align_block_size": moe_align_block_size,
        f"{_ALIGN}:batched_moe_align_block_size": batched_moe_align_block_size,
        "vllm._custom_ops:moe_align_block_size": moe_align_block_size_into,
        "vllm._custom_ops:batched_moe_align_block_size": batched_moe_align_block_size_into,
        "vllm._custom_ops:moe_lora_align_block_size": moe_lora_align_block_size,
        f"{_PERMUTE}:moe_permute": moe_permute,
        f"{_PERMUTE}:moe_unpermute": moe_unpermute,
        "vllm._custom_ops:moe_sum": moe_sum,
        "vllm._custom_ops:topk_softmax": topk_softmax,
        "vllm._custom_ops:topk_sigmoid": topk_sigmoid,
        "vllm._custom_ops:topk_hash_softplus_sqrt": topk_hash_softplus_sqrt,
        "vllm._custom_ops:grouped_topk": grouped_topk,
        f"{_FUSED_MOE}.fused_moe:fused_experts": fused_experts,
        f"{_TRITON}:TritonExperts.apply": triton_experts_apply,
        f"{_TRITON}:TritonExperts.expects_unquantized_inputs": triton_experts_expects_unquantized_inputs,
        f"{_TRITON}:TritonExperts.workspace_shapes": triton_experts_workspace_shapes,
        f"{_TRITON}:TritonWNA16Experts.apply": triton_experts_apply,
    },
)
enable, disable, enabled = _switch.enable, _switch.disable, _switch.enabled
