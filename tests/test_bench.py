"""The benchmark without a GPU: the whole run with made-up times, its tables, its JSON, its plot, its gate."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark import __main__ as bench
from benchmark import cases, measure, operators, report, timing
from benchmark.operators import OPERATORS, Align, Bound, Gate, Grouped, Sigmoid, Sum
from click.testing import CliRunner, Result

import cupy_moe

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "gpu": "NVIDIA Imaginary 9000", "driver": "999.1", "cuda": "13.0", "torch": "2.11.0", "cupy": "14.2.0",
    "nvrtc": "13.0.88", "cupy_moe": "0.1.0", "peers": {"vllm": "0.26.0", "sglang": ""}, "date": "2030-01-02",
}  # fmt: skip
US = {"cupy_moe": 2.0, "vllm": 5.0, "sglang": 4.0}


def made_up_result() -> dict[str, Any]:
    def row(case: Any, kinds: tuple[str, ...]) -> dict[str, Any]:
        scale = case.num_ids**0.5 if isinstance(case, cases.AlignCase) else 1
        us = {kind: {name: us * scale for name, us in US.items()} for kind in kinds}
        return {**case._asdict(), "us": us}

    routings = cases.TIMED_ROUTINGS
    align = [row(case, (*routings, "cold") if case.num_ids >= 131_072 else routings) for case in cases.ALIGN]
    kernels = [
        {**row(case, ("uniform",)), "us": {"uniform": {"cupy_moe": 2.0, "small": 2.0}}}
        for case in cases.ALIGN
    ]
    return {
        "format": bench.FORMAT, "environment": ENVIRONMENT, "seed": 1, "floor": {"one block of 32": 0.7},
        "align": align, "kernels": kernels, "sweep": [row(case, routings) for case in cases.sweep()],
        "sum": [row(case, ("random",)) for case in cases.SUM],
        "gate": [row(case, ("random",)) for case in cases.GATE],
        "sigmoid": [row(case, ("random",)) for case in cases.SIGMOID],
        "grouped": [row(case, ("random",)) for case in cases.GROUPED],
        "host": {"cupy_moe": 10.0, "cupy_moe, out=": 8.0, "vllm": 20.0, "vllm, expert_map": 40.0},
    }  # fmt: skip


def run(*arguments: str) -> Result:
    return CliRunner().invoke(bench.main, arguments)


@pytest.fixture
def made_up_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in place of a GPU: every call is made once, and takes as long as we say."""

    def gpu_us(contenders: Any, replays: int) -> dict[str, float]:
        return {name: 3.0 for name, calls in contenders.items() for _ in [call() for call in calls]}

    def host_us(contenders: Any) -> dict[str, float]:
        return {name: 5.0 for name, call in contenders.items() for _ in [call()]}

    monkeypatch.setattr(operators, "device", "cpu")
    monkeypatch.setattr(timing, "gpu_us", gpu_us)
    monkeypatch.setattr(timing, "host_us", host_us)
    monkeypatch.setattr(timing, "eager_us", lambda call, rounds: 700.0)
    monkeypatch.setattr(timing, "floor_us", lambda replays: {"one block of 32": 0.7})
    monkeypatch.setattr(timing, "l2_bytes", lambda: 2**20)
    monkeypatch.setattr(bench, "environment", lambda found: {**ENVIRONMENT, "peers": found})
    monkeypatch.setattr(bench.peers, "load", lambda folder: {})
    monkeypatch.setattr(
        Align, "cases", (cases.AlignCase(4, 2, 8, 16, 2.0), cases.AlignCase(65536, 2, 8, 64, 4.0))
    )
    monkeypatch.setattr(Sum, "cases", ())
    for gate in (Gate, Sigmoid, Grouped):
        monkeypatch.setattr(gate, "cases", ())
    monkeypatch.setattr(cases, "SWEEP_MAX_IDS", 16)


def test_a_whole_run(made_up_times: None, tmp_path: Path) -> None:
    result = run("--out", str(tmp_path / "r.json"), "--seed", "3", "--kernels")
    assert result.exit_code == 0, result.output
    assert "10 results checked" in result.output
    assert "NVIDIA Imaginary 9000" in result.output
    written = json.loads((tmp_path / "r.json").read_text())
    assert (written["format"], written["seed"]) == (bench.FORMAT, 3)
    assert {"environment", "floor", "align", "sweep", "kernels", "host"} <= written.keys()
    small, large = written["align"]
    us = {"cupy_moe": 3.0}
    assert small["us"] == {"uniform": {**us, "torch": 700.0}, "skewed": us, "all_to_one": us}
    assert cases.AlignCase(**{k: v for k, v in small.items() if k != "us"}) == Align.cases[0]
    assert large["us"]["cold"] == {"cupy_moe": 3.0}
    again = run("--from", str(tmp_path / "r.json"))
    assert re.split("wrote|no plot", again.output)[0] in result.output


