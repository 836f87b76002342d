"""Arrays of other libraries, in and out through DLPack: no copy, ordered with their producer's stream."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch


def from_array(name: str, array: Any) -> torch.Tensor:
    """A tensor that shares the memory of an array with `__dlpack__`. Raises TypeError for anything else."""
    if isinstance(array, torch.Tensor):
        return array
    if not hasattr(array, "__dlpack__"):
        raise TypeError(
            f"{name}: expected a torch.Tensor or an array with __dlpack__ (cupy, jax, numpy),"
            f" got {type(array).__module__}.{type(array).__qualname__}"
        )
    return torch.from_dlpack(array)


def like(array: Any) -> Callable[[torch.Tensor], Any]:
    """What turns a tensor into the kind of array that `array` is; leaves it alone if its library cannot."""
    library = type(array).__module__.partition(".")[0]
    if library == "jaxlib":
        return sys.modules["jax"].dlpack.from_dlpack
    namespace: Any = sys.modules[library]
    if not hasattr(namespace, "from_dlpack") and hasattr(array, "__array_namespace__"):
        namespace = array.__array_namespace__()
    return getattr(namespace, "from_dlpack", lambda tensor: tensor)
