"""moe_align_block_size on a GPU: every kernel, element for element what the CPU specification says.

Each case poisons its outputs, checks the words before and after them, and says in its error which case it is.
Grids are loops: a few tests, thousands of cases. Sources of the grids: the tests of vLLM and SGLang.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import routing
import torch
from align_cases import ID_TYPES, kernel_of, layouts

import cupy_moe.operators.align
from cupy_moe import MoEAlignment, aligned_sizes, batched_moe_align_block_size, moe_align_block_size
from cupy_moe.cpu import align as cpu_align
from cupy_moe.cpu import align_batched as cpu_align_batched
from cupy_moe.cuda.launch import Launch
from cupy_moe.cuda.limits import device_limits
from cupy_moe.plans import align as align_plans
from cupy_moe.plans import base
from cupy_moe.plans.align import ALIGN_KERNELS

pytestmark = pytest.mark.gpu

POISON, GUARD = 0x5A5A5A5A, 0x3C3C3C3C
GUARD_WORDS = 64


class Outputs:
    """Poisoned outputs with guard words before and after each."""

    def __init__(self, lengths: tuple[int, ...], offset: int = 0) -> None:
        self.offset = GUARD_WORDS + offset
        self.buffers = [
            torch.full((GUARD_WORDS + length + GUARD_WORDS + 4,), GUARD, dtype=torch.int32, device="cuda")
            for length in lengths
        ]
        out = [b[self.offset :][:length] for b, length in zip(self.buffers, lengths, strict=True)]
        self.out = MoEAlignment(*out)
        self.poison()

    def poison(self) -> None:
        for tensor in self.out:
            tensor.fill_(POISON)

    def check(self, expected: tuple[torch.Tensor, ...], case: str) -> None:
        for name, tensor, wanted in zip(MoEAlignment._fields, self.out, expected, strict=True):
            if not torch.equal(tensor, wanted):
                wrong = (tensor != wanted).nonzero().flatten()
                few = wrong[:8]
                pytest.fail(
                    f"{case}: {name} differs at {len(wrong)} of {len(wanted)} places, at {few.tolist()} it is"
                    f" {tensor[few].tolist()} instead of {wanted[few].tolist()}",
                    pytrace=False,
                )
            buffer = self.buffers[MoEAlignment._fields.index(name)]
            around = torch.cat([buffer[: self.offset], buffer[self.offset + len(tensor) :]])
            assert bool((around == GUARD).all()), f"{case}: written outside {name}"


def check(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad: bool = False,
    ignore: bool = False,
    *,
    every_kernel: bool = False,
    kernels: tuple[str | None, ...] = (None,),
    runs: int = 1,
    offset: int = 0,
    note: str = "",
) -> None:
    expected = cpu_align.moe_align_block_size(topk_ids, block_size, num_experts, expert_map, pad, ignore)
    outputs = Outputs((*aligned_sizes(topk_ids.numel(), num_experts, block_size, pad), 1), offset)
    if every_kernel:
        kernels = None, *possible(topk_ids, num_experts, block_size)
    for kernel in kernels:
        for run in range(runs):
            case = (
                f"{list(topk_ids.shape)=} {topk_ids.dtype} strides={list(topk_ids.stride())} {num_experts=}"
                f" {block_size=} {pad=} {ignore=} map={expert_map is not None} {kernel=} {run=} {note}"
            )
            outputs.poison()
            moe_align_block_size(
                topk_ids, block_size, num_experts, expert_map, pad, ignore, out=outputs.out, kernel=kernel
            )
            outputs.check(expected, case)


def possible(topk_ids: torch.Tensor, num_experts: int, block_size: int = 16) -> tuple[str, ...]:
    """The kernels that can do it here, as plan.py says, whose reasons test_plan.py looks at."""

    def is_possible(kernel: str) -> bool:
        try:
            moe_align_block_size(topk_ids, block_size, num_experts, kernel=kernel)
        except ValueError:
            return False
        return True

    return tuple(kernel for kernel in ALIGN_KERNELS if is_possible(kernel))


@functools.lru_cache(maxsize=256)
def make(name: str, tokens: int, topk: int, num_experts: int) -> torch.Tensor:
    return routing.make(name, tokens, topk, num_experts, device="cuda")


def drawn(shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape) + high)
    return torch.randint(low, high, shape, device="cuda", generator=generator).to(dtype)


def half_local(num_experts: int, garbage: bool = False) -> torch.Tensor:
    """Every other expert on this rank, in another order; `garbage` adds entries out of range."""
    local = torch.full((num_experts,), -1, dtype=torch.int32, device="cuda")
    local[::2] = (
        torch.randperm((num_experts + 1) // 2, generator=torch.Generator().manual_seed(0)).int().cuda()
    )
    if garbage:
        wild = torch.tensor([-(2**31), -2, num_experts, 2**31 - 1, num_experts + 31], dtype=torch.int32)
        local[1::3] = wild.repeat(num_experts)[: len(local[1::3])].cuda()
    return local


def equal(results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Grows by the name of each kernel that is launched."""
    names: list[str] = []
    bind = cupy_moe.operators.align.bind

    def bind_recorded(planned: base.LaunchPlan, *arguments: Any) -> Launch:
        launch = bind(planned, *arguments)

        def record(*values: int) -> None:
            names.append(planned.entry)
            launch(*values)

        return record

    cupy_moe.operators.align._prepare.cache_clear()
    monkeypatch.setattr(cupy_moe.operators.align, "bind", bind_recorded)
    yield names
    cupy_moe.operators.align._prepare.cache_clear()


