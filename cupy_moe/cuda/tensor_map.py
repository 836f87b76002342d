"""Tensors as Hopper's copies of boxes see them, which the driver encodes in 128 bytes."""

from __future__ import annotations

import ctypes
import functools
import struct

from ..errors import KernelLaunchError
from .driver import INVALID_CONTEXT, driver_function, errors_of
from .structs import TENSOR_MAP_WORDS

_TYPES = {"fp8": 0, "f16": 6, "bf16": 9}  # CUtensorMapDataType
_NO_INTERLEAVE, _SWIZZLE_128_BYTES, _PROMOTE_TO_128_BYTES, _ZEROS_OUTSIDE = 0, 3, 2, 0
MAPS = 4096  # that are remembered, of 200 bytes each: two for every layer of a model


@functools.lru_cache(MAPS)
def tensor_map(
    address: int, element: str, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> tuple[int, ...]:
    """The words of a TensorMap, innermost dimension first; `strides`, in bytes, are of all dimensions but
    that. Rows of a box are 128 bytes, which lie in shared memory as `chunk_offset` of experts.cuh says."""
    rank = len(sizes)
    memory = ctypes.create_string_buffer(8 * TENSOR_MAP_WORDS + 64)
    begin = -(-ctypes.addressof(memory) // 64) * 64
    arguments = (
        begin, _TYPES[element], rank, address, (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides), (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank), _NO_INTERLEAVE, _SWIZZLE_128_BYTES, _PROMOTE_TO_128_BYTES,
        _ZEROS_OUTSIDE,
    )  # fmt: skip
    encode = driver_function("cuTensorMapEncodeTiled")
    status = encode(*arguments)
    if status == INVALID_CONTEXT:  # a new thread has none before its first runtime call
        from .._cupy import cupy

        with errors_of("no context to map tensors in"):
            cupy.cuda.runtime.free(0)
        status = encode(*arguments)
    if status:
        raise KernelLaunchError(
            f"the driver cannot map a tensor of {sizes}, strides {strides}: error {status}"
        )
    return struct.unpack(f"@{TENSOR_MAP_WORDS}Q", ctypes.string_at(begin, 8 * TENSOR_MAP_WORDS))
