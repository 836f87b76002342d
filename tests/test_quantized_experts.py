"""fused_experts with quantised weights: wrong calls, plans, the emulator, torch, GPUs against the CPU."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

import emulator
import pytest
import torch
from emulator import Emulator
from gpus import A100, B200, GPUS, H200, RTX4090, RTX5090, Clusters
from test_experts import Layer, close, exact, needs_compiler
from test_quantization import FORMATS, quantized

from cupy_moe import Quantization, fused_experts
from cupy_moe.cpu import experts as cpu
from cupy_moe.cuda.limits import device_limits
from cupy_moe.images import sources
from cupy_moe.plans import experts as plans
from cupy_moe.plans.base import ceil_div
from cupy_moe.plans.experts import FP8_KERNELS, QUANTIZED_BITS, QUANTIZED_KERNELS, plan_experts

Place = Callable[[torch.Tensor], torch.Tensor]


def moved(quantization: Quantization, place: Place) -> Quantization:
    fields = vars(quantization).items()
    changed: Any = {name: place(value) for name, value in fields if isinstance(value, torch.Tensor)}
    return dataclasses.replace(quantization, **changed)


def called(call: Layer, quantization: Quantization, place: Place, **more: Any) -> torch.Tensor:
    return call(place, quantization=moved(quantization, place), **more)


WEIGHTS_ALONE = ("quantized_8", "quantized_16", "quantized_48")


def kernels_for(call: Layer) -> list[str]:
    few = call.tensors["topk_ids"].numel() <= plans.DIRECT_MAX_PAIRS
    return [name for name in WEIGHTS_ALONE if few or name != "quantized_8"]


# ---- wrong calls


def test_wrong_calls() -> None:
    call, quantization = quantized(0, "int8 by channels")
    with pytest.raises(TypeError, match="quantization: expected a Quantization, got str"):
        call(torch.clone, quantization="int8")
    with pytest.raises(ValueError, match="kernel: expected one of 'quantized_8'"):
        call(torch.clone, quantization=quantization, kernel="direct")
    with pytest.raises(TypeError, match=r"w2: expected torch\.uint8"):
        call(torch.clone, quantization=quantized(0, "int4 by 32")[1])
    with pytest.raises(TypeError, match="w2: expected torch"):  # int8 without a word on its scales
        call(torch.clone)
    rows = torch.zeros(len(call.tensors["w1"]), call.tensors["w1"].shape[1], 8, dtype=torch.int8)
    tensors = {**call.tensors, "w1": torch.cat([call.tensors["w1"], rows], dim=2)[:, :, :-8]}
    with pytest.raises(ValueError, match="w1: expected rows of neighbouring elements at multiples of 16"):
        call._replace(tensors=tensors)(lambda tensor: tensor, quantization=quantization)


# ---- plans


def planned(num_pairs: int, num_experts: int = 128, limits: Any = H200, **more: Any) -> Any:
    more = {"weight_format": "fp8", **more}
    return plan_experts(num_pairs, num_experts, num_experts, 2048, 768, "bf16", True, limits, **more)


def test_kernels_by_the_pairs_of_an_expert() -> None:
    assert [planned(n).kernel for n in (1, 128, 129)] == ["quantized_8", "quantized_8", "quantized_16"]
    assert [planned(n, 8).kernel for n in (32, 33)] == ["quantized_8", "quantized_16"]
    most = plans.QUANTIZED_MEAN_PAIRS * 8
    chosen = [planned(n, 8, weight_format=each).kernel for each in QUANTIZED_BITS for n in (most, most + 1)]
    assert chosen == ["quantized_16", "quantized_48"] * len(QUANTIZED_BITS)
    forced = [
        planned(1, kernel=name, multiplies_fp8=True, limits=RTX4090 if name == "mma_fp8" else H200)
        for name in QUANTIZED_KERNELS
    ]
    assert [plan.kernel for plan in forced] == list(QUANTIZED_KERNELS)
    assert [plan.block_size for plan in forced] == [0, 16, 48, 128, 128]
    with pytest.raises(ValueError, match="kernel='quantized_8': at most 128 pairs, got 129"):
        planned(129, kernel="quantized_8")
    with pytest.raises(ValueError, match=r"compute capability 8\.0"):
        planned(1, limits=GPUS["T4"])


def test_fp8_is_multiplied_where_that_reads_weights_faster() -> None:
    def chosen(hidden: int, inner: int, num_experts: int, *pairs: int, **more: Any) -> list[str]:
        sizes = (num_experts, num_experts, hidden, inner, "bf16", True)
        more = {"weight_format": "fp8", "multiplies_fp8": True, **more}
        limits = more.pop("limits", H200)
        return [plan_experts(n, *sizes, limits, **more).kernel for n in pairs]

    few, products = "quantized_8", "wgmma_fp8"
    assert chosen(2048, 768, 128, 8, 64, 128, 129) == [few, few, few, products]  # Qwen3-30B
    assert chosen(7168, 2048, 64, 8, 16, 64) == [few, products, products]  # DeepSeek-V3
    assert chosen(4096, 14336, 8, 2, 16, 64) == [products] * 3  # Mixtral, whose second product has few tiles
    assert chosen(4096, 14336, 8, 2, 64, multiplies_fp8=False) == [few, "quantized_16"]
    assert chosen(4096, 14336, 8, 2, 64, weight_format="int8", multiplies_fp8=False) == [few, "quantized_16"]
    for limits in (A100, B200, H200._replace(max_clusters=Clusters())):
        assert chosen(4096, 14336, 8, 64, limits=limits) == ["quantized_16"]
        with pytest.raises(ValueError, match="kernel='wgmma_fp8': this device has no wgmma"):
            chosen(4096, 14336, 8, 64, limits=limits, kernel=products)


def test_fp8_is_multiplied_without_wgmma_where_experts_have_many_rows() -> None:
    most = plans.MMA_FP8_MEAN_ROWS * 8

    def chosen(limits: Any, *pairs: int, **more: Any) -> list[str]:
        return [planned(n, 8, limits, **{"multiplies_fp8": True, **more}).kernel for n in pairs]

    for limits in (RTX4090, B200, RTX5090):
        assert chosen(limits, 8, most - 1, most, most + 1) == [
            "quantized_8", "quantized_16", "mma_fp8", "mma_fp8"
        ]  # fmt: skip
        assert chosen(limits, most, multiplies_fp8=False) == ["quantized_16"]
        assert chosen(limits, most + 1, multiplies_fp8=False) == ["quantized_48"]
        of_others = plan_experts(most, 8, 16, 2048, 768, "bf16", True, limits, None, "fp8", True)
        assert of_others.kernel == "quantized_16"  # half of the pairs go to other ranks
        of_others = plan_experts(2 * most, 8, 16, 2048, 768, "bf16", True, limits, None, "int4")
        assert of_others.kernel == "quantized_16"
        assert chosen(limits, 1, kernel="mma_fp8") == ["mma_fp8"]
        for pairs, num_experts in ((1, 8), (1024, 8), (1025, 8), (1025, 3), (131_072, 128)):
            plan = planned(pairs, num_experts, limits, kernel="mma_fp8", multiplies_fp8=True)
            for launch, width, columns in zip(plan.products, (768, 2048), plan.columns, strict=True):
                assert launch.grid >= ceil_div(pairs, 128) * ceil_div(width, columns)
                assert launch.shared_bytes + 512 <= limits.shared_bytes  # and the pairs of a block
            assert plan.columns == (128, 256)
            assert plan.group_blocks == (1 if pairs <= 128 * num_experts else plans.MMA_GROUP_BLOCKS)
    without_clusters = H200._replace(max_clusters=Clusters())
    assert chosen(A100, most) == chosen(without_clusters, most) == ["quantized_16"]
    assert chosen(H200, most) == ["wgmma_fp8"]
    for limits in (A100, H200, without_clusters):
        with pytest.raises(ValueError, match=r"kernel='mma_fp8' is for .* on Hopper, 'wgmma_fp8' does the"):
            chosen(limits, most, kernel="mma_fp8")


@pytest.mark.parametrize("weight_format", QUANTIZED_BITS)
def test_plans_fit_their_devices_and_their_sources(weight_format: str) -> None:
    text = sources.unit(f"experts_{weight_format}").headers["experts/quantized.cuh"].decode()
    for limits in (A100, RTX4090, H200):
        # Rows of weights, stages, and blocks that an SM of an H200 has room for.
        for name, height, stages, most in (
            ("quantized_8", 64, 3, 1), ("quantized_16", 128, 3, 3), ("quantized_48", 128, 2, 2)
        ):  # fmt: skip
            pairs = 1 if name == "quantized_8" else 4096
            plan = planned(pairs, limits=limits, weight_format=weight_format, kernel=name)
            stage = height * 128 + plan_pairs(name) * 128 * 8 // QUANTIZED_BITS[weight_format] * 2
            for launch, columns, width in zip(plan.products, plan.columns, (768, 2048), strict=True):
                assert launch.unit == f"experts_{weight_format}"
                assert launch.shared_bytes == stage * stages
                static = plans.DIRECT_STATIC_BYTES if name == "quantized_8" else 0
                assert launch.shared_bytes + static <= limits.shared_bytes
                assert text.count(f", {plan_pairs(name)})") == 4  # entries
                if pairs == 1:
                    assert launch.grid == width // columns
                elif limits == H200:
                    assert launch.grid == most * limits.num_sms


def plan_pairs(name: str) -> int:
    return int(name.removeprefix("quantized_"))


# ---- the emulator


@needs_compiler
@pytest.mark.parametrize("name", FORMATS)
def test_emulated(name: str) -> None:
    """Each kernel, the same bits: with groups of its own and with those of align. Gates before their ups,
    between them, and none."""
    for seed in (0, 3, 5):
        call, quantization = quantized(seed, name, 20)
        expected = call(lambda tensor: tensor, quantization=quantization)
        results = {}
        for kernel in (None, *kernels_for(call)):
            with Emulator(A100._replace(num_sms=2), 80, seed)() as device:
                results[kernel] = called(call, quantization, device.tensor, kernel=kernel)
            entries = [
                entry for entry in device.launched if entry.startswith(f"experts_{quantization.format}")
            ]
            assert len(entries) == 2
            assert kernel is None or all(f"_{plan_pairs(kernel)}_" in entry for entry in entries)
            assert close(results[kernel], expected), f"{seed=} {kernel=}"
        assert all(torch.equal(result, results[None]) for result in results.values()), seed


@needs_compiler
@pytest.mark.parametrize("tokens", [8, 9, 16, 33, 49])
def test_emulated_with_groups(tokens: int) -> None:
    """Of one expert: groups of up to 8, 16 and 48 pairs; more tiles than blocks, more stages than steps."""
    for name, hidden, inner in (("fp8 by blocks", 528, 128), ("int4 by 32 with zeros", 1056, 96)):
        sizes = {"tokens": tokens, "topk": 1, "experts": 1, "hidden": hidden, "inner": inner}
        call, quantization = quantized(tokens, name, **sizes)
        expected = call(lambda tensor: tensor, quantization=quantization)
        for kernel in kernels_for(call):
            with Emulator(A100._replace(num_sms=1), 80, tokens)() as device:
                assert close(called(call, quantization, device.tensor, kernel=kernel), expected), kernel


@needs_compiler
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_code(stored: torch.dtype, dtype: torch.dtype) -> None:
    """By products with ones and zeros, which take each out of w2."""
    codes = torch.arange(256, dtype=torch.uint8)
    if stored == torch.float8_e4m3fn:
        codes[codes % 128 == 127] = 0  # NaN
    w2, eye = codes.view(stored).view(1, 16, 16), torch.eye(16)
    tensors = (eye.to(dtype), eye.to(stored)[None], w2, torch.ones(16, 1), torch.zeros(16, 1).int())
    with Emulator(A100, 80)() as device:
        scale = device.tensor(torch.ones(1, 16))
        of = (
            Quantization.int8(scale, scale)
            if stored == torch.int8
            else Quantization.fp8_channel(scale, scale)
        )
        x, w1, second, weights, ids = map(device.tensor, tensors)
        result = fused_experts(x, w1, second, weights, ids, "relu2_no_mul", quantization=of)
    assert torch.equal(result.float(), w2[0].float().T)


# ---- rows in fp8, too

FP8_ROWS = ("fp8 by blocks", "fp8 by channels", "fp8 by tensors", "fp8 by gate and up")


FP8_DEVICES = {
    "wgmma_fp8": (H200._replace(num_sms=4, max_clusters=Clusters(of_2=2)), 90),
    "mma_fp8": (RTX4090._replace(num_sms=4), 89),
}


def fp8_rows(seed: int, **given: int) -> tuple[Layer, Quantization]:
    """A random call that FP8_KERNELS take."""
    pick = random.Random(seed)
    name, inner = FP8_ROWS[seed % len(FP8_ROWS)], 128 * pick.choice((1, 2))
    sizes = {
        "tokens": pick.choice((1, 3, 17, 70, 150)),
        "topk": pick.choice((1, 2)),
        "experts": pick.choice((1, 2, 3)),
        "hidden": 128 * pick.choice((1, 2, 5)),
        "inner": inner if name == "fp8 by blocks" else inner - 48,
    }
    call, quantization = quantized(seed, name, **{**sizes, **given})
    if quantization.block_columns:  # whose scales are fp32
        quantization = moved(quantization, torch.Tensor.float)
    return call, quantization


def rows_of(values: torch.Tensor) -> torch.Tensor:
    """Group by group what [T, columns] stand for as e4m3."""
    rows = []
    for row in values.double().unbind():
        groups = []
        for group in row.split(128):
            scale = max(group.abs().max().item(), 1e-10) / 448
            groups.append((group / scale).float().to(torch.float8_e4m3fn).double() * scale)
        rows.append(torch.cat(groups))
    return torch.stack(rows)


def activated_rows(activate: Any, *args: Any) -> torch.Tensor:
    return rows_of(activate(*args)[None])[0]


def test_fp8_rows_against_float64() -> None:
    for seed in range(8):
        call, quantization = fp8_rows(seed, tokens=5)
        result, same = (call(torch.clone, quantization=quantization, kernel=kernel) for kernel in FP8_KERNELS)
        assert torch.equal(result, same)
        in_16_bits = call(lambda tensor: tensor, quantization=quantization)
        w1, w2 = quantization.dequantize(call.tensors["w1"], call.tensors["w2"])
        tensors = {
            **call.tensors,
            "w1": w1,
            "w2": w2,
            "hidden_states": rows_of(call.tensors["hidden_states"]),
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "activate", functools.partial(activated_rows, cpu.activate))
            expected = exact(call._replace(tensors=tensors))
        assert close(result, expected), seed
        assert not torch.equal(result, in_16_bits) or not result.any()
        # 3 bits of mantissa, twice.
        error = (result.double() - in_16_bits.double()).norm() / in_16_bits.double().norm().clamp(1e-9)
        assert error < 0.08, seed


def nearly(result: torch.Tensor, expected: torch.Tensor, share: float = 0.02) -> bool:
    """But for the order of sums, and activations that become the code beside for it: a sixteenth off."""
    difference, size = result.float() - expected.float(), expected.float()
    few = difference.norm() <= share * size.norm() + 1e-3
    return result.shape == expected.shape and bool(few and difference.abs().max() <= size.abs().max() / 12)


def test_fp8_rows_of_what_cannot_be() -> None:
    for name, change, given in (
        ("fp8 by wide blocks", torch.Tensor.float, {}),
        ("fp8 by blocks", torch.Tensor.half, {"hidden": 128}),
        ("fp8 by blocks", torch.Tensor.float, {"hidden": 144}),
        ("int8 by channels", torch.Tensor.float, {"hidden": 128}),
    ):
        call, quantization = quantized(0, name, **given)
        for kernel in FP8_KERNELS:
            with pytest.raises(ValueError, match=f"kernel='{kernel}': expected fp8 weights with one scale"):
                call(torch.clone, quantization=moved(quantization, change), kernel=kernel)


@needs_compiler
@pytest.mark.parametrize("kernel", FP8_KERNELS)
@pytest.mark.parametrize("seed", range(16))
def test_emulated_fp8_rows(seed: int, kernel: str) -> None:
    call, quantization = fp8_rows(seed)
    expected = call(lambda tensor: tensor, quantization=quantization, kernel=kernel)
    with Emulator(*FP8_DEVICES[kernel], seed)() as device:
        result = called(call, quantization, device.tensor, kernel=kernel)
        assert close(result, expected)
        launched = [entry for entry in device.launched if "align" not in entry]
        assert [entry.partition("_")[0] for entry in launched] == ["quantize", "experts", "experts", "moe"]
        assert all(f"_{kernel}_" in entry for entry in launched[1:3])
        # A row has the same bits alone.
        one = call._replace(
            tensors={
                name: tensor[-1:] if name in PER_TOKEN else tensor for name, tensor in call.tensors.items()
            }
        )
        assert torch.equal(called(one, quantization, device.tensor, kernel=kernel), result[-1:])


PER_TOKEN = ("hidden_states", "topk_weights", "topk_ids", "shared_output")


def of_one_expert(seed: int, tokens: int) -> tuple[Layer, Quantization]:
    """The last group of columns is a part of one."""
    call, quantization = fp8_rows(seed, tokens=tokens, topk=1, experts=1, hidden=256, inner=144)
    tensors = {**call.tensors, "topk_ids": torch.zeros(tokens, 1, dtype=torch.int32)}
    tensors.pop("expert_map", None)
    return call._replace(tensors=tensors), quantization


@needs_compiler
@pytest.mark.parametrize("tokens", [15, 16, 17, 127, 128, 129])
def test_emulated_fp8_rows_at_the_edges_of_a_tile(tokens: int) -> None:
    """Where sixteen rows of it, and all of it, are full; with a gate and without."""
    for seed in (1, 6):
        call, quantization = of_one_expert(seed, tokens)
        expected = call(lambda tensor: tensor, quantization=quantization, kernel="mma_fp8")
        assert expected.any()
        with Emulator(*FP8_DEVICES["mma_fp8"], tokens)() as device:
            assert nearly(called(call, quantization, device.tensor, kernel="mma_fp8"), expected), seed


@needs_compiler
@pytest.mark.parametrize(("kernel", "nvrtc"), [("wgmma_fp8", 13.0), ("mma_fp8", 13.0), ("mma_fp8", 12.3)])
def test_emulated_fp8_rows_that_are_not_finite(
    kernel: str, nvrtc: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN stays, and what is infinite becomes 448 scales of the rest: hidden states, and what the activation
    gives. NVRTC before 12.4 has products of fp16 in place of those of mma_fp8."""
    parts = zip(("MAJOR", "MINOR"), str(nvrtc).split("."), strict=True)
    versions = [f"-D__CUDACC_VER_{part}__={number}" for part, number in parts]
    monkeypatch.setattr(emulator, "WATCHED", [*emulator.WATCHED[:-2], *versions])
    monkeypatch.setattr(emulator, "library", functools.cache(emulator.Library))
    for seed in (5, 9):  # silu, whose infinities torch tells on CPUs, too
        call, quantization = of_one_expert(seed, 20)
        x = call.tensors["hidden_states"]
        bias = torch.zeros(1, call.tensors["w1"].shape[1], dtype=x.dtype)
        x[3, 7], x[5, 7], bias[0, 9] = torch.nan, -torch.inf, torch.inf
        call = call._replace(tensors={**call.tensors, "w1_bias": bias})
        expected = call(lambda tensor: tensor, quantization=quantization, kernel=kernel)
        with Emulator(*FP8_DEVICES[kernel], seed)() as device:
            result = called(call, quantization, device.tensor, kernel=kernel)
        assert expected.isnan().all(dim=1).nonzero().tolist() == [[3]]
        assert torch.equal(result.isnan(), expected.isnan())
        assert nearly(result.nan_to_num(), expected.nan_to_num())