# ---- grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3, 256, 2256, 4096])
def test_grid_of_vllm(tokens: int) -> None:
    names = itertools.cycle(("uniform", "skewed", "with_invalid", "empty_experts", "all_to_one"))
    for num_experts, topk in itertools.product((32, 160, 256, 257), (1, 2, 16, 32)):
        ids = make(next(names), tokens, topk, num_experts)
        for block_size, pad in itertools.product((32, 128), (False, True)):
            check(ids, block_size, num_experts, pad=pad)


@pytest.mark.parametrize("name", routing.NAMES)
def test_routings(name: str) -> None:
    for tokens, topk, num_experts in (
        (16, 8, 256), (128, 2, 64), (512, 8, 128), (1024, 8, 256), (4096, 2, 64), (8192, 8, 256)
    ):  # fmt: skip
        check(make(name, tokens, topk, num_experts), 128, num_experts, every_kernel=True, note=name)


def test_invalid_ids() -> None:
    for tokens, topk, num_experts, block_size in (
        (8, 4, 8, 4),
        (300, 4, 8, 16),
        (8, 4, 80, 8),
        (3000, 8, 64, 16),
    ):
        for dtype, mapped, ignore in itertools.product(
            (torch.int32, torch.int64), (False, True), (False, True)
        ):
            limits = torch.iinfo(dtype)
            wrong = torch.tensor(
                [-1, -2, num_experts, num_experts + 7, limits.min, limits.max, 2**31 - 1, -(2**31)],
                device="cuda",
            )
            ids = drawn((tokens, topk), 0, num_experts, torch.int64)
            spoiled = wrong[drawn((tokens, topk), 0, len(wrong), torch.int64)]
            some = torch.where(drawn((tokens, topk), 0, 3) == 0, spoiled, ids).to(dtype)
            expert_map = half_local(num_experts) if mapped else None
            for topk_ids in (some, spoiled.to(dtype)):
                check(topk_ids, block_size, num_experts, expert_map, ignore=ignore, every_kernel=True)


def test_ids_beyond_32_bits() -> None:
    """Ids whose low 32 bits would be an expert."""
    ids = drawn((500, 4), 0, 8, torch.int64) + (drawn((500, 4), -2, 3, torch.int64) << 32)
    for view in layouts(ids).values():
        check(view, 16, 8, every_kernel=True)
    check(ids[:8], 16, 8, kernels=("small",))


