"""moe_sum: against float64 and by example on the CPU, and element for element on a GPU.

Grids: those of vLLM's and SGLang's tests, looped so that a few tests hold hundreds of cases.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from cache_helpers import Everything
from gpus import H200
from operator_cases import IDS, MAP, Case

from cupy_moe import moe_sum
from cupy_moe.cpu import moe_sum as cpu_moe_sum
from cupy_moe.operators import moe_sum as operator
from cupy_moe.plans import moe_sum as moe_sum_plans
from cupy_moe.plans.moe_sum import plan_sum

CASES = {
    "sum": Case(
        moe_sum,
        {
            "input": torch.linspace(-3, 3, 80).view(5, 2, 8),
            "topk_weights": torch.linspace(0, 1, 10).view(5, 2),
            "topk_ids": IDS,
            "expert_map": MAP,
            "shared_output": torch.linspace(-1, 2, 40).view(5, 8),
            "routed_scaling_factor": 2.5,
        },
    )
}

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def layout(kind: int, x: torch.Tensor) -> torch.Tensor:
    """The same values with other strides."""
    if kind == 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == 2:
        return torch.cat([x, x], 2)[:, :, : x.shape[2]]
    if kind == 3:
        return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if kind == 4:  # not aligned
        return torch.cat([x.flatten().new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x


def make(case: int, tokens: int, topk: int, hidden: int, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Inputs that `case` chooses: a layout, and which of the options there are."""
    generator = torch.Generator().manual_seed(case)
    x = torch.randn(tokens, topk, hidden, generator=generator).to(dtype)
    options: dict[str, Any] = {}
    if case % 3 == 1:
        options["topk_weights"] = torch.rand(tokens, topk, generator=generator)
    if case % 4 >= 2:
        ids = torch.randint(-2, 12, (tokens, topk), generator=generator)
        if case % 4 == 3:
            options["expert_map"] = torch.randint(-2, 12, (10,), generator=generator, dtype=torch.int32)
        read = cpu_moe_sum._is_read(ids, options.get("expert_map"))
        x = torch.where(read[:, :, None], x, torch.nan)
        options["topk_ids"] = ids.to((torch.int32, torch.int64)[case // 4 % 2])
        if case % 7 == 2:
            options["topk_ids"] = ids.to(torch.int32).view(torch.uint32)
    if case % 5 == 2:
        options["shared_output"] = torch.randn(tokens, hidden, generator=generator).to(dtype)
        options["routed_scaling_factor"] = 2.5
    return layout(case % 11, x), options


def reference(x: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """In float64, unrounded."""
    x = x.double()
    if "topk_ids" in options:
        ids = options["topk_ids"]
        ids = ids.view(torch.int32) if ids.dtype is torch.uint32 else ids
        x = torch.where(cpu_moe_sum._is_read(ids, options.get("expert_map"))[:, :, None], x, 0.0)
    if "topk_weights" in options:
        x = x * options["topk_weights"].double()[:, :, None]
    total = x.sum(1) * options.get("routed_scaling_factor", 1.0)
    return total + options["shared_output"].double() if "shared_output" in options else total


def test_agrees_with_float64() -> None:
    shapes = itertools.product((1, 33), (1, 2, 3, 6, 8, 9), (1, 31, 128), DTYPES)
    for case, (tokens, topk, hidden, dtype) in enumerate(shapes):
        x, options = make(case, tokens, topk, hidden, dtype)
        result, expected = moe_sum(x, **options), reference(x, options)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(result.double(), expected, rtol=eps, atol=1e-5 + eps / 8, msg=f"{case=}")


def test_no_worse_than_torch() -> None:
    x = torch.randn(50, 16, 64, generator=torch.Generator().manual_seed(0))
    expected = x.double().sum(1)
    ours, torchs = ((y.double() - expected).abs().max() for y in (moe_sum(x), x.sum(1)))
    assert ours <= 2 * torchs


def test_sizes_of_zero() -> None:
    for tokens, topk, hidden in ((0, 2, 4), (3, 0, 4), (3, 2, 0)):
        assert torch.equal(moe_sum(torch.ones(tokens, topk, hidden)), torch.zeros(tokens, hidden))


def test_out_is_returned() -> None:
    x, out = torch.ones(3, 2, 4), torch.full((3, 8), 7.0)
    result = moe_sum(x, out[:, :4])
    assert result.data_ptr() == out.data_ptr()
    assert out.tolist() == [[2, 2, 2, 2, 7, 7, 7, 7]] * 3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_gradient_flows(device: str) -> None:
    x = torch.ones(2, 3, 4, device=device, requires_grad=True)
    assert not moe_sum(x).requires_grad


def test_arrays_of_numpy() -> None:
    out: Any = np.zeros((3, 4), dtype=np.float32)
    x: Any = np.ones((3, 2, 4), dtype=np.float32)
    weights: Any = np.full((3, 2), 0.5, dtype=np.float32)
    result = moe_sum(x, topk_weights=weights)
    assert isinstance(result, np.ndarray)
    assert (result == 1).all()
    assert moe_sum(x, out) is out
    assert (out == 2).all()


def test_operator_of_torch() -> None:
    x, weights = torch.randn(5, 3, 8), torch.rand(5, 3)
    moe_sum(x)  # registers it
    operator = torch.ops.cupy_moe.moe_sum
    torch.library.opcheck(operator.default, (x,), {"topk_weights": weights})
    torch.library.opcheck(operator.out, (x,), {"topk_weights": weights, "out": torch.empty(5, 8)})
    compiled = torch.compile(lambda x: moe_sum(x, topk_weights=weights) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), moe_sum(x, topk_weights=weights) * 2)


def plan_of(
    tokens: int, topk: int, hidden: int, vectors: bool = True, extended: bool = False, rows: bool = False
) -> moe_sum_plans.SumPlan:
    return plan_sum(tokens, topk, hidden, "bf16", 2, vectors, extended, H200, rows=rows)


def test_plan() -> None:
    for tokens, topk, hidden in itertools.product((1, 7, 132, 5000, 300_000), (1, 2, 5, 8, 40), (8, 7168)):
        for vectors, extended in itertools.product((False, True), repeat=2):
            chosen = plan_of(tokens, topk, hidden, vectors, extended)
            threads = chosen.launch.grid * chosen.launch.block
            assert threads >= chosen.num_tokens * chosen.units_per_token > threads - chosen.launch.block
            assert chosen.launch.block in (64, 128)
            assert chosen.num_tokens * chosen.units_per_token < 2**31
    kinds = {1: "n", 2: "2", 3: "n", 4: "4", 5: "n", 6: "n", 8: "8", 9: "n", 10: "n", 16: "8", 24: "n"}
    for topk, kind in kinds.items():
        assert plan_of(300, topk, 7168).launch.entry == f"moe_sum_{kind}_bf16"
    for tokens, kind in {1: "8", 16: "8", 64: "4", 150: "4", 151: "8", 2000: "8", 16384: "4"}.items():
        assert plan_of(tokens, 8, 7168).launch.entry == f"moe_sum_{kind}_bf16"
    assert plan_of(64, 8, 7168, extended=True).launch.entry == "moe_sum_ext_bf16"
    assert plan_of(64, 8, 7168, vectors=False, extended=True).launch.entry == "moe_sum_any_bf16"
    of_rows = {
        (1, 8): "8",
        (18, 8): "8",
        (19, 8): "4",
        (19, 4): "4",
        (19, 6): "2",
        (19, 1): "2",
        (18, 2): "8",
    }
    for (tokens, topk), kind in of_rows.items():
        assert plan_of(tokens, topk, 7168, rows=True).launch.entry == f"moe_sum_rows_{kind}_bf16"
    assert plan_of(64, 8, 7168, vectors=False, rows=True).launch.entry == "moe_sum_rows_any_bf16"
    assert plan_of(3_000_000, 1, 1001, vectors=False).num_tokens == (2**31 - 1) // 1001
    with pytest.raises(ValueError, match="hidden size"):
        plan_of(1, 1, 2**31, vectors=False)


def test_kernels_exist(everything: Everything) -> None:
    kinds = ("2", "4", "8", "n", "ext", "any", "rows_2", "rows_4", "rows_8", "rows_any")
    names = {f"moe_sum_{kind}_{t}" for kind in kinds for t in ("f32", "f16", "bf16")}
    for result in everything.results:
        assert result.unit != "moe_sum" or set(result.kernels) == names, result.target


@pytest.mark.gpu
def test_gpu_is_the_cpu_to_the_last_bit() -> None:
    shapes = itertools.product(
        (1, 7, 33, 222), (1, 2, 3, 4, 6, 8, 9, 17), (1, 31, 128, 511, 1024, 2880), DTYPES
    )
    for case, (tokens, topk, hidden, dtype) in enumerate(shapes):
        x, options = make(case, tokens, topk, hidden, dtype)
        expected = moe_sum(x, **options)
        on_gpu: dict[str, Any] = {
            k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()
        }
        x = layout(case % 11, x.cuda())
        buffer = torch.full((tokens + 2, hidden), 77.0, dtype=dtype, device="cuda")
        moe_sum(x, buffer[1:-1], **on_gpu)
        what = f"{case=} {tokens=} {topk=} {hidden=} {dtype}"
        assert torch.equal(buffer[1:-1].cpu(), expected), what
        assert (buffer[[0, -1]] == 77).all(), f"{what}: written outside"
        assert torch.equal(moe_sum(x, **on_gpu).cpu(), expected), what


@pytest.mark.gpu
def test_gpu_sizes_of_zero_and_cupy_arrays() -> None:
    for tokens, topk, hidden in ((0, 2, 4), (3, 0, 4), (3, 2, 0)):
        result = moe_sum(torch.ones(tokens, topk, hidden, device="cuda"))
        assert torch.equal(result.cpu(), torch.zeros(tokens, hidden))
    import cupy

    assert (moe_sum(cupy.ones((3, 2, 4), dtype="f4")) == 2).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "topk", "hidden"), [(90_000, 3, 8192), (140_000, 2, 8191)])
