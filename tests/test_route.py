"""route: against gating and alignment one after the other, to the bit; in the emulator and on a GPU."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import emulator
import gpus
import numpy as np
import pytest
import torch
from cache_helpers import Everything
from emulator import Emulator, cases
from operator_cases import BIAS, LOGITS, MASK, Case

from cupy_moe import MoERouting, aligned_sizes, moe_align_block_size, route, topk_softmax
from cupy_moe.errors import KernelLaunchError
from cupy_moe.operators.gate import _run as run_gate
from cupy_moe.plans.gate import plan_gate
from cupy_moe.plans.route import (
    CLUSTER_FAST_TOKENS,
    CLUSTER_THREADS,
    ROUTE_KERNELS,
    SMALL_FAST_TOKENS,
    SMALL_MAX_TOKENS,
    SMALL_THREADS,
    RouteSizes,
    plan_route,
)

MAP = torch.tensor([0, -1, 1, 2, -1, 3, 10, 4, 5], dtype=torch.int32)
CASES = {
    "route": Case(
        route,
        {
            "gating_output": LOGITS, "topk": 2, "block_size": 4, "e_score_correction_bias": BIAS,
            "padding_mask": MASK, "num_fused_shared_experts": 1, "shared_expert_weight": 0.4,
            "expert_map": MAP,
        },
    ),
    "route_hash": Case(
        route,
        {
            "gating_output": LOGITS, "topk": 2, "block_size": 4, "scoring_func": "softplus_sqrt",
            "input_ids": torch.tensor([2, 0, 1, 9, 2]), "hash_table": torch.tensor([[0, 7], [3, 1], [5, 8]]),
        },
    ),
}  # fmt: skip


def random_call(seed: int, most_tokens: int = 40) -> dict[str, Any]:
    """Arguments of route: those of a random gating, of several sizes, and an alignment's."""
    pick, call = random.Random(-seed), cases.gate(seed)
    arguments = {**call.tensors, **call.rest}
    repeats = pick.choice((0, 1, 1, pick.randint(2, most_tokens)))
    for name in ("gating_output", "padding_mask", "input_ids"):
        if name in arguments:
            arguments[name] = torch.cat([arguments[name]] * repeats)[:most_tokens] if repeats else (
                arguments[name][:0]
            )  # fmt: skip
    num_buckets = call.tensors["gating_output"].shape[1] + call.rest["num_fused_shared_experts"]
    if pick.random() < 0.4:
        arguments["expert_map"] = torch.randint(-1, num_buckets + 2, (num_buckets,), dtype=torch.int32)
    arguments["ids_dtype"] = pick.choice((torch.int32, torch.int64))
    arguments["block_size"] = pick.choice((1, 2, 3, 16, 64, 128))
    arguments["pad_sorted_ids"], arguments["ignore_invalid_experts"] = (
        pick.random() < 0.5,
        pick.random() < 0.5,
    )
    return arguments


