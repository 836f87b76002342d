"""torch.ops.cupy_moe: the operators as PyTorch's dispatcher knows them, for torch.compile and torch.export.

Each file of operators registers its own when it is imported, so `torch.ops.cupy_moe.x` exists once
`cupy_moe.x` has been looked up. Direct calls do not come through here: the dispatcher costs as much as the
launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("cupy_moe", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator for CPU and CUDA tensors; `fake` makes its outputs from shapes alone."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"cupy_moe::{name}", fake, lib=_library)


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether something watches what is done to the tensor: then the operator has to go through torch.ops."""
    return (
        torch.compiler.is_dynamo_compiling()
        or type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    )
