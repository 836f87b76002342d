"""moe_sum: what the experts made of a token, added up."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ..cpu import moe_sum as cpu
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
from ..plans.base import divisor
from ..plans.moe_sum import plan_sum
from ..values import as_float, check_fp32

__all__ = ["moe_sum"]

_ARGS = ArgumentStruct(
    "moe_sum/moe_sum.cu:SumArgs",
    "input output shared weights ids expert_map",
    "i64 token_stride, slot_stride, output_stride; u32 num_units, topk; Divisor units_per_token;"
    " u32 num_threads, num_experts, words_per_id; float factor; i64 element_stride, shared_stride",
)
_ELEMENTS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
SUMMED_TYPES = tuple(_ELEMENTS)
_ID_TYPES = (torch.int32, torch.int64, torch.uint32)
_FLOAT, _INT32 = (torch.float32,), (torch.int32,)
# Without a map, ids from here on are no experts: they are negative, unsigned and stand for -1, or nonsense.
_NO_MAP = 2**31


def moe_sum(
    input: Array,
    out: Array | None = None,
    *,
    topk_weights: DLPackArray | None = None,
    topk_ids: DLPackArray | None = None,
    expert_map: DLPackArray | None = None,
    routed_scaling_factor: float = 1.0,
    shared_output: DLPackArray | None = None,
) -> Array:
    """Add up the outputs of the experts of each token: the end of a MoE layer, in one launch.

    out[t] = routed_scaling_factor * sum over k of topk_weights[t, k] * input[t, k], plus shared_output[t]

    input                   [T, K, H]   fp32, fp16, bf16    of the k-th expert of token t; any strides
    out                     [T, H]      as input            written instead of allocated; may be
                                                            `shared_output`
    topk_weights            [T, K]      fp32                without them, all are 1
    topk_ids                [T, K]      int32, 64, uint32   expert of each slot; decides what is read
    expert_map              [E]         int32               this rank's id of each expert, -1: on another rank
    routed_scaling_factor                                   multiplies the sum, but not `shared_output`
    shared_output           [T, H]      as input            added at the end

    Returns [T, H] of the type of `input`; it is `out`, if that is given.

    A slot is not read, and so may hold anything, NaN too, where its id is outside [0, 2^31) (in uint32, -1
    is) or, with an `expert_map`, outside [0, E) or mapped outside [0, E). `expert_map` means nothing without
    `topk_ids`.

    All is added in fp32, k ascending, each product and sum rounded by itself, and rounded to the type of the
    output once. So the result is the same to the last bit at every call, on every GPU and on the CPU.

    >>> input = torch.tensor([[[1.0, 2.0], [10.0, 20.0]], [[3.0, 4.0], [torch.nan, torch.nan]]])
    >>> moe_sum(
    ...     input,
    ...     topk_weights=torch.tensor([[1.0, 0.5], [1.0, 0.5]]),
    ...     topk_ids=torch.tensor([[0, 3], [2, -1]]),
    ...     shared_output=torch.tensor([[100.0, 100.0], [200.0, 200.0]]),
    ... ).tolist()
    [[106.0, 112.0], [203.0, 204.0]]

    Cost: one launch on torch's current stream, no synchronisation, and the output as the only allocation;
    every used slot is read once. Where rows are no multiples of 16 bytes, not aligned to them, or H is
    strided, elements are loaded one by one. Weights, ids and shared outputs that are not contiguous are
    copied first. Arrays with `__dlpack__` (cupy, jax, numpy) are accepted, and give arrays of their kind.

    Raises TypeError and ValueError for wrong arguments, before anything is launched; what loading a kernel
    for the first time raises; and KernelLaunchError. Semantics: vLLM's `moe_sum`, with the weights, the
    factor and the shared experts that other engines add in further launches.
    """
    if (
        is_watched()
        or not is_plain(input)
        or not (out is None or is_plain(out))
        or not (topk_weights is None or is_plain(topk_weights))
        or not (topk_ids is None or is_plain(topk_ids))
        or not (expert_map is None or is_plain(expert_map))
        or not (shared_output is None or is_plain(shared_output))
    ):
        options = topk_weights, topk_ids, expert_map, routed_scaling_factor, shared_output
        return _operator(input, *options, out=out)
    factor = as_factor(routed_scaling_factor)
    try:
        num_tokens, topk, hidden = input.shape
        input.data_ptr()
    except (RuntimeError, ValueError):
        check_layout("input", input)
        raise ValueError(f"input: expected [tokens, topk, hidden], got {list(input.shape)}") from None
    dtype, device = input.dtype, input.device
    if topk_weights is not None:
        topk_weights = checked("topk_weights", topk_weights, _FLOAT, (num_tokens, topk), device)
    if topk_ids is not None:
        topk_ids = checked("topk_ids", topk_ids, _ID_TYPES, (num_tokens, topk), device)
    if expert_map is not None:
        check_layout("expert_map", expert_map)
        if expert_map.dim() != 1:
            raise ValueError(f"expert_map: expected shape [experts], got {list(expert_map.shape)}")
        expert_map = checked("expert_map", expert_map, _INT32, expert_map.shape, device)
    if shared_output is not None:
        shared_output = checked("shared_output", shared_output, (dtype,), (num_tokens, hidden), device)
    output = place_for_sum(
        out, num_tokens, hidden, input, shared_output, input=input, topk_weights=topk_weights,
        topk_ids=topk_ids, expert_map=expert_map,
    )  # fmt: skip
    tensors = topk_weights, topk_ids, expert_map, factor, shared_output
    call = prepare_sum(input, output, *tensors, _NO_MAP if expert_map is None else len(expert_map))
    if call is None:
        result = cpu.moe_sum(input, *tensors)
        with torch.no_grad():
            return output.copy_(result)
    launch_sum(*call)
    return output


# ---- what moe_unpermute has of it, too


def as_factor(value: Any) -> float:
    if type(value) is not float:
        value = as_float("routed_scaling_factor", value)
    return value or 0.0  # not -0.0, which would find what is cached for 0.0


def place_for_sum(
    out: PlainTensor | None,
    num_tokens: int,
    hidden: int,
    beside: PlainTensor,
    shared_output: PlainTensor | None,
    **read: PlainTensor | None,
) -> PlainTensor:
    """`out`, checked, or a new one. It may be `shared_output`, which is read where it is written."""
    if out is None:
        return beside.new_empty((num_tokens, hidden))
    check_tensor("out", out, (beside.dtype,), (num_tokens, hidden), beside.device, strided=True)
    strides = out.stride()
    if hidden > 1 and strides[1] != 1:
        raise ValueError(f"out: expected rows of neighbouring elements, got strides {list(strides)}")
    if shared_output is not None and shared_output.data_ptr() != out.data_ptr():
        read["shared_output"] = shared_output
    check_written(("out",), (out,), **read)
    return out


# The launches and where each begins, and what pointers they begin from.
_Prepared = tuple[tuple[tuple[Launch, tuple[int, ...]], ...], tuple[int, ...]]


def prepare_sum(
    input: PlainTensor,
    output: PlainTensor,
    topk_weights: PlainTensor | None,
    topk_ids: PlainTensor | None,
    expert_map: PlainTensor | None,
    factor: float,
    shared_output: PlainTensor | None,
    num_experts: int,
    overlaps: bool = False,
    rows_of: int | None = None,
) -> _Prepared | None:
    """For `launch_sum`, of checked tensors, all but `input` contiguous; None on the CPU. Slots of ids from
    `num_experts` on are not read. `overlaps`: with the kernel before, which costs 0.7 us of the host's time.
    `rows_of`: so many of the slots [T, num_experts, H] of `input` are a token's, those that its ids say.
    All that may be refused is refused here."""
    source, target = input.data_ptr(), output.data_ptr()
    weights = 0 if topk_weights is None else address("topk_weights", topk_weights)
    ids = 0 if topk_ids is None else address("topk_ids" if rows_of is None else "inverse_ids", topk_ids)
    shared = 0 if shared_output is None else address("shared_output", shared_output)
    call = _prepare(
        input.shape, input.stride(), output.stride(), input.dtype, input.device,
        (source | target | shared) % 16 == 0, bool(shared or weights or ids), factor,
        None if topk_ids is None else topk_ids.dtype, num_experts, overlaps, rows_of,
    )  # fmt: skip
    if call.launches is None:
        return None
    if not (source and target):
        address("input", input), address("out", output)
    mapped = 0 if expert_map is None else address("expert_map", expert_map)
    return call.launches, (source, target, shared, weights, ids, mapped)


def launch_sum(launches: tuple[tuple[Launch, tuple[int, ...]], ...], pointers: tuple[int, ...]) -> None:
    source, target, shared, weights, ids, mapped = pointers
    for launch, (input_offset, out_offset, shared_offset, weights_offset, ids_offset) in launches:
        launch(
            source + input_offset, target + out_offset, shared and shared + shared_offset,
            weights and weights + weights_offset, ids and ids + ids_offset, mapped,
        )  # fmt: skip


class _Call(NamedTuple):
    """All that follows from sizes, types and flags: worked out and checked once, looked up later."""

    launches: tuple[tuple[Launch, tuple[int, ...]], ...] | None  # and where each begins; None: on the CPU


@functools.lru_cache(CACHED_CALLS)
def _prepare(
    shape: tuple[int, int, int],
    strides: tuple[int, ...],
    out_strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
    extended: bool,
    factor: float,
    id_type: torch.dtype | None,
    map_length: int,
    overlaps: bool,
    rows_of: int | None,
) -> _Call:
    name = "input" if rows_of is None else "permuted"
    if dtype not in _ELEMENTS:
        raise TypeError(f"{name}: expected torch.float32, float16 or bfloat16, got {dtype}; cast it")
    if shape[0] > 1 and abs(out_strides[0]) < shape[2]:
        raise ValueError(f"out: expected rows that do not overlap, got strides {list(out_strides)}")
    check_fp32("routed_scaling_factor", factor)
    index = cuda_index(name, device)
    if index is None:
        return _Call(None)
    num_tokens, topk, hidden = shape
    if num_tokens == 0 or hidden == 0:
        return _Call(())
    size = dtype.itemsize
    # Strides of dimensions of length 1 mean nothing.
    token_bytes, slot_bytes, element_bytes = (
        stride * size if length > 1 else 0 for length, stride in zip(shape, strides, strict=True)
    )
    out_bytes = out_strides[0] * size if num_tokens > 1 else 0
    row_bytes = hidden * size
    rows_aligned = (token_bytes | slot_bytes | out_bytes | row_bytes) % 16 == 0
    vectors = aligned and rows_aligned and element_bytes in (0, size)
    id_bytes = 8 if id_type is torch.int64 else 4
    topk = topk if rows_of is None else rows_of
    limits, element = device_limits(index), _ELEMENTS[dtype]
    launches, first = [], 0
    while first < num_tokens:
        plan = plan_sum(
            num_tokens - first, topk, hidden, element, size, vectors, extended or factor != 1, limits,
            overlaps, rows_of is not None,
        )  # fmt: skip
        constants = _ARGS.pack(
            token_stride=token_bytes,
            slot_stride=slot_bytes,
            output_stride=out_bytes,
            num_units=plan.num_tokens * plan.units_per_token,
            topk=topk,
            units_per_token=divisor(plan.units_per_token),
            num_threads=plan.launch.block,
            num_experts=map_length,
            words_per_id=id_bytes // 4,
            factor=factor,
            element_stride=element_bytes,
            shared_stride=row_bytes,
        )
        bytes_per_token = token_bytes, out_bytes, row_bytes, 4 * topk, id_bytes * topk
        offsets = tuple(first * per_token for per_token in bytes_per_token)
        launches.append((bind(plan.launch, index, _ARGS.num_pointers, constants), offsets))
        first += plan.num_tokens
    return _Call(tuple(launches))


def checked(
    name: str,
    tensor: torch.Tensor,
    dtypes: tuple[Any, ...],
    shape: tuple[int, ...],
    device: torch.device,
) -> torch.Tensor:
    check_tensor(name, tensor, dtypes, shape, device, strided=True)
    return tensor.contiguous()


def _fake(input: torch.Tensor, **options: Any) -> torch.Tensor:
    return input.new_empty((input.shape[0], input.shape[2]))


_operator = Operator(
    "moe_sum",
    "Tensor input, *, Tensor? topk_weights=None, Tensor? topk_ids=None, Tensor? expert_map=None,"
    " float routed_scaling_factor=1.0, Tensor? shared_output=None",
    None,
    moe_sum,
    _fake,
)
