"""moe_align_block_size: which tokens go to which expert, in blocks that a grouped GEMM can take."""

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

import torch

from . import arrays, cpu, library
from .launch import Launch, bind, device_limits
from .plan import (
    MAX_BLOCK_SIZE,
    MAX_EXPERTS,
    aligned_sizes,
    ceil_div,
    check_int,
    divisor,
    plan_align,
    round_up,
)

_is_compiling, _Tensor, _int32 = torch.compiler.is_dynamo_compiling, torch.Tensor, torch.int32

__all__ = ["MoEAlignment", "aligned_sizes", "moe_align_block_size"]

# AlignArgs in align.cuh: what changes with every call, and what follows from sizes, strides, types and flags.
# The last two of the pointers are null in most calls, and then constants, too.
_POINTERS, _CONSTANTS = struct.Struct("@6P"), struct.Struct("@15I2q")
_FEW_POINTERS, _NULLS = struct.Struct("@4P"), bytes(2 * struct.calcsize("P"))
_NO_MAP, _MAP_BLOCKS, _MAP_IDS = 0, 1, 2
# IdType in align.cuh. Ids of 2^31 and more are no experts, so u32 is read as i32: the same ids are dropped.
_ID_TYPES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int16: 2,
    torch.uint16: 3,
    torch.int32: 4,
    torch.uint32: 4,
    torch.int64: 5,
}
_READERS = {4: "i32", 5: "i64"}


class MoEAlignment(NamedTuple):
    """What `moe_align_block_size` returns: int32 tensors on the device of `topk_ids`."""

    sorted_token_ids: torch.Tensor
    expert_ids: torch.Tensor
    num_tokens_post_pad: torch.Tensor


