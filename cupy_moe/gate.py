"""topk_softmax, topk_sigmoid and grouped_topk: from router logits to the experts of each token."""

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

import torch

from . import arrays, cpu, library
from .launch import Launch, bind, device_limits
from .plan import MAX_EXPERTS, MAX_TOPK, check_int, plan_gate

__all__ = ["TopK", "grouped_topk", "topk_sigmoid", "topk_softmax"]

_is_compiling = torch.compiler.is_dynamo_compiling
_POINTERS, _CONSTANTS = struct.Struct("@5P"), struct.Struct("@q13I2f")  # GateArgs in gate.cuh
_ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # ElementType in gate.cuh
_ID_TYPES = (torch.int32, torch.int64, torch.uint32)
_SCORING = {"softmax": 0, "sigmoid": 1, "none": 2}  # Scoring in gate.cuh


class TopK(NamedTuple):
    """What gating returns, on the device of the logits; each row in descending order of what selected it."""

    topk_weights: torch.Tensor  # [T, K] fp32
    topk_ids: torch.Tensor  # [T, K] of `ids_dtype`


def topk_softmax(
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool = False,
    *,
    e_score_correction_bias: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    softcap: float = 0.0,
    padding_mask: torch.Tensor | None = None,
    ids_dtype: torch.dtype = torch.int32,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    kernel: str | None = None,
) -> TopK:
    """The topk experts of each token by the softmax of its logits, with their scores as weights.

    gating_output           [T, E]   fp32, fp16, bf16     logits of the router; rows may be strided
    topk                    1 to 64, and at most E
    renormalize                                           divide the weights of a token by their sum
    e_score_correction_bias [E]      fp32                 added to the scores to select, not to the weights
    routed_scaling_factor                                 multiplies the weights at the very end
    softcap                                               not 0: logits are softcap * tanh(logits / softcap)
    padding_mask            [T]      bool                 True: no token; its ids are -1 and its weights 0
    ids_dtype               torch.int32, int64, uint32    of `topk_ids`; with `out`, its type counts
    out                     (topk_weights, topk_ids)      written instead of allocated
    kernel                  a name in plan.GATE_KERNELS   forces one, for tests and benchmarks

    Returns TopK of
    topk_weights            [T, K]   fp32                 the scores of the selected experts
    topk_ids                [T, K]   ids_dtype            the selected experts, all different, best first

    Scores are computed in fp32. One that is NaN or infinite counts as 0; softmax has these for all of a row
    or for none of it. Without a bias, logits select, whose order scores have as far as fp32 tells them
    apart; with one, scores plus bias do. There, NaN counts as -Inf. Of equals the lower id comes first.
    Weights whose sum is 0 (or no normal number of fp32) are not renormalised.

    >>> logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, -1.0, 1.0, torch.nan]])
    >>> weights, ids = topk_softmax(logits, topk=2, renormalize=True)
    >>> weights.tolist(), ids.tolist()
    ([[0.5, 0.5], [0.0, 0.0]], [[1, 3], [0, 1]])

    The result is the same to the last bit at every call. Without a bias, ids are the same on the CPU, too.
    Weights are within 1e-6 of their value, relatively; with a softcap, as near as fp32 has the capped logits.

    Cost: one launch on torch's current stream, no synchronisation, and the outputs as the only allocation;
    `gating_output` is copied first, where the elements of a row are strided. Arrays with `__dlpack__` (cupy,
    jax, numpy) are accepted, and give arrays of their kind.

    Raises TypeError and ValueError for wrong arguments, before anything is launched; and what loading a
    kernel for the first time raises. Semantics: vLLM's `topk_softmax`; `softcap` is SGLang's.
    """
    return _gate(
        gating_output, topk, renormalize, "softmax", 1, 1, e_score_correction_bias, routed_scaling_factor,
        softcap, padding_mask, ids_dtype, out, kernel,
    )  # fmt: skip


