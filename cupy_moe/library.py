"""torch.ops.cupy_moe: the operators as PyTorch's dispatcher knows them, and who has to go through it.

A public function runs at once for plain tensors, as the dispatcher costs as much as the launch. For all else
it calls its `Operator`: that turns arrays of other libraries into tensors and results into such arrays, and
hands tensors that are traced, of a subclass, or not what is in memory to the dispatcher, which knows what to
do about each kind. So no kernel gets the pointer of a tensor that has none, and no graph lacks the kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import arrays
from .arguments import kind_of
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


def _unwatched() -> contextlib.AbstractContextManager[Any]:
    """In a kernel nobody watches, but for modes that someone has kept from seeing this call."""
    return _disable_current_modes() if has_modes() else contextlib.nullcontext()


class Operator:
    """An operator of torch.ops.cupy_moe, for CPU and CUDA tensors, and its overload `out`.

    `schema` are the arguments as the dispatcher writes them, `results` the names of what comes back.
    `function` takes the arguments by their names, `out` and perhaps `kernel`, and calls the Operator unless
    nobody watches and all tensors are plain. `fake` takes the arguments and makes the results from shapes
    alone.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        results: type[tuple[torch.Tensor, ...]] | None,
        function: Callable[..., Any],
        fake: Callable[..., Any],
    ) -> None:
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

    def __call__(self, *values: Any, out: Any = None, kernel: str | None = None) -> Any:
        """The operator on tensors and arrays of any kind; arguments are in the order of the schema."""
        arguments = dict(zip(self._names, values, strict=True))
        given = {name: arguments[name] for name in self._tensors if arguments[name] is not None}
        outputs = self._check(given, out)
        tensors = (*given.values(), *outputs.values())
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
            return self._with_arrays(arguments, given, out, outputs, kernel)
        if not is_watched() and all(map(is_plain, tensors)):
            return self._function(**arguments, out=out, **({} if kernel is None else {"kernel": kernel}))
        if kernel is not None:
            raise ValueError(
                f"kernel={kernel!r}: can be forced for plain tensors only, and not in traced code"
            )
        if out is None:
            results = self._packet(**arguments)
            return self._results(*results) if self._results else results
        # The dispatcher has no way to write these.
        if not is_compiling() and any(output.is_neg() for output in outputs.values()):
            raise ValueError("out: expected tensors without the negative bit; write to a plain tensor")
        self._packet.out(**arguments, **outputs)
        return self._results(*outputs.values()) if self._results else out

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
            if not (isinstance(value, torch.Tensor) or hasattr(value, "__dlpack__")):
                raise TypeError(f"out: expected a tensor for {name}, got {kind_of(value)}")
        return dict(zip(self._outputs, outputs, strict=True))

    def _with_arrays(
        self, arguments: dict[str, Any], given: dict[str, Any], out: Any, outputs: dict[str, Any], kernel: Any
    ) -> Any:
        tensors = {name: arrays.from_array(name, value) for name, value in given.items()}
        targets = [arrays.from_array("out", value, written=True) for value in outputs.values()]
        target = None if out is None else targets if self._results else targets[0]
        results = self(*{**arguments, **tensors}.values(), out=target, kernel=kernel)
        first = next(iter(given.values()))
        if out is not None:
            return self._results(*out) if self._results else out
        if isinstance(first, torch.Tensor):
            return results
        return (
            self._results(*map(arrays.like(first), results)) if self._results else arrays.like(first)(results)
        )

    # What the dispatcher calls, with arguments that equal their defaults left out.

    def _allocate(self, *values: Any, **keywords: Any) -> Any:
        with _unwatched():
            return self._function(**self._plain(values, keywords))

    def _fill(self, *values: Any, **keywords: Any) -> None:
        arguments = self._plain(values, keywords)
        outputs = [arguments.pop(name) for name in self._outputs]
        with _unwatched():
            self._function(**arguments, out=outputs if self._results else outputs[0])

    def _plain(self, values: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
        """The arguments; tensors of a subclass that leaves dispatching alone come here as they are."""
        arguments = self._by_name(values, keywords)
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        return {**arguments, **{name: tensor.as_subclass(torch.Tensor) for name, tensor in tensors.items()}}

    def _infer(self, *values: Any, **keywords: Any) -> Any:
        return self._fake(**self._by_name(values, keywords))

    def _by_name(self, values: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
        return {**self._defaults, **dict(zip(self._names, values, strict=False)), **keywords}


def _register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    # Kernels know no gradient: results require none, as those of a direct call.
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"cupy_moe::{name}", fake, lib=_library)
