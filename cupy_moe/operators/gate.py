"""Gating, topk_softmax and its like: from router logits to the experts of each token."""

from __future__ import annotations

import enum
import functools
import math
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import torch

from ..cpu import gate as cpu
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
from ..plans.base import MAX_EXPERTS
from ..plans.gate import GATE_KERNELS, MAX_TOPK, GatePlan, plan_gate, plan_hash
from ..values import INT32_MAX, as_bool, as_float, as_int, check_choice, check_fp32, check_range

__all__ = ["TopK", "grouped_topk", "topk_sigmoid", "topk_softmax", "topk_softplus_sqrt"]

_ARGS = ArgumentStruct(
    "gate/gate.cuh:GateArgs",
    "logits bias padding_mask topk_weights topk_ids",
    "i64 row_stride; u32 num_tokens, num_experts, topk, num_groups, topk_group, group_size, element,"
    " id_words, vectors, scoring, renormalize, lanes_per_row, row_shift, num_threads; float factor, softcap;"
    " u32 num_shared; float shared_weight",
)
_HASH_ARGS = ArgumentStruct(
    "gate/gate_hash.cu:HashArgs",
    "logits input_ids hash_table padding_mask topk_weights topk_ids",
    "i64 row_stride; u32 num_tokens, num_experts, topk, num_rows, element, id_words, input_words,"
    " table_words, renormalize, lanes_per_row, row_shift; float factor; u32 num_shared; float shared_weight",
)


class ElementType(enum.IntEnum):
    F32, F16, BF16 = range(3)


class Scoring(enum.IntEnum):
    SOFTMAX, SIGMOID, AS_IS, SOFTPLUS_SQRT = range(4)


_ELEMENTS = {
    torch.float32: ElementType.F32,
    torch.float16: ElementType.F16,
    torch.bfloat16: ElementType.BF16,
}
LOGIT_TYPES = tuple(_ELEMENTS)
_SCORING = {
    "softmax": Scoring.SOFTMAX,
    "sigmoid": Scoring.SIGMOID,
    "none": Scoring.AS_IS,
    "softplus_sqrt": Scoring.SOFTPLUS_SQRT,
}
_ID_TYPES = (torch.int32, torch.int64, torch.uint32)
_FLOAT, _BOOL, _INDICES = (torch.float32,), (torch.bool,), (torch.int32, torch.int64)
_OUTPUTS = "out: topk_weights", "out: topk_ids"
MAX_SHARED = 64


if TYPE_CHECKING:  # at run time only from Python 3.11 on

    class TopK(NamedTuple, Generic[Array]):
        topk_weights: Array
        topk_ids: Array

else:

    class TopK(NamedTuple):
        """What gating returns, beside the logits; each row in descending order of what selected it."""

        topk_weights: torch.Tensor  # [T, K + shared experts] fp32
        topk_ids: torch.Tensor  # [T, K + shared experts] of `ids_dtype`


