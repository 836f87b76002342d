"""`scripts/bench`: check, time, report."""

from __future__ import annotations

import datetime
import importlib.util
import json
import secrets
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

import cupy_moe
from cupy_moe.images import compiler

from . import cases, measure, operators, peers, report, timing
from .operators import OPERATORS

ROOT = Path(__file__).parents[2]
FORMAT = 1  # of the JSON file
SECTIONS = ("align", "sweep", "host", "sum", "gate", "sigmoid", "grouped")
REPLAYS, FEW_REPLAYS = 100, 20
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Only the align table, with fewer replays: 20 s.")
@click.option("--only", type=click.Choice(SECTIONS), multiple=True, help="A section; may be repeated.")
@click.option("--kernels", is_flag=True, help="Also each kernel of ours by itself.")
@click.option(
    "--peers", "peers_folder", type=FOLDER, help="Loads other libraries by its load.py; default: installed."
)
@click.option("--seed", type=int, help="Of the random inputs; default: another one each time.")
@click.option(
    "--out", type=FILE, help="JSON, a plot goes beside it; default for all sections: in scripts/results."
)
@click.option("--from", "source", type=FILE, help="Measure nothing: report what this JSON file holds.")
@click.option("--readme", is_flag=True, help="Rewrite the section of README.md that holds the results.")
def main(
    quick: bool, only: tuple[str, ...], kernels: bool, peers_folder: Path | None, seed: int | None,
    out: Path | None, source: Path | None, readme: bool,
) -> None:  # fmt: skip
    """Compare operators with their specification, then time them beside vLLM's and SGLang's.

    Fails, and times nothing, if any result is wrong.
    """
    if source and not source.exists():
        raise click.BadParameter(f"there is no {source}", param_hint="--from")
    if peers_folder and not (peers_folder / "load.py").is_file():
        raise click.BadParameter(f"{peers_folder} has no load.py", param_hint="--peers")
    sections = only or (("align",) if quick else SECTIONS)
    if source:
        result, out = json.loads(source.read_text()), source
    else:
        if operators.device == "cuda" and not torch.cuda.is_available():
            raise click.ClickException("torch sees no CUDA GPU here")
        result = run(sections, kernels, peers_folder, seed, FEW_REPLAYS if quick else REPLAYS)
        if out is None and sections == SECTIONS:
            name = result["environment"]["gpu"].removeprefix("NVIDIA ").lower().replace(" ", "-")
            out = ROOT / "scripts" / "results" / f"{name}.json"
    click.echo(f"\n{report.conditions(result)}")
    for table in report.tables(result):
        click.echo(table.text())
    if out and not source:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(_rounded(result), indent=1) + "\n")
        click.echo(f"\nwrote {out}")
    plot = draw(result, out.with_suffix(".svg")) if out and result.get("sweep") else None
    if readme:
        path = ROOT / "README.md"
        shown = (
            plot.resolve().relative_to(ROOT).as_posix()
            if plot and plot.resolve().is_relative_to(ROOT)
            else None
        )
        path.write_text(report.replace_section(path.read_text(), report.readme_section(result, shown)))
        click.echo(f"wrote {path}")


def run(
    sections: tuple[str, ...], kernels: bool, peers_folder: Path | None, seed: int | None, replays: int
) -> dict[str, Any]:
    seed = secrets.randbelow(2**31) if seed is None else seed
    found = peers.load(peers_folder)
    names = list(found)
    result: dict[str, Any] = {"format": FORMAT, "environment": environment(found), "seed": seed}
    click.echo(f"peers: {', '.join(names) or 'none found'}; --seed {seed}")

    used = {"align", *sections} & OPERATORS.keys()
    wanted = [name for name in OPERATORS if name in used and measure.available(OPERATORS[name])]
    try:
        click.echo(f"{measure.check(wanted, names, seed)} results checked, all right")
        result["floor"] = timing.floor_us(replays)
        contenders = [measure.OURS, *names]
        for name in wanted:
            if name in sections:
                operator, torch_too = OPERATORS[name], name == "align"
                click.echo(f"timing {name}")
                result[name] = measure.time_cases(
                    operator, operator.cases, contenders, seed, replays, torch_too
                )
        if "sweep" in sections:
            click.echo("timing sweep")
            sweep = cases.sweep()
            result["sweep"] = measure.time_cases(
                OPERATORS["align"], sweep, contenders, seed, FEW_REPLAYS, torch_too=False
            )
        if kernels:
            click.echo("timing kernels")
            result["kernels"] = measure.time_kernels(seed, FEW_REPLAYS)
        if "host" in sections:
            result["host"] = measure.time_host(names, seed)
    except operators.WrongResultError as error:
        raise click.ClickException(str(error)) from error
    return result


def environment(found: dict[str, str]) -> dict[str, Any]:

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, IndexError, subprocess.CalledProcessError):
        driver = "unknown"
    from cupy_moe._cupy import cupy

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": version("torch"),
        "cupy": cupy.__version__,
        "nvrtc": compiler.toolchain().nvrtc,
        "cupy_moe": cupy_moe.__version__,
        "peers": found,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def draw(result: dict[str, Any], path: Path) -> Path | None:
    if importlib.util.find_spec("matplotlib") is None:
        click.echo("no plot: matplotlib is not installed (the extra `bench` brings it)")
        return None
    from . import plot

    plot.draw(result, path)
    click.echo(f"wrote {path}")
    return path


def _rounded(value: Any) -> Any:
    """Figures to a nanosecond, which is far below their noise, so that the file can be read."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main(prog_name="scripts/bench")
