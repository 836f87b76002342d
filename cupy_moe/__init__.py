"""Kernels of MoE layers for NVIDIA GPUs. Importing this imports neither torch nor CuPy, creates nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .cuda.modules import warmup as warmup
    from .errors import CompileError as CompileError
    from .errors import ConfigError as ConfigError
    from .errors import CupyMoeError as CupyMoeError
    from .errors import DependencyError as DependencyError
    from .errors import KernelLaunchError as KernelLaunchError
    from .errors import KernelLoadError as KernelLoadError
    from .errors import KernelNotPrebuiltError as KernelNotPrebuiltError
    from .errors import PeerError as PeerError
    from .operators.align import MoEAlignment as MoEAlignment
    from .operators.align import aligned_sizes as aligned_sizes
    from .operators.align import moe_align_block_size as moe_align_block_size
    from .operators.align_batched import batched_moe_align_block_size as batched_moe_align_block_size
    from .operators.align_lora import moe_lora_align_block_size as moe_lora_align_block_size
    from .operators.experts import experts_workspace_bytes as experts_workspace_bytes
    from .operators.experts import fused_experts as fused_experts
    from .operators.experts import fused_moe as fused_moe
    from .operators.gate import TopK as TopK
    from .operators.gate import grouped_topk as grouped_topk
    from .operators.gate import topk_sigmoid as topk_sigmoid
    from .operators.gate import topk_softmax as topk_softmax
    from .operators.gate import topk_softplus_sqrt as topk_softplus_sqrt
    from .operators.moe_sum import moe_sum as moe_sum
    from .operators.permute import MoEPermutation as MoEPermutation
    from .operators.permute import moe_permute as moe_permute
    from .operators.permute import moe_unpermute as moe_unpermute
    from .operators.quantize import Quantized as Quantized
    from .operators.quantize import per_token_group_quant_fp8 as per_token_group_quant_fp8
    from .operators.quantize import per_token_quant_fp8 as per_token_quant_fp8
    from .operators.quantize import (
        silu_and_mul_per_token_group_quant_fp8 as silu_and_mul_per_token_group_quant_fp8,
    )
    from .operators.route import MoERouting as MoERouting
    from .operators.route import route as route
    from .operators.sort import MoESorting as MoESorting
    from .operators.sort import moe_sort as moe_sort
    from .parallel import ExpertParallel as ExpertParallel
    from .parallel import ep_fused_experts as ep_fused_experts
    from .parallel import replicate_experts as replicate_experts
    from .quantization import Quantization as Quantization
    from .repacking import repack_awq as repack_awq
    from .repacking import repack_gptq as repack_gptq

_MODULES = {
    "operators.align": ("MoEAlignment", "aligned_sizes", "moe_align_block_size"),
    "operators.align_batched": ("batched_moe_align_block_size",),
    "operators.align_lora": ("moe_lora_align_block_size",),
    "operators.moe_sum": ("moe_sum",),
    "operators.permute": ("MoEPermutation", "moe_permute", "moe_unpermute"),
    "operators.quantize": (
        "Quantized",
        "per_token_group_quant_fp8",
        "per_token_quant_fp8",
        "silu_and_mul_per_token_group_quant_fp8",
    ),
    "operators.route": ("MoERouting", "route"),
    "operators.sort": ("MoESorting", "moe_sort"),
    "errors": (
        "CompileError",
        "ConfigError",
        "CupyMoeError",
        "DependencyError",
        "KernelLaunchError",
        "KernelLoadError",
        "KernelNotPrebuiltError",
        "PeerError",
    ),
    "operators.experts": ("experts_workspace_bytes", "fused_experts", "fused_moe"),
    "operators.gate": ("TopK", "grouped_topk", "topk_sigmoid", "topk_softmax", "topk_softplus_sqrt"),
    "parallel": ("ExpertParallel", "ep_fused_experts", "replicate_experts"),
    "quantization": ("Quantization",),
    "repacking": ("repack_awq", "repack_gptq"),
    "cuda.modules": ("warmup",),
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
