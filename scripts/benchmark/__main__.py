"""`scripts/bench`: check, time, report."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import secrets
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

import cupy_moe
from cupy_moe.images import compiler

from . import base, discover, measure, peers, report, timing

ROOT = Path(__file__).parents[2]
FORMAT = 1  # of the JSON file
OPERATORS = discover()
SECTIONS = tuple(section for operator in OPERATORS for section in operator.sections())
QUICK = tuple(operator.section for operator in OPERATORS if operator.quick)
REPLAYS, FEW_REPLAYS = 100, 20
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help=f"Only {', '.join(QUICK)}, with fewer replays: 20 s.")
@click.option("--only", type=click.Choice(SECTIONS), multiple=True, help="A section; may be repeated.")
@click.option("--kernels", is_flag=True, help="Also each kernel of ours by itself, where they can be forced.")
@click.option(
    "--peers", "peers_folder", type=FOLDER, help="Loads other libraries by its load.py; default: installed."
)
@click.option("--seed", type=int, help="Of the random inputs; default: another one each time.")
@click.option(
    "--out", type=FILE, help="JSON, plots go beside it; default for all sections: in scripts/results."
)
@click.option("--from", "source", type=FILE, help="Measure nothing: report what this JSON file holds.")
@click.option("--readme", is_flag=True, help=f"Rewrite {report.PAGE}, and README.md's part on speed.")
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
    sections = only or (QUICK if quick else SECTIONS)
    if source:
        result, out = json.loads(source.read_text()), source
    else:
        if base.device == "cuda" and not torch.cuda.is_available():
            raise click.ClickException("torch sees no CUDA GPU here")
        result = run(sections, kernels, peers_folder, seed, FEW_REPLAYS if quick else REPLAYS)
        if out is None and sections == SECTIONS:
            name = result["environment"]["gpu"].removeprefix("NVIDIA ").lower().replace(" ", "-")
            out = ROOT / "scripts" / "results" / f"{name}.json"
    click.echo(f"\n{report.conditions(result)} {report.floor(result)}")
    for operator in OPERATORS:
        for table in report.tables(operator, result):
            click.echo(table.text())
    if out and not source:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(_rounded(result), indent=1) + "\n")
        click.echo(f"\nwrote {out}")
    plots = draw(result, out) if out else {}
    if readme:
        for path, text in pages(result, plots).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            click.echo(f"wrote {path}")


def run(
    sections: tuple[str, ...], kernels: bool, peers_folder: Path | None, seed: int | None, replays: int
) -> dict[str, Any]:
    seed = secrets.randbelow(2**31) if seed is None else seed
    found = peers.load(peers_folder)
    names = list(found)
    result: dict[str, Any] = {"format": FORMAT, "environment": environment(found), "seed": seed}
    click.echo(f"peers: {', '.join(names) or 'none found'}; --seed {seed}")

    used = [op for op in OPERATORS if {*op.sections()} & {*sections} or (kernels and op.kernels)]
    try:
        click.echo(f"{measure.check(used, names, seed)} results checked, all right")
        result["floor"] = timing.floor_us(replays)
        for operator in used:
            if operator.section in sections:
                contenders = operator.contenders(names)
                click.echo(f"timing {operator.section}: {', '.join(contenders)}")
                result[operator.section] = measure.time_cases(
                    operator, operator.cases, contenders, seed, replays, more=True
                )
        for operator in used:
            if (sweep := operator.sweep) and sweep.section in sections:
                click.echo(f"timing {sweep.section}")
                result[sweep.section] = measure.time_cases(
                    operator, sweep.cases, operator.contenders(names), seed, FEW_REPLAYS
                )
        for operator in used:
            if kernels and operator.kernels:
                click.echo(f"timing {operator.kernels.section}")
                result[operator.kernels.section] = measure.time_kernels(operator, seed, FEW_REPLAYS)
        for operator in used:
            if (host := operator.host) and host.section in sections:
                result[host.section] = timing.host_us(host.calls(operator.contenders(names), seed))
    except base.WrongResultError as error:
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


def draw(result: dict[str, Any], out: Path) -> dict[str, Path]:
    """Write a picture of every sweep there is, beside the JSON file, and return them by section."""
    swept = [(op, op.sweep) for op in OPERATORS if op.sweep and result.get(op.sweep.section)]
    if swept and importlib.util.find_spec("matplotlib") is None:
        click.echo("no plot: matplotlib is not installed (the extra `bench` brings it)")
        return {}
    from . import plot

    written = {}
    for operator, sweep in swept:
        path = written[sweep.section] = out.with_name(out.stem + sweep.ending)
        plot.draw(operator, sweep, result, path)
        click.echo(f"wrote {path}")
    return written


def pages(result: dict[str, Any], plots: dict[str, Path]) -> dict[Path, str]:
    """What the page of all tables and the README have to say, with those plots that are in the repository."""
    everything, readme = ROOT / report.PAGE, ROOT / "README.md"
    inside = {
        section: path.resolve() for section, path in plots.items() if path.resolve().is_relative_to(ROOT)
    }

    def seen_from(page: Path) -> dict[str, str]:
        return {name: Path(os.path.relpath(path, page.parent)).as_posix() for name, path in inside.items()}

    part = report.readme_section(OPERATORS, result, seen_from(readme))
    return {
        everything: report.page(OPERATORS, result, seen_from(everything)),
        readme: report.replace_section(readme.read_text(), part),
    }


def _rounded(value: Any) -> Any:
    """Figures to a nanosecond, which is far below their noise, so that the file can be read."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main(prog_name="scripts/bench")
