"""Quantising to fp8: against a loop and by example, in the emulator and on a GPU with the bits of the CPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import emulator
import gpus
import numpy as np
import pytest
import torch
from cache_helpers import Everything
from emulator import Emulator, cases
from gpus import H200
from hypothesis import given
from hypothesis import strategies as st
from operator_cases import Case, comparable

from cupy_moe import (
    moe_align_block_size,
    per_token_group_quant_fp8,
    per_token_quant_fp8,
    silu_and_mul_per_token_group_quant_fp8,
)
from cupy_moe.cpu import quantize as cpu
from cupy_moe.plans.quantize import QUANTIZE_CHUNK, QUANTIZE_GROUP_THREADS, plan_quantize

X = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
SOME = torch.tensor([3, 0, 9, 10, -1, 3, 7], dtype=torch.int32)
OPTIONS = {"eps": 1e-6, "scales_power_of_2": False, "topk": 2}
GROUPED = {"group_size": 64, "column_major_scales": True, **OPTIONS}
CASES = {
    "quantize": Case(per_token_group_quant_fp8, {"x": X, "sorted_token_ids": SOME, **GROUPED}),
    "quantize_rows": Case(per_token_quant_fp8, {"x": X, "sorted_token_ids": SOME, **OPTIONS}),
    "quantize_silu": Case(
        silu_and_mul_per_token_group_quant_fp8, {"x": X, "sorted_token_ids": SOME, **GROUPED}
    ),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What the codes from 0 on stand for: 3 bits of mantissa, 4 of exponent, and no infinity.
E4M3 = [
    (code % 8) / 8 * 2.0**-6 if code < 8 else (1 + code % 8 / 8) * 2.0 ** (code // 8 - 7)
    for code in range(127)
]
BETWEEN = [(low + high) / 2 for low, high in itertools.pairwise(E4M3)]


def code_of(value: float) -> int:
    """The nearest one, of two the even one."""
    if math.isnan(value):
        return 0x7F
    sign = 0x80 if math.copysign(1, value) < 0 else 0
    best = min(range(127), key=lambda code: (abs(E4M3[code] - min(abs(value), 448)), code % 2))
    return sign | best


def fp32(value: float) -> float:
    return float(np.float32(value))


def loop(
    x: torch.Tensor, group_size: int, eps: float = 1e-10, power_of_2: bool = False
) -> tuple[list[list[int]], list[list[float]]]:
    """Codes and scales, number by number."""
    codes: list[list[int]] = []
    scales: list[list[float]] = []
    for row in x.float().tolist():
        codes.append([])
        scales.append([])
        for begin in range(0, len(row), group_size):
            group = row[begin : begin + group_size]
            largest = max([abs(v) for v in group if math.isfinite(v)] + [fp32(eps)])
            scale = fp32(largest / 448)
            if power_of_2:
                mantissa, exponent = math.frexp(scale)
                scale = math.ldexp(1, exponent - (mantissa == 0.5))
            scales[-1].append(scale)
            factor = fp32(1 / scale)
            codes[-1] += [code_of(v if not math.isfinite(v) else fp32(v * factor)) for v in group]
    return codes, scales


def as_lists(results: Any) -> tuple[list[list[int]], list[list[float]]]:
    q, scales = results
    return comparable(q).tolist(), scales.tolist()


numbers = st.one_of(
    st.floats(width=32),
    st.sampled_from([448.0, 1.0, -0.0, math.nan, math.inf, -math.inf, 2.0**-149, 3.4028234663852886e38]),
    st.sampled_from(BETWEEN),
)


@given(
    st.lists(numbers, min_size=1, max_size=70),
    st.sampled_from(DTYPES),
    st.sampled_from([1e-10, 5.3e-36, 2.0]),
    st.booleans(),
)
def test_any_numbers(values: list[float], dtype: torch.dtype, eps: float, power_of_2: bool) -> None:
    x = torch.tensor([values], dtype=torch.float32).to(dtype)
    assert as_lists(per_token_quant_fp8(x, eps=eps, scales_power_of_2=power_of_2)) == loop(
        x, len(values), eps, power_of_2
    )
    padded = torch.nn.functional.pad(x, (0, -len(values) % 32))
    results = per_token_group_quant_fp8(padded, 32, eps=eps, scales_power_of_2=power_of_2)
    assert as_lists(results) == loop(padded, 32, eps, power_of_2)


def test_every_code_and_every_tie() -> None:
    """Where the scale is 1."""
    values = [
        448.0,
        *E4M3,
        *BETWEEN,
        *(math.nextafter(b, 0) for b in BETWEEN),
        *(b * (1 + 2**-20) for b in BETWEEN),
    ]
    x = torch.tensor([values, values]) * torch.tensor([[1.0], [-1.0]])
    q, scales = per_token_quant_fp8(x)
    assert scales.tolist() == [[1], [1]]
    assert q.view(torch.uint8).tolist() == [[code_of(v) for v in row] for row in x.tolist()]
    assert q[0, 1:128].tolist() == E4M3


def test_powers_of_2_are_exact() -> None:
    x = torch.zeros(5, 32)
    x[:, 7] = 448 * torch.tensor([1.0, 1 + 2**-20, 2.0, 2 - 2**-20, 2.0**-9])
    _, scales = per_token_group_quant_fp8(x, 32, scales_power_of_2=True)
    assert scales[:, 0].tolist() == [1, 2, 2, 2, 2.0**-9]


def test_what_is_no_number() -> None:
    x = torch.tensor(
        [[math.nan, 1.0, -math.inf, 2.0], [math.nan, math.inf, -math.nan, -math.inf], [0, -0.0, 0, 0]]
    )
    q, scales = per_token_quant_fp8(x)
    assert q.view(torch.uint8).tolist() == [
        [0x7F, 0x76, 0xFE, 0x7E],
        [0x7F, 0x7E, 0x7F, 0xFE],
        [0, 0x80, 0, 0],
    ]
    least = fp32(fp32(1e-10) / 448)
    assert scales[:, 0].tolist() == [fp32(2 / 448), least, least]


def test_silu_is_as_near_as_said() -> None:
    x = torch.cat([torch.linspace(-86, 100, 200_001), torch.randn(10_000) * 1e-3])
    exact = x.double() * torch.sigmoid(x.double())
    error = (cpu.silu(x).double() - exact).abs()
    assert (error <= 7e-6 * exact.abs()).all()
    assert (error > 5e-6 * exact.abs()).any()  # the bound is no more than it has to be
    below = torch.tensor([-90.0, -1000.0, -3e38])
    assert (cpu.silu(below).abs() <= below.abs() * 2.0**-124).all()
    assert cpu.silu(torch.tensor([math.nan])).isnan().all()


def test_silu_and_mul_quantises_the_product() -> None:
    for dtype in DTYPES:
        x = (torch.randn(7, 256) * 3).to(dtype)
        q, scales = silu_and_mul_per_token_group_quant_fp8(x, 64)
        product = cpu.silu(x[:, :128].float()) * x[:, 128:].float()
        expected = per_token_group_quant_fp8(product, 64)
        assert as_lists((q, scales)) == as_lists(expected)
        wanted = torch.nn.functional.silu(x[:, :128].double()) * x[:, 128:].double()
        result = q.double() * scales.double().repeat_interleave(64, dim=1)
        assert ((result - wanted).abs() <= wanted.abs() / 15 + scales.max() * 2**-9).all()


def test_ids_of_an_alignment() -> None:
    topk_ids = torch.randint(0, 4, (6, 2), dtype=torch.int32)
    ids, _, _ = moe_align_block_size(topk_ids, 4, 4)
    x = torch.randn(6, 64)
    q, scales = per_token_group_quant_fp8(x, 32, sorted_token_ids=ids, topk=2)
    rows = torch.cat([x, torch.zeros(1, 64)])[torch.where(ids < 12, ids // 2, 6)]
    assert as_lists((q, scales)) == as_lists(per_token_group_quant_fp8(rows, 32))
    assert (ids == 12).any()


def test_layouts_of_scales() -> None:
    x = torch.randn(6, 128)
    q, scales = per_token_group_quant_fp8(x, 32)
    assert scales.stride() == (4, 1)
    same, columns = per_token_group_quant_fp8(x, 32, column_major_scales=True)
    assert columns.stride() == (1, 6)
    assert torch.equal(columns, scales)
    assert torch.equal(comparable(same), comparable(q))
    buffer = torch.full((4, 8), 7.0)
    per_token_group_quant_fp8(x, 32, column_major_scales=True, out=(q, buffer.t()[:6]))
    assert torch.equal(buffer[:, :6].t(), scales)
    assert (buffer[:, 6:] == 7).all()


def check_sizes_of_zero(on_device: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for rows, hidden in ((0, 64), (3, 0), (0, 0)):
        x = on_device(torch.ones(rows, hidden))
        for function in (per_token_group_quant_fp8, silu_and_mul_per_token_group_quant_fp8):
            q, scales = function(x, 32)
            width = hidden // 2 if function is silu_and_mul_per_token_group_quant_fp8 else hidden
            assert (q.shape, scales.shape) == ((rows, width), (rows, width // 32))
        q, scales = per_token_quant_fp8(x)
        assert (q.shape, scales.tolist()) == ((rows, hidden), [[fp32(fp32(1e-10) / 448)]] * rows)


def test_sizes_of_zero() -> None:
    check_sizes_of_zero(lambda tensor: tensor)
    q, scales = per_token_group_quant_fp8(torch.ones(0, 32), 32, sorted_token_ids=SOME)
    assert not comparable(q).any()
    assert len(scales) == len(SOME)


def test_arrays_of_numpy_hold_codes() -> None:
    x: Any = X.numpy()
    q: Any
    q, scales = per_token_group_quant_fp8(x)
    assert (type(q), q.dtype) == (np.ndarray, np.uint8)
    out: Any = np.zeros((5, 128), dtype=np.uint8), np.zeros((5, 1), dtype=np.float32)
    assert per_token_group_quant_fp8(x, out=out).q is out[0]
    assert (out[0] == q).all()
    assert (out[1] == scales).all()


def test_plan() -> None:
    for rows, hidden, limits in itertools.product((1, 7, 300, 40_000), (32, 128, 7168), gpus.GPUS.values()):
        for group_size, gated in itertools.product((32, 64, 128, hidden), (False, True)):
            if hidden % group_size or (gated and group_size > 128):
                continue
            launch, lane_bits, units_per_row, num_units = plan_quantize(
                rows, hidden, group_size, "bf16", True, gated, limits
            )
            assert launch.block % 32 == 0
            if group_size > 32 * QUANTIZE_CHUNK:
                assert (launch.entry, launch.grid) == ("quantize_rows_bf16", rows)
                assert launch.block * QUANTIZE_CHUNK >= hidden
                continue
            assert launch.entry == f"quantize_{'gated' if gated else 'groups'}_bf16"
            assert QUANTIZE_CHUNK << lane_bits == group_size
            assert units_per_row * QUANTIZE_CHUNK == hidden
            assert launch.grid * launch.block >= num_units == rows * units_per_row


def test_thresholds_of_the_plan() -> None:
    def plan(rows: int, hidden: int, group_size: int) -> Any:
        return plan_quantize(rows, hidden, group_size, "f16", False, False, H200)

    lanes = {0: 0, 1: 0, 16: 0, 17: 1, 32: 1, 33: 2, 64: 2, 65: 3, 256: 4, 257: 5, 512: 5}
    assert {size: plan(1, size, size).lane_bits for size in lanes} == lanes
    assert plan(1, 512, 512).launch.entry == "quantize_groups_any_f16"
    threads = {513: 64, 1024: 64, 1025: 96, 7168: 448, 16_383: 1024, 16_384: 1024, 16_385: 1024, 10**6: 1024}
    assert {hidden: plan(9, hidden, hidden).launch[1:4] for hidden in threads} == {
        hidden: ("quantize_rows_any_f16", 9, block) for hidden, block in threads.items()
    }
    few = QUANTIZE_GROUP_THREADS * H200.num_sms
    assert [plan(rows, 32, 16).launch.block for rows in (few // 2, few // 2 + 1)] == [64, 128]
    most = 2**31 - 1 - QUANTIZE_GROUP_THREADS
    assert plan(most, 16, 16).num_units == most
    with pytest.raises(ValueError, match="more than one launch can number"):
        plan(most + 1, 16, 16)


def test_kernels_exist(everything: Everything) -> None:
    kinds = (f"{kind}{any_}" for kind in ("groups", "gated", "rows") for any_ in ("", "_any"))
    names = {f"quantize_{kind}_{t}" for kind in kinds for t in ("f32", "f16", "bf16")}
    for result in everything.results:
        assert result.unit != "quantize" or set(result.kernels) == names, result.target


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "groups": per_token_group_quant_fp8,
    "rows": per_token_quant_fp8,
    "gated": silu_and_mul_per_token_group_quant_fp8,
}


@pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))
@pytest.mark.parametrize("arch", [75, 90])
def test_every_kernel_and_every_float_of_16_bits(arch: int) -> None:
    """On the last one all of fp16 and bf16, and fp32 with their bits twice."""
    bits = torch.arange(2**16, dtype=torch.int32)
    every = {
        torch.float16: bits.to(torch.int16).view(torch.float16),
        torch.bfloat16: bits.to(torch.int16).view(torch.bfloat16),
        torch.float32: (bits * 65_537).view(torch.float32),
    }
    launched: set[str] = set()
    for (kind, function), (dtype, numbers) in itertools.product(FUNCTIONS.items(), every.items()):
        mixed = numbers[torch.randperm(2**16, generator=torch.Generator().manual_seed(arch))]
        whole = mixed.view(64, 1024)
        unaligned = torch.cat([whole, whole[:, :1]], dim=1)[::7, :1024]
        for x in (whole[:: 1 if arch == 90 else 8], unaligned):
            with Emulator(H200, arch)() as device:
                results = tuple(map(comparable, function(device.tensor(x))))
            for result, right in zip(results, map(comparable, function(x)), strict=True):
                assert torch.equal(result, right), f"{kind} {dtype}"
            launched |= set(device.launched)
    assert launched == set(emulator.library("quantize", arch).entries)


@pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))
def test_sizes_of_zero_in_the_emulator() -> None:
    with Emulator(H200, 90)() as device:
        check_sizes_of_zero(device.tensor)


@pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))
def test_rows_of_every_length() -> None:
    """About as long as a warp and a block can do at once, the largest number anywhere."""
    for hidden in (1, 15, 16, 17, 511, 512, 513, 16_383, 16_384, 16_385, 32_784):
        x = torch.randn(4, hidden)
        x[range(4), torch.tensor([0, hidden // 2, hidden - 1, max(0, hidden - 17)])] = torch.tensor(100.0)
        with Emulator(H200, 90)() as device:
            results = per_token_quant_fp8(device.tensor(x), sorted_token_ids=device.tensor(SOME[:5]))
        exists = torch.tensor([1, 1, 0, 0, 0])  # 3, 0, 9, 10, -1
        expected = per_token_quant_fp8(torch.where(exists[:, None] > 0, x[[3, 0, 0, 0, 0]], 0.0))
        for result, right in zip(map(comparable, results), map(comparable, expected), strict=True):
            assert torch.equal(result, right), hidden
        kind = "groups" if hidden <= 512 else "rows"
        assert device.launched == [f"quantize_{kind}_{'f32' if hidden % 16 == 0 else 'any_f32'}"]


@pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))
def test_columns_of_scales_and_ids_in_the_emulator() -> None:
    for function, power_of_2 in itertools.product((FUNCTIONS["groups"], FUNCTIONS["gated"]), (False, True)):
        x = torch.randn(5, 256, dtype=torch.bfloat16)
        x[:, :128:3] = 0.4375  # 448 / 1024, of which groups of 32 have a scale that is a power of 2
        x[3] = 0.4375
        options = {"column_major_scales": True, "scales_power_of_2": power_of_2, "topk": 2}
        with Emulator(H200, 90)() as device:
            ids = device.tensor(SOME)
            results = function(device.tensor(x), 32, sorted_token_ids=ids, **options)
        expected = function(x, 32, sorted_token_ids=SOME, **options)
        assert results[1].stride() == expected[1].stride() == (1, 7)
        for result, right in zip(map(comparable, results), map(comparable, expected), strict=True):
            assert torch.equal(result, right)


# ---- on a GPU


@pytest.mark.gpu
def test_gpu_is_the_cpu_to_the_last_bit() -> None:
    for seed in range(300):
        call = cases.quantize(seed)
        results = call.run(lambda tensor: cases.place(tensor, "cuda").tensor)
        assert call.compare(call, tuple(r.cpu() for r in results), call.specified()) == "", f"{seed=}"


@pytest.mark.gpu
def test_gpu_writes_nothing_beside_its_outputs() -> None:
    for (kind, function), rows, hidden in itertools.product(
        FUNCTIONS.items(), (1, 7, 133), (128, 1024, 7168)
    ):
        x = torch.randn(rows, hidden * (2 if kind == "gated" else 1), dtype=torch.bfloat16)
        q, scales = function(x)
        codes = torch.full((rows + 2, hidden), 77, dtype=torch.uint8, device="cuda")
        numbers = torch.full((rows + 2, scales.shape[1]), 77.0, device="cuda")
        function(x.cuda(), out=(codes[1:-1], numbers[1:-1]))
        assert torch.equal(codes[1:-1].cpu(), q.view(torch.uint8))
        assert torch.equal(numbers[1:-1].cpu(), scales)
        assert (codes[[0, -1]] == 77).all()
        assert (numbers[[0, -1]] == 77).all()


@pytest.mark.gpu
def test_gpu_beyond_32_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    x = torch.empty((600_000, 8192), dtype=torch.bfloat16, device="cuda").normal_()
    for function in (per_token_group_quant_fp8, per_token_quant_fp8):
        q, scales = function(x)
        for rows in (slice(0, 50), slice(300_000, 300_050), slice(-50, None)):
            right = function(x[rows].cpu())
            assert torch.equal(comparable(q[rows]).cpu(), comparable(right.q))
            assert torch.equal(scales[rows].cpu(), right.scales)
        del q, scales


@pytest.mark.gpu
def test_gpu_sizes_of_zero() -> None:
    check_sizes_of_zero(torch.Tensor.cuda)


@pytest.mark.gpu
def test_gpu_in_a_graph() -> None:
    x = torch.ones(4, 1024, device="cuda")
    out = per_token_group_quant_fp8(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        per_token_group_quant_fp8(x, out=out)
    x.fill_(3)
    graph.replay()
    assert (out.scales == torch.tensor(3.0) / 448).all()
