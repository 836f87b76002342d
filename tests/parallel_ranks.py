"""What tests/test_parallel.py has several processes do, each a rank of gloo; a failure is one's assertion.

Hidden states and weights are small integers, whose products have the same sum in whatever order they are
added, so that batches of any size give the same bits on a CPU. Router weights are not.
"""

from __future__ import annotations

import datetime
import itertools
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cupy_moe import PeerError, fused_experts
from cupy_moe.parallel import ExpertParallel, ep_fused_experts, replicate_experts

EXPERTS, TOPK, HIDDEN, INNER = 6, 3, 32, 16
ACTIVATION = "relu2_no_mul"
TIMEOUT = 2  # seconds, of the group that a rank leaves

PLACEMENTS: dict[str, Any] = {
    "linear": lambda ranks: "linear",
    "round robin": lambda ranks: "round_robin",
    "uneven, a rank without experts": lambda ranks: [[5, 0, 3], *[[] for _ in range(ranks - 2)], [1, 4, 2]],
    "an expert that nobody has": lambda ranks: [[0, 1], *[[4] for _ in range(ranks - 2)], [5, 3]],
    "redundant": lambda ranks: replicate_experts([9, 1, 1, 5, 1, 1], ranks, ranks),
    "maps": lambda ranks: torch.tensor(
        [[0 if e == r else 1 if e == r + 1 else -1 for e in range(EXPERTS)] for r in range(ranks)]
    ),
}


class Layer:
    """All experts, and the tokens of any rank, by a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.w1 = torch.randint(-1, 2, (EXPERTS, INNER, HIDDEN), generator=generator).bfloat16()
        self.w2 = torch.randint(-1, 2, (EXPERTS, HIDDEN, INNER), generator=generator).bfloat16()

    def tokens(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states, weights and ids; the number differs between ranks, and is 0 for some."""
        generator = torch.Generator().manual_seed(1000 * self.seed + rank)
        number = (5, 0, 9, 2)[(rank + self.seed) % 4]
        x = torch.randint(-4, 5, (number, HIDDEN), generator=generator).bfloat16()
        weights = torch.rand(number, TOPK, generator=generator)
        ids = torch.stack(
            [torch.randperm(EXPERTS, generator=generator)[:TOPK] for _ in range(number)]
            or [torch.zeros(TOPK, dtype=torch.int64)]
        )[:number]
        if number > 2:
            ids[1] = -1  # a token without an expert
            ids[2, 0] = EXPERTS + 3
            ids[0, 1] = ids[0, 0]  # twice the same
        return x, weights, ids


def places(parallel: ExpertParallel, rank: int, ids: torch.Tensor) -> list[list[tuple[int, int] | None]]:
    """Rank and local id of each pair of a rank's tokens, by a loop."""
    found: list[list[tuple[int, int] | None]] = []
    for token, of_token in enumerate(ids.tolist()):
        row: list[tuple[int, int] | None] = []
        for expert in of_token:
            have = [(r, held.index(expert)) for r, held in enumerate(parallel.placement) if expert in held]
            row.append(have[(token + rank) % len(have)] if have else None)
        found.append(row)
    return found


def check_dispatch(parallel: ExpertParallel, layer: Layer, combine: str, dtype: torch.dtype) -> None:
    """What arrives, by a loop over all that others send."""
    x, weights, ids = layer.tokens(parallel.rank)
    with_scales = dtype == torch.float8_e4m3fn
    scales = torch.arange(len(x) * 3.0).view(-1, 3) + 100 * parallel.rank if with_scales else None
    received = parallel.dispatch(x.to(dtype), ids.int(), weights, scales=scales)
    expected: list[tuple[Any, ...]] = []
    for rank in range(parallel.num_ranks):
        their_x, their_weights, their_ids = layer.tokens(rank)
        of_rank: list[tuple[Any, ...]] = []
        for token, row in enumerate(places(parallel, rank, their_ids)):
            here = [p[1] if p and p[0] == parallel.rank else -1 for p in row]
            value = their_x[token], 3 * token + 100 * rank
            if combine == "partial" and max(here) >= 0:
                of_rank.append((*value, here, their_weights[token].tolist()))
            elif combine == "pairs":
                pairs = zip(here, their_weights[token].tolist(), strict=True)
                of_rank += [(*value, [local], [weight]) for local, weight in pairs if local >= 0]
        expected += of_rank
    used = received.topk_ids.max(dim=1).values >= 0 if len(received.topk_ids) else torch.zeros(0).bool()
    assert used.sum() == len(expected)
    assert parallel.capacity is not None or used.all()
    rows = received.hidden_states[used].float()
    assert [row.tolist() for row in rows] == [row.tolist() for row, *_ in expected]
    assert received.topk_ids[used].tolist() == [local for *_, local, _ in expected]
    assert received.topk_weights[used].tolist() == [weight for *_, weight in expected]
    if scales is not None:
        assert received.scales is not None
        assert received.scales[used][:, 0].tolist() == [scale for _, scale, *_ in expected]
    parallel.combine(received.hidden_states.to(torch.float32), received.handle)


