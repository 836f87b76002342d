"""moe_sort: an alignment, and what else its counts tell, in the same launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import torch

from ..cpu import sort as cpu
from ..cuda.launch import CACHED_CALLS, Launch, bind
from ..cuda.limits import device_limits
from ..cuda.structs import ArgumentStruct
from ..dispatch.arrays import Array, DLPackArray
from ..dispatch.operator import Operator, is_watched, nothing
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
from ..plans.base import ceil_div, divisor
from ..values import as_bool, as_int, check_choice
from .align import ID_TYPES, READERS, MapMode, as_rows, symbolic_sizes

__all__ = ["MoESorting", "moe_sort"]

_ARGS = ArgumentStruct(
    "align/align_sort.cu:SortArgs",
    "topk_ids sorted_token_ids expert_ids num_tokens_post_pad expert_map scratch inverse_ids expert_offsets"
    " counts topk_weights sorted_weights fine_expert_ids",
    "u32 num_ids, num_experts, num_slots, num_blocks, map_mode; Divisor block_size; u32 per_block;"
    " Divisor per_row; u32 num_rows, id_type, num_cols; i64 row_stride, col_stride; u32 words_per_offset;"
    " Divisor fine_size; u32 num_fine",
)
_INT32, _FLOAT = (torch.int32,), (torch.float32,)

if TYPE_CHECKING:  # at run time only from Python 3.11 on

    class MoESorting(NamedTuple, Generic[Array]):
        sorted_token_ids: Array
        expert_ids: Array
        num_tokens_post_pad: Array
        inverse_ids: Array
        expert_offsets: Array
        counts: Array
        sorted_weights: Array
        fine_expert_ids: Array

else:

    class MoESorting(NamedTuple):
        """What `moe_sort` returns: the three of `MoEAlignment`, and None for what was not asked for."""

        sorted_token_ids: torch.Tensor
        expert_ids: torch.Tensor
        num_tokens_post_pad: torch.Tensor
        inverse_ids: torch.Tensor | None
        expert_offsets: torch.Tensor | None
        counts: torch.Tensor | None
        sorted_weights: torch.Tensor | None
        fine_expert_ids: torch.Tensor | None


def moe_sort(
    topk_ids: Array,
    block_size: int,
    num_experts: int,
    expert_map: DLPackArray | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    *,
    topk_weights: DLPackArray | None = None,
    fine_block_size: int | None = None,
    return_inverse: bool = False,
    return_offsets: bool = False,
    return_counts: bool = False,
    offsets_dtype: torch.dtype = torch.int32,
    out: tuple[Any, ...] | None = None,
    kernel: str | None = None,
) -> MoESorting[Array]:
    """`moe_align_block_size`, and by-products of the same counts, as far as they are asked for.

    Up to `ignore_invalid_experts`, arguments are those of `moe_align_block_size`, with n ids, E experts
    and M slots.

    topk_weights      as topk_ids  fp32            asks for `sorted_weights`
    fine_block_size   divides block_size           asks for `fine_expert_ids`
    return_inverse, return_offsets, return_counts  ask for the others
    offsets_dtype     torch.int32, torch.int64     of `expert_offsets`
    out               the results                  written instead of allocated; None for the others
    kernel            of ALIGN_KERNELS but "small"  forces one, for tests and benchmarks

    Returns MoESorting: `sorted_token_ids`, `expert_ids` and `num_tokens_post_pad` as `moe_align_block_size`,
    and, or None where it was not asked for,
    inverse_ids       as topk_ids  int32           slot of each pair; -1 where it is dropped
    expert_offsets    [E + 1]      offsets_dtype   first slot of each expert, and the number of slots in use
    counts            [E]          int32           pairs of each expert
    sorted_weights    [M]          fp32            weight of the pair of each slot; 0 in padding and the tail
    fine_expert_ids   [ceil(M / fine_block_size)]  int32  `expert_ids` for these smaller blocks

    What others take: `expert_offsets[1:]`, with a block_size of 1 or, where products want it, more, are
    the `offs` of `torch.nn.functional.grouped_mm`; `fine_expert_ids` with a fine_block_size of 1 the
    `m_indices` of DeepGEMM's contiguous layout, and `counts` the `masked_m` of its masked one. Nothing
    waits for the GPU.

    >>> topk_ids = torch.tensor([[2, 0], [2, 1], [5, 2]])
    >>> result = moe_sort(topk_ids, 2, 4, fine_block_size=1, return_inverse=True, return_offsets=True)
    >>> result.sorted_token_ids[:8].tolist(), result.fine_expert_ids[:9].tolist()
    ([1, 6, 3, 6, 0, 2, 5, 6], [0, 0, 1, 1, 2, 2, 2, 2, -1])
    >>> result.inverse_ids.tolist(), result.expert_offsets.tolist(), result.counts
    ([[4, 0], [5, 2], [-1, 6]], [0, 2, 4, 8, 8], None)

    With an `expert_map` and no `ignore_invalid_experts`, offsets and counts are of all ranks' experts; with
    both, of this rank's. The results are the same to the last bit at every call, with every kernel, on every
    GPU and on the CPU.

    Cost: that of `moe_align_block_size` for more than 64 ids, with results to write beside; weights that
    are not contiguous are copied first. Arrays with `__dlpack__` (cupy, jax, numpy) are accepted, and
    give arrays of their kind.

    Raises TypeError and ValueError for wrong arguments, before anything is launched; what loading a kernel
    for the first time raises; and KernelLaunchError. Semantics of by-products: those of vLLM's `moe_permute`,
    AITER's `moe_sorting` and DeepGEMM.
    """
    flags = return_inverse, return_offsets, return_counts
    options = (
        *(block_size, num_experts, expert_map, pad_sorted_ids, ignore_invalid_experts, topk_weights),
        *(fine_block_size, *flags, offsets_dtype),
    )
    if (
        is_watched()
        or not is_plain(topk_ids)
        or not (expert_map is None or is_plain(expert_map))
        or not (topk_weights is None or is_plain(topk_weights))
        or not (out is None or are_outputs(out, len(MoESorting._fields)))
    ):
        asked = _asked(flags, topk_weights, fine_block_size)
        results: Any = _operator(topk_ids, *options, out=out, kernel=kernel)
        kept: Any = (r if is_asked else None for r, is_asked in zip(results, asked, strict=True))
        return MoESorting(*kept)
    return _sort(topk_ids, *options, out=out, kernel=kernel)


def _sort(
    topk_ids: PlainTensor,
    block_size: int,
    num_experts: int,
    expert_map: PlainTensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    topk_weights: PlainTensor | None = None,
    fine_block_size: int | None = None,
    return_inverse: bool = False,
    return_offsets: bool = False,
    return_counts: bool = False,
    offsets_dtype: torch.dtype | None = None,
    *,
    out: tuple[PlainTensor, ...] | None = None,
    kernel: str | None = None,
) -> Any:
    """`moe_sort` of plain tensors, with the arguments in the order of the dispatcher's."""
    block_size, num_experts = as_int("block_size", block_size), as_int("num_experts", num_experts)
    pads = as_bool("pad_sorted_ids", pad_sorted_ids)
    ignores = as_bool("ignore_invalid_experts", ignore_invalid_experts)
    asked = _asked((return_inverse, return_offsets, return_counts), topk_weights, fine_block_size)
    if fine_block_size is not None:
        fine_block_size = as_int("fine_block_size", fine_block_size)
    offsets_dtype = check_offsets_dtype(offsets_dtype)
    if kernel is not None:
        check_choice("kernel", kernel, ALIGN_KERNELS)
    check_layout("topk_ids", topk_ids)
    device = topk_ids.device
    if expert_map is not None:
        check_tensor("expert_map", expert_map, _INT32, (num_experts,), device)
    if topk_weights is not None:
        check_tensor("topk_weights", topk_weights, _FLOAT, topk_ids.shape, device, strided=True)
        topk_weights = topk_weights.contiguous()
    num_slots, num_blocks = aligned_sizes(topk_ids.numel(), num_experts, block_size, pads)
    mode = MapMode.NO_MAP if expert_map is None else MapMode.MAP_IDS if ignores else MapMode.MAP_BLOCKS
    sizes = SortSizes(
        topk_ids.numel(), block_size, num_experts, num_slots, num_blocks, int(mode),
        offsets_dtype.itemsize, fine_block_size,
    )  # fmt: skip
    ids, strides = contiguous_or_rows(topk_ids)
    call = _prepare(sizes, topk_ids.dtype, strides, device, kernel)
    shapes = _shapes(topk_ids.shape, num_slots, num_blocks, num_experts, fine_block_size)
    results = make_results(MoESorting._fields, asked, shapes, _dtypes(offsets_dtype), device, out)
    if out is not None:
        names = [f"out: {name}" for name in MoESorting._fields]
        check_written(names, results, topk_ids=topk_ids, expert_map=expert_map, topk_weights=topk_weights)
    if call is None:
        expected = cpu.moe_sort(
            topk_ids, block_size, num_experts, expert_map, pads, ignores, topk_weights, fine_block_size,
            offsets_dtype,
        )  # fmt: skip
        with torch.no_grad():
            for result, right in zip(results, expected, strict=True):
                if result is not None:
                    result.copy_(right)
    else:
        places = [
            0 if result is None else address(f"out: {name}", result)
            for name, result in zip(MoESorting._fields, results, strict=True)
        ]
        mapped = 0 if expert_map is None else address("expert_map", expert_map)
        weights = 0 if topk_weights is None else address("topk_weights", topk_weights)
        call(address("topk_ids", ids), *places[:3], mapped, *places[3:6], weights, *places[6:])
    return MoESorting(*results)


