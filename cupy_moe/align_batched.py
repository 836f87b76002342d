"""batched_moe_align_block_size: as moe_align_block_size, for tokens that already lie expert by expert."""

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

import torch

from . import arrays, cpu, library
from .align import MoEAlignment, allocate, check_out
from .launch import Launch, bind
from .plan import INT32_MAX, MAX_BLOCK_SIZE, MAX_EXPERTS, check_int, divisor, plan_batched, round_up

__all__ = ["batched_moe_align_block_size"]

_POINTERS, _CONSTANTS = struct.Struct("@4P"), struct.Struct("@8I")  # BatchedArgs in align_batched.cu
_is_compiling = torch.compiler.is_dynamo_compiling


def batched_moe_align_block_size(
    max_tokens_per_batch: int,
    block_size: int,
    expert_num_tokens: torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> MoEAlignment:
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

    Raises TypeError and ValueError for wrong arguments, before anything is launched; and what loading a
    kernel for the first time raises. Semantics: vLLM's function of this name.
    """
    if type(expert_num_tokens) is not torch.Tensor or _is_compiling():
        return _indirectly(max_tokens_per_batch, block_size, expert_num_tokens, out)
    device = expert_num_tokens.get_device() if expert_num_tokens.is_cuda else expert_num_tokens.device
    if expert_num_tokens.dtype is not torch.int32:
        raise TypeError(f"expert_num_tokens: expected torch.int32, got {expert_num_tokens.dtype}; cast it")
    if expert_num_tokens.dim() != 1:
        raise ValueError(f"expert_num_tokens: expected shape [experts], got {list(expert_num_tokens.shape)}")
    expert_num_tokens = expert_num_tokens.contiguous()
    call = _prepare(len(expert_num_tokens), max_tokens_per_batch, block_size, device)
    if out is None:
        outputs = allocate(call.num_slots, call.num_blocks, device)
    else:
        check_out(out, call.num_slots, call.num_blocks, device)
        outputs = MoEAlignment(*out)
    if call.launch is None:
        max_tokens, size = call.sizes
        results = cpu.batched_moe_align_block_size(max_tokens, size, expert_num_tokens)
        for output, result in zip(outputs, results, strict=True):
            output.view(-1).copy_(result)
    else:
        call.launch(expert_num_tokens.data_ptr(), *(output.data_ptr() for output in outputs))
    return outputs


class _Call(NamedTuple):
    """All that follows from sizes: worked out and checked once, looked up later."""

    num_slots: int
    num_blocks: int
    sizes: tuple[int, int]  # max_tokens and block_size as ints, where the arguments may be equal to them
    launch: Launch | None = None  # None: on the CPU


@functools.lru_cache(maxsize=65_536)
def _prepare(num_batches: int, max_tokens: int, block_size: int, device: int | torch.device) -> _Call:
    check_int("max_tokens_per_batch", max_tokens, INT32_MAX)
    check_int("block_size", block_size, MAX_BLOCK_SIZE)
    if num_batches > MAX_EXPERTS:
        raise ValueError(f"expert_num_tokens: expected at most {MAX_EXPERTS} experts, got {num_batches}")
    width = round_up(max_tokens, block_size)
    num_slots = num_batches * width
    if num_slots + block_size - 1 > INT32_MAX:
        raise ValueError(
            f"{num_batches} experts of {width} slots need {num_slots}, more than int32 numbers ({INT32_MAX})"
            " with a block to spare"
        )
    num_blocks = num_slots // block_size
    if isinstance(device, torch.device):
        if device.type != "cpu":
            raise ValueError(f"expert_num_tokens: expected a CUDA or CPU tensor, got one on {device}")
        return _Call(num_slots, num_blocks, (max_tokens, block_size))
    plan, parts = plan_batched(num_batches, width)
    constants = _CONSTANTS.pack(num_batches, max_tokens, num_slots, num_blocks, *divisor(block_size), parts)
    launch = bind(plan, device, _POINTERS, constants)
    return _Call(num_slots, num_blocks, (max_tokens, block_size), launch)


def _indirectly(max_tokens: int, block_size: int, expert_num_tokens: Any, out: Any) -> MoEAlignment:
    """What is not a plain tensor: one that is traced, one of a subclass, or an array of another library."""
    if not isinstance(expert_num_tokens, torch.Tensor):
        counts = arrays.from_array("expert_num_tokens", expert_num_tokens)
        tensors = out
        if isinstance(out, (tuple, list)):
            tensors = tuple(arrays.from_array("out", array) for array in out)
        results = batched_moe_align_block_size(max_tokens, block_size, counts, out=tensors)
        return MoEAlignment(*(out if out is not None else map(arrays.like(expert_num_tokens), results)))
    if not library.is_traced(expert_num_tokens):
        counts = expert_num_tokens.as_subclass(torch.Tensor)
        return batched_moe_align_block_size(max_tokens, block_size, counts, out=out)
    operator = torch.ops.cupy_moe.batched_moe_align_block_size
    if out is None:
        return MoEAlignment(*operator(max_tokens, block_size, expert_num_tokens))
    outputs = MoEAlignment(*out)
    operator.out(max_tokens, block_size, expert_num_tokens, **outputs._asdict())
    return outputs


def _fill_out(max_tokens: int, block_size: int, expert_num_tokens: torch.Tensor, **out: torch.Tensor) -> None:
    outputs = out["sorted_token_ids"], out["expert_ids"], out["num_tokens_post_pad"]
    batched_moe_align_block_size(max_tokens, block_size, expert_num_tokens, out=outputs)


def _fake(max_tokens: int, block_size: int, expert_num_tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    num_slots = expert_num_tokens.shape[0] * round_up(max_tokens, block_size)
    lengths = num_slots, num_slots // block_size, 1
    return tuple(expert_num_tokens.new_empty((length,), dtype=torch.int32) for length in lengths)


_SCHEMA = "(SymInt max_tokens_per_batch, SymInt block_size, Tensor expert_num_tokens"
_OUT = ", *, Tensor(a!) sorted_token_ids, Tensor(b!) expert_ids, Tensor(c!) num_tokens_post_pad"
_RESULTS = "(Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_pad)"
library.register(f"batched_moe_align_block_size{_SCHEMA}) -> {_RESULTS}", batched_moe_align_block_size, _fake)
library.register(f"batched_moe_align_block_size.out{_SCHEMA}{_OUT}) -> ()", _fill_out, lambda *_, **__: None)
