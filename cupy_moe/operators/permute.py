"""moe_permute and moe_unpermute: rows in the order of experts, and back with the weighted sum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import torch

from ..cpu import permute as cpu
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
from ..plans.align import aligned_sizes
from ..plans.base import divisor
from ..plans.permute import PERMUTE_KERNELS, PermuteSizes, plan_permute
from ..values import INT32_MAX, as_bool, as_int, check_choice
from .align import ID_TYPES, READERS, MapMode, symbolic_sizes
from .moe_sum import as_factor, checked, launch_sum, place_for_sum, prepare_sum
from .quantize import check_scales
from .sort import SortSizes, are_outputs, check_offsets_dtype, contiguous_or_rows, make_results, prepare_sort

__all__ = ["MoEPermutation", "moe_permute", "moe_unpermute"]

_ARGS = ArgumentStruct(
    "permute/permute.cuh:PermuteArgs",
    "rows permuted inverse_ids scales permuted_scales expert_offsets sorted_token_ids expert_ids topk_ids"
    " expert_map",
    "u32 num_tokens, topk, tokens_per_block, units_per_row; Divisor parts, units_per_part; i64 token_stride;"
    " u32 row_bytes, unit_bytes, num_slots, num_ids, num_experts, words_per_offset, has_padding, fills_tail,"
    " num_scales, scale_bytes; i64 scale_row_stride, scale_stride, permuted_scale_row_stride,"
    " permuted_scale_stride; u32 num_blocks, map_mode; Divisor block_size; u32 per_block; Divisor per_row;"
    " u32 num_rows, id_type, num_cols; i64 row_stride, col_stride",
)
_INT32, _FLOAT = (torch.int32,), (torch.float32,)
_SLOTS, _OFFSETS = (torch.int32, torch.uint32), (torch.int32, torch.int64)

if TYPE_CHECKING:  # at run time only from Python 3.11 on

    class MoEPermutation(NamedTuple, Generic[Array]):
        permuted: Array
        inverse_ids: Array
        expert_offsets: Array
        sorted_token_ids: Array
        expert_ids: Array
        permuted_scales: Array

else:

    class MoEPermutation(NamedTuple):
        """What `moe_permute` returns: rows by expert, where each pair went, and where each row is from."""

        permuted: torch.Tensor
        inverse_ids: torch.Tensor
        expert_offsets: torch.Tensor
        sorted_token_ids: torch.Tensor
        expert_ids: torch.Tensor
        permuted_scales: torch.Tensor | None


def moe_permute(
    hidden_states: Array,
    topk_ids: DLPackArray,
    num_experts: int,
    *,
    block_size: int = 1,
    expert_map: DLPackArray | None = None,
    scales: DLPackArray | None = None,
    column_major_scales: bool = False,
    offsets_dtype: torch.dtype = torch.int32,
    fill_tail: bool = True,
    out: tuple[Any, ...] | None = None,
    kernel: str | None = None,
) -> MoEPermutation[Array]:
    """Copy each token's row to its experts: rows in the order of experts, for a grouped matrix product.

    With n = T * K pairs of a token and an expert, E = num_experts, B = block_size, and M slots, as told by
    `aligned_sizes(n, E, B)`, which is n for blocks of 1:

    hidden_states        [T, H]   1 to 8 bytes each   bf16, fp8, int8, any; rows may be strided
    topk_ids             [T, K]   any integer         expert of each pair; any strides
    block_size           1 to 65 536                  each expert's rows are padded to whole blocks of so many
    expert_map           [E]      int32               this rank's id of each expert, -1: another rank's
    scales               [T, G]   1 to 8 bytes each   travel with the rows; any strides
    column_major_scales                               permuted scales of a column are neighbours
    offsets_dtype        torch.int32 or torch.int64   of `expert_offsets`
    fill_tail                                         False: rows past the last expert's are not written
    out                  the results                  written instead of allocated; None for scales, if none
    kernel               of PERMUTE_KERNELS           forces one, for tests and benchmarks

    Returns MoEPermutation of
    permuted             [M, H]   as hidden_states    the row of each slot; zeros in padding and the tail
    inverse_ids          [T, K]   int32               the slot of each pair; -1 where it is dropped
    expert_offsets       [E + 1]  offsets_dtype       first slot of each expert; the last one: slots in use
    sorted_token_ids     [M]      int32               the pair of each slot, as `moe_align_block_size` has it
    expert_ids           [ceil(M / B)]  int32         expert of each block; -1 past the last
    permuted_scales      [M, G]   as scales           those of `permuted`; None without `scales`

    The pairs of an expert stay in order. Ids outside [0, E) are dropped, and so are, with an
    `expert_map`, all that are not mapped to [0, E); offsets are then of this rank's experts, those past
    the last being empty. So nothing that ids hold can make it fail. Rows past the last expert's may be
    most of all with an `expert_map`: with `fill_tail=False` they cost nothing, and hold what was there.

    >>> hidden_states = torch.tensor([[1.0, 1.5], [2.0, 2.5], [3.0, 3.5]])
    >>> result = moe_permute(hidden_states, torch.tensor([[2, 0], [2, 1], [5, 2]]), num_experts=3)
    >>> result.permuted[:, 0].tolist(), result.expert_offsets.tolist()
    ([1.0, 2.0, 1.0, 2.0, 3.0, 0.0], [0, 1, 2, 5])
    >>> result.inverse_ids.tolist(), result.sorted_token_ids.tolist()
    ([[2, 0], [3, 1], [-1, 4]], [1, 3, 0, 2, 5, 6])

    A layer by torch's grouped products, from ids to outputs without a wait for the GPU (gate_up [E, 2 * I, H]
    and down [E, H, I], as for `fused_experts`; in bf16, torch wants rows of multiples of 16 bytes):

        permuted, inverse_ids, offsets, *_ = moe_permute(hidden_states, topk_ids, num_experts)
        gate, up = grouped_mm(permuted, gate_up.transpose(1, 2), offs=offsets[1:]).chunk(2, dim=1)
        rows = grouped_mm(silu(gate) * up, down.transpose(1, 2), offs=offsets[1:])
        output = moe_unpermute(rows, inverse_ids, topk_weights=topk_weights)

    The results are the same to the last bit at every call, with every kernel, on every GPU and on the CPU.

    Cost: a row is read once and written K times. One launch on torch's current stream for up to 4096
    pairs and 1024 experts, in blocks of 1; else the launches of `moe_align_block_size` and one more. No
    synchronisation, and the outputs as the only allocation, but for the workspace of those. Where rows
    are no multiples of 16 bytes, or not aligned to them, elements are copied one by one; rows of strided
    elements are made contiguous first. Arrays with `__dlpack__` (cupy, jax, numpy) are accepted, and give
    arrays of their kind.

    Raises TypeError and ValueError for wrong arguments, before anything is launched; what loading a kernel
    for the first time raises; and KernelLaunchError. Semantics: vLLM's `moe_permute`, with blocks, and with
    dropped pairs told by -1.
    """
    options = block_size, expert_map, scales, column_major_scales, offsets_dtype, fill_tail
    if (
        is_watched()
        or not is_plain(hidden_states)
        or not is_plain(topk_ids)
        or not (expert_map is None or is_plain(expert_map))
        or not (scales is None or is_plain(scales))
        or not (out is None or are_outputs(out, len(MoEPermutation._fields)))
    ):
        results: Any = _operator(hidden_states, topk_ids, num_experts, *options, out=out, kernel=kernel)
        if scales is not None:
            return results
        permuted, inverse_ids, offsets, slots, experts, _ = results  # torch 2.8 compiles no slice of it
        no_scales: Any = None
        return MoEPermutation(permuted, inverse_ids, offsets, slots, experts, no_scales)
    return _permute(hidden_states, topk_ids, num_experts, *options, out=out, kernel=kernel)


def _permute(
    hidden_states: PlainTensor,
    topk_ids: PlainTensor,
    num_experts: int,
    block_size: int = 1,
    expert_map: PlainTensor | None = None,
    scales: PlainTensor | None = None,
    column_major_scales: bool = False,
    offsets_dtype: torch.dtype | None = None,
    fill_tail: bool = True,
    *,
    out: tuple[PlainTensor, ...] | None = None,
    kernel: str | None = None,
) -> Any:
    """`moe_permute` of plain tensors, with the arguments in the order of the dispatcher's."""
    num_experts, block_size = as_int("num_experts", num_experts), as_int("block_size", block_size)
    column_major = as_bool("column_major_scales", column_major_scales)
    fills_tail, offsets_dtype = as_bool("fill_tail", fill_tail), check_offsets_dtype(offsets_dtype)
    if kernel is not None:
        check_choice("kernel", kernel, PERMUTE_KERNELS)
    hidden_states = _as_rows("hidden_states", hidden_states)
    check_layout("topk_ids", topk_ids)
    device, (num_tokens, hidden) = hidden_states.device, hidden_states.shape
    if topk_ids.dim() != 2 or len(topk_ids) != num_tokens:
        raise ValueError(f"topk_ids: expected shape [{num_tokens}, topk], got {list(topk_ids.shape)}")
    if topk_ids.dtype not in ID_TYPES:
        raise TypeError(f"topk_ids: expected an integer tensor, got {topk_ids.dtype}; cast it")
    check_tensor("topk_ids", topk_ids, (topk_ids.dtype,), topk_ids.shape, device, strided=True)
    if expert_map is not None:
        check_tensor("expert_map", expert_map, _INT32, (num_experts,), device)
    num_scales = 0
    if scales is not None:
        check_layout("scales", scales)
        if scales.dim() != 2 or len(scales) != num_tokens:
            raise ValueError(f"scales: expected shape [{num_tokens}, groups], got {list(scales.shape)}")
        check_tensor("scales", scales, (scales.dtype,), scales.shape, device, strided=True)
        num_scales = scales.shape[1]
    num_slots, num_blocks = aligned_sizes(topk_ids.numel(), num_experts, block_size)
    shapes = _shapes(hidden, topk_ids.shape, num_experts, num_slots, num_blocks)
    dtypes = _dtypes(hidden_states.dtype, offsets_dtype)
    names = MoEPermutation._fields
    results = make_results(names[:5], (True,) * 5, shapes, dtypes, device, None if out is None else out[:5])
    moved_scales = None
    if scales is not None:
        moved_scales = _place_for_scales(scales, num_slots, column_major, out)
    permuted, inverse_ids, offsets, sorted_ids, expert_ids = results
    if out is not None:
        read = {"hidden_states": hidden_states, "topk_ids": topk_ids, "expert_map": expert_map}
        check_written([f"out: {name}" for name in names], (*results, moved_scales), **read, scales=scales)
    ids, id_strides = contiguous_or_rows(topk_ids)
    source, target = hidden_states.data_ptr(), permuted.data_ptr()
    call = _prepare(
        _Sizes(
            num_tokens, hidden, hidden_states.stride(0), hidden_states.dtype.itemsize, topk_ids.shape[1],
            block_size, num_experts, num_slots, num_blocks, expert_map is not None, offsets_dtype.itemsize,
            fills_tail, num_scales, 0 if scales is None else scales.dtype.itemsize,
            (0, 0) if scales is None else scales.stride(),
            (0, 0) if moved_scales is None else moved_scales.stride(),
        ),
        topk_ids.dtype, id_strides, device, (source | target) % 16 == 0, kernel,
    )  # fmt: skip
    outputs = *results, moved_scales
    if call is None:
        expected = cpu.moe_permute(
            hidden_states, topk_ids, num_experts, block_size, expert_map, scales, offsets_dtype
        )
        used = num_slots if fills_tail else int(expected[2][-1])
        with torch.no_grad():
            for name, result, right in zip(names, outputs, expected, strict=True):
                if result is not None and right is not None:
                    rows = slice(used if name in ("permuted", "permuted_scales") else None)
                    cpu.as_integers(result)[rows].copy_(cpu.as_integers(right)[rows])
    else:
        launch, sort = call
        a = address("topk_ids", ids)
        slots, blocks = (
            address(f"out: {name}", t) for name, t in zip(names[3:5], (sorted_ids, expert_ids), strict=True)
        )
        inverse, begin = address("out: inverse_ids", inverse_ids), address("out: expert_offsets", offsets)
        mapped = 0 if expert_map is None else address("expert_map", expert_map)
        source = source or address("hidden_states", hidden_states)
        target = target or address("out: permuted", permuted)
        given_scales = 0 if scales is None else address("scales", scales)
        written_scales = 0 if moved_scales is None else address("out: permuted_scales", moved_scales)
        if sort is not None:  # all that may be refused has been
            sort(a, slots, blocks, 0, mapped, inverse, begin, 0, 0, 0, 0)
        launch(source, target, inverse, given_scales, written_scales, begin, slots, blocks, a, mapped)
    return MoEPermutation(*outputs)


