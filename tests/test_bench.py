"""The benchmark without a GPU: the whole run with made-up times, its tables, its JSON, its plot, its gate."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from benchmark import __main__ as bench
from benchmark import base, discover, experts, measure, peers, report, timing
from benchmark import transformers as models
from benchmark.align import Align, AlignCase, sweep
from benchmark.align_batched import AlignBatched, BatchedCase
from benchmark.base import Bound
from benchmark.experts import Experts, LayerCase
from benchmark.gate import NUM_GROUPS, TOPK_GROUP, GateCase, Grouped, Sigmoid, Softmax, SoftplusSqrt
from benchmark.moe_sum import Sum, SumCase
from benchmark.route import Route, RouteCase
from benchmark.transformers import Model, ModelCase
from click.testing import CliRunner, Result

import cupy_moe

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "gpu": "NVIDIA Imaginary 9000", "driver": "999.1", "cuda": "13.0", "torch": "2.11.0", "cupy": "14.2.0",
    "nvrtc": "13.0.88", "cupy_moe": "0.1.0", "peers": {"vllm": "0.26.0", "sglang": ""}, "date": "2030-01-02",
}  # fmt: skip
NOT_TELLING = (
    "transformers",
    "quantize_rows",
    "quantize_silu",
    "route",
    "softplus_sqrt",
    "sort",
    "unpermute",
    "lora",
    "experts_fp8",
    "experts_int8",
    "experts_int4",
)
US = {"cupy_moe": 2.0, "vllm": 5.0, "sglang": 4.0}
MODEL_US = {"cupy_moe": 2000.0, "eager": 9000.0, "grouped_mm": 5000.0}
SMALL = LayerCase("small", 3)
SMALL_MODEL = ModelCase("small", 3, 1, "calls")


OPERATORS = {operator.section: operator for operator in bench.OPERATORS}


def made_up_result() -> dict[str, Any]:
    result: dict[str, Any] = {
        "format": bench.FORMAT, "environment": ENVIRONMENT, "seed": 1, "floor": {"one block of 32": 0.7},
    }  # fmt: skip

    def row(operator: base.Operator, case: Any, kinds: tuple[str, ...]) -> dict[str, Any]:
        scale = case.num_ids**0.5 if isinstance(case, AlignCase) else 1
        us = {name: us * scale for name, us in US.items() if name == "cupy_moe" or name in operator.theirs}
        if isinstance(case, ModelCase):
            us = MODEL_US
        if not isinstance(case, LayerCase):
            return {**case._asdict(), "us": dict.fromkeys(kinds, us)}
        floor = experts.floor_us(case._asdict())
        us = {name: us * floor for name, us in us.items()}
        if case.tokens == experts.DENSE_TOKENS:
            us["dense"] = 1.5 * floor
        errors = {name: {"rms": 0.00173, "max": 0.0042} for name in US}
        return {**case._asdict(), "us": dict.fromkeys(kinds, us), "errors": errors}

    for operator in bench.OPERATORS:
        timed = tuple(operator.timed)
        result[operator.section] = [
            row(operator, case, (*timed, "cold") if operator.is_timed_cold(case) else timed)
            for case in operator.cases
        ]
        if operator.sweep:
            result[operator.sweep.section] = [row(operator, case, timed) for case in operator.sweep.cases]
        if operator.kernels:
            us = {timed[0]: {"cupy_moe": 2.0, operator.kernels.names[0]: 2.0}}
            result[operator.kernels.section] = [{**case._asdict(), "us": us} for case in operator.cases]
        if operator.host:
            result[operator.host.section] = {
                "cupy_moe": 10.0, "cupy_moe, out=": 8.0, "vllm": 20.0, "vllm, expert_map": 40.0
            }  # fmt: skip
    return result


def run(*arguments: str) -> Result:
    return CliRunner().invoke(bench.main, arguments)


@pytest.fixture
def made_up_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in place of a GPU: every call is made once, and takes as long as we say."""

    def gpu_us(contenders: Any, replays: int) -> dict[str, float]:
        return {name: 3.0 for name, calls in contenders.items() for _ in [call() for call in calls]}

    def host_us(contenders: Any) -> dict[str, float]:
        return {name: 5.0 for name, call in contenders.items() for _ in [call()]}

    monkeypatch.setattr(base, "device", "cpu")
    monkeypatch.setattr(timing, "gpu_us", gpu_us)
    monkeypatch.setattr(timing, "host_us", host_us)
    monkeypatch.setattr(timing, "eager_us", lambda call, rounds: 700.0)
    monkeypatch.setattr(timing, "floor_us", lambda replays: {"one block of 32": 0.7})
    monkeypatch.setattr(timing, "l2_bytes", lambda: 2**20)
    monkeypatch.setattr(bench, "environment", lambda found: {**ENVIRONMENT, "peers": found})
    monkeypatch.setattr(bench.peers, "load", lambda folder: {})
    for operator in bench.OPERATORS:
        monkeypatch.setattr(operator, "cases", operator.cases[:1])
        if operator.sweep:
            monkeypatch.setattr(operator, "sweep", operator.sweep._replace(cases=operator.sweep.cases[:3]))
    monkeypatch.setitem(experts.MODELS, "small", (4, 2, 64, 32))
    monkeypatch.setattr(OPERATORS["experts"], "cases", (SMALL,))
    monkeypatch.setattr(experts, "HOST", SMALL)
    monkeypatch.setitem(experts.MODELS, "blocks", (4, 2, 128, 128))
    for weight_format in ("fp8", "int8", "int4"):
        case = SMALL._replace(model="blocks")
        monkeypatch.setattr(OPERATORS[f"experts_{weight_format}"], "cases", (case,))
    monkeypatch.setattr(OPERATORS["transformers"], "cases", (SMALL_MODEL,))
    monkeypatch.setattr(models, "LAYERS", 2)
    monkeypatch.setattr(models, "CONTEXT", 8)
    monkeypatch.setattr(
        OPERATORS["align"], "cases", (AlignCase(4, 2, 8, 16, 2.0), AlignCase(65536, 2, 8, 64, 4.0))
    )


