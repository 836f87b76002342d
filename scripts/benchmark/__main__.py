"""`scripts/bench`: check, time, report."""

from __future__ import annotations

import copy
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
from .base import Operator, Picture

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
@click.option(
    "--cases", multiple=True, metavar="TEXT",
    help='Only sizes with this in their words, such as "Mixtral" or ", 64 tokens"; may be repeated.',
)  # fmt: skip
@click.option("--kernels", is_flag=True, help="Also each kernel of ours by itself, where they can be forced.")
@click.option(
    "--peers", "peers_folder", type=FOLDER, help="Loads other libraries by its load.py; default: installed."
)
@click.option(
    "--experts-peers", "experts_folder", type=FOLDER,
    help="Loads whole layers of other libraries by its experts_peers.py, beside those of --peers.",
)  # fmt: skip
@click.option("--seed", type=int, help="Of the random inputs; default: another one each time.")
@click.option(
    "--out", type=FILE, help="JSON, plots go beside it; default for all sections: in scripts/results."
)
@click.option(
    "--from", "sources", type=FILE, multiple=True,
    help="Measure nothing: report what this JSON file holds; of several, later ones replace rows of earlier.",
)  # fmt: skip
@click.option("--readme", is_flag=True, help=f"Rewrite {report.PAGE}, and README.md's part on speed.")
def main(
    quick: bool, only: tuple[str, ...], cases: tuple[str, ...], kernels: bool, peers_folder: Path | None,
    experts_folder: Path | None, seed: int | None, out: Path | None, sources: tuple[Path, ...], readme: bool,
) -> None:  # fmt: skip
    """Compare operators with their specification, then time them beside vLLM's and SGLang's.

    Fails, and times nothing, if any result of ours is wrong; peers that are wrong are left out.
    """
    for source in sources:
        if not source.exists():
            raise click.BadParameter(f"there is no {source}", param_hint="--from")
    if peers_folder and not (peers_folder / "load.py").is_file():
        raise click.BadParameter(f"{peers_folder} has no load.py", param_hint="--peers")
    if experts_folder and not (experts_folder / "experts_peers.py").is_file():
        raise click.BadParameter(f"{experts_folder} has no experts_peers.py", param_hint="--experts-peers")
    sections = only or (QUICK if quick else SECTIONS)
    if sources:
        result = merged([json.loads(source.read_text()) for source in sources])
    else:
        if base.device == "cuda" and not torch.cuda.is_available():
            raise click.ClickException("torch sees no CUDA GPU here")
        found = peers.load(peers_folder)
        if experts_folder and not found:
            raise click.ClickException("--experts-peers: these need vLLM's or SGLang's library, by --peers")
        if experts_folder:
            found = peers.load_experts(experts_folder, found)
        result = run(sections, cases, kernels, found, seed, FEW_REPLAYS if quick else REPLAYS)
        if out is None and sections == SECTIONS and not cases:
            name = result["environment"]["gpu"].removeprefix("NVIDIA ").lower().replace(" ", "-")
            out = ROOT / "scripts" / "results" / f"{name}.json"
    click.echo(f"\n{report.conditions(result)} {report.floor(result)}")
    for operator in OPERATORS:
        for table in report.tables(operator, result):
            click.echo(table.text())
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(_rounded(result), indent=1) + "\n")
        click.echo(f"\nwrote {out}")
    elif len(sources) == 1:
        out = sources[0]
    plots = draw(result, out) if out else {}
    if readme:
        for path, text in pages(result, plots).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            click.echo(f"wrote {path}")


