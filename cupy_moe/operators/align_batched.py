"""batched_moe_align_block_size: as moe_align_block_size, for tokens that already lie expert by expert."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ..cpu import align_batched as cpu
from ..cuda.launch import CACHED_CALLS, Launch, bind
from ..cuda.structs import ArgumentStruct
from ..dispatch.arrays import Array
from ..dispatch.operator import Operator, is_watched
from ..dispatch.tensors import address, check_layout, check_tensor, cuda_index, is_plain
from ..plans.align import MAX_BLOCK_SIZE
from ..plans.align_batched import plan_batched
from ..plans.base import MAX_EXPERTS, divisor, round_up
from ..values import INT32_MAX, as_int, check_range
from .align import MoEAlignment, allocate, are_outputs, check_out

__all__ = ["batched_moe_align_block_size"]

_ARGS = ArgumentStruct(
    "align_batched/align_batched.cu:BatchedArgs",
    "expert_num_tokens sorted_token_ids expert_ids num_tokens_post_pad",
    "u32 num_batches, max_tokens, num_slots, num_blocks; Divisor block_size; u32 parts",
)


def batched_moe_align_block_size(
    max_tokens_per_batch: int,
    block_size: int,
    expert_num_tokens: Array,
    *,
    out: tuple[Array, Array, Array] | None = None,
) -> MoEAlignment[Array]:
    """Align activations [experts, max_tokens_per_batch, hidden], of which the first rows of each are tokens.

    With E experts, T = max_tokens_per_batch, B = block_size and M = E * (T rounded up to whole blocks):

    max_tokens_per_batch    1 to 2^31 - 1                  rows of each expert
    block_size              1 to 65 536                    rows that the consumer takes at a time
    expert_num_tokens       [E]                     int32  how many of the rows are tokens
    out                     the three results              written instead of allocated; contiguous

    Returns MoEAlignment of
    sorted_token_ids        [M]                     int32  the rows e * T + t of tokens, by expert, ascending;
                                                           E * T in padding slots and in the tail
    expert_ids              [M / B]                 int32  expert of each block; -1 past the last
    num_tokens_post_pad     [1]                     int32  slots in use, a multiple of B

    A count below 0 is taken for 0 and one above T for T, so nothing in `expert_num_tokens` can make it
    fail. An expert without tokens takes no block.

    >>> aligned = batched_moe_align_block_size(8, 4, torch.tensor([2, 0, 5], dtype=torch.int32))
    >>> aligned.sorted_token_ids[:12].view(3, 4).tolist()
    [[0, 1, 24, 24], [16, 17, 18, 19], [20, 24, 24, 24]]
    >>> aligned.expert_ids.tolist(), aligned.num_tokens_post_pad.item()
    ([0, 2, 2, -1, -1, -1], 12)

    Cost: one launch on torch's current stream, no synchronisation, and the outputs as the only allocation.
    Arrays with `__dlpack__` (cupy, jax, numpy) are accepted, and give arrays of their kind.

    Raises TypeError and ValueError for wrong arguments, before anything is launched; what loading a kernel
    for the first time raises; and KernelLaunchError. Semantics: vLLM's function of this name.
    """
    if is_watched() or not is_plain(expert_num_tokens) or not (out is None or are_outputs(out)):
        return _operator(max_tokens_per_batch, block_size, expert_num_tokens, out=out)
    max_tokens = as_int("max_tokens_per_batch", max_tokens_per_batch)
    block_size, device = as_int("block_size", block_size), expert_num_tokens.device
    check_layout("expert_num_tokens", expert_num_tokens)
    if expert_num_tokens.dim() != 1:
        raise ValueError(f"expert_num_tokens: expected shape [experts], got {list(expert_num_tokens.shape)}")
    shape = expert_num_tokens.shape
    check_tensor("expert_num_tokens", expert_num_tokens, (torch.int32,), shape, device, strided=True)
    counts = expert_num_tokens.contiguous()
    call = _prepare(len(counts), max_tokens, block_size, device)
    outputs: MoEAlignment[Any]
    if out is None:
        outputs = allocate(call.num_slots, call.num_blocks, counts)
    else:
        check_out(out, call.num_slots, call.num_blocks, device, expert_num_tokens=counts)
        outputs = MoEAlignment(*out)
    if call.launch is None:
        results = cpu.batched_moe_align_block_size(max_tokens, block_size, counts)
        for output, result in zip(outputs, results, strict=True):
            output.view(-1).copy_(result)
    else:
        pointers = (address(f"out: {n}", t) for n, t in outputs._asdict().items())
        call.launch(address("expert_num_tokens", counts), *pointers)
    return outputs


class _Call(NamedTuple):
    """All that follows from sizes: worked out and checked once, looked up later."""

    num_slots: int
    num_blocks: int
    launch: Launch | None = None  # None: on the CPU


@functools.lru_cache(CACHED_CALLS)
def _prepare(num_batches: int, max_tokens: int, block_size: int, device: torch.device) -> _Call:
    check_range("max_tokens_per_batch", max_tokens, INT32_MAX)
    check_range("block_size", block_size, MAX_BLOCK_SIZE)
    if num_batches > MAX_EXPERTS:
        raise ValueError(f"expert_num_tokens: expected at most {MAX_EXPERTS} experts, got {num_batches}")
    width = round_up(max_tokens, block_size)
    num_slots = num_batches * width
    if num_slots + block_size - 1 > INT32_MAX:
        raise ValueError(
            f"max_tokens_per_batch: {num_batches} experts of {width} slots need {num_slots}, more than int32"
            f" numbers ({INT32_MAX}) with a block to spare"
        )
    num_blocks = num_slots // block_size
    index = cuda_index("expert_num_tokens", device)
    if index is None:
        return _Call(num_slots, num_blocks)
    plan, parts = plan_batched(num_batches, width)
    constants = _ARGS.pack(
        num_batches=num_batches,
        max_tokens=max_tokens,
        num_slots=num_slots,
        num_blocks=num_blocks,
        block_size=divisor(block_size),
        parts=parts,
    )
    return _Call(num_slots, num_blocks, bind(plan, index, _ARGS.num_pointers, constants))


def _fake(
    max_tokens_per_batch: int, block_size: int, expert_num_tokens: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    num_slots = expert_num_tokens.shape[0] * round_up(max_tokens_per_batch, block_size)
    lengths = num_slots, num_slots // block_size, 1
    return tuple(expert_num_tokens.new_empty((length,), dtype=torch.int32) for length in lengths)


_operator = Operator(
    "batched_moe_align_block_size",
    "SymInt max_tokens_per_batch, SymInt block_size, Tensor expert_num_tokens",
    MoEAlignment,
    batched_moe_align_block_size,
    _fake,
)
