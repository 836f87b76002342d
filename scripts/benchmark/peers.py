"""The libraries to compare with: installed ones, or those in a folder."""

from __future__ import annotations

import contextlib
import importlib
import runpy
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# Peer -> distributions, modules that register its operators, and the namespace of those.
INSTALLED = {
    "vllm": (("vllm",), ("vllm._moe_C", "vllm._moe_C_stable_libtorch"), "_moe_C"),
    "sglang": (("sglang-kernel", "sgl-kernel"), ("sgl_kernel",), "sgl_kernel"),
}
EVERY_VERSION_HAS = "moe_align_block_size"
# Peer -> its adapter in experts_peers.py.
EXPERTS = {
    "vllm": "vllm", "sglang": "sglang", "sglang_fused": "sglang_fused", "grouped_mm": "torch",
    "deepgemm": "deepgemm", "triton_kernels": "triton_kernels",
}  # fmt: skip
EXPERTS_FP8 = {"vllm": "vllm", "sglang": "sglang", "deepgemm": "deepgemm", "sgl_cutlass": "sgl_cutlass"}

# (problem, routing) -> {"layer": call}; filled by load_experts().
adapters: dict[str, Callable[[Any, Any], Mapping[str, Callable[[], torch.Tensor]]]] = {}


def load(folder: Path | None) -> dict[str, str]:
    """Make the peers' operators usable, and return their names and versions ("" if unknown).

    A folder has a `load.py`, whose `peers()` loads the libraries and returns the names of those now usable;
    its `VERSIONS`, if any, says which they are.
    """
    if folder is not None:
        module = runpy.run_path(str(folder / "load.py"))
        loaded, versions = module["peers"](), module.get("VERSIONS", {})
        return {name: versions.get(name, "") for name in INSTALLED if name in loaded}
    found = {}
    for name, (distributions, libraries, _) in INSTALLED.items():
        for library in libraries:
            with contextlib.suppress(ImportError):
                importlib.import_module(library)
        if function(name, EVERY_VERSION_HAS) is not None:
            found[name] = next(filter(None, map(_version, distributions)), "")
    return found


def load_experts(folder: Path, found: Mapping[str, str]) -> dict[str, str]:
    """Make whole layers of the peers usable, beside the operators found; returns all names and versions.

    A folder has an `experts_peers.py` with ADAPTERS, which make a call of the sizes, tensors and routing of a
    layer; `loaded` is told which libraries are there. Whether a peer runs here shows when it is called.
    """
    sys.path.insert(0, str(folder))
    module = importlib.import_module("experts_peers")
    module.loaded.update(moe_C="vllm" in found, sgl_ops="sglang" in found)
    adapters.update(
        (peer, module.ADAPTERS[name])
        for peer, name in {**EXPERTS, **EXPERTS_FP8}.items()
        if name in module.ADAPTERS
    )
    versions = getattr(module, "VERSIONS", {})
    return {**{peer: versions.get(peer, "") for peer in adapters}, **found}


def function(peer: str, name: str) -> Any:
    """The operator that the peer registers by this name; None if the version here has none."""
    return getattr(getattr(torch.ops, INSTALLED[peer][2]), name, None)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
