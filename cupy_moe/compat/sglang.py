"""SGLang's MoE alignment, with SGLang's signature.

    import cupy_moe.compat.sglang
    cupy_moe.compat.sglang.enable()

puts it in the place of `sgl_kernel.moe_align_block_size`, in every module of SGLang that has imported that.
Results are SGLang's, but for what SGLang leaves open: the order inside an expert is ascending, blocks past
the last hold -1, and slots past the last hold the number of ids, with `pad_sorted_token_ids` and without.
"""

from __future__ import annotations

import torch

from ..align import moe_align_block_size as _align
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
    experts = torch.arange(-1, num_experts - 1, dtype=torch.int32, device=topk_ids.device)  # of each bucket
    if ignore_invalid_expert:
        _align(topk_ids, block_size, num_experts, experts.roll(-1), ignore_invalid_experts=True, out=out)
    else:
        if topk_ids.dtype.itemsize < 4:
            topk_ids = topk_ids.int()  # one more may not fit
        _align(topk_ids + 1, block_size, num_experts, experts, out=out)


_switch = Switch(
    "SGLang",
    {
        "sgl_kernel:moe_align_block_size": moe_align_block_size,
        "sglang.kernels.ops.moe:moe_align_block_size": moe_align_block_size,
    },
)
enable, disable, enabled = _switch.enable, _switch.disable, _switch.enabled