def _asked(flags: tuple[Any, Any, Any], weights: Any, fine_block_size: Any) -> tuple[bool, ...]:
    """Which of the results, in their order."""
    names = "return_inverse", "return_offsets", "return_counts"
    given = (as_bool(name, flag) for name, flag in zip(names, flags, strict=True))
    return True, True, True, *given, weights is not None, fine_block_size is not None


def _shapes(
    ids: Any, num_slots: Any, num_blocks: Any, num_experts: Any, fine_block_size: Any
) -> tuple[tuple[Any, ...], ...]:
    """Of the results."""
    num_fine = 0 if fine_block_size is None else ceil_div(num_slots, fine_block_size)
    return (
        (num_slots,),
        (num_blocks,),
        (1,),
        ids,
        (num_experts + 1,),
        (num_experts,),
        (num_slots,),
        (num_fine,),
    )


def _dtypes(offsets_dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    int32 = torch.int32
    return int32, int32, int32, int32, offsets_dtype, int32, torch.float32, int32


# ---- what moe_permute has of it, too


class SortSizes(NamedTuple):
    """What a launch follows from, beside how ids are read; part of the key of what is cached."""

    num_ids: int
    block_size: int
    num_experts: int
    num_slots: int
    num_blocks: int
    map_mode: int  # a MapMode
    offset_bytes: int
    fine_block_size: int | None = None


class _Sort:
    """The launches of a sort, called with addresses: those of SortArgs but `scratch`, in their order."""

    def __init__(self, launches: tuple[Launch, ...], scratch_words: int, device: torch.device) -> None:
        self._launches, self._scratch_words, self._device = launches, scratch_words, device
        self.otherwise: Callable[[], Any] | None = None  # where the driver refuses to launch clusters

    def __call__(self, ids: int, slots: int, blocks: int, post_pad: int, mapped: int, *more: int) -> None:
        scratch = None
        if self._scratch_words:
            scratch = torch.empty(self._scratch_words, dtype=torch.int32, device=self._device)
        workspace = 0 if scratch is None else scratch.data_ptr()
        try:
            for launch in self._launches:
                launch(ids, slots, blocks, post_pad, mapped, workspace, *more)
        except KernelLaunchError:
            if self.otherwise is None:
                raise
            self.otherwise()(ids, slots, blocks, post_pad, mapped, *more)


@functools.lru_cache(CACHED_CALLS)
def _prepare(
    sizes: SortSizes,
    dtype: torch.dtype,
    strides: tuple[int, int, int] | None,
    device: torch.device,
    kernel: str | None = None,
) -> _Sort | None:
    """The launches, checked and bound; None on the CPU."""
    if dtype not in ID_TYPES:
        raise TypeError(f"topk_ids: expected an integer tensor, got {dtype}; cast it")
    fine = sizes.fine_block_size
    if fine is not None and (fine < 1 or sizes.block_size % fine):
        raise ValueError(f"fine_block_size: expected a divisor of {sizes.block_size}, got {fine}")
    index = cuda_index("topk_ids", device)
    if index is None:
        return None
    id_type = ID_TYPES[dtype]
    reader = "any" if strides else READERS.get(id_type, "any")
    limits = device_limits(index)
    asked = sizes.num_ids, sizes.num_experts, sizes.num_slots, sizes.block_size, reader
    plan = plan_align(*asked, limits, kernel, "sort")
    num_cols, row_stride, col_stride = strides or (1, 1, 1)
    constants = _ARGS.pack(
        num_ids=sizes.num_ids,
        num_experts=sizes.num_experts,
        num_slots=sizes.num_slots,
        num_blocks=sizes.num_blocks,
        map_mode=sizes.map_mode,
        block_size=divisor(sizes.block_size),
        id_type=id_type,
        num_cols=num_cols,
        row_stride=row_stride,
        col_stride=col_stride,
        words_per_offset=sizes.offset_bytes // 4,
        fine_size=divisor(fine or 1),
        num_fine=ceil_div(sizes.num_slots, fine) if fine else 0,
        **plan.arguments,
    )
    launches = tuple(bind(launch, index, _ARGS.num_pointers, constants) for launch in plan.launches)
    call = _Sort(launches, plan.scratch_words, device)
    if kernel is None and plan.cluster > 1:
        other = plan_align(*asked, limits._replace(max_clusters=lambda *_: 0), None, "sort").kernel
        call.otherwise = functools.partial(_prepare, sizes, dtype, strides, device, other)
    return call


prepare_sort = _prepare


def contiguous_or_rows(ids: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int] | None]:
    """The ids, and how they lie unless they are contiguous and aligned to 16 bytes."""
    return (ids, None) if ids.is_contiguous() and ids.data_ptr() % 16 == 0 else as_rows(ids)


