"""fused_experts and fused_moe: the experts themselves, from hidden states to the summed output."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..cpu import experts as cpu
from ..cuda.launch import CACHED_CALLS, Launch, bind
from ..cuda.limits import device_limits
from ..cuda.structs import ArgumentStruct
from ..cuda.tensor_map import tensor_map
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
from ..plans.align import aligned_sizes
from ..plans.base import MAX_EXPERTS, ceil_div, divisor
from ..plans.experts import (
    EXPERTS_KERNELS,
    FP8_KERNELS,
    MAX_LOCAL_EXPERTS,
    QUANTIZED_BITS,
    QUANTIZED_KERNELS,
    ROW_BYTES,
    WGMMA_BOX_ROWS,
    ExpertsPlan,
    plan_experts,
)
from ..plans.gate import MAX_TOPK
from ..quantization import Quantization, Stored
from ..values import INT32_MAX, as_bool, as_float, as_int, check_choice, check_fp32, check_range
from .align import MoEAlignment, moe_align_block_size
from .gate import LOGIT_TYPES, topk_softmax
from .moe_sum import launch_sum, prepare_sum
from .quantize import prepare_groups

__all__ = ["experts_workspace_bytes", "fused_experts", "fused_moe"]

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
ACTIVATIONS = (*cpu.GATED, *cpu.PLAIN)
_ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "f16"}
_SCALES = {
    torch.float32: ScaleType.SCALE_F32,
    torch.bfloat16: ScaleType.SCALE_BF16,
    torch.float16: ScaleType.SCALE_F16,
}
_ID_TYPES = (torch.int32, torch.int64, torch.uint32)
_FLOAT, _INT32 = (torch.float32,), (torch.int32,)
_SILU = cpu.SWIGLU["silu"]
_STORED = "w1_scale", "w2_scale", "w1_zeros", "w2_zeros"
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
_ALIGNMENT = 256  # bytes, of what lies in the workspace
# Of the two intermediates together; more tokens go in parts, one after another.
MAX_WORKSPACE_BYTES = 4 << 30


def fused_experts(
    hidden_states: Array,
    w1: DLPackArray,
    w2: DLPackArray,
    topk_weights: DLPackArray,
    topk_ids: DLPackArray,
    activation: str = "silu",
    apply_router_weight_on_input: bool = False,
    global_num_experts: int = -1,
    expert_map: DLPackArray | None = None,
    *,
    w1_bias: DLPackArray | None = None,
    w2_bias: DLPackArray | None = None,
    routed_scaling_factor: float = 1.0,
    shared_output: DLPackArray | None = None,
    swiglu_alpha: float | None = None,
    swiglu_limit: float | None = None,
    quantization: Quantization | None = None,
    workspace: torch.Tensor | None = None,
    out: Array | None = None,
    kernel: str | None = None,
) -> Array:
    """What the experts of each token make of it, weighted and added up.

    With T tokens, K experts for each, E experts here, hidden size H and intermediate size I:

    hidden_states           [T, H]      bf16, fp16         rows may be strided
    w1                      [E, 2I, H]  as hidden_states   gate rows first; [E, I, H] without a gate
    w2                      [E, H, I]   as hidden_states   rows of both may be strided
    topk_weights            [T, K]      fp32               of the router
    topk_ids                [T, K]      int32, 64, uint32  experts; those that do not exist are dropped
    activation                                             see below
    apply_router_weight_on_input                           weights multiply what the activation gets instead
    global_num_experts                                     of all ranks, with `expert_map`; -1: its length
    expert_map              [global]    int32              this rank's id of each, -1: another rank's
    w1_bias                 [E, 2I]     as hidden_states   added before the router weight, as w2_bias
    w2_bias                 [E, H]      as hidden_states
    routed_scaling_factor                                  multiplies the sum, but not `shared_output`
    shared_output           [T, H]      as hidden_states   added at the end
    swiglu_alpha, swiglu_limit                             see below
    quantization                                           how w1 and w2 are stored, if not in 16 bits; then
                                                           their types and shapes are as it says
    workspace               [n]         uint8              n: `experts_workspace_bytes`; else allocated
    out                     [T, H]      as hidden_states   written instead of allocated; contiguous; may be
                                                           `hidden_states`
    kernel                  one of EXPERTS_KERNELS,        forces one, for tests and benchmarks
                            or of QUANTIZED_KERNELS

    H and I are multiples of 8. Returns [T, H] of the type of `hidden_states`. A token without an expert here
    gets zeros, plus `shared_output`.

    Activations are "silu", "gelu" and "gelu_tanh" of the gate, times the up; "swigluoai", whose gate and up
    rows alternate, and "swigluoai_uninterleave", those of gpt-oss; and, without a gate, "silu_no_mul",
    "gelu_no_mul", "gelu_tanh_no_mul" and "relu2_no_mul". silu and both swigluoai are

        gate * sigmoid(swiglu_alpha * gate) * (up + beta)

    of a gate of at most `swiglu_limit` and an up within it: 1 and none in silu, 1.702 and 7 in swigluoai,
    where no others are given; beta is 0 and 1.

    Products are accumulated in fp32. What the activation gives is rounded once, what GEMM 2 gives, times the
    router weight, once; the sum is that of `moe_sum`. The result is the same to the last bit at every call,
    and for a token in whatever batch it is, as long as that has the same kind of kernel (mma or wgmma).
    Quantised weights become 16-bit values, exactly, and scales multiply sums in fp32; there is one kind. But
    fp8 weights are multiplied as they are on Hopper, unless pairs are few, and on compute capability 8.9,
    10.0, 10.3, 12.0 and 12.1 from 32 pairs an expert on: rows of both products become e4m3, too, with an
    fp32 scale for 128 columns, as in DeepSeek-V3; on Hopper that takes less time. It is so where the hidden
    size is a multiple of 128, and a row of weights has one scale, or blocks of 128 x 128 have fp32 ones;
    kernel="quantized_16" keeps 16 bits, and "wgmma_fp8", or "mma_fp8" for those without wgmma, tells the
    result on a CPU, too.

    >>> eye = torch.eye(8, dtype=torch.bfloat16)
    >>> w1 = torch.stack([eye, 2 * eye])  # two experts without a gate
    >>> x = torch.ones(1, 8, dtype=torch.bfloat16)
    >>> weights, ids = torch.tensor([[1.0, 0.5]]), torch.tensor([[0, 1]])
    >>> fused_experts(x, w1, w1, weights, ids, "relu2_no_mul")[0, :3].tolist()
    [5.0, 5.0, 5.0]

    Cost: three to five launches on torch's current stream (align, but not for a few pairs; rows to fp8, if
    they become that; two products; sum), no synchronisation, and the output and a workspace as the only
    allocations. Tokens whose intermediates would take more than 4 GiB go in parts, one after another. Hidden
    states that are not aligned to 16 bytes, and ids and weights that are not contiguous, are copied first.
    Arrays with `__dlpack__` are accepted, and give arrays of their kind.

    Raises TypeError and ValueError for wrong arguments, before anything is launched; what loading a kernel
    for the first time raises; and KernelLaunchError. Semantics: vLLM's `fused_experts`.
    """
    options = _Options(
        activation, apply_router_weight_on_input, global_num_experts, expert_map, w1_bias, w2_bias,
        routed_scaling_factor, shared_output, swiglu_alpha, swiglu_limit, quantization, workspace, out,
        kernel,
    )  # fmt: skip
    return _fused_experts(hidden_states, w1, w2, topk_weights, topk_ids, options)


class _Options(NamedTuple):
    """All of `fused_experts` but the tensors that it has to have."""

    activation: str = "silu"
    apply_router_weight_on_input: bool = False
    global_num_experts: int = -1
    expert_map: PlainTensor | None = None
    w1_bias: PlainTensor | None = None
    w2_bias: PlainTensor | None = None
    routed_scaling_factor: float = 1.0
    shared_output: PlainTensor | None = None
    swiglu_alpha: float | None = None
    swiglu_limit: float | None = None
    quantization: Quantization | None = None
    workspace: PlainTensor | None = None
    out: PlainTensor | None = None
    kernel: str | None = None


def _fused_experts(
    hidden_states: PlainTensor,
    w1: PlainTensor,
    w2: PlainTensor,
    topk_weights: PlainTensor,
    topk_ids: PlainTensor,
    options: _Options,
    gate: Callable[[], object] | None = None,
) -> Any:
    """`fused_experts`; `gate` makes weights and ids, when nothing else is left that may be refused."""
    (
        activation, apply_router_weight_on_input, global_num_experts, expert_map, w1_bias, w2_bias,
        routed_scaling_factor, shared_output, swiglu_alpha, swiglu_limit, quantization, workspace, out,
        kernel,
    ) = options  # fmt: skip
    tensors = hidden_states, w1, w2, topk_weights, topk_ids
    if not (quantization is None or isinstance(quantization, Quantization)):
        raise TypeError(f"quantization: expected a Quantization, got {type(quantization).__name__}")
    stored = () if quantization is None else _tensors_of(quantization)
    optional = expert_map, w1_bias, w2_bias, shared_output, workspace, out, *stored
    if is_watched() or not all(map(is_plain, tensors)) or not all(t is None or is_plain(t) for t in optional):
        if not (workspace is None or isinstance(workspace, torch.Tensor)):
            raise TypeError(f"workspace: expected a torch.Tensor, got {type(workspace).__name__}")
        if gate is not None:
            gate()
        # Without it: what is traced finds one for itself.
        return _operator(
            *tensors, activation, apply_router_weight_on_input, global_num_experts, expert_map, w1_bias,
            w2_bias, routed_scaling_factor, shared_output, swiglu_alpha, swiglu_limit, *_flat(quantization),
            out=out, kernel=kernel,
        )  # fmt: skip
    check_choice("activation", activation, ACTIVATIONS)
    if kernel is not None:
        check_choice("kernel", kernel, QUANTIZED_KERNELS if quantization else EXPERTS_KERNELS)
    on_input = as_bool("apply_router_weight_on_input", apply_router_weight_on_input)
    factor = as_float("routed_scaling_factor", routed_scaling_factor) or 0.0
    check_fp32("routed_scaling_factor", factor)
    swiglu = _swiglu(activation, swiglu_alpha, swiglu_limit)
    x: PlainTensor = _check_rows("hidden_states", hidden_states, 2)
    first: PlainTensor = _check_rows("w1", w1, 3)
    second: PlainTensor = _check_rows("w2", w2, 3)
    num_tokens, dtype, device = x.shape[0], x.dtype, x.device
    if dtype not in _ELEMENTS:
        raise TypeError(f"hidden_states: expected torch.bfloat16 or float16, got {dtype}; cast it")
    is_gated = activation in cpu.GATED
    if quantization is not None:
        num_experts, hidden, intermediate = quantization.check(x, first, second, is_gated)
        rows = first.shape[1]
    else:
        (_, hidden), (num_experts, _, _), (_, _, intermediate) = x.shape, first.shape, second.shape
        rows = 2 * intermediate if is_gated else intermediate
        check_tensor("w2", second, (dtype,), (num_experts, hidden, intermediate), device, strided=True)
        check_tensor("w1", first, (dtype,), (num_experts, rows, hidden), device, strided=True)
    ids: PlainTensor = topk_ids
    check_layout("topk_ids", ids)
    if ids.dim() != 2:
        raise ValueError(f"topk_ids: expected [tokens, topk], got {list(ids.shape)}")
    topk = ids.shape[1]
    check_tensor("topk_ids", ids, _ID_TYPES, (num_tokens, topk), device, strided=True)
    check_tensor("topk_weights", topk_weights, _FLOAT, (num_tokens, topk), device, strided=True)
    weights: PlainTensor = topk_weights
    ids, weights = ids.contiguous(), weights.contiguous()
    total = as_int("global_num_experts", global_num_experts)
    local: PlainTensor = expert_map
    if local is not None:
        total = local.numel() if total == -1 else total
        check_range("expert_map: length", total, MAX_EXPERTS)
        check_tensor("expert_map", local, _INT32, (total,), device)
    elif total not in (-1, num_experts):
        raise ValueError(f"global_num_experts: expected {num_experts} without an expert_map, got {total}")
    biases: list[PlainTensor] = [w1_bias, w2_bias]
    for name, bias, width in zip(("w1_bias", "w2_bias"), biases, (rows, hidden), strict=True):
        if bias is not None:
            check_tensor(name, bias, (dtype,), (num_experts, width), device)
    shared: PlainTensor = shared_output
    if shared is not None:
        check_tensor("shared_output", shared, (dtype,), (num_tokens, hidden), device, strided=True)
        shared = shared.contiguous()
    output: PlainTensor = out
    if out is None:
        output = x.new_empty((num_tokens, hidden))
    else:
        check_tensor("out", out, (dtype,), (num_tokens, hidden), device)
        check_written(
            ("out", "workspace"), (out, workspace), w1=first, w2=second, topk_weights=weights, topk_ids=ids,
            expert_map=local, w1_bias=w1_bias, w2_bias=w2_bias,
            shared_output=None if shared is None or shared.data_ptr() == out.data_ptr() else shared,
            hidden_states=None if x.data_ptr() == out.data_ptr() else x,
            **(dict(zip(_STORED, stored, strict=True)) if stored else {}),
        )  # fmt: skip
    if workspace is not None:
        _check_workspace(workspace, device)
    experts = num_experts if local is None else total
    strides = x.stride(0), *first.stride()[:2], *second.stride()[:2]
    call = _prepare(
        num_tokens, topk, num_experts, hidden, intermediate, strides, dtype, device, activation, ids.dtype,
        experts, local is not None, swiglu, kernel,
        None if quantization is None else quantization.stored,
    )  # fmt: skip
    if num_tokens == 0:
        if gate is not None:  # which has arguments of its own to check
            gate()
        return output
    if call is None:
        if gate is not None:
            gate()
        result = cpu.fused_experts(
            x, first, second, weights, ids, activation, on_input, local, biases[0], biases[1], factor, shared,
            swiglu_alpha, swiglu_limit, quantization, kernel in FP8_KERNELS,
        )  # fmt: skip
        with torch.no_grad():
            return output.copy_(result)
    if workspace is not None:
        _check_size(workspace, call.layout.size)
    if call.tokens_at_once < num_tokens:
        if gate is not None:
            gate()
        for begin in range(0, num_tokens, call.tokens_at_once):
            part = slice(begin, begin + call.tokens_at_once)
            fused_experts(
                x[part], first, second, weights[part], ids[part], activation, on_input, global_num_experts,
                local, w1_bias=w1_bias, w2_bias=w2_bias, routed_scaling_factor=factor, workspace=workspace,
                swiglu_alpha=swiglu_alpha, swiglu_limit=swiglu_limit, quantization=quantization,
                shared_output=None if shared is None else shared[part], out=output[part], kernel=call.kernel,
            )  # fmt: skip
        return output

    layout = call.layout
    memory = x.new_empty(layout.size, dtype=torch.uint8) if workspace is None else workspace
    # All that may be refused, before the first launch.
    base, rows = memory.data_ptr(), address("hidden_states", x)
    gates, downs = address("w1", first), address("w2", second)
    router, where = address("topk_weights", weights), address("topk_ids", ids)
    bias1 = 0 if w1_bias is None else address("w1_bias", w1_bias)
    bias2 = 0 if w2_bias is None else address("w2_bias", w2_bias)
    scale1 = scale2 = zero1 = zero2 = 0
    if quantization is not None:
        scale1, scale2, zero1, zero2 = (0 if t is None else address("quantization", t) for t in stored)
    mapped = 0 if local is None else address("expert_map", local)
    by_slot = memory[layout.outputs : layout.outputs + num_tokens * topk * hidden * 2].view(dtype)
    summed = prepare_sum(
        by_slot.view(num_tokens, topk, hidden), output, None, ids, local, factor, shared, experts, True
    )
    assert summed is not None  # which it is on the CPU alone
    maps = [tensor_map(pointer, *tensor) for pointer, tensor in zip((gates, downs), call.maps, strict=False)]
    router1, router2 = (router, 0) if on_input else (0, router)
    inner, outer = base + layout.activations, base + layout.outputs
    blocks = base + layout.sorted, base + layout.blocks, base + layout.post_pad
    if gate is not None:
        gate()
    if call.block_size:
        aligned = MoEAlignment(
            memory[layout.sorted : layout.sorted + 4 * layout.num_slots].view(torch.int32),
            memory[layout.blocks : layout.blocks + 4 * layout.num_blocks].view(torch.int32),
            memory[layout.post_pad : layout.post_pad + 4].view(torch.int32),
        )
        moe_align_block_size(ids, call.block_size, experts, local, False, local is not None, out=aligned)
    scales1 = scales2 = 0, 0, 0  # of rows, of weights and of what a product writes
    if call.quantize is not None:
        # Codes, then scales; those of the hidden states where the outputs will be.
        scales, inner_scales = outer + num_tokens * hidden, inner + num_tokens * topk * intermediate
        call.quantize(rows, outer, scales, 0)
        rows, scales1, scales2 = outer, (scales, scale1, inner_scales), (inner_scales, scale2, 0)
    if maps:
        call.first(*maps[0], *blocks, rows, inner, *scales1, bias1, router1)
        call.second(*maps[1], *blocks, inner, outer, *scales2, bias2, router2)
    elif call.kernel.startswith("mma"):
        call.first(*blocks, rows, gates, inner, *scales1, bias1, router1)
        call.second(*blocks, inner, downs, outer, *scales2, bias2, router2)
    elif call.kernel == "direct":
        call.first(where, rows, gates, inner, mapped, bias1, router1)
        call.second(where, inner, downs, outer, mapped, bias2, router2)
    else:
        call.first(where, mapped, *blocks, rows, gates, scale1, zero1, inner, bias1, router1)
        call.second(where, mapped, *blocks, inner, downs, scale2, zero2, outer, bias2, router2)
    launch_sum(summed[0], summed[1])
    return output


def fused_moe(
    hidden_states: Array,
    gating_output: DLPackArray,
    w1: DLPackArray,
    w2: DLPackArray,
    topk: int,
    renormalize: bool,
    **options: Any,
) -> Array:
    """`topk_softmax` of the router's logits, then `fused_experts`.

    hidden_states    [T, H]      bf16, fp16
    gating_output    [T, E]      fp32, fp16, bf16    logits of the router, for all experts
    w1, w2                                           and `options`: as in `fused_experts`
    topk             1 to 64                         experts of a token
    renormalize                                      divide the weights of a token by their sum

    Returns [T, H] of the type of `hidden_states`.

    >>> eye, x = torch.eye(8, dtype=torch.bfloat16), torch.ones(1, 8, dtype=torch.bfloat16)
    >>> logits = torch.tensor([[0.0, 5.0]])
    >>> fused_moe(x, logits, eye[None].repeat(2, 1, 1), eye[None].repeat(2, 1, 1), 1, True,
    ...           activation="relu2_no_mul")[0, :2].tolist()
    [1.0, 1.0]

    Cost: one launch more. Errors are those of the two. Semantics: vLLM's `fused_moe`.
    """
    tensors = hidden_states, gating_output, w1, w2
    if is_watched() or not all(map(is_plain, tensors)):
        weights, ids = topk_softmax(gating_output, topk, renormalize)
        return fused_experts(hidden_states, w1, w2, weights, ids, **options)
    return _fused_moe(*tensors, topk, renormalize, _Options(**options))


def _fused_moe(
    hidden_states: PlainTensor,
    gating_output: PlainTensor,
    w1: PlainTensor,
    w2: PlainTensor,
    topk: int,
    renormalize: bool,
    options: _Options,
) -> Any:
    """`fused_moe` of plain tensors, which checks all before it launches the first part."""
    topk = as_int("topk", topk)
    check_range("topk", topk, MAX_TOPK)
    shape, device = (*hidden_states.shape[:1], topk), hidden_states.device
    check_layout("hidden_states", hidden_states)
    weights = hidden_states.new_empty(shape, dtype=torch.float32)
    ids = hidden_states.new_empty(shape, dtype=torch.int32)

    def gate() -> None:
        experts = w1 if options.expert_map is None else options.expert_map
        shape = len(hidden_states), len(experts)
        check_layout("gating_output", gating_output)
        check_tensor("gating_output", gating_output, LOGIT_TYPES, shape, device, strided=True)
        topk_softmax(gating_output, topk, renormalize, out=(weights, ids))

    return _fused_experts(hidden_states, w1, w2, weights, ids, options, gate)


def _tensors_of(quantization: Quantization) -> tuple[torch.Tensor | None, ...]:
    return quantization.w1_scale, quantization.w2_scale, quantization.w1_zeros, quantization.w2_zeros


def _flat(quantization: Quantization | None) -> tuple[Any, ...]:
    """As torch.ops takes it."""
    if quantization is None:
        return None, None, None, None, None, 0, 0
    return (
        quantization.format, *_tensors_of(quantization), quantization.block_rows, quantization.block_columns
    )  # fmt: skip


class _Layout(NamedTuple):
    """Where things lie in the workspace, in bytes."""

    activations: int
    outputs: int
    sorted: int
    blocks: int
    post_pad: int
    size: int
    num_slots: int
    num_blocks: int


def _lay_out(num_pairs: int, hidden: int, intermediate: int, num_experts: int, block_size: int) -> _Layout:
    """Without a `block_size` there is no alignment."""
    num_slots = num_blocks = 0
    if block_size:
        num_slots, num_blocks = aligned_sizes(num_pairs, num_experts, block_size)
    places: list[int] = []
    end = 0
    # What follows the number of slots is for the kernels.
    for size in (2 * num_pairs * intermediate, 2 * num_pairs * hidden, 4 * num_slots, 4 * num_blocks, 8):
        places.append(end)
        end += ceil_div(size, _ALIGNMENT) * _ALIGNMENT
    activations, outputs, pairs, blocks, post_pad = places
    return _Layout(activations, outputs, pairs, blocks, post_pad, end, num_slots, num_blocks)


def experts_workspace_bytes(
    num_tokens: int, topk: int, hidden: int, intermediate: int, num_experts: int
) -> int:
    """How large a workspace of `fused_experts` has to be: for the activations and the outputs of each slot,
    in 16 bits, and the alignment. `num_experts` are those of all ranks, where there is an `expert_map`.

    >>> experts_workspace_bytes(1, 8, 2048, 768, 128)
    49664

    Raises TypeError and ValueError for what is no size.
    """
    sizes = {"num_tokens": num_tokens, "topk": topk, "hidden": hidden, "intermediate": intermediate}
    num_tokens, topk, hidden, intermediate = (as_int(name, size) for name, size in sizes.items())
    for name, size in sizes.items():
        check_range(name, size, INT32_MAX, 0)
    num_experts = as_int("num_experts", num_experts)
    check_range("num_experts", num_experts, MAX_EXPERTS)
    tokens = _tokens_at_once(num_tokens, topk, hidden, intermediate)
    return max(
        _lay_out(tokens * topk, hidden, intermediate, num_experts, block_size).size
        for block_size in (16, 32, 64, 128)
    )


def _tokens_at_once(num_tokens: int, topk: int, hidden: int, intermediate: int) -> int:
    per_token = 2 * topk * (hidden + intermediate)
    return max(1, min(num_tokens, MAX_WORKSPACE_BYTES // max(1, per_token)))


class _Call(NamedTuple):
    kernel: str  # which parts take, too: their bits are those of the whole
    tokens_at_once: int
    layout: _Layout
    block_size: int
    quantize: Launch | None  # of the hidden states, where rows become fp8
    first: Launch
    second: Launch
    maps: tuple[_Map, ...]  # of w1 and w2, where kernels copy boxes of them


# What `tensor_map` takes after the address: element, sizes, strides, box.
_Map = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@functools.lru_cache(CACHED_CALLS)
def _prepare(
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
) -> _Call | None:
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
    tokens = _tokens_at_once(num_tokens, topk, hidden, intermediate)
    num_pairs = max(1, tokens * topk)
    is_gated = activation in cpu.GATED
    element = _ELEMENTS[dtype]
    plan: ExpertsPlan = plan_experts(
        num_pairs, num_experts, all_experts, hidden, intermediate, element, is_gated, device_limits(index),
        kernel, None if stored is None else stored.format,
        multiplies_fp8,
    )  # fmt: skip
    weight_bytes = 2 if stored is None else 1
    is_fp8 = plan.kernel in FP8_KERNELS
    row_bytes = 1 if is_fp8 else 2
    layout = _lay_out(num_pairs, hidden, intermediate, all_experts, plan.block_size)
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
        if swiglu != _SILU
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
    return _Call(plan.kernel, tokens, layout, plan.block_size, quantize, launches[0], launches[1], maps)


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


def _swiglu(activation: str, alpha: Any, limit: Any) -> tuple[float, float, float]:
    """alpha, beta and limit; those of silu for activations that have none."""
    if alpha is None and limit is None:
        return cpu.SWIGLU.get(activation, _SILU)
    if activation not in cpu.SWIGLU:
        raise ValueError(f"swiglu_alpha, swiglu_limit: {activation!r} has none")
    if alpha is not None:
        alpha = as_float("swiglu_alpha", alpha)
        check_fp32("swiglu_alpha", alpha)
    if limit is not None:
        limit = as_float("swiglu_limit", limit)
        check_fp32("swiglu_limit", limit)
        if not limit >= 0:
            raise ValueError(f"swiglu_limit: expected 0 or more, got {limit}")
    return cpu.swiglu_numbers(activation, alpha, limit)


def _check_workspace(memory: PlainTensor, device: torch.device) -> None:
    check_layout("workspace", memory)
    if memory.dtype != torch.uint8 or memory.device != device or memory.dim() != 1:
        raise TypeError(
            f"workspace: expected bytes, [n] uint8 on {device}, got {memory.dtype} on {memory.device}"
        )


def _check_size(memory: PlainTensor, size: int) -> None:
    if memory.numel() < size or not memory.is_contiguous() or memory.data_ptr() % _ALIGNMENT:
        raise ValueError(
            f"workspace: expected {size} bytes, at a multiple of {_ALIGNMENT}, got {memory.numel()}"
        )


def _check_rows(name: str, tensor: PlainTensor, dims: int) -> PlainTensor:
    """That rows are of neighbouring elements, at multiples of 16 bytes; else hidden states are copied."""
    check_layout(name, tensor)
    if tensor.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got {list(tensor.shape)}")
    multiple = 16 // tensor.element_size()
    if tensor.is_contiguous() and tensor.shape[-1] % multiple == 0 and address(name, tensor) % 16 == 0:
        return tensor  # as what follows would find, in a third of the time
    strides = tensor.stride()
    is_dense = tensor.numel() == 0 or strides[-1] == 1 or tensor.shape[-1] == 1
    others = [s for s, n in zip(strides[:-1], tensor.shape, strict=False) if n > 1]
    if is_dense and all(stride % multiple == 0 for stride in others) and address(name, tensor) % 16 == 0:
        return tensor
    if name == "hidden_states":
        return tensor.clone(memory_format=torch.contiguous_format)
    raise ValueError(
        f"{name}: expected rows of neighbouring elements at multiples of 16 bytes, got strides"
        f" {list(strides)}"
    )


def _fake(hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape)


def _from_flat(
    *,
    weight_format: str | None = None,
    w1_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    w1_zeros: torch.Tensor | None = None,
    w2_zeros: torch.Tensor | None = None,
    block_rows: int = 0,
    block_columns: int = 0,
    **arguments: Any,
) -> torch.Tensor:
    """`fused_experts` as torch.ops knows it, which has no place for a Quantization."""
    if weight_format is None:
        return fused_experts(**arguments)
    scales = w1_scale, w2_scale, w1_zeros, w2_zeros
    quantization = Quantization(weight_format, *scales, block_rows, block_columns)  # type: ignore[arg-type]
    return fused_experts(**arguments, quantization=quantization)


_operator = Operator(
    "fused_experts",
    "Tensor hidden_states, Tensor w1, Tensor w2, Tensor topk_weights, Tensor topk_ids,"
    " str activation='silu', bool apply_router_weight_on_input=False, SymInt global_num_experts=-1,"
    " Tensor? expert_map=None, *, Tensor? w1_bias=None, Tensor? w2_bias=None,"
    " float routed_scaling_factor=1.0, Tensor? shared_output=None, float? swiglu_alpha=None,"
    " float? swiglu_limit=None, str? weight_format=None, Tensor? w1_scale=None, Tensor? w2_scale=None,"
    " Tensor? w1_zeros=None, Tensor? w2_zeros=None, int block_rows=0, int block_columns=0",
    None,
    _from_flat,
    _fake,
)
