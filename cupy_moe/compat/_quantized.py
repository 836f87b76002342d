"""What an engine says of the quantised weights of its experts, as a `Quantization`, which is made once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..dispatch.operator import is_watched
from ..dispatch.tensors import is_plain
from ..quantization import Quantization, unpack
from ._engine import require


class _Made(NamedTuple):
    """A Quantization, and what it was made of: tensors, which are not kept alive, and where these were."""

    quantization: Quantization
    described: tuple[str, Sequence[int] | None]
    parts: list[tuple[Callable[[], Any], int]]

    def is_of(self, given: tuple[Any, ...]) -> bool:
        for (tensor, place), part in zip(self.parts, given, strict=True):
            if tensor() is not part or (part is not None and part.data_ptr() != place):
                return False
        return True


_made: dict[int, _Made] = {}  # by the id of the first tensor, as long as that lives


def quantization_of(
    weight_format: str,
    block_shape: Sequence[int] | None,
    w1_scale: Any,
    w2_scale: Any,
    w1_zeros: Any = None,
    w2_zeros: Any = None,
) -> Quantization:
    """What vLLM, SGLang and transformers say of weights, each in the same order.

    weight_format         "fp8", "int8" or "int4"
    block_shape           rows and columns with one scale; of int4, 0 and the size of a group; None: not in
                          blocks, but by channels or tensors, as many as there are scales of `w2`
    w1_scale, w2_scale    as in Quantization, also with dimensions of 1 at the end
    w1_zeros, w2_zeros    [E, rows / 2, groups] uint8, of int4: two rows in a byte, the first in its low half

    The same tensors, where they were before, give the same object. Zeros are read when it is made.

    Raises TypeError and ValueError for what no Quantization is made of.
    """
    given, described = (w1_scale, w2_scale, w1_zeros, w2_zeros), (weight_format, block_shape)
    if is_watched():
        return _make(*described, *given)
    key = id(w1_scale)
    made = _made.get(key)
    if made is not None and made.described == described and made.is_of(given):
        return made.quantization
    quantization = _make(*described, *given)
    if not all(part is None or is_plain(part) for part in given):
        return quantization
    if w1_zeros is not None and w1_zeros.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return quantization  # its zeros are the graph's
        torch.cuda.current_stream(w1_zeros.device).synchronize()  # from now on, any stream may read them
    first = weakref.ref(w1_scale, lambda dead: _forget(key, dead))
    others = (_nothing if part is None else weakref.ref(part) for part in given[1:])
    places = (0 if part is None else part.data_ptr() for part in given)
    _made[key] = _Made(quantization, described, list(zip((first, *others), places, strict=True)))
    return quantization


def _nothing() -> None:
    """In place of a reference."""


def _forget(key: int, dead: Any) -> None:
    made = _made.get(key)
    if made is not None and made.parts[0][0] is dead:
        del _made[key]


def _make(
    weight_format: str,
    block_shape: Sequence[int] | None,
    w1_scale: Any,
    w2_scale: Any,
    w1_zeros: Any,
    w2_zeros: Any,
) -> Quantization:
    require("w1_scale", w1_scale)
    require("w2_scale", w2_scale)
    if weight_format == "int4":
        rows, group_size = block_shape or (0, 0)
        if rows:
            raise ValueError(f"weights of int4 in blocks of {block_shape}")
        zeros = [None if packed is None else _unpacked(packed) for packed in (w1_zeros, w2_zeros)]
        return Quantization.int4(w1_scale, w2_scale, zeros[0], zeros[1], group_size)
    if weight_format == "int8" and not (block_shape is None and w1_zeros is None):
        raise ValueError("weights of 8 bits with zeros, which are 128 where none are given")
    if block_shape is not None:
        rows, columns = block_shape
        return Quantization.fp8_block(w1_scale, w2_scale, (rows, columns))
    w1_scale, w2_scale = (scale.reshape(len(scale), -1) for scale in (w1_scale, w2_scale))
    if weight_format == "int8":
        return Quantization.int8(w1_scale, w2_scale)
    of_tensors = w2_scale.shape[1] == 1
    return (Quantization.fp8_tensor if of_tensors else Quantization.fp8_channel)(w1_scale, w2_scale)


def _unpacked(zeros: torch.Tensor) -> torch.Tensor:
    require("w1_zeros, w2_zeros", zeros, 3)
    return unpack(zeros.transpose(1, 2)).transpose(1, 2).contiguous()