def moe_align_block_size(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    *,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    kernel: str | None = None,
) -> MoEAlignment:
    """Group the flat indices of `topk_ids` by expert, each group padded to whole blocks.

    With n = topk_ids.numel(), E = num_experts, B = block_size and M, the number of slots, as told by
    `aligned_sizes(n, E, B, pad_sorted_ids)`:

    topk_ids                any shape, strides  any integer   expert of each (token, k) pair
    block_size              1 to 65 536                       rows that the consumer takes at a time
    num_experts             1 to 65 536                       with `expert_map`, of all ranks together
    expert_map              [E]                 int32         this rank's id of each, -1: another rank's
    pad_sorted_ids                                            round M up to whole blocks
    ignore_invalid_experts                                    see below; nothing without `expert_map`
    out                     the three results                 written instead of allocated; contiguous
    kernel                  of plan.ALIGN_KERNELS             forces one, for tests and benchmarks

    Returns MoEAlignment of
    sorted_token_ids        [M]                 int32         indices into topk_ids.view(-1), by expert and
                                                              ascending; n in padding slots and the tail
    expert_ids              [ceil(M / B)]       int32         expert of each block; -1 past the last
    num_tokens_post_pad     [1]                 int32         slots in use, a multiple of B

    Ids outside [0, E) are dropped, so nothing that `topk_ids` holds can make it fail. With an `expert_map`,
    either all experts get their blocks and `expert_ids` is mapped afterwards, those of other ranks to -1; or,
    with `ignore_invalid_experts`, pairs of other ranks are dropped and experts are numbered and ordered as on
    this rank. A map entry outside [-1, E) counts as -1.

    The result is the same to the last bit at every call, with every kernel, on every GPU and on the CPU.

    >>> topk_ids = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]])
    >>> aligned = moe_align_block_size(topk_ids, block_size=4, num_experts=5)
    >>> aligned.sorted_token_ids[:16].view(4, 4).tolist()
    [[3, 6, 9, 12], [0, 4, 10, 12], [1, 7, 11, 12], [2, 5, 8, 12]]
    >>> aligned.expert_ids.tolist(), aligned.num_tokens_post_pad.item()
    ([1, 2, 3, 4, -1, -1, -1], 16)

    Cost: one or two launches on torch's current stream, no synchronisation, and the outputs as the only
    allocation; `align_global` (see plan.py: many ids, or more experts than shared memory has room for) also
    takes a workspace, and ids whose strides no row and column stride describe are copied first. Arrays with
    `__dlpack__` (cupy, jax, numpy) are accepted, and give arrays of their kind.

    Raises TypeError and ValueError for wrong arguments, before anything is launched; and what loading a
    kernel for the first time raises. Semantics: vLLM's function of this name, made deterministic.
    """
    if type(topk_ids) is not _Tensor or _is_compiling():
        return _indirectly(
            topk_ids, block_size, num_experts, expert_map, pad_sorted_ids, ignore_invalid_experts, out, kernel
        )
    # An index where it can be one: torch.device is slow to make, to hash and to compare.
    device = topk_ids.get_device() if topk_ids.is_cuda else topk_ids.device
    if expert_map is not None:
        _check_expert_map(expert_map, num_experts, topk_ids.device)
    ids, strides = topk_ids.data_ptr(), None
    if ids % 16 or not topk_ids.is_contiguous():
        topk_ids, strides = _as_rows(topk_ids)
        ids = topk_ids.data_ptr()
    call = _prepare(
        topk_ids.numel(), topk_ids.dtype, strides, device, block_size, num_experts, pad_sorted_ids,
        _NO_MAP if expert_map is None else _MAP_IDS if ignore_invalid_experts else _MAP_BLOCKS, kernel,
    )  # fmt: skip
    num_slots, num_blocks, sizes, launches, scratch_words = call
    if out is None:
        outputs = allocate(num_slots, num_blocks, device)
        first, second, third = outputs
    else:
        try:
            first, second, third = out
            fits = (  # the cheapest calls of each kind, and in place: this runs with every launch
                first.dtype is second.dtype is third.dtype is _int32
                and first.numel() == num_slots
                and second.numel() == num_blocks
                and third.numel() == 1
                and first.get_device() == second.get_device() == third.get_device() == device
                and first.is_contiguous()
                and second.is_contiguous()
            )
        except (AttributeError, TypeError, ValueError):
            fits = False
        if not fits:
            check_out(out, num_slots, num_blocks, device)
        outputs = out if type(out) is MoEAlignment else MoEAlignment(*out)
    if launches is None:
        results = cpu.moe_align_block_size(
            topk_ids, *sizes, expert_map, pad_sorted_ids, ignore_invalid_experts
        )
        for output, result in zip(outputs, results, strict=True):
            output.view(-1).copy_(result)
        return outputs

    pointers: tuple[int, ...] = ids, first.data_ptr(), second.data_ptr(), third.data_ptr()
    if scratch_words or expert_map is not None:
        scratch = torch.empty(scratch_words, dtype=torch.int32, device=device) if scratch_words else None
        optional = (0 if tensor is None else tensor.data_ptr() for tensor in (expert_map, scratch))
        pointers = *pointers, *optional
    for launch in launches:
        launch(*pointers)
    return outputs


class _Call(NamedTuple):
    """All that follows from sizes, types and flags: worked out and checked once, looked up later."""

    num_slots: int
    num_blocks: int
    sizes: tuple[int, int]  # block_size and num_experts as ints, where the arguments may be equal to them
    launches: tuple[Launch, ...] | None = None  # None: on the CPU
    scratch_words: int = 0