def test_a_whole_run(made_up_times: None, tmp_path: Path) -> None:
    result = run("--out", str(tmp_path / "r.json"), "--seed", "3", "--kernels")
    assert result.exit_code == 0, result.output
    here = {operator: operator.contenders(operator.libraries()) for operator in bench.OPERATORS}
    checks = sum(len(op.cases) * len(op.checked) * len(contenders) for op, contenders in here.items())
    assert f"{checks} results checked" in result.output
    assert "NVIDIA Imaginary 9000" in result.output
    written = json.loads((tmp_path / "r.json").read_text())
    assert (written["format"], written["seed"]) == (bench.FORMAT, 3)
    sections = {section for operator, able in here.items() if able for section in operator.sections()}
    assert {"environment", "floor", "kernels", *sections} <= written.keys()
    small, large = written["align"]
    us = {"cupy_moe": 3.0}
    assert small["us"] == {"uniform": {**us, "torch": 700.0}, "skewed": us, "all_to_one": us}
    assert AlignCase(**{k: v for k, v in small.items() if k != "us"}) == OPERATORS["align"].cases[0]
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


def test_only_some_cases(made_up_times: None, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    assert (
        run("--only", "align", "--only", "gate", "--cases", ", blocks of 64", "--out", str(out)).exit_code
        == 0
    )
    written = json.loads(out.read_text())
    assert [row["tokens"] for row in written["align"]] == [65536]
    assert not {"gate", "sweep"} & written.keys()
    assert [len(OPERATORS[name].cases) for name in ("align", "gate")] == [2, 1]


EXPERTS_PEERS = """
from cupy_moe import fused_experts
loaded = {}
def of(factor):
    def adapter(p, r):
        assert p.w1_scale is None and p.act(7) == (None, None) and (p.E, p.K, p.H, p.I) == (4, 2, 64, 32)
        assert (p.w1_interleaved()[:, 1::2] == p.w1[:, p.I :]).all()
        if not factor:
            raise ImportError("no such library")
        layer = lambda: factor * fused_experts(p.hidden, p.w1, p.w2, r.topk_weights, r.topk_ids)
        return {"layer": layer, "gemm1": None}
    return adapter
ADAPTERS = {"vllm": of(1), "sglang": of(1.1), "torch": of(1), "deepgemm": of(0), "fp8_only": of(0)}
VERSIONS = {"deepgemm": "2.5"}
"""


@pytest.fixture
def experts_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "experts"
    folder.mkdir()
    (folder / "experts_peers.py").write_text(EXPERTS_PEERS)
    monkeypatch.setattr(peers, "adapters", {})
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "experts_peers", raising=False)
    return folder


