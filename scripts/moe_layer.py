#!/usr/bin/env python3
"""A complete MoE layer in plain PyTorch on top of cupy_moe, to copy and to change: gate, align, matmul, sum.

    .venv/bin/python scripts/moe_layer.py

checks it against a loop over experts, on the GPU where there is one. tests/test_moe_layer.py compares it with
the Mixtral and Qwen3-MoE blocks of Hugging Face transformers.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, silu

from cupy_moe import moe_align_block_size, moe_sum, topk_softmax


def moe_layer(
    hidden: torch.Tensor,  # [tokens, width]
    router: torch.Tensor,  # [experts, width]
    gate_up: torch.Tensor,  # [experts, 2 * inner, width]
    down: torch.Tensor,  # [experts, width, inner]
    topk: int,
    renormalize: bool = True,
    block_size: int = 16,
) -> torch.Tensor:
    """[tokens, width]. All shapes follow from the arguments' shapes, so it runs without waiting for the GPU,
    inside CUDA graphs, and under torch.compile(fullgraph=True)."""
    num_tokens, width = hidden.shape

    # Gate: topk experts for each token, and how much each counts.
    topk_weights, topk_ids = topk_softmax(linear(hidden, router), topk, renormalize)

    # Align: all (token, k) pairs by expert, in blocks of one expert each. Pair i is of token i // topk; the
    # number of pairs stands for "no pair", and so for token num_tokens, which is given a row of zeros.
    pairs, experts, _ = moe_align_block_size(topk_ids, block_size, len(router), pad_sorted_ids=True)
    padded = torch.cat([hidden, hidden.new_zeros(1, width)])
    blocks = padded[pairs // topk].view(len(experts), block_size, width)

    # Matmul, each block with the weights of its expert. Blocks past the last are of expert -1 and all zeros:
    # any weights will do. A grouped GEMM would stop at num_tokens_post_pad, and read weights where they are.
    experts = experts.clamp(min=0)
    gate, up = torch.bmm(blocks, gate_up[experts].mT).chunk(2, dim=-1)
    outputs = torch.bmm(silu(gate) * up, down[experts].mT)

    # Sum: back into the order of the pairs, with one more row for all that is no pair.
    by_pair = hidden.new_empty(num_tokens * topk + 1, width)
    by_pair[pairs] = outputs.view(-1, width)
    return moe_sum(by_pair[:-1].view(num_tokens, topk, width), topk_weights=topk_weights)


def loop_over_experts(
    hidden: torch.Tensor, router: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, topk: int
) -> torch.Tensor:
    """The same without aligning: every expert looks for its tokens, and the host waits for each."""
    topk_weights, topk_ids = linear(hidden, router).softmax(-1, dtype=torch.float32).topk(topk)
    topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
    result = torch.zeros_like(hidden)
    for expert in range(len(router)):
        tokens, k = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = linear(hidden[tokens], gate_up[expert]).chunk(2, dim=-1)
        outputs = linear(silu(gate) * up, down[expert]) * topk_weights[tokens, k, None]
        result.index_add_(0, tokens, outputs.to(result.dtype))
    return result


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    tokens, width, inner, experts, topk = 512, 256, 128, 32, 4
    hidden, router = torch.randn(tokens, width, device=device), torch.randn(experts, width, device=device)
    gate_up = torch.randn(experts, 2 * inner, width, device=device) / width**0.5
    down = torch.randn(experts, width, inner, device=device) / inner**0.5
    result = moe_layer(hidden, router, gate_up, down, topk)
    expected = loop_over_experts(hidden, router, gate_up, down, topk)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    difference = (result - expected).abs().max().item()
    print(
        f"{tokens} tokens x top-{topk} of {experts} experts on {device}: largest difference {difference:.1e}"
    )


if __name__ == "__main__":
    main()
