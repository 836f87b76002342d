"""What the engines have in common: replacing their functions and methods, leaving to them what we cannot do,
and filling the buffers that they bring."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..errors import ConfigError, DependencyError
from ..operators.align import aligned_sizes

log = logging.getLogger("cupy_moe")


class Switch:
    """Replaces functions of an engine, wherever in the engine they have been imported to, and methods.

    `functions` are named "module:function" or "module:Class.method"; in the place of a property, ours becomes
    one. An engine of another version may lack some, but not all. One of ours with a parameter `original` gets
    the engine's own there.

    What changes is names in modules of the engine, and in those classes: when it is enabled, all that stand
    for one of the engine's functions; when it is disabled, all that stand for one of ours, so in modules that
    have been imported in between, too. What is kept otherwise, in another class, a table or a partial, or by
    code outside of the engine, stays as it is both times, and so does what somebody else has put in the place
    of ours.
    """

    def __init__(self, engine: str, functions: dict[str, Callable[..., Any]]) -> None:
        self._engine = engine
        self._functions = functions
        self._packages = {place.partition(":")[0].partition(".")[0] for place in functions}
        self._lock = threading.Lock()
        self._pairs: list[tuple[Any, Any]] = []  # the engine's function, ours; none where disabled
        self._classes: list[type] = []  # whose methods are replaced
        self._blocks = 0  # of `with enabled()`, in all threads
        self._stays = False  # also when the last of them ends

    def enable(self) -> None:
        """Use cupy_moe from now on, in all threads; does nothing where it is used already.

        Raises DependencyError, and replaces nothing, where the engine is not installed or cannot be imported.
        """
        homes = self._homes()
        with self._lock:
            self._replace(homes)
            self._stays = True

    def disable(self) -> None:
        """Give the engine its own functions back, inside of `with enabled()`, too."""
        with self._lock:
            self._give_back()
            self._stays = False

    @contextlib.contextmanager
    def enabled(self) -> Iterator[None]:
        """`enable` until the `with` block ends, and any other that overlaps, in whatever thread. What was
        enabled by `enable` stays so."""
        homes = self._homes()
        with self._lock:
            self._replace(homes)
            self._blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if not self._blocks and not self._stays:
                    self._give_back()

    def _homes(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        """The modules and classes that the functions come from, and their names there; imported not under the
        lock, as they may import this."""
        homes = []
        for place, ours in self._functions.items():
            module_name, _, path = place.partition(":")
            class_name, _, name = path.rpartition(".")
            try:
                home = importlib.import_module(module_name)
                homes.append((getattr(home, class_name, None) if class_name else home, name, ours))
            except Exception as error:
                missing = error.name if isinstance(error, ModuleNotFoundError) else None
                if missing and f"{module_name}.".startswith(f"{missing}."):
                    continue  # as in another version; any other module is missing to this one
                raise DependencyError(
                    f"{self._engine}: {module_name} cannot be imported: {type(error).__name__}: {error}"
                ) from error
        return homes

    def _replace(self, homes: list[tuple[Any, str, Callable[..., Any]]]) -> None:
        if self._pairs:
            return
        pairs: dict[int, tuple[Any, Any]] = {}
        for home, name, ours in homes:
            original = getattr(home, name, None)
            if original is not None and id(original) not in pairs:
                taken = any(ours is used for _, used in pairs.values())
                asks = "original" in (ours.__kwdefaults__ or ())
                pairs[id(original)] = original, _twin(ours, original) if taken or asks else ours
        if not pairs:
            raise DependencyError(
                f"{self._engine} is not installed, or has none of {', '.join(self._functions)}"
            )
        self._pairs = list(pairs.values())
        self._classes = [home for home, _, _ in homes if isinstance(home, type)]
        self._exchange(self._pairs)

    def _give_back(self) -> None:
        self._exchange([(ours, original) for original, ours in self._pairs])
        self._pairs = []

    def _exchange(self, pairs: list[tuple[Any, Any]]) -> None:
        """Put the second of each pair in the place of the first; until none is found, as other threads may be
        importing meanwhile what has been found already."""
        second = {id(old): new for old, new in pairs}
        while found := [place for place in self._names() if id(place[2]) in second]:
            for owner, name, old in found:
                setattr(owner, name, second[id(old)])

    def _names(self) -> Iterator[tuple[Any, str, Any]]:
        """All names in all modules of the engine and in the classes: whose, the name, what it stands for."""
        modules = (module for name, module in sys.modules.copy().items() if self._has(name))
        for owner in (*modules, *self._classes):
            for name, value in getattr(owner, "__dict__", {}).copy().items():
                yield owner, name, value

    def _has(self, module_name: str) -> bool:
        return module_name.partition(".")[0] in self._packages


def _twin(function: Any, original: Any) -> Any:
    """Another function that does the same: what stands for two of the engine's must be told apart. A property
    of it, for a property."""
    if isinstance(original, property):
        return property(_twin(function, original.fget))
    twin = types.FunctionType(function.__code__, function.__globals__, argdefs=function.__defaults__)
    functools.update_wrapper(twin, function)
    if function.__kwdefaults__:
        twin.__kwdefaults__ = {**function.__kwdefaults__, "original": original}
    return twin


@contextlib.contextmanager
def unless_refused(original: Any) -> Iterator[None]:
    """Ends where arguments are refused, with one warning for each reason, so that `original` can take them;
    where there is none, the error stays. Operators refuse before their first launch."""
    try:
        yield
    except ConfigError:
        raise
    except (TypeError, ValueError) as refusal:
        if original is None:
            raise
        warn_once("%s runs as the engine's own: %s", original.__qualname__, str(refusal))


_warned: set[tuple[str, str]] = set()


def warn_once(message: str, what: str, reason: str) -> None:
    """Log `message % (what, reason)`: once for a reason, or for the argument whose name it begins with."""
    key = what, reason.partition(":")[0]
    if key not in _warned:
        _warned.add(key)
        log.warning(message, what, reason)


Buffers = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def heads(
    num_ids: int,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
) -> Buffers:
    """The part of an engine's buffers that `out=` takes; `pad_tails` is for the rest."""
    num_slots, num_blocks = aligned_sizes(num_ids, num_experts, block_size)
    slots = _head("sorted_token_ids", sorted_token_ids, num_slots)
    return slots, _head("experts_ids", experts_ids, num_blocks), num_tokens_post_pad