def test_layers_of_others_are_checked_then_timed(
    made_up_times: None, experts_peers: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = "--only", "experts", "--only", "experts_host", "--experts-peers", str(experts_peers)
    assert "need vLLM's or SGLang's library" in run(*arguments).output
    monkeypatch.setattr(bench.peers, "load", lambda folder: {"vllm": "1.2"})
    out = tmp_path / "r.json"
    done = run(*arguments, "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "3 results checked" in done.output
    assert "left out: sglang for LayerCase" in done.output
    assert "WrongResultError: sglang: wrong output" in done.output
    assert "left out: deepgemm for LayerCase(model='small', tokens=3, target_us=None): ImportError: no" in (
        done.output
    )
    written = json.loads(out.read_text())
    names = {"vllm": "1.2", "sglang": "", "grouped_mm": "", "deepgemm": "2.5"}
    assert written["environment"]["peers"] == names
    (row,) = written["experts"]
    assert row["us"] == {"random": dict.fromkeys(("cupy_moe", "vllm", "grouped_mm"), 3.0)}
    assert row["errors"].keys() == row["us"]["random"].keys()
    assert 1e-4 < row["errors"]["cupy_moe"]["rms"] < 5e-3
    assert row["errors"]["vllm"] == row["errors"]["cupy_moe"]
    assert written["experts_host"].keys() == {"cupy_moe", "cupy_moe, workspace= and out=", "vllm"}
    assert sys.modules["experts_peers"].loaded == {"moe_C": True, "sgl_ops": False}


def test_a_peer_that_goes_wrong_later_has_no_time(made_up_times: None, experts_peers: Path) -> None:
    found = peers.load_experts(experts_peers, {"vllm": ""})
    operator, failures = OPERATORS["experts"], measure.Failures()
    (row,) = measure.time_cases(operator, [SMALL], ["cupy_moe", *found], failures, 0, 1)
    assert row["us"]["random"].keys() == {"cupy_moe", "vllm", "grouped_mm"}
    assert (
        failures.without(operator, found)
        == failures.without(operator, found, SMALL)
        == ["vllm", "grouped_mm"]
    )
    assert failures.without(operator, found, SMALL._replace(tokens=4)) == list(found)


def test_calls_of_a_graph_have_other_routings(made_up_times: None, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = Experts()
    turns = operator.turns(SMALL, operator.inputs(SMALL, "random", 0))
    assert len(turns) == timing.CALLS_PER_GRAPH
    assert len({tuple(turn.routing.topk_ids.view(-1).tolist()) for turn in turns}) > 10
    assert all(turn.weights is turns[0].weights for turn in turns)
    bound = [operator.bind("cupy_moe", SMALL, turn) for turn in turns]
    assert all(b.outputs[0] is bound[0].outputs[0] for b in bound)
    for b in bound:
        b.call()
    results, expected = bound[-1].results(), operator.expected(SMALL, turns[-1])
    assert operator.wrong("cupy_moe", SMALL, results, expected) == ""
    assert operator.wrong("cupy_moe", SMALL, results, operator.expected(SMALL, turns[0])) == "output"
    base.poison(bound[0].outputs)
    assert operator.wrong("cupy_moe", SMALL, results, expected) == "output"
    monkeypatch.setattr(experts, "DENSE_TOKENS", SMALL.tokens)
    (product,) = operator.references(SMALL, turns[0]).values()
    assert product().shape == (3 * 2, 2 * 32)  # type: ignore[attr-defined]


@pytest.fixture
def model(made_up_times: None, monkeypatch: pytest.MonkeyPatch) -> Model:
    """With graphs that are calls."""
    pytest.importorskip("transformers", minversion="5")

    def capture(calls: Any, length: int) -> Any:
        return SimpleNamespace(replay=lambda: [call() for call in calls]), length

    monkeypatch.setattr(timing, "capture", capture)
    operator: Model = OPERATORS["transformers"]  # type: ignore[assignment]
    return operator


def test_models_of_transformers(model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prompt = SMALL_MODEL._replace(batch=1, tokens=70)
    monkeypatch.setattr(model, "cases", (SMALL_MODEL, SMALL_MODEL._replace(run="graph"), prompt))
    fused, calls = models.compat.fused_experts, []

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(len(arguments[0]))
        return fused(*arguments, **options)

    monkeypatch.setattr(models.compat, "fused_experts", counted)
    implementations = models.compat._interfaces()[0]
    batched = implementations["batched_mm"]

    def short_of_memory(experts: Any, hidden: torch.Tensor, *routing: torch.Tensor) -> Any:
        if len(hidden) == prompt.tokens:
            raise torch.OutOfMemoryError("too much")
        return batched(experts, hidden, *routing)

    monkeypatch.setitem(implementations, "batched_mm", short_of_memory)
    out = tmp_path / "r.json"
    done = run("--only", "transformers", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "10 results checked" in done.output
    assert "left out: eager for ModelCase(model='small', batch=3, tokens=1, run='graph'" in done.output
    assert "OutOfMemoryError: too much" in done.output
    written = json.loads(out.read_text())
    assert list(written["environment"]["peers"]) == ["transformers"]
    assert [list(row["us"]["random"]) for row in written["transformers"]] == [
        ["cupy_moe", "eager", "grouped_mm", "batched_mm"],
        ["cupy_moe", "grouped_mm", "batched_mm"],
        ["cupy_moe", "eager", "grouped_mm"],
    ]
    assert calls.count(3) >= 4 * models.LAYERS
    assert calls.count(70) >= 2 * models.LAYERS
    (table,) = report.tables(model, written)
    assert table.rows[0] == ["3 x 1", "calls", *["4286"] * 4, "1.00 x"]


def test_models_share_their_weights_and_leave_the_cache(model: Model) -> None:
    inputs = model.inputs(SMALL_MODEL, "random", 0)
    ours, eager = (models.with_experts(inputs.model, name) for name in ("cupy_moe", "eager"))
    assert ours.config._experts_implementation == "cupy_moe"
    assert eager.config._experts_implementation == "eager"
    pairs = zip(ours.parameters(), eager.parameters(), strict=True)
    assert all(one is other for one, other in pairs)
    call = models.call_of(eager, inputs.ids, inputs.cache)
    assert torch.equal(call()[0], call()[0])
    assert inputs.cache.get_seq_length() == models.CONTEXT


def test_wrong_logits_are_noticed() -> None:
    want = torch.randn(1, 100, 32)
    noise = torch.randn(want.shape)

    def wrong(of: torch.Tensor, logits: torch.Tensor) -> str:
        return Model().wrong("cupy_moe", SMALL_MODEL, (logits,), of)

    assert wrong(want, want + 0.005 * noise) == ""
    assert wrong(want, want + 0.05 * noise) == "logits"  # of many tokens, half have to be closer
    assert wrong(want[:, :8], (want + 0.05 * noise)[:, :8]) == ""
    assert wrong(want[:, :8], want[:, 1:9]) == wrong(want, want.roll(1, 1)) == "logits"
    one = want.clone()
    one[0, 7] = float("nan")
    assert wrong(want, one) == "logits"


def test_tokens_of_models_in_a_second() -> None:
    (table,) = report.tables(OPERATORS["transformers"], made_up_result())
    assert table.title.endswith("bf16, tokens/s")
    assert table.header == ["batch x tokens", "run as", "cupy_moe", "eager", "grouped_mm", "faster"]
    assert table.rows[1] == ["8 x 1", "calls", "4000", "889", "1600", "2.50 x"]
    assert table.rows[-1] == ["1 x 4096", "calls", "2048000", "455111", "819200", "2.50 x"]


def test_without_transformers_its_section_is_left_out(
    made_up_times: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    done = run("--only", "transformers")
    assert done.exit_code == 0, done.output
    assert "left out: transformers: there is no library to run it with" in done.output


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
    "arguments",
    [
        ["--only", "lunch"],
        ["--peers", "scripts"],
        ["--experts-peers", "scripts"],
        ["--from", "/nowhere"],
        ["now"],
    ],
)
def test_wrong_usage_is_refused(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("call_us", "turns", "calls", "rounds"),
    [
        (3, 1, 20, 100),
        (300, 20, 20, 83),
        (900, 8, 24, 23),
        (6_000, 2, 4, 20),
        (50_000, 2, 2, 5),
        (9, 40, 40, 100),
    ],
)
def test_long_calls_are_timed_less_often(
    call_us: float, turns: int, calls: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(range(1000))
    made: list[int] = []

    class Graph:
        def capture_begin(self) -> None:
            made.clear()

        def capture_end(self) -> None:
            assert made == [*range(turns)] * (calls // turns)

        def replay(self) -> None:
            next(times)

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None: ...
        def elapsed_time(self, end: Event) -> float:
            return calls * call_us / 1e3

    monkeypatch.setattr(timing, "eager_us", lambda call, rounds: call_us)
    for name, fake in {
        "CUDAGraph": Graph, "Event": Event, "Stream": MagicMock, "stream": MagicMock(),
        "synchronize": MagicMock(), "_sleep": MagicMock(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    each = [functools.partial(made.append, turn) for turn in range(turns)]
    assert timing.gpu_us({"one": each}, 100) == {"one": pytest.approx(call_us)}
    assert next(times) == timing.WARMUP_ROUNDS + rounds


# ---- what is a wrong result ------------------------------------------------------------------------------


@pytest.fixture
def aligned(monkeypatch: pytest.MonkeyPatch) -> tuple[AlignCase, Any]:
    monkeypatch.setattr(base, "device", "cpu")
    case = AlignCase(50, 2, 8, 4)
    return case, Align().expected(case, Align().inputs(case, "skewed", 1))


def test_peers_may_order_as_they_like_inside_an_expert(aligned: tuple[AlignCase, Any]) -> None:
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
def test_poison_is_noticed(aligned: tuple[AlignCase, Any], output: int) -> None:
    case, expected = aligned
    outputs = tuple(t.clone() for t in expected)
    base.poison([outputs[output]])
    for contender in ("cupy_moe", "vllm", "sglang"):
        assert Align().wrong(contender, case, outputs, expected)


def test_wrong_sums_and_gates_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "device", "cpu")
    total = SumCase(3, 2, 16)
    x = Sum().inputs(total, "random", 0)
    expected = Sum().expected(total, x)
    good = x.float().sum(1).bfloat16()
    assert Sum().wrong("cupy_moe", total, (good,), expected) == ""
    assert Sum().wrong("cupy_moe", total, (good + x[:, 0] / 8,), expected)
    base.poison([good])
    assert Sum().wrong("cupy_moe", total, (good,), expected)


@pytest.mark.parametrize(
    "operator", [Softmax(), Sigmoid(), SoftplusSqrt(), Grouped()], ids=lambda operator: operator.function
)
def test_wrong_gates_are_noticed(operator: Softmax, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "device", "cpu")
    case = GateCase(5, 32, 4)
    inputs = operator.inputs(case, "random", 0)
    expected = operator.expected(case, inputs)
    bound = operator.bind("cupy_moe", case, inputs)
    base.poison(bound.outputs)
    assert operator.wrong("cupy_moe", case, bound.outputs, expected) == "topk_ids out of range"
    bound.call()
    weights, ids = bound.results()
    assert operator.wrong("cupy_moe", case, (weights, ids), expected) == ""
    assert operator.wrong("cupy_moe", case, (weights * 1.001, ids), expected) == "topk_weights"
    for wrong in ([1, 0, 2, 3], [0, 0, 2, 3]):
        assert operator.wrong("cupy_moe", case, (weights, ids[:, wrong]), expected) == "topk_ids"


@pytest.mark.parametrize(
    "operator", [Softmax(), Sigmoid(), SoftplusSqrt(), Grouped()], ids=lambda operator: operator.function
)
def test_one_wrong_row_of_many_is_noticed(operator: Softmax, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "device", "cpu")
    case = GateCase(2000, 32, 4)
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


def test_wrong_alignments_of_routes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "device", "cpu")
    case, operator = RouteCase(5, 2, 8, 4), Route()
    inputs = operator.inputs(case, "random", 0)
    expected = operator.expected(case, inputs)
    bound = operator.bind("cupy_moe", case, inputs)
    bound.call()
    results = bound.results()
    assert operator.wrong("cupy_moe", case, results, expected) == ""
    for index, name in ((2, "sorted_token_ids"), (3, "expert_ids"), (4, "num_tokens_post_pad")):
        changed = list(results)
        changed[index] = results[index] + 1
        assert operator.wrong("cupy_moe", case, tuple(changed), expected) == name
    others = results[0] * 2, *results[1:]
    assert operator.wrong("cupy_moe", case, others, expected) == "topk_weights"


def test_groups_that_are_not_chosen_are_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "device", "cpu")
    case, grouped = GateCase(5, 32, 4), Grouped()
    choice = grouped.expected(case, grouped.inputs(case, "random", 0)).choice.view(5, NUM_GROUPS, -1)
    out = choice.isinf()
    assert bool((out.all(-1) == out.any(-1)).all())
    assert out.all(-1).sum(-1).tolist() == [NUM_GROUPS - TOPK_GROUP] * 5


# ---- report ----------------------------------------------------------------------------------------------


def test_tables_say_what_was_measured() -> None:
    result = made_up_result()
    tables = [table for operator in bench.OPERATORS for table in report.tables(operator, result)]
    texts = {table.title.split(",")[0]: table for table in tables}
    align = texts["moe_align_block_size"]
    assert align.rows[0] == [
        "1 x 2", "8", "16", "2.83", "7.07", "5.66", "2.00 x", "2", "no", "1.00 x", "1.00 x"
    ]  # fmt: skip
    assert len({len(line) for line in align.text().splitlines()[2:]}) == 1
    assert len(texts["The same with a cold L2"].rows) == 4
    host = {line[0]: line[1:] for line in report.tables(OPERATORS["align"], result)[-1].rows}
    assert host["cupy_moe"] == ["10.0", "0.50 x", "0.6 x", "yes"]
    assert host["cupy_moe, out="] == ["8.00", "0.40 x", "0.25 x", "no"]
    assert host["vLLM, expert_map"] == ["40.0", "2.00 x", "", ""]


def test_only_who_was_timed_has_a_column() -> None:
    result = made_up_result()
    (table,) = report.tables(OPERATORS["batched"], result)
    assert table.header == ["experts x tokens", "block", "cupy_moe", "vLLM", "faster"]
    assert table.rows[0] == ["8 x 512", "64", "2.00", "5.00", "2.50 x"]
    for row in result["batched"]:
        del row["us"]["random"]["vllm"]
    (table,) = report.tables(OPERATORS["batched"], result)
    assert table.rows[0] == ["8 x 512", "64", "2.00", "-"]


def test_a_case_without_a_target_may_stand_among_others() -> None:
    result = made_up_result()
    result["sum"][1]["target_us"] = None
    (table,) = report.tables(OPERATORS["sum"], result)
    assert table.header[-3:-1] == ["target", "met"]
    assert [line[-3:-1] for line in table.rows[:2]] == [["1.6", "no"], ["", ""]]


def test_pages_are_what_the_figures_say() -> None:
    results = ROOT / "scripts/results"
    result = json.loads((results / "h200.json").read_text())
    plots = {p.ending: path for path, p in bench.pictures(result, results / "h200.json").items()}
    assert all(path.is_file() for path in plots.values())
    pages = bench.pages(result, plots)
    assert pages.keys() == {ROOT / "README.md", results / "README.md"}
    for path, text in pages.items():
        again = "scripts/bench --from scripts/results/h200.json --readme"
        assert path.read_text() == text, f"{path} is out of date: {again}"


def test_readme_has_the_telling_cases_and_the_page_has_all() -> None:
    result = made_up_result()
    plots = {".svg": ROOT / "scripts/results/imaginary.svg", "-roofline.svg": Path("/elsewhere.svg")}
    page, readme = (bench.pages(result, plots)[ROOT / name] for name in (report.PAGE, "README.md"))
    assert "(imaginary.svg)" in page
    assert "(scripts/results/imaginary.svg)" in readme
    for text in (page, readme):
        assert "NVIDIA Imaginary 9000, driver 999.1" in text
        assert "elsewhere.svg" not in text
    part = readme[readme.index(report.BEGIN) : readme.index(report.END)]
    for operator in bench.OPERATORS:
        assert f"\n## {operator.function}\n" in page
        told = sum(len(op.telling) for op in bench.OPERATORS if op.function == operator.function)
        assert part.count(f"\n| `{operator.function}` |") == told
        assert operator.telling or operator.section in NOT_TELLING
    assert "| `moe_sum` | 64 tokens, 8 x 7168 each, bf16 | 2.00 | 4.00 | 2.00 x |" in readme


def test_readme_section_is_replaced_and_nothing_else() -> None:
    text = (ROOT / "README.md").read_text()
    replaced = report.replace_section(text, "new")
    assert report.replace_section(replaced, "new") == replaced
    before, _, rest = text.partition(report.BEGIN)
    assert replaced == f"{before}{report.BEGIN}\nnew\n{rest[rest.index(report.END) :]}"


@pytest.mark.parametrize(
    "text", ["", report.BEGIN, report.END + report.BEGIN, 2 * (report.BEGIN + report.END)]
)
def test_readme_without_its_markers_is_left_alone(text: str) -> None:
    with pytest.raises(ValueError, match="expected one"):
        report.replace_section(text, "new")


def test_pictures_of_a_made_up_result(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = made_up_result()
    del result["experts"][0]["us"]["random"]["sglang"]  # what was left out
    del result["sweep"][0]["us"]["uniform"]["vllm"]
    written = []
    for name in "ab":
        (tmp_path / name).mkdir()
        written.append(bench.draw(result, tmp_path / name / "r.json"))
    assert written[0].keys() == {".svg", "-experts.svg", "-roofline.svg"}
    for ending, path in written[0].items():
        assert path.read_bytes().startswith(b"<?xml")
        assert path.read_bytes() == written[1][ending].read_bytes()


def test_what_was_not_measured_has_no_picture(tmp_path: Path) -> None:
    result = made_up_result()
    del result["experts"]
    assert [path.name for path in bench.pictures(result, tmp_path / "r.json")] == ["r.svg"]


def test_layers_beside_the_roofline() -> None:
    times, errors, host = report.tables(OPERATORS["experts"], made_up_result())
    assert times.header == [
        "model", "tokens", "cupy_moe", "vLLM", "SGLang", "faster", "target", "met", "roofline", "share",
        "TFLOP/s", "dense",
    ]  # fmt: skip
    assert times.rows[0][:4] == ["Qwen3-30B", "1", "33.7", "84.3"]
    assert times.rows[0][-4:] == ["17", "50%", "2", "-"]
    assert [line[-3:] for line in times.rows if line[1] == "16384"] == [["50%", "395", "351"]] * 3
    assert errors.header == ["model", "tokens", "cupy_moe", "vLLM", "SGLang"]
    assert errors.rows[0] == ["Qwen3-30B", "1", *["1.73 / 4.20"] * 3]
    assert len(errors.rows) == len(times.rows) == 18
    assert "SGLang" not in str(host)


def test_results_of_several_runs_are_merged(tmp_path: Path) -> None:
    whole = made_up_result()
    first = {**whole, "align": whole["align"][:3]}
    del first["experts"]
    row = {**whole["align"][1], "target_us": None, "us": whole["align"][0]["us"]}
    new = {"date": "2030-01-03", "peers": {"vllm": "", "sglang": "0.5", "deepgemm": ""}}
    second = {
        "format": bench.FORMAT, "environment": {**ENVIRONMENT, **new}, "seed": 2, "align": [row],
        "host": {"vllm": 21.0}, "experts": whole["experts"],
    }  # fmt: skip
    paths = [tmp_path / "1.json", tmp_path / "2.json"]
    for path, part in zip(paths, (first, second), strict=True):
        path.write_text(json.dumps(part))
    out = tmp_path / "out.json"
    done = run("--from", str(paths[0]), "--from", str(paths[1]), "--out", str(out))
    assert done.exit_code == 0, done.output
    merged = json.loads(out.read_text())
    assert merged["align"] == bench._rounded([whole["align"][0], row, whole["align"][2]])
    assert merged["host"] == {**whole["host"], "vllm": 21.0}
    assert [row["tokens"] for row in merged["experts"]] == [row["tokens"] for row in whole["experts"]]
    assert merged["sweep"] == bench._rounded(whole["sweep"])
    assert merged["environment"]["date"] == "2030-01-02 and 2030-01-03"
    assert merged["environment"]["driver"] == "999.1"
    assert merged["environment"]["peers"] == {"vllm": "0.26.0", "sglang": "0.5", "deepgemm": ""}
    second["environment"]["gpu"] = "NVIDIA Other"
    paths[1].write_text(json.dumps(second))
    assert (
        "NVIDIA Imaginary 9000 and NVIDIA Other cannot"
        in run("--from", str(paths[0]), "--from", str(paths[1])).output
    )


def test_peers_come_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text(
        "VERSIONS = {'vllm': '1.2'}\ndef peers():\n    return {*VERSIONS, 'sglang'}\n"
    )
    assert bench.peers.load(tmp_path) == {"vllm": "1.2", "sglang": ""}


def test_peers_without_such_a_function_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "_moe_C", SimpleNamespace(moe_sum=print), raising=False)
    assert Sum().contenders(["vllm"]) == ["cupy_moe", "vllm"]
    assert Align().contenders(["vllm"]) == ["cupy_moe"]
    assert AlignBatched().contenders(["sglang"]) == ["cupy_moe"]


def test_what_is_bound_is_what_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "device", "cpu")
    case = AlignCase(4, 2, 8, 4)
    bound = Align().bind("cupy_moe", case, Align().inputs(case, "uniform", 0))
    assert isinstance(bound, Bound)
    base.poison(bound.outputs)
    bound.call()
    assert (bound.outputs[0] != -77).all()


@pytest.mark.parametrize(
    ("operator", "peer"),
    [
        (op, peer)
        for op in bench.OPERATORS
        for peer in op.theirs
        if peer in US and op.function != "fused_experts"
    ],
    ids=lambda value: getattr(value, "function", value),
)
def test_peers_are_called_by_their_name(
    operator: base.Operator, peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = MagicMock()
    monkeypatch.setattr(base, "device", "cpu")
    monkeypatch.setattr(torch.ops, bench.peers.INSTALLED[peer][2], library, raising=False)
    case = operator.cases[0]
    operator.bind(peer, case, operator.inputs(case, operator.timed[0], 0)).call()
    getattr(library, operator.theirs[peer]).assert_called_once()


def test_batched_align_is_compared_to_the_last_element(monkeypatch: pytest.MonkeyPatch) -> None:
    def vllms(max_tokens: int, block_size: int, counts: torch.Tensor, *out: torch.Tensor) -> None:
        cupy_moe.batched_moe_align_block_size(max_tokens, block_size, counts, out=out)  # type: ignore[arg-type]

    monkeypatch.setattr(base, "device", "cpu")
    monkeypatch.setattr(
        torch.ops, "_moe_C", SimpleNamespace(batched_moe_align_block_size=vllms), raising=False
    )
    operator, case = AlignBatched(), BatchedCase(4, 10, 8)
    monkeypatch.setattr(operator, "cases", (case,))
    failures = measure.Failures()
    assert measure.check([operator], ["vllm", "sglang"], 0, failures) == 2 * len(operator.checked)
    inputs = operator.inputs(case, "random", 0)
    bound, expected = operator.bind("vllm", case, inputs), operator.expected(case, inputs)
    bound.call()
    bound.outputs[0][-1] = -77
    assert operator.wrong("vllm", case, bound.outputs, expected) == "sorted_token_ids"


# ---- what is measured ------------------------------------------------------------------------------------


def test_every_function_of_every_operator_module_has_a_benchmark() -> None:
    families = [path.stem for path in (ROOT / "cupy_moe/operators").glob("[!_]*.py")]
    assert families
    assert discover() == [
        op for f in sorted([*families, "experts_quantized", "transformers"]) for op in of_family(f)
    ]
    for family in families:
        module = importlib.import_module(f"cupy_moe.operators.{family}")
        public = {name for name in module.__all__ if inspect.isfunction(getattr(module, name))}
        functions = {operator.function for operator in of_family(family)}
        assert functions <= public
        # These tell sizes, or call others.
        assert public - functions <= {"aligned_sizes", "experts_workspace_bytes", "fused_moe"}


def of_family(family: str) -> tuple[base.Operator, ...]:
    operators: tuple[base.Operator, ...] = importlib.import_module(f"benchmark.{family}").OPERATORS
    return operators


def test_no_two_sections_have_one_name() -> None:
    kernels = [operator.kernels.section for operator in bench.OPERATORS if operator.kernels]
    names = [*bench.SECTIONS, *kernels, "format", "environment", "seed", "floor"]
    assert len(set(names)) == len(names)


def test_telling_cases_are_measured() -> None:
    for operator in bench.OPERATORS:
        sizes = [case._replace(target_us=None) for case in operator.cases]
        assert set(operator.telling) <= set(sizes)


def test_the_sweep_goes_up_in_powers_of_two() -> None:
    assert [case.num_ids for case in sweep((8, 64), 16)] == [1, 2, 4, 8, 16] * 2
