"""Activations to fp8 e4m3, with a scale for each group of columns or for each row."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import torch

from ..cpu import quantize as cpu
from ..cuda.launch import CACHED_CALLS, Launch, bind
from ..cuda.limits import device_limits
from ..cuda.structs import ArgumentStruct
from ..dispatch.arrays import Array, DLPackArray
from ..dispatch.operator import Operator, is_watched
from ..dispatch.tensors import (
    PlainTensor,
    address,
    check_layout,
    check_tensor,
    check_written,
    cuda_index,
    is_plain,
)
from ..plans.base import divisor
from ..plans.quantize import QUANTIZE_CHUNK, plan_quantize
from ..values import FLOAT32_MAX, INT32_MAX, as_bool, as_float, as_int, check_range

__all__ = [
    "Quantized",
    "per_token_group_quant_fp8",
    "per_token_quant_fp8",
    "silu_and_mul_per_token_group_quant_fp8",
]

_ARGS = ArgumentStruct(
    "quantize/quantize.cu:QuantizeArgs",
    "rows codes scales ids",
    "i64 row_stride; u32 num_units; Divisor units_per_row; u32 lane_bits, group_size, hidden; float eps;"
    " u32 to_power_of_2; i64 scale_row_stride, scale_group_stride; Divisor topk; u32 num_pairs",
)
_ELEMENTS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_CODES = (torch.float8_e4m3fn, torch.uint8)
_FLOAT, _INT32 = (torch.float32,), (torch.int32,)
GROUP_SIZES = (32, 64, 128)
WHOLE_ROW = 0  # in place of a group size
# Scales of these, and their reciprocals, are normal numbers of fp32.
_LEAST_EPS = 448 * 2.0**-126


if TYPE_CHECKING:  # at run time only from Python 3.11 on

    class Quantized(NamedTuple, Generic[Array]):
        q: Array
        scales: Array

else:

    class Quantized(NamedTuple):
        """What quantising returns: x is about q * scales."""

        q: torch.Tensor  # [N, H] float8_e4m3fn
        scales: torch.Tensor  # [N, H / group_size] fp32, or [N, 1]


class QuantizeOptions(NamedTuple):
    """What is to be done, by the names of the public functions; part of the key of what is cached."""

    group_size: int
    gated: bool
    eps: float
    column_major_scales: bool
    scales_power_of_2: bool
    topk: int

    def checked(self) -> QuantizeOptions:
        """With values of one type each, so that equal ones of others do not find what is cached for them."""
        if tuple(map(type, self)) == _OPTION_TYPES:
            return self
        return QuantizeOptions(
            as_int("group_size", self.group_size),
            as_bool("gated", self.gated),
            as_float("eps", self.eps),
            as_bool("column_major_scales", self.column_major_scales),
            as_bool("scales_power_of_2", self.scales_power_of_2),
            as_int("topk", self.topk),
        )


_OPTION_TYPES = (int, bool, float, bool, bool, int)


def per_token_group_quant_fp8(
    x: Array,
    group_size: int = 128,
    *,
    eps: float = 1e-10,
    column_major_scales: bool = False,
    scales_power_of_2: bool = False,
    sorted_token_ids: DLPackArray | None = None,
    topk: int = 1,
    out: tuple[Array, Array] | None = None,
) -> Quantized[Array]:
    """Quantise activations to fp8 e4m3, with a scale for each group of columns of each row.

    scales[t, g] = max(eps, the largest |x| of the group) / 448
    q[t, c]      = x[t, c] * (1 / scales[t, c / group_size]), rounded to nearest, ties to even

    x                   [T, H]    fp32, fp16, bf16   rows may be strided
    group_size          32, 64 or 128                H is a multiple of it
    eps                 5.3e-36 or more              below which no largest value counts
    column_major_scales                              scales of a column are neighbours, as DeepGEMM takes them
    scales_power_of_2                                round scales up to the next power of two
    sorted_token_ids    [N]       int32              row i of the result is of token [i] of these // topk
    topk                1 or more                    pairs of a token that these ids number
    out                 (q, scales)                  written instead of allocated

    Returns Quantized, with N = T if there are no ids, of
    q                   [N, H]    float8_e4m3fn      contiguous
    scales              [N, H / group_size]  fp32    contiguous; with strides (1, N) if column-major

    `sorted_token_ids` are those of `moe_align_block_size`. Ids outside [0, T * topk) are padding, and give
    rows of zeros.

    NaN becomes NaN (0x7f), infinities become 448 and -448, and neither counts for a scale; so scales are
    finite, and never less than eps / 448, which is that of a group of zeros. Zeros keep their sign. All is
    computed in fp32, each operation rounded by itself, denormal numbers as any others. So results are the
    same to the last bit at every call, on every GPU and on the CPU.

    >>> x = torch.zeros(1, 64)
    >>> x[0, :3], x[0, 40] = torch.tensor([7.0, -1.5, 0.1]), 448.0
    >>> q, scales = per_token_group_quant_fp8(x, group_size=32)
    >>> scales.tolist(), q[0, :3].tolist(), q[0, 40].item()
    ([[0.015625, 1.0]], [448.0, -96.0, 6.5], 448.0)

    `out`: q may be uint8, for the codes; scales with `column_major_scales` may have strides (1, S) with any
    S from N on, such as multiples of 4 for TMA.

    Cost: one launch on torch's current stream, no synchronisation, and the outputs as the only allocation;
    `x` is read once. Where rows are no multiples of 16 bytes or not aligned to them, elements are loaded one
    by one; `x` is copied first where the elements of a row are strided, and so are ids. Arrays with
    `__dlpack__` (cupy, jax, numpy) are accepted, and give arrays of their kind, of codes (uint8).

    Raises TypeError and ValueError for wrong arguments, before anything is launched; what loading a kernel
    for the first time raises; and KernelLaunchError. Semantics: vLLM's `per_token_group_quant_fp8` and
    SGLang's `sgl_per_token_group_quant_8bit`, with ids beside.
    """
    options = QuantizeOptions(group_size, False, eps, column_major_scales, scales_power_of_2, topk)
    return _grouped(x, options, sorted_token_ids, out)


def per_token_quant_fp8(
    x: Array,
    *,
    eps: float = 1e-10,
    scales_power_of_2: bool = False,
    sorted_token_ids: DLPackArray | None = None,
    topk: int = 1,
    out: tuple[Array, Array] | None = None,
) -> Quantized[Array]:
    """As `per_token_group_quant_fp8`, with one scale for each row: [N, 1]; H may be any size.

    >>> q, scales = per_token_quant_fp8(torch.tensor([[1.0, -2.0, 0.5], [0.0, torch.inf, 3.5]]))
    >>> q.tolist(), [round(scale, 6) for scale in scales[:, 0].tolist()]
    ([[224.0, -448.0, 112.0], [0.0, 448.0, 448.0]], [0.004464, 0.007812])

    Semantics: vLLM's `scaled_fp8_quant` with `use_per_token_if_dynamic`, and SGLang's
    `sgl_per_token_quant_fp8`. Errors and cost are those of `per_token_group_quant_fp8`, but of rows of more
    than 16 384 elements, what is past these is read twice.
    """
    options = QuantizeOptions(WHOLE_ROW, False, eps, False, scales_power_of_2, topk)
    return _quantize(x, options, sorted_token_ids, out)


def silu_and_mul_per_token_group_quant_fp8(
    x: Array,
    group_size: int = 128,
    *,
    eps: float = 1e-10,
    column_major_scales: bool = False,
    scales_power_of_2: bool = False,
    sorted_token_ids: DLPackArray | None = None,
    topk: int = 1,
    out: tuple[Array, Array] | None = None,
) -> Quantized[Array]:
    """As `per_token_group_quant_fp8` of silu(gate) * up, of x [T, 2 * H] with all gates before all ups.

    silu(gate) * up is computed in fp32 and quantised as that, without being rounded to the type of `x`.
    silu(v) is v / (1 + e^-v) within 7e-6 of its value from v = -86 on, by operations that are the same
    everywhere; below, it is no further off zero than v * 2^-124. So an infinite gate gives infinity.

    >>> x = torch.cat([torch.full((1, 32), 30.0), torch.full((1, 32), -2.0)], dim=1)
    >>> q, scales = silu_and_mul_per_token_group_quant_fp8(x, group_size=32)
    >>> q.shape, q[0, 0].item(), round(scales.item() * 448, 3)
    (torch.Size([1, 32]), -448.0, 60.0)

    Semantics: SGLang's `sgl_per_token_group_quant_8bit` with `fuse_silu_and_mul`. Errors and cost are those
    of `per_token_group_quant_fp8`.
    """
    options = QuantizeOptions(group_size, True, eps, column_major_scales, scales_power_of_2, topk)
    return _grouped(x, options, sorted_token_ids, out)


def _grouped(x: Any, options: QuantizeOptions, sorted_token_ids: Any, out: Any) -> Any:
    group_size = as_int("group_size", options.group_size)
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size: expected 32, 64 or 128, got {group_size}")
    return _quantize(x, options, sorted_token_ids, out)


def _quantize(
    x: PlainTensor,
    options: QuantizeOptions,
    sorted_token_ids: PlainTensor | None = None,
    out: tuple[PlainTensor, ...] | None = None,
) -> Any:
    if (
        is_watched()
        or not is_plain(x)
        or not (sorted_token_ids is None or is_plain(sorted_token_ids))
        or not (out is None or _can_be_out(out))
    ):
        named: dict[str, Any] = dict(zip(QuantizeOptions._fields, options, strict=True))
        return _operator(x=x, sorted_token_ids=sorted_token_ids, out=out, **named)
    options = options.checked()
    try:
        (num_tokens, width), strides = x.shape, x.stride()
        if width > 1 and strides[1] != 1:
            x = x.contiguous()
            strides = x.stride()
        source = x.data_ptr()
    except (RuntimeError, ValueError):
        check_layout("x", x)
        raise ValueError(f"x: expected [tokens, hidden], got {list(x.shape)}") from None
    device = x.device
    num_rows = num_tokens
    if sorted_token_ids is not None:
        check_layout("sorted_token_ids", sorted_token_ids)
        if sorted_token_ids.dim() != 1:
            raise ValueError(f"sorted_token_ids: expected shape [ids], got {list(sorted_token_ids.shape)}")
        num_rows = len(sorted_token_ids)
        check_tensor("sorted_token_ids", sorted_token_ids, _INT32, (num_rows,), device, strided=True)
        sorted_token_ids = sorted_token_ids.contiguous()
    hidden, num_groups = _sizes(width, options)
    if out is None:
        q = torch.empty((num_rows, hidden), dtype=torch.float8_e4m3fn, device=device)
        if options.column_major_scales:
            scales = torch.empty((num_groups, num_rows), dtype=torch.float32, device=device).t()
        else:
            scales = torch.empty((num_rows, num_groups), dtype=torch.float32, device=device)
    else:
        q, scales = out
        check_tensor("out: q", q, _CODES, (num_rows, hidden), device)
        check_scales(
            "out: scales", scales, (num_rows, num_groups), device, options.column_major_scales, _FLOAT
        )
        check_written(("out: q", "out: scales"), (q, scales), x=x, sorted_token_ids=sorted_token_ids)
    target = q.data_ptr()
    launch = _prepare(
        (num_tokens, width), strides[0], scales.stride(), num_rows, x.dtype, device,
        (source | target) % 16 == 0, options,
    )  # fmt: skip
    if launch is None:
        codes, new_scales = cpu.quantize(
            x, options.group_size, options.gated, options.eps, options.scales_power_of_2, sorted_token_ids,
            options.topk,
        )  # fmt: skip
        with torch.no_grad():
            q.view(torch.uint8).copy_(codes.view(torch.uint8))
            scales.copy_(new_scales)
    elif scales.numel():
        launch(
            source or address("x", x), target or address("out: q", q), address("out: scales", scales),
            0 if sorted_token_ids is None else address("sorted_token_ids", sorted_token_ids),
        )  # fmt: skip
    return Quantized(q, scales)


def _sizes(width: int, options: QuantizeOptions) -> tuple[int, int]:
    """Of columns and of scales of a row of the result, for so many columns of `x`."""
    hidden = width // 2 if options.gated else width
    return hidden, hidden // options.group_size if options.group_size else 1


@functools.lru_cache(CACHED_CALLS)
def _prepare(
    shape: tuple[int, int],
    row_stride: int,
    scale_strides: tuple[int, int],
    num_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
    options: QuantizeOptions,
) -> Launch | None:
    """The launch, checked and bound; None on the CPU. `aligned`: x and q are at multiples of 16 bytes."""
    if dtype not in _ELEMENTS:
        raise TypeError(f"x: expected torch.float32, float16 or bfloat16, got {dtype}; cast it")
    num_tokens, width = shape
    multiple = (options.group_size or 1) * (2 if options.gated else 1)
    if width % multiple:
        raise ValueError(f"x: expected a multiple of {multiple} columns, got {width}")
    if not _LEAST_EPS <= options.eps <= FLOAT32_MAX:
        raise ValueError(f"eps: expected 5.3e-36 to the largest number of fp32, got {options.eps}")
    check_range("topk", options.topk, INT32_MAX)
    num_pairs = num_tokens * options.topk
    if max(num_pairs, num_rows) > INT32_MAX or width > INT32_MAX:
        raise ValueError(f"x: expected at most {INT32_MAX} pairs and columns, got {num_pairs} and {width}")
    index = cuda_index("x", device)
    if index is None:
        return None
    hidden, _ = _sizes(width, options)
    group_size = options.group_size or hidden
    row_bytes = row_stride * dtype.itemsize if num_tokens > 1 else 0
    vectors = aligned and row_bytes % 16 == 0 and hidden % QUANTIZE_CHUNK == 0
    plan = plan_quantize(
        max(1, num_rows), hidden, group_size, _ELEMENTS[dtype], vectors, options.gated, device_limits(index)
    )
    constants = _ARGS.pack(
        row_stride=row_bytes,
        num_units=plan.num_units,
        units_per_row=divisor(plan.units_per_row),
        lane_bits=plan.lane_bits,
        group_size=group_size,
        hidden=hidden,
        eps=options.eps,
        to_power_of_2=options.scales_power_of_2,
        scale_row_stride=scale_strides[0],
        scale_group_stride=scale_strides[1],
        topk=divisor(options.topk),
        num_pairs=num_pairs,
    )
    return bind(plan.launch, index, _ARGS.num_pointers, constants)


def prepare_groups(
    num_rows: int, hidden: int, row_stride: int, dtype: torch.dtype, device: torch.device
) -> Launch:
    """`per_token_group_quant_fp8` of rows on a GPU, bound: takes rows, q, scales and no ids, at multiples of
    16 bytes, contiguous but for the rows."""
    options = QuantizeOptions(GROUP_SIZES[-1], False, 1e-10, False, False, 1)
    scale_strides = hidden // options.group_size, 1
    launch = _prepare((num_rows, hidden), row_stride, scale_strides, num_rows, dtype, device, True, options)
    assert launch is not None  # which it is on the CPU alone
    return launch


def _can_be_out(out: Any) -> bool:
    return isinstance(out, (tuple, list)) and len(out) == 2 and is_plain(out[0]) and is_plain(out[1])


def check_scales(
    name: str,
    scales: torch.Tensor,
    shape: tuple[int, int],
    device: torch.device,
    column_major: bool,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    check_tensor(name, scales, dtypes, shape, device, strided=column_major)
    if column_major:
        (num_rows, num_groups), strides = shape, scales.stride()
        if (num_rows > 1 and strides[0] != 1) or (num_groups > 1 and strides[1] < num_rows):
            raise ValueError(
                f"{name}: expected strides (1, {num_rows} or more), as they are to be column-major,"
                f" got {strides}"
            )


def _fake(
    x: torch.Tensor, sorted_token_ids: torch.Tensor | None, **values: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    options = QuantizeOptions(**values)
    num_rows = (x if sorted_token_ids is None else sorted_token_ids).shape[0]
    hidden, num_groups = _sizes(x.shape[1], options)
    q = x.new_empty((num_rows, hidden), dtype=torch.float8_e4m3fn)
    if options.column_major_scales:
        return q, x.new_empty((num_groups, num_rows), dtype=torch.float32).t()
    return q, x.new_empty((num_rows, num_groups), dtype=torch.float32)


def _run(
    x: torch.Tensor,
    sorted_token_ids: torch.Tensor | None = None,
    out: tuple[torch.Tensor, ...] | None = None,
    **options: Any,
) -> Any:
    """`_quantize` with all options by name, as the dispatcher knows them."""
    return _quantize(x, QuantizeOptions(**options), sorted_token_ids, out)


_operator = Operator(
    "quantize",
    "Tensor x, SymInt group_size, bool gated, float eps, bool column_major_scales, bool scales_power_of_2,"
    " SymInt topk, Tensor? sorted_token_ids=None",
    Quantized,
    _run,
    _fake,
)
