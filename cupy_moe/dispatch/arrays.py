"""Arrays of other libraries, in and out through DLPack: no copy, ordered with their producer's stream."""

from __future__ import annotations

import ctypes
import inspect
import sys
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch


class DLPackArray(Protocol):
    """What the operators take: torch's tensors, and arrays of any library that exports them as DLPack."""

    def __dlpack__(self, *arguments: Any, **keywords: Any) -> Any: ...
    def __dlpack_device__(self) -> Any: ...


Array = TypeVar("Array", bound=DLPackArray)  # results are of the kind of the first array


def from_array(name: str, array: Any, *, written: bool = False) -> torch.Tensor:
    """A tensor that shares the memory of an array, or of a copy where torch cannot: of negative strides.

    Raises TypeError for what is no array, and ValueError for one that torch cannot take or, if it is to be
    `written`, one that is read-only or would be copied.
    """
    if isinstance(array, torch.Tensor):
        return array
    kind = f"{type(array).__module__}.{type(array).__qualname__}"
    if not hasattr(array, "__dlpack__"):
        raise TypeError(
            f"{name}: expected a torch.Tensor or an array with __dlpack__ (cupy, jax, numpy), got {kind}"
        )
    if type(array).__module__.startswith("numpy.ma"):
        raise ValueError(f"{name}: expected an array without a mask; fill it")
    try:
        is_read_only, is_reversed = _examine(array)
    except Exception as error:  # whatever the library raises for what it cannot export
        raise ValueError(f"{name}: torch cannot take this {kind}: {error}") from error
    if written and (is_read_only or is_reversed):
        what = "is read-only" if is_read_only else "has negative strides"
        raise ValueError(f"{name}: cannot be written, as this {kind} {what}")
    try:
        if is_reversed or (is_read_only and not _takes_read_only):
            array = array.copy()
            if _examine(array)[1]:
                raise ValueError("a copy of it has negative strides, too")
        return torch.from_dlpack(array)
    except Exception as error:
        raise ValueError(f"{name}: torch cannot take this {kind}: {error}") from error


def like(array: Any) -> Callable[[torch.Tensor], Any]:
    """What turns a tensor into the kind of array that `array` is; leaves it alone if its library cannot.

    Of fp8, which most libraries lack, it makes arrays of codes.
    """
    convert = _importer(array)
    return lambda tensor: convert(tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor)


def _importer(array: Any) -> Callable[[torch.Tensor], Any]:
    for kind in type(array).__mro__:
        library = kind.__module__.partition(".")[0]
        if library == "jaxlib":
            return sys.modules["jax"].dlpack.from_dlpack
        if library != "__main__" and hasattr(sys.modules.get(library), "from_dlpack"):
            return getattr(sys.modules[library], "from_dlpack")  # noqa: B009
    if hasattr(array, "__array_namespace__"):
        return getattr(array.__array_namespace__(), "from_dlpack", lambda tensor: tensor)
    return lambda tensor: tensor


# ---- what arrays say of themselves, which torch.from_dlpack does not look at, or aborts over --------------


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # null where the elements are contiguous
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned of dlpack.h, of DLPack 1.0 and later. Before, a DLTensor was all there was."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY
# Older torch speaks a DLPack in which nothing is read-only, and libraries refuse to export what is.
_takes_read_only = "max_version" in inspect.signature(torch.Tensor.__dlpack__).parameters
_IMMUTABLE = ("jax", "jaxlib")  # libraries whose arrays are, whether they say so or not

_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))


def _examine(array: Any) -> tuple[bool, bool]:
    """Whether an array is read-only, and whether any of its strides is negative."""
    try:
        capsule = array.__dlpack__(max_version=(1, 0))
    except TypeError:  # a library from before there were versions
        capsule = array.__dlpack__()
    name = _capsule_name(capsule)
    address = _pointer(capsule, name)
    is_read_only = type(array).__module__.partition(".")[0] in _IMMUTABLE
    if name == b"dltensor_versioned":
        versioned = _Versioned.from_address(address)
        is_read_only = is_read_only or bool(versioned.flags & _READ_ONLY)
        tensor = versioned.tensor
    else:
        tensor = _Tensor.from_address(address)
    return is_read_only, bool(tensor.strides) and any(tensor.strides[i] < 0 for i in range(tensor.ndim))