def test_gpu_beyond_31_bits(tokens: int, topk: int, hidden: int) -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    assert tokens * topk * hidden > 2**31
    x = torch.empty((tokens, topk, hidden), dtype=torch.bfloat16, device="cuda").normal_()
    result = moe_sum(x)
    for rows in (slice(0, 50), slice(tokens // 2, tokens // 2 + 50), slice(tokens - 50, tokens)):
        assert torch.equal(result[rows].cpu(), cpu_moe_sum.moe_sum(x[rows].cpu()))


@pytest.mark.gpu
def test_gpu_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one launch cannot number all units."""
    monkeypatch.setattr(moe_sum_plans, "INT32_MAX", 5000)
    operator._prepare.cache_clear()
    for case in range(24):
        x, options = make(case, 50, 3, 512, torch.float32)
        on_gpu: dict[str, Any] = {
            k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()
        }
        assert torch.equal(moe_sum(layout(case % 11, x.cuda()), **on_gpu).cpu(), moe_sum(x, **options))
    operator._prepare.cache_clear()


@pytest.mark.gpu
def test_gpu_in_a_graph() -> None:
    x, out = torch.ones(4, 2, 1024, device="cuda"), torch.zeros(4, 1024, device="cuda")
    moe_sum(x, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moe_sum(x, out)
    x.fill_(3)
    graph.replay()
    assert (out == 6).all()
