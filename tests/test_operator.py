"""The operators as torch.ops: checked by opcheck, compiled, exported, captured."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import routing
import torch
from operator_cases import STEMS
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

from cupy_moe import (
    MoEAlignment,
    batched_moe_align_block_size,
    moe_align_block_size,
    moe_sum,
    topk_softmax,
)

# torch's own compiler warns about itself.
pytestmark = [pytest.mark.filterwarnings("ignore")]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OPS = torch.ops.cupy_moe
ROOT = Path(__file__).parents[1]
on_each_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch.compiler.reset()


def make_ids(tokens: int, device: str, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return routing.make("with_invalid", tokens, 2, 8, dtype=dtype, device=device)


def make_map(device: str) -> torch.Tensor:
    return torch.tensor([0, -1, 1, -1, 2, -1, 3, -1], dtype=torch.int32, device=device)


def equal(results: Any, expected: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@on_each_device
def test_opcheck(device: str) -> None:
    for tokens, dtype in itertools.product((0, 3, 40, 3000), (torch.int32, torch.int64, torch.uint8)):
        ids = make_ids(tokens, device, dtype)
        for arguments in ((4, 8), (16, 8, make_map(device), True, True), (1, 500)):
            opcheck(OPS.moe_align_block_size.default, (ids, *arguments))
            out = MoEAlignment(*map(torch.empty_like, OPS.moe_align_block_size(ids, *arguments)))
            opcheck(OPS.moe_align_block_size.out, (ids, *arguments), out._asdict())
    opcheck(OPS.moe_align_block_size.default, (make_ids(10, device).t(), 4, 8))
    for counts in ([2, 0, 5], [], [9, -1, 3, 100]):
        tokens_of = torch.tensor(counts, dtype=torch.int32, device=device)
        opcheck(OPS.batched_moe_align_block_size.default, (8, 4, tokens_of))
        out = MoEAlignment(*map(torch.empty_like, OPS.batched_moe_align_block_size(8, 4, tokens_of)))
        opcheck(OPS.batched_moe_align_block_size.out, (8, 4, tokens_of), out._asdict())


@on_each_device
def test_through_torch_ops(device: str) -> None:
    ids, expert_map = make_ids(300, device), make_map(device)
    expected = moe_align_block_size(ids, 16, 8, expert_map, True, True)
    assert equal(OPS.moe_align_block_size(ids, 16, 8, expert_map, True, True), expected)
    out = MoEAlignment(*map(torch.zeros_like, expected))
    assert OPS.moe_align_block_size.out(ids, 16, 8, expert_map, True, True, **out._asdict()) is None
    assert equal(out, expected)
    counts = torch.tensor([2, 0, 5], dtype=torch.int32, device=device)
    assert equal(OPS.batched_moe_align_block_size(8, 4, counts), batched_moe_align_block_size(8, 4, counts))
    with pytest.raises(TypeError, match="topk_ids: expected an integer tensor"):
        OPS.moe_align_block_size(ids.float(), 16, 8)


def test_shapes_from_shapes_alone() -> None:
    for tokens, num_experts, block_size in itertools.product(
        (0, 1, 3, 4, 5, 100), (1, 7, 8, 9, 300), (1, 2, 16, 100)
    ):
        for pad in (False, True):
            ids = make_ids(tokens, "cpu")
            real = moe_align_block_size(ids, block_size, num_experts, None, pad)
            fake = OPS.moe_align_block_size(ids.to("meta"), block_size, num_experts, None, pad)
            case = f"{tokens=} {num_experts=} {block_size=} {pad=}"
            assert [r.shape for r in real] == [f.shape for f in fake], case
            assert all(f.dtype == torch.int32 and f.device.type == "meta" for f in fake)


def test_fake_tensors() -> None:
    with torch._subclasses.FakeTensorMode(shape_env=ShapeEnv()) as mode:
        ids = mode.from_tensor(make_ids(5, "cpu"))
        aligned = moe_align_block_size(ids, 4, 8)  # the plain function
        assert isinstance(aligned, MoEAlignment)
        assert all(isinstance(result, torch._subclasses.FakeTensor) for result in aligned)
    assert [tuple(result.shape) for result in aligned] == [(34,), (9,), (1,)]


def pipeline(ids: torch.Tensor, expert_map: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The operator between other operations, as in a model."""
    aligned = moe_align_block_size(ids * 1, 16, 8, expert_map, pad_sorted_ids=True)
    tokens = aligned.sorted_token_ids // ids.shape[1] + 1
    return tokens, aligned.expert_ids + 1, aligned.num_tokens_post_pad * 2


