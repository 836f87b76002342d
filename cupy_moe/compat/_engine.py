"""What the engines have in common: replacing their functions, and filling the buffers that they bring."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..align import aligned_sizes
from ..errors import DependencyError


class Switch:
    """Replaces functions of an engine by others, wherever in the engine they have been imported to.

    `functions` are named "module:function". An engine of another version may lack some, but not all.
    """

    def __init__(self, engine: str, functions: dict[str, Callable[..., Any]]) -> None:
        self._engine = engine
        self._functions = functions
        self._packages = {place.partition(":")[0].partition(".")[0] for place in functions}
        self._replaced: list[tuple[Any, str, Any, Any]] = []  # module, name, the engine's function, ours

    def enable(self) -> None:
        """Use cupy_moe from now on. Raises DependencyError where the engine is not installed."""
        if self._replaced:
            return
        for place, ours in self._functions.items():
            module_name, _, name = place.partition(":")
            try:
                original = getattr(importlib.import_module(module_name), name)
            except (ModuleNotFoundError, AttributeError):
                continue
            if original is ours:  # found under another name before
                continue
            for module in [m for m in list(sys.modules.values()) if self._belongs(m)]:
                for attribute in [key for key, value in vars(module).items() if value is original]:
                    setattr(module, attribute, ours)
                    self._replaced.append((module, attribute, original, ours))
        if not self._replaced:
            raise DependencyError(
                f"{self._engine} is not installed, or has none of {', '.join(self._functions)}"
            )

    def disable(self) -> None:
        """Give the engine its own functions back."""
        while self._replaced:
            module, name, original, ours = self._replaced.pop()
            if getattr(module, name, None) is ours:
                setattr(module, name, original)

    @contextlib.contextmanager
    def enabled(self) -> Iterator[None]:
        """`enable` for the length of a `with` block; one that is enabled already stays so."""
        before = bool(self._replaced)
        self.enable()
        try:
            yield
        finally:
            if not before:
                self.disable()

    def _belongs(self, module: Any) -> bool:
        return getattr(module, "__name__", "").partition(".")[0] in self._packages


Buffers = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def heads(
    num_ids: int,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
) -> Buffers:
    """The part of an engine's buffers that `out=` takes; what is longer gets its padding here."""
    num_slots, num_blocks = aligned_sizes(num_ids, num_experts, block_size)
    slots = _head("sorted_token_ids", sorted_token_ids, num_slots, num_ids)
    return slots, _head("expert_ids", expert_ids, num_blocks, -1), num_tokens_post_pad


def _head(name: str, buffer: torch.Tensor, length: int, padding: int) -> torch.Tensor:
    if buffer.numel() < length:
        raise ValueError(
            f"{name}: expected at least {length} elements (see aligned_sizes), got {buffer.numel()}"
        )
    if buffer.numel() == length:
        return buffer
    buffer[length:].fill_(padding)
    return buffer[:length]