def test_expert_maps() -> None:
    for tokens, topk, num_experts in itertools.product((16, 32, 2048, 8192), (2, 4), (8, 64, 257)):
        ids = make("with_invalid", tokens, topk, num_experts)
        none = torch.full((num_experts,), -1, dtype=torch.int32, device="cuda")
        every = torch.arange(num_experts, dtype=torch.int32, device="cuda")
        maps = {
            "half": half_local(num_experts), "garbage": half_local(num_experts, garbage=True), "none": none,
            "identity": every, "reversed": every.flip(0), "all the same": every * 0 + 1,
        }  # fmt: skip
        for (note, expert_map), ignore in itertools.product(maps.items(), (False, True)):
            check(ids, 64, num_experts, expert_map, ignore=ignore, every_kernel=True, note=note)


def test_tiny_grid_of_sglang() -> None:
    for num_experts, topk, tokens in itertools.product(
        (8, 64, 65, 1023, 1024, 4096, 9000), (1, 2, 4, 8), (1, 4, 8)
    ):
        for block_size in (4, 16, 64, 128):
            check(drawn((tokens, topk), 0, num_experts), block_size, num_experts)
    for num_experts in (8, 257, 1023):
        for topk, tokens in itertools.product((1, 2, 8), (16, 128, 1024, 4096)):
            check(drawn((tokens, topk), 0, num_experts), 64, num_experts)


def test_many_experts() -> None:
    for num_experts, tokens in itertools.product(
        (1025, 2048, 4095, 8191, 9000, 20_000, 65_535, 65_536), (1, 8, 32, 256, 3000)
    ):
        ids = drawn((tokens, 8), -1, num_experts + 2)
        check(ids, 64, num_experts, every_kernel=True)
        if tokens in (8, 256):
            for ignore in (False, True):
                expert_map = half_local(num_experts, garbage=True)
                check(ids, 16, num_experts, expert_map, ignore=ignore, every_kernel=True)


def test_any_block_size() -> None:
    for block_size in (1, 2, 3, 7, 48, 100, 127, 129, 1000, 4099, 32_768, 65_535, 65_536):
        for num_ids, num_experts in ((1, 1), (60, 8), (1000, 64), (20_000, 33)):
            ids = drawn((num_ids,), -1, num_experts)
            for pad in (False, True):
                check(ids, block_size, num_experts, pad=pad, every_kernel=True)
    for num_ids in (1, 3000):
        check(drawn((num_ids,), 0, 2), 65_536, 2, every_kernel=True)
    check(drawn((300,), 0, 65_536), 65_536, 65_536, kernels=(None, "global_large"))


def test_slots_close_to_the_limit_of_int32() -> None:
    num_experts, block_size = 32_760, 65_536
    ids = torch.arange(num_experts, dtype=torch.int32, device="cuda")  # each expert once: every block in use
    aligned = moe_align_block_size(ids, block_size, num_experts)
    assert aligned.sorted_token_ids.numel() == num_experts * block_size > 2**31 - 2**20
    assert aligned.num_tokens_post_pad.item() == num_experts * block_size
    assert torch.equal(aligned.expert_ids, ids)
    blocks = aligned.sorted_token_ids.view(num_experts, block_size)
    assert torch.equal(blocks[:, 0], ids)
    assert all(bool((part == num_experts).all()) for part in blocks[:, 1:].split(4096))


def test_a_million_ids() -> None:
    for name, num_experts in (("uniform", 8), ("skewed", 256), ("all_to_one", 64), ("with_invalid", 512)):
        ids = make(name, 131_072, 8, num_experts)
        check(ids, 128, num_experts, every_kernel=True, note=name)
    check(drawn((1_000_003,), 0, 65_536, torch.int64), 16, 65_536)


