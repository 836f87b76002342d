"""How weights of experts are stored in fewer bits, and what they stand for: the specification of formats."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .dispatch.arrays import DLPackArray, from_array
from .dispatch.tensors import PlainTensor, check_layout, check_tensor
from .plans.base import ceil_div
from .values import INT32_MAX, as_int, check_range

WEIGHTS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
SCALES = (torch.float32, torch.bfloat16, torch.float16)
ZEROS = (torch.uint8,)
GROUP_SIZES = (32, 64, 128)
INT4_ZERO = 8  # where no zeros are given
CACHED_FITS = 4096  # sizes that were found to fit


class Places(NamedTuple):
    """Scales or zeros, but for their values."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Stored(NamedTuple):
    """A Quantization, but for values: what a prepared call depends on."""

    format: str
    scales: tuple[Places, Places]
    zeros: tuple[Places | None, Places | None]
    block_rows: int
    block_columns: int


@dataclass(frozen=True, eq=False)
class Quantization:
    """How `w1` and `w2` of `fused_experts(..., quantization=)` are stored: the scales and zeros of each.

    Made by its class methods, which take tensors or arrays with `__dlpack__`, and keep views of these.
    With E experts, and the rows and columns of `w1` [E, 2I, H] (I rows without a gate) or `w2` [E, H, I]:

    method         weights          scales                                     value of a weight
    fp8_block      float8_e4m3fn    [E, rows / 128, columns / 128], up         q * scale
    fp8_channel    float8_e4m3fn    [E, rows]                                  q * scale
    fp8_tensor     float8_e4m3fn    [E]; of `w1` also [E, 2], gate and up      q * scale
    int8           int8             [E, rows], or [E, rows, columns / group]   q * scale
    int4           uint8            [E, rows, columns / group]                 (q - zero) * scale

    Weights of int4 are [E, rows, columns / 2], two a byte. Scales are fp32, bf16 or fp16, the same for both.
    H and I are multiples of 16, in int4 of 32, and of the group size; with a gate, I is a multiple of the
    rows of a block.

    Fields. Scales and zeros, in any strides, have 3 dimensions: [E, blocks of rows, blocks of columns].

    format                "fp8", "int8", "int4"
    w1_scale, w2_scale    [E, R, C]               as given, with dimensions of 1 at the end
    w1_zeros, w2_zeros    [E, R, C] uint8, None   of int4; on GPUs, with bf16, odd ones above 128 count as
                                                  even neighbours
    block_rows            int                     rows with one scale; 0: all, or, where `w1_scale` has two
                                                  for an expert, the first half of the rows of `w1`, and the
                                                  second
    block_columns         int                     columns with one scale; 0: all

    >>> quantization = Quantization.int8(torch.full((1, 32), 0.5), torch.full((1, 16), 0.25))
    >>> w1, w2 = torch.full((1, 32, 16), 6, dtype=torch.int8), torch.full((1, 16, 16), -2, dtype=torch.int8)
    >>> [weights.unique().tolist() for weights in quantization.dequantize(w1, w2)]
    [[3.0], [-0.5]]

    Raises TypeError and ValueError for scales and zeros of another type or number of dimensions; what does
    not fit the weights is found by `check`.
    """

    format: str
    w1_scale: torch.Tensor
    w2_scale: torch.Tensor
    w1_zeros: torch.Tensor | None
    w2_zeros: torch.Tensor | None
    block_rows: int
    block_columns: int

    @classmethod
    def fp8_block(
        cls, w1_scale: DLPackArray, w2_scale: DLPackArray, block_shape: tuple[int, int] = (128, 128)
    ) -> Quantization:
        """Scales [E, ceil(rows / block_shape[0]), ceil(columns / block_shape[1])], as DeepSeek-V3 has them.

        The last block of rows, and of columns, may be a part of one. Columns of a block are a multiple of 32.
        """
        try:
            rows, columns = (as_int("block_shape", value) for value in block_shape)
        except (TypeError, ValueError):
            raise TypeError(
                f"block_shape: expected rows and columns, two ints, got {block_shape!r}"
            ) from None
        check_range("block_shape: rows", rows, INT32_MAX)
        if columns <= 0 or columns % 32:
            raise ValueError(f"block_shape: expected columns that are a multiple of 32, got {columns}")
        scales = _scales(w1_scale, w2_scale, 3)
        return cls("fp8", *scales, None, None, rows, columns)

    @classmethod
    def fp8_channel(cls, w1_scale: DLPackArray, w2_scale: DLPackArray) -> Quantization:
        """Scales [E, rows] or [E, rows, 1]."""
        scales = _scales(w1_scale, w2_scale, 2, 3)
        return cls("fp8", *scales, None, None, 1, 0)

    @classmethod
    def fp8_tensor(cls, w1_scale: DLPackArray, w2_scale: DLPackArray) -> Quantization:
        """Scales [E]; with a gate, of `w1` also [E, 2]: of the first half of its rows, and of the second."""
        scales = _scales(w1_scale, w2_scale, 1, 2)
        return cls("fp8", *scales, None, None, 0, 0)

    @classmethod
    def int8(
        cls, w1_scale: DLPackArray, w2_scale: DLPackArray, group_size: int | None = None
    ) -> Quantization:
        """Scales [E, rows] or [E, rows, 1]; with a `group_size` of 32, 64 or 128, [E, rows, columns / it]."""
        columns = 0 if group_size is None else _group_size(group_size)
        scales = _scales(w1_scale, w2_scale, *((3,) if columns else (2, 3)))
        return cls("int8", *scales, None, None, 1, columns)

    @classmethod
    def int4(
        cls,
        w1_scale: DLPackArray,
        w2_scale: DLPackArray,
        w1_zeros: DLPackArray | None = None,
        w2_zeros: DLPackArray | None = None,
        group_size: int = 128,
    ) -> Quantization:
        """Weights [E, rows, columns / 2], the first of two columns in the low half of a byte, as in vLLM's
        moe_wna16; scales [E, rows, columns / group_size], with a `group_size` of 32, 64 or 128.

        Zeros are uint8 in the shape of the scales, one in a byte; without them, all are 8. `repack_gptq` and
        `repack_awq` make these of checkpoints.
        """
        scales = _scales(w1_scale, w2_scale, 3)
        if (w1_zeros is None) != (w2_zeros is None):
            raise ValueError("w1_zeros, w2_zeros: expected both or neither")
        zeros: tuple[torch.Tensor | None, torch.Tensor | None] = None, None
        if w1_zeros is not None and w2_zeros is not None:
            zeros = _blocks("w1_zeros", w1_zeros, ZEROS, 3), _blocks("w2_zeros", w2_zeros, ZEROS, 3)
        return cls("int4", *scales, *zeros, 1, _group_size(group_size))

    @functools.cached_property
    def stored(self) -> Stored:
        def places(tensor: torch.Tensor | None) -> Any:
            if tensor is None:
                return None
            return Places(tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride())

        scales = places(self.w1_scale), places(self.w2_scale)
        zeros = places(self.w1_zeros), places(self.w2_zeros)
        return Stored(self.format, scales, zeros, self.block_rows, self.block_columns)

    def check(
        self, hidden_states: PlainTensor, w1: PlainTensor, w2: PlainTensor, is_gated: bool
    ) -> tuple[int, int, int]:
        """The number of experts, H and I, of hidden states [T, H] and weights as they are stored.

        Raises TypeError and ValueError unless all are of the types, of the shapes and on the device that they
        should be. Strides are not looked at.
        """
        stored, packed = (WEIGHTS[self.format],), 2 if self.format == "int4" else 1
        hidden, device = hidden_states.shape[-1], hidden_states.device
        num_experts, intermediate = w1.shape[0], w2.shape[-1] * packed
        rows = 2 * intermediate if is_gated else intermediate
        # w2 first: it tells I.
        shape = num_experts, hidden, intermediate // packed
        check_tensor("w2", w2, stored, shape, device, strided=True)
        check_tensor("w1", w1, stored, (num_experts, rows, hidden // packed), device, strided=True)

        _check_fits(self.stored, num_experts, hidden, intermediate, is_gated, device)
        return num_experts, hidden, intermediate

    @torch.no_grad()
    def dequantize(
        self, w1: torch.Tensor, w2: torch.Tensor, experts: int | slice = slice(None)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the weights of an expert, or of several, stand for: of [E, 2I, H] and [E, H, I], in fp32."""

        def values(weights: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
            zero = None if zeros is None else zeros[experts]
            return dequantize(weights[experts], scale[experts], zero, self.block_rows, self.block_columns)

        return values(w1, self.w1_scale, self.w1_zeros), values(w2, self.w2_scale, self.w2_zeros)


@functools.lru_cache(CACHED_FITS)
def _check_fits(
    stored: Stored, num_experts: int, hidden: int, intermediate: int, is_gated: bool, device: torch.device
) -> None:
    """What `Quantization.check` finds by sizes: it takes longer than the rest of a call."""
    is_grouped = stored.block_columns and stored.format != "fp8"
    in_16_bytes = 32 if stored.format == "int4" else 16
    multiple = stored.block_columns if is_grouped else in_16_bytes
    for name, size in (("hidden", hidden), ("intermediate", intermediate)):
        if size % multiple:
            why = "the group size" if is_grouped else f"16 bytes of {stored.format}"
            raise ValueError(
                f"quantization: expected a multiple of {multiple}, {why}, as {name} size, got {size}"
            )
    if is_gated and stored.block_rows and intermediate % stored.block_rows:
        raise ValueError(
            f"quantization: expected a multiple of {stored.block_rows}, the rows of a block, as"
            f" intermediate size, got {intermediate}: a block would have rows of gate and up"
        )

    # One scale for all rows, or one for each half of w1's.
    whole = 2 if is_gated and stored.scales[0].shape[1] == 2 else 1
    rows = 2 * intermediate if is_gated else intermediate
    sizes = (rows, hidden, whole), (hidden, intermediate, 1)
    for name, scale, zeros, (height, width, blocks) in zip(
        ("w1", "w2"), stored.scales, stored.zeros, sizes, strict=True
    ):
        down = ceil_div(height, stored.block_rows) if stored.block_rows else blocks
        across = ceil_div(width, stored.block_columns) if stored.block_columns else 1
        expected = Places(stored.scales[0].dtype, device, (num_experts, down, across), ())
        _check_places(f"quantization: {name}_scale", scale, expected)
        if zeros is not None:
            _check_places(f"quantization: {name}_zeros", zeros, expected._replace(dtype=ZEROS[0]))


def _check_places(name: str, found: Places, expected: Places) -> None:
    if found.dtype != expected.dtype:
        raise TypeError(f"{name}: expected {expected.dtype}, got {found.dtype}; cast it")
    if found.shape != expected.shape:
        raise ValueError(f"{name}: expected shape {list(expected.shape)}, got {list(found.shape)}")
    if found.device != expected.device:
        raise ValueError(
            f"{name}: expected it beside the other tensors on {expected.device}, got {found.device}"
        )


def dequantize(
    weights: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None,
    block_rows: int,
    block_columns: int,
) -> torch.Tensor:
    """The values of [.., rows, columns] in fp32, each rounded once: by the product with its scale.

    weights                  [.., rows, columns]     float8_e4m3fn, int8; or [.., rows, columns / 2] uint8
    scale, zeros             [.., R, C]              of blocks of so many rows and columns, the last of which
                                                     may be parts; 0: as many as make R, or C, blocks
    """
    is_int4 = weights.dtype == WEIGHTS["int4"]
    values = (unpack(weights) if is_int4 else weights).float()
    if is_int4:
        zero = INT4_ZERO if zeros is None else _spread(zeros, values.shape, block_rows, block_columns)
        values -= zero
    return values * _spread(scale, values.shape, block_rows, block_columns)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """[.., n] bytes -> [.., 2n], their halves, low ones first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _spread(blocks: torch.Tensor, shape: torch.Size, block_rows: int, block_columns: int) -> torch.Tensor:
    """[.., R, C] -> [.., rows, columns] in fp32, to each element that of its block."""
    rows, columns = shape[-2:]
    down, across = blocks.shape[-2:]
    height = min(block_rows or rows // down, rows)
    width = min(block_columns or columns // across, columns)
    by_row = blocks.float().repeat_interleave(height, dim=-2)[..., :rows, :]
    return by_row.repeat_interleave(width, dim=-1)[..., :columns]


def _scales(w1_scale: DLPackArray, w2_scale: DLPackArray, *dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _blocks("w1_scale", w1_scale, SCALES, *dims), _blocks("w2_scale", w2_scale, SCALES, *dims)


def _blocks(name: str, array: DLPackArray, dtypes: tuple[torch.dtype, ...], *dims: int) -> torch.Tensor:
    """[E, blocks of rows, blocks of columns] of an array with so many dimensions."""
    tensor = from_array(name, array).detach()
    check_layout(name, tensor)
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}; cast it")
    if tensor.dim() not in dims:
        raise ValueError(
            f"{name}: expected {' or '.join(map(str, dims))} dimensions, got {list(tensor.shape)}"
        )
    return tensor.view(*tensor.shape, *(1,) * (3 - tensor.dim()))


def _group_size(value: Any) -> int:
    size = as_int("group_size", value)
    if size not in GROUP_SIZES:
        raise ValueError(f"group_size: expected one of {', '.join(map(str, GROUP_SIZES))}, got {size}")
    return size
