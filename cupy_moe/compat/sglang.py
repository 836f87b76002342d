"""SGLang's experts, MoE alignment, permutation, gating and sum, with SGLang's signatures.

    import cupy_moe.compat.sglang
    cupy_moe.compat.sglang.enable()

puts them in the place of those in `sgl_kernel`, `sglang.kernels.ops.moe` and SGLang's Triton runner, in every
module of SGLang that has imported these. Call it in every process of SGLang. Results are SGLang's, but for
what SGLang leaves open: the order inside an expert is ascending, blocks past the last hold -1, and slots past
the last hold the number of ids, with `pad_sorted_token_ids` and without; scores and experts differ by
rounding. Parameters that only some versions of SGLang have come last.

Experts run here with the activations, types and sizes of `cupy_moe.fused_experts`, for hidden states of bf16
and fp16. Their weights may be in

    fp8_w8a8      e4m3, with scales of blocks, of channels or of tensors
    int8_w8a16    signed, with scales of channels; not those of GPTQ, which are unsigned
    int4_w4a16    as moe_wna16 has them, in groups of 32, 64 or 128, with zeros and without

and then activations that were quantised before are not used, nor are static scales of theirs. Zeros of int4
are unpacked when they are first seen, once for a tensor and a place: others that are later written there are
not seen.

All other experts run as SGLang's own, with one warning for each reason: those of other formats, those with
LoRA, those that are not combined, and all in SGLang's batch-invariant mode, as a Hopper GPU takes other
kernels for other numbers of tokens.

SGLang's functions that quantise activations stay its own: they round in other places than
`cupy_moe.per_token_group_quant_fp8` and the like, so that results are not the same to the bit.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from ..dispatch.operator import is_watched
from ..dispatch.tensors import is_plain
from ..operators.align import moe_align_block_size as _align
from ..operators.align_lora import moe_lora_align_block_size as _align_lora
from ..operators.experts import fused_experts as _fused_experts
from ..operators.gate import MAX_SHARED
from ..operators.gate import grouped_topk as _grouped_topk
from ..operators.gate import topk_sigmoid as _topk_sigmoid
from ..operators.gate import topk_softmax as _topk_softmax
from ..operators.gate import topk_softplus_sqrt as _topk_softplus_sqrt
from ..operators.moe_sum import moe_sum as _sum
from ..operators.permute import moe_unpermute as _unpermute
from ..operators.sort import moe_sort as _sort
from ..quantization import Quantization
from ..values import as_float, as_int, check_range
from ._engine import Switch, fill_lora, fp32, heads, lora_heads, pad_tails, require, unless_refused
from ._quantized import quantization_of


def moe_align_block_size(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    cumsum_buffer: torch.Tensor,
    pad_sorted_token_ids: bool = False,
    ignore_invalid_expert: bool = False,
) -> None:
    """As in sgl_kernel: fills tensors that are at least long enough for `num_experts` buckets.

    There is one bucket more than experts. It is the first, it is for ids of -1, and its blocks are named -1;
    with `ignore_invalid_expert` it stays empty. `cumsum_buffer` is not needed here, and not written.
    """
    out = heads(topk_ids.numel(), num_experts, block_size, sorted_token_ids, experts_ids, num_tokens_post_pad)
    expert_map = _expert_map(topk_ids, num_experts, ignore_invalid_expert)
    if ignore_invalid_expert:
        _align(topk_ids, block_size, num_experts, expert_map, ignore_invalid_experts=True, out=out)
    else:
        ids = topk_ids.to(_WITH_ROOM.get(topk_ids.dtype, topk_ids.dtype))
        ids = ids + 1 if ids.dtype.is_signed else ids  # bools are for _align to refuse, as they are
        _align(ids, block_size, num_experts, expert_map, out=out)
    pad_tails(out, topk_ids.numel(), sorted_token_ids, experts_ids)


# Where one more may not fit, or torch does not add. The last unsigned number of 32 or 64 bits means -1.
_WITH_ROOM = {
    **dict.fromkeys((torch.int8, torch.uint8, torch.int16, torch.uint16, torch.uint32), torch.int32),
    torch.uint64: torch.int64,
}
_expert_maps: dict[tuple[int, bool, torch.device], torch.Tensor] = {}


def _expert_map(topk_ids: torch.Tensor, num_experts: int, ignore_invalid_expert: bool) -> torch.Tensor:
    """-1, 0, 1, ..., the expert of each bucket; or 0, 1, ..., -1, that of each id, where none is shifted.

    Kept, unless a graph that is being captured or traced has to make it itself: made on the host and copied,
    which waits for the copy, so that it can be read on any stream.
    """
    device, in_graph = topk_ids.device, is_watched() or not is_plain(topk_ids)
    key = num_experts, ignore_invalid_expert, device
    if not in_graph and key in _expert_maps:
        return _expert_maps[key]
    in_graph = in_graph or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    made = torch.arange(-1, num_experts - 1, dtype=torch.int32, device=device if in_graph else "cpu")
    made = made.roll(-1) if ignore_invalid_expert else made
    if not in_graph:
        made = _expert_maps[key] = made.to(device)
    return made


def moe_lora_align_block_size(
    topk_ids: torch.Tensor,
    seg_indptr: torch.Tensor,
    req_to_lora: torch.Tensor,
    num_experts: int,
    block_size: int,
    max_loras: int,
    max_num_tokens_padded: int,
    max_num_m_blocks: int,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    adapter_enabled: torch.Tensor,
    lora_ids: torch.Tensor,
    maybe_expert_map: torch.Tensor | None = None,
    cumsum_buffer: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> None:
    """As in sglang.kernels.ops.lora.moe.moe_lora_align. `lora_ids` and workspaces are not needed; the adapter
    of each token takes further launches, and so do buffers that are longer than results."""
    given = num_experts, block_size, max_loras, sorted_token_ids, expert_ids, num_tokens_post_pad
    out = lora_heads(topk_ids.numel(), *given)
    tokens = torch.arange(len(topk_ids), dtype=seg_indptr.dtype, device=topk_ids.device)
    segments = torch.searchsorted(seg_indptr[1:].contiguous(), tokens, right=True)
    inside = segments < len(req_to_lora)
    adapters = torch.where(inside, req_to_lora[segments.clamp(max=len(req_to_lora) - 1)], -1)
    options = block_size, num_experts, max_loras, adapter_enabled, maybe_expert_map
    _align_lora(topk_ids, adapters.to(torch.int32), *options, out=out)
    fill_lora(out, topk_ids.numel(), sorted_token_ids, expert_ids)


def prepare_moe_input(
    topk_ids: torch.Tensor,
    expert_offsets: torch.Tensor,
    problem_sizes1: torch.Tensor,
    problem_sizes2: torch.Tensor,
    input_permutation: torch.Tensor,
    output_permutation: torch.Tensor,
    num_experts: int,
    n: int,
    k: int,
    blockscale_offsets: torch.Tensor | None = None,
) -> None:
    """As in sgl_kernel, in stable order. Sizes of products and tokens of rows take further launches."""
    require("topk_ids", topk_ids, 2)
    num_tokens, topk = topk_ids.shape
    sort = _sort(topk_ids, 1, num_experts, return_inverse=True, return_offsets=True, return_counts=True)
    inverse: Any = sort.inverse_ids  # -1, which no row has, for ids that are no experts
    output_permutation.copy_(inverse.view(output_permutation.shape))
    expert_offsets.copy_(sort.expert_offsets)
    tokens = torch.div(sort.sorted_token_ids, max(1, topk), rounding_mode="floor")
    input_permutation.copy_(tokens.clamp_(max=max(0, num_tokens - 1)).view(input_permutation.shape))
    for sizes, rest in ((problem_sizes1, (2 * n, k)), (problem_sizes2, (k, n))):
        sizes[:, 0].copy_(sort.counts)
        sizes[:, 1].fill_(rest[0])
        sizes[:, 2].fill_(rest[1])
    if blockscale_offsets is not None:
        counts: Any = sort.counts
        blockscale_offsets[0].fill_(0)
        blockscale_offsets[1:].copy_(((counts + 127) // 128 * 128).cumsum(0))


def apply_shuffle_mul_sum(
    input: torch.Tensor, output: torch.Tensor, permutation: torch.Tensor, factors: torch.Tensor | None
) -> None:
    """As in sgl_kernel; factors of 16 bits take a further launch."""
    require("output", output, 2)
    shape = len(output), permutation.numel() // max(1, len(output))
    weights = None if factors is None else factors.float().view(shape)
    _unpermute(input, permutation.view(shape), output, topk_weights=weights)


def moe_sum_reduce(
    input_tensor: torch.Tensor, output_tensor: torch.Tensor, routed_scaling_factor: float = 0
) -> None:
    """As in sgl_kernel. The factor that is the default there makes zeros of everything."""
    require("output_tensor", output_tensor)
    _sum(input_tensor, output_tensor, routed_scaling_factor=routed_scaling_factor)


def topk_softmax(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    moe_softcapping: float = 0.0,
    correction_bias: torch.Tensor | None = None,
) -> None:
    """As in sgl_kernel."""
    require("topk_ids", topk_ids, 2)
    _topk_softmax(
        gating_output, topk_ids.shape[1], renormalize, e_score_correction_bias=correction_bias,
        softcap=moe_softcapping, out=(topk_weights, topk_ids),
    )  # fmt: skip


def topk_sigmoid(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    correction_bias: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    num_fused_shared_experts: int = 0,
) -> None:
    """As in sgl_kernel and sglang.kernels.ops.moe: the factor is for renormalised weights only.

    The last `num_fused_shared_experts` of the topk slots are for shared experts. Each has 1 as its weight; or
    where nothing is renormalised the sum of the others over the factor, which takes further launches.
    """
    require("topk_ids", topk_ids, 2)
    num_shared, factor = num_fused_shared_experts, routed_scaling_factor if renormalize else 1.0
    if num_shared:
        _check_shared(num_shared, topk_ids.shape[1], routed_scaling_factor)
    _topk_sigmoid(
        gating_output, topk_ids.shape[1] - num_shared, renormalize, e_score_correction_bias=correction_bias,
        routed_scaling_factor=factor, num_fused_shared_experts=num_shared, out=(topk_weights, topk_ids),
    )  # fmt: skip
    if num_shared and not renormalize:
        routed = topk_weights[:, :-num_shared].sum(1, keepdim=True)
        topk_weights[:, -num_shared:] = routed / routed_scaling_factor


def moe_fused_gate(
    input_tensor: torch.Tensor,
    bias: torch.Tensor,
    num_expert_group: int,
    topk_group: int,
    topk: int,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float = 0,
    apply_routed_scaling_factor_on_output: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in sgl_kernel: sigmoid, renormalised, times the factor only with `apply_...`.

    The last `num_fused_shared_experts` of the topk slots are for shared experts. Each has 1 over the factor
    as its weight, or with `apply_...` 1, so that multiplying by the factor later leaves a shared expert as it
    is. SGLang divides by 0, the default, all the same; here it raises ValueError.
    """
    factor = routed_scaling_factor if apply_routed_scaling_factor_on_output else 1.0
    if num_fused_shared_experts:
        _check_shared(num_fused_shared_experts, topk, routed_scaling_factor)
    return _grouped_topk(
        input_tensor, topk - num_fused_shared_experts, True, num_expert_group, topk_group, "sigmoid", factor,
        fp32(bias), **_shared(num_fused_shared_experts, factor, routed_scaling_factor),
    )  # fmt: skip


