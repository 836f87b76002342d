"""Experts of Hugging Face transformers 5, on `fused_experts`.

    import cupy_moe.compat.transformers
    cupy_moe.compat.transformers.enable()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="cupy_moe", dtype="auto")

`enable` registers the implementation "cupy_moe" with transformers' `ExpertsInterface`; a model takes it by
its name. Experts that `fused_experts` cannot do (fp32 weights, another activation, a norm behind them,
gradients) run as in transformers' "eager", with one warning for each reason.

Models in finegrained fp8, in blocks or by tensors, have an interface of their own for experts, where it is
registered, too. Static scales of their inputs are not used; those with scales in e8m0, and those in fp4, run
as in "eager". The experts of fbgemm_fp8, which are Llama 4's, are not taken: they get no ids, but rows that
are sorted by expert.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..cpu.experts import GATED, PLAIN, activate
from ..errors import DependencyError
from ..operators.experts import fused_experts
from ._engine import unless_refused
from ._quantized import quantization_of

NAME = "cupy_moe"
_HALVES = (torch.bfloat16, torch.float16)


def enable() -> None:
    """Register "cupy_moe" as an `experts_implementation`. Raises DependencyError without transformers 5."""
    for interface in _interfaces():
        interface.register(NAME, experts_forward)


def disable() -> None:
    """Take the name back; models that were made with it fail when they are called."""
    for interface in _interfaces():
        if NAME in interface:
            interface._global_mapping.pop(NAME)


def _interfaces() -> list[Any]:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except Exception as error:  # also what an unfitting torch or a broken install raises
        raise DependencyError(
            f"transformers 5 cannot be imported ({error}); pip install 'transformers>=5'"
        ) from error
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    except ImportError:  # not in every version
        return [ALL_EXPERTS_FUNCTIONS]
    return [ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS]


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The forward of a module of experts, as transformers calls it."""
    with unless_refused(type(self).forward):
        _check(self, hidden_states)
        first = "gate_up_proj" if self.has_gate else "up_proj"
        w1, w2 = _rows(self, first), _rows(self, "down_proj")
        quantization = None
        if w2.dtype is torch.float8_e4m3fn:
            scales = (getattr(self, f"{name}_scale_inv") for name in (first, "down_proj"))
            quantization = quantization_of("fp8", self.block_size, *scales)
        return fused_experts(
            hidden_states,
            w1,
            w2,
            top_k_weights.to(torch.float32),
            top_k_index,
            _activation(self),
            w1_bias=getattr(self, f"{first}_bias").detach() if self.has_bias else None,
            w2_bias=self.down_proj_bias.detach() if self.has_bias else None,
            quantization=quantization,
        )
    return _eager(self)(self, hidden_states, top_k_index, top_k_weights)


def _check(self: Any, hidden_states: torch.Tensor) -> None:
    """Raises ValueError for a module that is not for `fused_experts`, before weights are turned for it."""
    dtype, stored = hidden_states.dtype, self.down_proj.dtype
    if dtype not in _HALVES or stored not in (dtype, torch.float8_e4m3fn):
        raise ValueError(f"hidden states of {dtype} and weights of {stored}")
    if torch.is_grad_enabled() and (hidden_states.requires_grad or self.down_proj.requires_grad):
        raise ValueError("gradients; call it under torch.no_grad()")
    if getattr(self, "has_post_expert_norm", False):  # not in every version
        raise ValueError("a norm behind the experts")
    if _activation(self) is None:
        raise ValueError("another activation")


def _eager(self: Any) -> Any:
    """The module's own forward. Transformers wraps that of the one class of fp8 once for each layer."""
    forward = type(self).forward
    wrapper = forward.__code__
    return inspect.unwrap(forward, stop=lambda function: function.__code__ is not wrapper)


def _activation(self: Any) -> Any:
    """The name of what the module does between its products, found by trying; None if it is none of ours."""
    if not hasattr(self, "_cupy_moe_activation"):
        values = torch.cat([torch.linspace(-end, end, 32) for end in (9, 900)]).view(4, 16).flip(0)
        with torch.no_grad():
            theirs = self._apply_gate(values) if self.has_gate else self.act_fn(values)
        ours = GATED if self.has_gate else PLAIN
        same = (name for name in ours if torch.allclose(activate(name, values), theirs, rtol=1e-5, atol=1e-6))
        self._cupy_moe_activation = next(same, None)
    return self._cupy_moe_activation


def _rows(self: Any, name: str) -> torch.Tensor:
    """[E, N, K] with neighbouring elements along K. Of weights that are kept the other way round, the memory
    is turned at the first call; their shape stays."""
    weights: torch.Tensor = getattr(self, name).data
    if not self.is_transposed:
        return weights
    rows = weights.transpose(1, 2)
    if not rows.is_contiguous():
        rows = rows.contiguous()
        getattr(self, name).data = rows.transpose(1, 2)
    return rows