class _Sizes(NamedTuple):
    """All that a call follows from, beside how ids are read; part of the key of what is cached."""

    num_tokens: int
    hidden: int
    row_stride: int  # in elements, as those of scales
    element_bytes: int
    topk: int
    block_size: int
    num_experts: int
    num_slots: int
    num_blocks: int
    maps: bool
    offset_bytes: int
    fills_tail: bool
    num_scales: int
    scale_bytes: int
    scale_strides: tuple[int, ...]
    moved_scale_strides: tuple[int, ...]


@functools.lru_cache(CACHED_CALLS)
def _prepare(
    sizes: _Sizes,
    id_dtype: torch.dtype,
    id_strides: tuple[int, int, int] | None,
    device: torch.device,
    aligned: bool,
    kernel: str | None,
) -> tuple[Launch, Callable[..., None] | None] | None:
    """The launch of rows, and what sorts before it, if that does not; None on the CPU."""
    row_bytes, token_bytes = sizes.hidden * sizes.element_bytes, sizes.row_stride * sizes.element_bytes
    for name, size in (("hidden_states", sizes.element_bytes), ("scales", sizes.scale_bytes or 1)):
        if size not in (1, 2, 4, 8):
            raise TypeError(f"{name}: expected elements of 1, 2, 4 or 8 bytes, got {size}")
    if row_bytes > INT32_MAX:
        raise ValueError(f"hidden_states: expected rows of at most {INT32_MAX} bytes, got {row_bytes}")
    index = cuda_index("hidden_states", device)
    if index is None:
        return None
    num_ids = sizes.num_tokens * sizes.topk
    token_bytes = token_bytes if sizes.num_tokens > 1 else 0
    vectors = aligned and (row_bytes | token_bytes) % 16 == 0
    unit_bytes = 16 if vectors else sizes.element_bytes
    id_type = ID_TYPES[id_dtype]
    reader = "any" if id_strides else READERS.get(id_type, "any")
    has_padding, mode = sizes.block_size > 1, int(MapMode.MAP_IDS if sizes.maps else MapMode.NO_MAP)
    planned = PermuteSizes(
        sizes.num_tokens, sizes.topk, sizes.num_experts, sizes.num_slots, row_bytes // unit_bytes, vectors,
        has_padding, reader,
    )  # fmt: skip
    plan = plan_permute(planned, device_limits(index), kernel)
    sort = None
    if plan.kernel == "sorted":
        sort_sizes = SortSizes(
            num_ids, sizes.block_size, sizes.num_experts, sizes.num_slots, sizes.num_blocks, mode,
            sizes.offset_bytes,
        )  # fmt: skip
        sort = prepare_sort(sort_sizes, id_dtype, id_strides, device)
    num_cols, row_stride, col_stride = id_strides or (1, 1, 1)
    scale_strides = [
        stride * sizes.scale_bytes for stride in (*sizes.scale_strides, *sizes.moved_scale_strides)
    ]
    constants = _ARGS.pack(
        num_tokens=sizes.num_tokens,
        topk=sizes.topk,
        units_per_row=row_bytes // unit_bytes,
        token_stride=token_bytes,
        row_bytes=row_bytes,
        unit_bytes=unit_bytes,
        num_slots=sizes.num_slots,
        num_ids=num_ids,
        num_experts=sizes.num_experts,
        words_per_offset=sizes.offset_bytes // 4,
        has_padding=has_padding,
        fills_tail=sizes.fills_tail,
        num_scales=sizes.num_scales,
        scale_bytes=sizes.scale_bytes,
        scale_row_stride=scale_strides[0],
        scale_stride=scale_strides[1],
        permuted_scale_row_stride=scale_strides[2],
        permuted_scale_stride=scale_strides[3],
        num_blocks=sizes.num_blocks,
        map_mode=mode,
        block_size=divisor(sizes.block_size),
        id_type=id_type,
        num_cols=num_cols,
        row_stride=row_stride,
        col_stride=col_stride,
        **plan.arguments,
    )
    return bind(plan.launch, index, _ARGS.num_pointers, constants), sort


