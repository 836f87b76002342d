"""scripts/expert_parallel: what it prints and writes, and what it reckons, by sums done by hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import routing
import scaling.__main__ as measuring
import torch
import torch.distributed as dist
from scaling import SHAPES, Shape, report, simulate
from scaling.simulate import Machine

from cupy_moe import fused_experts
from cupy_moe.parallel.placement import place_experts
from cupy_moe.plans.parallel import MessageLayout

ROOT = Path(__file__).parents[1]


def test_one_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rank = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
    for name, value in {**rank, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(measuring, "ROUNDS", 1)
    monkeypatch.setattr(measuring, "SMALL_TOKENS", (3,))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun has it
    try:
        measuring.main(["--out", str(tmp_path / "measured.json"), "--redundant", "0"])
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "16 layers gave the bits of one rank, by exact, fixed" in said
    assert len(re.findall(r"^ +small ", said, re.MULTILINE)) == 6
    written = json.loads((tmp_path / "measured.json").read_text())
    assert written["ranks"] == 1
    assert {row["combine"] for row in written["rows"]} == {"pairs", "partial"}
    assert all(row["rows_out_per_token"] == 0 and row["fixed_layer_us"] > 0 for row in written["rows"])


def test_the_example_of_the_page() -> None:
    page = (ROOT / "scripts" / "scaling" / "README.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        exec(example, names)
        w1, w2, x = (torch.randn(size).bfloat16() for size in ((256, 16, 8), (256, 8, 8), (3, 8)))
        weights, ids = torch.rand(3, 2), torch.tensor([[0, 255], [7, 8], [9, -1]])
        result = names["experts"](x, w1, w2, weights, ids)
        assert torch.allclose(result, fused_experts(x, w1, w2, weights, ids), rtol=0.01, atol=0.01)
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
def test_on_all_gpus() -> None:
    command = [str(ROOT / "scripts" / "expert_parallel"), "--check"]
    environment = os.environ | {"CUPY_MOE_PYTHON": sys.executable}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "layers gave the bits of one rank, by exact, fixed" in run.stdout


def test_loads_of_uniform_routing_are_what_the_formula_says() -> None:
    shape = Shape(64, 8, 1024, 512)
    for ranks in (2, 8):
        tokens = 4000
        ids = routing.make("uniform", tokens * ranks, shape.topk, shape.experts)
        load = simulate.loads(shape, place_experts(shape.experts, ranks), ids)
        assert int(load.pairs.sum()) == ids.numel()
        remote = int(load.out.sum() - load.out.trace()) / len(ids)
        # Experts of a token are different ones, so it meets some more ranks than by independent draws.
        expected = simulate.distinct_ranks(shape.topk, ranks)
        assert expected <= remote < 1.05 * expected
        assert load.experts.shape == (ranks, shape.experts // ranks)
        assert int(load.experts.sum()) == ids.numel()
        assert int(load.experts.min()) > 0


def test_bytes_of_a_token_are_as_the_page_says() -> None:
    page = (ROOT / "scripts" / "scaling" / "README.md").read_text()
    table = re.findall(
        r"^\| (.*?) ?\| (\d+) \| (\S+) \| (\S+) kB \| (\S+) kB \| (\S+) kB \|$", page, re.MULTILINE
    )
    assert len(table) == 5
    shape = SHAPES["deepseek-v3"]
    for name, ranks, *said in table:
        shape = SHAPES["qwen3-235b"] if name.startswith("Qwen") else shape
        reached = simulate.distinct_ranks(shape.topk, int(ranks))
        message = MessageLayout(2 * shape.hidden, shape.topk, 0).pitch
        pairs = shape.topk * (1 - 1 / int(ranks)) * 2 * shape.hidden
        numbers = reached * message / 1e3, pairs / 1e3, reached * 2 * shape.hidden / 1e3
        assert said == [f"{reached:.2f}", *(f"{number:.1f}" for number in numbers)]


def test_the_page_has_the_results_that_are_kept() -> None:
    files = sorted((ROOT / "scripts" / "results").glob("h200-ranks-*.json"))
    _, _, rest = report.PAGE.read_text().partition(report.BEGIN)
    assert rest.partition(report.END)[0].strip() == report.report(files)


def test_what_is_reckoned_is_near_what_was_measured() -> None:
    ratios = []
    for path in sorted((ROOT / "scripts" / "results").glob("h200-ranks-*.json")):
        measured = json.loads(path.read_text())
        few = [row for row in measured["rows"] if row["tokens"] < 4096]
        lines = simulate.compared(measured | {"rows": few}, simulate.fitted(Machine(), [path]))
        ratios += [float(line.split("|")[-2]) for line in lines]
    assert len(ratios) == 72
    assert sum(0.9 <= ratio <= 1.1 for ratio in ratios) >= 71


def test_an_exchange_is_as_slow_as_its_slowest_rank() -> None:
    machine = Machine(link=1e9, latency=10, host=2, network=1e8, network_latency=30)
    within = torch.tensor([[5000, 1000], [3000, 0]])
    assert simulate.exchange_us(within, machine) == pytest.approx(10 + 3)  # what stays costs nothing
    apart = torch.zeros(4, 4)
    apart[0, 1], apart[0, 2], apart[3, 2] = 9000, 100, 300
    assert simulate.exchange_us(apart, machine) == pytest.approx(30 + 9)
    apart[1, 2] = 1000
    assert simulate.exchange_us(apart, machine) == pytest.approx(30 + 11)


def test_latency_and_bandwidth_are_found_again(tmp_path: Path) -> None:
    rows = [
        {f"{what}_{way}{unit}": value for way in ("out", "back") for what, unit, value in triple}
        for size in (1e4, 1e6, 1e8)
        for triple in [(("bytes", "", size), ("plain", "_us", 12 + 0.75 * size / 2e11 * 1e6))]
    ]
    (tmp_path / "measured.json").write_text(json.dumps({"ranks": 4, "rows": rows}))
    machine = simulate.fitted(Machine(), [tmp_path / "measured.json"])
    assert machine.latency == pytest.approx(12)
    assert machine.link == pytest.approx(2e11)
    assert simulate.fitted(Machine(), []) == Machine()


def test_replicas_bring_the_slowest_rank_nearer_to_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    shape = SHAPES["qwen3-235b"]
    plain, helped = (
        simulate.estimate(shape, 16, 16, "skewed", replicas, "pairs", Machine()) for replicas in (0, 16)
    )
    assert plain.imbalance > 1.5 * helped.imbalance
    assert plain.layer > helped.layer > helped.overlapped
    simulate.main(["--shape", "qwen3-235b", "--tokens", "4", "--gpus", "8", "--latency", "20"])
    said = capsys.readouterr().out
    assert "latency 20" in said
    assert said.count("\n| 8 |") == 3
