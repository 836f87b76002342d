"""moe_align_block_size once more, in loops, to compare the specification with; and what its tests share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cupy_moe.plans.align import ALIGN_KERNELS

ID_TYPES = (
    torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64
)  # fmt: skip
Lists = tuple[list[int], list[int], list[int]]


def naive(
    ids: Sequence[int],
    block_size: int,
    num_experts: int,
    expert_map: Sequence[int] | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
) -> Lists:
    """As anyone would write it first: a list for each expert. The specification is cupy_moe/cpu/align.py."""

    def local(expert: int) -> int:
        assert expert_map is not None
        return expert_map[expert] if 0 <= expert_map[expert] < num_experts else -1

    num_ids = len(ids)
    buckets: list[list[int]] = [[] for _ in range(num_experts)]
    for i, expert in enumerate(ids):
        if not 0 <= expert < num_experts:
            continue
        if expert_map is not None and ignore_invalid_experts:
            expert = local(expert)
        if expert >= 0:
            buckets[expert].append(i)

    sorted_token_ids: list[int] = []
    expert_ids: list[int] = []
    for expert, bucket in enumerate(buckets):
        name = local(expert) if expert_map is not None and not ignore_invalid_experts else expert
        for first in range(0, len(bucket), block_size):
            block = bucket[first : first + block_size]
            sorted_token_ids += block + [num_ids] * (block_size - len(block))
            expert_ids.append(name)
    post_pad = len(sorted_token_ids)

    num_slots = num_ids + num_experts * (block_size - 1)
    if pad_sorted_ids and num_slots % block_size:
        num_slots += block_size - num_slots % block_size
    if num_ids < num_experts:
        num_slots = min(num_slots, num_ids * block_size)
    sorted_token_ids += [num_ids] * (num_slots - post_pad)
    expert_ids += [-1] * ((num_slots + block_size - 1) // block_size - len(expert_ids))
    return sorted_token_ids, expert_ids, [post_pad]


def layouts(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same ids [tokens, topk] in memory laid out otherwise."""
    tokens, topk = ids.shape
    wide = torch.zeros(tokens, 2 * topk + 3, dtype=ids.dtype, device=ids.device)
    wide[:, 1 : topk + 1] = ids
    sparse = torch.zeros(3 * tokens, 2 * topk, dtype=ids.dtype, device=ids.device)
    sparse[::3, ::2] = ids
    flat = torch.zeros(ids.numel() + 1, dtype=ids.dtype, device=ids.device)
    flat[1:] = ids.reshape(-1)
    found = {
        "contiguous": ids.contiguous(),
        "columns of a wider tensor": wide[:, 1 : topk + 1],
        "every third row, every second column": sparse[::3, ::2],
        "transposed": ids.t().contiguous().t(),
        "one element past an aligned address": flat[1:].view(tokens, topk),
    }
    if tokens % 2 == 0:  # no two strides describe this
        cube = ids.reshape(2, tokens // 2, topk)
        found["three strides"] = cube.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    return found


def kernel_of(launched: Sequence[str]) -> str:
    """Which of ALIGN_KERNELS it is that launches these entry points."""
    entry = launched[0]
    if entry.startswith("align_count_"):
        return "global_large" if "_large_" in entry else "global"
    (name,) = [name for name in ALIGN_KERNELS if f"_{name}_" in entry and name != "shared"] or ["shared"]
    return name
