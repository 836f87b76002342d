"""SGLang's MoE alignment, gating and sum, with SGLang's signatures.

    import cupy_moe.compat.sglang
    cupy_moe.compat.sglang.enable()

puts them in the place of those in `sgl_kernel` and `sglang.kernels.ops.moe`, in every module of SGLang that
has imported these. Results are SGLang's, but for what SGLang leaves open: the order inside an expert is
ascending, blocks past the last hold -1, and slots past the last hold the number of ids, with
`pad_sorted_token_ids` and without. Parameters that only some versions of SGLang have come last.
"""

from __future__ import annotations

import torch

from ..dispatch.operator import is_watched
from ..dispatch.tensors import is_plain
from ..operators.align import moe_align_block_size as _align
from ..operators.gate import grouped_topk as _grouped_topk
from ..operators.gate import topk_sigmoid as _topk_sigmoid
from ..operators.gate import topk_softmax as _topk_softmax
from ..operators.moe_sum import moe_sum as _sum
from ..values import as_float, as_int, check_range
from ._engine import Switch, fp32, heads, pad_tails, require


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

    The last `num_fused_shared_experts` of the topk slots are for shared experts, and take further launches.
    Each has 1 as its weight, or where nothing is renormalised the sum of the others over the factor.
    """
    require("topk_ids", topk_ids, 2)
    topk, factor = topk_ids.shape[1], routed_scaling_factor if renormalize else 1.0
    if not num_fused_shared_experts:
        _topk_sigmoid(
            gating_output, topk, renormalize, e_score_correction_bias=correction_bias,
            routed_scaling_factor=factor, out=(topk_weights, topk_ids),
        )  # fmt: skip
        return
    _check_shared(num_fused_shared_experts, topk, routed_scaling_factor)
    weights, ids = _topk_sigmoid(
        gating_output, topk - num_fused_shared_experts, renormalize, e_score_correction_bias=correction_bias,
        routed_scaling_factor=factor, ids_dtype=topk_ids.dtype,
    )  # fmt: skip
    shared = torch.ones_like(weights[:, :1]) if renormalize else weights.sum(1, True) / routed_scaling_factor
    weights, ids = _with_shared(weights, ids, shared, gating_output.shape[1], num_fused_shared_experts)
    topk_weights.copy_(weights)
    topk_ids.copy_(ids)


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

    The last `num_fused_shared_experts` of the topk slots are for shared experts, and take further launches.
    Each has the sum of the others' weights over the factor as its weight, so that multiplying by the factor
    later leaves a shared expert as it is. SGLang divides by 0, the default, all the same; here it raises
    ValueError.
    """
    factor = routed_scaling_factor if apply_routed_scaling_factor_on_output else 1.0
    if num_fused_shared_experts:
        _check_shared(num_fused_shared_experts, topk, routed_scaling_factor)
    weights, ids = _grouped_topk(
        input_tensor, topk - num_fused_shared_experts, True, num_expert_group, topk_group, "sigmoid", factor,
        fp32(bias),
    )  # fmt: skip
    if num_fused_shared_experts:
        shared = weights.new_full((len(weights), 1), factor / routed_scaling_factor)
        return _with_shared(weights, ids, shared, input_tensor.shape[1], num_fused_shared_experts)
    return weights, ids


def _check_shared(num_shared: int, topk: int, factor: float) -> None:
    topk = as_int("topk", topk)
    check_range("num_fused_shared_experts", as_int("num_fused_shared_experts", num_shared), topk - 1, least=0)
    if as_float("routed_scaling_factor", factor) == 0:
        raise ValueError("routed_scaling_factor: expected other than 0 with fused shared experts, got 0")


def _with_shared(
    weights: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, first_id: int, num_shared: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with `num_shared` more columns: the ids from `first_id` on, of one weight in each row."""
    shared = torch.arange(first_id, first_id + num_shared, dtype=ids.dtype, device=ids.device)
    shape = len(ids), num_shared
    return torch.cat([weights, weight.expand(shape)], 1), torch.cat([ids, shared.expand(shape)], 1)


_switch = Switch(
    "SGLang",
    {
        "sgl_kernel:moe_align_block_size": moe_align_block_size,
        "sglang.kernels.ops.moe:moe_align_block_size": moe_align_block_size,
        "sgl_kernel:moe_sum_reduce": moe_sum_reduce,
        "sgl_kernel:topk_softmax": topk_softmax,
        "sglang.kernels.ops.moe:topk_softmax": topk_softmax,
        "sgl_kernel:topk_sigmoid": topk_sigmoid,
        "sglang.kernels.ops.moe.moe_topk_sigmoid:topk_sigmoid": topk_sigmoid,
        "sgl_kernel:moe_fused_gate": moe_fused_gate,
    },
)
enable, disable, enabled = _switch.enable, _switch.disable, _switch.enabled