def test_no_ids() -> None:
    for shape, num_experts in itertools.product(((0,), (0, 8), (5, 0)), (1, 64, 65_536)):
        ids = torch.empty(shape, dtype=torch.int32, device="cuda")
        for kernel in (None, *possible(ids, num_experts)):
            aligned = moe_align_block_size(ids, 16, num_experts, kernel=kernel)
            assert [result.tolist() for result in aligned] == [[], [], [0]], (
                f"{shape=} {num_experts=} {kernel=}"
            )


# ---- kernels -------------------------------------------------------------------------------------


def test_every_kernel_at_every_threshold() -> None:
    limits = (
        align_plans.SMALL_FAST_IDS,
        align_plans.SMALL_MAX_IDS,
        align_plans.SHARED_FAST_IDS,
        align_plans.CLUSTER8_FAST_IDS,
    )
    sizes = {0, 1, 2, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 100_003}
    sizes |= {limit + step for limit in limits for step in (-1, 0, 1)}
    for num_ids, num_experts in itertools.product(sorted(sizes), (1, 8, 257, 1500)):
        ids = drawn((num_ids,), -1, num_experts + 1)
        check(ids, 16, num_experts, every_kernel=True, runs=2)


def clusters(size: int) -> bool:
    """Whether the driver runs clusters of so many blocks here."""
    limits = device_limits(torch.cuda.current_device())
    return limits.max_clusters("align_shared", f"align_shared_cluster{size}_i32", size) > 0


def test_the_kernel_that_is_planned_is_the_one_that_runs(launched: list[str]) -> None:
    limits = device_limits(torch.cuda.current_device())
    of_8, of_16 = clusters(8), clusters(16)
    seen = set()
    for bound, below, above in (
        (align_plans.SMALL_FAST_IDS, "small", "shared"),
        (align_plans.SHARED_FAST_IDS, "shared", "cluster8" if of_8 else "shared"),
        (align_plans.CLUSTER8_FAST_IDS, "cluster8" if of_8 else "shared", "cluster16" if of_16 else "global"),
    ):
        for num_ids, expected in ((bound - 1, below), (bound, below), (bound + 1, above)):
            launched.clear()
            moe_align_block_size(drawn((num_ids,), 0, 64), 16, 64)
            assert kernel_of(launched) == expected, f"{num_ids=}"
            seen.add(expected)
            num_slots, _ = aligned_sizes(num_ids, 64, 16)
            planned = align_plans.plan_align(num_ids, 64, num_slots, 16, "i32", limits)
            assert launched == [launch.entry for launch in planned.launches]
    launched.clear()
    moe_align_block_size(drawn((1000,), 0, 65_536), 16, 65_536)
    assert kernel_of(launched) == "global_large"
    assert len(seen) == 3 + of_8


def test_a_forced_kernel_is_the_one_that_runs(launched: list[str]) -> None:
    ids = drawn((100,), 0, 64)
    for kernel in possible(ids, 64):
        launched.clear()
        moe_align_block_size(ids, 16, 64, kernel=kernel)
        assert kernel_of(launched) == kernel
    assert len(possible(ids, 64)) == 4 + clusters(8) + clusters(16)


def test_one_reader_for_each_kind_of_ids(launched: list[str]) -> None:
    ids = drawn((100, 4), 0, 64)
    i32 = {"int32": ids, "uint32": ids.to(torch.uint32)}
    others = {"int16": ids.short(), "transposed": ids.t(), "every second row": ids[::2]}
    cases = [(i32, "i32"), ({"int64": ids.long()}, "i64"), (others, "any")]
    for name, topk_ids, reader in [
        (name, ids, reader) for kind, reader in cases for name, ids in kind.items()
    ]:
        launched.clear()
        moe_align_block_size(topk_ids, 16, 64)
        assert launched[0].endswith(f"_{reader}"), name


