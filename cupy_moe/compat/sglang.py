"""SGLang's MoE alignment, gating and sum, with SGLang's signatures.

    import cupy_moe.compat.sglang
    cupy_moe.compat.sglang.enable()

puts them in the place of those in `sgl_kernel`, in every module of SGLang that has imported these.
Results are SGLang's, but for what SGLang leaves open: the order inside an expert is ascending, blocks past
the last hold -1, and slots past the last hold the number of ids, with `pad_sorted_token_ids` and without.
"""

from __future__ import annotations

import torch

from ..align import moe_align_block_size as _align
from ..combine import moe_sum as _sum
from ..gate import grouped_topk as _grouped_topk
from ..gate import topk_sigmoid as _topk_sigmoid
from ..gate import topk_softmax as _topk_softmax
from ..library import is_watched
from ..tensors import is_plain
from ._engine import Switch, heads


def moe_align_block_size(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    cumsum_buffer: torch.Tensor | None = None,
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
        if topk_ids.dtype.itemsize < 4:
            topk_ids = topk_ids.int()  # one more may not fit
        _align(topk_ids + 1, block_size, num_experts, expert_map, out=out)


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


def moe_sum_reduce(input: torch.Tensor, output: torch.Tensor, routed_scaling_factor: float = 0.0) -> None:
    """As in sgl_kernel."""
    _sum(input, output, routed_scaling_factor=routed_scaling_factor)


def topk_softmax(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    moe_softcapping: float = 0.0,
    correction_bias: torch.Tensor | None = None,
) -> None:
    """As in sgl_kernel."""
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
) -> None:
    """As in sgl_kernel."""
    _topk_sigmoid(
        gating_output, topk_ids.shape[1], renormalize, e_score_correction_bias=correction_bias,
        out=(topk_weights, topk_ids),
    )  # fmt: skip


def moe_fused_gate(
    input_tensor: torch.Tensor,
    bias: torch.Tensor,
    num_expert_group: int,
    topk_group: int,
    topk: int,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float = 0.0,
    apply_routed_scaling_factor_on_output: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in sgl_kernel: sigmoid, renormalised. The last `num_fused_shared_experts` of the topk slots are for
    shared experts, and take further launches."""
    factor = routed_scaling_factor if apply_routed_scaling_factor_on_output else 1.0
    weights, ids = _grouped_topk(
        input_tensor, topk - num_fused_shared_experts, True, num_expert_group, topk_group, "sigmoid", factor,
        bias.float(),
    )  # fmt: skip
    if num_fused_shared_experts:
        shape = len(ids), num_fused_shared_experts
        shared = torch.arange(num_fused_shared_experts, dtype=torch.int32, device=ids.device)
        ids = torch.cat([ids, (shared + input_tensor.shape[1]).expand(shape)], 1)
        weights = torch.cat([weights, weights.new_full(shape, factor / routed_scaling_factor)], 1)
    return weights, ids


_switch = Switch(
    "SGLang",
    {
        "sgl_kernel:moe_align_block_size": moe_align_block_size,
        "sglang.kernels.ops.moe:moe_align_block_size": moe_align_block_size,
        "sgl_kernel:moe_sum_reduce": moe_sum_reduce,
        "sgl_kernel:topk_softmax": topk_softmax,
        "sgl_kernel:topk_sigmoid": topk_sigmoid,
        "sgl_kernel:moe_fused_gate": moe_fused_gate,
    },
)
enable, disable, enabled = _switch.enable, _switch.disable, _switch.enabled