def topk_sigmoid(
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool = False,
    *,
    e_score_correction_bias: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    softcap: float = 0.0,
    padding_mask: torch.Tensor | None = None,
    ids_dtype: torch.dtype = torch.int32,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    kernel: str | None = None,
) -> TopK:
    """As `topk_softmax`, with the sigmoid of each logit as its score; there, a NaN spoils no other score.

    >>> logits = torch.tensor([[0.0, torch.nan, -1.0, torch.inf]])
    >>> weights, ids = topk_sigmoid(logits, topk=3)
    >>> [round(weight, 4) for weight in weights[0].tolist()], ids.tolist()
    ([1.0, 0.5, 0.2689], [[3, 0, 2]])

    Semantics: vLLM's `topk_sigmoid`. Errors and cost are those of `topk_softmax`.
    """
    return _gate(
        gating_output, topk, renormalize, "sigmoid", 1, 1, e_score_correction_bias, routed_scaling_factor,
        softcap, padding_mask, ids_dtype, out, kernel,
    )  # fmt: skip


def grouped_topk(
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int,
    topk_group: int,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: torch.Tensor | None = None,
    *,
    padding_mask: torch.Tensor | None = None,
    ids_dtype: torch.dtype = torch.int32,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    kernel: str | None = None,
) -> TopK:
    """Top-k within the best groups of experts, as DeepSeek's models route.

    gating_output           [T, E]    fp32, fp16, bf16    logits of the router; rows may be strided
    topk                    1 to 64, and at most topk_group * E / num_expert_group
    num_expert_group        a divisor of E                neighbouring experts form groups of equal size
    topk_group              1 to num_expert_group         how many groups take part, by score
    scoring_func            "softmax", "sigmoid", or "none" where `gating_output` holds scores already

    The score of a group is that of its best expert; with a bias, the sum of the best two of its experts'
    scores plus bias (of the one, in groups of one). Of equal groups the lower comes first. All else is as in
    `topk_softmax`.

    >>> logits = torch.tensor([[0.9, 0.0, 0.6, 0.5, 0.8, 0.1]])
    >>> grouped_topk(logits, 2, False, num_expert_group=3, topk_group=1).topk_ids.tolist()
    [[0, 1]]
    >>> zeros = torch.zeros(6)
    >>> grouped_topk(logits, 2, False, 3, 1, "sigmoid", e_score_correction_bias=zeros).topk_ids.tolist()
    [[2, 3]]

    Semantics: vLLM's and SGLang's functions of this name. Errors and cost are those of `topk_softmax`.
    """
    return _gate(
        gating_output, topk, renormalize, scoring_func, num_expert_group, topk_group, e_score_correction_bias,
        routed_scaling_factor, 0.0, padding_mask, ids_dtype, out, kernel,
    )  # fmt: skip


def _gate(
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    scoring_func: str,
    num_groups: int,
    topk_group: int,
    bias: torch.Tensor | None,
    factor: float,
    softcap: float,
    padding_mask: torch.Tensor | None,
    ids_dtype: torch.dtype,
    out: tuple[torch.Tensor, torch.Tensor] | None,
    kernel: str | None,
) -> TopK:
    if type(gating_output) is not torch.Tensor or _is_compiling():
        return _indirectly(
            gating_output, topk, renormalize, scoring_func, num_groups, topk_group, bias, factor, softcap,
            padding_mask, ids_dtype, out, kernel,
        )  # fmt: skip
    device = gating_output.device
    if out is not None:
        ids_dtype = _check_out(out, topk, gating_output)
    call = _prepare(
        gating_output.shape, gating_output.stride(), gating_output.dtype, device, topk, bool(renormalize),
        scoring_func, num_groups, topk_group, bias is not None, factor, softcap, ids_dtype, kernel,
    )  # fmt: skip
    num_tokens, num_experts = gating_output.shape
    topk = call.topk
    if bias is not None:
        _check("e_score_correction_bias", bias, torch.float32, num_experts, device)
    if padding_mask is not None:
        _check("padding_mask", padding_mask, torch.bool, num_tokens, device)
    if out is None:
        topk_weights = torch.empty((num_tokens, topk), dtype=torch.float32, device=device)
        topk_ids = torch.empty((num_tokens, topk), dtype=ids_dtype, device=device)
    else:
        topk_weights, topk_ids = out
    if call.launches is None:
        weights, ids = cpu.gate(
            gating_output, topk, scoring_func, renormalize, bias, factor, softcap, padding_mask, num_groups,
            topk_group,
        )  # fmt: skip
        topk_weights.copy_(weights)
        topk_ids.copy_(ids)
    elif num_tokens:
        if call.copies:
            gating_output = gating_output.contiguous()
        logits = gating_output.data_ptr()
        call.launches[logits % 16 != 0](
            logits, 0 if bias is None else bias.data_ptr(),
            0 if padding_mask is None else padding_mask.data_ptr(),
            topk_weights.data_ptr(), topk_ids.data_ptr(),
        )  # fmt: skip
    return TopK(topk_weights, topk_ids)


