"""moe_align_block_size on a GPU: streams, graphs, threads, processes, and what a call waits for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from align_gpu import Outputs, drawn, equal, half_local, possible

from cupy_moe import aligned_sizes, moe_align_block_size
from cupy_moe.cpu import align as cpu_align

pytestmark = pytest.mark.gpu


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
