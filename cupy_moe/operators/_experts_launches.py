"""fused_experts: sizes, types and strides -> launches of the two products, and where their memory lies."""

from __future__ import annotations

import enum
import functools
from typing import Any, NamedTuple

import torch

from ..cpu import experts as cpu
from ..cuda.launch import CACHED_CALLS, Launch, bind
from ..cuda.limits import device_limits
from ..cuda.structs import ArgumentStruct
from ..dispatch.tensors import cuda_index
from ..plans.align import aligned_sizes
from ..plans.base import ceil_div, divisor
from ..plans.experts import (
    FP8_KERNELS,
    MAX_LOCAL_EXPERTS,
    QUANTIZED_BITS,
    ROW_BYTES,
    WGMMA_BOX_ROWS,
    ExpertsPlan,
    plan_experts,
)
from ..quantization import Stored
from ..values import INT32_MAX, check_range
from .quantize import prepare_groups

_MMA_ARGS = ArgumentStruct(
    "experts/mma.cuh:ExpertsArgs",
    "sorted_token_ids expert_ids num_tokens_post_pad rows weights output row_scales weight_scales"
    " output_scales bias topk_weights",
    "i64 row_stride, expert_stride, weight_stride, scale_expert_stride, scale_row_stride, scale_group_stride;"
    " u32 num_pairs, num_experts; Divisor group_tiles, rows_shared; u32 depth, num_columns, activation,"
    " row_step, up_offset, clears_unknown, group_blocks; Divisor scale_rows; u32 scale_type, scales_steps;"
    " i64 bias_stride; float alpha, beta, limit",
)
_WGMMA_ARGS = ArgumentStruct(
    "experts/wgmma.cuh:ExpertsWgmmaArgs",
    "sorted_token_ids expert_ids counters rows output row_scales weight_scales output_scales bias"
    " topk_weights",
    "i64 row_stride, bias_stride, scale_expert_stride, scale_row_stride, scale_group_stride; u32 num_pairs,"
    " num_experts, num_blocks; Divisor rows_shared; u32 depth, num_columns, activation, row_step, up_offset,"
    " group_twos, clears_unknown, is_first; Divisor scale_rows; u32 scale_type, scales_steps; float alpha,"
    " beta, limit",
    tensor_map="weights",
)
_DIRECT_ARGS = ArgumentStruct(
    "experts/experts_direct.cu:ExpertsDirectArgs",
    "topk_ids rows weights output expert_map bias topk_weights",
    "i64 row_stride, expert_stride, weight_stride; u32 num_pairs, num_experts, num_mapped, words_per_id;"
    " Divisor rows_shared; u32 depth, num_columns, activation, row_step, up_offset, is_first; i64"
    " bias_stride; float alpha, beta, limit",
)

_QUANTIZED_ARGS = ArgumentStruct(
    "experts/quantized.cuh:ExpertsQuantizedArgs",
    "topk_ids expert_map sorted_token_ids expert_ids num_tokens_post_pad rows weights scales zeros output"
    " bias topk_weights",
    "i64 row_stride, expert_stride, weight_stride, scale_expert_stride, scale_row_stride, scale_group_stride,"
    " zero_expert_stride, zero_row_stride, zero_group_stride; u32 num_pairs, num_experts, num_mapped,"
    " words_per_id; Divisor tiles, rows_shared, scale_rows; u32 group_chunks, num_groups, scale_type, depth,"
    " num_columns, activation, row_step, up_offset, is_first; i64 bias_stride; float alpha, beta, limit",
)
# By what names of kernels begin with.
_ARGS = {"mma": _MMA_ARGS, "wgmma": _WGMMA_ARGS, "direct": _DIRECT_ARGS, "quantized": _QUANTIZED_ARGS}


class ScaleType(enum.IntEnum):
    SCALE_F32, SCALE_BF16, SCALE_F16 = range(3)


class Activation(enum.IntEnum):
    NONE, SILU, GELU, GELU_TANH, RELU2, SWIGLU = range(6)


_ACTIVATIONS = {
    "silu": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_tanh": Activation.GELU_TANH,
    "relu2": Activation.RELU2,
    "swigluoai": Activation.SWIGLU,
    "swigluoai_uninterleave": Activation.SWIGLU,
}
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "f16"}
_SCALES = {
    torch.float32: ScaleType.SCALE_F32,
    torch.bfloat16: ScaleType.SCALE_BF16,
    torch.float16: ScaleType.SCALE_F16,
}
SILU = cpu.SWIGLU["silu"]
_SIZES = {"bf16": 2, "f16": 2, "fp8": 1}
# Of kernels that may have scales in steps, where there are none.
_NO_SCALES: dict[str, Any] = {
    "scale_expert_stride": 0,
    "scale_row_stride": 0,
    "scale_group_stride": 0,
    "scale_rows": divisor(1),
    "scale_type": ScaleType.SCALE_F32,
    "scales_steps": False,
}
ALIGNMENT = 256  # bytes, of what lies in the workspace
# Of the two intermediates together; more tokens go in parts, one after another.
MAX_WORKSPACE_BYTES = 4 << 30


