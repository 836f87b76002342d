"""Runs experts on the ranks of torchrun: checks what they give, then times it; see scripts/expert_parallel.

Checked is that each rank gets what it would get with all experts, to the last bit: values are small
integers, whose sums are exact, so that it does not matter which kernels run; and that rows of fp8 come with
their scales. Then, for each shape, number of
tokens of a rank, routing and way to combine: times in CUDA graphs, medians, of the slowest rank; of dispatch
and of combine with as much capacity as the tokens need, beside `all_to_all_single` of the same bytes; of the
experts between them; of the layer; and of `fused_experts` with all experts and the tokens of all ranks. With
symmetric memory, the same by it. On CPUs sizes are small, and the wall clock tells the time.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import routing
import torch
import torch.distributed as dist

import cupy_moe
from cupy_moe import DependencyError, ExpertParallel, ep_fused_experts, fused_experts, replicate_experts
from cupy_moe.parallel import Received
from cupy_moe.parallel.symmetric import SymmetricExpertParallel, symmetric_memory
from cupy_moe.plans.parallel import MessageLayout

from . import SHAPES, Shape

TOKENS = (1, 64, 512, 4096)
SMALL = Shape(16, 4, 256, 64)  # what CPUs do instead
SMALL_TOKENS = (1, 16, 64)
GRAPH_TOKENS, ROUNDS = 2048, 15  # calls of so many tokens in a graph, 20 at most; replays


class Case(NamedTuple):
    shape: str
    tokens: int
    routing: str
    redundant: int
    combine: str


class Weights(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor

    def of(self, experts: list[int]) -> Weights:
        """Those of some experts: without a copy, if these are neighbours."""
        begin, number = (experts[0], len(experts)) if experts else (0, 0)
        if experts == list(range(begin, begin + number)):
            return Weights(self.first[begin : begin + number], self.second[begin : begin + number])
        chosen = torch.tensor(experts, device=self.first.device)
        return Weights(self.first[chosen], self.second[chosen])


class Ranks:
    """The group, and what is said and timed in all of it at once."""

    def __init__(self) -> None:
        local = int(os.environ["LOCAL_RANK"])
        on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
        self.device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=self.device if on_gpu else None)
        assert dist.group.WORLD is not None
        self.group, self.rank, self.size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()

    def most(self, value: float) -> float:
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return float(tensor)

    def say(self, *words: Any) -> None:
        if self.rank == 0:
            print(*words, flush=True)

    def us(self, call: Callable[[], object], tokens: int) -> float:
        """Time of a call, which all ranks make together; the median of rounds, of the slowest rank."""
        for _ in range(2):
            call()
        if self.device.type == "cpu":
            times = []
            for _ in range(ROUNDS):
                dist.barrier()
                begin = time.perf_counter()
                call()
                times.append(1e6 * (time.perf_counter() - begin))
            return self.most(statistics.median(times))
        number = max(2, min(20, GRAPH_TOKENS // tokens))
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):  # not torch.cuda.graph(), which collects garbage at each capture
            graph.capture_begin(capture_error_mode="thread_local")  # NCCL has threads of its own
            try:
                for _ in range(number):
                    call()
            finally:
                graph.capture_end()
        times = []
        for _ in range(ROUNDS):
            begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            dist.barrier()
            begin_event.record()
            graph.replay()
            end_event.record()
            end_event.synchronize()
            times.append(1e3 * begin_event.elapsed_time(end_event) / number)
        return self.most(statistics.median(times))

    def eager_us(self, call: Callable[[], object]) -> float:
        """The same by the wall clock, of what waits for the GPU."""
        times = []
        for _ in range(ROUNDS):
            dist.barrier()
            self.wait()
            begin = time.perf_counter()
            call()
            self.wait()
            times.append(1e6 * (time.perf_counter() - begin))
        return self.most(statistics.median(times))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def routed(name: str, tokens: int, shape: Shape, num_ranks: int) -> torch.Tensor:
    """Ids of the tokens of all ranks, [ranks * tokens, topk]: equally skewed on each."""
    return routing.make(name, num_ranks * tokens, shape.topk, shape.experts, seed=1)


def placed(ids: torch.Tensor, shape: Shape, num_ranks: int, redundant: int) -> Any:
    """As `ExpertParallel` takes it: hot experts of these ids on several ranks, if there are to be any."""
    if not redundant:
        return "linear"
    loads = torch.bincount(ids.flatten(), minlength=shape.experts).tolist()
    return replicate_experts(loads, num_ranks, redundant)


def make(ranks: Ranks, shape: Shape, way: str, capacity: int, **options: Any) -> ExpertParallel:
    """`way`: "exact", "fixed" or "symmetric"."""
    if way == "symmetric":
        options |= {"max_row_bytes": 2 * shape.hidden, "max_topk": shape.topk}
        return SymmetricExpertParallel(ranks.group, shape.experts, capacity=capacity, **options)
    if way == "exact":
        options.pop("pair_capacity", None)
        return ExpertParallel(ranks.group, shape.experts, **options)
    return ExpertParallel(ranks.group, shape.experts, capacity=capacity, **options)


def has_symmetric_memory(ranks: Ranks) -> bool:
    if ranks.device.type == "cpu":
        return False
    try:
        symmetric_memory(ranks.group, 4096, ranks.device)
        found = True
    except DependencyError as error:
        print(f"rank {ranks.rank}: {error}", file=sys.stderr)
        found = False
    return ranks.most(not found) == 0


# ---- checks


def check(ranks: Ranks, ways: Sequence[str]) -> int:
    """The number of layers that gave the bits of one rank with all experts. AssertionError for any other."""
    shape, device = Shape(16, 4, 256, 64), ranks.device
    generator = torch.Generator().manual_seed(0)

    def integers(*sizes: int) -> torch.Tensor:
        return torch.randint(-1, 2, sizes, generator=generator).to(device, torch.bfloat16)

    w1 = integers(shape.experts, shape.inner, shape.hidden)
    weights = Weights(w1, integers(shape.experts, shape.hidden, shape.inner))
    checked = 0
    for way, name, (redundant, tokens) in itertools.product(
        ways, ("uniform", "skewed", "with_invalid", "all_to_one"), ((0, 33), (8, 5))
    ):
        ids = routed(name, tokens, shape, ranks.size)
        redundant = min(redundant, shape.experts * (ranks.size - 1))
        placement = placed(ids.clamp(0, shape.experts - 1), shape, ranks.size, redundant)
        x = integers(ranks.size * tokens, shape.hidden)
        router = torch.rand(ids.shape, generator=generator).to(device)
        mine = slice(ranks.rank * tokens, (ranks.rank + 1) * tokens)
        own_ids = ids[mine].to(device)
        valid = torch.where((own_ids >= 0) & (own_ids < shape.experts), own_ids, -1)
        expected = fused_experts(x[mine], *weights, router[mine], valid, "relu2_no_mul")
        parallel = make(ranks, shape, way, tokens, placement=placement)
        own = weights.of(parallel.experts)
        for _ in range(3):  # what a call leaves behind, the next one finds
            result = ep_fused_experts(
                parallel, x[mine], *own, router[mine], own_ids, activation="relu2_no_mul"
            )
        if isinstance(parallel, SymmetricExpertParallel):
            parallel.check()
        same = torch.equal(result.view(torch.int16), expected.view(torch.int16))
        assert ranks.most(not same) == 0, f"{way}, {name}, {redundant=}: other bits than of one rank"
        assert ranks.most(int(parallel.dropped)) == 0
        checked += 1
    return checked


def check_scales(ranks: Ranks, ways: Sequence[str]) -> int:
    """The number of ways by which rows of fp8 came with their scales, and back as what they stand for."""
    shape, device, tokens = Shape(16, 4, 256, 64), ranks.device, 37
    generator = torch.Generator().manual_seed(1)
    ids = routed("uniform", tokens, shape, ranks.size)[ranks.rank * tokens : (ranks.rank + 1) * tokens].to(
        device
    )
    for _ in range(ranks.rank + 1):  # other tokens on each rank
        x = torch.randint(-4, 5, (tokens, shape.hidden), generator=generator)
        scales = 2.0 ** torch.randint(-2, 3, (tokens, 2), generator=generator)
    rows, scales = x.to(device).to(torch.float8_e4m3fn), scales.to(device)
    meant = rows.float() * scales.repeat_interleave(128, dim=1)
    weights = torch.ones(ids.shape, device=device)
    for way, combine in itertools.product(ways, ("pairs", "partial")):
        parallel = make(ranks, shape, way, tokens, combine=combine)
        came = parallel.dispatch(rows, ids, weights, scales=scales)
        assert came.scales is not None
        own = torch.where(came.topk_ids >= 0, came.topk_weights, 0).sum(1, keepdim=True)
        values = came.hidden_states.float() * came.scales.repeat_interleave(128, dim=1) * own
        result = parallel.combine(torch.where(own > 0, values, 0).bfloat16(), came.handle)
        same = torch.equal(result, (meant * shape.topk).bfloat16())
        assert ranks.most(not same) == 0, f"{way}, {combine}: fp8 rows or scales are not those that were sent"
    return len(ways)


# ---- times


def needed(ranks: Ranks, shape: Shape, ids: torch.Tensor, placement: Any) -> list[list[int]]:
    """How many rows, and how many pairs, this rank sends to each."""
    x = torch.zeros((len(ids), 8), dtype=torch.bfloat16, device=ranks.device)
    weights = torch.ones(ids.shape, device=ranks.device)
    found = []
    for combine in ("partial", "pairs"):
        parallel = ExpertParallel(ranks.group, shape.experts, placement=placement, combine=combine)
        found.append(parallel.dispatch(x, ids, weights).handle.sent or [])
    return found


def measure(ranks: Ranks, shape: Shape, case: Case, weights: Weights, ways: Sequence[str]) -> dict[str, Any]:
    device, tokens, size = ranks.device, case.tokens, ranks.size
    all_ids = routed(case.routing, tokens, shape, size)
    placement = placed(all_ids, shape, size, case.redundant)
    ids = all_ids[ranks.rank * tokens : (ranks.rank + 1) * tokens].to(device)
    rows, pairs = needed(ranks, shape, ids, placement)
    back_rows = pairs if case.combine == "pairs" else rows
    capacity, pair_capacity = (int(ranks.most(max(1, *of))) for of in (rows, pairs))
    options: dict[str, Any] = {"placement": placement, "combine": case.combine}
    if case.combine == "pairs":
        options["pair_capacity"] = pair_capacity
    x = torch.randn((tokens, shape.hidden), dtype=torch.bfloat16, device=device)
    router = torch.rand(ids.shape, device=device)
    layout = MessageLayout(2 * shape.hidden, shape.topk, 0)
    result: dict[str, Any] = {
        **case._asdict(),
        "capacity": capacity,
        "pair_capacity": pair_capacity,
        # Of this rank, which is as good as any where tokens are many.
        "rows_out_per_token": (sum(rows) - rows[ranks.rank]) / tokens,
        "rows_back_per_token": (sum(back_rows) - back_rows[ranks.rank]) / tokens,
        "message_bytes": layout.pitch,
    }
    for way in ways:
        parallel = make(ranks, shape, way, capacity, **options)
        own = weights.of(parallel.experts)

        def layer(parallel: ExpertParallel = parallel, own: Weights = own) -> torch.Tensor:
            return ep_fused_experts(parallel, x, *own, router, ids)

        if way == "exact":
            result["exact_layer_us"] = ranks.eager_us(layer)
            continue
        received = parallel.dispatch(x, ids, router)
        outputs = torch.randn(received.hidden_states.shape, dtype=x.dtype, device=device)
        parallel.combine(outputs, received.handle)

        def there(parallel: ExpertParallel = parallel) -> Received:
            return parallel.dispatch(x, ids, router)

        def there_and_back(
            parallel: ExpertParallel = parallel, outputs: torch.Tensor = outputs
        ) -> torch.Tensor:
            return parallel.combine(outputs, there(parallel).handle)

        # In symmetric memory they take turns, so combine cannot be timed by itself.
        dispatch_us = ranks.us(there, tokens)
        combine_us = ranks.us(there_and_back, tokens) - dispatch_us
        layer_us = ranks.us(layer, tokens)
        result[f"{way}_dispatch_us"], result[f"{way}_combine_us"] = dispatch_us, combine_us
        result[f"{way}_layer_us"] = layer_us
        result[f"{way}_communication"] = (dispatch_us + combine_us) / layer_us
        if way != "fixed":
            continue
        sent = received.hidden_states, own, received.topk_weights, received.topk_ids

        def experts(sent: Any = sent) -> torch.Tensor:
            return fused_experts(sent[0], *sent[1], *sent[2:])

        result["experts_us"] = ranks.us(experts, tokens) if parallel.experts else 0.0
        for name, num_bytes in (("out", size * capacity * layout.pitch), ("back", outputs.nbytes)):
            to, by = (torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
            result[f"bytes_{name}"] = num_bytes
            result[f"plain_{name}_us"] = ranks.us(functools.partial(dist.all_to_all_single, to, by), tokens)
    every_x = torch.randn((size * tokens, shape.hidden), dtype=torch.bfloat16, device=device)
    every_router, every_id = torch.rand(all_ids.shape, device=device), all_ids.to(device)
    result["one_rank_us"] = ranks.us(
        lambda: fused_experts(every_x, *weights, every_router, every_id), tokens * size
    )
    result["tokens_per_second"] = 1e6 * size * tokens / result["fixed_layer_us"]
    result["faster_than_one_rank"] = result["one_rank_us"] / result["fixed_layer_us"]
    return result


# What is printed of a row: name, width, and what it says.
COLUMNS = (
    ("shape", 11, "{shape}"),
    ("tokens", 6, "{tokens}"),
    ("routing", 7, "{routing}"),
    ("replicas", 8, "{redundant}"),
    ("combine", 7, "{combine}"),
    ("kB/token", 8, "{kilobytes:.1f}"),
    ("dispatch", 8, "{fixed_dispatch_us:.1f}"),
    ("plain", 7, "{plain_out_us:.1f}"),
    ("combine", 7, "{fixed_combine_us:.1f}"),
    ("plain", 7, "{plain_back_us:.1f}"),
    ("experts", 8, "{experts_us:.1f}"),
    ("layer", 8, "{fixed_layer_us:.1f}"),
    ("share", 5, "{fixed_communication:.0%}"),
    ("exact", 8, "{exact_layer_us:.1f}"),
    ("one rank", 8, "{one_rank_us:.1f}"),
    ("tokens/s", 8, "{tokens_per_second:.0f}"),
)
SYMMETRIC_COLUMNS = (
    ("| dispatch", 10, "{symmetric_dispatch_us:.1f}"),
    ("combine", 7, "{symmetric_combine_us:.1f}"),
    ("layer", 8, "{symmetric_layer_us:.1f}"),
    ("share", 5, "{symmetric_communication:.0%}"),
)


def kilobytes(shape: Shape, row: dict[str, Any]) -> float:
    """Of a token that leave its rank, there and back."""
    out = row["rows_out_per_token"] * row["message_bytes"]
    return (out + row["rows_back_per_token"] * 2 * shape.hidden) / 1e3


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/expert_parallel [--ranks N]", description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of " + ", ".join(SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="of a rank")
    parser.add_argument("--combine", default="pairs,partial", help="ways to combine")
    parser.add_argument("--redundant", type=int, default=None, help="replicas; by default one for each rank")
    parser.add_argument("--check", action="store_true", help="only check")
    parser.add_argument("--out", type=Path, help="a file for all figures, as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    ranks = Ranks()
    on_gpu = ranks.device.type == "cuda"
    what = torch.cuda.get_device_name() if on_gpu else "CPU, small sizes"
    ranks.say(f"{ranks.size} ranks, {what}, torch {torch.__version__}, cupy_moe {cupy_moe.__version__}")
    ways = ["exact", "fixed", *(["symmetric"] if has_symmetric_memory(ranks) else [])]
    ranks.say(f"{check(ranks, ways)} layers gave the bits of one rank, by {', '.join(ways)}")
    ranks.say(f"rows of fp8 came with their scales, and back, in {check_scales(ranks, ways)} ways")
    rows: list[dict[str, Any]] = []
    if not options.check:
        columns = [*COLUMNS, *(SYMMETRIC_COLUMNS if "symmetric" in ways else ())]
        ranks.say("times in us" + (", those by symmetric memory last" if "symmetric" in ways else ""))
        ranks.say("  ".join(name.rjust(width) for name, width, _ in columns))
        redundant = ranks.size if options.redundant is None else options.redundant
        tokens = [int(number) for number in options.tokens.split(",")] if on_gpu else SMALL_TOKENS
        shapes = {name: SHAPES[name] for name in options.shapes.split(",")} if on_gpu else {"small": SMALL}
        for name, shape in shapes.items():
            sizes = (2 * shape.inner, shape.hidden), (shape.hidden, shape.inner)
            weights = Weights(
                *(
                    torch.empty((shape.experts, *size), dtype=torch.bfloat16, device=ranks.device).normal_(
                        std=size[1] ** -0.5
                    )
                    for size in sizes
                )
            )
            routings = ("uniform", 0), ("skewed", 0), ("skewed", redundant)
            for number, (route, replicas), combine in itertools.product(
                tokens, routings, options.combine.split(",")
            ):
                case = Case(name, number, route, replicas, combine)
                row = measure(ranks, shape, case, weights, ways)
                row["kilobytes"] = kilobytes(shape, row)
                rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
                ranks.say("  ".join(text.format(**row).rjust(width) for _, width, text in columns))
            del weights
    if options.out and ranks.rank == 0:
        header = {"device": what, "ranks": ranks.size, "torch": torch.__version__}
        options.out.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
