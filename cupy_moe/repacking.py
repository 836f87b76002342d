"""Weights as checkpoints of GPTQ and AWQ have them, brought into the order of `Quantization`, at loading."""

from __future__ import annotations

from typing import Any

import torch

from .dispatch.arrays import DLPackArray, from_array
from .dispatch.tensors import check_tensor, cuda_index
from .quantization import SCALES, unpack
from .values import as_int, check_choice

_INT32 = (torch.int32,)
_IDS = (torch.int32, torch.int64)
# Where in a word of AWQ the first, the second.. of eight values is, in fours of bits.
_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


@torch.no_grad()
def repack_gptq(
    qweight: DLPackArray,
    scales: DLPackArray,
    qzeros: DLPackArray,
    g_idx: DLPackArray | None = None,
    bits: int = 4,
    *,
    checkpoint_format: str = "gptq",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Weights, scale and zeros for `Quantization.int4`, or `int8`, of experts that GPTQ has quantised.

    With K columns of the weights (what is summed over), N rows, G groups of columns and P = 32 / bits:

    qweight              [E, K / P, N]  int32             of P columns, the first in the low bits
    scales               [E, G, N]      fp32, bf16, fp16
    qzeros               [E, G, N / P]  int32             of P rows, the first in the low bits
    g_idx                [E, K]         int32, int64      the group of each column; or empty
    bits                 4 or 8
    checkpoint_format                                     of the checkpoint's quantization_config: in "gptq",
                                                          which is also called v1, `qzeros` have zeros less
                                                          one; in "gptq_v2", zeros

    Returns, all contiguous:

    weights              [E, N, K / 2] uint8; [E, N, K] int8 of 8 bits
    scale                [E, N, G] as `scales`
    zeros                [E, N, G] uint8, in "gptq" 1 to 16; None of 8 bits, which have to be symmetric

    Zeros that are 8 throughout, as those of symmetric quantisation, may be left out of `Quantization.int4`.
    Some checkpoints are said to be "gptq" and are "gptq_v2": then these are 9. Gates and ups come together
    along N, before this or after.

    >>> qweight = torch.full((1, 1, 8), 0x76543210, dtype=torch.int32)  # 8 columns, 8 rows
    >>> qzeros = torch.full((1, 1, 1), 0x77777777, dtype=torch.int32)
    >>> weights, scale, zeros = repack_gptq(qweight, torch.ones(1, 1, 8), qzeros)
    >>> [f"{byte:02x}" for byte in weights[0, 0].tolist()], scale.shape, zeros[0, 0].tolist()
    (['10', '32', '54', '76'], torch.Size([1, 8, 1]), [8])

    Cost: copies, and a look at `g_idx` and at zeros of 8 bits, which waits for the GPU. Layout: that of
    AutoGPTQ's and GPTQModel's QuantLinear.

    Raises TypeError and ValueError for wrong arguments, and ValueError for columns whose groups are not in
    order (act-order, `desc_act`) and for zeros of 8 bits other than 128.
    """
    bits = as_int("bits", bits)
    if bits not in (4, 8):
        raise ValueError(f"bits: expected 4 or 8, got {bits}")
    check_choice("checkpoint_format", checkpoint_format, ("gptq", "gptq_v2"))
    packed = 32 // bits
    words, scale, zero_words = _tensors(qweight, scales, qzeros)
    experts, depth, rows = words.shape
    columns, groups = depth * packed, scale.shape[1]
    if rows % packed:
        raise ValueError(f"qweight: expected rows that are a multiple of {packed}, got {rows}")
    _check(words, scale, zero_words, columns, rows, packed)
    if g_idx is not None:
        _check_order(from_array("g_idx", g_idx), experts, columns, groups, words.device)

    weights = _bytes(words.mT)  # low bits first, which is the order that is wanted
    zeros = _bytes(zero_words) if bits == 8 else unpack(_bytes(zero_words))
    if checkpoint_format == "gptq":
        zeros = zeros + 1
    if bits == 4:
        return weights, _copy(scale.mT), _copy(zeros.mT)
    if bool((zeros != 128).any()):
        raise ValueError("qzeros: expected zeros of 128, as of symmetric quantisation, with 8 bits")
    # Less 128, as that is in two's complement.
    return (weights ^ 128).view(torch.int8), _copy(scale.mT), None


@torch.no_grad()
def repack_awq(
    qweight: DLPackArray, scales: DLPackArray, qzeros: DLPackArray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, scale and zeros for `Quantization.int4` of experts that AWQ has quantised, in 4 bits.

    With K columns of the weights (what is summed over), N rows and G groups of columns:

    qweight              [E, K, N / 8]  int32             of 8 rows, from the low bits on 0 2 4 6 1 3 5 7
    scales               [E, G, N]      fp32, bf16, fp16
    qzeros               [E, G, N / 8]  int32             in the order of `qweight`

    Returns, all contiguous:

    weights              [E, N, K / 2]  uint8
    scale                [E, N, G]      as `scales`
    zeros                [E, N, G]      uint8

    Gates and ups come together along N, before this or after.

    >>> qweight = torch.full((1, 2, 1), 0x75316420, dtype=torch.int32)  # 2 columns, 8 rows
    >>> weights, scale, zeros = repack_awq(qweight, torch.ones(1, 1, 8), qweight[:, :1])
    >>> [f"{byte:02x}" for byte in weights.flatten().tolist()], zeros.flatten().tolist()
    (['00', '11', '22', '33', '44', '55', '66', '77'], [0, 1, 2, 3, 4, 5, 6, 7])

    Cost: copies, expert by expert. Layout: that of AutoAWQ's `WQLinear_GEMM`, `version: "gemm"` in a
    checkpoint's quantization_config.

    Raises TypeError and ValueError for wrong arguments.
    """
    words, scale, zero_words = _tensors(qweight, scales, qzeros)
    experts, columns, eighths = words.shape
    _check(words, scale, zero_words, columns, 8 * eighths, 8)
    if columns % 2:
        raise ValueError(f"qweight: expected an even number of columns, got {columns}")

    weights = torch.empty(experts, 8 * eighths, columns // 2, dtype=torch.uint8, device=words.device)
    for expert in range(experts):  # as all take 1 byte for each value, on the way
        values = _in_order(words[expert])
        torch.bitwise_or(values[::2].T, values[1::2].T << 4, out=weights[expert])
    return weights, _copy(scale.mT), _copy(_in_order(zero_words).mT)


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """[.., n] words of AWQ -> [.., 8n] values."""
    values = unpack(_bytes(words))
    return values.unflatten(-1, (-1, 8))[..., _AWQ_PLACES].flatten(-2)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """[.., n] words -> [.., 4n] bytes, low ones first, as hosts of NVIDIA GPUs have them."""
    return _copy(words).view(torch.uint8)


def _tensors(qweight: Any, scales: Any, qzeros: Any) -> list[torch.Tensor]:
    tensors = []
    for name, array in (("qweight", qweight), ("scales", scales), ("qzeros", qzeros)):
        tensor = from_array(name, array)
        if tensor.dim() != 3:
            raise ValueError(f"{name}: expected 3 dimensions, the first of experts, got {list(tensor.shape)}")
        tensors.append(tensor)
    return tensors


def _check(
    words: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor, columns: int, rows: int, packed: int
) -> None:
    experts, groups, device = len(words), scale.shape[1], words.device
    check_tensor("qweight", words, _INT32, words.shape, device, strided=True)
    cuda_index("qweight", device)
    check_tensor("scales", scale, SCALES, (experts, groups, rows), device, strided=True)
    check_tensor("qzeros", zeros, _INT32, (experts, groups, rows // packed), device, strided=True)
    if not groups or columns % groups:
        raise ValueError(f"scales: expected groups of as many columns each, got {groups} for {columns}")


def _check_order(g_idx: torch.Tensor, experts: int, columns: int, groups: int, device: torch.device) -> None:
    """That columns of a group are neighbours, and groups in order."""
    if not g_idx.numel():
        return
    check_tensor("g_idx", g_idx, _IDS, (experts, columns), device, strided=True)
    ordered = torch.arange(columns, device=device) // (columns // groups)
    if bool((g_idx != ordered).any()):
        raise ValueError(
            "g_idx: expected columns in the order of their groups, got those of act-order (desc_act=True),"
            " which no kernel here takes; quantise with desc_act=False"
        )