def test_every_type_and_layout() -> None:
    # With 300 experts 255 is one and -1 is not, with 65,536 so are 65,535 and -1.
    for dtype, (tokens, topk), num_experts in itertools.product(
        ID_TYPES, ((1, 1), (12, 3), (600, 4), (4100, 5)), (100, 300, 65_536)
    ):
        limits = torch.iinfo(dtype)
        low, high = max(limits.min, -3), min(limits.max, num_experts + 2)
        ids = drawn((tokens, topk), low, high + 1, torch.int64)
        ids[0, 0], ids[-1, -1] = limits.min, limits.max if limits.max < 2**63 else -1
        ids = ids.to(dtype)
        for note, view in layouts(ids).items():
            check(view, 16, num_experts, every_kernel=True, note=note)
    expanded = drawn((700, 1), 0, 9).expand(700, 6)
    check(expanded, 16, 9, every_kernel=True, note="expanded")


def test_outputs_and_ids_at_any_address() -> None:
    for dtype, start, offset in itertools.product((torch.int32, torch.int64), (0, 1, 2, 3), (0, 1, 2, 3)):
        for num_ids in (50, 3000, 20_000):
            ids = drawn((num_ids + start,), 0, 64, dtype)[start:]
            check(ids, 13, 64, every_kernel=True, offset=offset, note=f"{start=} {offset=}")


def test_five_runs_give_the_same_bits() -> None:
    for tokens, topk, block_size, num_experts in ((128, 2, 32, 64), (4097, 16, 128, 256), (2048, 8, 128, 64)):
        ids = make("with_invalid", tokens, topk, num_experts)
        kernels = possible(ids, num_experts, block_size)
        check(ids, block_size, num_experts, every_kernel=True, runs=5)
        first = moe_align_block_size(ids, block_size, num_experts)
        for kernel in (*kernels, *kernels):
            for a, b in zip(
                first, moe_align_block_size(ids, block_size, num_experts, kernel=kernel), strict=True
            ):
                assert torch.equal(a, b), kernel


def test_random_calls() -> None:
    chance = random.Random(0)
    for _ in range(400):
        num_experts = int(2 ** chance.uniform(0, 12))
        num_ids = int(2 ** chance.uniform(0, 15))
        block_size = int(2 ** chance.uniform(0, 9))
        ids = drawn((num_ids,), -1, num_experts + 1, chance.choice((torch.int32, torch.int64, torch.int16)))
        expert_map = chance.choice((None, half_local(num_experts, garbage=True)))
        kernel = chance.choice((None, *possible(ids, num_experts, block_size)))
        pad, ignore = chance.random() < 0.5, chance.random() < 0.5
        check(
            ids,
            block_size,
            num_experts,
            expert_map,
            pad,
            ignore,
            kernels=(kernel,),
            offset=chance.randrange(4),
        )


def test_sanitize_every_kernel() -> None:
    """Small enough for compute-sanitizer, which scripts/sanitize runs this under."""
    for num_ids, num_experts in ((0, 5), (1, 5), (100, 7), (1500, 300), (9000, 20), (300, 20_000)):
        for dtype, mapped, ignore in (
            (torch.int32, False, False), (torch.int64, True, False), (torch.int16, True, True)
        ):  # fmt: skip
            expert_map = half_local(num_experts, garbage=True) if mapped else None
            ids = drawn((num_ids,), -1, num_experts + 1, dtype)
            for kernel in possible(ids, num_experts, 7):
                moe_align_block_size(ids, 7, num_experts, expert_map, False, ignore, kernel=kernel)
    torch.cuda.synchronize()


# ---- streams, graphs, threads --------------------------------------------------------------------


def graph_cases() -> Iterator[tuple[str | None, int, int, list[torch.Tensor]]]:
    for num_ids, num_experts in ((64, 64), (4096, 64), (10_000, 128), (60_000, 128)):
        batches = [drawn((num_ids,), -1, num_experts + low) for low in range(3)]
        for kernel in (None, *possible(batches[0], num_experts)):
            yield kernel, num_ids, num_experts, batches