# ---- torch


def test_traced() -> None:
    call, quantization = quantized(3, "int4 by 64 with zeros")
    expected = call(torch.clone, quantization=quantization)

    def function(x: torch.Tensor) -> Any:
        rest: dict[str, Any] = {
            name: tensor for name, tensor in call.tensors.items() if name != "hidden_states"
        }
        return fused_experts(x, **rest, **call.options, quantization=quantization) + 0

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(call.tensors["hidden_states"]), expected)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_against_the_cpu(name: str) -> None:
    for seed in range(10):
        call, quantization = quantized(seed, name, 200 if seed % 5 == 0 else 40)
        expected = call(lambda tensor: tensor, quantization=quantization)
        tokens, hidden = expected.shape
        results = []
        for kernel in (None, *kernels_for(call)):
            memory = torch.full((tokens + 2, hidden), 77.0, dtype=expected.dtype, device="cuda")
            called(call, quantization, lambda tensor: tensor.cuda(), out=memory[1:-1], kernel=kernel)
            assert bool((memory[[0, -1]] == 77).all()), f"{seed=} {kernel=}"
            results.append(memory[1:-1].cpu())
            assert close(results[-1], expected), f"{seed=} {kernel=}"
        assert all(torch.equal(result, results[0]) for result in results), seed