class GateOptions(NamedTuple):
    """What gating is to do, by the names of the public functions; part of the key of what is cached."""

    topk: int
    renormalize: bool
    scoring_func: str
    num_expert_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    softcap: float = 0.0
    num_fused_shared_experts: int = 0
    shared_expert_weight: float = 1.0

    def checked(self) -> GateOptions:
        """With values of one type each, so that equal ones of others do not find what is cached for them,
        nor -0.0 what is cached for 0.0."""
        check_choice("scoring_func", self.scoring_func, _SCORING)
        if (
            tuple(map(type, self)) == _OPTION_TYPES
            and self.routed_scaling_factor
            and self.shared_expert_weight
        ):
            return self
        return GateOptions(
            as_int("topk", self.topk),
            as_bool("renormalize", self.renormalize),
            self.scoring_func,
            as_int("num_expert_group", self.num_expert_group),
            as_int("topk_group", self.topk_group),
            as_float("routed_scaling_factor", self.routed_scaling_factor) or 0.0,
            as_float("softcap", self.softcap) or 0.0,
            as_int("num_fused_shared_experts", self.num_fused_shared_experts),
            as_float("shared_expert_weight", self.shared_expert_weight) or 0.0,
        )

    def check(self, num_experts: int) -> None:
        """Raises ValueError where values are out of range, for so many experts."""
        for name in ("routed_scaling_factor", "softcap", "shared_expert_weight"):
            value = getattr(self, name)
            check_fp32(name, value)
        if not 0 <= self.softcap < math.inf:
            raise ValueError(f"softcap: expected 0 (none) or a number above it, got {self.softcap}")
        groups = self.num_expert_group
        check_range("gating_output: number of experts", num_experts, MAX_EXPERTS)
        check_range("num_expert_group", groups, num_experts)
        if num_experts % groups:
            raise ValueError(f"num_expert_group: expected a divisor of {num_experts} experts, got {groups}")
        check_range("topk_group", self.topk_group, groups)
        check_range("topk", self.topk, min(MAX_TOPK, self.topk_group * (num_experts // groups)))
        check_range("num_fused_shared_experts", self.num_fused_shared_experts, MAX_SHARED, least=0)

    @property
    def num_results(self) -> int:
        """Columns of the results."""
        return self.topk + self.num_fused_shared_experts


_OPTION_TYPES = (int, bool, str, int, int, float, float, int, float)


def topk_softmax(
    gating_output: Array,
    topk: int,
    renormalize: bool = False,
    *,
    e_score_correction_bias: DLPackArray | None = None,
    routed_scaling_factor: float = 1.0,
    softcap: float = 0.0,
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float = 1.0,
    padding_mask: DLPackArray | None = None,
    ids_dtype: torch.dtype = torch.int32,
    out: tuple[Array, Array] | None = None,
    kernel: str | None = None,
) -> TopK[Array]:
    """The topk experts of each token by the softmax of its logits, with their scores as weights.

    gating_output           [T, E]   fp32, fp16, bf16     logits of the router; rows may be strided
    topk                    1 to 64, and at most E
    renormalize                                           divide the weights of a token by their sum
    e_score_correction_bias [E]      fp32                 added to the scores to select, not to the weights
    routed_scaling_factor                                 multiplies the weights at the very end
    softcap                                               not 0: logits are softcap * tanh(logits / softcap)
    num_fused_shared_experts  0 to 64                     S further columns: experts E to E + S - 1, for all
    shared_expert_weight                                  the weight of each of these, as it is
    padding_mask            [T]      bool                 True: no token; its ids are -1 and its weights 0
    ids_dtype               torch.int32, int64, uint32    of `topk_ids`; with `out`, its type counts
    out                     (topk_weights, topk_ids)      written instead of allocated
    kernel                  one of GATE_KERNELS           forces one, for tests and benchmarks

    Returns TopK of
    topk_weights            [T, K + S] fp32               the scores of the selected experts
    topk_ids                [T, K + S] ids_dtype          the selected experts, all different, best first

    Scores are computed in fp32. One that is NaN, infinite or below 2^-126 (no normal number of fp32) counts
    as 0; softmax has NaN for all of a row or for none of it. Without a bias, logits select, whose order
    scores have as far as fp32 tells them apart; with one, scores plus bias do. There, NaN counts as -Inf. Of
    equals the lower id comes first. Weights are renormalised if their sum is between 2^-126 and 2^126.

    >>> logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, -1.0, 1.0, torch.nan]])
    >>> weights, ids = topk_softmax(logits, topk=2, renormalize=True)
    >>> weights.tolist(), ids.tolist()
    ([[0.5, 0.5], [0.0, 0.0]], [[1, 3], [0, 1]])

    The result is the same to the last bit at every call. Without a bias, ids are the same on the CPU, too.
    Weights are within 1e-6 of their value, relatively; with a softcap, as near as fp32 has the capped logits,
    and renormalised ones of both signs ("none" of `grouped_topk`) as near as fp32 has their sum.

    Cost: one launch on torch's current stream, no synchronisation, and the outputs as the only allocation;
    `gating_output` is copied first, where the elements of a row are strided. Arrays with `__dlpack__` (cupy,
    jax, numpy) are accepted, and give arrays of their kind.

    Raises TypeError and ValueError for wrong arguments, before anything is launched; what loading a kernel
    for the first time raises; and KernelLaunchError. Semantics: vLLM's `topk_softmax`; `softcap` is SGLang's.
    """
    shared = num_fused_shared_experts, shared_expert_weight
    options = GateOptions(topk, renormalize, "softmax", 1, 1, routed_scaling_factor, softcap, *shared)
    return run_gate(gating_output, options, e_score_correction_bias, padding_mask, ids_dtype, out, kernel)


def topk_sigmoid(
    gating_output: Array,
    topk: int,
    renormalize: bool = False,
    *,
    e_score_correction_bias: DLPackArray | None = None,
    routed_scaling_factor: float = 1.0,
    softcap: float = 0.0,
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float = 1.0,
    padding_mask: DLPackArray | None = None,
    ids_dtype: torch.dtype = torch.int32,
    out: tuple[Array, Array] | None = None,
    kernel: str | None = None,
) -> TopK[Array]:
    """As `topk_softmax`, with the sigmoid of each logit as its score; there, a NaN spoils no other score.

    >>> logits = torch.tensor([[0.0, torch.nan, -1.0, torch.inf]])
    >>> weights, ids = topk_sigmoid(logits, topk=3)
    >>> [round(weight, 4) for weight in weights[0].tolist()], ids.tolist()
    ([1.0, 0.5, 0.2689], [[3, 0, 2]])

    Semantics: vLLM's `topk_sigmoid`. Errors and cost are those of `topk_softmax`.
    """
    shared = num_fused_shared_experts, shared_expert_weight
    options = GateOptions(topk, renormalize, "sigmoid", 1, 1, routed_scaling_factor, softcap, *shared)
    return run_gate(gating_output, options, e_score_correction_bias, padding_mask, ids_dtype, out, kernel)


def topk_softplus_sqrt(
    gating_output: Array,
    topk: int,
    renormalize: bool = False,
    *,
    e_score_correction_bias: DLPackArray | None = None,
    routed_scaling_factor: float = 1.0,
    input_ids: DLPackArray | None = None,
    hash_table: DLPackArray | None = None,
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float = 1.0,
    padding_mask: DLPackArray | None = None,
    ids_dtype: torch.dtype = torch.int32,
    out: tuple[Array, Array] | None = None,
    kernel: str | None = None,
) -> TopK[Array]:
    """As `topk_sigmoid`, with sqrt(log(1 + e^x)) of each logit as its score, as DeepSeek-V4 routes.

    input_ids               [T]      int32, int64         with `hash_table`: the input id of each token
    hash_table              [V, K]   int32, int64         the experts of each input id, which scores then only
                                                          weigh; with no bias, and no choice of kernels

    A token whose input id is outside of the table is padding; an expert that is none in [0, E) has the id -1
    and a weight of 0, and takes no part in the sum of weights.

    >>> logits = torch.tensor([[0.0, 20.0, -1.0, torch.nan]] * 2)
    >>> weights, ids = topk_softplus_sqrt(logits, topk=2)
    >>> [round(weight, 4) for weight in weights[0].tolist()], ids[0].tolist()
    ([4.4721, 0.8326], [1, 0])
    >>> table = torch.tensor([[0, 2], [3, 1], [2, 0]])
    >>> topk_softplus_sqrt(logits, 2, input_ids=torch.tensor([2, 1]), hash_table=table).topk_ids.tolist()
    [[2, 0], [3, 1]]

    Semantics: vLLM's `topk_hash_softplus_sqrt` and SGLang's `hash_topk`, with the logarithm exact where 1 +
    e^x is not. Errors and cost are those of `topk_softmax`; `input_ids` and `hash_table` are contiguous.
    """
    shared = num_fused_shared_experts, shared_expert_weight
    options = GateOptions(topk, renormalize, "softplus_sqrt", 1, 1, routed_scaling_factor, 0.0, *shared)
    tensors = e_score_correction_bias, padding_mask, ids_dtype, out, kernel, input_ids, hash_table
    return run_gate(gating_output, options, *tensors)


def grouped_topk(
    gating_output: Array,
    topk: int,
    renormalize: bool,
    num_expert_group: int,
    topk_group: int,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: DLPackArray | None = None,
    *,
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float = 1.0,
    padding_mask: DLPackArray | None = None,
    ids_dtype: torch.dtype = torch.int32,
    out: tuple[Array, Array] | None = None,
    kernel: str | None = None,
) -> TopK[Array]:
    """Top-k within the best groups of experts, as DeepSeek's models route.

    gating_output           [T, E]    fp32, fp16, bf16    logits of the router; rows may be strided
    topk                    1 to 64, and at most topk_group * E / num_expert_group
    num_expert_group        a divisor of E                neighbouring experts form groups of equal size
    topk_group              1 to num_expert_group         how many groups take part, by score
    scoring_func            "softmax", "sigmoid", "softplus_sqrt", or "none" where these are scores already

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
    shared = num_fused_shared_experts, shared_expert_weight
    options = GateOptions(
        topk, renormalize, scoring_func, num_expert_group, topk_group, routed_scaling_factor, 0.0, *shared
    )
    return run_gate(gating_output, options, e_score_correction_bias, padding_mask, ids_dtype, out, kernel)


def run_gate(
    gating_output: PlainTensor,
    options: GateOptions,
    bias: PlainTensor | None,
    padding_mask: PlainTensor | None,
    ids_dtype: torch.dtype | None = None,
    out: tuple[PlainTensor, ...] | None = None,
    kernel: str | None = None,
    input_ids: PlainTensor | None = None,
    hash_table: PlainTensor | None = None,
) -> Any:
    if (
        is_watched()
        or not is_plain(gating_output)
        or not (bias is None or is_plain(bias))
        or not (padding_mask is None or is_plain(padding_mask))
        or not (input_ids is None or is_plain(input_ids))
        or not (hash_table is None or is_plain(hash_table))
        or not (out is None or _can_be_out(out))
    ):
        check_choice("scoring_func", options.scoring_func, _SCORING)
        return _operator(
            gating_output=gating_output, e_score_correction_bias=bias, padding_mask=padding_mask,
            ids_dtype=ids_dtype, input_ids=input_ids, hash_table=hash_table, out=out, kernel=kernel,
            **dict(zip(GateOptions._fields, options, strict=True)),
        )  # fmt: skip
    options = options.checked()
    if kernel is not None:
        check_choice("kernel", kernel, GATE_KERNELS)
    gating_output, logits, row_stride = as_logits(gating_output)
    num_tokens, num_experts = gating_output.shape
    device = gating_output.device
    if out is not None:
        ids_dtype = out[1].dtype
    elif ids_dtype is not torch.int32:
        ids_dtype = check_ids_dtype(ids_dtype)
    hashed = None
    if input_ids is not None or hash_table is not None:
        hashed = check_hash(options, bias, input_ids, hash_table, num_tokens, device)
    launch = _prepare(
        num_tokens, num_experts, row_stride, gating_output.dtype, device, logits % 16 == 0, options,
        bias is not None, ids_dtype, kernel, hashed,
    )  # fmt: skip
    if bias is not None or padding_mask is not None:
        check_gate_tensors(bias, padding_mask, num_tokens, num_experts, device)
    if out is None:
        topk_weights = gating_output.new_empty((num_tokens, options.num_results), dtype=torch.float32)
        topk_ids = gating_output.new_empty((num_tokens, options.num_results), dtype=ids_dtype)
    else:
        check_gate_out(out, (num_tokens, options.num_results), device)
        topk_weights, topk_ids = out
        check_written(
            _OUTPUTS, out, gating_output=gating_output, e_score_correction_bias=bias,
            padding_mask=padding_mask, input_ids=input_ids, hash_table=hash_table,
        )  # fmt: skip
    if launch is None:
        weights, ids = cpu.gate(gating_output, bias, padding_mask, input_ids, hash_table, **options._asdict())
        with torch.no_grad():
            topk_weights.copy_(weights)
            topk_ids.copy_(ids)
    elif num_tokens:
        read = (
            (0 if bias is None else address("e_score_correction_bias", bias),)
            if hashed is None
            else (address("input_ids", input_ids), address("hash_table", hash_table))
        )
        launch(
            logits or address("gating_output", gating_output), *read,
            0 if padding_mask is None else address("padding_mask", padding_mask),
            address("out: topk_weights", topk_weights), address("out: topk_ids", topk_ids),
        )  # fmt: skip
    return TopK(topk_weights, topk_ids)


def as_logits(gating_output: PlainTensor) -> tuple[PlainTensor, int, int]:
    """The logits, copied where the elements of a row are strided; their address and the stride of rows."""
    try:
        (_, num_experts), strides = gating_output.shape, gating_output.stride()
        if num_experts > 1 and strides[1] != 1:
            gating_output = gating_output.contiguous()
            strides = gating_output.stride()
        return gating_output, gating_output.data_ptr(), strides[0]
    except (RuntimeError, ValueError):
        check_layout("gating_output", gating_output)
        raise ValueError(
            f"gating_output: expected [tokens, experts], got {list(gating_output.shape)}"
        ) from None


def check_ids_dtype(dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.int32
    if dtype not in _ID_TYPES:
        raise TypeError(f"ids_dtype: expected torch.int32, int64 or uint32, got {dtype!r}")
    return dtype


def check_gate_tensors(
    bias: PlainTensor | None,
    padding_mask: PlainTensor | None,
    num_tokens: int,
    num_experts: int,
    device: torch.device,
) -> None:
    if bias is not None:
        check_tensor("e_score_correction_bias", bias, _FLOAT, (num_experts,), device)
    if padding_mask is not None:
        check_tensor("padding_mask", padding_mask, _BOOL, (num_tokens,), device)


class Hashed(NamedTuple):
    """What a launch follows from, of input ids and table."""

    num_rows: int
    input_bytes: int
    table_bytes: int


def check_hash(
    options: GateOptions,
    bias: PlainTensor | None,
    input_ids: PlainTensor | None,
    hash_table: PlainTensor | None,
    num_tokens: int,
    device: torch.device,
) -> Hashed:
    if input_ids is None or hash_table is None:
        raise TypeError("input_ids, hash_table: expected both or none of them")
    is_plain_score = options.scoring_func == "softplus_sqrt" and not options.softcap
    if not is_plain_score or bias is not None or options.num_expert_group > 1:
        raise ValueError("hash_table: expected softplus_sqrt without a bias, groups or a softcap")
    check_layout("hash_table", hash_table)
    num_rows = hash_table.shape[0] if hash_table.dim() else 0
    check_tensor("hash_table", hash_table, _INDICES, (num_rows, options.topk), device)
    check_range("hash_table: number of rows", num_rows, INT32_MAX, least=0)
    check_tensor("input_ids", input_ids, _INDICES, (num_tokens,), device)
    return Hashed(num_rows, input_ids.dtype.itemsize, hash_table.dtype.itemsize)


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
    ids_dtype: torch.dtype,
    kernel: str | None,
    hashed: Hashed | None = None,
) -> Launch | None:
    """The launch, checked and bound; None on the CPU. `aligned`: the logits are at a multiple of 16 bytes."""
    check_logits(dtype, num_experts, options)
    index = cuda_index("gating_output", device)
    if index is None:
        return None
    row_bytes = (num_experts if num_tokens <= 1 else row_stride) * dtype.itemsize
    if hashed is not None:
        return _prepare_hash(num_tokens, num_experts, row_bytes, dtype, index, options, ids_dtype, hashed)
    plan = choose(num_tokens, num_experts, dtype, options, with_bias, index, kernel)
    lanes = plan.lanes_per_row
    constants = _ARGS.pack(
        **gate_fields(plan, num_tokens, num_experts, row_bytes, dtype, aligned, options, ids_dtype),
        lanes_per_row=lanes,
        row_shift=lanes.bit_length() - 1,
        num_threads=plan.launch.block,
        softcap=options.softcap,
    )
    return bind(plan.launch, index, _ARGS.num_pointers, constants)


def check_logits(dtype: torch.dtype, num_experts: int, options: GateOptions) -> None:
    if dtype not in _ELEMENTS:
        raise TypeError(f"gating_output: expected torch.float32, float16 or bfloat16, got {dtype}; cast it")
    options.check(num_experts)


def choose(
    num_tokens: int,
    num_experts: int,
    dtype: torch.dtype,
    options: GateOptions,
    with_bias: bool,
    device: int,
    kernel: str | None = None,
) -> GatePlan:
    """The plan for these options."""
    return plan_gate(
        max(1, num_tokens), num_experts, options.topk, options.num_expert_group, dtype.itemsize, with_bias,
        options.softcap != 0, device_limits(device), kernel, options.num_fused_shared_experts,
        options.scoring_func == "softplus_sqrt",
    )  # fmt: skip


def gate_fields(
    plan: GatePlan,
    num_tokens: int,
    num_experts: int,
    row_bytes: int,
    dtype: torch.dtype,
    aligned: bool,
    options: GateOptions,
    ids_dtype: torch.dtype,
) -> dict[str, Any]:
    """Of GateArgs, those that the struct of `route` has, too."""
    return {
        "row_stride": row_bytes,
        "num_tokens": num_tokens,
        "num_experts": num_experts,
        "topk": options.topk,
        "num_groups": options.num_expert_group,
        "topk_group": options.topk_group,
        "group_size": num_experts // options.num_expert_group,
        "element": _ELEMENTS[dtype],
        "id_words": ids_dtype.itemsize // 4,
        "vectors": aligned and plan.vector_bytes > 0 and row_bytes % plan.vector_bytes == 0,
        "scoring": _SCORING[options.scoring_func],
        "renormalize": options.renormalize,
        "factor": options.routed_scaling_factor,
        "num_shared": options.num_fused_shared_experts,
        "shared_weight": options.shared_expert_weight,
    }


def _prepare_hash(
    num_tokens: int,
    num_experts: int,
    row_bytes: int,
    dtype: torch.dtype,
    device: int,
    options: GateOptions,
    ids_dtype: torch.dtype,
    hashed: Hashed,
) -> Launch:
    plan = plan_hash(max(1, num_tokens), options.topk)
    constants = _HASH_ARGS.pack(
        row_stride=row_bytes,
        num_tokens=num_tokens,
        num_experts=num_experts,
        topk=options.topk,
        num_rows=hashed.num_rows,
        element=_ELEMENTS[dtype],
        id_words=ids_dtype.itemsize // 4,
        input_words=hashed.input_bytes // 4,
        table_words=hashed.table_bytes // 4,
        renormalize=options.renormalize,
        lanes_per_row=plan.lanes_per_row,
        row_shift=plan.lanes_per_row.bit_length() - 1,
        factor=options.routed_scaling_factor,
        num_shared=options.num_fused_shared_experts,
        shared_weight=options.shared_expert_weight,
    )
    return bind(plan.launch, device, _HASH_ARGS.num_pointers, constants)


def _can_be_out(out: Any) -> bool:
    return isinstance(out, (tuple, list)) and len(out) == 2 and is_plain(out[0]) and is_plain(out[1])


def check_gate_out(out: Any, shape: tuple[int, ...], device: torch.device) -> None:
    topk_weights, topk_ids = out
    check_tensor("out: topk_weights", topk_weights, _FLOAT, shape, device)
    check_tensor("out: topk_ids", topk_ids, _ID_TYPES, shape, device)


def _fake(
    gating_output: torch.Tensor,
    topk: int,
    ids_dtype: torch.dtype | None,
    num_fused_shared_experts: int,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = gating_output.shape[0], topk + num_fused_shared_experts
    weights = gating_output.new_empty(shape, dtype=torch.float32)
    return weights, weights.new_empty(shape, dtype=ids_dtype or torch.int32)


def _run(
    gating_output: torch.Tensor,
    e_score_correction_bias: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    ids_dtype: torch.dtype | None = None,
    input_ids: torch.Tensor | None = None,
    hash_table: torch.Tensor | None = None,
    out: tuple[torch.Tensor, ...] | None = None,
    kernel: str | None = None,
    **options: Any,
) -> Any:
    """`run_gate` with all options by name, as the dispatcher knows them."""
    tensors = e_score_correction_bias, padding_mask, ids_dtype, out, kernel, input_ids, hash_table
    return run_gate(gating_output, GateOptions(**options), *tensors)


_operator = Operator(
    "gate",
    "Tensor gating_output, SymInt topk, bool renormalize, str scoring_func, int num_expert_group,"
    " int topk_group, Tensor? e_score_correction_bias, float routed_scaling_factor, float softcap,"
    " Tensor? padding_mask, ScalarType? ids_dtype=None, SymInt num_fused_shared_experts=0,"
    " float shared_expert_weight=1.0, Tensor? input_ids=None, Tensor? hash_table=None",
    TopK,
    _run,
    _fake,
)