def fused_gate(
    scores: torch.Tensor,
    bias: torch.Tensor | None,
    topk: int,
    scoring_func: str = "sigmoid",
    num_fused_shared_experts: int = 0,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
    apply_routed_scaling_factor_on_output: bool = False,
    moe_softcapping: float = 0.0,
    num_expert_group: int = 1,
    topk_group: int = 1,
    *,
    bias_alt: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    bias_alt_token_id: int | None = None,
    num_token_non_padded: torch.Tensor | None = None,
    renormalize_epsilon: float = 0.0,
    packed_out: torch.Tensor | None = None,
    sqrtsoftplus_log1p: bool = False,
    original: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `moe_fused_gate` in sglang.kernels.ops.moe.moe_fused_gate. `original` is SGLang's own, which runs
    instead where this would raise TypeError or ValueError: with another bias for some tokens, a number of
    tokens on the device, an epsilon, packed results, NaN above all, or a softmax of biased logits."""
    factor = 1.0 if routed_scaling_factor is None else routed_scaling_factor
    with unless_refused(original):
        asked = bias_alt, input_ids, num_token_non_padded, packed_out
        if any(tensor is not None for tensor in asked) or renormalize_epsilon or sqrtsoftplus_log1p:
            raise ValueError("gating with an option that cupy_moe does not have")
        scoring = _SCORING.get(scoring_func.lower(), scoring_func)
        if (scoring == "softmax") == (bias is not None) or (moe_softcapping and scoring != "softmax"):
            raise ValueError(f"gating by {scoring}, with or without a bias")
        if num_fused_shared_experts:
            _check_shared(num_fused_shared_experts, topk, factor)
        applied = factor if apply_routed_scaling_factor_on_output else 1.0
        num_routed, shared = (
            topk - num_fused_shared_experts,
            _shared(num_fused_shared_experts, applied, factor),
        )
        if scoring == "softmax" and num_expert_group == 1:
            return _topk_softmax(
                scores,
                num_routed,
                renormalize,
                routed_scaling_factor=applied,
                softcap=moe_softcapping,
                **shared,
            )
        return _grouped_topk(
            scores, num_routed, renormalize, num_expert_group, topk_group, scoring, applied, _needed(bias),
            **shared,
        )  # fmt: skip
    return original(
        scores, bias, topk, scoring_func, num_fused_shared_experts, renormalize, routed_scaling_factor,
        apply_routed_scaling_factor_on_output, moe_softcapping, num_expert_group, topk_group,
        bias_alt=bias_alt, input_ids=input_ids, bias_alt_token_id=bias_alt_token_id,
        num_token_non_padded=num_token_non_padded, renormalize_epsilon=renormalize_epsilon,
        packed_out=packed_out, sqrtsoftplus_log1p=sqrtsoftplus_log1p,
    )  # fmt: skip


_SCORING = {"sqrtsoftplus": "softplus_sqrt"}


def _needed(bias: torch.Tensor | None) -> torch.Tensor | None:
    """Without one, groups are chosen by their best two in SGLang."""
    if bias is None:
        raise ValueError("groups of experts without a bias")
    return fp32(bias)


def hash_topk(
    router_logits: torch.Tensor,
    input_ids: torch.Tensor,
    tid2eid: torch.Tensor,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float = 1.0,
    scoring_func: str = "sqrtsoftplus",
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in sglang.kernels.ops.moe.dsv4: renormalised, with 1 over the factor for shared experts alone."""
    if scoring_func != "sqrtsoftplus":
        raise ValueError(f"scoring_func: expected 'sqrtsoftplus', got {scoring_func!r}")
    if num_fused_shared_experts:
        _check_shared(num_fused_shared_experts, MAX_SHARED + 1, routed_scaling_factor)
    return _topk_softplus_sqrt(
        router_logits, tid2eid.shape[1], True, input_ids=input_ids, hash_table=tid2eid,
        **_shared(num_fused_shared_experts, 1.0, routed_scaling_factor),
    )  # fmt: skip


def _check_shared(num_shared: int, topk: int, factor: float) -> None:
    topk = as_int("topk", topk)
    check_range("num_fused_shared_experts", as_int("num_fused_shared_experts", num_shared), topk - 1, least=0)
    if as_float("routed_scaling_factor", factor) == 0:
        raise ValueError("routed_scaling_factor: expected other than 0 with fused shared experts, got 0")


def _shared(num_shared: int, applied: float, factor: float) -> dict[str, Any]:
    """The options of gating: what is left of the factor that is applied, once all is divided by it."""
    if not num_shared:
        return {}
    return {"num_fused_shared_experts": num_shared, "shared_expert_weight": applied / factor}


def fused_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_output: Any,
    moe_runner_config: Any,
    b1: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    use_fp8_w8a8: bool = False,
    use_int8_w8a8: bool = False,
    use_int8_w8a16: bool = False,
    use_int4_w4a16: bool = False,
    per_channel_quant: bool = False,
    w1_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    w1_zp: torch.Tensor | None = None,
    w2_zp: torch.Tensor | None = None,
    a1_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    block_shape: list[int] | None = None,
    a1_q: torch.Tensor | None = None,
    fuse_swiglu_interleaved: bool = False,
    *,
    original: Any = None,
) -> torch.Tensor:
    """As in sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe. `original` is SGLang's own, which runs
    instead where this would raise TypeError or ValueError."""
    with unless_refused(original):
        if use_int8_w8a8 or fuse_swiglu_interleaved:
            raise ValueError(_LEFT)
        quantization = _quantization(
            use_fp8_w8a8, use_int8_w8a16, use_int4_w4a16, block_shape, w1_scale, w2_scale, w1_zp, w2_zp
        )
        topk_weights, topk_ids, _ = topk_output
        return _experts(
            hidden_states, w1, w2, topk_weights, topk_ids, moe_runner_config, b1, b2, quantization
        )
    return original(
        hidden_states, w1, w2, topk_output, moe_runner_config, b1, b2, use_fp8_w8a8, use_int8_w8a8,
        use_int8_w8a16, use_int4_w4a16, per_channel_quant, w1_scale, w2_scale, w1_zp, w2_zp, a1_scale,
        a2_scale, block_shape, a1_q, fuse_swiglu_interleaved,
    )  # fmt: skip