def in_turn(arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """The two functions."""
    align = ("block_size", "expert_map", "pad_sorted_ids", "ignore_invalid_experts")
    gating = {name: value for name, value in arguments.items() if name not in align}
    gated = run_gate(**{"e_score_correction_bias": None, "padding_mask": None, **gating})
    num_experts = arguments["gating_output"].shape[1] + arguments["num_fused_shared_experts"]
    aligning = {name: arguments[name] for name in align if name in arguments}
    return *gated, *moe_align_block_size(gated.topk_ids, num_experts=num_experts, **aligning)


def placed(arguments: dict[str, Any], place: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    return {n: place(v) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}


def equal(results: Any, expected: Any) -> bool:
    return all(cases.same_bits(a.cpu(), b.cpu()) for a, b in zip(results, expected, strict=True))


def test_the_cpu_does_one_after_the_other() -> None:
    for seed in range(40):
        arguments = random_call(seed)
        assert equal(route(**arguments), in_turn(arguments)), seed


def test_padding_has_no_slots() -> None:
    mask = torch.tensor([True, False, True])
    routing = route(torch.randn(3, 8), 2, 4, padding_mask=mask, num_fused_shared_experts=1)
    assert routing.topk_ids[mask].tolist() == [[-1] * 3] * 2
    assert sorted(i for i in routing.sorted_token_ids.tolist() if i < 9) == [3, 4, 5]
    assert routing.num_tokens_post_pad.item() == 12


def test_out_arrays_and_no_tokens() -> None:
    x = torch.randn(4, 8)
    right = route(x, 2, 4)
    out: Any = tuple(torch.full_like(result, 7) for result in right)
    result = route(x, 2, 4, out=out)
    assert isinstance(result, MoERouting)
    assert all(got is given for got, given in zip(result, out, strict=True))
    assert equal(out, right)
    array: Any = x.numpy()
    for got, expected in zip(route(array, 2, 4), right, strict=True):
        assert isinstance(got, np.ndarray)
        assert (got == expected.numpy()).all()
    assert route(x[:0], 2, 4).num_tokens_post_pad.tolist() == [0]


# ---- plans


def planned(tokens: int, limits: Any = gpus.H200, kernel: str | None = None, **more: Any) -> str:
    sizes = {
        "num_experts": 256,
        "topk": 8,
        "num_groups": 1,
        "with_bias": False,
        "with_softcap": False,
        **more,
    }
    gate = plan_gate(tokens, element_bytes=4, limits=limits, **sizes)
    experts, topk = sizes["num_experts"], sizes["topk"]
    slots = aligned_sizes(tokens * topk, experts, 128)[0]
    plan = plan_route(gate, RouteSizes(tokens, topk, experts, slots, 128), limits, kernel)
    if plan.launch is None:
        return plan.kernel
    assert plan.launch.shared_bytes <= limits.shared_bytes - 144
    assert plan.launch.block <= (SMALL_THREADS if "small" in plan.launch.entry else CLUSTER_THREADS)
    assert plan.launch.block * 8 >= 32 * tokens or kernel
    return plan.launch.entry


def test_plan() -> None:
    most = SMALL_FAST_TOKENS
    for tokens, entry in (
        (1, "route_small_plain_8"), (most, "route_small_plain_8"), (most + 1, "route_cluster8_plain_8"),
        (CLUSTER_FAST_TOKENS, "route_cluster8_plain_8"), (CLUSTER_FAST_TOKENS + 1, "separate"),
    ):  # fmt: skip
        assert planned(tokens) == entry
    assert planned(most, gpus.A100) == "route_small_plain_8"
    assert planned(most + 1, gpus.A100) == planned(most + 1, gpus.RTX4090) == "separate"
    assert planned(SMALL_MAX_TOKENS, kernel="small") == "route_small_plain_8"
    assert planned(most, topk=17) == "route_cluster8_plain_8"
    assert planned(8, num_experts=128) == "route_small_plain_4"
    assert planned(8, num_experts=512) == planned(8, num_experts=512, with_bias=True) == "route_small_any_16"
    assert planned(9, num_groups=8) == planned(9, with_bias=True) == "separate"
    assert planned(9, kernel="cluster8", with_bias=True) == "route_cluster8_any_8"
    assert planned(8, num_experts=513) == planned(8, topk=33) == planned(8, with_softcap=True) == "separate"
    assert planned(1, kernel="separate") == "separate"
    assert planned(500, kernel="cluster8") == "route_cluster8_plain_8"
    for tokens, limits, kernel, message in (
        (17, gpus.H200, "small", "at most 16 tokens"), (8, gpus.A100, "cluster8", "no cluster of 8"),
        (10**5, gpus.H200, "cluster8", "fewer tokens"), (1024, gpus.H200, "small", "at most 16 tokens"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            planned(tokens, limits, kernel)
    with pytest.raises(ValueError, match="a warp can gate"):
        planned(8, kernel="small", with_softcap=True)


def test_kernels_exist(everything: Everything) -> None:
    for result in everything.results:
        if result.unit in ("route_small", "route_cluster8"):
            bodies = ("plain_4", "plain_8", "any_8", "any_16")
            assert set(result.kernels) == {f"{result.unit}_{body}" for body in bodies}, result.target


# ---- in the emulator


@pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))
@pytest.mark.parametrize(("arch", "limits"), [(80, gpus.A100), (90, gpus.H200)])
def test_every_kernel_gives_the_bits_of_the_two_functions(arch: int, limits: Any) -> None:
    launched = set()
    for seed in range(1000 * arch, 1000 * arch + 34):
        arguments = random_call(seed)
        with Emulator(limits, arch, seed)() as device:
            inputs = placed(arguments, device.tensor)
            expected = in_turn(inputs)
            for kernel in (None, *ROUTE_KERNELS):
                try:
                    results = route(**inputs, kernel=kernel)
                except ValueError:
                    assert kernel in ("small", "cluster8"), seed
                    continue
                assert equal(results, expected), f"{seed=} {kernel=}"
        launched |= set(device.launched)
    ran = {entry for entry in launched if entry.startswith("route")}
    kinds = ("small", "cluster8") if arch == 90 else ("small",)
    assert ran >= {f"route_{kind}_{body}" for kind in kinds for body in ("any_8", "any_16")}, ran


@pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))
def test_thresholds() -> None:
    kinds = {1: "small", SMALL_FAST_TOKENS: "small", SMALL_FAST_TOKENS + 1: "cluster8"}
    kinds |= {CLUSTER_FAST_TOKENS: "cluster8", CLUSTER_FAST_TOKENS + 1: ""}
    for (tokens, kind), share in itertools.product(kinds.items(), (4, 8)):
        arguments: Any = {"gating_output": torch.randn(tokens, 20 * share), "topk": 8, "block_size": 16}
        with Emulator(gpus.H200, 90)() as device:
            results = route(**placed(arguments, device.tensor))
        assert equal(results[1:], route(**arguments)[1:])
        assert len(device.launched) == (1 if kind else 2)
        assert device.launched[0] == (f"route_{kind}_plain_{share}" if kind else f"gate_plain_{share}")