def test_graph_replayed_with_other_ids() -> None:
    for kernel, num_ids, num_experts, batches in graph_cases():
        ids = batches[0].clone()
        outputs = Outputs((*aligned_sizes(num_ids, num_experts, 16), 1))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            moe_align_block_size(ids, 16, num_experts, out=outputs.out, kernel=kernel)
            allocated = moe_align_block_size(ids, 16, num_experts, kernel=kernel)
        for index, batch in enumerate(batches):
            ids.copy_(batch)
            outputs.poison()
            graph.replay()
            expected = cpu_align.moe_align_block_size(batch, 16, num_experts)
            outputs.check(expected, f"{kernel=} {num_ids=} batch {index}")
            assert equal(allocated, expected), f"{kernel=}"


def test_two_graphs_replayed_at_once() -> None:
    num_experts, streams = 64, [torch.cuda.Stream(), torch.cuda.Stream()]
    for num_ids in (100, 4096, 40_000):
        batches = [drawn((num_ids,), -1, num_experts + low) for low in (0, 1)]
        for kernel in (None, *possible(batches[0], num_experts)):
            graphs, results = [], []
            for batch in batches:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    results.append(moe_align_block_size(batch, 16, num_experts, kernel=kernel))
                graphs.append(graph)
            torch.cuda.synchronize()
            for _ in range(20):
                for stream, graph in zip(streams, graphs, strict=True):
                    with torch.cuda.stream(stream):
                        graph.replay()
            torch.cuda.synchronize()
            for batch, result in zip(batches, results, strict=True):
                expected = cpu_align.moe_align_block_size(batch, 16, num_experts)
                assert equal(result, expected), f"{kernel=}"


def test_two_streams_at_once() -> None:
    num_experts, streams = 64, [torch.cuda.Stream(), torch.cuda.Stream()]
    for num_ids in (100, 4096, 40_000):
        batches = [drawn((num_ids,), -1, num_experts + low) for low in (0, 1)]
        for kernel in (None, *possible(batches[0], num_experts)):
            outs = [Outputs((*aligned_sizes(num_ids, num_experts, 16), 1)) for _ in batches]
            torch.cuda.synchronize()
            for _ in range(20):
                for stream, batch, outputs in zip(streams, batches, outs, strict=True):
                    with torch.cuda.stream(stream):
                        moe_align_block_size(batch, 16, num_experts, out=outputs.out, kernel=kernel)
            torch.cuda.synchronize()
            for batch, outputs in zip(batches, outs, strict=True):
                expected = cpu_align.moe_align_block_size(batch, 16, num_experts)
                outputs.check(expected, f"{kernel=} {num_ids=}")


def test_it_runs_on_the_current_stream() -> None:
    """The ids arrive late, on a stream of their own: any other stream would read the ones before."""
    late, before = drawn((4096,), 0, 64), drawn((4096,), 0, 7)
    expected = cpu_align.moe_align_block_size(late, 16, 64)
    for kernel in (None, *possible(late, 64)):
        ids, stream = before.clone(), torch.cuda.Stream()
        moe_align_block_size(ids, 16, 64, kernel=kernel)  # loaded before the race starts
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # some 10 ms
            ids.copy_(late)
            result = moe_align_block_size(ids, 16, 64, kernel=kernel)
            assert not stream.query(), "the call waited for its stream"
        stream.synchronize()
        assert equal(result, expected), f"{kernel=}"


