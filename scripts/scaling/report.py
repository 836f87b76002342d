"""Files of `scripts/expert_parallel --out` -> tables of scripts/scaling/README.md, between its two markers.

Layers are there with what the model reckons of them, by the latency and bandwidth of that file's exchanges.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmark.report import Table

from . import SHAPES
from .simulate import Machine, estimate, fitted

PAGE = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
LAYER_TOKENS = (1, 64, 4096)
LAYERS = """\
The layer with combine="pairs", beside `fused_experts` on one GPU with all experts and the tokens of all
ranks: with exact sizes, by the wall clock, as the host waits; with a capacity; what the model reckons of
that; by stores. How much faster than one GPU, and tokens a second, of all ranks, are those of stores:"""


def exchanges(rows: list[tuple[int, dict[str, Any]]]) -> Table:
    ways, beside = ("dispatch", "combine"), ("plain", "ratio")
    cases = ["layer", "GPUs", "tokens", "combine"]
    header = [*cases, ways[0], *beside, ways[1], *beside, *ways]
    lines = []
    for gpus, row in rows:
        if row["routing"] != "uniform":
            continue
        times = []
        for way, of in zip(ways, ("out", "back"), strict=True):
            ours, plain = row[f"fixed_{way}_us"], row[f"plain_{of}_us"]
            times += [f"{ours:.1f}", f"{plain:.1f}", f"{ours / plain:.2f}"]
        times += [f"{row[f'symmetric_{way}_us']:.1f}" for way in ways]
        lines.append([row["shape"], str(gpus), str(row["tokens"]), row["combine"], *times])
    return Table("", header, lines, 1)


def layers(rows: list[tuple[int, dict[str, Any]]], machines: dict[int, Machine]) -> Table:
    times = ["one GPU", "exact", "capacity", "reckoned", "stores"]
    header = ["layer", "GPUs", "tokens", "routing", "replicas", *times, "faster", "tokens/s"]
    lines = []
    for gpus, row in rows:
        if row["combine"] != "pairs" or row["tokens"] not in LAYER_TOKENS:
            continue
        of = row["tokens"], gpus, row["routing"], row["redundant"]
        reckoned = estimate(SHAPES[row["shape"]], *of, row["combine"], machines[gpus]).layer
        one, stores = row["one_rank_us"], row["symmetric_layer_us"]
        us = one, row["exact_layer_us"], row["fixed_layer_us"], reckoned, stores
        speed = f"{one / stores:.2f} x", f"{gpus * row['tokens'] / stores * 1e6:.0f}"
        case = row["shape"], str(gpus), str(row["tokens"]), row["routing"], str(row["redundant"])
        lines.append([*case, *(f"{value:.0f}" for value in us), *speed])
    return Table("", header, lines, 1)


def report(paths: list[Path]) -> str:
    measured = [json.loads(path.read_text()) for path in paths]
    rows = [(one["ranks"], row) for one in measured for row in one["rows"]]
    machines = {one["ranks"]: fitted(Machine(), [path]) for one, path in zip(measured, paths, strict=True)}
    return "\n\n".join([exchanges(rows).markdown(), LAYERS, layers(rows, machines).markdown()])


if __name__ == "__main__":
    text = PAGE.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{report([Path(name) for name in sys.argv[1:]])}\n{END}{after}")
