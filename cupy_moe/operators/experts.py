"""fused_experts and fused_moe: the experts themselves, from hidden states to the summed output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..cpu import experts as cpu
from ..cuda.tensor_map import tensor_map
from ..dispatch.arrays import Array, DLPackArray
from ..dispatch.operator import Operator, is_watched
from ..dispatch.tensors import PlainTensor, address, check_layout, check_tensor, check_written, is_plain
from ..plans.base import MAX_EXPERTS
from ..plans.experts import EXPERTS_KERNELS, FP8_KERNELS, QUANTIZED_KERNELS
from ..plans.gate import MAX_TOPK
from ..quantization import Quantization
from ..values import INT32_MAX, as_bool, as_float, as_int, check_choice, check_fp32, check_range
from ._experts_launches import ALIGNMENT, ELEMENTS, SILU, lay_out, prepare_experts, tokens_at_once
from .align import MoEAlignment, moe_align_block_size
from .gate import LOGIT_TYPES, topk_softmax
from .moe_sum import launch_sum, prepare_sum

__all__ = ["experts_workspace_bytes", "fused_experts", "fused_moe"]

ACTIVATIONS = (*cpu.GATED, *cpu.PLAIN)
_ID_TYPES = (torch.int32, torch.int64, torch.uint32)
_FLOAT, _INT32 = (torch.float32,), (torch.int32,)
_STORED = "w1_scale", "w2_scale", "w1_zeros", "w2_zeros"


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
                                                           `hidden_states` or `shared_output`
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
    kernel="quantized_16" or "quantized_48" keeps 16 bits, and "wgmma_fp8", or "mma_fp8" for those without
    wgmma, tells the result on a CPU, too.

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
    gate: Callable[[], object] = lambda: None,
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
    if dtype not in ELEMENTS:
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
    if workspace is not None:
        _check_workspace(workspace, device)
    if out is not None or workspace is not None:
        check_written(
            ("out", "workspace"), (out, workspace), w1=first, w2=second, topk_weights=weights, topk_ids=ids,
            expert_map=local, w1_bias=w1_bias, w2_bias=w2_bias,
            shared_output=None if shared is None or shared.data_ptr() == output.data_ptr() else shared,
            hidden_states=None if x.data_ptr() == output.data_ptr() else x,
            **(dict(zip(_STORED, stored, strict=True)) if stored else {}),
        )  # fmt: skip
    experts = num_experts if local is None else total
    strides = x.stride(0), *first.stride()[:2], *second.stride()[:2]
    call = prepare_experts(
        num_tokens, topk, num_experts, hidden, intermediate, strides, dtype, device, activation, ids.dtype,
        experts, local is not None, swiglu, kernel,
        None if quantization is None else quantization.stored,
    )  # fmt: skip
    if num_tokens == 0:
        gate()  # which has arguments of its own to check
        return output
    if call is None:
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
    tokens = tokens_at_once(num_tokens, topk, hidden, intermediate)
    return max(
        lay_out(tokens * topk, hidden, intermediate, num_experts, block_size).size
        for block_size in (16, 32, 64, 128)
    )


def _swiglu(activation: str, alpha: Any, limit: Any) -> tuple[float, float, float]:
    """alpha, beta and limit; those of silu for activations that have none."""
    if alpha is None and limit is None:
        return cpu.SWIGLU.get(activation, SILU)
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
    if memory.numel() < size or not memory.is_contiguous() or memory.data_ptr() % ALIGNMENT:
        raise ValueError(
            f"workspace: expected {size} bytes, at a multiple of {ALIGNMENT}, got {memory.numel()}"
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
