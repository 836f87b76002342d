"""scripts/sanitize: every kernel of this device, in few calls, under each of compute-sanitizer's tools."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import random_calls
import torch

from cupy_moe.cuda import modules

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 86  # exit status
FAILED = "FAILED"
ENOUGH_SEEDS = 20  # for an operator to have launched something of each of its units
# What a tool says of kernels whose names begin so, and why it is none.
NOT_FOLLOWED = "copies of scales and their readers, which cp.async.mbarrier.arrive is between"
EXPLAINED = {("racecheck", "experts_wgmma_fp8_"): NOT_FOLLOWED}


@click.command()
@click.option("--tool", "tools", type=click.Choice(TOOLS), multiple=True, help="Not all four of them.")
@click.option("--operator", "operators", type=click.Choice(list(random_calls.CALLS)), multiple=True)
@click.option("--seeds", default=1000, help="How many may be tried to reach every kernel.", show_default=True)
@click.option("--run", "listed", type=click.Path(path_type=Path), hidden=True)
def main(tools: tuple[str, ...], operators: tuple[str, ...], seeds: int, listed: Path | None) -> None:
    """Run every kernel of this device under compute-sanitizer, and compare results with the CPU.

    Fails where a tool finds something, a result is wrong, or a kernel was not reached.
    """
    torch.set_num_threads(1)  # the calls are small, and the tools have a process each
    if listed:
        run_listed(json.loads(listed.read_text()))
        return
    wanted = {
        entry: image.sidecar.unit
        for image in modules.images(torch.cuda.current_device())
        for entry in image.sidecar.kernels
    }
    calls, missing = reach(wanted, operators or tuple(random_calls.CALLS), seeds)
    click.echo(f"{len(calls)} calls reach {len(wanted) - len(missing)} of {len(wanted)} kernels")
    if missing and not operators:
        click.echo(f"not reached: {', '.join(sorted(missing))}", err=True)
    with ThreadPoolExecutor() as pool:  # each tool has a process of its own
        found = dict(
            zip(tools or TOOLS, pool.map(lambda tool: sanitize(tool, calls), tools or TOOLS), strict=True)
        )
    reached = Counter(unit for entry, unit in wanted.items() if entry not in missing)
    for unit, count in Counter(wanted.values()).items():
        click.echo(f"{unit:20} {reached[unit]:4} of {count:4} kernels")
    click.echo(f"{len(calls)} calls; " + "; ".join(f"{tool}: {said}" for tool, said in found.items()))
    if FAILED in found.values() or (missing and not operators):
        sys.exit(1)


def reach(wanted: dict[str, str], operators: tuple[str, ...], seeds: int) -> tuple[list[str], set[str]]:
    """Calls that launch each kernel once, found without a tool; and what none of them launched. `wanted` has
    the unit of each kernel: operators that launch none of those that are missing are not called any more."""
    missing, seen = set(wanted), set[str]()
    units: dict[str, set[str]] = {operator: set() for operator in operators}
    load = modules.function

    def function(device: int, unit: str, entry: str) -> object:
        seen.add(entry)
        return load(device, unit, entry)

    modules.function = function
    calls = []
    for name in random_calls.names(range(seeds), operators):
        operator, seed = name.split(":")[:2]
        if int(seed) >= ENOUGH_SEEDS and units[operator].isdisjoint(wanted[entry] for entry in missing):
            continue
        seen.clear()
        try:
            wrong = check(name)
        except ValueError:
            if name.count(":") < 2:
                raise
            continue  # the kernel cannot do it
        if wrong:
            raise click.ClickException(f"{name}: {wrong}")
        units[operator] |= {wanted[entry] for entry in seen if entry in wanted}
        if seen & missing:
            missing -= seen
            calls.append(name)
        if not missing:
            break
    modules.function = load
    return calls, missing


def run_listed(calls: list[str]) -> None:
    for name in calls:
        if wrong := check(name):
            raise click.ClickException(f"{name}: {wrong}")


def check(name: str) -> str:
    call, kernel = random_calls.make(name)
    results = call.run(on_gpu, kernel)
    return call.compare(call, tuple(result.cpu() for result in results), call.specified())


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """With the same strides and alignment, in no more memory than it has, for overruns to be seen."""
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return flat.cuda().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def sanitize(tool: str, calls: list[str]) -> str:
    # Without torch's pool, an overrun of one byte is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "calls.json", Path(folder) / "log"
        path.write_text(json.dumps(calls))
        command = [
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            str(FOUND),
            "--log-file",
            str(log),
        ]
        inside = [sys.executable, __file__, "--run", str(path)]
        status = subprocess.run([*command, *inside], env=environment, check=False).returncode
        said = log.read_text()
    if status == 0:
        return "clean"
    if status != FOUND:
        click.echo(f"{tool}, exit status {status}:\n{said[-4000:]}", err=True)
        return FAILED
    findings: dict[tuple[str, ...], list[str]] = {}
    for finding in re.split(r"\n=+ *\n", said):
        kernels = tuple(dict.fromkeys(re.findall(r" at (.+?)\+0x", finding)))  # of torch, too: with spaces
        if kernels or not {"COMPUTE-SANITIZER", "SUMMARY"} & set(re.findall(r"[\w-]+", finding)):
            findings.setdefault(kernels, []).append(finding)
    explained = {name: why for (of, name), why in EXPLAINED.items() if of == tool}
    left = {
        kernels: found
        for kernels, found in findings.items()
        if not kernels or not all(kernel.startswith(tuple(explained)) for kernel in kernels)
    }
    for kernels, found in left.items():
        click.echo(f"{tool}: {len(found)} x {' and '.join(kernels) or 'no kernel'}\n{found[0]}", err=True)
    return FAILED if left or not findings else f"clean but for {'; '.join(explained.values())}"


if __name__ == "__main__":
    main()
