"""`cupy-moe demo`: what it prints, and that it would notice a wrong result."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from cupy_moe.tools import cli, demo

SMALL = ["--device", "cpu", "--tokens", "64", "--experts", "8", "--block-size", "16"]


def run(*arguments: str, **options: Any) -> Result:
    runner = CliRunner(charset=options.pop("charset", "utf-8"))
    return runner.invoke(cli.main, ["demo", *arguments], **options)


def test_the_main_job_on_the_cpu() -> None:
    result = run("--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "4096 tokens, top-2 of 64 experts, blocks of 128" in result.output
    assert "4736 slots: 8192 pairs fill 101 blocks, 57.8% more rows" in result.output
    assert "path     plain PyTorch on the CPU" in result.output
    assert re.search(r"^time     [\d.]+ us on the CPU", result.output, re.MULTILINE)
    assert re.search(r"^checked ", result.output, re.MULTILINE)
    assert max(map(len, result.output.splitlines())) <= 80


def test_worked_example_is_that_of_the_documentation() -> None:
    lines = run(*SMALL).output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("block"))
    rows = [[int(n) for n in line.split()] for line in lines[start + 1 : start + 5]]
    assert rows == [[0, 1, 3, 6, 9, 12], [1, 2, 0, 4, 10, 12], [2, 3, 1, 7, 11, 12], [3, 4, 2, 5, 8, 12]]
    assert lines[start + 5].split() == ["...", "-1", "12", "..."]
    assert any(line.startswith("num_tokens_post_pad  16;") for line in lines)


def test_colours_only_where_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[" in run(*SMALL, color=True).output
    assert "\x1b[" not in run(*SMALL).output
    assert "\x1b[" not in run(*SMALL, color=True, env={"NO_COLOR": "1"}).output
    assert "\x1b[" not in run(*SMALL, color=True, env={"TERM": "dumb"}).output


def test_ascii_output_where_nothing_else_can_be_written() -> None:
    result = run(*SMALL, charset="ascii")
    assert result.exit_code == 0, result.output
    assert result.output.isascii()
    assert "####" in result.output


@pytest.mark.parametrize(
    "arguments", [["--topk", "9", "--experts", "8"], ["--device", "tpu"], ["--tokens", "0"]]
)
def test_wrong_usage_is_refused(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("--device", "cuda")
    assert result.exit_code == 2
    assert "no CUDA GPU" in result.output


def test_a_wrong_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = demo.moe_align_block_size

    def wrong(*args: Any, **kwargs: Any) -> Any:
        aligned = right(*args, **kwargs)
        aligned.sorted_token_ids[:2] = aligned.sorted_token_ids[:2].flip(
            0
        )  # as good as right, but not stable
        return aligned

    monkeypatch.setattr(demo, "moe_align_block_size", wrong)
    result = run(*SMALL)
    assert result.exit_code == 1
    assert "differs" in result.output


@pytest.mark.parametrize("experts", [1, 3, 8, 64, 65, 300, 4096])
def test_chart_fits_and_shows_every_expert_that_has_work(experts: int) -> None:
    load = [0 if i % 7 == 3 else i % 500 + 1 for i in range(experts)]
    caption, empty, *rows, axis = demo.chart(load, 16)
    assert empty == ""
    assert axis.startswith("expert 0")
    assert len(rows) <= demo.CHART_HEIGHT
    plain = [re.sub(r"\x1b\[[\d;]*m", "", row) for row in (caption, *rows, axis)]
    assert max(map(len, plain)) <= 80
    if experts <= demo.CHART_WIDTH:
        width = demo.CHART_WIDTH // experts
        bottom = plain[-2][7:].ljust(experts * width)
        assert [bottom[i * width] != " " for i in range(experts)] == [n > 0 for n in load]


@pytest.mark.gpu
def test_the_main_job_on_the_gpu() -> None:
    result = run("--device", "cuda")
    assert result.exit_code == 0, result.output
    assert re.search(r"^time     [\d.]+ us on the GPU", result.output, re.MULTILINE)
    assert re.search(r"^path     align_\w+, \d+ blocks? of \d+ threads$", result.output, re.MULTILINE)
    assert "the CPU's result" in result.output
    assert max(map(len, result.output.splitlines())) <= 80
