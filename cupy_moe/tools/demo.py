"""`cupy-moe demo`: the worked example, then a realistic routing, shown, timed and checked."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable

import click
import torch

from .. import __version__, aligned_sizes, moe_align_block_size
from ..cuda.limits import device_limits
from ..operators.align import MoEAlignment
from ..plans.align import plan_align
from ..plans.base import ceil_div

CHART_WIDTH, CHART_HEIGHT = 64, 12  # with its axis inside 80 columns
EIGHTHS = " ▁▂▃▄▅▆▇█"


def run(tokens: int, topk: int, experts: int, block_size: int, seed: int, device: str) -> None:
    """What the command does; it is declared in cli.py, as its help is to be had without torch."""
    if topk > experts:
        raise click.BadParameter(f"a token cannot go to {topk} of {experts} experts", param_hint="--topk")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("torch sees no CUDA GPU here", param_hint="--device")

    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    click.echo(f"cupy_moe {__version__} on {click.style(where, bold=True)}, torch {torch.__version__}")
    show_example(device)

    topk_ids = skewed_routing(tokens, topk, experts, seed).to(device)
    title(f"{tokens} tokens, top-{topk} of {experts} experts, blocks of {block_size}, skewed as 1/rank")
    aligned = moe_align_block_size(topk_ids, block_size, experts)
    show_load(topk_ids.cpu(), block_size, experts)
    show_padding(topk_ids, aligned, block_size, experts)
    show_path(topk_ids, block_size, experts)
    show_time(topk_ids, block_size, experts)
    check(topk_ids, aligned, block_size, experts)


def show_example(device: str) -> None:
    ids, block_size, experts = [[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], 4, 5
    topk_ids = torch.tensor(ids, dtype=torch.int32, device=device)
    sorted_ids, expert_ids, post_pad = (
        t.tolist() for t in moe_align_block_size(topk_ids, block_size, experts)
    )
    used = post_pad[0] // block_size

    title("4 tokens, top-3 of 5 experts, blocks of 4")
    click.echo(f"topk_ids  {'  '.join(str(row) for row in ids)}")
    click.echo(f"position  {'  '.join(f'{i:2}{i + 1:3}{i + 2:3} ' for i in range(0, 12, 3)).rstrip()}\n")
    click.echo("block  expert_ids  sorted_token_ids")
    for block in range(used):
        slots = sorted_ids[block * block_size : (block + 1) * block_size]
        cells = " ".join(click.style(f"{i:3}", dim=i == topk_ids.numel()) for i in slots)
        click.echo(f"{block:5}  {expert_ids[block]:10}  {cells}")
    click.echo(f"  ...  {expert_ids[used]:10}  {click.style(f'{topk_ids.numel():3} ...', dim=True)}")
    click.echo(f"\nnum_tokens_post_pad  {post_pad[0]}; the number of ids, {topk_ids.numel()}, marks padding")


def skewed_routing(tokens: int, topk: int, experts: int, seed: int) -> torch.Tensor:
    """Distinct experts for each token, int32 [tokens, topk]: the expert of rank r has weight 1/r."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / (1 + torch.randperm(experts, generator=generator))
    return torch.multinomial(weights.expand(tokens, -1), topk, generator=generator).int()


def show_load(topk_ids: torch.Tensor, block_size: int, experts: int) -> None:
    load = torch.bincount(topk_ids.flatten(), minlength=experts)
    for line in chart(load.tolist(), block_size):
        click.echo(line)
    click.echo(
        f"\nload     {load.max()} at most, {load.float().mean():.0f} on average, {load.min()} at least"
    )


def chart(load: list[int], block_size: int) -> list[str]:
    """A bar for each expert, or for the mean of several; its rows are whole blocks, so that padding shows."""
    group = ceil_div(len(load), CHART_WIDTH)
    bars = [statistics.mean(load[i : i + group]) for i in range(0, len(load), group)]
    width = CHART_WIDTH // len(bars)
    blocks = ceil_div(ceil_div(math.ceil(max(bars)), block_size), CHART_HEIGHT)
    row_size = blocks * block_size
    steps = EIGHTHS if encodable(EIGHTHS) else " ...:::##"

    caption = f"load of the experts: a row is {counted(blocks, 'block')}"
    if group > 1:
        caption += f", a bar the mean of {group} experts"
    elif blocks == 1:
        caption += ", the rest of a bar's top row is padding"
    lines = [caption, ""]
    for row in reversed(range(ceil_div(math.ceil(max(bars)), row_size))):
        line = f"{(row + 1) * row_size:6} " if row % 4 == 3 or row == 0 else " " * 7
        for height in bars:
            eighths = math.ceil((height / row_size - row) * 8)
            if eighths <= 0:
                line += " " * width
            elif eighths >= 8:
                line += click.style(steps[8] * width, fg="cyan")
            else:
                line += click.style(steps[eighths] * width, fg="cyan", bg="bright_black")
        lines.append(line.rstrip())
    marks = "".join(f"{i * group:<{8 * width}}" for i in range(0, len(bars), 8))
    return [*lines, f"expert {marks.rstrip()}"]