@functools.lru_cache(maxsize=65_536)
def _prepare(
    num_ids: int,
    dtype: torch.dtype,
    strides: tuple[int, int, int] | None,
    device: int | torch.device,
    block_size: int,
    num_experts: int,
    pad_sorted_ids: bool,
    map_mode: int,
    kernel: str | None,
) -> _Call:
    if dtype not in _ID_TYPES:
        raise TypeError(
            f"topk_ids: expected an integer tensor (unsigned: of up to 32 bits), got {dtype}; cast it"
        )
    check_int("block_size", block_size, MAX_BLOCK_SIZE)
    check_int("num_experts", num_experts, MAX_EXPERTS)
    num_slots, num_blocks = aligned_sizes(num_ids, num_experts, block_size, pad_sorted_ids)
    if isinstance(device, torch.device):
        if device.type != "cpu":
            raise ValueError(f"topk_ids: expected a CUDA or CPU tensor, got one on {device}")
        return _Call(num_slots, num_blocks, (block_size, num_experts))
    id_type = _ID_TYPES[dtype]
    reader = "any" if strides else _READERS.get(id_type, "any")
    plan = plan_align(num_ids, num_experts, num_slots, block_size, reader, device_limits(device), kernel)
    constants = _CONSTANTS.pack(
        num_ids, num_experts, num_slots, num_blocks, map_mode, *divisor(block_size), plan.per_block,
        *divisor(plan.per_row), plan.num_rows, id_type, *(strides or (1, 1, 1)),
    )  # fmt: skip
    pointers = _POINTERS
    if map_mode == _NO_MAP and not plan.scratch_words:
        pointers, constants = _FEW_POINTERS, _NULLS + constants
    launches = tuple(bind(launch, device, pointers, constants) for launch in plan.launches)
    return _Call(num_slots, num_blocks, (block_size, num_experts), launches, plan.scratch_words)


def _check_expert_map(expert_map: torch.Tensor, num_experts: int, device: torch.device) -> None:
    if isinstance(expert_map, int):
        raise TypeError(
            f"expert_map: expected an int32 tensor or None, got the int {expert_map}; the order is"
            " (topk_ids, block_size, num_experts, expert_map), and topk is not an argument"
        )
    if not isinstance(expert_map, torch.Tensor):
        raise TypeError(f"expert_map: expected an int32 tensor or None, got {type(expert_map).__name__}")
    if expert_map.dtype is not torch.int32:
        raise TypeError(
            f"expert_map: expected torch.int32, got {expert_map.dtype}; cast it once, when loading"
        )
    if expert_map.shape != (num_experts,) or not expert_map.is_contiguous():
        raise ValueError(
            f"expert_map: expected a contiguous tensor of shape [num_experts] = [{num_experts}],"
            f" got {list(expert_map.shape)} with strides {list(expert_map.stride())}"
        )
    if expert_map.device != device:
        raise ValueError(f"expert_map: expected it beside topk_ids on {device}, got {expert_map.device}")


def allocate(num_slots: int, num_blocks: int, device: int | torch.device) -> MoEAlignment:
    """The outputs, not yet written. A CUDA device may be given by its index."""
    return MoEAlignment(
        torch.empty(num_slots, dtype=torch.int32, device=device),
        torch.empty(num_blocks, dtype=torch.int32, device=device),
        torch.empty(1, dtype=torch.int32, device=device),
    )


def check_out(out: Any, num_slots: int, num_blocks: int, device: int | torch.device) -> None:
    """Raises what is wrong with `out`: it is to be like what `allocate` makes, but for the shapes."""
    if not isinstance(out, (tuple, list)) or len(out) != 3:
        names = ", ".join(MoEAlignment._fields)
        raise TypeError(f"out: expected the three tensors {names}, got {type(out).__name__}")
    lengths = num_slots, num_blocks, 1
    for tensor, name, length in zip(out, MoEAlignment._fields, lengths, strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"out: expected a torch.Tensor for {name}, got {type(tensor).__name__}")
        if tensor.dtype is not torch.int32:
            raise TypeError(f"out: expected torch.int32 for {name}, got {tensor.dtype}")
        if tensor.numel() != length or not tensor.is_contiguous() or tensor.device != torch.device(device):
            raise ValueError(
                f"out: expected {name} of shape [{length}], contiguous, on {torch.device(device)} (see"
                f" aligned_sizes), got {list(tensor.shape)} with strides {list(tensor.stride())} on"
                f" {tensor.device}"
            )


