"""fused_experts in plain PyTorch: expert by expert, in fp32."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import gelu, pad, sigmoid, silu

from ..quantization import Quantization
from . import moe_sum as cpu_sum
from .quantize import quantize

GATED = ("silu", "gelu", "gelu_tanh", "swigluoai", "swigluoai_uninterleave")
PLAIN = ("silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul", "relu2_no_mul")
# Of gates and ups: (up + beta) * gate * sigmoid(alpha * gate), both clamped by limit, the gate from above.
SWIGLU = {  # alpha, beta, limit
    "silu": (1.0, 0.0, math.inf),
    "swigluoai": (1.702, 1.0, 7.0),
    "swigluoai_uninterleave": (1.702, 1.0, 7.0),
}


def activate(
    activation: str, values: torch.Tensor, alpha: float | None = None, limit: float | None = None
) -> torch.Tensor:
    """[.., 2 * I] -> [.., I], gates first, or alternating with ups in swigluoai; [.., I] without a gate."""
    name = activation.removesuffix("_no_mul")
    if activation in PLAIN:
        return _function(name, values)
    if activation == "swigluoai":
        gate, up = values[..., ::2], values[..., 1::2]
    else:
        gate, up = values.chunk(2, dim=-1)
    numbers = swiglu_numbers(activation, alpha, limit)
    if numbers != SWIGLU["silu"]:
        alpha, beta, limit = numbers
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + beta) * gate * sigmoid(alpha * gate)
    return _function(name, gate) * up


def swiglu_numbers(activation: str, alpha: float | None, limit: float | None) -> tuple[float, float, float]:
    """alpha, beta and limit, those of silu where an activation has none; what is not given is its own."""
    own_alpha, beta, own_limit = SWIGLU.get(activation, SWIGLU["silu"])
    return own_alpha if alpha is None else alpha, beta, own_limit if limit is None else limit


def _function(name: str, values: torch.Tensor) -> torch.Tensor:
    if name == "relu2":
        return values.clamp(min=0).square()
    if name == "silu":
        return silu(values)
    return gelu(values, approximate="tanh" if name == "gelu_tanh" else "none")


@torch.no_grad()  # as on a GPU
def fused_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str = "silu",
    apply_router_weight_on_input: bool = False,
    expert_map: torch.Tensor | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    shared_output: torch.Tensor | None = None,
    swiglu_alpha: float | None = None,
    swiglu_limit: float | None = None,
    quantization: Quantization | None = None,
    rows_become_fp8: bool = False,
) -> torch.Tensor:
    """As `cupy_moe.fused_experts`; what each product gives is rounded once, and arguments are not checked.

    Quantised weights are those that they stand for, in fp32. Nothing else is rounded to fewer bits, unless
    `rows_become_fp8`: then what is multiplied by them becomes e4m3 with a scale for 128 columns of a row.
    """
    rows = _as_fp8(hidden_states) if rows_become_fp8 else hidden_states
    num_tokens, topk = topk_ids.shape
    experts = local_experts(topk_ids, len(w1), expert_map).view(-1)
    weights = topk_weights.reshape(-1, 1)
    outputs = hidden_states.new_zeros((num_tokens * topk, w2.shape[1]))
    for expert in experts.unique().tolist():
        if expert < 0:
            continue
        pairs = (experts == expert).nonzero().squeeze(1)
        if quantization is None:
            first, second = w1[expert].float(), w2[expert].float()
        else:
            first, second = quantization.dequantize(w1, w2, expert)
        values = rows[pairs // topk].float() @ first.T
        if w1_bias is not None:
            values = values + w1_bias[expert].float()
        if apply_router_weight_on_input:
            values = values * weights[pairs]
        values = activate(activation, values, swiglu_alpha, swiglu_limit)
        values = _as_fp8(values) if rows_become_fp8 else values.to(hidden_states.dtype).float()
        result = values @ second.T
        if w2_bias is not None:
            result = result + w2_bias[expert].float()
        if not apply_router_weight_on_input:
            result = result * weights[pairs]
        outputs[pairs] = result.to(hidden_states.dtype)
    by_slot = outputs.view(num_tokens, topk, w2.shape[1])
    return cpu_sum.moe_sum(by_slot, routed_scaling_factor=routed_scaling_factor, shared_output=shared_output)


def _as_fp8(rows: torch.Tensor) -> torch.Tensor:
    """What [.., columns] stand for in fp32, once they are e4m3; the last group of columns may be a part."""
    columns = rows.shape[1]
    codes, scales = quantize(pad(rows.float(), (0, -columns % 128)), 128, False, 1e-10, False)
    return (codes.float() * scales.repeat_interleave(128, dim=1))[:, :columns]


def local_experts(topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None) -> torch.Tensor:
    """The expert here of each pair; -1 where there is none."""
    ids = topk_ids.to(torch.int64)
    if expert_map is not None:
        known = (ids >= 0) & (ids < len(expert_map))
        ids = torch.where(known, expert_map.to(torch.int64)[ids.clamp(0, len(expert_map) - 1)], -1)
    return torch.where((ids >= 0) & (ids < num_experts), ids, -1)
