"""`import cupy_moe.ops` registers every operator as `torch.ops.cupy_moe.*`.

Looking one up in `cupy_moe` registers it, too; this is for processes that name none, such as those that load
a program of torch.export.
"""

from __future__ import annotations

from .align import moe_align_block_size as moe_align_block_size
from .align_batched import batched_moe_align_block_size as batched_moe_align_block_size
from .combine import moe_sum as moe_sum
from .gate import grouped_topk as grouped_topk
from .gate import topk_sigmoid as topk_sigmoid
from .gate import topk_softmax as topk_softmax
