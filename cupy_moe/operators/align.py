"""moe_align_block_size: which tokens go to which expert, in blocks that a grouped GEMM can take."""

from __future__ import annotations

import enum
import functools
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import torch

from ..cpu import align as cpu
from ..cuda.launch import CACHED_CALLS, Launch, bind
from ..cuda.limits import device_limits
from ..cuda.structs import ArgumentStruct
from ..dispatch.arrays import Array, DLPackArray
from ..dispatch.operator import Operator, has_modes, in_transform, is_compiling
from ..dispatch.tensors import (
    PLAIN,
    PlainTensor,
    address,
    are_apart,
    check_layout,
    check_tensor,
    check_written,
    cuda_index,
    is_plain,
)
from ..errors import KernelLaunchError
from ..plans.align import ALIGN_KERNELS, aligned_sizes, plan_align
from ..plans.base import ceil_div, divisor, round_up
from ..values import as_bool, as_int, check_choice

__all__ = ["MoEAlignment", "aligned_sizes", "moe_align_block_size"]

_ARGS = ArgumentStruct(
    "align/align.cuh:AlignArgs",
    "topk_ids sorted_token_ids expert_ids num_tokens_post_pad expert_map scratch",
    "u32 num_ids, num_experts, num_slots, num_blocks, map_mode; Divisor block_size; u32 per_block;"
    " Divisor per_row; u32 num_rows, id_type, num_cols; i64 row_stride, col_stride",
)
_SMALL_ARGS = ArgumentStruct(
    "align/align_small.cu:SmallArgs",
    "topk_ids sorted_token_ids expert_ids num_tokens_post_pad expert_map",
    "u32 num_ids, num_experts, num_slots, num_blocks, map_mode; Divisor block_size; u32 slots_per_block,"
    " lanes_per_id, id_type, num_cols; i64 row_stride, col_stride",
)


class IdType(enum.IntEnum):
    I8, U8, I16, U16, I32, I64 = range(6)


class MapMode(enum.IntEnum):
    NO_MAP, MAP_BLOCKS, MAP_IDS = range(3)


# Unsigned ids of 4 and 8 bytes are read as signed: what turns negative is no expert.
ID_TYPES = {
    torch.int8: IdType.I8,
    torch.uint8: IdType.U8,
    torch.int16: IdType.I16,
    torch.uint16: IdType.U16,
    torch.int32: IdType.I32,
    torch.uint32: IdType.I32,
    torch.int64: IdType.I64,
    torch.uint64: IdType.I64,
}
_NO_MAP, _MAP_BLOCKS, _MAP_IDS = map(int, MapMode)  # ints, as parts of a key: an enum is slow to hash
READERS = {IdType.I32: "i32", IdType.I64: "i64"}
_Tensor, _int32 = torch.Tensor, torch.int32

if TYPE_CHECKING:  # at run time, named tuples can be generic only from Python 3.11 on

    class MoEAlignment(NamedTuple, Generic[Array]):
        sorted_token_ids: Array
        expert_ids: Array
        num_tokens_post_pad: Array

else:

    class MoEAlignment(NamedTuple):
        """What `moe_align_block_size` returns: int32, beside `topk_ids`, and arrays of its kind."""

        sorted_token_ids: torch.Tensor
        expert_ids: torch.Tensor
        num_tokens_post_pad: torch.Tensor