def check_offsets_dtype(dtype: Any) -> torch.dtype:
    if dtype is None:
        return torch.int32
    if dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets_dtype: expected torch.int32 or torch.int64, got {dtype!r}")
    return dtype


def are_outputs(out: Any, length: int) -> bool:
    """Whether `out` is tensors that a kernel can write to, or None."""
    is_list = isinstance(out, (tuple, list)) and len(out) == length
    return is_list and all(result is None or is_plain(result) for result in out)


def make_results(
    names: Sequence[str],
    asked: Sequence[bool],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    out: Sequence[PlainTensor | None] | None,
) -> list[PlainTensor]:
    """What was asked for, allocated or found in `out`, which may be wrong; None for the rest."""
    if out is None:
        return [
            torch.empty(shape, dtype=dtype, device=device) if is_asked else None
            for is_asked, shape, dtype in zip(asked, shapes, dtypes, strict=True)
        ]
    results = [tensor if is_asked else None for is_asked, tensor in zip(asked, out, strict=True)]
    for name, is_asked, tensor, shape, dtype in zip(names, asked, results, shapes, dtypes, strict=True):
        if is_asked and tensor is None:
            raise TypeError(f"out: expected a tensor for {name}, got NoneType")
        if tensor is not None:
            check_tensor(f"out: {name}", tensor, (dtype,), shape, device)
    return results


