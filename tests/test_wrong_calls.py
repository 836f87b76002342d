"""Calls that are wrong in one argument: refused by its name, before anything is launched or written.

Each begins as the right call of tests/operator_cases.py, or of `others` below, with an `out` of the right
sizes where there is one. A row changes arguments: it has values for them, or functions of what is right.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from emulator import LAUNCHING
from gpus import H200
from operator_cases import Case, all_cases, comparable

import cupy_moe
from cupy_moe import (
    ExpertParallel,
    Quantization,
    aligned_sizes,
    ep_fused_experts,
    experts_workspace_bytes,
    fused_experts,
    fused_moe,
    repack_awq,
    repack_gptq,
    replicate_experts,
    warmup,
)
from cupy_moe.cuda import launch

# "planned": as on a GPU, up to the launch.
DEVICES = ["cpu", "planned", "cuda"]
Arguments = dict[str, Any]
Row = tuple[type[Exception], str, "Arguments | Callable[[Arguments], Arguments]"]


# ---- right calls


class Call(NamedTuple):
    case: Case
    public: Any  # what is called, of the package
    launches: bool = True  # or leaves all to torch


def plain(function: Callable[..., Any], **arguments: Any) -> Call:
    return Call(Case(function, arguments), function, False)


def world(**arguments: Any) -> ExpertParallel:
    return ExpertParallel(**{"group": dist.group.WORLD, "num_experts": 3, **arguments})


def dispatch(capacity: Any = None, **arguments: Any) -> Any:
    return tuple(world(capacity=capacity).dispatch(**arguments))[:3]


def combine(**arguments: Any) -> Any:
    return world().combine(**arguments)


def half(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape)).view(shape).half() / 64


def quantized() -> Call:
    """fused_experts of weights in int8."""
    arguments = {
        "hidden_states": half(5, 32), "w1": torch.ones(4, 64, 32, dtype=torch.int8),
        "w2": torch.ones(4, 32, 32, dtype=torch.int8), "topk_weights": torch.ones(5, 2),
        "topk_ids": torch.tensor([[0, 1], [2, 3], [-1, 4], [2, 0], [1, 1]]),
        "quantization": Quantization.int8(torch.ones(4, 64), torch.ones(4, 32)),
    }  # fmt: skip
    return Call(Case(fused_experts, arguments), fused_experts)


WORDS, SCALES = torch.zeros(2, 8, 16, dtype=torch.int32), torch.ones(2, 2, 16)
X, IDS = torch.ones(3, 16), torch.tensor([[0, 1], [1, 0], [2, 5]])
TOKENS: Arguments = {"hidden_states": X, "topk_ids": IDS, "topk_weights": torch.ones(3, 2)}
LAYER: Arguments = {
    **TOKENS, "hidden_states": half(3, 16), "w1": half(3, 24, 16), "w2": half(3, 16, 24),
    "activation": "relu2_no_mul",
}  # fmt: skip
A, B, C = torch.ones(2), torch.ones(2, 32), torch.ones(2, 32, 4)
ZEROS = C.byte()


def others() -> dict[str, Call]:
    """Those of functions that are no operators; but for `combine`, which has to have a handle."""
    ep = Case(lambda **given: ep_fused_experts(**{"parallel": world(), **given}), LAYER)
    moe = {"hidden_states": half(5, 16), "gating_output": torch.ones(5, 4), "w1": half(4, 48, 16)}
    return {
        "moe": Call(
            Case(fused_moe, {**moe, "w2": half(4, 16, 24), "topk": 2, "renormalize": True}), fused_moe
        ),
        "int8": quantized(),
        "parallel": Call(Case(lambda **given: (world(**given).dropped,), {}), ExpertParallel, False),
        "dispatch": Call(Case(dispatch, TOKENS), ExpertParallel.dispatch),
        "combine": Call(Case(combine, {}), ExpertParallel.combine),
        "ep": Call(ep, ep_fused_experts),
        "sizes": plain(aligned_sizes, num_ids=6, num_experts=4, block_size=4),
        "bytes": plain(
            experts_workspace_bytes, num_tokens=5, topk=2, hidden=16, intermediate=24, num_experts=4
        ),
        "replicas": plain(replicate_experts, loads=[6.0, 1.0, 1.0], num_ranks=2, num_redundant=1),
        "warmup": plain(warmup),
        "gptq": plain(repack_gptq, qweight=WORDS, scales=SCALES, qzeros=torch.zeros(2, 2, 2).int()),
        "awq": plain(
            repack_awq, qweight=torch.zeros(2, 64, 2).int(), scales=SCALES, qzeros=torch.zeros(2, 2, 2).int()
        ),
        "fp8_block": plain(Quantization.fp8_block, w1_scale=C, w2_scale=C, block_shape=(128, 128)),
        "fp8_channel": plain(Quantization.fp8_channel, w1_scale=B, w2_scale=B),
        "fp8_tensor": plain(Quantization.fp8_tensor, w1_scale=A, w2_scale=A),
        "int8_scales": plain(Quantization.int8, w1_scale=B, w2_scale=B),
        "int4_scales": plain(Quantization.int4, w1_scale=C, w2_scale=C, w1_zeros=ZEROS, w2_zeros=ZEROS),
    }


OPERATORS = {name: Call(case, case.function) for name, case in all_cases().items()}
CALLS = {**OPERATORS, **others()}
ONE_RANK = ("parallel", "dispatch", "combine", "ep")  # exchanges of gloo, which are on the CPU
HAVE_OUT = {*OPERATORS, "moe", "int8", "combine", "ep"}


# ---- changes


def cut(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:-1]


def gaps(tensor: torch.Tensor) -> torch.Tensor:
    """The values with others between them."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