def bare(ids: torch.Tensor, expert_map: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(moe_align_block_size(ids, 16, 8, expert_map, pad_sorted_ids=True))


def with_out(ids: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    moe_align_block_size(ids, 16, 8, out=out)
    return out[0].view(-1)


@on_each_device
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled(device: str, backend: str) -> None:
    slow = backend == "inductor"  # half a minute for C++ code, so none is asked for
    function = bare if slow and device == "cpu" else pipeline
    for dynamic in (True,) if slow else (True, False):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
        for tokens in (4, 40, 41, 700):  # fewer ids than experts, and more
            for dtype in (torch.int32,) if slow else (torch.int32, torch.int64):
                ids = make_ids(tokens, device, dtype)
                case = f"{dynamic=} {tokens=} {dtype=}"
                assert equal(compiled(ids, make_map(device)), function(ids, make_map(device))), case


@on_each_device
def test_one_graph_for_all_sizes(device: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(pipeline, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (3, 4, 5, 40, 3000):
        compiled(make_ids(tokens, device), make_map(device))
    assert len(graphs) == 1
    calls = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert OPS.moe_align_block_size in calls or OPS.moe_align_block_size.default in calls


@on_each_device
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_out(device: str, backend: str) -> None:
    ids = make_ids(300, device)
    out = MoEAlignment(*map(torch.zeros_like, moe_align_block_size(ids, 16, 8)))
    expected = with_out(ids, out)
    for tensor in out:
        tensor.zero_()
    assert torch.equal(torch.compile(with_out, fullgraph=True, backend=backend)(ids, out), expected)
    assert equal(out, moe_align_block_size(ids, 16, 8))


@on_each_device
def test_batched_compiled(device: str) -> None:
    compiled = torch.compile(batched_moe_align_block_size, fullgraph=True, dynamic=True, backend="aot_eager")
    for counts in ([2, 0, 5], [1, 2, 3, 4], [0] * 7):
        tokens_of = torch.tensor(counts, dtype=torch.int32, device=device)
        assert equal(compiled(8, 4, tokens_of), batched_moe_align_block_size(8, 4, tokens_of))


@on_each_device
def test_exported(device: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, ids: torch.Tensor, expert_map: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return pipeline(ids, expert_map)

    for strict in (False, True):
        exported = torch.export.export(
            Layer(),
            (make_ids(40, device), make_map(device)),
            dynamic_shapes={"ids": {0: torch.export.Dim.DYNAMIC}, "expert_map": None},
            strict=strict,
        )
        assert "cupy_moe.moe_align_block_size" in str(exported.graph)
        for tokens in (40, 3, 300):
            ids = make_ids(tokens, device)
            assert equal(exported.module()(ids, make_map(device)), pipeline(ids, make_map(device))), tokens


@pytest.mark.gpu
def test_compiled_with_cuda_graphs() -> None:
    compiled = torch.compile(pipeline, fullgraph=True, mode="reduce-overhead")
    expert_map = make_map("cuda")
    for seed in range(6):  # warmed up, recorded, replayed
        ids = routing.make("uniform", 300, 2, 8, device="cuda", seed=seed)
        results = [result.clone() for result in compiled(ids, expert_map)]
        assert equal(results, pipeline(ids, expert_map)), seed


def test_subclasses_of_tensor() -> None:
    class Ids(torch.Tensor):
        pass

    ids = make_ids(30, "cpu")
    expected = moe_align_block_size(ids, 4, 8)
    assert equal(moe_align_block_size(ids.as_subclass(Ids), 4, 8), expected)
    assert equal(moe_align_block_size(torch.nn.Parameter(ids, requires_grad=False), 4, 8), expected)
    counts = torch.tensor([2, 0, 5], dtype=torch.int32)
    expected = batched_moe_align_block_size(8, 4, counts)
    assert equal(batched_moe_align_block_size(8, 4, counts.as_subclass(Ids)), expected)


def test_operators_exist_once_they_have_been_looked_up() -> None:
    code = (
        "import cupy_moe, torch; cupy_moe.moe_align_block_size;"
        " print(torch.ops.cupy_moe.moe_align_block_size(torch.tensor([1, 0]), 2, 2)[0].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[1, 2, 0, 2]"


LOAD = """
import sys, torch
import cupy_moe.ops
program = torch.export.load(sys.argv[1])
ids = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
print([t.tolist() for t in program.module()(ids, torch.zeros(2, 4))])
"""


def test_a_saved_program_runs_in_a_process_that_imports_the_operators(tmp_path: Path) -> None:
    class Layer(torch.nn.Module):
        def forward(self, ids: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
            weights, chosen = topk_softmax(logits, 2)
            counts = torch.ones_like(ids[:, 0])
            batched = batched_moe_align_block_size(4, 2, counts)
            return (*moe_align_block_size(ids, 2, 4)[:2], chosen, moe_sum(weights[..., None]), batched[1])

    example = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32), torch.zeros(2, 4)
    path = tmp_path / "layer.pt2"
    torch.export.save(torch.export.export(Layer(), example), path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, path], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([result.tolist() for result in Layer()(*example)])


def test_importing_ops_registers_every_operator() -> None:
    every = torch._C._dispatch_get_all_op_names()
    ours = {name.partition(".")[0] for name in every if name.startswith("cupy_moe::")}
    assert len(ours) == len(STEMS) + 1  # moe_unpermute is beside moe_permute
    code = (
        "import cupy_moe.ops, torch;"
        "print(*sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith('cupy_moe::')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert {name.partition(".")[0] for name in done.stdout.split()} == ours