def test_sections_and_where_results_go(
    made_up_times: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    quick = run("--quick")
    assert "moe_align_block_size" in quick.output
    assert "Host time" not in quick.output
    assert "Host time" in run("--only", "host").output
    assert not list(tmp_path.iterdir())  # a part never replaces the whole
    assert run().exit_code == 0
    assert (tmp_path / "scripts/results/imaginary-9000.json").is_file()


def test_a_wrong_result_fails_the_run(made_up_times: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def lazy(ids: torch.Tensor, block_size: int, experts: int, *, out: Any, **rest: Any) -> Any:
        out[0].copy_(real(ids, block_size, experts).sorted_token_ids)
        return out

    real = cupy_moe.moe_align_block_size
    monkeypatch.setattr(cupy_moe, "moe_align_block_size", lazy)
    result = run("--quick")
    assert result.exit_code == 1
    assert "cupy_moe: wrong expert_ids, num_tokens_post_pad" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    result = run("--quick")
    assert (result.exit_code, result.output) == (1, "Error: torch sees no CUDA GPU here\n")


@pytest.mark.parametrize(
    "arguments", [["--only", "lunch"], ["--peers", "scripts"], ["--from", "/nowhere"], ["now"]]
)
def test_wrong_usage_is_refused(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


# ---- what is a wrong result ------------------------------------------------------------------------------


@pytest.fixture
def aligned(monkeypatch: pytest.MonkeyPatch) -> tuple[cases.AlignCase, Any]:
    monkeypatch.setattr(operators, "device", "cpu")
    case = cases.AlignCase(50, 2, 8, 4)
    return case, Align().expected(case, Align().inputs(case, "skewed", 1))


def test_peers_may_order_as_they_like_inside_an_expert(aligned: tuple[cases.AlignCase, Any]) -> None:
    case, expected = aligned
    outputs = tuple(t.clone() for t in expected)
    first = int((expected[1] == expected[1][0]).sum()) * case.block_size  # slots of the first expert
    outputs[0][:first] = outputs[0][:first].flip(0)
    outputs[0][int(expected[2]) :] = -77
    assert Align().wrong("vllm", case, outputs, expected) == ""
    assert Align().wrong("cupy_moe", case, outputs, expected) == "sorted_token_ids"
    outputs[0][0], outputs[0][first] = int(outputs[0][first]), int(outputs[0][0])  # across two experts
    assert Align().wrong("vllm", case, outputs, expected) == "sorted_token_ids"


@pytest.mark.parametrize("output", [0, 1, 2])
def test_poison_is_noticed(aligned: tuple[cases.AlignCase, Any], output: int) -> None:
    case, expected = aligned
    outputs = tuple(t.clone() for t in expected)
    operators.poison([outputs[output]])
    for contender in ("cupy_moe", "vllm", "sglang"):
        assert Align().wrong(contender, case, outputs, expected)


def test_wrong_sums_and_gates_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "device", "cpu")
    total = cases.SumCase(3, 2, 16)
    x = Sum().inputs(total, "random", 0)
    expected = Sum().expected(total, x)
    good = x.float().sum(1).bfloat16()
    assert Sum().wrong("cupy_moe", total, (good,), expected) == ""
    assert Sum().wrong("cupy_moe", total, (good + x[:, 0] / 8,), expected)
    operators.poison([good])
    assert Sum().wrong("cupy_moe", total, (good,), expected)


@pytest.mark.parametrize("operator", [Gate(), Sigmoid(), Grouped()], ids=lambda operator: operator.function)
def test_wrong_gates_are_noticed(operator: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "device", "cpu")
    case = cases.GateCase(5, 32, 4)
    inputs = operator.inputs(case, "random", 0)
    expected = operator.expected(case, inputs)
    bound = operator.bind("cupy_moe", case, inputs)
    operators.poison(bound.outputs)
    assert operator.wrong("cupy_moe", case, bound.outputs, expected) == "topk_ids out of range"
    bound.call()
    weights, ids = bound.results()
    assert operator.wrong("cupy_moe", case, (weights, ids), expected) == ""
    assert operator.wrong("cupy_moe", case, (weights * 1.001, ids), expected) == "topk_weights"
    for wrong in ([1, 0, 2, 3], [0, 0, 2, 3]):
        assert operator.wrong("cupy_moe", case, (weights, ids[:, wrong]), expected) == "topk_ids"


@pytest.mark.parametrize("operator", [Gate(), Sigmoid(), Grouped()], ids=lambda operator: operator.function)
def test_one_wrong_row_of_many_is_noticed(operator: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "device", "cpu")
    case = cases.GateCase(2000, 32, 4)
    inputs = operator.inputs(case, "random", 0)
    expected = operator.expected(case, inputs)
    bound = operator.bind("cupy_moe", case, inputs)
    bound.call()
    weights, ids = bound.results()
    assert operator.wrong("cupy_moe", case, (weights, ids), expected) == ""
    twice = ids.clone()
    twice[-1] = ids[-1, 0]
    assert operator.wrong("cupy_moe", case, (weights, twice), expected) == "topk_ids"
    swapped = ids.clone()
    swapped[-1] = ids[-1, [1, 0, 2, 3]]
    assert operator.wrong("cupy_moe", case, (weights, swapped), expected)  # its weights, if groups may differ


def test_groups_that_are_not_chosen_are_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "device", "cpu")
    case, grouped = cases.GateCase(5, 32, 4), Grouped()
    choice = grouped.expected(case, grouped.inputs(case, "random", 0)).choice.view(5, cases.NUM_GROUPS, -1)
    out = choice.isinf()
    assert bool((out.all(-1) == out.any(-1)).all())
    assert out.all(-1).sum(-1).tolist() == [cases.NUM_GROUPS - cases.TOPK_GROUP] * 5


# ---- report ----------------------------------------------------------------------------------------------


def test_tables_say_what_was_measured() -> None:
    texts = {table.title.split(",")[0]: table for table in report.tables(made_up_result())}
    align = texts["moe_align_block_size"]
    assert align.rows[0] == [
        "1 x 2", "8", "16", "2.83", "7.07", "5.66", "-", "2.00 x", "2", "no", "1.00 x", "1.00 x"
    ]  # fmt: skip
    assert len({len(line) for line in align.text().splitlines()[2:]}) == 1
    assert len(texts["The same with a cold L2"].rows) == 4
    host = {line[0]: line[1:] for line in next(t for t in texts.values() if t.title.startswith("Host")).rows}
    assert host["cupy_moe"] == ["10.0", "0.50 x", "0.6 x", "yes"]
    assert host["cupy_moe, out="] == ["8.00", "0.40 x", "0.25 x", "no"]
    assert host["vLLM, expert_map"] == ["40.0", "2.00 x", "", ""]


def test_readme_section_is_replaced_and_nothing_else() -> None:
    text = (ROOT / "README.md").read_text()
    section = report.readme_section(made_up_result(), "scripts/results/imaginary.svg")
    replaced = report.replace_section(text, section)
    assert "(scripts/results/imaginary.svg)" in replaced
    assert "NVIDIA Imaginary 9000, driver 999.1" in replaced
    assert "| 1 x 8 | 256 | 16 |" in replaced
    assert report.replace_section(replaced, section) == replaced
    before, _, rest = text.partition(report.BEGIN)
    assert replaced.startswith(before + report.BEGIN)
    assert replaced.endswith(rest[rest.index(report.END) :])


@pytest.mark.parametrize(
    "text", ["", report.BEGIN, report.END + report.BEGIN, 2 * (report.BEGIN + report.END)]
)
def test_readme_without_its_markers_is_left_alone(text: str) -> None:
    with pytest.raises(ValueError, match="expected one"):
        report.replace_section(text, "new")


def test_plot_of_a_made_up_result(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmark import plot

    for path in (tmp_path / "a.svg", tmp_path / "b.svg"):
        plot.draw(made_up_result(), path)
    picture = (tmp_path / "a.svg").read_bytes()
    assert picture.startswith(b"<?xml")
    assert picture == (tmp_path / "b.svg").read_bytes()


def test_peers_come_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text(
        "VERSIONS = {'vllm': '1.2'}\ndef peers():\n    return {*VERSIONS, 'sglang'}\n"
    )
    assert bench.peers.load(tmp_path) == {"vllm": "1.2", "sglang": ""}


def test_operators_that_do_not_exist_yet_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sum, "function", "moe_product")
    assert measure.available(OPERATORS["align"])
    assert not measure.available(OPERATORS["sum"])


def test_what_is_bound_is_what_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "device", "cpu")
    case = cases.AlignCase(4, 2, 8, 4)
    bound = Align().bind("cupy_moe", case, Align().inputs(case, "uniform", 0))
    assert isinstance(bound, Bound)
    operators.poison(bound.outputs)
    bound.call()
    assert (bound.outputs[0] != -77).all()