def moe_align_block_size(
    topk_ids: Array,
    block_size: int,
    num_experts: int,
    expert_map: DLPackArray | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    *,
    out: tuple[Array, Array, Array] | None = None,
    kernel: str | None = None,
) -> MoEAlignment[Array]:
    """Group the flat indices of `topk_ids` by expert, each group padded to whole blocks.

    With n = topk_ids.numel(), E = num_experts, B = block_size and M, the number of slots, as told by
    `aligned_sizes(n, E, B, pad_sorted_ids)`:

    topk_ids                any shape, strides  any integer   expert of each (token, k) pair
    block_size              1 to 65 536                       rows that the consumer takes at a time
    num_experts             1 to 65 536                       with `expert_map`, of all ranks together
    expert_map              [E]                 int32         this rank's id of each, -1: another rank's
    pad_sorted_ids                                            round M up to whole blocks
    ignore_invalid_experts                                    see below; no effect without `expert_map`
    out                     the three results                 written instead of allocated; contiguous
    kernel                  of ALIGN_KERNELS                  forces one, for tests and benchmarks

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
    allocation; `align_global` (many ids, or more experts than shared memory has room for: plans/align.py)
    also takes a workspace, and ids that a row and a column stride do not describe are copied first. Arrays
    with `__dlpack__` (cupy, jax, numpy) are accepted, and give arrays of their kind.

    Raises TypeError and ValueError for wrong arguments, before anything is launched; what loading a kernel
    for the first time raises; and KernelLaunchError. Semantics: vLLM's function of this name, made
    deterministic.
    """
    tensor: PlainTensor = topk_ids
    local: PlainTensor = expert_map
    num_ids = tensor.numel() if type(tensor) in PLAIN else None
    if (
        type(num_ids) is not int  # under torch.jit.trace it is a tensor; pending negations: see are_outputs
        or is_compiling()
        or has_modes()
        or in_transform()
        or not (local is None or is_plain(local))
    ):
        if isinstance(local, int):
            raise TypeError(
                f"expert_map: expected an int32 tensor or None, got the int {local}; the order is"
                " (topk_ids, block_size, num_experts, expert_map), and topk is not an argument"
            )
        flags = pad_sorted_ids, ignore_invalid_experts
        return _operator(topk_ids, block_size, num_experts, expert_map, *flags, out=out, kernel=kernel)
    # To one type each: _prepare is cached, and 1, True and 1.0 would be the same key.
    if type(block_size) is not int:
        block_size = as_int("block_size", block_size)
    if type(num_experts) is not int:
        num_experts = as_int("num_experts", num_experts)
    if pad_sorted_ids is not False and pad_sorted_ids is not True:
        pad_sorted_ids = as_bool("pad_sorted_ids", pad_sorted_ids)
    if ignore_invalid_experts is not False and ignore_invalid_experts is not True:
        ignore_invalid_experts = as_bool("ignore_invalid_experts", ignore_invalid_experts)
    if kernel is not None:
        check_choice("kernel", kernel, ALIGN_KERNELS)
    # An index where it can be one: torch.device is slow to make, to hash and to compare.
    device: int | torch.device = tensor.get_device()
    if device == -1:
        device = tensor.device
        check_layout("topk_ids", tensor)
    if local is not None:
        check_tensor("expert_map", local, (_int32,), (num_experts,), tensor.device)
    strides = None
    try:
        ids = tensor.data_ptr()
    except RuntimeError:
        check_layout("topk_ids", tensor)
        raise
    if ids % 16 or not tensor.is_contiguous():
        tensor, strides = as_rows(tensor)
        ids = tensor.data_ptr()
    map_mode = _NO_MAP if expert_map is None else _MAP_IDS if ignore_invalid_experts else _MAP_BLOCKS
    call = _prepare(
        num_ids, block_size, num_experts, pad_sorted_ids, tensor.dtype, strides, device, map_mode, kernel
    )
    num_slots, num_blocks, launches, scratch_words, fallback = call
    first: PlainTensor
    second: PlainTensor
    third: PlainTensor
    if out is None:
        outputs = allocate(num_slots, num_blocks, tensor)
        first, second, third = outputs
    else:
        try:
            first, second, third = out
            fits = (  # the cheapest call for each question, and inline: this runs before every launch
                type(first) is type(second) is type(third) is _Tensor
                and first.dtype is second.dtype is third.dtype is _int32
                and first.numel() == num_slots
                and second.numel() == num_blocks
                and third.numel() == 1
                and first.get_device() == second.get_device() == third.get_device() == device
                and first.is_contiguous()
                and second.is_contiguous()
            )
            if fits:
                spans = [
                    (ids, tensor.nbytes), (first.data_ptr(), 4 * num_slots),
                    (second.data_ptr(), 4 * num_blocks), (third.data_ptr(), 4),
                ]  # fmt: skip
                if local is not None:
                    spans.append((local.data_ptr(), local.nbytes))
                fits = are_apart(spans)
        except (RuntimeError, TypeError, ValueError):
            fits = False
        if not fits:
            if not are_outputs(out):
                flags = pad_sorted_ids, ignore_invalid_experts
                return _operator(
                    topk_ids, block_size, num_experts, expert_map, *flags, out=out, kernel=kernel
                )
            read = {"topk_ids": tensor, "expert_map": local}
            check_out(out, num_slots, num_blocks, tensor.device, **read)
        outputs = out if type(out) is MoEAlignment else MoEAlignment(first, second, third)
    if launches is None:
        results = cpu.moe_align_block_size(
            tensor, block_size, num_experts, local, pad_sorted_ids, ignore_invalid_experts
        )
        for output, result in zip(outputs, results, strict=True):
            output.view(-1).copy_(result)
        return outputs

    a, b, c = first.data_ptr(), second.data_ptr(), third.data_ptr()
    if not (ids and a and b and c):
        address("topk_ids", tensor)
        for name, output in zip(MoEAlignment._fields, outputs, strict=True):
            address(f"out: {name}", output)
    try:
        if scratch_words or local is not None:
            more = [0 if local is None else address("expert_map", local)]
            if scratch_words:
                scratch = first.new_empty(scratch_words)
                more.append(scratch.data_ptr())
            for launch in launches:
                launch(ids, a, b, c, *more)
        else:
            for launch in launches:
                launch(ids, a, b, c)
    except KernelLaunchError:
        if fallback is None:
            raise
        # The whole device could run the clusters, but not what is left of it here: a green context, say.
        flags = pad_sorted_ids, ignore_invalid_experts
        moe_align_block_size(topk_ids, block_size, num_experts, local, *flags, out=outputs, kernel=fallback)
    return outputs