def test_eight_threads() -> None:
    batches = [drawn((500 * (index + 1),), -1, 65) for index in range(8)]
    expected = [cpu_align.moe_align_block_size(batch, 16, 64) for batch in batches]
    torch.cuda.synchronize()
    failures: list[str] = []
    start = threading.Barrier(8)

    def work(index: int) -> None:
        try:
            start.wait(30)
            with torch.cuda.stream(torch.cuda.Stream()):
                for run in range(50):
                    result = moe_align_block_size(batches[index], 16, 64)
                    if not equal(result, expected[index]):
                        failures.append(f"thread {index}, {run=}")
        except Exception as error:
            failures.append(f"thread {index}: {error!r}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_worker_processes(method: str, tmp_path: Path) -> None:
    """A parent that has used the CPU path, and no GPU yet, starts workers that use theirs.

    A forked worker of such a parent must not compute on the CPU: torch's threads are not there any more.
    """
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, torch, cupy_moe\n"
        "def align(ids):\n"
        "    return [result.tolist() for result in cupy_moe.moe_align_block_size(ids, 16, 8)]\n"
        "def work(ids):\n"
        "    return align(torch.tensor(ids, device='cuda'))\n"
        "if __name__ == '__main__':\n"
        "    batches = [torch.randint(-1, 9, (2000,)) for _ in range(4)]\n"
        "    expected = [align(ids) for ids in batches]\n"
        f"    with multiprocessing.get_context({method!r}).Pool(2) as pool:\n"
        "        found = pool.map_async(work, [ids.tolist() for ids in batches]).get(40)\n"
        "    print(found == expected)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == "True", done.stderr


def test_the_call_does_not_synchronize() -> None:
    ids, expert_map = drawn((4096,), 0, 64), half_local(64)
    kernels, transposed = possible(ids, 64), ids.view(1024, 4).t()
    others = possible(transposed, 64)
    for ignore in (False, True):
        moe_align_block_size(ids, 16, 64, expert_map, ignore_invalid_experts=ignore)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            ids.max().item()
        for kernel in (None, *kernels):
            moe_align_block_size(ids, 16, 64, expert_map, kernel=kernel)
        for kernel in (None, *others):
            moe_align_block_size(transposed, 16, 64, kernel=kernel)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_it_allocates_no_more_than_its_outputs() -> None:
    ids = drawn((4096,), 0, 64)
    outputs = Outputs((*aligned_sizes(4096, 64, 16), 1))
    moe_align_block_size(ids, 16, 64, out=outputs.out)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    moe_align_block_size(ids, 16, 64, out=outputs.out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    moe_align_block_size(ids, 16, 64)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 3


# ---- wrong calls, other arrays -------------------------------------------------------------------


def test_tensors_on_different_devices() -> None:
    ids = drawn((12,), 0, 5)
    with pytest.raises(
        ValueError, match=r"expert_map: expected it beside the other tensors on cuda:0, got cpu"
    ):
        moe_align_block_size(ids, 4, 5, torch.zeros(5, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"out: sorted_token_ids: .* beside .* on cuda:0, got cpu"):
        moe_align_block_size(ids, 4, 5, out=tuple(torch.zeros(k, dtype=torch.int32) for k in (27, 7, 1)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expert_map: .* beside .* on cpu, got cuda:0"):
        moe_align_block_size(ids.cpu(), 4, 5, torch.zeros(5, dtype=torch.int32, device="cuda"))


def test_a_kernel_that_cannot() -> None:
    with pytest.raises(ValueError, match="kernel='small' takes at most"):
        moe_align_block_size(drawn((align_plans.SMALL_MAX_IDS + 1,), 0, 5), 4, 5, kernel="small")
    with pytest.raises(ValueError, match="kernel: expected one of 'small', "):
        moe_align_block_size(drawn((12,), 0, 5), 4, 5, kernel="fast")


def test_cupy_arrays() -> None:
    cupy = pytest.importorskip("cupy")
    ids = drawn((4096, 4), -1, 65)
    expected = cpu_align.moe_align_block_size(ids, 16, 64, half_local(64), True, True)
    aligned: Any = moe_align_block_size(cupy.asarray(ids), 16, 64, cupy.asarray(half_local(64)), True, True)
    for result, wanted in zip(aligned, expected, strict=True):
        assert isinstance(result, cupy.ndarray)
        assert (result.get() == wanted.cpu().numpy()).all()
    out: Any = tuple(cupy.full(len(wanted), 12_345, dtype=cupy.int32) for wanted in expected)
    again = moe_align_block_size(
        cupy.asarray(ids).T.copy().T, 16, 64, cupy.asarray(half_local(64)), True, True, out=out
    )
    assert all(a is b for a, b in zip(again, out, strict=True))
    assert all((a.get() == b.cpu().numpy()).all() for a, b in zip(out, expected, strict=True))


def test_cupy_arrays_of_another_stream() -> None:
    """torch waits for the producer's stream, and the consumer's reads wait for the kernel."""
    cupy = pytest.importorskip("cupy")
    late, before = cupy.asarray(drawn((4096,), 0, 64)), cupy.asarray(drawn((4096,), 0, 7))
    expected = cpu_align.moe_align_block_size(torch.from_dlpack(late), 16, 64)
    ids = before.copy()
    torch.cuda.synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        with torch.cuda.stream(torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr)):
            torch.cuda._sleep(20_000_000)
        ids[...] = late
        aligned: Any = moe_align_block_size(ids, 16, 64)
        copies = [result.copy() for result in aligned]
        assert not stream.done, "the call waited for its stream"
    stream.synchronize()
    assert all((a.get() == b.cpu().numpy()).all() for a, b in zip(copies, expected, strict=True))


def test_jax_arrays() -> None:
    jax = pytest.importorskip("jax")
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"jax has no GPU here: {error}")
    ids = drawn((1024, 4), -1, 65)
    expected = cpu_align.moe_align_block_size(ids, 16, 64)
    aligned = moe_align_block_size(jax.device_put(ids.cpu().numpy(), device), 16, 64)
    for result, wanted in zip(aligned, expected, strict=True):
        assert isinstance(result, jax.Array)
        assert result.tolist() == wanted.tolist()


on_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")


@on_two_gpus
def test_on_the_device_of_the_ids() -> None:
    ids = drawn((4096,), 0, 64).to("cuda:1")
    counts = drawn((64,), 0, 33).to("cuda:1")
    expected = cpu_align.moe_align_block_size(ids, 16, 64)
    expected_batched = cpu_align_batched.batched_moe_align_block_size(32, 16, counts)
    for kernel in (None, *possible(ids, 64)):
        for current in (0, 1):
            with torch.cuda.device(current):
                aligned = moe_align_block_size(ids, 16, 64, kernel=kernel)
                assert all(result.device == ids.device for result in aligned)
                assert equal(aligned, expected), f"{kernel=} {current=}"
                assert equal(torch.ops.cupy_moe.moe_align_block_size(ids, 16, 64), expected)
                assert equal(batched_moe_align_block_size(32, 16, counts), expected_batched)
                assert torch.cuda.current_device() == current
    with pytest.raises(ValueError, match="expert_map: expected it beside topk_ids on cuda:1, got cuda:0"):
        moe_align_block_size(ids, 16, 64, half_local(64))
    with pytest.raises(ValueError, match=r"out: expected sorted_token_ids .* on cuda:1.* on cuda:0"):
        moe_align_block_size(ids, 16, 64, out=tuple(r.to("cuda:0") for r in expected))  # type: ignore[arg-type]


@on_two_gpus
def test_on_the_current_stream_of_the_other_device() -> None:
    late, before = drawn((4096,), 0, 64).to("cuda:1"), drawn((4096,), 0, 7).to("cuda:1")
    expected = cpu_align.moe_align_block_size(late, 16, 64)
    ids, stream = before.clone(), torch.cuda.Stream("cuda:1")
    torch.cuda.synchronize("cuda:1")
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        ids.copy_(late)
        with torch.cuda.device(0):
            result = moe_align_block_size(ids, 16, 64)
        assert not stream.query(), "the call waited for its stream"
    stream.synchronize()
    assert equal(result, expected)


@on_two_gpus
def test_threads_on_two_devices() -> None:
    batches = [drawn((3000 + index,), -1, 65).to(f"cuda:{index % 2}") for index in range(4)]
    expected = [cpu_align.moe_align_block_size(batch, 16, 64) for batch in batches]

    def work(index: int) -> bool:
        results = [moe_align_block_size(batches[index], 16, 64) for _ in range(50)]
        return all(equal(result, expected[index]) for result in results)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [True] * 4