def _fake(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    pad_sorted_ids: bool,
    topk_weights: torch.Tensor | None,
    fine_block_size: int | None,
    return_inverse: bool,
    return_offsets: bool,
    return_counts: bool,
    offsets_dtype: torch.dtype | None,
    **_: Any,
) -> tuple[torch.Tensor, ...]:
    num_slots, num_blocks = symbolic_sizes(topk_ids.numel(), num_experts, block_size, pad_sorted_ids)
    shapes = _shapes(topk_ids.shape, num_slots, num_blocks, num_experts, fine_block_size)
    asked = _asked((return_inverse, return_offsets, return_counts), topk_weights, fine_block_size)
    return tuple(
        topk_ids.new_empty(shape, dtype=dtype) if is_asked else nothing(topk_ids)
        for is_asked, shape, dtype in zip(asked, shapes, _dtypes(offsets_dtype or torch.int32), strict=True)
    )


_operator = Operator(
    "moe_sort",
    "Tensor topk_ids, SymInt block_size, SymInt num_experts, Tensor? expert_map=None,"
    " bool pad_sorted_ids=False, bool ignore_invalid_experts=False, Tensor? topk_weights=None,"
    " SymInt? fine_block_size=None, bool return_inverse=False, bool return_offsets=False,"
    " bool return_counts=False, ScalarType? offsets_dtype=None",
    MoESorting,
    _sort,
    _fake,
    MoESorting._fields[3:],
)