class Layout(NamedTuple):
    """Where things lie in the workspace, in bytes."""

    activations: int
    outputs: int
    sorted: int
    blocks: int
    post_pad: int
    size: int
    num_slots: int
    num_blocks: int


def lay_out(num_pairs: int, hidden: int, intermediate: int, num_experts: int, block_size: int) -> Layout:
    """Without a `block_size` there is no alignment."""
    num_slots = num_blocks = 0
    if block_size:
        num_slots, num_blocks = aligned_sizes(num_pairs, num_experts, block_size)
    places: list[int] = []
    end = 0
    # What follows the number of slots is for the kernels.
    for size in (2 * num_pairs * intermediate, 2 * num_pairs * hidden, 4 * num_slots, 4 * num_blocks, 8):
        places.append(end)
        end += ceil_div(size, ALIGNMENT) * ALIGNMENT
    activations, outputs, pairs, blocks, post_pad = places
    return Layout(activations, outputs, pairs, blocks, post_pad, end, num_slots, num_blocks)


def tokens_at_once(num_tokens: int, topk: int, hidden: int, intermediate: int) -> int:
    per_token = 2 * topk * (hidden + intermediate)
    return max(1, min(num_tokens, MAX_WORKSPACE_BYTES // max(1, per_token)))


class ExpertsCall(NamedTuple):
    kernel: str  # which parts take, too: their bits are those of the whole
    tokens_at_once: int
    layout: Layout
    block_size: int
    quantize: Launch | None  # of the hidden states, where rows become fp8
    first: Launch
    second: Launch
    maps: tuple[_Map, ...]  # of w1 and w2, where kernels copy boxes of them


# What `tensor_map` takes after the address: element, sizes, strides, box.
_Map = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@functools.lru_cache(CACHED_CALLS)
def prepare_experts(
    num_tokens: int,
    topk: int,
    num_experts: int,
    hidden: int,
    intermediate: int,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    activation: str,
    id_type: torch.dtype,
    all_experts: int,
    is_mapped: bool,
    swiglu: tuple[float, float, float],
    kernel: str | None,
    stored: Stored | None,
) -> ExpertsCall | None:
    """Checks all that follows from sizes. None: on the CPU."""
    check_range("w1: number of experts", num_experts, MAX_LOCAL_EXPERTS)
    for name, value in (("hidden size", hidden), ("intermediate size", intermediate)):
        if value % 8 or not 0 < value <= INT32_MAX // 4:
            raise ValueError(f"w2: expected a {name} that is a multiple of 8, got {value}")
    check_range("topk_ids: topk", topk, INT32_MAX, 0 if num_tokens == 0 else 1)
    multiplies_fp8 = stored is not None and _multiplies_fp8(stored, hidden)
    if kernel in FP8_KERNELS and not multiplies_fp8:
        raise ValueError(
            f"kernel={kernel!r}: expected fp8 weights with one scale for a row, or with fp32 scales of blocks"
            " of 128 x 128, and a hidden size that is a multiple of 128"
        )
    index = cuda_index("hidden_states", device)
    if index is None:
        return None
    x_stride, expert1, row1, expert2, row2 = strides
    tokens = tokens_at_once(num_tokens, topk, hidden, intermediate)
    num_pairs = max(1, tokens * topk)
    is_gated = activation in cpu.GATED
    element = ELEMENTS[dtype]
    plan: ExpertsPlan = plan_experts(
        num_pairs, num_experts, all_experts, hidden, intermediate, element, is_gated, device_limits(index),
        kernel, None if stored is None else stored.format,
        multiplies_fp8,
    )  # fmt: skip
    weight_bytes = 2 if stored is None else 1
    is_fp8 = plan.kernel in FP8_KERNELS
    row_bytes = 1 if is_fp8 else 2
    layout = lay_out(num_pairs, hidden, intermediate, all_experts, plan.block_size)
    alternate = activation == "swigluoai"
    common = {
        "num_pairs": num_pairs,
        "num_experts": num_experts,
        "num_mapped": all_experts,
        "num_blocks": layout.num_blocks,
        "words_per_id": id_type.itemsize // 4,
        "group_blocks": plan.group_blocks,
        "group_twos": plan.group_blocks,
        "alpha": swiglu[0],
        "beta": swiglu[1],
        "limit": swiglu[2],
    } | _NO_SCALES
    first = {
        "row_stride": hidden if is_fp8 else 2 * x_stride,
        "expert_stride": weight_bytes * expert1,
        "weight_stride": weight_bytes * row1,
        "group_tiles": divisor(plan.group_blocks * ceil_div(intermediate, plan.columns[0])),
        "tiles": divisor(ceil_div(intermediate, plan.columns[0])),
        "rows_shared": divisor(topk),
        "depth": hidden,
        "num_columns": intermediate,
        "activation": Activation.SWIGLU
        if swiglu != SILU
        else _ACTIVATIONS[activation.removesuffix("_no_mul")],
        "row_step": 2 if alternate else 1,
        "up_offset": 1 if alternate else intermediate,
        "clears_unknown": False,
        "is_first": True,
        "bias_stride": 2 * intermediate if is_gated else intermediate,
    }
    second = {
        "row_stride": row_bytes * intermediate,
        "expert_stride": weight_bytes * expert2,
        "weight_stride": weight_bytes * row2,
        "group_tiles": divisor(plan.group_blocks * ceil_div(hidden, plan.columns[1])),
        "tiles": divisor(ceil_div(hidden, plan.columns[1])),
        "rows_shared": divisor(1),
        "depth": intermediate,
        "num_columns": hidden,
        "activation": Activation.NONE,
        "row_step": 1,
        "up_offset": 0,
        "clears_unknown": is_mapped,  # a map may name experts that are not here
        "is_first": False,
        "bias_stride": hidden,
    }
    declared = _ARGS[plan.kernel.partition("_")[0]]
    if stored is not None:
        first |= _scale_fields(stored, 0, 2 * intermediate if is_gated else intermediate)
        second |= _scale_fields(stored, 1, hidden)
    launches = []
    for launch, product in zip(plan.products, (first, second), strict=True):
        values = {**common, **product}
        constants = declared.pack(**{name: values[name] for name in declared.fields})
        launches.append(bind(launch, index, declared.num_pointers, constants))
    maps: tuple[_Map, ...] = ()
    quantize = None
    if is_fp8:
        element = "fp8"
        quantize = prepare_groups(tokens, hidden, x_stride, dtype, device)
    if plan.kernel in ("wgmma", "wgmma_fp8"):
        of_w1 = _map_plain(element, num_experts, intermediate, hidden, expert1, row1)
        if is_gated:
            gate, up = (2 * row1, row1) if alternate else (row1, intermediate * row1)
            of_w1 = _map_gated(element, num_experts, intermediate, hidden, expert1, gate, up)
        maps = of_w1, _map_plain(element, num_experts, hidden, intermediate, expert2, row2)
    return ExpertsCall(plan.kernel, tokens, layout, plan.block_size, quantize, launches[0], launches[1], maps)


def _scale_fields(stored: Stored, product: int, rows: int) -> dict[str, Any]:
    """Of one of the two products, whose weights have so many rows."""
    scale = stored.scales[product]
    fields: dict[str, Any] = {}
    for name, places in (("scale", scale), ("zero", stored.zeros[product])):
        strides = (0, 0, 0) if places is None else places.strides
        for dimension, stride in zip(("expert", "row", "group"), strides, strict=True):
            fields[f"{name}_{dimension}_stride"] = stride
    in_chunk = 128 // QUANTIZED_BITS[stored.format]
    return fields | {
        # Without a number of rows: all of w2, and all or half of w1.
        "scale_rows": divisor(stored.block_rows or max(1, rows // scale.shape[1])),
        "scale_type": _SCALES[scale.dtype],
        "scales_steps": stored.block_columns != 0,
        "group_chunks": stored.block_columns // in_chunk if stored.block_columns else 1 << 31,
        "num_groups": scale.shape[2],
    }


def _multiplies_fp8(stored: Stored, hidden: int) -> bool:
    """Whether rows may become fp8, too: a step of 128 columns has one scale for 128 rows, or none."""
    (scale, _), rows, columns = stored.scales, stored.block_rows, stored.block_columns
    in_steps = columns == 128 and rows % 128 == 0 and scale.dtype == torch.float32
    return stored.format == "fp8" and hidden % 128 == 0 and (in_steps or not columns)


def _map_plain(element: str, experts: int, rows: int, depth: int, expert: int, row: int) -> _Map:
    """Weights as (depth, 8 rows, eights of rows, 1, experts); the strides are in elements."""
    size = _SIZES[element]
    strides = size * row, size * 8 * row, 16, size * expert if experts > 1 else 16
    box = ROW_BYTES // size, 8, WGMMA_BOX_ROWS // 8, 1, 1
    return element, (depth, 8, rows // 8, 1, experts), strides, box


def _map_gated(element: str, experts: int, columns: int, depth: int, expert: int, gate: int, up: int) -> _Map:
    """Weights as (depth, 8 rows, gate or up, eights of columns, experts), so that a box has in turn 8 rows of
    gates and the 8 of their ups; `gate` is from the row of a gate to the next, `up` to its up."""
    size = _SIZES[element]
    strides = size * gate, size * up, size * 8 * gate, size * expert if experts > 1 else 16
    box = ROW_BYTES // size, 8, 2, WGMMA_BOX_ROWS // 16, 1
    return element, (depth, 8, 2, columns // 8, experts), strides, box
