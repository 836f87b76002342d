"""scripts/soak: every operator for minutes, from threads on their own streams, beside graphs that replay.

Results are compared all the time; memory is compared between a warm-up and the end, when nothing runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import click
import random_calls
import torch
from emulator.cases import Call, Results, same_bits

# The tensor whose rows are tokens, and as how many they come. What is done with messages knows its number.
SIZES = {
    "align": ("topk_ids", 6000),
    "align_batched": ("expert_num_tokens", 3000),
    "moe_sum": ("input", 3000),
    "gate": ("gating_output", 1500),
    "quantize": ("x", 1500),
    "sort": ("topk_ids", 6000),
    "align_lora": ("topk_ids", 3000),
    "permute": ("topk_ids", 1500),
    "unpermute": ("inverse_ids", 3000),
    "many_rows": ("inverse_ids", 200),
    "route": ("gating_output", 1500),
    "experts": ("topk_ids", 300),  # which take the CPU long
    "quantized_experts": ("topk_ids", 300),
    "fp8_rows": ("topk_ids", 300),
}
FRESH = 0.3  # of all calls are of a size that may never have been seen
BASES = 6  # calls of each operator that these are made of
# Whose check needs memory that was poisoned, and of which there are only kernels.
NOT_ON_CPU = ("permute", "quantized_experts", "fp8_rows")
# Its ranks are made up for the whole process, so that one thread alone can call it.
ALONE = "stores"
GRAPH_CALLS, REPLAYS = 12, 50
# By how many MB memory may grow after the warm-up. What torch has allocated is known to the byte, and is cut
# from segments of 20 MB, for each stream its own; the host remembers prepared calls, up to 40 MB of them.
TOLERANCE = {"torch allocated": 1, "torch reserved": 64, "device": 64, "host": 48}
M_ARENA_MAX = -8  # of malloc.h


class Prepared(NamedTuple):
    """A call that is made again and again."""

    name: str
    call: Call
    kernel: str | None
    placed: dict[int, torch.Tensor]  # by the id of the tensor that each is a copy of
    reference: Results = ()  # what it gave at first, which was compared with the CPU
    can_be_captured: bool = False

    def run(self) -> Results:
        return self.call.run(lambda tensor: self.placed[id(tensor)], self.kernel)


class Soak:
    def __init__(self, where: str, operators: tuple[str, ...], calls: int, seed: int, threads: int) -> None:
        self.is_gpu, self.seed = where == "gpu", seed
        self.operators = [
            name for name in operators if name != ALONE and (self.is_gpu or name not in NOT_ON_CPU)
        ]
        self.done: Counter[str] = Counter()
        self.fresh = self.graphs = self.replays = self.mismatches = 0
        self.failures: dict[str, tuple[str, str]] = {}  # of each operator, the first: name, what is wrong
        self.is_over = False  # nothing works any more
        self._lock = threading.Lock()
        # Not one for each thread of each phase: torch keeps memory for every stream that there was.
        self._streams = [torch.cuda.Stream() if self.is_gpu else None for _ in range(threads + 1)]
        sized = [operator for operator in self.operators if operator in SIZES]
        self._bases = {operator: self._make_bases(operator) for operator in sized}
        self._seen = {operator: bytearray(SIZES[operator][1] + 1) for operator in sized}
        self.pool: list[Prepared] = []
        for name in random_calls.names(range(seed, seed + calls), self.operators):
            if self.is_gpu or name.count(":") == 1:
                self._guarded(name, functools.partial(self._prepare, name))
        self._graphable = [prepared for prepared in self.pool if prepared.can_be_captured]

    @property
    def num_sizes(self) -> int:
        return sum(sum(seen) for seen in self._seen.values())

    # ---- calls that are known

    def _prepare(self, name: str) -> bool:
        call, kernel = random_calls.make(name)
        prepared = Prepared(name, call, kernel, {id(t): self._place(t) for t in call.tensors.values()})
        try:
            results = prepared.run()
        except ValueError:
            if kernel is None:
                raise
            return False  # the kernel does not do this call
        reference = tuple(result.cpu() for result in results)
        if wrong := call.compare(call, reference, call.specified()):
            self._fail(name, wrong)
        captured = self.is_gpu and never_waits(prepared.run)
        self.pool.append(prepared._replace(reference=reference, can_be_captured=captured))
        return True

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy with the same strides, and as far off a multiple of 16 bytes."""
        flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        moved = flat.cuda() if self.is_gpu else flat.clone()
        return moved.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _again(self, prepared: Prepared, results: Results, where: str = "") -> bool:
        """Results have to be what the same call gave before, bit for bit."""
        found = tuple(result.cpu() for result in results)
        if len(found) != len(prepared.reference) or not all(map(same_bits, found, prepared.reference)):
            wrong = prepared.call.compare(prepared.call, found, prepared.call.specified())
            self._fail(prepared.name, (wrong or "right, but other bits than at the first call") + where)
        return True

    # ---- calls of sizes that may be new

    def _make_bases(self, operator: str) -> list[str]:
        like, _ = SIZES[operator]
        found: list[str] = []
        for seed in range(self.seed, self.seed + 100):
            call = random_calls.CALLS[operator](seed)
            kernels = call.kernels if self.is_gpu and not call.plans else ("",) if call.plans else ()
            if len(call.tensors[like]):
                found += [f"{operator}:{seed}" + (f":{kernel}" if kernel else "") for kernel in kernels]
            if len(found) >= BASES:
                break
        return found

    def _anew(self, name: str) -> bool:
        with self._lock:  # torch has one generator, which calls are made with
            call, kernel = random_calls.make(name)
        try:
            expected = call.specified()
        except (ValueError, IndexError, RuntimeError):
            return False  # another tensor happened to have as many rows
        try:
            results = call.run(self._place, kernel)
        except ValueError:
            return False  # as above, or the kernel does not do this call
        if wrong := call.compare(call, tuple(result.cpu() for result in results), expected):
            self._fail(name, wrong)
        self._seen[name.partition(":")[0]][int(name.rpartition("=")[2])] = 1
        with self._lock:
            self.fresh += 1
        return True

    # ---- threads

    def _fail(self, name: str, wrong: str) -> None:
        with self._lock:
            self.mismatches += 1
            self.failures.setdefault(name.partition(":")[0], (name, wrong))

    def _guarded(self, name: str, step: Callable[[], bool]) -> None:
        """One call. What it raises is a failure, and the end of all if it is CUDA's."""
        try:
            if step():
                with self._lock:
                    self.done[name.partition(":")[0]] += 1
        except Exception as error:
            self._fail(name, f"{type(error).__name__}: {error}")
            self.is_over = self.is_over or "CUDA" in str(error)

    def _call(self, pick: random.Random, until: float) -> None:
        """One of those that are known, or of another size."""
        operators = [operator for operator, names in self._bases.items() if names]
        if pick.random() < FRESH and operators:
            operator = pick.choice(operators)
            like, most = SIZES[operator]
            name = f"{pick.choice(self._bases[operator])}:{like}={pick.randint(1, most)}"
            self._guarded(name, functools.partial(self._anew, name))
        else:
            prepared = pick.choice(self.pool)
            self._guarded(prepared.name, lambda: self._again(prepared, prepared.run()))

    def _replay(self, pick: random.Random, until: float) -> None:
        """A graph of some calls, captured while other threads allocate and launch, and replayed."""
        chosen = pick.sample(self._graphable, min(GRAPH_CALLS, len(self._graphable)))
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        kept: list[Results] = []

        def capture() -> bool:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                kept.extend(prepared.run() for prepared in chosen)
            return False  # which nobody counts as a call

        def compare(prepared: Prepared, results: Results) -> bool:
            self._again(prepared, results, ", replayed by a graph")
            inputs = {tensor.untyped_storage().data_ptr() for tensor in prepared.placed.values()}
            for result in results:
                if result.untyped_storage().data_ptr() not in inputs:
                    result.fill_(77)  # which the next replay has to write over
            return True

        self._guarded(f"graph:{' '.join(prepared.name for prepared in chosen)}", capture)
        self.graphs += 1
        for _ in range(REPLAYS):
            if len(kept) < len(chosen) or self.is_over or time.monotonic() > until:
                break
            graph.replay()
            self.replays += 1
            for prepared, results in zip(chosen, kept, strict=True):
                self._guarded(prepared.name, functools.partial(compare, prepared, results))

    def _work(self, number: int, until: float, step: Callable[[random.Random, float], None]) -> None:
        pick, stream = random.Random(f"{self.seed} {number} {until}"), self._streams[number]
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            while time.monotonic() < until and not self.is_over:
                step(pick, until)

    def run(self, seconds: float, every: float, begin: float) -> None:
        """All threads, until the time is up; a line of figures now and then."""
        until = time.monotonic() + seconds
        steps = [self._call] * (len(self._streams) - 1) + [self._replay] * bool(self._graphable)
        threads = [
            threading.Thread(target=self._work, args=(number, until, step), daemon=True)
            for number, step in enumerate(steps)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            wait = time.monotonic() + every
            for thread in threads:
                thread.join(max(0.0, wait - time.monotonic()))
            self.tell(time.monotonic() - begin)

    # ---- figures

    def tell(self, seconds: float) -> None:
        figures = ", ".join(f"{name} {size:.0f} MB" for name, size in sizes(self.is_gpu).items())
        click.echo(
            f"{seconds:6.0f} s  {self.done.total()} calls, {self.num_sizes} sizes, {self.graphs} graphs,"
            f" {self.replays} replays, {self.mismatches} wrong; {figures}"
        )

    def at_rest(self) -> dict[str, float]:
        """Memory, without what is only kept for later."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
        return sizes(self.is_gpu)


def sizes(is_gpu: bool) -> dict[str, float]:
    """Of memory, in MB."""
    with open("/proc/self/statm") as file:
        found = {"host": int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6}
    if is_gpu:
        free, total = torch.cuda.mem_get_info()
        found["torch allocated"] = torch.cuda.memory_allocated() / 1e6
        found["torch reserved"] = torch.cuda.memory_reserved() / 1e6
        found["device"] = (total - free) / 1e6
    return found


def never_waits(run: Callable[[], Any]) -> bool:
    """Whether a call can be captured: one that looks at a result on its way cannot."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


@click.command()
@click.option("--on", "where", type=click.Choice(["gpu", "cpu"]), help="By default a GPU if any.")
@click.option("--minutes", default=10.0, show_default=True, help="How long, the warm-up included.")
@click.option("--warm-up", "warm", type=float, help="Minutes of it; by default a fifth, up to 2.")
@click.option("--threads", default=4, show_default=True, help="That call; one more replays graphs.")
@click.option("--calls", default=8, show_default=True, help="Of each operator that are known, by seeds.")
@click.option("--first", type=int, help="The first seed; by default another at each run.")
@click.option("--operator", "operators", type=click.Choice(list(random_calls.CALLS)), multiple=True)
@click.option("--every", default=10.0, show_default=True, help="Seconds from line to line.")
def main(
    where: str | None, minutes: float, warm: float | None, threads: int, calls: int, first: int | None,
    operators: tuple[str, ...], every: float,
) -> None:  # fmt: skip
    """Call every operator for minutes, from several threads and streams, beside graphs that replay.

    Calls of a pool are made again and again, in random order, and have to give the same bits each time; calls
    of sizes that may never have been seen are compared with the CPU. Fails where a result was wrong, each
    printed as scripts/fuzz takes it, or where memory has grown after the warm-up, by more MB than
    """
    where = where or ("gpu" if torch.cuda.is_available() else "cpu")
    first = random.randrange(10**6, 10**9) if first is None else first
    torch.set_num_threads(1)  # those that call are enough
    with contextlib.suppress(OSError, AttributeError):  # an arena for each thread holds 100 MB that are free
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    begin = time.monotonic()
    if where == "gpu":
        torch.zeros(1, device="cuda")
    at_start = sizes(where == "gpu")
    soak = Soak(where, operators or tuple(random_calls.CALLS), calls, first, threads)
    click.echo(f"on {where}, from seed {first} on; {len(soak.pool)} calls made")
    warm = min(minutes / 5, 2.0) if warm is None else warm
    begin = time.monotonic()
    soak.run(60 * warm, every, begin)
    warmed = soak.at_rest()
    soak.run(60 * (minutes - warm), every, begin)
    at_end = soak.at_rest()

    for operator in soak.operators:
        click.echo(f"{operator:20} {soak.done[operator]:10} calls")
    click.echo(
        f"{soak.done.total()} calls, {soak.fresh} of them of {soak.num_sizes} sizes,"
        f" {soak.replays} replays of {soak.graphs} graphs, {soak.mismatches} wrong"
    )
    click.echo("MB                     at start  warmed up     at end   grown by    at most")
    grown = []
    for name, most in TOLERANCE.items():
        if name in at_end:
            drift = at_end[name] - warmed[name]
            row = "".join(f" {size:10.1f}" for size in (at_start[name], warmed[name], at_end[name], drift))
            click.echo(f"{name:20}{row} {most:10}")
            grown += [f"memory has grown: {name}, by {drift:.1f} MB"] if drift > most else []
    uncalled = [operator for operator in soak.operators if not soak.done[operator]]
    for line in (*grown, *(f"{operator} was not called" for operator in uncalled)):
        click.echo(line, err=True)
    for name, wrong in soak.failures.values():
        command = "a graph of" if name.startswith("graph:") else f"scripts/fuzz --on {where} --replay"
        click.echo(f"{wrong}\n  {command} '{name.removeprefix('graph:')}'", err=True)
    sys.exit(bool(grown or uncalled or soak.failures))


if main.help:
    main.help += ", ".join(f"{most} ({name})" for name, most in TOLERANCE.items()) + "."

if __name__ == "__main__":
    main()
