"""scripts/moe_layer.py against the blocks of Hugging Face transformers, with random weights."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import moe_layer
import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers and of torch's compiler
WIDTH, INNER = 64, 96


def mixtral(experts: int, topk: int) -> Any:
    module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = module.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=experts, num_experts_per_tok=topk
    )
    return with_random_weights(module.MixtralSparseMoeBlock(config))


def qwen3(experts: int, topk: int, renormalize: bool) -> Any:
    module = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = module.Qwen3MoeConfig(
        hidden_size=WIDTH,
        moe_intermediate_size=INNER,
        num_experts=experts,
        num_experts_per_tok=topk,
        norm_topk_prob=renormalize,
    )
    return with_random_weights(module.Qwen3MoeSparseMoeBlock(config))


def with_random_weights(block: Any) -> Any:
    if not hasattr(block.experts, "gate_up_proj"):
        pytest.skip("transformers before version 5 keeps the weights of each expert for itself")
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return block.eval()


def ours(block: Any, hidden: torch.Tensor, topk: int, renormalize: bool = True) -> torch.Tensor:
    weights = block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj
    flat = hidden.reshape(-1, WIDTH)
    return moe_layer.moe_layer(flat, *weights, topk, renormalize).view_as(hidden)


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["mixtral", "qwen3", "qwen3 as it is"])
def test_as_in_transformers(name: str, device: str) -> None:
    for experts, topk in ((8, 2), (32, 4), (5, 5), (4, 1)):
        renormalize = name != "qwen3 as it is"
        block = mixtral(experts, topk) if name == "mixtral" else qwen3(experts, topk, renormalize)
        block = block.to(device)
        for tokens in (1, 3, 200):
            hidden = torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens)).to(device)
            torch.testing.assert_close(
                ours(block, hidden, topk, renormalize),
                block(hidden),
                rtol=1e-4,
                atol=1e-5,
                msg=f"{experts=} {topk=} {tokens=}".__add__,
            )


@torch.no_grad()
def test_compiled_for_any_number_of_tokens() -> None:
    block = mixtral(8, 2)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (1, 3, 200):
        hidden = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))
        torch.testing.assert_close(compiled(block, hidden, 2), block(hidden), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.gpu
def test_in_a_graph_and_compiled() -> None:
    block = mixtral(8, 2).to("cuda")
    hidden = torch.randn(1, 100, WIDTH, device="cuda")
    ours(block, hidden, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = ours(block, hidden, 2)
    compiled = torch.compile(ours, fullgraph=True)
    for _ in range(3):
        hidden.normal_()
        graph.replay()
        torch.testing.assert_close(result, block(hidden), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(block, hidden, 2), block(hidden), rtol=1e-4, atol=1e-5)


def test_script() -> None:
    done = subprocess.run(
        [sys.executable, moe_layer.__file__],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert "512 tokens x top-4 of 32 experts" in done.stdout