class _Call(NamedTuple):
    """All that follows from sizes, types and flags: worked out and checked once, looked up later."""

    num_slots: int
    num_blocks: int
    launches: tuple[Launch, ...] | None = None  # None: on the CPU
    scratch_words: int = 0
    fallback: str | None = None  # the kernel to take where the driver refuses to launch clusters


@functools.lru_cache(CACHED_CALLS)
def _prepare(
    num_ids: int,
    block_size: int,
    num_experts: int,
    pad_sorted_ids: bool,
    dtype: torch.dtype,
    strides: tuple[int, int, int] | None,
    device: int | torch.device,
    map_mode: int,
    kernel: str | None,
) -> _Call:
    if dtype not in ID_TYPES:
        raise TypeError(f"topk_ids: expected an integer tensor, got {dtype}; cast it")
    num_slots, num_blocks = aligned_sizes(num_ids, num_experts, block_size, pad_sorted_ids)
    index = cuda_index("topk_ids", device) if isinstance(device, torch.device) else device
    if index is None:
        return _Call(num_slots, num_blocks)
    id_type = ID_TYPES[dtype]
    reader = "any" if strides else READERS.get(id_type, "any")

    limits = device_limits(index)
    sizes = num_ids, num_experts, num_slots, block_size, reader
    plan, fallback = plan_align(*sizes, limits, kernel), None
    if kernel is None and plan.cluster > 1:
        fallback = plan_align(*sizes, limits._replace(max_clusters=lambda *_: 0)).kernel
    num_cols, row_stride, col_stride = strides or (1, 1, 1)
    declared = _SMALL_ARGS if plan.kernel == "small" else _ARGS
    constants = declared.pack(
        num_ids=num_ids,
        num_experts=num_experts,
        num_slots=num_slots,
        num_blocks=num_blocks,
        map_mode=map_mode,
        block_size=divisor(block_size),
        id_type=id_type,
        num_cols=num_cols,
        row_stride=row_stride,
        col_stride=col_stride,
        **plan.arguments,
    )
    # The last pointers are null in most calls, and are then passed with the constants.
    num_pointers = 6 if plan.scratch_words else 4 if map_mode == _NO_MAP else 5
    constants = bytes(8 * (declared.num_pointers - num_pointers)) + constants
    launches = tuple(bind(launch, index, num_pointers, constants) for launch in plan.launches)
    return _Call(num_slots, num_blocks, launches, plan.scratch_words, fallback)


def allocate(num_slots: int, num_blocks: int, beside: PlainTensor) -> MoEAlignment[Any]:
    """The outputs, not yet written. `new_empty` takes two thirds of the time of `torch.empty` on a device."""
    first = beside.new_empty(num_slots, dtype=torch.int32)
    return MoEAlignment(first, first.new_empty(num_blocks), first.new_empty(1))


def are_outputs(out: Any) -> bool:
    """Whether `out` is three tensors that a kernel can write to.

    Pending negations are not looked for: only private functions of torch can give integers one.
    """
    try:
        first, second, third = out
    except (TypeError, ValueError):
        return False
    return type(first) is type(second) is type(third) is _Tensor and type(out) is not _Tensor


def check_out(
    out: Any, num_slots: int, num_blocks: int, device: torch.device, **read: PlainTensor | None
) -> None:
    """Raises where `out` is not what `allocate` would make; shapes may differ, lengths may not. `read` as in
    `check_written`."""
    for tensor, name, length in zip(out, MoEAlignment._fields, (num_slots, num_blocks, 1), strict=True):
        name = f"out: {name}"
        check_layout(name, tensor)
        check_tensor(
            name, tensor.view(-1) if tensor.is_contiguous() else tensor, (_int32,), (length,), device
        )
    check_written([f"out: {name}" for name in MoEAlignment._fields], out, **read)


def as_rows(topk_ids: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
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


def symbolic_sizes(num_ids: Any, num_experts: Any, block_size: Any, pad_sorted_ids: bool) -> tuple[Any, Any]:
    """`aligned_sizes` without branches, for sizes that are not known yet."""
    num_slots = num_ids + num_experts * (block_size - 1)
    if pad_sorted_ids:
        num_slots = round_up(num_slots, block_size)
    num_slots = torch.sym_min(num_ids * block_size, num_slots)
    return num_slots, ceil_div(num_slots, block_size)


def _fake(
    topk_ids: torch.Tensor, block_size: int, num_experts: int, pad_sorted_ids: bool, **_: Any
) -> tuple[torch.Tensor, ...]:
    lengths = *symbolic_sizes(topk_ids.numel(), num_experts, block_size, pad_sorted_ids), 1
    return tuple(topk_ids.new_empty((length,), dtype=torch.int32) for length in lengths)


_operator = Operator(
    "moe_align_block_size",
    "Tensor topk_ids, SymInt block_size, SymInt num_experts, Tensor? expert_map=None,"
    " bool pad_sorted_ids=False, bool ignore_invalid_experts=False",
    MoEAlignment,
    moe_align_block_size,
    _fake,
)