@pytest.mark.skipif(bool(emulator.compiler()), reason=str(emulator.compiler()))
def test_where_the_driver_refuses_clusters_one_follows_the_other() -> None:
    class Refusing(Emulator):
        def _launch(self, function: int, *rest: Any) -> None:
            if "cluster8" in self._functions[function][1]:
                raise KernelLaunchError("no room for clusters")
            super()._launch(function, *rest)

    x = torch.randn(20, 64)
    with Refusing(gpus.H200, 90)() as device:
        placed_x = device.tensor(x)
        results = route(placed_x, 8, 16)
        with pytest.raises(KernelLaunchError, match="no room"):
            route(placed_x, 8, 16, kernel="cluster8")
        with pytest.raises(TypeError, match="input_ids, hash_table: expected both"):
            route(placed_x, 8, 16, input_ids=torch.zeros(20).int())
    assert device.launched == ["gate_plain_4", "align_shared_i32"]
    assert equal(results[1:], route(x, 8, 16)[1:])


# ---- on a GPU


@pytest.mark.gpu
def test_gpu_gives_the_bits_of_the_two_functions() -> None:
    for seed in range(150):
        arguments = placed(random_call(seed, 200), lambda tensor: cases.place(tensor, "cuda").tensor)
        expected = in_turn(arguments)
        for kernel in (None, *ROUTE_KERNELS):
            try:
                results = route(**arguments, kernel=kernel)
            except ValueError:
                continue
            assert equal(results, expected), f"{seed=} {kernel=}"


@pytest.mark.gpu
def test_gpu_in_a_graph() -> None:
    for tokens in (1, 64, 700):
        x = torch.randn(tokens, 256, device="cuda")
        route(x, 8, 16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = route(x, 8, 16)
        x.normal_()
        graph.replay()
        gated = topk_softmax(x, 8)
        assert equal(result, (*gated, *moe_align_block_size(gated.topk_ids, 16, 256)))


@pytest.mark.gpu
def test_gpu_writes_every_element_and_nothing_beside() -> None:
    for tokens, num_experts in itertools.product((3, 60, 300), (8, 256)):
        x = torch.randn(tokens, num_experts)
        expected = route(x, 2, 64)
        wholes = [torch.full((r.numel() + 64,), 60, dtype=r.dtype, device="cuda") for r in expected]
        out: Any = tuple(w[32:-32].view(r.shape) for w, r in zip(wholes, expected, strict=True))
        route(x.cuda(), 2, 64, out=out)
        for got, right, whole in zip(out[1:], expected[1:], wholes[1:], strict=True):
            assert torch.equal(got.cpu(), right)
            assert (whole[:32] == 60).all()
            assert (whole[-32:] == 60).all()