def columns(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mT.contiguous().mT


def meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


def out(number: int, change: Callable[[Any], Any]) -> Arguments:
    """One of several outputs."""
    return {"out": lambda given: (*given[:number], change(given[number]), *given[number + 1 :])}


def swapped(first: str, second: str) -> Callable[[Arguments], Arguments]:
    return lambda given: {first: given[second], second: given[first]}


def fill(*shape: int, dtype: torch.dtype = torch.int32) -> Callable[[Any], torch.Tensor]:
    return lambda _: torch.ones(shape, dtype=dtype)


def none(_: Any) -> None:
    return None


LONG, HALF, FLOAT = torch.Tensor.long, torch.Tensor.half, torch.Tensor.float
DOUBLE, BYTE, FLAT = torch.Tensor.double, torch.Tensor.byte, torch.Tensor.flatten
COMPLEX = torch.complex128
T, V = TypeError, ValueError
HUGE = 2**63

ALIGN: dict[str, Row] = {
    "ids of floats": (T, "topk_ids: expected an integer tensor, got torch.float32", {"topk_ids": FLOAT}),
    "bools": (T, "topk_ids: expected an integer tensor", {"topk_ids": torch.Tensor.bool}),
    "a list": (T, "topk_ids: .*__dlpack__", {"topk_ids": [[2, 0]]}),
    "no ids": (T, "topk_ids: .*got None", {"topk_ids": none}),
    "block_size 0": (V, "block_size: expected 1 to 65536, got 0", {"block_size": 0}),
    "a negative block": (V, "block_size: expected 1 to 65536, got -4", {"block_size": -4}),
    "a block too many": (V, "block_size: expected 1 to 65536, got 65537", {"block_size": 65_537}),
    "half a block": (T, "block_size: expected an int, got float", {"block_size": 0.5}),
    "no experts": (V, "num_experts: .* got 0", {"num_experts": 0, "expert_map": None}),
    "huge experts": (V, "num_experts: .* got 9223372036854775808", {"num_experts": HUGE, "expert_map": None}),
    "a short map": (V, r"expert_map: .*\[8\]", {"expert_map": cut}),
    "a map in rows": (V, r"expert_map: .*got \[1, 8\]", {"expert_map": lambda m: m[None]}),
    "a list of experts": (T, "expert_map: .*got list", {"expert_map": [0] * 8}),
    "a map of floats": (T, "expert_map: expected torch.int32", {"expert_map": FLOAT}),
    "a map with gaps": (V, "expert_map: expected a contiguous", {"expert_map": gaps}),
    "ids for a map": (V, "expert_map: ", lambda a: {"expert_map": a["topk_ids"]}),
    "a flag of words": (T, "pad_sorted_ids: expected a bool, got str", {"pad_sorted_ids": "yes"}),
    "a kernel": (V, "kernel: expected one of 'small'", {"kernel": "fast"}),
    "three outputs": (T, "out: expected the tensors .* 2 of them", {"out": lambda o: o[:2]}),
    "a list in out": (T, "out: expected a tensor for expert_ids, got list", out(1, lambda _: [0])),
    "a short out": (V, "out: sorted_token_ids: expected", out(0, cut)),
    "a wide out": (T, "out: expert_ids: expected torch.int32", out(1, LONG)),
    "out with gaps": (V, "out: expert_ids: .* strides", out(1, gaps)),
    "out elsewhere": (V, "out: num_tokens_post_pad: .* got meta", out(2, meta)),
}
MORE_THAN_INT32 = {"topk_ids": fill(40_000), "num_experts": 65_536, "block_size": 65_536, "expert_map": None}
GATE: dict[str, Row] = {
    "no tensor": (T, "gating_output: expected a torch.Tensor or an array", {"gating_output": 3}),
    "a row": (
        V,
        r"gating_output: expected \[tokens, experts\], got \[8\]",
        {"gating_output": lambda x: x[0]},
    ),
    "doubles": (T, "gating_output: expected torch.float32, .* torch.float64", {"gating_output": DOUBLE}),
    "no experts": (V, "gating_output: number of experts: .* got 0", {"gating_output": lambda x: x[:, :0]}),
    "no topk": (V, "topk: expected 1 to .*, got 0", {"topk": 0, "out": None}),
    "a negative one": (V, "topk: expected 1 to .*, got -1", {"topk": -1}),
    "more than experts": (V, "topk: expected 1 to .*, got 9", {"topk": 9}),
    "a huge one": (V, "topk: expected 1 to ", {"topk": HUGE}),
    "half an expert": (T, "topk: expected an int, got float", {"topk": 2.5}),
    "ids for topk": (T, "topk: expected an int, got torch.Tensor", lambda a: {"topk": a["out"][1]}),
    "a large factor": (V, "routed_scaling_factor: .* fp32 has", {"routed_scaling_factor": 1e39}),
    "a factor of words": (T, "routed_scaling_factor: expected a float", {"routed_scaling_factor": "1"}),
    "shared experts": (V, "num_fused_shared_experts: .* got 65", {"num_fused_shared_experts": 65}),
    "a type of ids": (T, "ids_dtype: expected torch.int32", {"ids_dtype": torch.int16, "out": None}),
    "a kernel": (V, "kernel: expected one of '", {"kernel": "fast"}),
    "an int for out": (T, "out: expected the tensors .*got int", {"out": 3}),
    "ints for out": (T, "out: expected a tensor for topk_weights, got int", out(0, lambda _: 1)),
    "weights and ids": (T, "out: topk_weights: .*float32", {"out": lambda o: (o[1], o[0], *o[2:])}),
    "ids of floats": (T, "out: topk_ids: expected torch.int32", out(1, FLOAT)),
    "few tokens": (V, "out: topk_weights: .* shape", out(0, cut)),
}
SELECTION: dict[str, Row] = {
    "a short bias": (V, r"e_score_correction_bias: .* \[8\]", {"e_score_correction_bias": cut}),
    "a half bias": (T, "e_score_correction_bias: .*float32", {"e_score_correction_bias": HALF}),
    "a list of biases": (T, "e_score_correction_bias: .* list", {"e_score_correction_bias": [1.0] * 8}),
    "a float mask": (T, "padding_mask: expected torch.bool", {"padding_mask": FLOAT}),
    "a short mask": (V, r"padding_mask: .* \[5\]", {"padding_mask": cut}),
}
SOFTCAP: dict[str, Row] = {
    f"a softcap of {value}": (V, "softcap: expected ", {"softcap": value})
    for value in (-1.0, math.nan, math.inf, 1e39)
}
HASH: dict[str, Row] = {
    "ids alone": (T, "input_ids, hash_table: expected both", {"hash_table": None}),
    "a narrow table": (V, r"hash_table: .* \[3, 2\]", {"hash_table": lambda table: table[:, :1]}),
    "a float table": (T, "hash_table: expected torch.int32 or torch.int64", {"hash_table": FLOAT}),
    "few ids": (V, r"input_ids: .* \[5\]", {"input_ids": cut}),
    "short ids": (T, "input_ids: expected torch.int32", {"input_ids": torch.Tensor.short}),
    "ids and table": (V, "(input_ids|hash_table): ", swapped("input_ids", "hash_table")),
    "a bias": (
        V, "hash_table: expected softplus_sqrt without a bias",
        {"e_score_correction_bias": fill(8, dtype=torch.float32)},
    ),
}  # fmt: skip
SUM: dict[str, Row] = {
    "a large factor": (V, "routed_scaling_factor: .* fp32 has", {"routed_scaling_factor": 1e39}),
    "a huge factor": (V, "routed_scaling_factor: .* fp32 has", {"routed_scaling_factor": 10**400}),
    "narrow weights": (V, r"topk_weights: .*\[5, 2\]", {"topk_weights": lambda w: w[:, :1]}),
    "half weights": (T, "topk_weights: expected torch.float32", {"topk_weights": HALF}),
    "half of what is shared": (T, "shared_output: expected torch.float32", {"shared_output": HALF}),
    "shared by others": (V, r"shared_output: .*\[5, 8\]", {"shared_output": cut}),
    "an int for out": (T, "out: expected a tensor for out, got int", {"out": 3}),
    "another out": (T, "out: expected torch.float32, got torch.float16", {"out": HALF}),
    "a short out": (V, r"out: expected shape \[5, 8\]", {"out": cut}),
    "columns": (V, "out: expected rows of neighbouring elements", {"out": columns}),
    "rows that overlap": (V, "out: expected rows that do not overlap", {"out": lambda o: o[:1].expand(5, 8)}),
}
EXPERTS: dict[str, Row] = {
    "fp32": (T, "hidden_states: expected torch.bfloat16", {"hidden_states": FLOAT}),
    "a vector": (V, "hidden_states: expected 2 dimensions", {"hidden_states": lambda x: x[0]}),
    "two dimensions": (V, "w1: expected 3 dimensions", {"w1": lambda w: w[0]}),
    "wide weights": (T, "w2: expected torch.", {"w2": FLOAT}),
    "w1 and w2": (V, "w1: expected shape|w2: expected shape", swapped("w1", "w2")),
    "half of w1": (V, "w1: expected shape", {"w1": lambda w: w[:, : w.shape[1] // 2]}),
    "another w2": (V, "w2: expected shape", {"w2": cut}),
    "columns of w1": (V, "w1: expected rows of neighbouring", {"w1": columns}),
    "an activation": (V, "activation: expected one of 'silu'", {"activation": "swish"}),
    "no activation": (V, "activation: expected one of 'silu'", {"activation": None}),
    "a flag": (T, "apply_router_weight_on_input: .*bool", {"apply_router_weight_on_input": "yes"}),
    "experts": (V, "global_num_experts: expected 4 .*8", {"global_num_experts": 8, "expert_map": None}),
    "a map": (V, r"expert_map: .*\[9\]", {"global_num_experts": 9, "expert_map": fill(6)}),
    "no map": (V, "expert_map: length: expected 1 to", {"expert_map": fill(0)}),
    "gelu's alpha": (V, "swiglu_alpha, .* none", {"activation": "gelu", "swiglu_alpha": 1.0}),
    "an alpha": (T, "swiglu_alpha: expected a float", {"swiglu_alpha": "1"}),
    "a limit": (V, "swiglu_limit: expected 0 or more, got -1", {"swiglu_limit": -1.0}),
    "a limit of NaN": (V, "swiglu_limit: expected 0 or more, got nan", {"swiglu_limit": math.nan}),
    "a factor": (V, "routed_scaling_factor: .* that fp32 has", {"routed_scaling_factor": 1e39}),
    "a bias": (T, "w1_bias: expected torch.float16", {"w1_bias": fill(4, 48)}),
    "a list": (T, "workspace: expected a torch.Tensor, got list", {"workspace": [0]}),
    "floats": (T, "workspace: expected bytes", {"workspace": fill(9999, dtype=torch.float32)}),
    "bytes elsewhere": (T, "workspace: .* on meta", {"workspace": lambda _: torch.zeros(9, device="meta")}),
    "a kernel": (V, "kernel: expected one of '", {"kernel": "fast"}),
    "a word": (T, "quantization: expected a Quantization, got str", {"quantization": "int8"}),
    "narrow rows of out": (V, "out: .* shape", {"out": lambda o: o[:, :8]}),
    "out in columns": (V, "out: .* contiguous", {"out": columns}),
    "a wide out": (T, "out: expected torch.float16", {"out": FLOAT}),
}
ROUTED: dict[str, Row] = {
    "weights and ids": (T, "topk_ids: expected torch.int32", swapped("topk_weights", "topk_ids")),
    "ids of one": (V, r"topk_ids: expected \[tokens, topk\]", {"topk_ids": lambda ids: ids[:, 0]}),
    "few weights": (V, r"topk_weights: expected shape \[5, 2\]", {"topk_weights": lambda w: w[:, :1]}),
    "half weights": (T, "topk_weights: expected torch.float32", {"topk_weights": HALF}),
    "ids of others": (V, "topk_ids: expected shape", {"topk_ids": cut}),
}
ROWS: dict[str, dict[str, Row]] = {
    "align": {
        **ALIGN,
        "more than int32": (V, "block_size: 40000 ids, .* more than int32 can number", MORE_THAN_INT32),
        "topk for a map": (T, "expert_map: .* the order is", {"expert_map": 3}),
        "a flag of twos": (T, "ignore_invalid_experts: expected a bool", {"ignore_invalid_experts": 2}),
        "out for other flags": (V, r"out: sorted_token_ids: .*\[36\]", {"pad_sorted_ids": True}),
        "one out": (T, "out: expected the tensors", {"out": lambda o: o[0]}),
        "an out with more": (V, r"out: expert_ids: .*", out(1, lambda o: o.repeat(2))),
    },
    "batched": {
        "int64 counts": (T, "expert_num_tokens: expected torch.int32", {"expert_num_tokens": LONG}),
        "counts in rows": (V, r"expert_num_tokens: .*\[experts\]", {"expert_num_tokens": lambda c: c[None]}),
        "a list": (T, "expert_num_tokens: .*__dlpack__", {"expert_num_tokens": [2, 0, 5]}),
        "the order": (T, "expert_num_tokens: .*int", swapped("max_tokens_per_batch", "expert_num_tokens")),
        "no rows": (V, "max_tokens_per_batch: expected 1 to", {"max_tokens_per_batch": 0}),
        "half a row": (T, "max_tokens_per_batch: expected an int", {"max_tokens_per_batch": 7.5}),
        "block_size 0": (V, "block_size: expected 1 to 65536", {"block_size": 0}),
        "many slots": (V, "max_tokens_per_batch: .* more than int32", {"max_tokens_per_batch": 2**30}),
        "many rows": (V, "max_tokens_per_batch: expected 1 to", {"max_tokens_per_batch": 2**31}),
        "a row too many": (
            V, "max_tokens_per_batch: .* more than int32",
            {"max_tokens_per_batch": 2**31 - 2, "block_size": 3, "expert_num_tokens": lambda c: c[:1]},
        ),
        "a short out": (V, r"out: sorted_token_ids: .*\[24\]", out(0, cut)),
        "a wide out": (T, "out: expert_ids: expected torch.int32", out(1, LONG)),
    },
    "align_lora": {
        **ALIGN,
        "flat ids": (V, r"topk_ids: expected shape \[tokens, topk\]", {"topk_ids": FLAT}),
        "few adapters": (V, r"token_lora_mapping: .*\[5\]", {"token_lora_mapping": cut}),
        "wide ones": (T, "token_lora_mapping: .*int32", {"token_lora_mapping": LONG}),
        "no mapping": (T, "token_lora_mapping: .*got None", {"token_lora_mapping": none}),
        "the order": (V, "(topk_ids|token_lora_mapping): ", swapped("topk_ids", "token_lora_mapping")),
        "no loras": (V, "(max_loras|adapter_enabled): expected 1 to 1024, got 0", {"max_loras": 0}),
        "half a lora": (T, "max_loras: expected an int", {"max_loras": 0.5}),
        "many slots": (
            V, "max_loras: 1024 times",
            {"max_loras": 1024, "block_size": 65_536, "num_experts": 40, "topk_ids": fill(5, 90),
             "adapter_enabled": None, "expert_map": None},
        ),
        "few flags": (V, r"adapter_enabled: .*\[3\] or longer", {"adapter_enabled": lambda e: e[:2]}),
        "float flags": (T, "adapter_enabled: expected torch.int32", {"adapter_enabled": FLOAT}),
    },
    "sort": {
        **ALIGN,
        "no divisor": (V, "fine_block_size: expected a divisor of 4, got 3", {"fine_block_size": 3}),
        "a negative one": (V, "fine_block_size: expected a divisor", {"fine_block_size": -2}),
        "half a slot": (T, "fine_block_size: expected an int", {"fine_block_size": 0.5}),
        "no flag": (T, "return_counts: expected a bool, got str", {"return_counts": "yes"}),
        "few weights": (V, r"topk_weights: .*\[5, 2\]", {"topk_weights": cut}),
        "half weights": (T, "topk_weights: expected torch.float32", {"topk_weights": HALF}),
        "weights and ids": (T, "topk_weights: .*float32", swapped("topk_weights", "topk_ids")),
        "short offsets": (T, "offsets_dtype: expected", {"offsets_dtype": torch.int8}),
        "no counts": (T, "out: .* for counts, got NoneType", out(5, none)),
        "few counts": (V, r"out: counts: .*\[8\]", out(5, cut)),
    },
    "permute": {
        "a row": (V, r"hidden_states: .* \[rows, hidden\]", {"hidden_states": lambda x: x[0]}),
        "complex": (T, "hidden_states: .* got 16", {"hidden_states": fill(5, 8, dtype=COMPLEX), "out": None}),
        "other tokens": (V, r"topk_ids: .* \[5, topk\]", {"topk_ids": cut}),
        "flat ids": (V, r"topk_ids: .* \[5, topk\]", {"topk_ids": lambda ids: ids[:, 0]}),
        "float ids": (T, "topk_ids: expected an integer tensor", {"topk_ids": FLOAT}),
        "rows and ids": (T, "topk_ids: expected an integer", swapped("hidden_states", "topk_ids")),
        "no experts": (V, "num_experts: expected 1 to 65536, got 0", {"num_experts": 0, "expert_map": None}),
        "no block": (V, "block_size: expected 1 to 65536, got 0", {"block_size": 0}),
        "a short map": (V, r"expert_map: .*\[8\]", {"expert_map": cut}),
        "a wide map": (T, "expert_map: expected torch.int32", {"expert_map": LONG}),
        "flat scales": (V, r"scales: .* \[5, groups\]", {"scales": lambda s: s[:, 0]}),
        "few scales": (V, r"scales: .* \[5, groups\]", {"scales": cut}),
        "complex scales": (T, "scales: .* got 16", {"scales": fill(5, 2, dtype=COMPLEX), "out": None}),
        "short offsets": (T, "offsets_dtype: expected torch.int32 or", {"offsets_dtype": torch.int16}),
        "long offsets": (T, "out: expert_offsets: expected torch.int64", {"offsets_dtype": torch.int64}),
        "no flag": (T, "fill_tail: expected a bool", {"fill_tail": 2}),
        "a kernel": (V, "kernel: expected one of 'direct', 'sorted'", {"kernel": "fast"}),
        "one out": (T, "out: expected the tensors permuted, .*, got torch.Tensor", {"out": lambda o: o[0]}),
        "five": (T, "out: .* 5 of them", {"out": lambda o: o[:5]}),
        "a short out": (V, "out: permuted: .* shape", out(0, cut)),
        "other rows": (T, "out: permuted: expected torch.float32", out(0, HALF)),
        "no indices": (T, "out: .* for inverse_ids, got NoneType", out(1, none)),
        "no place": (T, "out: .* for permuted_scales, got NoneType", out(5, none)),
        "scales in columns": (V, "out: permuted_scales: expected a contiguous", out(5, columns)),
        "scales in rows": (V, "out: permuted_scales: .* column-major", {"column_major_scales": True}),
    },
    "unpermute": {
        **SUM,
        "rows of ints": (T, "(permuted|shared_output): expected torch.", {"permuted": LONG, "out": None}),
        "only ints": (T, "permuted: .*float32", {"permuted": LONG, "out": None, "shared_output": None}),
        "a cube": (V, "permuted: expected two dimensions", {"permuted": lambda p: p[None]}),
        "flat slots": (V, "inverse_ids: expected two dimensions", {"inverse_ids": FLAT}),
        "long slots": (T, "inverse_ids: expected torch.int32", {"inverse_ids": LONG}),
        "slots and weights": (T, "inverse_ids: expected torch.int32", swapped("inverse_ids", "topk_weights")),
        "no offsets": (V, r"expert_offsets: expected shape \[E \+ 1\]", {"expert_offsets": lambda o: o[:0]}),
        "half offsets": (T, "expert_offsets: expected torch.int32 or", {"expert_offsets": HALF}),
    },
    "sum": {
        **SUM,
        "no tensor": (T, "input: expected a torch.Tensor or an array", {"input": 3}),
        "two dimensions": (V, r"input: expected \[tokens, topk, hidden\]", {"input": lambda x: x[0]}),
        "doubles": (
            T, "input: expected torch.float32, .* got torch.float64",
            {"input": DOUBLE, "out": None, "shared_output": None},
        ),
        "float ids": (T, "topk_ids: expected torch.int32 or torch.int64", {"topk_ids": FLOAT}),
        "a list": (T, "topk_ids: .* got list", {"topk_ids": [[1, 2]] * 5}),
        "ids and weights": (T, "topk_weights: .*float32", swapped("topk_weights", "topk_ids")),
        "a wide map": (T, "expert_map: expected torch.int32", {"expert_map": LONG}),
        "a map in rows": (V, r"expert_map: .* \[experts\]", {"expert_map": lambda m: m[None]}),
    },
    "softmax": {**GATE, **SELECTION, **SOFTCAP},
    "sigmoid": {**GATE, **SELECTION, **SOFTCAP},
    "softplus_sqrt": {**GATE, **SELECTION},
    "hash": HASH,
    "grouped": {
        **GATE,
        **SELECTION,
        "no divisor": (V, "num_expert_group: expected a divisor of 8 .*3", {"num_expert_group": 3}),
        "many groups": (V, "num_expert_group: expected 1 to 8, got 9", {"num_expert_group": 9}),
        "more than there are": (V, "topk_group: expected 1 to 4, got 5", {"topk_group": 5}),
        "more than theirs": (V, "topk: expected 1 to 2, got 3", {"topk": 3, "topk_group": 1}),
        "a score": (V, "scoring_func: expected one of 'softmax'", {"scoring_func": "tanh"}),
    },
    "route": {
        **GATE,
        **SELECTION,
        **SOFTCAP,
        "block_size 0": (V, "block_size: expected 1 to 65536, got 0", {"block_size": 0}),
        "half a block": (T, "block_size: expected an int, got float", {"block_size": 1.5}),
        "a score": (V, "scoring_func: expected one of 'softmax'", {"scoring_func": "tanh"}),
        "a shared weight": (V, "shared_expert_weight: .* fp32 has", {"shared_expert_weight": 1e39}),
        "a short map": (V, r"expert_map: .* shape \[9\]", {"expert_map": lambda m: m[:7]}),
        "ids alone": (T, "input_ids, hash_table: expected both", {"input_ids": fill(5)}),
        "two outputs": (T, "out: expected the tensors .*, got 2 of them", {"out": lambda o: o[:2]}),
        "a wide end": (T, "out: num_tokens_post_pad: expected torch.int32", out(4, LONG)),
    },
    "route_hash": HASH,
    "quantize_rows": {
        "no tensor": (T, "x: expected a torch.Tensor or an array", {"x": 3}),
        "a row": (V, r"x: expected \[tokens, hidden\], got \[128\]", {"x": lambda x: x[0]}),
        "doubles": (T, "x: expected torch.float32, float16 or bfloat16", {"x": DOUBLE}),
        "no topk": (V, "topk: expected 1 to 2147483647, got 0", {"topk": 0}),
        "many pairs": (V, "x: expected at most 2147483647 pairs", {"topk": 2**30}),
        **{
            f"an eps of {eps}": (V, "eps: expected 5.3e-36 to", {"eps": eps})
            for eps in (0.0, 5e-36, 1e39, -1.0, math.nan, math.inf)
        },
        "a word": (T, "eps: expected a float", {"eps": "1"}),
        "wide ids": (T, "sorted_token_ids: expected torch.int32", {"sorted_token_ids": LONG}),
        "ids in rows": (V, r"sorted_token_ids: .* \[ids\]", {"sorted_token_ids": lambda ids: ids[None]}),
        "a list": (T, "sorted_token_ids: .* got list", {"sorted_token_ids": [1, 2]}),
        "x and ids": (V, r"x: expected \[tokens, hidden\]", swapped("x", "sorted_token_ids")),
        "one out": (T, "out: expected the tensors q, scales, got torch.Tensor", {"out": lambda o: o[0]}),
        "scales and codes": (T, "out: q: expected torch.float8_e4m3fn", {"out": lambda o: o[::-1]}),
        "a short out": (V, "out: q: .* shape", out(0, cut)),
        "codes in columns": (V, "out: q: .*contiguous", out(0, columns)),
        "half scales": (T, "out: scales: expected torch.float32", out(1, HALF)),
        "wide scales": (V, "out: scales: .* shape", out(1, lambda s: s.repeat(1, 2))),
    },
    "experts": {**EXPERTS, **ROUTED},
    "int8": {
        **{name: row for name, row in EXPERTS.items() if name != "a bias"},
        **ROUTED,
        "16 bits": (T, "w2: expected torch.float16", {"quantization": None}),
        "scales of less": (
            V, "quantization: w1_scale: expected shape",
            {"quantization": lambda q: Quantization.int8(q.w2_scale, q.w2_scale)},
        ),
        "a kernel of 16 bits": (V, "kernel: expected one of 'quantized_8'", {"kernel": "direct"}),
        "rows of 24 bytes": (
            V, "quantization: expected a multiple of 16, .* hidden size, got 24",
            {"hidden_states": lambda x: x[:, :24], "w1": lambda w: w[..., :24], "w2": lambda w: w[:, :24],
             "out": None},
        ),
    },
    "moe": {
        **{name: row for name, row in EXPERTS.items() if name != "no map"},
        "logits of others": (V, r"gating_output: expected shape \[5, 4\]", {"gating_output": cut}),
        "fewer experts": (V, r"gating_output: .* \[5, 4\]", {"gating_output": lambda x: x[:, :3]}),
        "doubles": (T, "gating_output: expected torch.float32", {"gating_output": DOUBLE}),
        "no topk": (V, "topk: expected 1 to", {"topk": 0}),
        "more than experts": (V, "topk: expected 1 to 4, got 5", {"topk": 5}),
        "half an expert": (T, "topk: expected an int", {"topk": 0.5}),
        "a word for a flag": (T, "renormalize: expected a bool", {"renormalize": "yes"}),
        "logits and states": (T, "hidden_states: .*bfloat16", swapped("hidden_states", "gating_output")),
    },
    "parallel": {
        "no experts": (V, "num_experts: expected 1 to 65536, got 0", {"num_experts": 0}),
        "half an expert": (T, "num_experts: expected an int, got float", {"num_experts": 0.5}),
        "a sum": (V, "combine: expected one of 'pairs', 'partial'", {"combine": "sum"}),
        "no capacity": (V, "capacity: expected 1 to", {"capacity": 0}),
        "half a capacity": (T, "capacity: expected an int", {"capacity": 0.5}),
        "huge capacity": (V, "capacity: expected 1 to 2147483647", {"capacity": HUGE}),
        "half of it": (V, "pair_capacity: expected a capacity", {"pair_capacity": 3}),
        "a placement": (V, "placement: expected one of 'linear'", {"placement": "zigzag"}),
        "no placement": (T, "placement: expected a name, .* got NoneType", {"placement": None}),
        "a list of ints": (T, "placement: expected a name, .* got list", {"placement": [0, 1, 2]}),
        "two ranks": (V, "placement: expected the experts of 1 ranks", {"placement": [[0], [1]]}),
        "half experts": (T, "placement: expected an int", {"placement": [[0.5]]}),
        "a map of floats": (V, "placement: .* integers", {"placement": torch.zeros(1, 3)}),
        "a map of bools": (V, "placement: .* integers", {"placement": torch.ones(1, 3) > 0}),
        "a map elsewhere": (V, "placement: .* on meta", {"placement": fill(1, 3)(None).to("meta")}),
        "a sparse map": (T, "placement: expected a dense", {"placement": fill(1, 3)(None).to_sparse()}),
        "a device": (T, "device: expected a torch.device", {"device": "toaster"}),
        "meta": (V, "device: expected a CUDA or CPU", {"device": torch.device("meta")}),
    },
    "dispatch": {
        "a vector": (V, "hidden_states: expected two dimensions", {"hidden_states": lambda x: x[0]}),
        "more than int32": (V, "pair_capacity: expected 0 to 2147483647", {"capacity": 2**30}),
        "short rows": (V, "hidden_states: .* of 16 bytes, got 12", {"hidden_states": lambda x: x[:, :3]}),
        "floats": (T, "topk_ids: expected torch.int32", {"topk_ids": FLOAT}),
        "ids and weights": (T, "topk_ids: expected torch.int32", swapped("topk_ids", "topk_weights")),
        "other tokens": (V, r"topk_ids: expected shape \[3, 2\]", {"topk_ids": cut}),
        "half weights": (T, "topk_weights: expected torch.float32", {"topk_weights": HALF}),
        "odd scales": (V, "scales: .* multiple of 4 bytes, got 3", {"scales": fill(3, 3, dtype=torch.uint8)}),
        "wide scales": (T, "scales: expected elements of up to 4", {"scales": fill(3, 8, dtype=COMPLEX)}),
        "fewer scales": (V, r"scales: expected shape \[3, 8\]", {"scales": fill(2, 8)}),
        "a list": (T, "topk_ids: expected a plain torch.Tensor, got list", {"topk_ids": [[0]]}),
        "meta": (V, "hidden_states: .*meta", {"hidden_states": meta}),
        "sparse": (T, "topk_weights: expected a dense", {"topk_weights": torch.Tensor.to_sparse}),
        "65 experts": (
            V, "topk_ids: topk: expected 1 to 64, got 65",
            {"topk_ids": fill(3, 65), "topk_weights": fill(3, 65, dtype=torch.float32)},
        ),
    },
    "combine": {
        "other rows": (V, r"expert_outputs: expected shape \[5, hidden\]", {"expert_outputs": cut}),
        "a vector": (V, "expert_outputs: expected shape", {"expert_outputs": lambda x: x[0]}),
        "ints": (T, "expert_outputs: expected torch.float32", {"expert_outputs": LONG}),
        "a list": (T, "expert_outputs: expected a plain torch.Tensor", {"expert_outputs": [[1.0]]}),
        "elsewhere": (V, "expert_outputs: .*beside", {"expert_outputs": meta}),
        "no handle": (T, "handle: expected that of a dispatch, got int", {"handle": 3}),
        "the order": (T, "handle: expected", swapped("expert_outputs", "handle")),
        "a factor": (V, "routed_scaling_factor: .* fp32", {"routed_scaling_factor": 1e39}),
        "a word": (T, "routed_scaling_factor: expected a float", {"routed_scaling_factor": "1"}),
        "shared by others": (V, "shared_output: expected shape", {"shared_output": lambda _: X[:2]}),
        "shared ints": (T, "shared_output: expected torch.float32", {"shared_output": fill(3, 16)}),
        "a short out": (V, "out: expected shape", {"out": cut}),
        "a wide out": (T, "out: expected torch.float32", {"out": DOUBLE}),
        "a list for out": (T, "out: expected a plain torch.Tensor", {"out": [0.0]}),
        "columns": (V, "out: expected rows of neighbouring", {"out": columns}),
        "out with a gradient": (V, "out: .* no gradient", {"out": torch.Tensor.requires_grad_}),
    },
    "ep": {
        "no ranks": (T, "parallel: expected an ExpertParallel, got int", {"parallel": 3}),
        "a map": (T, "expert_map: expected none", {"expert_map": fill(3)}),
        "a workspace": (T, "workspace: expected none", {"workspace": fill(999, dtype=torch.uint8)}),
        "fewer experts": (V, "w1: expected the 3 experts of this rank", {"w1": cut, "w2": cut}),
        "w1 of others": (V, "w1: expected shape", {"w1": lambda w: w[:, :8]}),
        "w1 and w2": (V, "(w1|w2): ", swapped("w1", "w2")),
        "fp32": (T, "hidden_states: expected torch.bfloat16", {"hidden_states": FLOAT, "out": None}),
        "ids and weights": (T, "topk_ids: expected torch.int32", swapped("topk_ids", "topk_weights")),
        "an activation": (V, "activation: expected one of", {"activation": "swish"}),
        "a kernel": (V, "kernel: expected one of", {"kernel": "fast"}),
        "a factor": (V, "routed_scaling_factor: .* fp32", {"routed_scaling_factor": 1e39}),
        "a short out": (V, "out: expected shape", {"out": cut}),
        "shared by others": (V, "shared_output: expected shape", {"shared_output": lambda _: half(2, 16)}),
    },
    "sizes": {
        "negative": (V, "num_ids: expected 0 or more, got -1", {"num_ids": -1}),
        "no experts": (V, "num_experts: expected 1 to 65536, got 0", {"num_experts": 0}),
        "no block": (V, "block_size: expected 1 to 65536, got 0", {"block_size": 0}),
        "half a block": (T, "block_size: expected an int, got float", {"block_size": 2.5}),
        "a word": (T, "pad_sorted_ids: expected a bool, got str", {"pad_sorted_ids": "yes"}),
        "huge": (V, "block_size: .* more than int32", {"num_ids": HUGE}),
    },
    "bytes": {
        "negative": (V, "num_tokens: expected 0 to", {"num_tokens": -1}),
        "half a token": (T, "num_tokens: expected an int", {"num_tokens": 0.5}),
        "a float": (T, "topk: expected an int", {"topk": 2.0}),
        "a negative size": (V, "hidden: expected 0 to", {"hidden": -16}),
        "a word": (T, "intermediate: expected an int", {"intermediate": "24"}),
        "no experts": (V, "num_experts: expected 1 to", {"num_experts": 0}),
        "huge": (V, "num_tokens: expected 0 to 2147483647", {"num_tokens": HUGE}),
    },
    "replicas": {
        "no list": (T, "loads: expected a list of floats, got int", {"loads": 3}),
        "words": (T, "loads: expected a list of floats", {"loads": ["1", "2"]}),
        "NaN": (V, "loads: expected numbers from 0 on", {"loads": [1.0, math.nan]}),
        "no loads": (V, "loads: length: expected 1 to", {"loads": []}),
        "no ranks": (V, "num_ranks: expected 1 to 256, got 0", {"num_ranks": 0}),
        "half a rank": (T, "num_ranks: expected an int", {"num_ranks": 0.5}),
        "fewer than none": (V, "num_redundant: expected 0 to 3, got -1", {"num_redundant": -1}),
        "more than fit": (V, "num_redundant: expected 0 to 3, got 4", {"num_redundant": 4}),
    },
    "warmup": {
        f"{value}": (T, "devices: expected an int", {"devices": value})
        for value in ("cuda", 0.5, [True], [0.5], [None])
    },
    "gptq": {
        "one expert": (V, "qweight: expected 3 dim", {"qweight": lambda w: w[0]}),
        "a list": (T, "qweight: expected a torch.Tensor", {"qweight": [1]}),
        "wide words": (T, "qweight: expected torch.int32", {"qweight": LONG}),
        "three bits": (V, "bits: expected 4 or 8, got 3", {"bits": 3}),
        "half a bit": (T, "bits: expected an int", {"bits": 4.0}),
        "a format": (V, "checkpoint_format: expected one of 'gptq'", {"checkpoint_format": "marlin"}),
        "rows": (V, "qweight: expected rows .* of 8, got 12", {"qweight": lambda w: w[..., :12]}),
        "scales of less": (V, r"scales: expected shape \[2, 2, 16\]", {"scales": lambda s: s[..., :8]}),
        "zeros of less": (V, r"qzeros: expected shape \[2, 2, 2\]", {"qzeros": lambda z: z[..., :1]}),
        "the order": (T, "qweight: expected torch.int32", swapped("qweight", "scales")),
        "sparse": (T, "qweight: expected a dense", {"qweight": torch.Tensor.to_sparse}),
        "meta": (V, "qweight: expected a CUDA or CPU", lambda a: {n: meta(t) for n, t in a.items()}),
        "zeros elsewhere": (V, "qzeros: .*beside", {"qzeros": meta}),
        "act-order": (V, "g_idx: .* act-order", {"g_idx": lambda _: (torch.arange(64) % 2).expand(2, 64)}),
        "flat order": (V, r"g_idx: expected shape \[2, 64\]", {"g_idx": lambda _: torch.arange(64) // 32}),
        "float order": (T, "g_idx: expected torch.int32", {"g_idx": fill(2, 64, dtype=torch.float32)}),
        "zeros of 8 bits": (V, "qzeros: expected zeros of 128", {
            "bits": 8, "qzeros": fill(2, 2, 4), "qweight": fill(2, 16, 16)}),
    },
    "awq": {
        "bytes": (T, "qweight: expected torch.int32", {"qweight": BYTE}),
        "double scales": (T, "scales: expected torch.float32", {"scales": DOUBLE}),
        "bytes of zeros": (T, "qzeros: expected torch.int32", {"qzeros": BYTE}),
        "one expert": (V, "qweight: expected 3 dim", {"qweight": lambda w: w[0]}),
        "groups": (V, "scales: expected groups .* got 2 for 7", {"qweight": lambda w: w[:, :7]}),
        "meta": (V, "qweight: expected a CUDA or CPU", lambda a: {n: meta(t) for n, t in a.items()}),
        "odd columns": (
            V, "qweight: expected an even number of columns, got 63",
            {"qweight": lambda w: w[:, :63], "scales": lambda s: s[:, :1], "qzeros": lambda z: z[:, :1]},
        ),
    },
    "fp8_block": {
        "dimensions": (V, "w2_scale: expected 3 dim", {"w2_scale": lambda s: s[0]}),
        "no rows": (V, "block_shape: rows: .* got 0", {"block_shape": (0, 32)}),
        "columns": (V, "block_shape: .* multiple of 32, got 48", {"block_shape": (128, 48)}),
        "a width": (T, "block_shape: expected rows and", {"block_shape": 128}),
        "negative": (V, "block_shape: .* multiple of 32, got -32", {"block_shape": (128, -32)}),
        "huge": (V, "block_shape: rows: expected 1 to", {"block_shape": (HUGE, 128)}),
    },
    "fp8_channel": {
        "of tensors": (V, "w1_scale: expected 2 or 3 dim", {"w1_scale": lambda s: s[0]}),
        "ints": (T, "w2_scale: expected torch.float32", {"w2_scale": LONG}),
        "None": (T, "w1_scale: expected a torch.Tensor", {"w1_scale": none}),
        "doubles": (T, "w1_scale: expected torch.float32", {"w1_scale": DOUBLE}),
        "sparse": (T, "w2_scale: expected a dense", {"w2_scale": torch.Tensor.to_sparse}),
    },
    "fp8_tensor": {
        "of groups": (V, "w1_scale: expected 1 or 2 dim", {"w1_scale": lambda s: s[None, None]}),
        "a number": (T, "w1_scale: expected a torch.Tensor", {"w1_scale": 1.0}),
        "no dimension": (V, "w2_scale: expected 1 or 2 dim", {"w2_scale": lambda s: s[0]}),
        "ints": (T, "w2_scale: expected torch.float32", {"w2_scale": LONG}),
        "sparse": (T, "w1_scale: expected a dense", {"w1_scale": torch.Tensor.to_sparse}),
    },
    "int8_scales": {
        "of groups": (V, "w1_scale: expected 3 dim", {"group_size": 32}),
        "doubles": (T, "w1_scale: expected torch.float32 or", {"w1_scale": DOUBLE}),
        "a list": (T, "w1_scale: expected a torch.Tensor", {"w1_scale": [1.0]}),
        "a group": (V, "group_size: .* 32, 64, 128, got 16", {"group_size": 16}),
        "half a group": (T, "group_size: expected an int", {"group_size": 32.0}),
        "sparse": (T, "w1_scale: expected a dense", {"w1_scale": torch.Tensor.to_sparse}),
    },
    "int4_scales": {
        "zeros of floats": (T, "w2_zeros: expected torch.uint8", {"w2_zeros": FLOAT}),
        "some zeros": (V, "w1_zeros, w2_zeros: expected both", {"w2_zeros": none}),
        "scales of zeros": (T, "w1_scale: expected torch.float32", swapped("w1_scale", "w1_zeros")),
        "a word": (T, "group_size: expected an int", {"group_size": "all"}),
        "no group": (V, "group_size: expected one of 32", {"group_size": 0}),
        "two dimensions": (V, "w2_scale: expected 3 dim", {"w2_scale": lambda s: s[0]}),
    },
}  # fmt: skip
# Groups of columns are all that these have beside the rows.
ROWS["quantize"] = {
    **{name: row for name, row in ROWS["quantize_rows"].items() if name != "wide scales"},
    "another size": (V, "group_size: expected 32, 64 or 128, got 16", {"group_size": 16}),
    "whole rows": (V, "group_size: expected 32, 64 or 128, got 0", {"group_size": 0}),
    "half a group": (T, "group_size: expected an int, got float", {"group_size": 0.5}),
    "no whole groups": (V, "x: expected a multiple of .* got 120", {"x": lambda x: x[:, :120], "out": None}),
    "no bool": (T, "column_major_scales: expected a bool", {"column_major_scales": 2}),
    "scales in rows": (V, r"out: scales: expected strides \(1, 7 or more\)", out(1, torch.Tensor.contiguous)),
    "scales in columns": (V, "out: scales: expected a contiguous", {"column_major_scales": False}),
}  # fmt: skip
ROWS["quantize_silu"] = {
    name: row for name, row in ROWS["quantize"].items() if name not in ("scales in rows", "scales in columns")
}


# ---- what is watched


@contextlib.contextmanager
def watched(device: str) -> Iterator[list[str]]:
    """Launches, uses of the CPU specification and exchanges between ranks; "planned" launches nothing."""
    seen: list[str] = []
    modules = [importlib.import_module(f"cupy_moe.{name}") for name in LAUNCHING]
    prepared = [f for m in modules for n, f in vars(m).items() if n.lstrip("_").startswith("prepare")]

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            seen.append(name)
            return function(*arguments, **named)

        return call

    def bind(plan: Any, *rest: Any) -> Callable[..., Any]:
        run = launch.bind(plan, *rest) if device == "cuda" else lambda *_: None
        return noted(plan.entry, run)

    def forget() -> None:  # launches that were prepared before, or not noted after
        for function in prepared:
            if hasattr(function, "cache_clear"):
                function.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "bind", bind, raising=False)
            if device == "planned" and hasattr(module, "cuda_index"):
                known = module.cuda_index
                index = lambda name, device, known=known: known(name, device) or 0  # noqa: E731
                patch.setattr(module, "cuda_index", index)
                patch.setattr(module, "device_limits", lambda _: H200, raising=False)
            if device == "planned":
                patch.setattr(module, "tensor_map", lambda *_: (0,) * 16, raising=False)
            for name, function in vars(getattr(module, "cpu", None) or object).items():
                if inspect.isfunction(function) and name in SPECIFICATIONS:
                    patch.setattr(module.cpu, name, noted(name, function))
        if device == "planned":
            patch.setattr(torch.Tensor, "get_device", lambda tensor: 0 if tensor.is_cpu else -1)
        patch.setattr(dist, "all_to_all_single", noted("exchange", dist.all_to_all_single))
        forget()
        try:
            yield seen
        finally:
            forget()


SPECIFICATIONS = (
    "moe_align_block_size", "batched_moe_align_block_size", "moe_lora_align_block_size", "moe_sort", "gate",
    "moe_sum", "moe_permute", "moe_unpermute", "quantize", "fused_experts", "route", "pack", "expand",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Quantization):
        return tensors_in(list(vars(value).values()))
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in values for tensor in tensors_in(part)]


def moved(value: Any, device: str, copy: bool = True) -> Any:
    """A copy, so that no row sees what another did."""
    if isinstance(value, torch.Tensor):
        return value.to("cuda" if device == "cuda" else "cpu", copy=copy)
    if isinstance(value, Quantization):
        return Quantization(**{n: moved(getattr(value, n), device, copy) for n in value.__dataclass_fields__})
    if isinstance(value, tuple):
        parts = [moved(part, device, copy) for part in value]
        return value._make(parts) if hasattr(value, "_make") else tuple(parts)
    return value


def memory(value: Any) -> list[torch.Tensor]:
    """A copy of all bytes that tensors have, also of those beside their elements."""
    dense = [t for t in tensors_in(value) if t.layout is torch.strided and not t.is_meta]
    return [
        torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).clone() for t in dense
    ]


@pytest.fixture(scope="module")
def right(group: None) -> Callable[[str, str], Arguments]:
    """The arguments of the right call, with `out` full of poison where there can be one, on a device."""
    received = world().dispatch(**TOKENS)
    calls = {name: dict(call.case.arguments) for name, call in CALLS.items()}
    calls["combine"] |= {"expert_outputs": received.hidden_states, "handle": received.handle}
    for name in HAVE_OUT:
        poison = tuple(torch.full_like(result, 77) for result in results(name, calls[name]))
        calls[name]["out"] = poison if len(poison) > 1 else poison[0]
        if "quant" in name:  # whose codes torch does not fill
            calls[name]["out"] = poison[0].view(torch.float8_e4m3fn), poison[1]
        if calls[name].get("column_major_scales") and "quant" in name:
            calls[name]["out"] = calls[name]["out"][0], columns(poison[1])
    return lambda name, device: {n: moved(value, device) for n, value in calls[name].items()}


def results(name: str, arguments: Arguments) -> tuple[Any, ...]:
    found = CALLS[name].case.function(**arguments)
    return tuple(map(comparable, found)) if isinstance(found, tuple) else (found,)


def changed(arguments: Arguments, change: Any) -> Arguments:
    if callable(change):
        return {**arguments, **change(arguments)}
    new = {name: value(arguments.get(name)) if callable(value) else value for name, value in change.items()}
    return {**arguments, **new}


def names_of(function: Any) -> set[str]:
    """Arguments that a message may name, also those that are passed on."""
    names = set(inspect.signature(function).parameters)
    if function is ExpertParallel.dispatch:
        names |= set(inspect.signature(ExpertParallel).parameters)
    return names | set(inspect.signature(fused_experts).parameters) if "options" in names else names


def refuse(name: str, arguments: Arguments, error: Any, message: str, device: str) -> None:
    before = memory(arguments)
    with watched(device) as seen:
        for _ in range(2):  # the second time with what was prepared, if that was
            with pytest.raises(error) as caught:
                CALLS[name].case.function(**arguments)
    assert type(caught.value) in (error if isinstance(error, tuple) else (error,))
    assert re.match(message, str(caught.value), re.DOTALL), caught.value
    told = re.match(r"\w+", str(caught.value))
    assert told
    assert told[0] in names_of(CALLS[name].public), "an argument is named first"
    assert seen == []
    assert all(torch.equal(a, b) for a, b in zip(memory(arguments), before, strict=True)), "written"


# ---- tests


def on_each_device(rows: list[tuple[str, str]]) -> pytest.MarkDecorator:
    """Operators on all; ranks, who exchange by gloo, on the CPU; what launches nothing where torch is."""
    cases = []
    for name, row in rows:
        devices = ["cpu"] if name in ONE_RANK else DEVICES if CALLS[name].launches else DEVICES[::2]
        for device in devices:
            marks = pytest.mark.gpu if device == "cuda" else ()
            cases.append(pytest.param(name, row, device, marks=marks, id=f"{name}-{row}-{device}"))
    return pytest.mark.parametrize(("name", "row", "device"), cases)


@on_each_device([(name, row) for name, rows in ROWS.items() for row in rows])
def test_a_wrong_call_is_refused_by_name(name: str, row: str, device: str, right: Any) -> None:
    error, message, change = ROWS[name][row]
    arguments = changed(right(name, device), change)
    if device == "cuda":  # what rows have made on the CPU
        arguments = {n: v if is_elsewhere(v) else moved(v, device, False) for n, v in arguments.items()}
    refuse(name, arguments, error, message, device)


def is_elsewhere(value: Any) -> bool:
    return any(tensor.is_meta for tensor in tensors_in(value))


def test_the_table_has_rows_for_all_that_is_public() -> None:
    """Those of gating under one name count for each of the operators that they are for."""
    assert sum(map(len, ROWS.values())) >= 150
    assert set(ROWS) == set(CALLS)
    number: dict[Any, int] = {}
    for name, rows in ROWS.items():
        public = getattr(CALLS[name].public, "__func__", CALLS[name].public)
        number[public] = number.get(public, 0) + len(rows)
    functions = [getattr(cupy_moe, name) for name in cupy_moe.__all__]
    constructors = [v.__func__ for v in vars(Quantization).values() if isinstance(v, classmethod)]
    ranks = [ExpertParallel, ExpertParallel.dispatch, ExpertParallel.combine]
    for function in (*filter(inspect.isfunction, functions), *constructors, *ranks):
        assert number.get(function, 0) >= 5, function


WITH_OUT = [(name, "") for name in CALLS if name in HAVE_OUT]


def outputs(arguments: Arguments) -> list[torch.Tensor]:
    return list(arguments["out"]) if isinstance(arguments["out"], tuple) else [arguments["out"]]


def with_output(arguments: Arguments, number: int, tensor: Any) -> Arguments:
    return changed(
        arguments, out(number, lambda _: tensor) if isinstance(arguments["out"], tuple) else {"out": tensor}
    )


@on_each_device(WITH_OUT)
def test_a_right_call_is_right_and_is_noticed(name: str, row: str, device: str, right: Any) -> None:
    """So what is seen of wrong calls could have been otherwise."""
    arguments = right(name, device)
    before, sizes = memory(arguments), len(tensors_in(arguments))
    with watched(device) as seen:
        CALLS[name].case.function(**arguments)
    assert seen
    if device == "planned":
        return
    expected = results(name, {n: v for n, v in right(name, device).items() if n != "out"})
    assert all(map(torch.equal, map(comparable, outputs(arguments)), expected))
    changes = [not torch.equal(a, b) for a, b in zip(memory(arguments), before, strict=True)]
    inputs = sizes - len(expected)
    assert not any(changes[:inputs])
    assert any(changes[inputs:])


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if name not in HAVE_OUT])
def test_a_right_call_without_out_is_right(name: str, right: Any) -> None:
    if name != "warmup":  # which needs a GPU
        CALLS[name].case.function(**right(name, "cpu"))


# What is read before it is written, all of it, or element by element.
MAY_BE_OUT: dict[str, tuple[str, ...]] = {
    "sum": ("shared_output",),
    "unpermute": ("shared_output",),
    "experts": ("hidden_states", "shared_output"),
    "int8": ("hidden_states",),
    "moe": ("hidden_states", "gating_output"),
}


def share(first: torch.Tensor, second: torch.Tensor, begin: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in one piece of memory, the second from a multiple of 16 bytes on."""
    sizes = first.nbytes, second.nbytes
    whole = torch.zeros(max(sizes) + begin + 16, dtype=torch.uint8, device=first.device)
    one, other = whole[: sizes[0]], whole[begin : begin + sizes[1]]
    new = other.view(second.dtype).view(second.shape)
    return one.view(first.dtype).view(first.shape).copy_(first), new


@on_each_device([(name, "") for name in (*OPERATORS, "moe", "int8")])
def test_outputs_have_memory_of_their_own(name: str, row: str, device: str, right: Any) -> None:
    arguments = right(name, device)
    written = outputs(arguments)
    inputs = [n for n, value in arguments.items() if isinstance(value, torch.Tensor) and n != "out"]
    number_of_pairs = 0
    for number, tensor in enumerate(written):
        if not tensor.is_contiguous():
            continue  # in which others may lie
        for other in inputs:
            begin = 16 if other in MAY_BE_OUT.get(name, ()) else 0
            if other == "gating_output" and name == "moe":
                continue
            given, new = share(arguments[other], tensor, begin)
            call = with_output({**arguments, other: given}, number, new)
            refuse(
                name,
                call,
                ValueError,
                f"(out|workspace)\\b.*memory of its own, got some that {other}",
                device,
            )
            number_of_pairs += 1
        for second in range(number + 1, len(written)):
            if written[second].is_contiguous():
                first, new = share(tensor, written[second])
                call = with_output(with_output(arguments, number, first), second, new)
                refuse(name, call, ValueError, "out: .*memory of its own, got some that out: ", device)
    assert number_of_pairs


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("name", "other"), [(n, o) for n, others in MAY_BE_OUT.items() for o in others])
def test_what_may_be_written_over(name: str, other: str, device: str, right: Any) -> None:
    arguments = right(name, device)
    if arguments[other].shape != arguments["out"].shape:
        return
    expected = results(name, {n: v for n, v in arguments.items() if n != "out"})
    CALLS[name].case.function(**{**arguments, "out": arguments[other]})
    assert torch.equal(arguments[other], expected[0])


@on_each_device(WITH_OUT)
def test_outputs_that_require_a_gradient_are_refused(name: str, row: str, device: str, right: Any) -> None:
    arguments = right(name, device)
    for number, tensor in enumerate(outputs(arguments)):
        if tensor.dtype in (torch.float32, torch.float16):
            call = with_output(arguments, number, tensor.clone().requires_grad_())
            refuse(name, call, ValueError, "out: .*expected a tensor that requires no gradient", device)
            if device != "planned":
                with torch.no_grad():  # where nobody asks
                    CALLS[name].case.function(**call)


@on_each_device([(name, "") for name in ("experts", "moe", "int8")])
def test_a_workspace_is_large_enough_and_of_its_own(name: str, row: str, device: str, right: Any) -> None:
    arguments = right(name, device)
    whole = torch.zeros(20_000, dtype=torch.uint8, device="cuda" if device == "cuda" else "cpu")
    begin = -whole.data_ptr() % 256
    overlapping = whole[begin : begin + arguments["out"].nbytes].view(torch.float16).view_as(arguments["out"])
    call = {**arguments, "workspace": whole[begin:], "out": overlapping}
    refuse(name, call, ValueError, "out: .*memory of its own, got some that workspace has", device)
    # Also where there is no `out`: memory of an input would be written over.
    read = (
        whole[begin : begin + arguments["w2"].nbytes].view(arguments["w2"].dtype).view(arguments["w2"].shape)
    )
    call = {n: v for n, v in arguments.items() if n != "out"} | {"workspace": whole[begin:], "w2": read}
    refuse(name, call, ValueError, "workspace: .*memory of its own, got some that w2 has", device)
    if device != "cpu":  # which takes none
        for wrong in (whole[begin : begin + 512], whole[begin + 16 :], whole[begin:][::2]):
            refuse(
                name, {**arguments, "workspace": wrong}, ValueError, "workspace: expected .* bytes", device
            )


@on_each_device([(name, "") for name in CALLS if CALLS[name].launches])
def test_each_tensor_has_to_be_beside_the_others(name: str, row: str, device: str, right: Any) -> None:
    arguments = right(name, device)
    places = ["meta", "cpu"] if device == "cuda" else ["meta"]
    for place in places:
        for other, given in arguments.items():
            if isinstance(given, torch.Tensor) and other != "out":
                call = {**arguments, other: given.to(place)}
                refuse(name, call, (ValueError, TypeError), rf".*\b{place}\b", device)
        for number, tensor in enumerate(outputs(arguments) if "out" in arguments else []):
            call = with_output(arguments, number, tensor.to(place))
            refuse(name, call, ValueError, rf"out: .*beside .* got {place}", device)


@on_each_device([(name, "") for name in CALLS if CALLS[name].launches])
def test_each_tensor_has_a_type(name: str, row: str, device: str, right: Any) -> None:
    arguments = right(name, device)
    for other, given in arguments.items():
        if name == "dispatch" and other == "hidden_states":
            continue  # which may be of any
        if isinstance(given, torch.Tensor) and other != "out":
            wide = torch.ones(given.shape, dtype=torch.complex128, device=given.device)
            refuse(name, {**arguments, other: wide}, TypeError, r"\w+: .*expected ", device)


@on_each_device([(name, "") for name in (*OPERATORS, "moe", "int8")])
def test_nothing_is_launched_where_memory_was_freed(name: str, row: str, device: str, right: Any) -> None:
    if device == "cpu":
        return  # where torch refuses it

    def freed(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        copy.untyped_storage().resize_(0)
        return copy

    arguments = right(name, device)
    calls = [
        {**arguments, other: freed(given)}
        for other, given in arguments.items()
        if isinstance(given, torch.Tensor) and other != "out"
    ]
    calls += [
        with_output(arguments, number, freed(tensor)) for number, tensor in enumerate(outputs(arguments))
    ]
    for call in calls:
        refuse(name, call, ValueError, r"\w+: .*memory of its own, got one without", device)