def triton_runner_core_run(
    self: Any,
    runner_input: Any,
    quant_info: Any,
    running_state: dict[str, Any],
    hooks: Any = None,
    *,
    original: Any = None,
) -> Any:
    """As `TritonRunnerCore.run`, which SGLang takes where it has no fused function."""
    with unless_refused(original):
        if hooks is not None:
            raise ValueError("hooks, as of LoRA")
        if quant_info.use_mxfp8 or quant_info.use_int8_w8a8 or quant_info.fuse_swiglu_interleaved:
            raise ValueError(_LEFT)
        quantization = _quantization(
            quant_info.use_fp8_w8a8, quant_info.use_int8_w8a16, quant_info.use_int4_w4a16,
            quant_info.block_shape, quant_info.w13_scale, quant_info.w2_scale, quant_info.w13_zp,
            quant_info.w2_zp,
        )  # fmt: skip
        output = _experts(
            runner_input.hidden_states, quant_info.w13_weight, quant_info.w2_weight,
            runner_input.topk_weights, runner_input.topk_ids, self.config, quant_info.b13, quant_info.b2,
            quantization,
        )  # fmt: skip
        from sglang.srt.layers.moe.moe_runner.triton import TritonRunnerOutput

        return TritonRunnerOutput(hidden_states=output)
    return original(self, runner_input, quant_info, running_state, hooks)


