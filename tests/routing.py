"""Seeded routings by name: which experts each token goes to, as a router would say it.

    topk_ids = routing.make("skewed", num_tokens=4096, topk=2, num_experts=64)     # int32 [4096, 2]

The skew is an axis of its own, beside the sizes: atomics, block boundaries and empty segments each have a
routing that strains them.
"""

from __future__ import annotations

import torch

NAMES = ("uniform", "skewed", "all_to_one", "empty_experts", "with_invalid")


def make(
    name: str,
    num_tokens: int,
    topk: int,
    num_experts: int,
    *,
    dtype: torch.dtype = torch.int32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> torch.Tensor:
    """Expert ids of shape [num_tokens, topk], the same for the same arguments on every device.

    uniform         every expert is equally likely
    skewed          the expert of rank r has weight 1/r; ranks are dealt to the experts at random
    all_to_one      every id is the same expert, neither the first nor the last where there are three
    empty_experts   uniform over a random quarter of the experts; the others get nothing
    with_invalid    uniform, but about a quarter of the ids is outside [0, num_experts), if `dtype` has any

    The valid ids of a token are distinct, except in all_to_one, as long as there are enough experts.
    """
    generator = torch.Generator().manual_seed(seed)
    if name == "uniform":
        ids = draw(torch.ones(num_experts), num_tokens, topk, generator)
    elif name == "skewed":
        ids = draw(1.0 / (1 + torch.randperm(num_experts, generator=generator)), num_tokens, topk, generator)
    elif name == "all_to_one":
        ids = torch.full((num_tokens, topk), num_experts // 2)
    elif name == "empty_experts":
        used = torch.randperm(num_experts, generator=generator)[: max(1, num_experts // 4)]
        ids = used[draw(torch.ones(len(used)), num_tokens, topk, generator)]
    elif name == "with_invalid":
        ids = draw(torch.ones(num_experts), num_tokens, topk, generator)
        limits = torch.iinfo(dtype)
        invalid = [-1, -2, num_experts, num_experts + 7, limits.min, limits.max]
        invalid = [i for i in invalid if limits.min <= i <= limits.max and not 0 <= i < num_experts]
        if invalid:
            spoiled = torch.rand(ids.shape, generator=generator) < 0.25
            chosen = torch.randint(len(invalid), ids.shape, generator=generator)
            ids = torch.where(spoiled, torch.tensor(invalid)[chosen], ids)
    else:
        raise ValueError(f"no routing is called {name!r}; there are {', '.join(NAMES)}")
    return ids.to(dtype).to(device)


def draw(weights: torch.Tensor, num_tokens: int, topk: int, generator: torch.Generator) -> torch.Tensor:
    """Experts drawn by weight, int64 [num_tokens, topk]; without repeats in a token if possible."""
    repeat = topk > len(weights)
    rows = max(1, 2**21 // len(weights))  # a few MB at a time stay in the CPU's caches
    chunks = [
        torch.multinomial(weights.expand(len(chunk), -1), topk, repeat, generator=generator)
        for chunk in torch.arange(num_tokens).split(rows)
        if len(chunk)
    ]
    return torch.cat(chunks) if chunks else torch.empty(0, topk, dtype=torch.int64)