def _as_rows(name: str, rows: PlainTensor) -> PlainTensor:
    """The rows, copied where their elements are not neighbours."""
    check_layout(name, rows)
    if rows.dim() != 2:
        raise ValueError(f"{name}: expected shape [rows, hidden], got {list(rows.shape)}")
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def _place_for_scales(
    scales: torch.Tensor, num_slots: int, column_major: bool, out: tuple[PlainTensor, ...] | None
) -> torch.Tensor:
    shape, dtype, device = (num_slots, scales.shape[1]), scales.dtype, scales.device
    if out is None:
        return _empty_scales(torch.empty, shape, column_major, dtype=dtype, device=device)
    if out[5] is None:
        raise TypeError("out: expected a tensor for permuted_scales, got NoneType")
    check_scales("out: permuted_scales", out[5], shape, device, column_major, (dtype,))
    return out[5]


def _empty_scales(
    empty: Callable[..., torch.Tensor], shape: tuple[Any, Any], column_major: bool, **options: Any
) -> torch.Tensor:
    return empty(shape[::-1], **options).t() if column_major else empty(shape, **options)


def _shapes(hidden: Any, ids: Any, num_experts: Any, num_slots: Any, num_blocks: Any) -> tuple[Any, ...]:
    """Of the results but scales."""
    return (num_slots, hidden), ids, (num_experts + 1,), (num_slots,), (num_blocks,)


