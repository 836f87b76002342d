"""Quantising to fp8 in plain PyTorch: in fp32, each operation rounded by itself."""

from __future__ import annotations

import torch

LARGEST = 448.0  # number of e4m3
NAN_CODE = 0x7F


@torch.no_grad()  # as on a GPU
def quantize(
    x: torch.Tensor,
    group_size: int,
    gated: bool = False,
    eps: float = 1e-10,
    scales_power_of_2: bool = False,
    sorted_token_ids: torch.Tensor | None = None,
    topk: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and scales that the functions of `cupy_moe.operators.quantize` give, on the tensor's device.

    With a `group_size` of 0, each row is one group. Arguments are not checked.
    """
    values = x.to(torch.float32)
    if gated:
        gate, up = values.chunk(2, dim=1)
        values = silu(gate) * up
    if sorted_token_ids is not None:
        values = _gathered(values, sorted_token_ids.to(torch.int64), topk)
    num_rows, hidden = values.shape
    num_groups = hidden // group_size if group_size else 1
    groups = values.view(num_rows, num_groups, group_size or hidden)
    magnitudes = torch.where(groups.isfinite(), groups.abs(), 0.0)
    floor = magnitudes.new_full((num_rows, num_groups, 1), eps)
    largest = torch.cat([floor, magnitudes], dim=2).amax(dim=2)
    # A tensor, as on a GPU a number's reciprocal would be multiplied instead.
    scales = largest / torch.full_like(largest, LARGEST)
    if scales_power_of_2:
        scales = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    scaled = (groups * scales.reciprocal()[:, :, None]).view(num_rows, hidden)
    codes = scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(scaled.isnan(), NAN_CODE, codes).view(torch.float8_e4m3fn), scales


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x) within 7e-6 of its value from x = -86 on, by operations that any IEEE arithmetic has.

    e^-x is 2^n * 2^f, the latter by a polynomial, for f in [-0.5, 0.5].
    """
    power = (x * -1.4426950408889634).clamp(-125.0, 125.0).nan_to_num()
    n = power.round()
    f = power - n
    y = f * 0.00958275 + 0.05590615
    y = f * y + 0.24024099
    y = f * y + 0.69312423
    y = f * y + 1.0
    y = y * ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    return x * (1.0 + y).reciprocal()


def _gathered(values: torch.Tensor, ids: torch.Tensor, topk: int) -> torch.Tensor:
    """The rows of the ids' tokens; zeros for padding."""
    exists = (ids >= 0) & (ids < len(values) * topk)
    rows = values.new_zeros((len(ids), values.shape[1]))
    rows[exists] = values[ids[exists] // topk]
    return rows