@pytest.mark.gpu
def test_fp8_rows_against_the_cpu() -> None:
    runs = device_limits(torch.cuda.current_device()).runs
    kernel = next((name for name in FP8_KERNELS if runs(f"experts_{name}")), None)
    if kernel is None:
        pytest.skip("this GPU has no products of fp8")
    for seed in range(40):
        tokens = (1, 3, 17, 70, 300, 700)[seed % 6]
        call, quantization = fp8_rows(seed, tokens=tokens, hidden=128 * (1 + seed % 9))
        expected = call(lambda tensor: tensor, quantization=quantization, kernel=kernel)
        memory = torch.full((tokens + 2, expected.shape[1]), 77.0, dtype=expected.dtype, device="cuda")
        for _ in range(2):
            out = memory[1:-1].fill_(torch.nan)
            called(call, quantization, lambda tensor: tensor.cuda(), out=out, kernel=kernel)
            assert bool((memory[[0, -1]] == 77).all()), seed
            assert nearly(out.cpu(), expected), seed


@pytest.mark.gpu
def test_gpu_in_a_graph() -> None:
    call, quantization = quantized(5, "fp8 by blocks")
    placed = moved(quantization, lambda tensor: tensor.cuda())
    tensors: dict[str, Any] = {name: tensor.cuda() for name, tensor in call.tensors.items()}
    out = torch.empty_like(tensors["hidden_states"])
    expected = fused_experts(**tensors, **call.options, quantization=placed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_experts(**tensors, **call.options, quantization=placed, out=out)
    graph.replay()
    assert torch.equal(out, expected)