def _dtypes(dtype: torch.dtype, offsets_dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return dtype, torch.int32, offsets_dtype, torch.int32, torch.int32


def _fake(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    scales: torch.Tensor | None,
    column_major_scales: bool,
    offsets_dtype: torch.dtype | None,
    **_: Any,
) -> tuple[torch.Tensor, ...]:
    num_slots, num_blocks = symbolic_sizes(topk_ids.numel(), num_experts, block_size, False)
    shapes = _shapes(hidden_states.shape[1], topk_ids.shape, num_experts, num_slots, num_blocks)
    dtypes = _dtypes(hidden_states.dtype, offsets_dtype or torch.int32)
    results = (
        hidden_states.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    if scales is None:
        return *results, nothing(hidden_states)
    return *results, _empty_scales(scales.new_empty, (num_slots, scales.shape[1]), column_major_scales)


def moe_unpermute(
    permuted: Array,
    inverse_ids: DLPackArray,
    out: Array | None = None,
    *,
    topk_weights: DLPackArray | None = None,
    expert_offsets: DLPackArray | None = None,
    routed_scaling_factor: float = 1.0,
    shared_output: DLPackArray | None = None,
) -> Array:
    """Add up the rows of each token's pairs, wherever they lie: the way back from `moe_permute`.

    out[t] = routed_scaling_factor * sum over k of topk_weights[t, k] * permuted[inverse_ids[t, k]],
             plus shared_output[t]

    permuted                [M, H]   fp32, fp16, bf16    rows of the pairs; any strides
    inverse_ids             [T, K]   int32, uint32       the row of each pair
    out                     [T, H]   as permuted         written instead of allocated; may be `shared_output`
    topk_weights            [T, K]   fp32                without them, all are 1
    expert_offsets          [E + 1]  int32, int64        of which the last one says how many rows are in use
    routed_scaling_factor                                multiplies the sum, but not `shared_output`
    shared_output           [T, H]   as permuted         added at the end

    Returns [T, H] of the type of `permuted`; it is `out`, if that is given.

    Pairs whose row is outside [0, M) or not in use add nothing. Those that `moe_permute` dropped have none,
    so its results need no `expert_offsets`; a negative number of rows in use counts as all of them.

    It is `moe_sum` of permuted[inverse_ids], in the same order and to the same bits: in fp32, k
    ascending, each product and sum rounded by itself, and rounded to the type of the output once.

    >>> permuted = torch.tensor([[10.0, 1.0], [20.0, 2.0], [30.0, 3.0]])
    >>> inverse_ids = torch.tensor([[2, 0], [1, -1]], dtype=torch.int32)
    >>> moe_unpermute(permuted, inverse_ids, topk_weights=torch.tensor([[1.0, 0.5], [2.0, 1.0]])).tolist()
    [[35.0, 3.5], [40.0, 4.0]]

    Cost: one launch on torch's current stream, no synchronisation, and the output as the only allocation;
    the row of each pair is read once. Where rows are no multiples of 16 bytes, not aligned to them, or H
    is strided, elements are loaded one by one. Indices, weights and shared outputs that are not
    contiguous are copied first. Arrays with `__dlpack__` (cupy, jax, numpy) are accepted, and give arrays
    of their kind.

    Raises TypeError and ValueError for wrong arguments, before anything is launched; what loading a kernel
    for the first time raises; and KernelLaunchError. Semantics: vLLM's `moe_unpermute` and SGLang's
    `apply_shuffle_mul_sum`, with the factor and the shared experts that engines add in further launches.
    """
    if (
        is_watched()
        or not is_plain(permuted)
        or not is_plain(inverse_ids)
        or not (out is None or is_plain(out))
        or not (topk_weights is None or is_plain(topk_weights))
        or not (expert_offsets is None or is_plain(expert_offsets))
        or not (shared_output is None or is_plain(shared_output))
    ):
        options = topk_weights, expert_offsets, routed_scaling_factor, shared_output
        return _unpermute_operator(permuted, inverse_ids, *options, out=out)
    factor = as_factor(routed_scaling_factor)
    check_layout("permuted", permuted)
    check_layout("inverse_ids", inverse_ids)
    address("permuted", permuted)  # before views are made of it, which without memory fail with less words
    if permuted.dim() != 2 or inverse_ids.dim() != 2:
        name, tensor = ("inverse_ids", inverse_ids) if permuted.dim() == 2 else ("permuted", permuted)
        raise ValueError(f"{name}: expected two dimensions, got {list(tensor.shape)}")
    (num_tokens, topk), (num_rows, hidden) = inverse_ids.shape, permuted.shape
    dtype, device = permuted.dtype, permuted.device
    slots = checked("inverse_ids", inverse_ids, _SLOTS, (num_tokens, topk), device)
    if topk_weights is not None:
        topk_weights = checked("topk_weights", topk_weights, _FLOAT, (num_tokens, topk), device)
    if shared_output is not None:
        shared_output = checked("shared_output", shared_output, (dtype,), (num_tokens, hidden), device)
    in_use = None
    if expert_offsets is not None:
        check_layout("expert_offsets", expert_offsets)
        if expert_offsets.dim() != 1 or not len(expert_offsets):
            raise ValueError(f"expert_offsets: expected shape [E + 1], got {list(expert_offsets.shape)}")
        check_tensor("expert_offsets", expert_offsets, _OFFSETS, expert_offsets.shape, device)
        address("expert_offsets", expert_offsets)
        in_use = expert_offsets[-1:]
    output = place_for_sum(
        out, num_tokens, hidden, permuted, shared_output, permuted=permuted, inverse_ids=slots,
        topk_weights=topk_weights, expert_offsets=expert_offsets,
    )  # fmt: skip
    rows = permuted.expand(num_tokens, num_rows, hidden)  # any of them may be a slot of any token
    tensors = topk_weights, slots, in_use, factor, shared_output
    call = prepare_sum(rows, output, *tensors, num_rows, rows_of=topk)
    if call is None:
        result = cpu.moe_unpermute(permuted, slots, topk_weights, expert_offsets, factor, shared_output)
        with torch.no_grad():
            return output.copy_(result)
    launch_sum(*call)
    return output


def _unpermute_fake(permuted: torch.Tensor, inverse_ids: torch.Tensor, **_: Any) -> torch.Tensor:
    return permuted.new_empty((inverse_ids.shape[0], permuted.shape[1]))


_operator = Operator(
    "moe_permute",
    "Tensor hidden_states, Tensor topk_ids, SymInt num_experts, SymInt block_size=1,"
    " Tensor? expert_map=None, Tensor? scales=None, bool column_major_scales=False,"
    " ScalarType? offsets_dtype=None, bool fill_tail=True",
    MoEPermutation,
    _permute,
    _fake,
    ("permuted_scales",),
)
_unpermute_operator = Operator(
    "moe_unpermute",
    "Tensor permuted, Tensor inverse_ids, *, Tensor? topk_weights=None, Tensor? expert_offsets=None,"
    " float routed_scaling_factor=1.0, Tensor? shared_output=None",
    None,
    moe_unpermute,
    _unpermute_fake,
)
