"""route: from router logits to experts, weights and their alignment."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import torch

from ..cuda.launch import CACHED_CALLS, Launch, bind
from ..cuda.limits import device_limits
from ..cuda.structs import ArgumentStruct
from ..dispatch.arrays import Array, DLPackArray
from ..dispatch.operator import Operator, is_watched
from ..dispatch.tensors import PlainTensor, address, check_tensor, check_written, cuda_index, is_plain
from ..errors import KernelLaunchError
from ..plans.align import aligned_sizes
from ..plans.base import divisor
from ..plans.route import ROUTE_KERNELS, RouteSizes, plan_route
from ..values import as_bool, as_int, check_choice
from .align import MapMode, allocate, check_out, moe_align_block_size, symbolic_sizes
from .gate import (
    GateOptions,
    as_logits,
    check_gate_out,
    check_gate_tensors,
    check_ids_dtype,
    check_logits,
    choose,
    gate_fields,
    run_gate,
)

__all__ = ["MoERouting", "route"]

_ARGS = ArgumentStruct(
    "route/route.cuh:RouteArgs",
    "logits bias padding_mask topk_weights topk_ids sorted_token_ids expert_ids num_tokens_post_pad"
    " expert_map",
    "i64 row_stride; u32 num_tokens, num_experts, topk, num_groups, topk_group, group_size, element,"
    " id_words, vectors, scoring, renormalize; float factor; u32 num_shared; float shared_weight;"
    " u32 num_ids, num_slots, num_blocks, map_mode; Divisor block_size; u32 slots_per_block, lanes_per_id,"
    " per_block; Divisor per_row; u32 num_rows, rows_per_block",
)
_INT32 = (torch.int32,)

if TYPE_CHECKING:  # at run time only from Python 3.11 on

    class MoERouting(NamedTuple, Generic[Array]):
        topk_weights: Array
        topk_ids: Array
        sorted_token_ids: Array
        expert_ids: Array
        num_tokens_post_pad: Array

else:

    class MoERouting(NamedTuple):
        """What `route` returns: the two of `TopK`, and the three of `MoEAlignment` for these ids."""

        topk_weights: torch.Tensor
        topk_ids: torch.Tensor
        sorted_token_ids: torch.Tensor
        expert_ids: torch.Tensor
        num_tokens_post_pad: torch.Tensor


def route(
    gating_output: Array,
    topk: int,
    block_size: int,
    renormalize: bool = False,
    *,
    scoring_func: str = "softmax",
    num_expert_group: int = 1,
    topk_group: int = 1,
    e_score_correction_bias: DLPackArray | None = None,
    routed_scaling_factor: float = 1.0,
    softcap: float = 0.0,
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float = 1.0,
    padding_mask: DLPackArray | None = None,
    input_ids: DLPackArray | None = None,
    hash_table: DLPackArray | None = None,
    expert_map: DLPackArray | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    ids_dtype: torch.dtype = torch.int32,
    out: tuple[Array, ...] | None = None,
    kernel: str | None = None,
) -> MoERouting[Array]:
    """Gating, and `moe_align_block_size` of the ids that it finds: for few tokens in one launch.

    gating_output           [T, E]   fp32, fp16, bf16     logits of the router; rows may be strided
    topk                    1 to 64, and at most E        experts of a token, K
    block_size              1 to 65 536                   rows that the consumer takes at a time
    scoring_func            "softmax", "sigmoid", "softplus_sqrt", or "none" where these are scores already
    num_expert_group, topk_group                          as for `grouped_topk`; 1, 1: no groups
    num_fused_shared_experts, shared_expert_weight        S experts after the others, as for `topk_softmax`
    input_ids, hash_table                                 as for `topk_softplus_sqrt`
    expert_map              [E + S]  int32                as for `moe_align_block_size`, and so the two flags
    out                     the five results              written instead of allocated
    kernel                  one of ROUTE_KERNELS          forces one, for tests and benchmarks

    All other arguments are those of `topk_softmax`. Returns MoERouting of
    topk_weights            [T, K + S]      fp32          the weights of the experts
    topk_ids                [T, K + S]      ids_dtype     the experts, best first
    sorted_token_ids        [M]             int32         indices into topk_ids.view(-1), by expert and
                                                          ascending; T * (K + S) in padding slots and the tail
    expert_ids              [ceil(M / B)]   int32         expert of each block; -1 past the last
    num_tokens_post_pad     [1]             int32         slots in use, a multiple of B = block_size

    where M is told by `aligned_sizes(T * (K + S), E + S, B, pad_sorted_ids)`. Padding rows have no slots.

    >>> logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, -1.0, 1.0, 2.0]])
    >>> routing = route(logits, topk=2, block_size=2, renormalize=True)
    >>> routing.topk_ids.tolist(), routing.num_tokens_post_pad.item()
    ([[1, 3], [3, 2]], 6)
    >>> routing.sorted_token_ids[:6].tolist(), routing.expert_ids.tolist()
    ([0, 4, 3, 4, 1, 2], [1, 2, 3, -1])

    The results are those of the two functions to the last bit, with every kernel.

    Cost: one launch on torch's current stream for up to 8 tokens, as long as a warp can gate a row: up to 512
    experts, K + S up to 32, no softcap and no table; and on GPUs with clusters for up to 64 tokens of plain
    softmax over up to 256 experts. For all else the launches and the workspace of the two functions. No
    synchronisation, and the outputs as the only other allocation. Arrays with `__dlpack__` (cupy, jax, numpy)
    are accepted, and give arrays of their kind.

    Raises TypeError and ValueError for wrong arguments, before anything is launched; what loading a kernel
    for the first time raises; and KernelLaunchError. Semantics: those of the two functions.
    """
    options = GateOptions(
        topk, renormalize, scoring_func, num_expert_group, topk_group, routed_scaling_factor, softcap,
        num_fused_shared_experts, shared_expert_weight,
    )  # fmt: skip
    tensors = e_score_correction_bias, padding_mask, input_ids, hash_table, expert_map
    flags = pad_sorted_ids, ignore_invalid_experts
    return _route(gating_output, options, block_size, *tensors, *flags, ids_dtype, out=out, kernel=kernel)


def _route(
    gating_output: PlainTensor,
    options: GateOptions,
    block_size: int,
    bias: PlainTensor | None = None,
    padding_mask: PlainTensor | None = None,
    input_ids: PlainTensor | None = None,
    hash_table: PlainTensor | None = None,
    expert_map: PlainTensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    ids_dtype: torch.dtype | None = None,
    *,
    out: tuple[PlainTensor, ...] | None = None,
    kernel: str | None = None,
) -> Any:
    given = bias, padding_mask, input_ids, hash_table, expert_map
    if (
        is_watched()
        or not is_plain(gating_output)
        or not all(tensor is None or is_plain(tensor) for tensor in given)
        or not (out is None or _can_be_out(out))
    ):
        return _operator(
            gating_output=gating_output, block_size=block_size, e_score_correction_bias=bias,
            padding_mask=padding_mask, input_ids=input_ids, hash_table=hash_table, expert_map=expert_map,
            pad_sorted_ids=pad_sorted_ids, ignore_invalid_experts=ignore_invalid_experts,
            ids_dtype=ids_dtype, out=out, kernel=kernel,
            **dict(zip(GateOptions._fields, options, strict=True)),
        )  # fmt: skip
    options, block_size = options.checked(), as_int("block_size", block_size)
    pads = as_bool("pad_sorted_ids", pad_sorted_ids)
    ignores = as_bool("ignore_invalid_experts", ignore_invalid_experts)
    if kernel is not None:
        check_choice("kernel", kernel, ROUTE_KERNELS)
    gating_output, logits, row_stride = as_logits(gating_output)
    (num_tokens, num_experts), device = gating_output.shape, gating_output.device
    ids_dtype = check_ids_dtype(ids_dtype) if out is None else out[1].dtype
    hashes = input_ids is not None or hash_table is not None
    mode = MapMode.NO_MAP if expert_map is None else MapMode.MAP_IDS if ignores else MapMode.MAP_BLOCKS
    call = _prepare(
        num_tokens, num_experts, row_stride, gating_output.dtype, device, logits % 16 == 0, options,
        bias is not None, hashes, ids_dtype, block_size, pads, int(mode), kernel,
    )  # fmt: skip
    if expert_map is not None:
        buckets = num_experts + options.num_fused_shared_experts
        check_tensor("expert_map", expert_map, _INT32, (buckets,), device)
    if out is not None:
        check_gate_out(out[:2], (num_tokens, options.num_results), device)
        check_out(out[2:], call.num_slots, call.num_blocks, device)
        names = [f"out: {name}" for name in MoERouting._fields]
        check_written(
            names, out, gating_output=gating_output, e_score_correction_bias=bias, padding_mask=padding_mask,
            input_ids=input_ids, hash_table=hash_table, expert_map=expert_map,
        )  # fmt: skip
    if call.launch is not None:
        check_gate_tensors(bias, padding_mask, num_tokens, num_experts, device)
        results: MoERouting[Any] = (
            _allocate(num_tokens, options, ids_dtype, call, gating_output)
            if out is None
            else MoERouting._make(out)
        )
        try:
            call.launch(
                logits or address("gating_output", gating_output),
                0 if bias is None else address("e_score_correction_bias", bias),
                0 if padding_mask is None else address("padding_mask", padding_mask),
                *(address(f"out: {name}", result) for name, result in results._asdict().items()),
                0 if expert_map is None else address("expert_map", expert_map),
            )  # fmt: skip
            return results
        except KernelLaunchError:
            if kernel is not None:
                raise
            out = results  # the driver refuses to launch clusters here: one after the other
    # The alignment would find out when gating is launched.
    if expert_map is not None:
        address("expert_map", expert_map)
    if out is not None:
        for name, tensor in zip(MoERouting._fields[2:], out[2:], strict=True):
            address(f"out: {name}", tensor)
    tensors = bias, padding_mask, ids_dtype, None if out is None else out[:2], None, input_ids, hash_table
    gated = run_gate(gating_output, options, *tensors)
    aligned = moe_align_block_size(
        gated.topk_ids, block_size, num_experts + options.num_fused_shared_experts, expert_map, pads, ignores,
        out=None if out is None else (out[2], out[3], out[4]),
    )  # fmt: skip
    return MoERouting._make((*gated, *aligned))


class _Call(NamedTuple):
    num_slots: int
    num_blocks: int
    launch: Launch | None = None  # None: gating and alignment, one after the other


@functools.lru_cache(CACHED_CALLS)
def _prepare(
    num_tokens: int,
    num_experts: int,
    row_stride: int,
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
    options: GateOptions,
    with_bias: bool,
    hashes: bool,
    ids_dtype: torch.dtype,
    block_size: int,
    pads: bool,
    map_mode: int,
    kernel: str | None,
) -> _Call:
    check_logits(dtype, num_experts, options)
    num_ids, num_buckets = num_tokens * options.num_results, num_experts + options.num_fused_shared_experts
    num_slots, num_blocks = aligned_sizes(num_ids, num_buckets, block_size, pads)
    index = cuda_index("gating_output", device)
    if index is None:
        return _Call(num_slots, num_blocks)
    gate = None if hashes else choose(num_tokens, num_experts, dtype, options, with_bias, index)
    sizes = RouteSizes(num_tokens, options.num_results, num_buckets, num_slots, block_size)
    plan = plan_route(gate, sizes, device_limits(index), kernel)
    if gate is None or plan.launch is None:
        return _Call(num_slots, num_blocks)
    row_bytes = (num_experts if num_tokens <= 1 else row_stride) * dtype.itemsize
    constants = _ARGS.pack(
        **gate_fields(gate, num_tokens, num_experts, row_bytes, dtype, aligned, options, ids_dtype),
        num_ids=num_ids,
        num_slots=num_slots,
        num_blocks=num_blocks,
        map_mode=map_mode,
        block_size=divisor(block_size),
        **plan.arguments,
    )
    launch = bind(plan.launch, index, _ARGS.num_pointers, constants)
    return _Call(num_slots, num_blocks, launch)


def _allocate(
    num_tokens: int, options: GateOptions, ids_dtype: torch.dtype, call: _Call, beside: PlainTensor
) -> MoERouting[Any]:
    shape = num_tokens, options.num_results
    weights = beside.new_empty(shape, dtype=torch.float32)
    ids = beside.new_empty(shape, dtype=ids_dtype)
    return MoERouting(weights, ids, *allocate(call.num_slots, call.num_blocks, beside))


def _can_be_out(out: Any) -> bool:
    return isinstance(out, (tuple, list)) and len(out) == 5 and all(map(is_plain, out))


def _fake(
    gating_output: torch.Tensor,
    topk: int,
    block_size: int,
    num_fused_shared_experts: int,
    pad_sorted_ids: bool,
    ids_dtype: torch.dtype | None,
    **_: Any,
) -> tuple[torch.Tensor, ...]:
    num_tokens, num_experts = gating_output.shape
    num_results, num_buckets = topk + num_fused_shared_experts, num_experts + num_fused_shared_experts
    sizes = symbolic_sizes(num_tokens * num_results, num_buckets, block_size, pad_sorted_ids)
    shape, int32 = (num_tokens, num_results), torch.int32
    weights = gating_output.new_empty(shape, dtype=torch.float32)
    aligned = (gating_output.new_empty((length,), dtype=int32) for length in (*sizes, 1))
    return weights, weights.new_empty(shape, dtype=ids_dtype or int32), *aligned


def _run(
    gating_output: torch.Tensor,
    block_size: int,
    e_score_correction_bias: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    hash_table: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    ids_dtype: torch.dtype | None = None,
    out: tuple[torch.Tensor, ...] | None = None,
    kernel: str | None = None,
    **options: Any,
) -> Any:
    """`_route` with all options by name, as the dispatcher knows them."""
    tensors = e_score_correction_bias, padding_mask, input_ids, hash_table, expert_map
    flags = pad_sorted_ids, ignore_invalid_experts, ids_dtype
    return _route(gating_output, GateOptions(**options), block_size, *tensors, *flags, out=out, kernel=kernel)


_operator = Operator(
    "route",
    "Tensor gating_output, SymInt topk, SymInt block_size, bool renormalize, str scoring_func,"
    " int num_expert_group, int topk_group, Tensor? e_score_correction_bias, float routed_scaling_factor,"
    " float softcap, SymInt num_fused_shared_experts=0, float shared_expert_weight=1.0,"
    " Tensor? padding_mask=None, Tensor? input_ids=None, Tensor? hash_table=None, Tensor? expert_map=None,"
    " bool pad_sorted_ids=False, bool ignore_invalid_experts=False, ScalarType? ids_dtype=None",
    MoERouting,
    _run,
    _fake,
)