def _head(name: str, buffer: torch.Tensor, length: int) -> torch.Tensor:
    require(name, buffer)
    if buffer.numel() < length:
        raise ValueError(
            f"{name}: expected at least {length} elements (see aligned_sizes), got {buffer.numel()}"
        )
    return buffer if buffer.numel() == length else buffer[:length]


def pad_tails(
    heads: Buffers, num_ids: int, sorted_token_ids: torch.Tensor, experts_ids: torch.Tensor
) -> None:
    """Fill what the buffers have beyond their heads. It comes last: by then, all arguments are checked."""
    for head, buffer, padding in ((heads[0], sorted_token_ids, num_ids), (heads[1], experts_ids, -1)):
        if head is not buffer:
            buffer[head.numel() :].fill_(padding)


def lora_heads(
    num_ids: int,
    num_experts: int,
    block_size: int,
    max_loras: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
) -> Buffers:
    """What `out=` takes of an engine's buffers with a row for each adapter: these, if they are as long as
    results, or others that `fill_lora` copies from."""
    num_slots, num_blocks = aligned_sizes(num_ids, num_experts, block_size)
    made = []
    for name, buffer, length in (
        ("sorted_token_ids", sorted_token_ids, num_slots),
        ("experts_ids", experts_ids, num_blocks),
    ):
        require(name, buffer)
        if buffer.numel() < max_loras * length:
            raise ValueError(
                f"{name}: expected at least {length} elements for each of {max_loras} adapters"
                f" (see aligned_sizes), got {buffer.numel()}"
            )
        fits = buffer.numel() == max_loras * length and buffer.is_contiguous()
        shape = max_loras, length
        made.append(buffer.view(shape) if fits else buffer.new_empty(shape))
    require("num_tokens_post_pad", num_tokens_post_pad)
    return made[0], made[1], num_tokens_post_pad.view(-1)


def fill_lora(
    results: Buffers, num_ids: int, sorted_token_ids: torch.Tensor, experts_ids: torch.Tensor
) -> None:
    """Into rows that are longer than results, and the rest of these."""
    for result, buffer, padding in ((results[0], sorted_token_ids, num_ids), (results[1], experts_ids, -1)):
        if result.data_ptr() != buffer.data_ptr():
            rows = buffer.view(len(result), -1)
            rows[:, : result.shape[1]].copy_(result)
            rows[:, result.shape[1] :].fill_(padding)


def require(name: str, value: Any, dim: int | None = None) -> None:
    """For what an engine has to bring, where the operator would take None, or would not be reached."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if dim not in (None, value.dim()):
        raise ValueError(f"{name}: expected {dim} dimensions, got {list(value.shape)}")


def fp32(bias: Any) -> Any:
    """A correction bias, which engines have in other types, too; the operator refuses what is no tensor."""
    return bias.float() if isinstance(bias, torch.Tensor) else bias
