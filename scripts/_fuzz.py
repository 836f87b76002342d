"""scripts/fuzz: random calls of every operator, for as long as asked, compared with the CPU."""

from __future__ import annotations

import itertools
import multiprocessing as mp
import queue
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import click
import gpus
import random_calls
import torch
from emulator import Allocations, Emulator
from emulator.cases import POISON

# What the emulator may be, by a call's seed.
DEVICES = {80: gpus.A100, 89: gpus.RTX4090, 90: gpus.H200, 120: gpus.RTX5090}
NAME_BYTES = 1000
CALLS_AT_ONCE = 60
SELDOM = 8


class CannotDoError(Exception):
    """The kernel that is forced does not do this call."""


def check(name: str, where: str) -> str:
    """What is wrong with the results of a call, or with what lies beside them; "" if nothing is."""
    return started(name, where)()


def started(name: str, where: str) -> Callable[[], str]:
    """A call that has begun; what is returned waits for it, and tells what is wrong."""
    call, kernel = random_calls.make(name)
    guards = Allocations("cuda" if where == "gpu" else "cpu")
    try:
        if where != "emulator":
            tensors = list(call.tensors.values())
            placed = {
                id(tensor): beside.tensor
                for tensor, beside in zip(tensors, guards.add_all(tensors), strict=True)
            }
            with guards:
                results = call.run(lambda tensor: placed[id(tensor)], kernel)
        else:
            seed = int(name.split(":")[1])
            arch = sorted(DEVICES)[seed % len(DEVICES)]
            with Emulator(DEVICES[arch], arch, seed)() as device:
                results = call.run(device.tensor, kernel)
    except ValueError as error:
        if kernel is None:
            raise
        raise CannotDoError from error
    around = []
    for kept in guards.kept:
        if kept.memory.is_cuda != (where == "gpu"):
            continue  # what a call makes of numbers before it sends them
        before, after = kept.begin - kept.memory.data_ptr(), kept.end - kept.memory.data_ptr()
        around += [kept.memory[:before], kept.memory[after:]]
    written = (torch.cat(around) != POISON).any() if around else torch.tensor(False)

    def wrong() -> str:
        if written:
            return "a guard beside a tensor was written to"
        return call.compare(
            call, tuple(result.cpu() for result in results), random_calls.specified(name, call)
        )

    return wrong


def work(
    where: str, seeds: range, operators: tuple[str, ...], until: float, current: Any, results: Any
) -> None:
    """Calls until the time is up or none are left. Tells what was done now and then, and each failure.

    A GPU that several processes have is waited for only once for many calls.
    """
    torch.set_num_threads(1)
    names = random_calls.names(seeds, operators, seldom=1 if len(operators) == 1 else SELDOM)
    at_once = CALLS_AT_ONCE if where == "gpu" else 1
    told, done = time.monotonic(), Counter[str]()
    while time.monotonic() < until and (chunk := list(itertools.islice(names, at_once))):
        waiting: list[tuple[str, Callable[[], str]]] = []
        for name in chunk:
            if where == "cpu" and name.count(":") > 1:
                continue
            current.value = name.encode()
            try:
                waiting.append((name, started(name, where)))
            except CannotDoError:
                pass
            except Exception as error:
                results.put(("failed", name, f"{type(error).__name__}: {error}"))
        for name, wrong in waiting:
            current.value = name.encode()
            operator, _, kernel = name.partition(":")
            try:
                if said := wrong():
                    results.put(("failed", name, said))
                done[f"{operator} {kernel.partition(':')[2]}"] += 1
            except Exception as error:
                which = (
                    "" if "CUDA error" not in str(error) else f", of this call or the {at_once - 1} after it"
                )
                results.put(("failed", name, f"{type(error).__name__}: {error}{which}"))
                if which:
                    return  # nothing works in this process any more
        if time.monotonic() - told > 0.5:
            results.put(("done", done, ""))
            told, done = time.monotonic(), Counter()
    results.put(("done", done, ""))


@click.command()
@click.option("--on", "where", type=click.Choice(["gpu", "emulator", "cpu"]), help="By default a GPU if any.")
@click.option("--minutes", default=1.0, show_default=True, help="How long.")
@click.option("--seeds", type=int, help="So many of each operator, however long that takes.")
@click.option("--first", type=int, help="The first seed; by default another at each run.")
@click.option("--operator", "operators", type=click.Choice(list(random_calls.CALLS)), multiple=True)
@click.option("--workers", default=1, show_default=True, help="Processes.")
@click.option("--replay", metavar="NAME", help="One call, as a failure was printed.")
def main(
    where: str | None, minutes: float, seeds: int | None, first: int | None, operators: tuple[str, ...],
    workers: int, replay: str | None,
) -> None:  # fmt: skip
    """Call every operator and kernel with random arguments, garbage among them, and compare with the CPU.

    Inputs and outputs lie between guards, and outputs hold something else before a call. A failure is printed
    as a name that --replay takes, one for each operator, made as small as it still fails.
    """
    where = where or ("gpu" if torch.cuda.is_available() else "emulator")
    if replay:
        wrong = check(replay, where)
        click.echo(f"{replay}: {wrong or 'right'}")
        sys.exit(bool(wrong))
    first = random.randrange(10**6, 10**9) if first is None else first
    last = first + seeds if seeds else 2**62
    click.echo(f"on {where}, from seed {first} on")
    context, chosen = mp.get_context("spawn"), operators or tuple(random_calls.CALLS)
    results = context.Queue()
    until = time.monotonic() + (1e9 if seeds else 60 * minutes)
    current = [context.Array("c", NAME_BYTES) for _ in range(workers)]
    processes = [
        context.Process(
            target=work, args=(where, range(first + w, last, workers), chosen, until, current[w], results)
        )
        for w in range(workers)
    ]
    for process in processes:
        process.start()
    done, failures = watch(processes, current, results)
    for kernel, count in sorted(done.items()):
        click.echo(f"{kernel:40} {count:10}")
    click.echo(f"{done.total()} calls, {len(failures)} failed")
    of_operators = {name.partition(":")[0]: (name, wrong) for name, wrong in failures}
    for name, wrong in of_operators.values():
        small = random_calls.smaller(name, lambda changed: bool(check(changed, where)))
        click.echo(f"{wrong}\n  scripts/fuzz --on {where} --replay '{small}'", err=True)
    sys.exit(bool(failures))


def watch(processes: Any, current: Any, results: Any) -> tuple[Counter[str], list[tuple[str, str]]]:
    """Collects what workers tell, and shows it, until all have ended."""
    done: Counter[str] = Counter()
    failures: list[tuple[str, str]] = []
    begin, lost = time.monotonic(), set[int]()
    while any(process.is_alive() for process in processes) or not results.empty():
        try:
            kind, what, wrong = results.get(timeout=1)
        except queue.Empty:
            kind, what, wrong = "", "", ""
        if kind == "done":
            done += what
        elif kind == "failed":
            failures.append((what, wrong))
        for number, process in enumerate(processes):
            if process.exitcode and number not in lost:  # killed by what it did
                lost.add(number)
                failures.append((current[number].value.decode(), f"exit status {process.exitcode}"))
        if sys.stderr.isatty():
            rate = done.total() / max(1e-9, time.monotonic() - begin)
            click.echo(f"\r{done.total()} calls, {rate:.0f}/s, {len(failures)} failed ", err=True, nl=False)
    for process in processes:
        process.join()
    return done, failures


if __name__ == "__main__":
    main()
