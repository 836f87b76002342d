"""Reckons what experts take on 8 to 256 GPUs, by the model of scripts/scaling/README.md; measures nothing.

Tokens are routed as the benchmarks route them and counted, rank by rank; the rest is arithmetic with what a
GPU and its links can do. Latency and bandwidth of exchanges are fitted to files of
`scripts/expert_parallel --out`, if any are given; --compare sets what is reckoned beside what these files
have. Times are in us, of a layer; those of exchanges are there and back, with what packs and adds up.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import routing
import torch

from cupy_moe import replicate_experts
from cupy_moe.cpu import parallel as cpu
from cupy_moe.parallel.placement import Placement, place_experts, replica_table
from cupy_moe.plans.parallel import MessageLayout

from . import SHAPES, Shape

GPUS = (8, 16, 32, 64, 128, 256)
MOST_TOKENS = 32_768  # that are routed, of all ranks; more are taken to be like them
TILE_ROWS = 64  # pairs of an expert, of which fused_experts multiplies so many or none


class Machine(NamedTuple):
    """What a GPU and its links can do, in bytes or operations a second, and us."""

    memory: float = 4.1e12
    operations: float = 614e12
    launches: float = 10.0  # of fused_experts, where it has next to nothing to do
    link: float = 260e9  # to GPUs of the same host, out of a GPU
    latency: float = 12.6  # of an exchange within a host
    host: int = 8  # GPUs that have links
    network: float = 50e9  # to GPUs of other hosts
    network_latency: float = 40.0


class Load(NamedTuple):
    """What ranks send each other, and what their experts get of it."""

    out: torch.Tensor  # [ranks, ranks] rows that each sends to each
    pairs: torch.Tensor  # [ranks, ranks] pairs of these
    experts: torch.Tensor  # [ranks, most local experts] pairs

    def times(self, factor: float) -> Load:
        return Load(*(part * factor for part in self))


class Estimate(NamedTuple):
    gpus: int
    routing: str
    replicas: int
    out_kb: float  # of a token, to other ranks
    back_kb: float
    imbalance: float  # pairs of the rank that has most of them, by the mean
    exchanges: float
    experts: float
    layer: float
    overlapped: float  # where exchanges of one half of the tokens run beside the experts of the other
    tokens_per_second: float  # of one GPU


def distinct_ranks(topk: int, num_ranks: int) -> float:
    """How many ranks beside its own a token goes to, of experts that are equally likely and spread evenly."""
    return (num_ranks - 1) * (1 - (1 - 1 / num_ranks) ** topk)


def loads(shape: Shape, placement: Placement, ids: torch.Tensor) -> Load:
    """Of ids [ranks * tokens, topk]: counted as the package routes them."""
    num_ranks, tokens = len(placement), len(ids) // len(placement)
    table, most_local = replica_table(placement, shape.experts)
    replicas = torch.tensor(table, dtype=torch.int32)
    out, pairs = (torch.zeros((num_ranks, num_ranks), dtype=torch.int64) for _ in range(2))
    experts = torch.zeros(num_ranks * most_local, dtype=torch.int64)
    for rank in range(num_ranks):
        own = ids[rank * tokens : (rank + 1) * tokens]
        places, rows = cpu.route(own, replicas, most_local, num_ranks, rank, pairs=False)
        out[rank] = torch.bincount(rows[rows >= 0], minlength=num_ranks)
        pairs[rank] = torch.bincount(places[places >= 0] // most_local, minlength=num_ranks)
        experts += torch.bincount(places[places >= 0], minlength=len(experts))
    return Load(out, pairs, experts.view(num_ranks, most_local))


def exchange_us(sent: torch.Tensor, machine: Machine) -> float:
    """Of bytes [ranks, ranks]: of the slowest rank, out or in, by links or network, whichever is slower."""
    num_ranks = len(sent)
    host = torch.arange(num_ranks) // machine.host
    within = host[:, None] == host[None, :]
    apart = ~torch.eye(num_ranks, dtype=torch.bool)
    latency = machine.latency if num_ranks <= machine.host else machine.network_latency
    return latency + max(
        max(float(part.sum(0).max()), float(part.sum(1).max())) / speed * 1e6
        for part, speed in ((sent * (within & apart), machine.link), (sent * ~within, machine.network))
    )


def local_us(load: Load, row_bytes: int, message_bytes: int, combine: str, machine: Machine) -> float:
    """Of what packs messages, makes pairs of them, and adds up what has come back: it reads and writes."""
    sent, came = load.out.sum(1), load.out.sum(0)
    moved = sent * message_bytes
    if combine == "pairs":
        moved = moved + came * message_bytes + (load.pairs.sum(0) + load.pairs.sum(1)) * row_bytes
    else:
        moved = moved + sent * row_bytes
    return float(moved.max()) / machine.memory * 1e6


def experts_us(load: Load, shape: Shape, machine: Machine) -> float:
    """Of the slowest rank. Weights are read while tiles are multiplied, but whichever takes less time is not
    hidden altogether where both take about the same."""
    weights = 6 * shape.hidden * shape.inner  # bytes of an expert; as many operations for a pair
    by_memory = (load.experts > 0).sum(1) * (weights / machine.memory * 1e6)
    by_operations = (load.experts / TILE_ROWS).ceil().sum(1) * (
        TILE_ROWS * weights / machine.operations * 1e6
    )
    return machine.launches + float(((by_memory**3 + by_operations**3) ** (1 / 3)).max())


def estimate(
    shape: Shape, tokens: int, gpus: int, name: str, replicas: int, combine: str, machine: Machine
) -> Estimate:
    routed = min(tokens, max(1, MOST_TOKENS // gpus))
    ids = routing.make(name, gpus * routed, shape.topk, shape.experts, seed=1)
    placement = place_experts(shape.experts, gpus)
    if replicas:
        counts = torch.bincount(ids.flatten(), minlength=shape.experts).tolist()
        placement = replicate_experts(counts, gpus, replicas)
    load = loads(shape, placement, ids).times(tokens / routed)
    row, message = 2 * shape.hidden, MessageLayout(2 * shape.hidden, shape.topk, 0).pitch
    out = load.out * message
    back = (load.pairs if combine == "pairs" else load.out).t() * row
    remote = ~torch.eye(gpus, dtype=torch.bool)
    out_kb, back_kb = (float((side * remote).sum()) / gpus / tokens / 1e3 for side in (out, back))
    exchanges = exchange_us(out, machine) + exchange_us(back, machine)
    exchanges += local_us(load, row, message, combine, machine)
    experts = experts_us(load, shape, machine)
    layer = exchanges + experts
    of_rank = load.pairs.sum(0)
    imbalance = float(of_rank.max() / of_rank.mean())
    return Estimate(
        gpus, name, replicas, out_kb, back_kb, imbalance, exchanges, experts, layer,
        max(exchanges, experts), 1e6 * tokens / layer,
    )  # fmt: skip


def fitted(machine: Machine, files: Iterable[Path]) -> Machine:
    """With the latency and bandwidth of exchanges that were measured, by least squares of relative errors."""
    rows = []
    for path in files:
        measured = json.loads(path.read_text())
        share = 1 - 1 / measured["ranks"]  # what leaves a GPU
        for row in measured["rows"]:
            for way in ("out", "back"):
                rows.append((row[f"bytes_{way}"] * share, row[f"plain_{way}_us"]))
    if not rows:
        return machine
    sizes, times = torch.tensor(rows, dtype=torch.float64).unbind(1)
    terms = torch.stack([torch.ones_like(sizes), sizes], dim=1) / times[:, None]
    latency, per_byte = torch.linalg.lstsq(terms, torch.ones(len(times), 1, dtype=torch.float64)).solution[
        :, 0
    ]
    return machine._replace(latency=float(latency), link=1e6 / float(per_byte))


def table(rows: Sequence[Estimate]) -> list[str]:
    lines = [
        "| GPUs | routing | replicas | kB out | kB back | imbalance | exchanges | experts | layer |"
        " overlapped | tokens/s a GPU |",
        "|" + " ---: |" * 11,
    ]
    lines += [
        f"| {row.gpus} | {row.routing} | {row.replicas} | {row.out_kb:.1f} | {row.back_kb:.1f} |"
        f" {row.imbalance:.2f} | {row.exchanges:.0f} | {row.experts:.0f} | {row.layer:.0f} |"
        f" {row.overlapped:.0f} | {row.tokens_per_second:.0f} |"
        for row in rows
    ]
    return lines


def compared(measured: dict[str, Any], machine: Machine) -> list[str]:
    """Measured layers of a file, by NCCL, and in how much of that time they should be done."""
    lines = []
    for row in measured["rows"]:
        of = SHAPES[row["shape"]], row["tokens"], measured["ranks"], row["routing"], row["redundant"]
        reckoned = estimate(*of, row["combine"], machine)
        exchanges = row["fixed_dispatch_us"] + row["fixed_combine_us"]
        lines.append(
            f"| {row['shape']} | {measured['ranks']} | {row['tokens']} | {row['routing']} |"
            f" {row['redundant']} | {row['combine']} | {exchanges:.0f} | {reckoned.exchanges:.0f} |"
            f" {row['experts_us']:.0f} | {reckoned.experts:.0f} | {row['fixed_layer_us']:.0f} |"
            f" {reckoned.layer:.0f} | {reckoned.layer / row['fixed_layer_us']:.2f} |"
        )
    return lines


def main(arguments: list[str]) -> None:
    defaults = Machine()
    parser = argparse.ArgumentParser(prog="scripts/expert_parallel simulate", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="deepseek-v3")
    parser.add_argument("--tokens", type=int, default=64, help="of a GPU")
    parser.add_argument("--combine", choices=("pairs", "partial"), default="pairs")
    parser.add_argument("--gpus", default=",".join(map(str, GPUS)))
    parser.add_argument("--measured", type=Path, nargs="*", default=[], help="files of --out")
    parser.add_argument("--compare", action="store_true", help="with what these files have")
    for name, value in defaults._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args(arguments)
    given = Machine(**{name: getattr(options, name) for name in Machine._fields})
    machine = fitted(given, options.measured)
    print(", ".join(f"{name} {value:.4g}" for name, value in machine._asdict().items()))
    if options.compare:
        print(
            "| shape | GPUs | tokens | routing | replicas | combine | exchanges | reckoned | experts |"
            " reckoned | layer | reckoned | ratio |\n|" + " ---: |" * 13
        )
        for path in options.measured:
            own = fitted(given, [path])  # with as many GPUs
            print("\n".join(compared(json.loads(path.read_text()), own)))
        return
    print(
        f"{options.shape}, {options.tokens} tokens a GPU, combine={options.combine!r}: reckoned, not measured"
    )
    rows = [
        estimate(SHAPES[options.shape], options.tokens, gpus, name, replicas, options.combine, machine)
        for gpus in map(int, options.gpus.split(","))
        for name, replicas in (("uniform", 0), ("skewed", 0), ("skewed", gpus))
    ]
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