def check_layer(parallel: ExpertParallel, layer: Layer, combine: str) -> None:
    """The whole, with a factor and shared experts, against one rank with all experts."""
    x, weights, ids = layer.tokens(parallel.rank)
    shared = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    options: dict[str, Any] = {"routed_scaling_factor": 2.5, "shared_output": shared}
    mine = torch.tensor(parallel.experts, dtype=torch.int64)
    result = ep_fused_experts(
        parallel, x, layer.w1[mine], layer.w2[mine], weights, ids, activation=ACTIVATION, **options
    )
    having = places(parallel, parallel.rank, ids)
    valid = torch.tensor([[p is not None for p in row] for row in having], dtype=torch.bool).view(ids.shape)
    kept = torch.where(valid, ids, -1)
    if combine == "pairs":
        expected = fused_experts(x, layer.w1, layer.w2, weights, kept, ACTIVATION, **options)
        assert torch.equal(result.view(torch.int16), expected.view(torch.int16))
    total = torch.zeros(x.shape)
    for token, pairs in enumerate(having):
        for rank in dict.fromkeys(p[0] for p in pairs if p):
            there = torch.tensor([[p is not None and p[0] == rank for p in pairs]])
            one = torch.where(there, ids[token], -1)
            part = fused_experts(
                x[token : token + 1], layer.w1, layer.w2, weights[token : token + 1], one, ACTIVATION
            )
            total[token] += part[0].float()
    if combine == "partial":
        expected = (total * 2.5 + shared.float()).bfloat16()
        assert torch.equal(result, expected)
    assert parallel.dropped.tolist() == [0]


def check_overflow(group: dist.ProcessGroup, combine: str) -> None:
    """All tokens to one rank that has room for two: others are dropped, and counted where they come from."""
    num_ranks = dist.get_world_size(group)
    parallel = ExpertParallel(group, num_ranks, combine=combine, capacity=2)
    x = torch.arange(5.0)[:, None].repeat(1, 4) + 1
    ids, weights = torch.zeros((5, 1), dtype=torch.int64), torch.ones(5, 1)
    received = parallel.dispatch(x, ids, weights)
    assert (received.topk_ids >= 0).sum() == (2 * num_ranks if parallel.rank == 0 else 0)
    result = parallel.combine(received.hidden_states.contiguous(), received.handle)
    assert result[:, 0].tolist() == [1, 2, 0, 0, 0]
    assert parallel.dropped.tolist() == [3]
    # Rows fit, but not all of their pairs.
    parallel = ExpertParallel(group, 2 * num_ranks, capacity=5, pair_capacity=7)
    received = parallel.dispatch(x, torch.tensor([[1, 0]]).repeat(5, 1), torch.ones(5, 2))
    result = parallel.combine(received.hidden_states, received.handle)
    assert result[:, 0].tolist() == [2, 4, 6, 4, 0]
    assert parallel.dropped.tolist() == [3]


def check_all(group: dist.ProcessGroup) -> None:
    ranks = dist.get_world_size(group)
    seeds = itertools.count()
    for name, combine, capacity in itertools.product(PLACEMENTS, ("pairs", "partial"), (None, 9)):
        layer = Layer(next(seeds))
        parallel = ExpertParallel(
            group, EXPERTS, placement=PLACEMENTS[name](ranks), combine=combine, capacity=capacity
        )
        check_dispatch(parallel, layer, combine, torch.float8_e4m3fn if capacity else torch.bfloat16)
        check_layer(parallel, layer, combine)
        x, weights, ids = layer.tokens(parallel.rank)
        received = parallel.dispatch(x.float(), ids, weights, scales=x[:, :2])
        assert received.scales is not None
        assert torch.equal(received.scales, received.hidden_states[:, :2].bfloat16())
    for combine in ("pairs", "partial"):
        check_overflow(group, combine)


def check_faults(group: dist.ProcessGroup) -> None:
    """Of the last rank, which does not come in time; the others have waited for no longer than they may."""
    parallel = ExpertParallel(group, EXPERTS)
    x, weights, ids = Layer(0).tokens(0)
    parallel.dispatch(x, ids, weights)
    if parallel.rank < parallel.num_ranks - 1:
        begin = time.monotonic()
        where = f"rank {parallel.rank} of {parallel.num_ranks}: the exchange of counts failed"
        with pytest.raises(PeerError, match=where):
            parallel.dispatch(x, ids, weights)
        assert time.monotonic() - begin < TIMEOUT + 5
    dist.barrier()


def main(rank: int, num_ranks: int, path: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    store = dist.FileStore(path, num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    world = dist.group.WORLD
    assert world is not None
    halves = [dist.new_group(list(range(first, first + 2))) for first in range(0, num_ranks, 2)]
    fragile = dist.new_group(list(range(num_ranks)), timeout=datetime.timedelta(seconds=TIMEOUT))
    check_all(world)
    check_all(halves[rank // 2])
    dist.barrier()
    check_faults(fragile)
    print("done")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