_LEFT = "experts in mxfp8 or int8_w8a8, or whose gates and ups are interleaved"


def _quantization(is_fp8: bool, is_int8: bool, is_int4: bool, *stored: Any) -> Quantization | None:
    """`stored` are the shape of blocks, scales and zeros. None for weights of 16 bits."""
    if not (is_fp8 or is_int8 or is_int4):
        return None
    return quantization_of("fp8" if is_fp8 else "int8" if is_int8 else "int4", *stored)


def _experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    config: Any,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    quantization: Quantization | None,
) -> torch.Tensor:
    """By a MoeRunnerConfig. Raises TypeError and ValueError for what `cupy_moe.fused_experts` does not do."""
    activation = config.activation if config.is_gated else f"{config.activation}_no_mul"
    alpha, limit = config.gemm1_alpha, config.gemm1_clamp_limit
    limits = alpha, limit, config.swiglu_limit
    if activation == "silu" and limits[2] is None and None not in (alpha, limit):
        activation = "swigluoai" if config.gate_up_interleaved else "swigluoai_uninterleave"
    elif limits != (None, None, None):
        raise ValueError(f"the activation {activation}, with an alpha and limits of {limits}")
    if config.no_combine:
        raise ValueError("outputs that are not combined")
    batch_invariant_ops = sys.modules.get("sglang.srt.batch_invariant_ops")
    if batch_invariant_ops and batch_invariant_ops.is_batch_invariant_mode_enabled():
        raise ValueError("the batch-invariant mode")
    factor = config.routed_scaling_factor
    return _fused_experts(
        hidden_states, w1, w2, topk_weights.float(), topk_ids, activation,
        config.apply_router_weight_on_input, w1_bias=w1_bias, w2_bias=w2_bias,
        routed_scaling_factor=1.0 if factor is None else factor, swiglu_alpha=alpha, swiglu_limit=limit,
        quantization=quantization, out=hidden_states if config.inplace else None,
    )  # fmt: skip


