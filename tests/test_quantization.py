"""Quantised weights: what they stand for, what fits, the CPU against float64, and checkpoints' layouts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_experts import Layer, close, exact, layer

from cupy_moe import Quantization, repack_awq, repack_gptq
from cupy_moe.cpu import experts as cpu
from cupy_moe.operators.experts import ACTIVATIONS

SCALES = (torch.float32, torch.bfloat16, torch.float16)
F8, I8, U8 = torch.float8_e4m3fn, torch.int8, torch.uint8


def _weights(format: str, *shape: int) -> torch.Tensor:
    if format == "fp8":
        return (torch.randn(shape) * 2).to(torch.float8_e4m3fn)
    if format == "int8":
        return torch.randint(-128, 128, shape, dtype=torch.int8)
    return torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)


def _scale(dtype: torch.dtype, format: str, *shape: int) -> torch.Tensor:
    """So that values are about as large as those of a layer in bf16."""
    return ((torch.rand(shape) + 0.5) * {"fp8": 0.15, "int8": 0.004, "int4": 0.06}[format]).to(dtype)


# A maker of a quantisation: of the type of its scales, the experts, the rows of w1, H and I.
_Make = Callable[[torch.dtype, int, int, int, int], Quantization]


def _block(rows: int, columns: int) -> _Make:
    def make(dtype: torch.dtype, experts: int, gates: int, hidden: int, inner: int) -> Quantization:
        def some(height: int, width: int) -> torch.Tensor:
            return _scale(dtype, "fp8", experts, -(-height // rows), -(-width // columns))

        return Quantization.fp8_block(some(gates, hidden), some(hidden, inner), (rows, columns))

    return make


def _channel(dtype: torch.dtype, experts: int, gates: int, hidden: int, inner: int) -> Quantization:
    scales = _scale(dtype, "fp8", experts, gates), _scale(dtype, "fp8", experts, hidden, 1)
    return Quantization.fp8_channel(*scales)


def _tensor(*halves: int) -> _Make:
    def make(dtype: torch.dtype, experts: int, gates: int, hidden: int, inner: int) -> Quantization:
        two = halves if gates == 2 * inner else ()
        scales = _scale(dtype, "fp8", experts, *two), _scale(dtype, "fp8", experts)
        return Quantization.fp8_tensor(*scales)

    return make


def _int8(group: int | None) -> _Make:
    def make(dtype: torch.dtype, experts: int, gates: int, hidden: int, inner: int) -> Quantization:
        groups = [(), ()] if group is None else [(hidden // group,), (inner // group,)]
        w1 = _scale(dtype, "int8", experts, gates, *groups[0])
        return Quantization.int8(w1, _scale(dtype, "int8", experts, hidden, *groups[1]), group)

    return make


def _int4(group: int, zeros: bool) -> _Make:
    def make(dtype: torch.dtype, experts: int, gates: int, hidden: int, inner: int) -> Quantization:
        shapes = (experts, gates, hidden // group), (experts, hidden, inner // group)
        w1, w2 = (_scale(dtype, "int4", *shape) for shape in shapes)
        if not zeros:
            return Quantization.int4(w1, w2, group_size=group)
        zeros1, zeros2 = (torch.randint(0, 17, shape, dtype=U8) for shape in shapes)
        return Quantization.int4(w1, w2, zeros1, zeros2, group)

    return make


FORMATS: dict[str, tuple[str, _Make]] = {
    "fp8 by blocks": ("fp8", _block(128, 128)),
    "fp8 by wide blocks": ("fp8", _block(16, 96)),
    "fp8 by rows of blocks": ("fp8", _block(1, 32)),
    "fp8 by channels": ("fp8", _channel),
    "fp8 by tensors": ("fp8", _tensor()),
    "fp8 by gate and up": ("fp8", _tensor(2)),
    "int8 by channels": ("int8", _int8(None)),
    **{f"int8 by {size}": ("int8", _int8(size)) for size in (32, 64, 128)},
    **{
        f"int4 by {size}{' with zeros' * zeros}": ("int4", _int4(size, zeros))
        for size in (32, 64, 128)
        for zeros in (False, True)
    },
}


def quantized(seed: int, name: str, most_tokens: int = 40, **given: Any) -> tuple[Layer, Quantization]:
    """A random call with weights as they are stored, by a seed, and how that is."""
    pick = random.Random(seed)
    format, make = FORMATS[name]
    if name == "fp8 by blocks":
        sizes = {"hidden": pick.choice((64, 128, 144, 272)), "inner": 128}
    else:
        unit = 128 if "128" in name else 64 if "64" in name else 32
        sizes = {"hidden": unit * pick.choice((1, 2, 3)), "inner": unit * pick.choice((1, 2))}
    call = layer(seed, most_tokens, **{**sizes, **given})
    w1, w2 = call.tensors["w1"], call.tensors["w2"]
    tensors = {**call.tensors, "w1": _weights(format, *w1.shape), "w2": _weights(format, *w2.shape)}
    dtype = pick.choice(SCALES)
    stored = make(dtype, len(w1), w1.shape[1], *w2.shape[1:])
    if pick.random() < 0.3:  # padded rows
        for weights in ("w1", "w2"):
            rows = tensors[weights]
            tensors[weights] = torch.cat([rows, _weights(format, *rows.shape[:2], 32)], dim=2)[
                :, :, : rows.shape[2]
            ]
    return call._replace(tensors=tensors), stored


def is_gated(call: Layer) -> bool:
    return call.options["activation"] in cpu.GATED


# ---- what weights stand for


def slow_values(weights: torch.Tensor, scale: Any, zeros: Any, rows: int, columns: int) -> torch.Tensor:
    """Of one expert, element by element, with Python's numbers; of so many rows and columns a block."""
    is_int4 = weights.dtype == torch.uint8
    scale, zeros = scale.tolist(), None if zeros is None else zeros.tolist()
    result = []
    for i, row in enumerate(weights.float().tolist()):
        if is_int4:
            row = [half for byte in row for half in (int(byte) % 16, int(byte) // 16)]
        values = []
        for j, q in enumerate(row):
            down, across = i // rows, j // columns
            zero = 0 if not is_int4 else 8 if zeros is None else zeros[down][across]
            values.append((q - zero) * scale[down][across])
        result.append(values)
    return torch.tensor(result)


@pytest.mark.parametrize("name", FORMATS)
def test_values_against_a_loop(name: str) -> None:
    for seed in (0, 5):  # with a gate and without
        call, q = quantized(seed, name, tokens=1, experts=2, topk=1)
        (_, rows, _), hidden = call.tensors["w1"].shape, call.tensors["w2"].shape[1]
        w1, w2 = q.dequantize(call.tensors["w1"], call.tensors["w2"])
        assert w1.dtype == w2.dtype == torch.float32
        assert w1.shape[1:] == (rows, hidden)
        assert w2.shape[1] == hidden
        wide = q.block_columns or 10**9
        heights = q.block_rows or rows // q.w1_scale.shape[1], q.block_rows or hidden
        for expert in range(2):
            zeros = [None if z is None else z[expert] for z in (q.w1_zeros, q.w2_zeros)]
            of_w1 = slow_values(call.tensors["w1"][expert], q.w1_scale[expert], zeros[0], heights[0], wide)
            of_w2 = slow_values(call.tensors["w2"][expert], q.w2_scale[expert], zeros[1], heights[1], wide)
            assert torch.equal(w1[expert], of_w1)
            assert torch.equal(w2[expert], of_w2)
            alone = q.dequantize(call.tensors["w1"], call.tensors["w2"], expert)
            assert torch.equal(alone[0], w1[expert])
            assert torch.equal(alone[1], w2[expert])


def test_the_fields_of_each() -> None:
    two, three = torch.rand(3, 64), torch.rand(3, 64, 4)
    made = {
        "blocks": Quantization.fp8_block(three, three, (64, 32)),
        "channel": Quantization.fp8_channel(two, three[..., :1]),
        "tensor": Quantization.fp8_tensor(two[:, :2], two[:, 0]),
        "int8": Quantization.int8(two, two),
        "int8 by 32": Quantization.int8(three, three, 32),
        "int4": Quantization.int4(three, three),
    }
    fields = {n: (q.format, q.block_rows, q.block_columns, list(q.w1_scale.shape)) for n, q in made.items()}
    assert fields == {
        "blocks": ("fp8", 64, 32, [3, 64, 4]),
        "channel": ("fp8", 1, 0, [3, 64, 1]),
        "tensor": ("fp8", 0, 0, [3, 2, 1]),
        "int8": ("int8", 1, 0, [3, 64, 1]),
        "int8 by 32": ("int8", 1, 32, [3, 64, 4]),
        "int4": ("int4", 1, 128, [3, 64, 4]),
    }
    assert made["tensor"].w2_scale.shape == (3, 1, 1)
    for q in made.values():
        assert q.w1_scale.data_ptr() in (two.data_ptr(), three.data_ptr())  # a view
        assert q.w1_zeros is q.w2_zeros is None
    assert len(set(made.values())) == len(made)
    with pytest.raises(AttributeError):
        made["int4"].format = "int8"  # type: ignore[misc]


def test_scales_may_be_arrays_and_parameters() -> None:
    scale = torch.nn.Parameter(torch.rand(2, 16))
    q = Quantization.int8(scale.detach().numpy(), scale)
    assert q.w1_scale.data_ptr() == q.w2_scale.data_ptr() == scale.data_ptr()
    assert not q.w2_scale.requires_grad


# ---- what does not fit

X = torch.ones(3, 64, dtype=torch.bfloat16)


def _zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _checked(
    q: Quantization, dtype: torch.dtype, inner: int, gated: bool = True, **changed: torch.Tensor
) -> tuple[int, int, int]:
    """2 experts, as they should be but for what is changed."""
    packed, gates = (2 if q.format == "int4" else 1), (2 if gated else 1)
    x = changed.get("hidden_states", X)
    hidden = x.shape[1]
    w1 = _zeros(dtype, 2, gates * inner, hidden // packed)
    w2 = _zeros(dtype, 2, hidden, inner // packed)
    return q.check(x, changed.get("w1", w1), changed.get("w2", w2), gated)


def _by_channel(inner: int = 32, hidden: int = 64) -> Quantization:
    return Quantization.int8(torch.ones(2, 2 * inner), torch.ones(2, hidden))


def _by_32(inner: int = 32, hidden: int = 64) -> Quantization:
    shapes = (2, 2 * inner, hidden // 32), (2, hidden, inner // 32)
    (w1, w2), (zeros1, zeros2) = ([torch.ones(shape, dtype=t) for shape in shapes] for t in (X.dtype, U8))
    return Quantization.int4(w1, w2, zeros1, zeros2, 32)


def _by_tensor(halves: tuple[int, ...]) -> Quantization:
    return Quantization.fp8_tensor(torch.ones(2, *halves), torch.ones(2))


def _by_block(*shape: int) -> Quantization:
    return Quantization.fp8_block(torch.ones(2, *shape[:2]), torch.ones(2, *shape[2:4]), (32, 64))


def test_what_is_right_passes_the_check() -> None:
    assert _checked(_by_channel(), I8, 32) == (2, 64, 32)
    assert _checked(_by_32(), U8, 32) == (2, 64, 32)
    assert _checked(_by_tensor(()), F8, 16) == (2, 64, 16)
    assert _checked(_by_tensor((2,)), F8, 16) == (2, 64, 16)
    assert _checked(_by_tensor(()), F8, 48, gated=False) == (2, 64, 48)
    assert _checked(_by_block(2, 1, 2, 1), F8, 32) == (2, 64, 32)
    assert _checked(_by_block(2, 1, 2, 1), F8, 48, gated=False) == (2, 64, 48)  # half a block at the end
    assert _checked(_by_block(4, 2, 3, 1), F8, 64, hidden_states=torch.ones(3, 80)) == (2, 80, 64)
    strided = Quantization.int8(torch.ones(64, 2).mT, torch.ones(1).expand(2, 64))
    assert _checked(strided, I8, 32) == (2, 64, 32)
    for name, seed in itertools.product(FORMATS, (0, 5)):
        call, q = quantized(seed, name, tokens=2, topk=1)
        x, w1, w2 = (call.tensors[n] for n in ("hidden_states", "w1", "w2"))
        assert q.check(x, w1, w2, is_gated(call))[:2] == (len(w1), x.shape[1])


WRONG: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "w1 in bf16": (
        TypeError,
        "w1: expected torch.int8, got torch.bfloat16",
        lambda: _checked(_by_channel(), I8, 32, w1=_zeros(torch.bfloat16, 2, 64, 64)),
    ),
    "w2 in int8": (
        TypeError,
        "w2: expected torch.float8_e4m3fn, got torch.int8",
        lambda: _checked(_by_tensor(()), F8, 32, w2=_zeros(I8, 2, 64, 32)),
    ),
    "w1 without a gate": (
        ValueError,
        r"w1: expected shape \[2, 64, 64\], got \[2, 32, 64\]",
        lambda: _checked(_by_channel(), I8, 32, w1=_zeros(I8, 2, 32, 64)),
    ),
    "w1 unpacked": (
        ValueError,
        r"w1: expected shape \[2, 64, 32\], got \[2, 64, 64\]",
        lambda: _checked(_by_32(), U8, 32, w1=_zeros(U8, 2, 64, 64)),
    ),
    "w2 of other experts": (
        ValueError,
        r"w2: expected shape \[2, 64, 32\], got \[3, 64, 32\]",
        lambda: _checked(_by_channel(), I8, 32, w2=_zeros(I8, 3, 64, 32)),
    ),
    "w2 elsewhere": (
        ValueError,
        "w2: expected it beside the other tensors on cpu, got meta",
        lambda: _checked(_by_channel(), I8, 32, w2=_zeros(I8, 2, 64, 32).to("meta")),
    ),
    "8 columns": (
        ValueError,
        "quantization: expected a multiple of 16, 16 bytes of int8, as intermediate size, got 40",
        lambda: _checked(_by_channel(40), I8, 40),
    ),
    "half a group": (
        ValueError,
        "expected a multiple of 32, the group size, as hidden size, got 48",
        lambda: _checked(_by_32(32, 48), U8, 32, hidden_states=torch.ones(3, 48)),
    ),
    "a gate in half a block": (
        ValueError,
        "expected a multiple of 32, the rows of a block, as intermediate size, got 48",
        lambda: _checked(_by_block(3, 1, 2, 1), F8, 48),
    ),
    "scales of w1": (
        ValueError,
        r"quantization: w1_scale: expected shape \[2, 64, 1\], got \[2, 32, 1\]",
        lambda: _checked(_by_channel(16), I8, 32),
    ),
    "scales of w2": (
        ValueError,
        r"quantization: w2_scale: expected shape \[2, 64, 1\], got \[2, 80, 1\]",
        lambda: _checked(_by_channel(32, 80), I8, 32),
    ),
    "scales of three": (
        ValueError,
        r"quantization: w1_scale: expected shape \[2, 1, 1\], got \[2, 3, 1\]",
        lambda: _checked(_by_tensor((3,)), F8, 32),
    ),
    "two scales without a gate": (
        ValueError,
        r"quantization: w1_scale: expected shape \[2, 1, 1\], got \[2, 2, 1\]",
        lambda: _checked(_by_tensor((2,)), F8, 32, gated=False),
    ),
    "too few blocks": (
        ValueError,
        r"quantization: w2_scale: expected shape \[2, 2, 1\], got \[2, 1, 1\]",
        lambda: _checked(_by_block(2, 1, 1, 1), F8, 32),
    ),
    "scales of two types": (
        TypeError,
        "quantization: w2_scale: expected torch.float32, got torch.bfloat16",
        lambda: _checked(Quantization.int8(torch.ones(2, 64), torch.ones(2, 64).bfloat16()), I8, 32),
    ),
    "scales elsewhere": (
        ValueError,
        "quantization: w1_scale: expected it beside the other tensors on cpu",
        lambda: _checked(Quantization.int8(torch.ones(2, 64).to("meta"), torch.ones(2, 64)), I8, 32),
    ),
    "zeros of half the rows": (
        ValueError,
        r"quantization: w2_zeros: expected shape \[2, 64, 1\], got \[2, 32, 1\]",
        lambda: _checked(
            Quantization.int4(
                torch.ones(2, 64, 2), torch.ones(2, 64, 1), _zeros(U8, 2, 64, 2), _zeros(U8, 2, 32, 1), 32
            ),
            U8,
            32,
        ),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name: str) -> None:
    error, message, check = WRONG[name]
    with pytest.raises(error, match=message):
        check()


# ---- the CPU


@pytest.mark.parametrize("name", FORMATS)
def test_the_cpu_against_float64(name: str) -> None:
    for seed, activation in enumerate(ACTIVATIONS):
        call, q = quantized(seed, name, tokens=4, topk=2, experts=3)
        assert call.options["activation"] == activation
        w1, w2 = q.dequantize(call.tensors["w1"], call.tensors["w2"])
        arguments: dict[str, Any] = {**call.tensors, **call.options}
        result = cpu.fused_experts(**arguments, quantization=q)
        assert result.dtype == call.tensors["hidden_states"].dtype
        expected = exact(call._replace(tensors={**call.tensors, "w1": w1, "w2": w2}))
        assert close(result, expected), seed


def test_values_are_not_rounded_to_the_type_of_hidden_states() -> None:
    """1 + 2^-10, which bf16 lacks, times 1 and -1, and what is left over."""
    scale = torch.tensor([[1 + 2**-10]]).expand(1, 32)
    q = Quantization.int8(scale, torch.ones(1, 16))
    w1 = torch.zeros(1, 32, 16, dtype=I8)
    w1[0, :, 0] = 1
    w2 = torch.zeros(1, 16, 32, dtype=I8)
    w2[0, :, 0] = 1
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    x[0, 0] = 1
    weights, ids = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    bias = torch.full((1, 32), -1.0, dtype=torch.bfloat16)
    result = cpu.fused_experts(x, w1, w2, weights, ids, "relu2_no_mul", w1_bias=bias, quantization=q)
    assert result[0, 0].item() == 2**-20


# ---- checkpoints


def words(fields: list[int], bits: int) -> int:
    """An int32 of unsigned fields, the first in the low bits."""
    word = sum(field << bits * place for place, field in enumerate(fields))
    return word - 2**32 if word >= 2**31 else word


def packed_gptq(q: Any, zeros: Any, bits: int, less: int) -> tuple[torch.Tensor, torch.Tensor]:
    """qweight [E, K / P, N] and qzeros [E, G, N / P] of q [E, N][K] and zeros [E, N][G], by hand."""
    p = 32 // bits
    (experts, rows, columns), groups = q.shape, zeros.shape[2]
    qweight = [
        [[words(q[e, n, k : k + p].tolist(), bits) for n in range(rows)] for k in range(0, columns, p)]
        for e in range(experts)
    ]
    qzeros = [
        [
            [words((zeros[e, n : n + p, g] - less).tolist(), bits) for n in range(0, rows, p)]
            for g in range(groups)
        ]
        for e in range(experts)
    ]
    return torch.tensor(qweight, dtype=torch.int32), torch.tensor(qzeros, dtype=torch.int32)


def packed_awq(values: Any) -> torch.Tensor:
    """[E, n, N / 8] of [E, N, n]."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    experts, rows, columns = values.shape
    return torch.tensor(
        [
            [
                [words([int(values[e, n + i, k]) for i in order], 4) for n in range(0, rows, 8)]
                for k in range(columns)
            ]
            for e in range(experts)
        ],
        dtype=torch.int32,
    )


def _checkpoint(bits: int, least: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unsigned q [2, 24, 64], scales [2, G, 24], and zeros [2, 24, G] from `least` on."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (2, 24, 64), generator=generator)
    zeros = torch.randint(least, 2**bits, (2, 24, 2), generator=generator)
    return q, torch.rand(2, 2, 24, generator=generator).half(), zeros


def _values(q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    def wide(groups: torch.Tensor) -> torch.Tensor:
        return groups.float().repeat_interleave(q.shape[2] // groups.shape[2], dim=2)

    return (q.float() - wide(zeros)) * wide(scales.mT)


def _stand_for(q: Quantization, weights: torch.Tensor, expected: torch.Tensor) -> bool:
    """For both matrices, as either has the same."""
    return all(torch.equal(values, expected) for values in q.dequantize(weights, weights))


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_gptq_in_4_bits(checkpoint_format: str) -> None:
    less = 1 if checkpoint_format == "gptq" else 0
    q, scales, zeros = _checkpoint(4, less)
    qweight, qzeros = packed_gptq(q, zeros, 4, less)
    options: dict[str, Any] = {"checkpoint_format": checkpoint_format}
    in_order = (torch.arange(64) // 32).expand(2, 64)
    for g_idx in (None, in_order.int(), in_order, torch.empty(0)):
        weights, scale, found = repack_gptq(qweight, scales, qzeros, g_idx, **options)
        assert found is not None
        assert weights.is_contiguous()
        assert scale.is_contiguous()
        assert found.is_contiguous()
        assert torch.equal(scale, scales.mT)
        assert torch.equal(found, zeros.to(U8))
        expected = Quantization.int4(scale, scale, found, found, group_size=32)
        assert _stand_for(expected, weights, _values(q, scales, zeros))
    strided: list[Any] = [tensor.mT.contiguous().mT for tensor in (qweight, scales, qzeros)]
    assert torch.equal(repack_gptq(*strided, **options)[0], weights)


def test_gptq_whose_zeros_are_sixteen() -> None:
    """15 and 1, which 4 bits have no room for, and a byte has."""
    q, scales, zeros = _checkpoint(4, 16 - 1)
    qweight, qzeros = packed_gptq(q, zeros, 4, 0)
    assert repack_gptq(qweight, scales, qzeros)[2].unique().tolist() == [16]  # type: ignore[union-attr]


def test_gptq_in_8_bits() -> None:
    q, scales, zeros = _checkpoint(8, 0)
    zeros[:] = 128
    for checkpoint_format, less in (("gptq", 1), ("gptq_v2", 0)):
        qweight, qzeros = packed_gptq(q, zeros, 8, less)
        weights, scale, none = repack_gptq(
            qweight, scales, qzeros, bits=8, checkpoint_format=checkpoint_format
        )
        assert none is None
        assert weights.dtype == I8
        assert _stand_for(Quantization.int8(scale, scale, 32), weights, _values(q, scales, zeros))
    zeros[1, 5, 1] = 127
    with pytest.raises(ValueError, match="qzeros: expected zeros of 128"):
        repack_gptq(qweight, scales, packed_gptq(q, zeros, 8, 0)[1], None, 8, checkpoint_format="gptq_v2")


def test_awq() -> None:
    q, scales, zeros = _checkpoint(4, 0)
    qweight, qzeros = packed_awq(q), packed_awq(zeros)
    weights, scale, found = repack_awq(qweight, scales, qzeros)
    assert weights.is_contiguous()
    assert scale.is_contiguous()
    assert found.is_contiguous()
    assert torch.equal(found, zeros.to(U8))
    quantization = Quantization.int4(scale, scale, found, found, group_size=32)
    assert _stand_for(quantization, weights, _values(q, scales, zeros))
    strided = [tensor.mT.contiguous().mT for tensor in (qweight, scales, qzeros)]
    assert torch.equal(repack_awq(*strided)[0], weights)


def test_repacking_changes_nothing_that_it_is_given() -> None:
    """Where the order happens to be that of the result: of one expert, row and column."""
    q, scales, zeros = (tensor[:1, ..., :8] for tensor in _checkpoint(8, 128))
    q, scales, zeros = q[:, :4], scales[:, :1, :4], torch.full((1, 4, 1), 128)
    given = *packed_gptq(q, zeros, 8, 1), scales.contiguous()
    kept = [tensor.clone() for tensor in given]
    _, scale, _ = repack_gptq(given[0], given[2], given[1], bits=8)
    scale.zero_()
    assert all(torch.equal(tensor, before) for tensor, before in zip(given, kept, strict=True))
