"""The libraries to compare with: installed ones, or those in a folder."""

from __future__ import annotations

import contextlib
import importlib
import runpy
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


def function(peer: str, name: str) -> Any:
    """The operator that the peer registers by this name; None if the version here has none."""
    return getattr(getattr(torch.ops, INSTALLED[peer][2]), name, None)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
