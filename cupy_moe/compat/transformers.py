"""Experts of Hugging Face transformers 5, on `fused_experts`.

    import cupy_moe.compat.transformers
    cupy_moe.compat.transformers.enable()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="cupy_moe", dtype="auto")

`enable` registers the implementation "cupy_moe" with transformers' `ExpertsInterface`; a model takes it by
its name. Experts that `fused_experts` cannot do (fp32 weights, another activation, a norm behind them,
gradients) run as in transformers' "eager", with one warning for each reason.
"""

from __future__ import annotations

from typing import Any

import torch

from ..cpu.experts import GATED, PLAIN, activate
from ..errors import DependencyError
from ..operators.experts import fused_experts
from ._engine import warn_once

NAME = "cupy_moe"
_HALVES = (torch.bfloat16, torch.float16)


def enable() -> None:
    """Register "cupy_moe" as an `experts_implementation`. Raises DependencyError without transformers 5."""
    _interface().register(NAME, experts_forward)


def disable() -> None:
    """Take the name back; models that were made with it fail when they are called."""
    interface = _interface()
    if NAME in interface:
        interface._global_mapping.pop(NAME)


def _interface() -> Any:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except Exception as error:  # also what an unfitting torch or a broken install raises
        raise DependencyError(
            f"transformers 5 cannot be imported ({error}); pip install 'transformers>=5'"
        ) from error
    return ALL_EXPERTS_FUNCTIONS


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The forward of a module of experts, as transformers calls it."""
    reason = _cannot(self, hidden_states)
    if reason:
        warn_once("%s runs as in transformers' eager: %s", type(self).__name__, reason)
        return type(self).forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)
    w1, w2 = (_rows(self, name) for name in ("gate_up_proj" if self.has_gate else "up_proj", "down_proj"))
    bias = "gate_up_proj_bias" if self.has_gate else "up_proj_bias"
    return fused_experts(
        hidden_states,
        w1,
        w2,
        top_k_weights.to(torch.float32),
        top_k_index,
        _activation(self),
        w1_bias=getattr(self, bias).detach() if self.has_bias else None,
        w2_bias=self.down_proj_bias.detach() if self.has_bias else None,
    )


def _cannot(self: Any, hidden_states: torch.Tensor) -> str:
    """Why the module is not for `fused_experts`; "" if it is."""
    weights = self.down_proj
    if weights.dtype not in _HALVES or hidden_states.dtype != weights.dtype:
        return f"hidden states of {hidden_states.dtype} and weights of {weights.dtype}"
    if torch.is_grad_enabled() and (hidden_states.requires_grad or weights.requires_grad):
        return "gradients; call it under torch.no_grad()"
    if getattr(self, "has_post_expert_norm", False):  # not in every version
        return "a norm behind the experts"
    if hidden_states.shape[-1] % 8 or weights.shape[1] % 8 or weights.shape[2] % 8:
        return "sizes that are no multiples of 8"
    if _activation(self) is None:
        return "another activation"
    return ""


def _activation(self: Any) -> Any:
    """The name of what the module does between its products, found by trying; None if it is none of ours."""
    if not hasattr(self, "_cupy_moe_activation"):
        values = torch.linspace(-9, 9, 32).view(2, 16).flip(0)
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