_RUNNER = "sglang.srt.layers.moe.moe_runner"
_switch = Switch(
    "SGLang",
    {
        "sgl_kernel:moe_align_block_size": moe_align_block_size,
        "sglang.kernels.ops.moe:moe_align_block_size": moe_align_block_size,
        "sglang.kernels.ops.lora.moe.moe_lora_align:moe_lora_align_block_size": moe_lora_align_block_size,
        "sgl_kernel:prepare_moe_input": prepare_moe_input,
        "sgl_kernel:apply_shuffle_mul_sum": apply_shuffle_mul_sum,
        "sgl_kernel:moe_sum_reduce": moe_sum_reduce,
        "sgl_kernel:topk_softmax": topk_softmax,
        "sglang.kernels.ops.moe:topk_softmax": topk_softmax,
        "sgl_kernel:topk_sigmoid": topk_sigmoid,
        "sglang.kernels.ops.moe.moe_topk_sigmoid:topk_sigmoid": topk_sigmoid,
        "sgl_kernel:moe_fused_gate": moe_fused_gate,
        "sglang.kernels.ops.moe.moe_fused_gate:moe_fused_gate": fused_gate,
        "sglang.kernels.ops.moe.dsv4:hash_topk": hash_topk,
        f"{_RUNNER}.triton_utils.fused_moe:fused_experts": fused_experts,
        f"{_RUNNER}.triton:TritonRunnerCore.run": triton_runner_core_run,
    },
)
enable, disable, enabled = _switch.enable, _switch.disable, _switch.enabled