class _Call(NamedTuple):
    """All that follows from sizes, types and flags: worked out and checked once, looked up later."""

    topk: int  # where the argument may be a float equal to it
    copies: bool = False
    launches: tuple[Launch, ...] | None = None  # for logits aligned to 16 bytes, and others; None: on the CPU


@functools.lru_cache(maxsize=65_536)
def _prepare(
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    topk: int,
    renormalize: bool,
    scoring_func: str,
    num_groups: int,
    topk_group: int,
    with_bias: bool,
    factor: float,
    softcap: float,
    ids_dtype: torch.dtype,
    kernel: str | None,
) -> _Call:
    if dtype not in _ELEMENTS:
        raise TypeError(f"gating_output: expected torch.float32, float16 or bfloat16, got {dtype}; cast it")
    if len(shape) != 2:
        raise ValueError(f"gating_output: expected [tokens, experts], got {list(shape)}")
    if ids_dtype not in _ID_TYPES:
        raise TypeError(f"ids_dtype: expected torch.int32, int64 or uint32, got {ids_dtype}")
    if scoring_func not in _SCORING:
        raise ValueError(f"scoring_func: expected 'softmax', 'sigmoid' or 'none', got {scoring_func!r}")
    if not softcap >= 0:
        raise ValueError(f"softcap: expected 0 (none) or more, got {softcap}")
    num_tokens, num_experts = shape
    check_int("number of experts", num_experts, MAX_EXPERTS)
    check_int("num_expert_group", num_groups, num_experts)
    if num_experts % num_groups:
        raise ValueError(f"num_expert_group: expected a divisor of {num_experts} experts, got {num_groups}")
    check_int("topk_group", topk_group, num_groups)
    check_int("topk", topk, min(MAX_TOPK, topk_group * (num_experts // num_groups)))
    if device.type == "cpu":
        return _Call(topk)
    if device.type != "cuda":
        raise ValueError(f"gating_output: expected a CUDA or CPU tensor, got one on {device}")

    if num_tokens == 0:
        return _Call(topk, launches=())
    copies = num_experts > 1 and strides[1] != 1
    row_bytes = (num_experts if copies or num_tokens == 1 else strides[0]) * dtype.itemsize
    plan = plan_gate(
        num_tokens, num_experts, topk, num_groups, dtype.itemsize, with_bias, softcap != 0,
        device_limits(device.index), kernel,
    )  # fmt: skip
    vectors = plan.vector_bytes > 0 and row_bytes % plan.vector_bytes == 0
    lanes = plan.lanes_per_row
    launches = tuple(
        bind(
            plan.launch, device.index, _POINTERS,
            _CONSTANTS.pack(
                row_bytes, num_tokens, num_experts, topk, num_groups, topk_group, _ELEMENTS[dtype],
                ids_dtype.itemsize // 4, aligned and vectors, _SCORING[scoring_func], renormalize, lanes,
                lanes.bit_length() - 1, plan.launch.block, factor, softcap,
            ),
        )
        for aligned in (True, False)
    )  # fmt: skip
    return _Call(topk, copies, launches)


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, length: int, device: torch.device) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a {dtype} tensor or None, got {type(tensor).__name__}")
    if tensor.dtype is not dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}; cast it")
    if tensor.shape != (length,) or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor of shape [{length}],"
            f" got {list(tensor.shape)} with strides {list(tensor.stride())}"
        )
    if tensor.device != device:
        raise ValueError(f"{name}: expected it beside gating_output on {device}, got {tensor.device}")