def show_padding(
    topk_ids: torch.Tensor, aligned: MoEAlignment[torch.Tensor], block_size: int, experts: int
) -> None:
    post_pad, pairs = int(aligned.num_tokens_post_pad), topk_ids.numel()
    allocated = aligned_sizes(pairs, experts, block_size)[0]
    click.echo(
        f"padding  {post_pad - pairs} slots: {pairs} pairs fill {post_pad // block_size} blocks, "
        f"{post_pad / pairs - 1:.1%} more rows to multiply\n"
        f"memory   {allocated} slots, enough for any routing of this size"
    )


def show_path(topk_ids: torch.Tensor, block_size: int, experts: int) -> None:
    """What runs; on a GPU, what plans/align.py answers, as it answers the operator."""
    if not topk_ids.is_cuda:
        click.echo("path     plain PyTorch on the CPU, cupy_moe/cpu/align.py")
        return
    slots, _ = aligned_sizes(topk_ids.numel(), experts, block_size)
    limits = device_limits(topk_ids.device.index)
    label = "path"
    for launch in plan_align(topk_ids.numel(), experts, slots, block_size, "i32", limits).launches:
        click.echo(f"{label:8} {launch.entry}, {counted(launch.grid, 'block')} of {launch.block} threads")
        label = "then"


def show_time(topk_ids: torch.Tensor, block_size: int, experts: int) -> None:
    out = moe_align_block_size(topk_ids, block_size, experts)

    def call() -> None:
        moe_align_block_size(topk_ids, block_size, experts, out=out)

    if topk_ids.is_cuda:
        click.echo(
            f"time     {graph_us(call):.1f} us on the GPU, {eager_us(call):.1f} us on the host for a call"
        )
    else:
        click.echo(f"time     {eager_us(call):.0f} us on the CPU")


def eager_us(call: Callable[[], None], calls: int = 50) -> float:
    """Median host time of a call, after a warm-up."""
    times = []
    for _ in range(3 + calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:]) * 1e6


def graph_us(call: Callable[[], None], calls: int = 20, replays: int = 50) -> float:
    """Median GPU time of a call, measured over replays of a CUDA graph: free of the host's launch time."""
    call()  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(3 + replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:]) * 1e3 / calls


def check(topk_ids: torch.Tensor, aligned: MoEAlignment[torch.Tensor], block_size: int, experts: int) -> None:
    """The result against its definition, and a GPU's result against the CPU's, to the last element."""
    wanted = by_definition(topk_ids.cpu(), block_size, experts)
    exact = all(torch.equal(got.cpu(), want) for got, want in zip(aligned, wanted, strict=True))
    text = "every element equals the definition, a plain loop"
    if topk_ids.is_cuda:
        on_cpu = moe_align_block_size(topk_ids.cpu(), block_size, experts)
        exact = exact and all(torch.equal(a.cpu(), b) for a, b in zip(aligned, on_cpu, strict=True))
        text += " and the CPU's result"
    if not exact:
        raise click.ClickException("the result differs from its definition")
    click.echo(f"{click.style('checked', fg='green')}  {text}")


def by_definition(topk_ids: torch.Tensor, block_size: int, experts: int) -> MoEAlignment[torch.Tensor]:
    """What `moe_align_block_size` has to return, said in the plainest way."""
    pairs = topk_ids.numel()
    slots, blocks = aligned_sizes(pairs, experts, block_size)
    places: list[list[int]] = [[] for _ in range(experts)]
    for i, expert in enumerate(topk_ids.flatten().tolist()):
        places[expert].append(i)
    sorted_ids: list[int] = []
    expert_ids: list[int] = []
    for expert, mine in enumerate(places):
        used = ceil_div(len(mine), block_size)
        sorted_ids += mine + [pairs] * (used * block_size - len(mine))
        expert_ids += [expert] * used
    post_pad = len(sorted_ids)
    sorted_ids += [pairs] * (slots - post_pad)
    expert_ids += [-1] * (blocks - len(expert_ids))
    return MoEAlignment(*(torch.tensor(v, dtype=torch.int32) for v in (sorted_ids, expert_ids, [post_pad])))


def title(text: str) -> None:
    click.echo(f"\n{click.style(text, bold=True, underline=True)}")


def encodable(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"
