"""MoE routing kernels for NVIDIA GPUs. Importing this imports neither torch nor CuPy, and creates nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .align import MoEAlignment as MoEAlignment
    from .align import aligned_sizes as aligned_sizes
    from .align import moe_align_block_size as moe_align_block_size
    from .align_batched import batched_moe_align_block_size as batched_moe_align_block_size
    from .combine import moe_sum as moe_sum
    from .errors import CompileError as CompileError
    from .errors import ConfigError as ConfigError
    from .errors import CupyMoeError as CupyMoeError
    from .errors import DependencyError as DependencyError
    from .errors import KernelLaunchError as KernelLaunchError
    from .errors import KernelLoadError as KernelLoadError
    from .errors import KernelNotPrebuiltError as KernelNotPrebuiltError
    from .gate import TopK as TopK
    from .gate import grouped_topk as grouped_topk
    from .gate import topk_sigmoid as topk_sigmoid
    from .gate import topk_softmax as topk_softmax
    from .modules import warmup as warmup

_MODULES = {
    "align": ("MoEAlignment", "aligned_sizes", "moe_align_block_size"),
    "align_batched": ("batched_moe_align_block_size",),
    "combine": ("moe_sum",),
    "errors": (
        "CompileError",
        "ConfigError",
        "CupyMoeError",
        "DependencyError",
        "KernelLaunchError",
        "KernelLoadError",
        "KernelNotPrebuiltError",
    ),
    "gate": ("TopK", "grouped_topk", "topk_sigmoid", "topk_softmax"),
    "modules": ("warmup",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["__version__", *_HOME]


if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