def _check_out(out: Any, topk: int, gating_output: torch.Tensor) -> torch.dtype:
    """The type of the ids of `out`, which is checked otherwise."""
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError(f"out: expected the two tensors topk_weights, topk_ids, got {type(out).__name__}")
    for tensor, name, dtypes in zip(out, TopK._fields, ((torch.float32,), _ID_TYPES), strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"out: expected a tensor for {name}, got {type(tensor).__name__}")
        if tensor.dtype not in dtypes:
            raise TypeError(f"out: expected {' or '.join(map(str, dtypes))} for {name}, got {tensor.dtype}")
        shape = (*gating_output.shape[:1], topk)
        if tensor.shape != shape or not tensor.is_contiguous() or tensor.device != gating_output.device:
            raise ValueError(
                f"out: expected {name} of shape {list(shape)}, contiguous, on {gating_output.device}, got"
                f" {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
            )
    return out[1].dtype


def _indirectly(gating_output: Any, *arguments: Any) -> TopK:
    """What is not a plain tensor: one that is traced, one of a subclass, or an array of another library."""
    *before, bias, factor, softcap, padding_mask, ids_dtype, out, kernel = arguments
    if not isinstance(gating_output, torch.Tensor):
        logits = arrays.from_array("gating_output", gating_output)
        if bias is not None:
            bias = arrays.from_array("e_score_correction_bias", bias)
        if padding_mask is not None:
            padding_mask = arrays.from_array("padding_mask", padding_mask)
        tensors = None if out is None else tuple(arrays.from_array("out", array) for array in out)
        converted = [*before, bias, factor, softcap, padding_mask, ids_dtype, tensors, kernel]
        results = _gate(logits, *converted)
        return TopK(*(out if out is not None else map(arrays.like(gating_output), results)))
    if not library.is_traced(gating_output):
        return _gate(gating_output.as_subclass(torch.Tensor), *arguments)
    if kernel is not None:  # the compiler cannot take an argument of this name
        raise ValueError(f"kernel={kernel!r}: cannot be forced in code that is traced or compiled")
    operator, options = torch.ops.cupy_moe.gate, (*before, bias, factor, softcap, padding_mask)
    if out is None:
        return TopK(*operator(gating_output, *options, ids_dtype))
    results = TopK(*out)
    operator.out(gating_output, *options, **results._asdict())
    return results


def _run(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = [*arguments, None, None]
    return _gate(*options)


def _fill_out(*arguments: Any, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
    options = [*arguments, topk_ids.dtype, (topk_weights, topk_ids), None]
    _gate(*options)


def _fake(gating_output: torch.Tensor, topk: int, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    shape = gating_output.shape[0], topk
    weights = gating_output.new_empty(shape, dtype=torch.float32)
    return weights, weights.new_empty(shape, dtype=options[-1])


_SCHEMA = (
    "(Tensor gating_output, SymInt topk, bool renormalize, str scoring_func, int num_expert_group,"
    " int topk_group, Tensor? e_score_correction_bias, float routed_scaling_factor, float softcap,"
    " Tensor? padding_mask"
)
_RESULTS = "(Tensor topk_weights, Tensor topk_ids)"
library.register(f"gate{_SCHEMA}, ScalarType ids_dtype) -> {_RESULTS}", _run, _fake)
library.register(
    f"gate.out{_SCHEMA}, *, Tensor(a!) topk_weights, Tensor(b!) topk_ids) -> ()",
    _fill_out,
    lambda *_, **__: None,
)
