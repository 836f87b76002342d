"""Microseconds per call: on the GPU by CUDA-graph replay, on the host by the wall clock. Medians throughout.

Contenders take turns inside every round, so that clocks and neighbours change for all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]
CALLS_PER_GRAPH = 20
WARMUP_ROUNDS = 3
# Of long calls, fewer do: in a graph once they take this long together, and in rounds.
GRAPH_US, CONTENDER_US, MIN_ROUNDS = 20_000, 500_000, 5
# About 0.5 ms of idling on the GPU, longer than the host takes to queue one round behind it. Without it the
# gap between the first event and a graph that is not yet there counts as the graph's time.
BACKLOG_CYCLES = 1_000_000


def gpu_us(contenders: Mapping[str, Sequence[Call]], replays: int) -> dict[str, float]:
    """Time of a call of each contender; several calls differ in their inputs, and are made in turn."""
    slowest_us = max(eager_us(calls[0], 1) for calls in contenders.values())
    length = min(CALLS_PER_GRAPH, int(GRAPH_US / slowest_us))
    graphs = {name: capture(calls, length) for name, calls in contenders.items()}
    longest_us = slowest_us * max(num_calls for _, num_calls in graphs.values())
    rounds = min(replays, max(MIN_ROUNDS, int(CONTENDER_US / longest_us)))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(WARMUP_ROUNDS + rounds):
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in graphs}
        torch.cuda._sleep(BACKLOG_CYCLES)
        for name, (graph, _) in graphs.items():
            events[name][0].record()
            graph.replay()
            events[name][1].record()
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end) * 1e3 / graphs[name][1])
    return {name: statistics.median(values[WARMUP_ROUNDS:]) for name, values in times.items()}


def capture(calls: Sequence[Call], length: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of the calls, repeated until there are `length` of them or more, and how many there are."""
    repeated = list(calls) * max(1, -(-length // len(calls)))
    for call in calls:
        call()  # what happens only once, such as loading, cannot be captured
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # not torch.cuda.graph(), which collects garbage at each capture
        graph.capture_begin()
        try:
            for call in repeated:
                call()
        finally:
            graph.capture_end()
    return graph, len(repeated)


def eager_us(call: Call, rounds: int) -> float:
    """Time from one call to the end of its work, for what waits for the GPU and so cannot be captured."""
    times = []
    for _ in range(WARMUP_ROUNDS + rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[WARMUP_ROUNDS:])


def host_us(contenders: Mapping[str, Call], calls: int = 300, rounds: int = 7) -> dict[str, float]:
    """Time for which a call keeps the host busy."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(1 + rounds):  # the first is a warm-up
        for name, call in contenders.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            times[name].append((time.perf_counter() - start) * 1e6 / calls)
    torch.cuda.synchronize()
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def floor_us(replays: int) -> dict[str, float]:
    """What the GPU takes to start kernels that do nothing."""
    from cupy_moe._cupy import cupy
    from cupy_moe.cuda import modules
    from cupy_moe.images import compiler, sources, targets

    device = torch.cuda.current_device()
    target = targets.native_targets(modules.capability(device))[0]
    source = b'extern "C" __global__ void nothing_kernel() {}'
    module = cupy.cuda.function.Module()
    module.load(compiler.compile(sources.Unit("nothing", source, {}, ()), target).data)
    function = module.get_function("nothing_kernel")

    def launch(grid: int, block: int) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        cupy.cuda.driver.launchKernel(function.ptr, grid, 1, 1, block, 1, 1, 0, stream, 0, 0)

    sms = torch.cuda.get_device_properties(device).multi_processor_count
    one = gpu_us({"one": [lambda: launch(1, 32)], "all": [lambda: launch(sms, 1024)]}, replays)
    return {"one block of 32": one["one"], f"{sms} blocks of 1024": one["all"]}


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
