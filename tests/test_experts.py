"""fused_experts: the CPU against float64, plans, the emulator, and GPUs against the CPU."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import emulator
import pytest
import torch
from cache_helpers import Everything
from emulator import Emulator
from gpus import A100, B200, GPUS, H200, RTX4090, T4, Clusters
from operator_cases import Case

import cupy_moe
from cupy_moe import experts_workspace_bytes, fused_experts, fused_moe, topk_softmax
from cupy_moe.cpu import experts as cpu
from cupy_moe.operators import _experts_launches as launches
from cupy_moe.operators.experts import ACTIVATIONS
from cupy_moe.plans import experts as plans
from cupy_moe.plans.experts import EXPERTS_KERNELS, TILES, plan_experts

_generator = torch.Generator().manual_seed(1)


def _some(*shape: int) -> torch.Tensor:
    return (torch.randn(shape, generator=_generator) * 0.3).to(torch.float16)  # which NumPy has, too


TENSORS: dict[str, Any] = {
    "hidden_states": _some(5, 16),
    "w1": _some(4, 48, 16),
    "w2": _some(4, 16, 24),
    "topk_weights": torch.rand(5, 2, generator=_generator),
    "topk_ids": torch.randint(-1, 7, (5, 2), generator=_generator, dtype=torch.int32),
}
OPTIONS: dict[str, Any] = {
    "expert_map": torch.tensor([0, -1, 1, 2, 3, 9], dtype=torch.int32),
    "w1_bias": _some(4, 48),
    "w2_bias": _some(4, 16),
    "shared_output": _some(5, 16),
    "routed_scaling_factor": 2.5,
}
CASES = {"experts": Case(fused_experts, {**TENSORS, **OPTIONS})}


class Layer(NamedTuple):
    """A random call, by a seed."""

    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]

    def __call__(self, place: Callable[[torch.Tensor], torch.Tensor], **more: Any) -> torch.Tensor:
        placed: dict[str, Any] = {name: place(tensor) for name, tensor in self.tensors.items()}
        return fused_experts(**placed, **self.options, **more)


def layer(seed: int, most_tokens: int = 40, **given: Any) -> Layer:
    pick = random.Random(seed)
    torch.manual_seed(seed)
    sizes = {
        "tokens": pick.choice((1, 2, 5, 17, most_tokens)),
        "topk": pick.choice((1, 2, 3, 8)),
        "experts": pick.choice((1, 2, 5, 8, 33)),
        "hidden": pick.choice((8, 16, 64, 72, 136, 200)),
        "inner": pick.choice((8, 24, 64, 120)),
    }
    tokens, topk, experts, hidden, inner = (given.get(name, size) for name, size in sizes.items())
    dtype = pick.choice((torch.bfloat16, torch.float16))
    activation = ACTIVATIONS[seed % len(ACTIVATIONS)]
    rows = 2 * inner if activation in cpu.GATED else inner

    def some(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) * 0.3).to(dtype)

    total = experts + pick.choice((0, 3))
    tensors = {
        "hidden_states": some(tokens, hidden),
        "w1": some(experts, rows, hidden),
        "w2": some(experts, hidden, inner),
        "topk_weights": torch.rand(tokens, topk),
        "topk_ids": torch.randint(
            -2, total + 2, (tokens, topk), dtype=pick.choice((torch.int32, torch.int64))
        ),
    }
    if pick.random() < 0.3:  # padded rows
        tensors["w1"] = torch.cat([tensors["w1"], some(experts, rows, 8)], dim=2)[:, :, :hidden]
        tensors["w2"] = torch.cat([tensors["w2"], some(experts, hidden, 16)], dim=2)[:, :, :inner]
    if pick.random() < 0.3:
        tensors["hidden_states"] = torch.cat([some(tokens, 8), tensors["hidden_states"]], dim=1)[:, 8:]
    if pick.random() < 0.4:
        tensors["expert_map"] = torch.randint(-1, experts + 1, (total,), dtype=torch.int32)
    if pick.random() < 0.5:
        tensors["w1_bias"], tensors["w2_bias"] = some(experts, rows), some(experts, hidden)
    if pick.random() < 0.3:
        tensors["shared_output"] = some(tokens, hidden)
    options = {
        "activation": activation,
        "apply_router_weight_on_input": pick.random() < 0.3,
        "routed_scaling_factor": pick.choice((1.0, 2.5)),
    }
    if activation in cpu.SWIGLU and pick.random() < 0.4:
        options |= {"swiglu_alpha": pick.choice((None, 1.2)), "swiglu_limit": pick.choice((0.3, 2))}
    if pick.random() < 0.3:  # most to one expert
        ids = tensors["topk_ids"]
        tensors["topk_ids"] = torch.where(torch.rand(ids.shape) < 0.9, pick.randrange(total), ids)
    return Layer(tensors, options)


def close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    """But for the rounding of the intermediates, where the order of a sum decides."""
    error = (result.float() - expected.float()).abs().max().item() if result.numel() else 0.0
    size = expected.float().abs().max().item() if result.numel() else 0.0
    return result.shape == expected.shape and error <= 0.02 * size + 1e-3


def exact(call: Layer) -> torch.Tensor:
    """In float64, expert by expert and token by token."""
    t = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in call.tensors.items()
    }
    x, w1, w2 = t["hidden_states"], t["w1"], t["w2"]
    result = torch.zeros(len(x), w2.shape[1], dtype=torch.float64)
    for token in range(len(x)):
        for k in range(t["topk_ids"].shape[1]):
            expert = int(t["topk_ids"][token, k])
            if "expert_map" in t:
                expert = int(t["expert_map"][expert]) if 0 <= expert < len(t["expert_map"]) else -1
            if not 0 <= expert < len(w1):
                continue
            weight = t["topk_weights"][token, k]
            on_input = call.options["apply_router_weight_on_input"]
            inner = w1[expert] @ x[token]
            inner = inner + t["w1_bias"][expert] if "w1_bias" in t else inner
            numbers = call.options.get("swiglu_alpha"), call.options.get("swiglu_limit")
            inner = cpu.activate(call.options["activation"], inner * weight if on_input else inner, *numbers)
            output = w2[expert] @ inner
            output = output + t["w2_bias"][expert] if "w2_bias" in t else output
            result[token] += output if on_input else output * weight
    result = result * call.options["routed_scaling_factor"]
    return result + t["shared_output"] if "shared_output" in t else result


def test_the_cpu_against_float64() -> None:
    for seed in range(60):
        call = layer(seed)
        assert close(call(lambda tensor: tensor), exact(call)), seed


def test_gates_and_ups_are_clamped() -> None:
    values = torch.tensor([-9.0, 0.5, 9.0, torch.nan, 9.0, -9.0, 0.5, 1.0])  # gates, then ups

    def activated(*numbers: float | None, name: str = "swigluoai_uninterleave") -> list[float]:
        return cpu.activate(name, values, *numbers).nan_to_num(99).tolist()

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    assert activated() == pytest.approx(
        [-9 * sigmoid(-9 * 1.702) * 8, 0.5 * sigmoid(0.851) * -6, 7 * sigmoid(7 * 1.702) * 1.5, 99]
    )
    expected = [-9 * sigmoid(-18) * 2, 0.5 * sigmoid(1) * -2, 2 * sigmoid(4) * 0.5, 99]
    assert activated(2.0, 2.0, name="silu") == pytest.approx(expected)
    assert activated(name="silu")[0] == pytest.approx(-9 * sigmoid(-9) * 9)


def test_fused_moe_is_both() -> None:
    x, logits = TENSORS["hidden_states"], torch.randn(5, 4)
    weights, ids = topk_softmax(logits, 2, True)
    experts = TENSORS["w1"], TENSORS["w2"]
    assert torch.equal(fused_moe(x, logits, *experts, 2, True), fused_experts(x, *experts, weights, ids))


def test_no_tokens_and_no_experts() -> None:
    none = {name: TENSORS[name][:0] for name in ("hidden_states", "topk_weights", "topk_ids")}
    assert fused_experts(**{**TENSORS, **none}).shape == (0, 16)
    nobody = {**TENSORS, "topk_ids": torch.full((5, 2), -1)}
    shared = OPTIONS["shared_output"]
    assert not fused_experts(**nobody).any()
    assert torch.equal(fused_experts(**nobody, shared_output=shared), shared)


# ---- plans


def planned(num_pairs: int, num_experts: int = 128, limits: Any = H200, kernel: str | None = None) -> Any:
    return plan_experts(num_pairs, num_experts, num_experts, 2048, 768, "bf16", True, limits, kernel)


def test_a_few_pairs_take_the_direct_way() -> None:
    most = plans.DIRECT_MAX_PAIRS
    for limits in (A100, RTX4090, H200, B200):
        takes = [planned(n, limits=limits).kernel == "direct" for n in (1, most, most + 1)]
        assert takes == [True, True, False]
        # Not where groups of an expert would read its weights again.
        assert [planned(n, 8, limits).kernel == "direct" for n in (32, 33)] == [True, False]
        with pytest.raises(ValueError, match="kernel='direct': at most 128 pairs, got 129"):
            planned(most + 1, limits=limits, kernel="direct")


def test_blocks_of_a_few_tiles_are_alone_on_an_sm() -> None:
    """As they may begin early, when some SMs have room for two, and others for none."""

    def second(topk: int, limits: Any = H200) -> Any:
        return plan_experts(topk, 8, 8, 4096, 14_336, "bf16", True, limits).products[1]

    assert [second(topk).grid for topk in (1, 2, 3, 4, 5)] == [64, 128, 192, 256, 264]
    assert [second(topk).shared_bytes > H200.shared_bytes // 2 for topk in (2, 3)] == [True, False]
    assert second(1, RTX4090).shared_bytes < 99 * 1024
    few, many = planned(500, limits=B200, kernel="mma_64"), planned(5000, limits=B200, kernel="mma_64")
    assert [launch.overlaps for launch in few.products] == [True, True]
    assert [launch.overlaps for launch in planned(500, 2, B200, "mma_64").products] == [False, False]
    assert all(launch.overlaps for launch in many.products)


def test_tiles_have_about_as_many_rows_as_an_expert() -> None:
    names = {n: planned(n * 128, limits=A100).kernel for n in (2, 10, 11, 40, 41, 80, 81, 10_000)}
    assert names == {
        2: "mma_16",
        10: "mma_16",
        11: "mma_32",
        40: "mma_32",
        41: "mma_64",
        80: "mma_64",
        81: "mma_128",
        10_000: "mma_128",
    }
    with pytest.raises(ValueError, match=r"compute capability 8\.0 or newer"):
        planned(1, limits=T4)


def test_hopper_takes_wgmma() -> None:
    for pairs in (129, 10_000_000):
        plan = planned(pairs)
        assert plan.kernel == "wgmma"
        assert [launch.grid for launch in plan.products] == [132, 132]
    without_clusters = H200._replace(max_clusters=lambda *_: 0)
    for limits in (A100, RTX4090, B200, without_clusters):
        assert planned(10_000, limits=limits).kernel == "mma_64"
        with pytest.raises(ValueError, match="this device has no wgmma"):
            planned(1, limits=limits, kernel="wgmma")


@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if gpu != "T4"])
def test_every_plan_covers_the_output(gpu: str) -> None:
    limits = GPUS[gpu]
    for num_pairs in (1, 7, 8, 100, 1024, 1025, 40_000, 131_072):
        for num_experts in (1, 3, 128, 1024):
            for kernel in (None, *TILES):
                plan = planned(num_pairs, num_experts, limits, kernel)
                for launch, width, columns in zip(plan.products, (768, 2048), plan.columns, strict=True):
                    assert launch.shared_bytes + 1024 <= limits.shared_bytes
                    assert launch.grid > 0
                    if plan.kernel in TILES:  # the others take any number of blocks
                        blocks = -(-num_pairs // plan.block_size)
                        assert launch.grid >= blocks * -(-width // columns)
                        assert launch.grid % plan.group_blocks == 0
                        assert launch.entry.endswith(f"_{plan.block_size}_bf16")


def test_entry_points_exist(everything: Everything) -> None:
    built = {(r.unit, r.target): r.kernels for r in everything.results}
    for target, limits in (("sm_80", A100), ("sm_90a", H200), ("sm_90", H200), ("sm_89", RTX4090)):
        for name in EXPERTS_KERNELS:
            for gated in (True, False):
                if name == "wgmma" and target != "sm_90a":
                    continue
                plan = plan_experts(100, 8, 8, 64, 64, "f16", gated, limits, name)
                kernels = built.get((plan.products[0].unit, target))
                if kernels is None:  # sm_90a has wgmma alone
                    continue
                for launch in plan.products:
                    static = kernels[launch.entry]["smem"]
                    assert launch.shared_bytes + static <= limits.shared_bytes


def test_a_workspace_is_as_large_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for num_tokens, num_experts in ((1, 4), (5, 128), (300, 64)):
        said = experts_workspace_bytes(num_tokens, 8, 64, 32, num_experts)
        for block_size in (0, 16, 32, 64, 128):
            assert launches.lay_out(num_tokens * 8, 64, 32, num_experts, block_size).size <= said
    monkeypatch.setattr(launches, "MAX_WORKSPACE_BYTES", 10_000)
    assert experts_workspace_bytes(10**9, 8, 64, 32, 4) < 40_000


# ---- without a GPU

needs_compiler = pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))
MMA = [name for name in EXPERTS_KERNELS if name.startswith("mma")]


def kernels_for(call: Layer, names: list[str]) -> list[str]:
    """Those that take as many pairs."""
    few = call.tensors["topk_ids"].numel() <= plans.DIRECT_MAX_PAIRS
    return [name for name in names if few or name != "direct"]


@needs_compiler
@pytest.mark.parametrize("arch", [80, 90])
def test_emulated_kernels(arch: int) -> None:
    for seed in range(arch, arch + 36):
        call = layer(seed, 20)
        with Emulator({80: A100, 90: H200}[arch], arch, seed)() as device:
            names = kernels_for(call, [MMA[seed % 4], "direct"])
            results = [call(device.tensor, kernel=name) for name in names]
        assert close(results[0], call(lambda tensor: tensor)), seed
        assert all(torch.equal(result, results[0]) for result in results), seed  # the same bits


def of_tokens(call: Layer, tokens: list[int]) -> Layer:
    """The same call of these tokens alone."""
    theirs = {"hidden_states", "topk_weights", "topk_ids", "shared_output"}
    return call._replace(tensors={n: t[tokens] if n in theirs else t for n, t in call.tensors.items()})


FEW_SMS = A100._replace(num_sms=2)  # so that a block has several tiles


@needs_compiler
@pytest.mark.parametrize("more", [1 - plans.DIRECT_STAGES, -2, -1, 0, 1])
def test_emulated_direct_with_as_many_steps_as_stages(more: int) -> None:
    depth = (plans.DIRECT_STAGES + more) * plans.ROW_BYTES // 2
    for seed in range(4):
        call = layer(seed, tokens=5, topk=2, experts=3, hidden=depth, inner=depth - 8)
        with Emulator(FEW_SMS, 80, seed)() as device:
            result = call(device.tensor, kernel="direct")
        assert close(result, call(lambda tensor: tensor)), seed


@needs_compiler
@pytest.mark.parametrize("pairs", [7, 8, 9, 16, 17, 31, 33, 64, 127, 128])
def test_emulated_direct_with_groups(pairs: int) -> None:
    """Of one expert, then of several: a group has up to 8 pairs, a warp looks at 32."""
    for experts in (1, 2, 40):
        call = layer(pairs, tokens=pairs, topk=1, experts=experts, hidden=24, inner=72)
        with Emulator(FEW_SMS, 80, pairs)() as device:
            result = call(device.tensor, kernel="direct")
        assert close(result, call(lambda tensor: tensor)), experts


# So that clusters have several places, and some blocks of a launch none.
FEW_CLUSTERS = {n: H200._replace(max_clusters=Clusters(of_2=n)) for n in (1, 2, 3)}


def emulated_wgmma(call: Layer, seed: int) -> bool:
    """Whether the results are as specified."""
    with Emulator(FEW_CLUSTERS[1 + seed % 3], 90, seed)() as device:
        result = call(device.tensor, kernel="wgmma")
    assert len([entry for entry in device.launched if entry.startswith("experts_wgmma")]) == 2
    return close(result, call(lambda tensor: tensor))


def of_experts(call: Layer, counts: list[int]) -> Layer:
    """The same layer, with as many tokens of each expert as said."""
    ids = [expert for expert, count in enumerate(counts) for _ in range(count)]
    random.Random(len(ids)).shuffle(ids)
    call.tensors["topk_ids"] = torch.tensor(ids, dtype=torch.int32)[:, None]
    return call._replace(tensors={n: t for n, t in call.tensors.items() if n != "expert_map"})


@needs_compiler
@pytest.mark.parametrize("first", [0, 9])
def test_emulated_wgmma(first: int) -> None:
    for seed in range(first, first + 9):
        pick = random.Random(seed)
        hidden, inner = pick.choice((8, 72, 264, 520)), pick.choice((8, 120, 136, 264))
        tokens, topk = pick.choice(((1, 1), (40, 3), (150, 2), (300, 2)))
        experts = pick.choice((1, 2, 5))
        call = layer(seed, tokens=tokens, topk=topk, experts=experts, hidden=hidden, inner=inner)
        if pick.random() < 0.3:  # most pairs of one expert
            ids = call.tensors["topk_ids"]
            ids[torch.rand(ids.shape) < 0.8] = 0
        assert emulated_wgmma(call, seed), seed


@needs_compiler
@pytest.mark.parametrize("steps", [1, 3, 4, 5, 9])  # of stages there are 4
def test_emulated_wgmma_with_as_many_steps_as_stages(steps: int) -> None:
    for seed, left_out in enumerate((0, 8, 56)):
        call = layer(seed, tokens=230, topk=1, experts=2, hidden=steps * 64 - left_out, inner=72)
        assert emulated_wgmma(of_experts(call, [165, 65]), seed), seed


@needs_compiler
@pytest.mark.parametrize(
    "counts",
    [[1], [64, 65], [127, 0, 129], [128, 1, 256], [257, 383, 3], [385, 513], [0, 0, 700, 130]],
    ids=str,
)
def test_emulated_wgmma_with_blocks_of_experts(counts: list[int]) -> None:
    """Two blocks of pairs at once, or one and two tiles of columns: of 1, 2 and 3 and more."""
    for seed, columns in enumerate((120, 136, 264, 264, 392, 520)):
        call = layer(seed, tokens=sum(counts), topk=1, experts=len(counts), hidden=8, inner=columns)
        assert emulated_wgmma(of_experts(call, counts), seed), seed


@needs_compiler
@pytest.mark.parametrize("blocks", [16, 17, 18, 35])  # 8 twos of them are a group
def test_emulated_wgmma_with_groups(blocks: int) -> None:
    call = layer(
        blocks, tokens=blocks * 128 - 5, topk=1, experts=1, hidden=520, inner=8
    )  # 3 tiles of columns
    assert emulated_wgmma(of_experts(call, [blocks * 128 - 5]), blocks)


@needs_compiler
@pytest.mark.parametrize("experts", [33, 70, 1024])
def test_emulated_wgmma_with_many_experts(experts: int) -> None:
    """An expert is looked for among 32, then among its 32."""
    counts = [0] * experts
    for e, count in ((0, 3), (experts // 2, 130), (experts // 2 + 1, 1), (experts - 2, 2), (experts - 1, 70)):
        counts[e] = count
    call = layer(experts, tokens=sum(counts), topk=1, experts=experts, hidden=8, inner=8)
    assert emulated_wgmma(of_experts(call, counts), experts)


@needs_compiler
def test_emulated_wgmma_with_experts_that_a_map_invents() -> None:
    """More blocks of them than blocks of the grid, which clear their rows."""
    counts = [70, 150, 3, 1, 65, 20]
    call = of_experts(layer(9, tokens=sum(counts), topk=1, experts=2, hidden=24, inner=24), counts)
    call.tensors["expert_map"] = torch.tensor([0, 5, 4, 3, 1, 2], dtype=torch.int32)
    assert emulated_wgmma(call, 0)


@needs_compiler
@pytest.mark.parametrize("row", [0, 24])
def test_nan_of_gate_or_up_stays(row: int) -> None:
    call = layer(0, tokens=2, topk=1, experts=2, hidden=16, inner=24)
    call = call._replace(options={"activation": "swigluoai_uninterleave"})
    call.tensors.pop("expert_map", None)
    call.tensors["topk_ids"] = torch.tensor([[0], [1]])
    call.tensors["w1"][1, row] = torch.nan
    with Emulator(A100, 80)() as device:
        results = [call(device.tensor, kernel=name) for name in ("direct", "mma_16")]
    for result in (*results, call(lambda tensor: tensor)):
        assert result.isnan().all(dim=1).tolist() == [False, True]
        assert not result[0].isnan().any()


@needs_compiler
def test_ids_whose_lower_halves_are_experts() -> None:
    call = layer(3, tokens=4, topk=2, experts=3, hidden=24, inner=24)
    call.tensors["topk_ids"] = torch.tensor([[0, 1], [2**32, 2**33 + 1], [2, 2**63 - 2**32], [2**32 + 2, 0]])
    with Emulator(A100, 80)() as device:
        results = [call(device.tensor, kernel=name) for name in ("direct", "mma_16")]
    assert all(close(result, call(lambda tensor: tensor)) for result in results)


@needs_compiler
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays(activation: str) -> None:
    call = layer(ACTIVATIONS.index(activation) + 9 * 4, 5)  # a layer of that activation
    assert call.options["activation"] == activation
    call.tensors["hidden_states"][0, 3] = torch.nan
    call.tensors["topk_ids"][0, 0] = 0
    call.tensors.pop("expert_map", None)
    expected = call(lambda tensor: tensor)
    assert expected[0].isnan().all()
    with Emulator(A100, 80)() as device:
        for name in kernels_for(call, ["direct", "mma_16"]):
            assert torch.equal(call(device.tensor, kernel=name).isnan(), expected.isnan()), name


@needs_compiler
def test_a_row_has_the_same_bits_in_every_batch_and_tile() -> None:
    """And of blocks, as direct has fewer or more of them."""
    for seed in range(8):
        call = layer(seed, tokens=9, topk=3, experts=4)
        with Emulator(A100, 80, seed)() as device:
            results = {name: call(device.tensor, kernel=name) for name in ("direct", *MMA)}
        with Emulator(FEW_SMS, 80, seed)() as device:
            for name in ("direct", "mma_32"):
                for tokens in ([3], [8, 3, 0], [4, 3, 2, 1, 5]):
                    part = of_tokens(call, tokens)(device.tensor, kernel=name)
                    assert torch.equal(part, results[name][tokens]), f"{seed=} {name=}"
        for name, result in results.items():
            assert torch.equal(result, results["mma_16"]), f"{seed=} {name=}"


@needs_compiler
def test_parts_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    call = layer(4, 40)._replace(options={"activation": "silu"})
    with Emulator(A100, 80)() as device:
        whole = call(device.tensor)
    hidden, inner = call.tensors["w2"].shape[1:]
    per_token = 2 * call.tensors["topk_ids"].shape[1] * (hidden + inner)
    monkeypatch.setattr(launches, "MAX_WORKSPACE_BYTES", 3 * per_token)
    with Emulator(A100, 80)() as device:
        parts = call(device.tensor)
        assert len(device.launched) == 4 * -(-len(call.tensors["hidden_states"]) // 3)
        assert (
            len({entry for entry in device.launched if entry.startswith("experts")}) == 2
        )  # one tile for all
    assert torch.equal(whole, parts)


# ---- on a GPU


@pytest.fixture
def device_kernels() -> list[str]:
    limits = launches.device_limits(torch.cuda.current_device())
    return [name for name in EXPERTS_KERNELS if name != "wgmma" or limits.runs("experts_wgmma")]


@pytest.mark.gpu
def test_every_kernel_against_the_cpu(device_kernels: list[str]) -> None:
    for seed in range(120):
        call = layer(seed, 300 if seed % 10 == 0 else 40)
        expected = call(lambda tensor: tensor)
        tokens, hidden = expected.shape
        results = {}
        for name in (None, *kernels_for(call, device_kernels)):
            memory = torch.full((tokens + 2, hidden), 77.0, dtype=expected.dtype, device="cuda")
            call(lambda tensor: tensor.cuda(), out=memory[1:-1], kernel=name)
            assert bool((memory[[0, -1]] == 77).all()), f"{seed=} {name=}"
            results[name] = memory[1:-1].cpu()
            assert close(results[name], expected), f"{seed=} {name=}"
        same = [results[name] for name in results if name in MMA or name == "direct"]  # whatever the tile
        assert all(torch.equal(result, same[0]) for result in same), seed


@pytest.mark.gpu
def test_gpu_in_a_graph_with_a_workspace() -> None:
    tensors: dict[str, Any] = {name: tensor.cuda() for name, tensor in TENSORS.items()}
    size = experts_workspace_bytes(5, 2, 16, 24, 4)
    workspace, out = (
        torch.empty(size, dtype=torch.uint8, device="cuda"),
        torch.empty_like(tensors["hidden_states"]),
    )
    expected = fused_experts(**tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_experts(**tensors, workspace=workspace, out=out)
    workspace.fill_(255)
    graph.replay()
    assert torch.equal(out, expected)
    for small in (workspace[:512], workspace[8:]):
        with pytest.raises(ValueError, match="workspace: expected"):
            fused_experts(**tensors, workspace=small)


@pytest.mark.gpu
def test_gpu_parts_and_offsets_past_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    experts, hidden, inner = 600, 2048, 1024  # 2.5e9 elements of w1
    w1 = torch.empty(experts, 2 * inner, hidden, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    w2 = torch.empty(experts, hidden, inner, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    x = torch.randn(70, hidden, dtype=torch.bfloat16, device="cuda")
    weights, ids = torch.rand(70, 2, device="cuda"), torch.randint(590, 600, (70, 2), device="cuda")
    result = fused_experts(x, w1, w2, weights, ids)
    expected = cpu.fused_experts(x, w1[590:], w2[590:], weights, ids - 590)
    assert close(result, expected)
    monkeypatch.setattr(launches, "MAX_WORKSPACE_BYTES", 20 * 2 * 2 * (hidden + inner))
    launches.prepare_experts.cache_clear()
    parts = fused_experts(x, w1, w2, weights, ids, kernel="mma_16")
    launches.prepare_experts.cache_clear()
    monkeypatch.undo()
    assert torch.equal(parts, fused_experts(x, w1, w2, weights, ids, kernel="mma_16"))


def test_public() -> None:
    assert {"fused_experts", "fused_moe", "experts_workspace_bytes"} <= set(cupy_moe.__all__)
    assert plans.MAX_LOCAL_EXPERTS == 1024
