"""topk_softmax, topk_sigmoid, grouped_topk: against loops and float64, GPU against CPU.

Grids: those of vLLM's and SGLang's tests and more, looped so that a few tests hold thousands of cases.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from cache_helpers import Everything
from gpus import H200
from operator_cases import BIAS, LOGITS, MASK, Case

from cupy_moe import grouped_topk, topk_sigmoid, topk_softmax, topk_softplus_sqrt
from cupy_moe.cpu import gate as cpu_gate
from cupy_moe.operators import gate
from cupy_moe.operators.gate import GateOptions
from cupy_moe.plans import gate as gate_plans
from cupy_moe.plans.gate import GATE_WARP_MAX_TOKENS, plan_gate

TENSORS = {"gating_output": LOGITS, "e_score_correction_bias": BIAS, "padding_mask": MASK}
GROUPS = {"renormalize": True, "num_expert_group": 4, "topk_group": 2}
CASES = {
    "softmax": Case(topk_softmax, {**TENSORS, "topk": 2}),
    "sigmoid": Case(topk_sigmoid, {**TENSORS, "topk": 2}),
    "grouped": Case(grouped_topk, {**TENSORS, "topk": 2, **GROUPS}),
    "softplus_sqrt": Case(topk_softplus_sqrt, {**TENSORS, "topk": 2, "num_fused_shared_experts": 1}),
    "hash": Case(
        topk_softplus_sqrt,
        {
            "gating_output": LOGITS,
            "topk": 2,
            "input_ids": torch.tensor([2, 0, 1, 9, 2]),
            "hash_table": torch.tensor([[0, 7], [3, 1], [5, 8]]),
        },
    ),
}

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ID_TYPES = (torch.int32, torch.int64, torch.uint32)
SIGNED = {torch.uint32: torch.int32}  # few functions of torch take unsigned tensors


def naive(
    logits: list[float],
    topk: int,
    scoring: str,
    renormalize: bool = False,
    bias: list[float] | None = None,
    factor: float = 1.0,
    softcap: float = 0.0,
    num_groups: int = 1,
    topk_group: int = 1,
) -> tuple[list[float], list[int]]:
    """One row, in Python's floats."""
    capped = [softcap * math.tanh(x / softcap) for x in logits] if softcap else logits
    if scoring == "none":
        scores = [x if math.isfinite(x) else 0.0 for x in capped]
    elif scoring == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) if x > -80 else 0.0 for x in capped]  # 0 for NaN
    elif scoring == "softplus_sqrt":
        scores = [math.sqrt(max(x, 0) + math.log1p(math.exp(-abs(x)))) for x in capped]
        scores = [s if math.isfinite(s) else 0.0 for s in scores]
    elif not math.isfinite(max(capped)) or any(map(math.isnan, capped)):
        scores = [0.0] * len(capped)
    else:
        powers = [math.exp(x - max(capped)) for x in capped]
        scores = [power / sum(powers) for power in powers]
    if bias is not None:
        choice = [score + b for score, b in zip(scores, bias, strict=True)]
    else:
        choice = logits if scoring != "softmax" or any(scores) else scores
    choice = [-math.inf if math.isnan(c) else c for c in choice]
    size = len(choice) // num_groups
    parts = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(num_groups)]
    best = [sum(part[: 1 if bias is None else 2]) for part in parts]
    groups = sorted(range(num_groups), key=lambda g: (-best[g], g))[:topk_group]
    experts = [e for e in range(len(choice)) if e // size in groups]
    ids = sorted(experts, key=lambda e: (-choice[e], e))[:topk]
    weights = [scores[e] for e in ids]
    if renormalize and sum(weights) > 0:
        weights = [w / sum(weights) for w in weights]
    return [w * factor for w in weights], ids


def make(case: int, tokens: int, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    """Random logits, some with many ties; in the first rows those that are no numbers or not finite."""
    x = torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(case)) * 3
    x = (x.round() if case % 4 == 1 else x).to(dtype)
    if tokens > 5:
        x[0], x[4], x[5] = 0, -torch.inf, torch.nan
        x[1, -1], x[2, 0], x[3, num_experts // 2] = torch.inf, -torch.inf, torch.nan
    return x


def test_agrees_with_loops() -> None:
    scorings = ("softmax", "sigmoid", "none", "softplus_sqrt")
    sizes = itertools.product((1, 2, 6, 8, 16, 60), (1, 3, 4, 8), scorings, DTYPES)
    for case, (num_experts, topk, scoring, dtype) in enumerate(sizes):
        if topk > num_experts:
            continue
        x = make(case, 12, num_experts, dtype)
        bias = (
            torch.randn(num_experts, generator=torch.Generator().manual_seed(case)) if case % 3 == 1 else None
        )
        factor, softcap = (2.5, 0.0) if case % 2 else (1.0, 30.0 if case % 5 == 2 else 0.0)
        divisors = [g for g in (2, 3, 4) if num_experts % g == 0 and topk <= num_experts // g and not softcap]
        groups = (divisors[case % len(divisors)], 1 + case % 2) if divisors and case % 7 > 3 else (1, 1)
        options = GateOptions(topk, case % 2 == 1, scoring, *groups, factor, softcap)
        weights, ids = cpu_gate.gate(x, bias, **options._asdict())
        rel = 1e-5 if softcap else 2e-6
        for row in range(len(x)):
            expected = naive(
                x[row].tolist(), topk, scoring, options.renormalize, None if bias is None else bias.tolist(),
                factor, softcap, *groups,
            )  # fmt: skip
            assert ids[row].tolist() == expected[1], (case, row)
            assert weights[row].tolist() == pytest.approx(expected[0], rel=rel, abs=1e-37), (case, row)


def test_a_table_tells_experts_and_scores_weigh_them() -> None:
    x, table = torch.randn(6, 8), torch.tensor([[5, 0], [1, 1], [7, 8], [-1, -1]])
    input_ids = torch.tensor([0, 1, 2, 3, 4, -1], dtype=torch.int32)
    weights, ids = topk_softplus_sqrt(x, 2, True, input_ids=input_ids, hash_table=table)
    assert ids.tolist() == [[5, 0], [1, 1], [7, -1], [-1, -1], [-1, -1], [-1, -1]]
    scores = torch.nn.functional.softplus(x[0].double()).sqrt()[[5, 0]]
    torch.testing.assert_close(weights[0].double(), scores / scores.sum(), rtol=1e-6, atol=0)
    assert weights[1:].tolist() == [[0.5, 0.5], [1, 0], [0, 0], [0, 0], [0, 0]]


def test_shared_experts_come_last_with_their_weight() -> None:
    x, mask = torch.randn(3, 8), torch.tensor([False, True, False])
    table, input_ids = torch.randint(8, (4, 2)), torch.tensor([3, 0, 9])
    for function, options in (
        (topk_softmax, {}), (topk_sigmoid, {"renormalize": True, "routed_scaling_factor": 2.5}),
        (topk_softplus_sqrt, {}), (topk_softplus_sqrt, {"input_ids": input_ids, "hash_table": table}),
        (functools.partial(grouped_topk, renormalize=True, num_expert_group=4, topk_group=2), {}),
    ):  # fmt: skip
        plain = function(x, 2, padding_mask=mask, **options)
        shared: Any = {"num_fused_shared_experts": 3, "shared_expert_weight": 0.4}
        weights, ids = function(x, 2, padding_mask=mask, **options, **shared)
        assert torch.equal(weights[:, :2], plain.topk_weights)
        assert torch.equal(ids[:, :2], plain.topk_ids)
        is_padding = plain.topk_ids[:, :1] < 0
        assert torch.equal(ids[:, 2:], torch.where(is_padding, -1, torch.tensor([[8, 9, 10]])).int())
        assert torch.equal(weights[:, 2:], torch.where(is_padding, 0.0, 0.4).expand(3, 3))


def test_padding_rows_and_types() -> None:
    x, mask = torch.randn(4, 8), torch.tensor([True, False, True, False])
    plain = topk_softmax(x, 3)
    assert plain.topk_ids.dtype is torch.int32
    for ids_dtype in ID_TYPES:
        for function in (topk_softmax, topk_sigmoid):
            weights, ids = function(x, 3, padding_mask=mask, ids_dtype=ids_dtype)
            assert ids.dtype is ids_dtype
            signed = ids.view(torch.int32) if ids_dtype is torch.uint32 else ids
            assert (signed[mask] == -1).all()
            assert (weights[mask] == 0).all()
            assert (signed[~mask] == plain.topk_ids[~mask]).all()
    _, ids = grouped_topk(x, 3, False, 2, 1, padding_mask=mask)
    assert (ids[mask] == -1).all()


def test_bias_selects_but_does_not_weigh() -> None:
    x = torch.tensor([[2.0, 1.0, 0.0]])
    weights, ids = topk_softmax(x, 1, e_score_correction_bias=torch.tensor([0.0, 0.0, 5.0]))
    assert ids.tolist() == [[2]]
    assert weights[0, 0] == pytest.approx(torch.softmax(x, 1)[0, 2].item(), rel=1e-6)
    masked = torch.tensor([-torch.inf, torch.nan, 0.0])
    assert topk_sigmoid(x, 3, e_score_correction_bias=masked).topk_ids.tolist() == [[2, 0, 1]]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_gradient_flows(device: str) -> None:
    logits = torch.rand(3, 8, device=device, requires_grad=True)
    assert not topk_softmax(logits, 2, True).topk_weights.requires_grad


def test_out_numpy_and_no_tokens() -> None:
    x = torch.randn(4, 8)
    out = torch.empty(4, 2), torch.empty(4, 2, dtype=torch.int64)
    result = topk_softmax(x, 2, out=out)
    assert result.topk_weights is out[0]
    assert result.topk_ids is out[1]
    assert torch.equal(out[0], topk_softmax(x, 2)[0])
    array: Any = x.numpy()
    weights, ids = topk_softmax(array, 2)
    assert isinstance(weights, np.ndarray)
    assert (ids == out[1].numpy()).all()
    assert topk_softmax(x[:0], 2).topk_ids.shape == (0, 2)
    assert torch.equal(topk_softmax(x.T.contiguous().T, 2)[1], out[1].int())


X = torch.randn(4, 8)


def test_operator_of_torch() -> None:
    topk_softmax(X, 2)  # registers it
    options = X, 2, True, "softmax", 1, 1, None, 1.0, 0.0, None
    out = {"topk_weights": torch.empty(4, 2), "topk_ids": torch.empty(4, 2, dtype=torch.int64)}
    torch.library.opcheck(torch.ops.cupy_moe.gate.default, (*options, torch.int64))
    torch.library.opcheck(torch.ops.cupy_moe.gate.out, options, out)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = grouped_topk(x, 2, True, 4, 2)
        return weights * 2, ids

    weights, ids = compiled(X)
    expected = grouped_topk(X, 2, True, 4, 2)
    assert torch.equal(weights, expected[0] * 2)
    assert torch.equal(ids, expected[1])


@pytest.mark.parametrize(
    ("size", "kernel"),
    [
        ((1, 256, 8, 1, 4, False, False), "gate_plain_8"),
        ((1, 128, 8, 1, 4, False, False), "gate_plain_4"),
        ((1, 129, 8, 1, 4, False, False), "gate_plain_8"),
        ((1, 257, 8, 1, 4, False, False), "gate_plain_16"),
        ((1, 512, 32, 1, 4, False, False), "gate_plain_16"),
        ((1, 513, 8, 1, 4, False, False), "gate_wide"),
        ((1, 512, 33, 1, 4, False, False), "gate_wide"),
        ((1, 8, 2, 1, 4, False, True), "gate_wide"),
        ((1, 64, 2, 1, 4, True, False), "gate_full_8"),
        ((1, 256, 8, 8, 4, False, False), "gate_full_8"),
        ((1, 160, 6, 8, 4, True, False), "gate_full_8"),
        ((1, 264, 8, 33, 4, True, False), "gate_wide"),
        ((1023, 8, 2, 1, 4, False, False), "gate_plain_4"),
        ((1024, 8, 2, 1, 4, False, False), "gate_several_4"),
        ((1024, 64, 8, 1, 4, True, False), "gate_several_8"),
        ((1024, 65, 8, 1, 4, False, False), "gate_plain_4"),
        ((1024, 64, 9, 1, 4, False, False), "gate_plain_4"),
        ((GATE_WARP_MAX_TOKENS, 256, 8, 8, 4, True, False), "gate_full_8"),
        ((GATE_WARP_MAX_TOKENS + 1, 256, 8, 8, 4, True, False), "gate_wide"),
        ((2**27 + 1, 64, 2, 1, 4, False, False), "gate_wide"),
        ((1, 256, 8, 1, 4, True, False, 1), "gate_any_8"),
        ((4096, 256, 8, 8, 4, True, False, 0, True), "gate_any_8"),
        ((4096, 8, 2, 1, 4, False, False, 0, True), "gate_any_8"),
        ((1, 384, 6, 1, 4, True, False, 26, True), "gate_any_16"),
        ((1, 384, 6, 1, 4, True, False, 27, True), "gate_wide"),
    ],
)
def test_plan(size: Any, kernel: str) -> None:
    sizes: Any = *size[:7], H200, None, *size[7:]
    chosen = plan_gate(*sizes)
    assert chosen.launch.entry == kernel
    rows = chosen.launch.grid * chosen.launch.block // chosen.lanes_per_row
    assert "wide" in kernel or chosen.launch.grid * chosen.launch.block <= 2**32
    assert rows >= size[0] or chosen.launch.grid == size[0]


def test_plan_refuses() -> None:
    cases: tuple[tuple[str, Any], ...] = (
        ("plain", (1, 513, 8, 1, 4, False, False)),
        ("plain", (1, 8, 2, 1, 4, True, False)),
        ("plain", (1, 8, 2, 2, 4, False, False)),
        ("full", (1, 8, 2, 1, 4, False, True)),
        ("several", (1, 65, 2, 1, 4, False, False)),
        ("several", (1, 64, 9, 1, 4, False, False)),
        ("plain", (GATE_WARP_MAX_TOKENS + 1, 64, 2, 1, 4, False, False)),
    )
    for kernel, size in cases:
        with pytest.raises(ValueError, match="cannot do this"):
            plan_gate(*(*size, H200, kernel))
    with pytest.raises(ValueError, match="65000 experts need 260020 bytes of shared memory"):
        plan_gate(1, 65_000, 2, 1, 4, False, False, H200)


def test_kernels_exist(everything: Everything) -> None:
    names = {f"gate_{mode}_{share}" for mode, shares in gate_plans.GATE_SHARES.items() for share in shares}
    for result in everything.results:
        if result.unit in ("gate_warp", "gate_wide", "gate_hash"):
            assert set(result.kernels) == (names if result.unit == "gate_warp" else {result.unit}), (
                result.target
            )


def check(
    x: torch.Tensor,
    options: GateOptions,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    ids_dtype: torch.dtype,
    kernel: str | None,
) -> bool:
    """One case on the GPU, if the kernel can do it."""
    tokens = len(x)
    buffers = [
        torch.full((tokens + 2, options.num_results), -77, device="cuda", dtype=torch.float32),
        torch.full(
            (tokens + 2, options.num_results), 77, device="cuda", dtype=SIGNED.get(ids_dtype, ids_dtype)
        ),
    ]
    out = buffers[0][1:-1], buffers[1][1:-1].view(ids_dtype)
    try:
        gate.run_gate(x, options, bias, mask, ids_dtype, out, kernel)
    except ValueError:
        assert kernel not in (None, "wide")
        return False
    tensors = [None if tensor is None else tensor.cpu() for tensor in (bias, mask)]
    weights, ids = cpu_gate.gate(x.cpu(), *tensors, **options._asdict())
    ours = buffers[1][1:-1].cpu().long()
    what = f"{list(x.shape)} {x.dtype} {options} {bias=} {mask=} {kernel=}"
    assert (buffers[0][[0, -1]] == -77).all(), what
    assert (buffers[1][[0, -1]] == 77).all(), what
    same = ours == ids
    if bias is None:
        assert same.all(), what
    else:  # scores within rounding of each other may change places, and no others
        assert same.float().mean() > 0.98, what
        valid = ids >= 0
        for row in (~same).any(1).nonzero().flatten().tolist():
            assert sorted(ours[row].tolist()) == sorted(set(ours[row].tolist())), what
        assert ((ours >= 0) == valid).all(), what
    ours_weights = out[0].cpu()
    assert not ours_weights[same & (weights == 0)].any(), what
    # Another expert in a row may change all of its weights, when these are renormalised.
    error = ((ours_weights - weights) / weights).abs()[same.all(1, keepdim=True) & (weights != 0)]
    # Capped logits are rounded before the exponential; sums of both signs lose what cancels.
    bound = 6e-6 if options.softcap else 3e-6 if options.scoring_func == "none" else 1e-6
    assert not len(error) or error.max() < bound, f"{what}: {error.max()}"
    return True


@pytest.mark.gpu
def test_gpu_agrees_with_the_cpu() -> None:
    experts = (1, 2, 6, 8, 16, 60, 64, 72, 128, 160, 192, 256, 320, 384, 512, 576, 1000, 4096, 5000)
    count = 0
    sizes = itertools.product((1, 33, 300), experts, (1, 2, 5, 8, 22, 32, 64), DTYPES)
    for case, (tokens, num_experts, topk, dtype) in enumerate(sizes):
        if topk > num_experts:
            continue
        x = make(case, tokens, num_experts, dtype).cuda()
        if case % 7 == 3:  # strided rows, aligned or not
            x = torch.cat([x, x[:, :1].expand(-1, 5 if case % 2 else 8)], 1)[:, :num_experts]
        bias = torch.randn(num_experts, device="cuda") * 0.3 if case // 2 % 3 == 1 else None
        mask = torch.rand(tokens, device="cuda") < 0.2 if case % 5 == 0 else None
        softcap = 30.0 if case % 13 == 0 else 0.0
        groups = [
            (g, chosen)
            for g, chosen in itertools.product((2, 3, 5, 8, 16, 32, 64), (1, 2, 3, 4))
            if num_experts % g == 0 and chosen <= g and topk <= chosen * (num_experts // g) and not softcap
        ]
        grouping = groups[case % len(groups)] if groups and case % 3 == 0 else (1, 1)
        scoring, factor = (
            ("softmax", "sigmoid", "none", "sigmoid", "softplus_sqrt")[case % 5],
            2.5 if case % 6 == 0 else 1.0,
        )
        num_shared = case % 4 if case % 11 == 4 else 0
        options = GateOptions(topk, case // 3 % 2 == 1, scoring, *grouping, factor, softcap, num_shared, 0.3)
        for kernel in (None, *gate_plans.GATE_KERNELS):
            count += check(x, options, bias, mask, ID_TYPES[case % 3], kernel)
    assert count > 2000


@pytest.mark.gpu
def test_gpu_many_rows() -> None:
    for tokens, num_experts, topk in (
        (5000, 8, 2),
        (3000, 64, 6),
        (2049, 128, 8),
        (1025, 256, 8),
        (1025, 60, 4),
    ):
        x = make(tokens, tokens, num_experts, torch.float32).cuda()
        bias = torch.randn(num_experts, device="cuda") * 0.1
        for scoring, with_bias in itertools.product(("softmax", "sigmoid"), (None, bias)):
            options = GateOptions(topk, True, scoring)
            for kernel in (None, "several"):
                check(x, options, with_bias, None, torch.int32, kernel)


SCORED: dict[str, tuple[Any, Any]] = {
    "softmax": (topk_softmax, lambda x: torch.softmax(x, 1)),
    "sigmoid": (topk_sigmoid, torch.sigmoid),
    "softplus_sqrt": (topk_softplus_sqrt, lambda x: torch.logaddexp(x, torch.zeros_like(x)).sqrt()),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_weights_are_exact(device: str) -> None:
    """Against float64, for all kernels: every weight within 1e-6, however the logits are spread."""
    for num_experts, scale in itertools.product((8, 64, 256, 512, 4096), (0.0, 0.1, 1.0, 4.0, 20.0, 60.0)):
        x = torch.randn(500 if device == "cuda" else 50, num_experts, device=device) * scale
        x[:, 0] = scale + 5  # one far above many equals: the worst case for a sum of approximate exponentials
        for renormalize, scoring in itertools.product((False, True), SCORED):
            function, score = SCORED[scoring]
            scores = score(x.double())
            for kernel in (None, "several", "wide") if device == "cuda" else (None,):
                try:
                    weights, ids = function(x, 8, renormalize, kernel=kernel)
                except ValueError:
                    continue
                expected = scores.gather(1, ids.long())
                expected = expected / expected.sum(1, keepdim=True) if renormalize else expected
                error = ((weights - expected).abs() / expected)[expected > 1.2e-38].max().item()
                assert error < 1e-6, (num_experts, scale, renormalize, scoring, kernel, error)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", [None, "full", "wide"])
def test_scores_and_sums_without_a_normal_number(device: str, kernel: str | None) -> None:
    if device == "cpu" and kernel:
        pytest.skip("kernels are for GPUs")
    options: dict[str, Any] = {"kernel": kernel}
    x = torch.tensor([[-87.0, -88.0, -120.0, -87.2]], device=device)
    weights, ids = topk_sigmoid(x, 4, **options)
    assert ids.tolist() == [[0, 3, 1, 2]]
    expected = torch.sigmoid(x.double())[0, [0, 3]]
    torch.testing.assert_close(weights[0, :2].double(), expected, rtol=1e-6, atol=0)
    assert weights[0, 2:].tolist() == [0, 0]
    assert topk_sigmoid(x - 10, 2, True, **options).topk_weights.tolist() == [[0, 0]]
    weights, ids = topk_softmax(torch.tensor([[0.0, -87.0, -88.0]], device=device), 3, **options)
    assert weights[0, 2] == 0
    assert weights[0, 1] > 0
    # Sums are divided by up to 2^126, and down to 2^-126.
    for big, divided in ((2.0**126, True), (1.1 * 2.0**126, False), (2.0**-126, True), (2.0**-127, False)):
        scores = torch.tensor([[0.0, big, 0.0]], device=device)
        weights, _ = grouped_topk(scores, 2, True, 1, 1, "none", **options)
        assert weights.tolist() == [[1.0 if divided else float(scores[0, 1]), 0.0]], big


@pytest.mark.gpu
def test_gpu_beyond_31_bits() -> None:
    tokens, num_experts = 4_200_000, 512
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    x = torch.empty((tokens, num_experts), dtype=torch.bfloat16, device="cuda").normal_()
    weights, ids = topk_softmax(x, 8, True)
    rows = slice(tokens - 100, tokens)
    expected = topk_softmax(x[rows].cpu(), 8, True)
    assert torch.equal(ids[rows].cpu(), expected.topk_ids)
    torch.testing.assert_close(weights[rows].cpu(), expected.topk_weights, rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_gpu_repeats_itself_in_a_graph() -> None:
    x = torch.randn(700, 256, device="cuda")
    out = torch.empty(700, 8, device="cuda"), torch.empty(700, 8, dtype=torch.int32, device="cuda")
    first = topk_softmax(x, 8, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        topk_softmax(x, 8, True, out=out)
    for _ in range(3):
        graph.replay()
        assert torch.equal(out[0], first[0])
        assert torch.equal(out[1], first[1])
    assert topk_softmax(x[:0], 8).topk_ids.shape == (0, 8)
    assert topk_softmax(x.T.contiguous().T, 8, True).topk_ids.equal(first[1])
