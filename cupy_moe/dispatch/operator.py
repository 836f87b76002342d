"""torch.ops.cupy_moe: the operators as PyTorch's dispatcher knows them, and who has to go through it.

A public function runs at once for plain tensors, as the dispatcher costs as much as the launch. For all else
it calls its `Operator`: that turns arrays of other libraries into tensors and results into such arrays, and
hands tensors that are traced, of a subclass, or not what is in memory to the dispatcher, which knows what to
do about each kind. So no kernel gets the pointer of a tensor that has none, and no graph lacks the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..values import kind_of
from . import arrays
from .tensors import is_plain

_library = torch.library.Library("cupy_moe", "DEF")

# Who may be watching, each asked in some 50 ns: torch.compile; a mode, such as make_fx or FakeTensorMode; a
# transform of torch.func; torch.jit.trace.
is_compiling: Callable[[], bool] = torch.compiler.is_dynamo_compiling
has_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
in_transform: Callable[[], bool] = torch._C._are_functorch_transforms_active
_is_tracing: Callable[[], bool] = torch._C._is_tracing


def is_watched() -> bool:
    """Whether calls have to be seen by the dispatcher, whatever their arguments are."""
    return is_compiling() or has_modes() > 0 or in_transform() or _is_tracing()


class Operator:
    """An operator of torch.ops.cupy_moe, for CPU and CUDA tensors, and its overload `out`.

    `schema` are the arguments as the dispatcher writes them, `results` the names of what comes back.
    `function` takes the arguments by their names, `out` and perhaps `kernel`, and calls the Operator unless
    nobody watches and all tensors are plain. `fake` takes the arguments and makes the results from shapes
    alone. Results that are `optional` may be None, for which the dispatcher has `nothing`; so may what `out`
    has there.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        results: type[tuple[torch.Tensor, ...]] | None,
        function: Callable[..., Any],
        fake: Callable[..., Any],
        optional: tuple[str, ...] = (),
    ) -> None:
        self._optional = optional
        self._results, self._function, self._fake = results, function, fake
        self._outputs: tuple[str, ...] = getattr(results, "_fields", ("out",))
        returned = ", ".join(f"Tensor {output}" for output in self._outputs) if results else "Tensor"
        written = ", ".join(f"Tensor({chr(97 + i)}!) {output}" for i, output in enumerate(self._outputs))
        parsed = torch._C.parse_schema(f"cupy_moe::{name}({schema}) -> ({returned})")
        self._names = tuple(argument.name for argument in parsed.arguments)
        self._tensors = tuple(a.name for a in parsed.arguments if "Tensor" in str(a.type))
        self._required = frozenset(a.name for a in parsed.arguments if str(a.type) == "Tensor")
        self._defaults = {a.name: a.default_value for a in parsed.arguments if a.has_default_value()}
        keywords = "" if any(argument.kwarg_only for argument in parsed.arguments) else " *,"
        _register(f"{name}({schema}) -> ({returned})", self._allocate, self._infer)
        _register(f"{name}.out({schema},{keywords} {written}) -> ()", self._fill, lambda *_, **__: None)
        self._packet = getattr(torch.ops.cupy_moe, name)

    def __call__(self, *values: Any, out: Any = None, kernel: str | None = None, **named: Any) -> Any:
        """The operator on tensors and arrays of any kind, in the order of the schema, or named as there."""
        # Of equal lengths, as dynamo of torch 2.8 knows no others.
        arguments = {**dict(zip(self._names[: len(values)], values, strict=True)), **named}
        given = {name: arguments[name] for name in self._tensors if arguments[name] is not None}
        outputs = self._check(given, out)
        tensors = {name: _as_tensor(name, value) for name, value in given.items()}
        some = next(iter(tensors.values()))
        targets = {
            name: nothing(some) if value is None else _as_tensor("out", value, written=True)
            for name, value in outputs.items()
        }
        arguments.update(tensors)
        if not is_watched() and all(map(is_plain, (*tensors.values(), *targets.values()))):
            forced = {} if kernel is None else {"kernel": kernel}
            results = self._function(**arguments, out=self._bundle(targets), **forced)
        elif kernel is not None:
            raise ValueError(f"kernel={kernel!r}: can be forced for plain tensors only, not in traced code")
        elif out is None:
            results = self._packet(**arguments)
        elif not is_compiling() and any(target.is_neg() for target in targets.values()):
            raise ValueError("out: expected tensors without the negative bit; write to a plain tensor")
        else:
            results = self._packet.out(**arguments, **targets)

        if out is not None:
            return self._results(*outputs.values()) if self._results else out
        first = next(iter(given.values()))
        if not isinstance(first, torch.Tensor):
            convert = arrays.like(first)
            results = (r if r is None else convert(r) for r in results) if self._results else convert(results)
        return self._results(*results) if self._results else results

    def _bundle(self, targets: dict[str, torch.Tensor]) -> Any:
        """What the function takes for `out`."""
        if not targets:
            return None
        return tuple(targets.values()) if self._results else next(iter(targets.values()))

    def _check(self, given: dict[str, Any], out: Any) -> dict[str, Any]:
        """That tensor arguments are tensors or arrays at all; the outputs by name."""
        for name in self._tensors:
            if name not in given and name in self._required:
                raise TypeError(f"{name}: expected a torch.Tensor or an array with __dlpack__, got None")
        for name, value in given.items():
            if not (isinstance(value, torch.Tensor) or hasattr(value, "__dlpack__")):
                raise TypeError(
                    f"{name}: expected a torch.Tensor or an array with __dlpack__ (cupy, jax, numpy),"
                    f" got {kind_of(value)}"
                )
        if out is None:
            return {}
        if self._results is None:
            outputs = (out,)
        elif isinstance(out, (tuple, list)) and len(out) == len(self._outputs):
            outputs = tuple(out)
        else:
            given_out = f"{len(out)} of them" if isinstance(out, (tuple, list)) else kind_of(out)
            raise TypeError(f"out: expected the tensors {', '.join(self._outputs)}, got {given_out}")
        for name, value in zip(self._outputs, outputs, strict=True):
            if value is None and name in self._optional:
                continue
            if not (isinstance(value, torch.Tensor) or hasattr(value, "__dlpack__")):
                raise TypeError(f"out: expected a tensor for {name}, got {kind_of(value)}")
        return dict(zip(self._outputs, outputs, strict=True))

    # What the dispatcher calls, with arguments that equal their defaults left out.

    def _allocate(self, *values: Any, **keywords: Any) -> Any:
        keywords.update(zip(self._names, values, strict=False))
        if has_modes():  # which someone has kept from seeing this call
            with _disable_current_modes():
                results = self._function(**keywords)
        else:
            results = self._function(**keywords)
        if not self._optional:
            return results
        some = keywords[self._tensors[0]]
        return tuple(nothing(some) if result is None else result for result in results)

    def _fill(self, *values: Any, **keywords: Any) -> None:
        targets = {name: keywords.pop(name) for name in self._outputs}
        self._allocate(*values, **keywords, out=self._bundle(targets))

    def _infer(self, *values: Any, **keywords: Any) -> Any:
        return self._fake(**{**self._defaults, **dict(zip(self._names, values, strict=False)), **keywords})


def nothing(tensor: torch.Tensor) -> torch.Tensor:
    """Stands for a result that was not asked for."""
    return tensor.new_empty((0,), dtype=torch.int32)


def _as_tensor(name: str, value: Any, written: bool = False) -> torch.Tensor:
    """A tensor for an array; a subclass that leaves dispatching alone counts as the tensor that it is."""
    if not isinstance(value, torch.Tensor):
        return arrays.from_array(name, value, written=written)
    if is_compiling() or type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return value
    return value.as_subclass(torch.Tensor)


def _register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    # Kernels know no gradient: results require none, as those of a direct call.
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    # Not by register_fake, which asks inspect where it is called, and so wakes every lazy module there is.
    _library.impl(name, fake, "Meta")