def _as_rows(topk_ids: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """The ids, copied if no two strides describe them; num_cols, row_stride and col_stride of AlignArgs."""
    shape, strides = list(topk_ids.shape), list(topk_ids.stride())
    merged: list[tuple[int, int]] = []  # (size, stride), outermost first
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return topk_ids.contiguous(), (1, 1, 1)
    (_, row_stride), (num_cols, col_stride) = ([(1, 1), (1, 1), *merged])[-2:]
    return topk_ids, (num_cols, row_stride, col_stride)


def _indirectly(
    topk_ids: Any, block_size: int, num_experts: int, expert_map: Any, pad: bool, ignore: bool, out: Any,
    kernel: str | None,
) -> MoEAlignment:  # fmt: skip
    """What is not a plain tensor: one that is traced, one of a subclass, or an array of another library."""
    if not isinstance(topk_ids, torch.Tensor):
        return _with_other_arrays(topk_ids, block_size, num_experts, expert_map, pad, ignore, out, kernel)
    arguments = block_size, num_experts, expert_map, pad, ignore
    if not library.is_traced(topk_ids):
        return moe_align_block_size(topk_ids.as_subclass(torch.Tensor), *arguments, out=out, kernel=kernel)
    if kernel is not None:  # the compiler cannot take an argument of this name
        raise ValueError(f"kernel={kernel!r}: cannot be forced in code that is traced or compiled")
    operator = torch.ops.cupy_moe.moe_align_block_size
    if out is None:
        return MoEAlignment(*operator(topk_ids, *arguments))
    outputs = MoEAlignment(*out)
    operator.out(topk_ids, *arguments, **outputs._asdict())
    return outputs


def _with_other_arrays(
    topk_ids: Any, block_size: int, num_experts: int, expert_map: Any, pad: bool, ignore: bool, out: Any,
    kernel: str | None,
) -> MoEAlignment:  # fmt: skip
    ids = arrays.from_array("topk_ids", topk_ids)
    tensors = out
    if isinstance(out, (tuple, list)):
        tensors = tuple(arrays.from_array("out", array) for array in out)
    if expert_map is not None and not isinstance(expert_map, int):
        expert_map = arrays.from_array("expert_map", expert_map)
    results = moe_align_block_size(
        ids, block_size, num_experts, expert_map, pad, ignore, out=tensors, kernel=kernel
    )
    return MoEAlignment(*(out if out is not None else map(arrays.like(topk_ids), results)))


def _fill_out(
    *arguments: Any,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
) -> None:
    moe_align_block_size(*arguments, out=(sorted_token_ids, expert_ids, num_tokens_post_pad))


def _fake(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Outputs of the right shapes: `aligned_sizes` without branches, for sizes that are not known yet."""
    num_ids = topk_ids.numel()
    num_slots = num_ids + num_experts * (block_size - 1)
    if pad_sorted_ids:
        num_slots = round_up(num_slots, block_size)
    num_slots = torch.sym_min(num_ids * block_size, num_slots)
    lengths = num_slots, ceil_div(num_slots, block_size), 1
    return tuple(topk_ids.new_empty((length,), dtype=torch.int32) for length in lengths)


_SCHEMA = (
    "(Tensor topk_ids, SymInt block_size, SymInt num_experts, Tensor? expert_map=None,"
    " bool pad_sorted_ids=False, bool ignore_invalid_experts=False"
)
_OUT = ", *, Tensor(a!) sorted_token_ids, Tensor(b!) expert_ids, Tensor(c!) num_tokens_post_pad"
_RESULTS = "(Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_pad)"
library.register(f"moe_align_block_size{_SCHEMA}) -> {_RESULTS}", moe_align_block_size, _fake)
library.register(f"moe_align_block_size.out{_SCHEMA}{_OUT}) -> ()", _fill_out, lambda *_, **__: None)