def run(
    sections: tuple[str, ...], cases: tuple[str, ...], kernels: bool, found: dict[str, str],
    seed: int | None, replays: int,
) -> dict[str, Any]:  # fmt: skip
    seed = secrets.randbelow(2**31) if seed is None else seed
    used = [op for op in OPERATORS if {*op.sections()} & {*sections} or (kernels and op.kernels)]
    for operator in used:
        found = {**found, **operator.libraries()}
    names, failures = list(found), measure.Failures()
    result: dict[str, Any] = {"format": FORMAT, "environment": environment(found), "seed": seed}
    click.echo(f"peers: {', '.join(names) or 'none found'}; --seed {seed}")

    for operator in used:
        if not operator.contenders(names):
            click.echo(f"left out: {operator.section}: there is no library to run it with")
    used = [_narrowed(operator, cases) for operator in used if operator.contenders(names)]
    try:
        click.echo(f"{measure.check(used, names, seed, failures)} results checked, all right")
        result["floor"] = timing.floor_us(replays)
        for operator in used:
            if operator.section in sections and operator.cases:
                contenders = operator.contenders(names)
                click.echo(f"timing {operator.section}: {', '.join(contenders)}")
                result[operator.section] = measure.time_cases(
                    operator, operator.cases, contenders, failures, seed, replays, more=True
                )
        for operator in used:
            if (sweep := operator.sweep) and sweep.section in sections:
                click.echo(f"timing {sweep.section}")
                contenders = failures.without(operator, operator.contenders(names))
                result[sweep.section] = measure.time_cases(
                    operator, sweep.cases, contenders, failures, seed, FEW_REPLAYS
                )
        for operator in used:
            if kernels and operator.kernels:
                click.echo(f"timing {operator.kernels.section}")
                result[operator.kernels.section] = measure.time_kernels(operator, seed, FEW_REPLAYS)
        for operator in used:
            if (host := operator.host) and host.section in sections:
                contenders = failures.without(operator, operator.contenders(names))
                result[host.section] = timing.host_us(host.calls(contenders, seed))
    except base.WrongResultError as error:
        raise click.ClickException(str(error)) from error
    return result


def _narrowed(operator: Operator, words: tuple[str, ...]) -> Operator:
    """The operator with only those cases that have one of the words."""
    if not words:
        return operator
    narrowed = copy.copy(operator)
    sizes = [operator.size.format_map(case._asdict()) for case in operator.cases]
    narrowed.cases = [
        case for case, size in zip(operator.cases, sizes, strict=True) if any(word in size for word in words)
    ]
    return narrowed


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several runs on GPUs of one kind; what is in two of them is that of the later one."""
    gpus = {result["environment"]["gpu"] for result in results}
    if len(gpus) > 1:
        raise click.ClickException(f"--from: figures of {' and '.join(sorted(gpus))} cannot be merged")
    whole: dict[str, Any] = {}
    for result in results:
        for section, part in result.items():
            if section not in whole:
                whole[section] = part
            elif section == "environment":
                whole[section] = _merged_environment(whole[section], part)
            elif isinstance(part, list):
                rows = {_size(row): row for row in (*whole[section], *part)}
                whole[section] = list(rows.values())
            else:
                whole[section] = {**whole[section], **part} if isinstance(part, dict) else part
    return whole


def _size(row: base.Row) -> tuple[Any, ...]:
    return tuple(value for field, value in row.items() if field not in ("us", "errors", "target_us"))


def _merged_environment(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both values of what differs, and the peers of either."""
    both = {
        key: value if value in first[key] else f"{first[key]} and {value}"
        for key, value in second.items()
        if key != "peers"
    }
    known = {name: version for name, version in second["peers"].items() if version}
    return {**both, "peers": {**second["peers"], **first["peers"], **known}}


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


def pictures(result: dict[str, Any], out: Path) -> dict[Path, Picture]:
    """Those of all that was measured, and that they are written beside the JSON file."""
    every = (picture for operator in OPERATORS for picture in operator.pictures)
    return {out.with_name(out.stem + p.ending): p for p in every if result.get(p.section)}


def draw(result: dict[str, Any], out: Path) -> dict[str, Path]:
    """Write all pictures, and return them by their ending."""
    found = pictures(result, out)
    if found and importlib.util.find_spec("matplotlib") is None:
        click.echo("no plot: matplotlib is not installed (the extra `bench` brings it)")
        return {}
    for path, picture in found.items():
        picture.draw(result[picture.section], result, path)
        click.echo(f"wrote {path}")
    return {picture.ending: path for path, picture in found.items()}


def pages(result: dict[str, Any], plots: dict[str, Path]) -> dict[Path, str]:
    """What the page of all tables and the README have to say, with those plots that are in the repository."""
    everything, readme = ROOT / report.PAGE, ROOT / "README.md"
    inside = {ending: path.resolve() for ending, path in plots.items() if path.resolve().is_relative_to(ROOT)}

    def seen_from(page: Path) -> dict[str, str]:
        return {name: Path(os.path.relpath(path, page.parent)).as_posix() for name, path in inside.items()}

    part = report.readme_section(OPERATORS, result, seen_from(readme))
    return {
        everything: report.page(OPERATORS, result, seen_from(everything)),
        readme: report.replace_section(readme.read_text(), part),
    }


def _rounded(value: Any) -> Any:
    """Figures to a nanosecond, which is far below their noise, so that the file can be read; small ones to
    three digits."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return round(value, 3) if value >= 0.1 else float(f"{value:.3g}")
    return value


if __name__ == "__main__":
    main(prog_name="scripts/bench")
