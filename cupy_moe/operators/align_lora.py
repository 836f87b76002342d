"""moe_lora_align_block_size: an alignment for each LoRA adapter, of its tokens."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ..cpu import align_lora as cpu
from ..cuda.launch import CACHED_CALLS, Launch, bind
from ..cuda.limits import device_limits
from ..cuda.structs import ArgumentStruct
from ..dispatch.arrays import Array, DLPackArray
from ..dispatch.operator import Operator, is_watched
from ..dispatch.tensors import (
    PlainTensor,
    address,
    check_layout,
    check_tensor,
    check_written,
    cuda_index,
    is_plain,
)
from ..errors import KernelLaunchError
from ..plans.align import ALIGN_KERNELS, aligned_sizes, plan_align
from ..plans.base import divisor
from ..values import INT32_MAX, as_bool, as_int, check_choice, check_range
from .align import ID_TYPES, IdType, MapMode, MoEAlignment, are_outputs, as_rows, symbolic_sizes

__all__ = ["moe_lora_align_block_size"]

_ARGS = ArgumentStruct(
    "align/align_lora.cu:LoraArgs",
    "topk_ids sorted_token_ids expert_ids num_tokens_post_pad token_lora_mapping adapter_enabled expert_map"
    " scratch",
    "u32 num_ids, num_experts, num_slots, num_blocks, map_mode; Divisor block_size, team, topk;"
    " u32 per_block; Divisor per_row; u32 num_rows, slots_per_block, lanes_per_id, id_type, num_cols;"
    " i64 row_stride, col_stride; u32 scratch_words, flag_bytes",
)
_INT32 = (torch.int32,)
_FLAGS = (torch.int32, torch.bool)
MAX_LORAS = 1024


def moe_lora_align_block_size(
    topk_ids: Array,
    token_lora_mapping: DLPackArray,
    block_size: int,
    num_experts: int,
    max_loras: int,
    adapter_enabled: DLPackArray | None = None,
    expert_map: DLPackArray | None = None,
    pad_sorted_ids: bool = False,
    *,
    out: tuple[Array, Array, Array] | None = None,
    kernel: str | None = None,
) -> MoEAlignment[Array]:
    """`moe_align_block_size` for each LoRA adapter, of the ids of its tokens, all adapters at once.

    With n = topk_ids.numel(), E = num_experts, B = block_size, L = max_loras and M slots for each adapter, as
    told by `aligned_sizes(n, E, B, pad_sorted_ids)`:

    topk_ids                [T, K]              any integer   expert of each (token, k) pair; any strides
    token_lora_mapping      [T]                 int32         adapter of each token; outside [0, L): none
    block_size              1 to 65 536                       rows that the consumer takes at a time
    num_experts             1 to 65 536                       with `expert_map`, of all ranks together
    max_loras               1 to 1024                         adapters there may be
    adapter_enabled         [L] or more         int32, bool   0: the adapter gets no tokens; None: all are
    expert_map              [E]                 int32         this rank's id of each, -1: another rank's
    pad_sorted_ids                                            round M up to whole blocks
    out                     the three results                 written instead of allocated; contiguous
    kernel                  of ALIGN_KERNELS                  forces one, for tests and benchmarks

    Returns MoEAlignment of
    sorted_token_ids        [L, M]              int32         indices into topk_ids.view(-1), by expert and
                                                              ascending; n in padding slots and the tail
    expert_ids              [L, ceil(M / B)]    int32         expert of each block; -1 past the last
    num_tokens_post_pad     [L]                 int32         slots in use of each adapter, a multiple of B

    An adapter without tokens, or one that is not enabled, has no slots in use: its rows are padding, and
    written as all others. Ids outside [0, E) are dropped, and so are pairs of other ranks with an
    `expert_map`, whose entries are as for `moe_align_block_size` with `ignore_invalid_experts`. So nothing
    that these tensors hold can make it fail.

    The result is the same to the last bit at every call, with every kernel, on every GPU and on the CPU.

    >>> topk_ids = torch.tensor([[2, 0], [1, 2], [2, 1]])
    >>> adapters = torch.tensor([0, 1, 0], dtype=torch.int32)
    >>> aligned = moe_lora_align_block_size(topk_ids, adapters, block_size=2, num_experts=3, max_loras=2)
    >>> aligned.sorted_token_ids[:, :6].tolist(), aligned.num_tokens_post_pad.tolist()
    ([[1, 6, 5, 6, 0, 4], [2, 6, 3, 6, 6, 6]], [6, 4])
    >>> aligned.expert_ids.tolist()
    [[0, 1, 2, -1, -1], [1, 2, -1, -1, -1]]

    Cost: the launches and the workspace of `moe_align_block_size`, once for all adapters; mappings and flags
    that are not contiguous are copied first. Arrays with `__dlpack__` (cupy, jax, numpy) are accepted, and
    give arrays of their kind.

    Raises TypeError and ValueError for wrong arguments, before anything is launched; what loading a kernel
    for the first time raises; and KernelLaunchError. Semantics: vLLM's function of this name, which leaves
    rows of adapters without tokens as they were.
    """
    options = block_size, num_experts, max_loras, adapter_enabled, expert_map, pad_sorted_ids
    if (
        is_watched()
        or not is_plain(topk_ids)
        or not is_plain(token_lora_mapping)
        or not (adapter_enabled is None or is_plain(adapter_enabled))
        or not (expert_map is None or is_plain(expert_map))
        or not (out is None or are_outputs(out))
    ):
        return _operator(topk_ids, token_lora_mapping, *options, out=out, kernel=kernel)
    block_size, num_experts = as_int("block_size", block_size), as_int("num_experts", num_experts)
    max_loras, pads = as_int("max_loras", max_loras), as_bool("pad_sorted_ids", pad_sorted_ids)
    if kernel is not None:
        check_choice("kernel", kernel, ALIGN_KERNELS)
    check_layout("topk_ids", topk_ids)
    if topk_ids.dim() != 2:
        raise ValueError(f"topk_ids: expected shape [tokens, topk], got {list(topk_ids.shape)}")
    (num_tokens, topk), device = topk_ids.shape, topk_ids.device
    check_tensor("token_lora_mapping", token_lora_mapping, _INT32, (num_tokens,), device, strided=True)
    adapters, enabled = token_lora_mapping.contiguous(), _flags(adapter_enabled, max_loras, device)
    if expert_map is not None:
        check_tensor("expert_map", expert_map, _INT32, (num_experts,), device)
    ids, strides = topk_ids, None
    if not ids.is_contiguous() or ids.data_ptr() % 16:
        ids, strides = as_rows(topk_ids)
    sizes = _Sizes(
        topk_ids.numel(), topk, block_size, num_experts, max_loras, pads, expert_map is not None,
        4 if enabled is None else enabled.dtype.itemsize,
    )  # fmt: skip
    call = _prepare(sizes, topk_ids.dtype, strides, device, kernel)
    shapes = (max_loras, call.num_slots), (max_loras, call.num_blocks), (max_loras,)
    outputs: MoEAlignment[Any]
    if out is None:
        outputs = MoEAlignment(*(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes))
    else:
        outputs = MoEAlignment(*out)
        for name, result, shape in zip(MoEAlignment._fields, outputs, shapes, strict=True):
            check_tensor(f"out: {name}", result, _INT32, shape, device)
        check_written(
            [f"out: {name}" for name in MoEAlignment._fields], outputs, topk_ids=topk_ids,
            token_lora_mapping=adapters, adapter_enabled=enabled, expert_map=expert_map,
        )  # fmt: skip
    if call.launches is None:
        results = cpu.moe_lora_align_block_size(
            topk_ids, adapters, block_size, num_experts, max_loras, enabled, expert_map, pads
        )
        for output, result in zip(outputs, results, strict=True):
            output.copy_(result)
        return outputs
    pointers = [
        address("topk_ids", ids),
        *(address(f"out: {name}", result) for name, result in outputs._asdict().items()),
        address("token_lora_mapping", adapters),
        0 if enabled is None else address("adapter_enabled", enabled),
        0 if expert_map is None else address("expert_map", expert_map),
    ]
    scratch = None
    if call.scratch_words:
        scratch = torch.empty(call.scratch_words, dtype=torch.int32, device=device)
    try:
        for launch in call.launches:
            launch(*pointers, 0 if scratch is None else scratch.data_ptr())
    except KernelLaunchError:
        if call.fallback is None:
            raise
        others = block_size, num_experts, max_loras, enabled, expert_map, pads
        moe_lora_align_block_size(topk_ids, adapters, *others, out=outputs, kernel=call.fallback)
    return outputs


class _Sizes(NamedTuple):
    """All that a call follows from, beside how ids are read; part of the key of what is cached."""

    num_ids: int
    topk: int
    block_size: int
    num_experts: int
    max_loras: int
    pads: bool
    maps: bool
    flag_bytes: int


class _Call(NamedTuple):
    num_slots: int
    num_blocks: int
    launches: tuple[Launch, ...] | None = None  # None: on the CPU
    scratch_words: int = 0
    fallback: str | None = None  # the kernel to take where the driver refuses to launch clusters


@functools.lru_cache(CACHED_CALLS)
def _prepare(
    sizes: _Sizes,
    dtype: torch.dtype,
    strides: tuple[int, int, int] | None,
    device: torch.device,
    kernel: str | None,
) -> _Call:
    num_ids, num_experts, block_size, teams = (
        sizes.num_ids, sizes.num_experts, sizes.block_size, sizes.max_loras
    )  # fmt: skip
    if dtype not in ID_TYPES:
        raise TypeError(f"topk_ids: expected an integer tensor, got {dtype}; cast it")
    check_range("max_loras", teams, MAX_LORAS)
    num_slots, num_blocks = aligned_sizes(num_ids, num_experts, block_size, sizes.pads)
    if num_slots * teams > INT32_MAX:
        raise ValueError(f"max_loras: {teams} times {num_slots} slots are more than int32 can number")
    index = cuda_index("topk_ids", device)
    if index is None:
        return _Call(num_slots, num_blocks)
    id_type, limits = ID_TYPES[dtype], device_limits(index)
    reader = "i32" if id_type == IdType.I32 and not strides else "any"
    asked = num_ids, num_experts, num_slots, block_size, reader
    plan, fallback = plan_align(*asked, limits, kernel, "lora", teams), None
    if kernel is None and plan.cluster > 1:
        without = limits._replace(max_clusters=lambda *_: 0)
        fallback = plan_align(*asked, without, None, "lora", teams).kernel
    num_cols, row_stride, col_stride = strides or (1, 1, 1)
    chosen = {"per_block": 0, "per_row": divisor(1), "num_rows": 0, "slots_per_block": 0, "lanes_per_id": 1}
    constants = _ARGS.pack(
        num_ids=num_ids,
        num_experts=num_experts,
        num_slots=num_slots,
        num_blocks=num_blocks,
        map_mode=int(MapMode.MAP_IDS if sizes.maps else MapMode.NO_MAP),
        block_size=divisor(block_size),
        team=divisor(plan.launches[0].grid // teams),
        topk=divisor(max(1, sizes.topk)),
        id_type=id_type,
        num_cols=num_cols,
        row_stride=row_stride,
        col_stride=col_stride,
        scratch_words=plan.scratch_words // teams,
        flag_bytes=sizes.flag_bytes,
        **{**chosen, **plan.arguments},
    )
    launches = tuple(bind(launch, index, _ARGS.num_pointers, constants) for launch in plan.launches)
    return _Call(num_slots, num_blocks, launches, plan.scratch_words, fallback)


def _flags(enabled: PlainTensor | None, max_loras: int, device: torch.device) -> PlainTensor | None:
    """Of which engines have one more than adapters."""
    if enabled is None:
        return None
    check_layout("adapter_enabled", enabled)
    if enabled.dim() != 1 or len(enabled) < max_loras:
        raise ValueError(
            f"adapter_enabled: expected shape [{max_loras}] or longer, got {list(enabled.shape)}"
        )
    check_tensor("adapter_enabled", enabled, _FLAGS, enabled.shape, device, strided=True)
    return enabled.contiguous()


def _fake(
    topk_ids: torch.Tensor, block_size: int, num_experts: int, max_loras: int, pad_sorted_ids: bool, **_: Any
) -> tuple[torch.Tensor, ...]:
    num_slots, num_blocks = symbolic_sizes(topk_ids.numel(), num_experts, block_size, pad_sorted_ids)
    shapes = (max_loras, num_slots), (max_loras, num_blocks), (max_loras,)
    return tuple(topk_ids.new_empty(shape, dtype=torch.int32) for shape in shapes)


_operator = Operator(
    "moe_lora_align_block_size",
    "Tensor topk_ids, Tensor token_lora_mapping, SymInt block_size, SymInt num_experts, SymInt max_loras,"
    " Tensor? adapter_enabled=None, Tensor? expert_map=None, bool pad_sorted_ids=False",
    MoEAlignment,
    moe_lora_align_block_size,
    _fake,
)
