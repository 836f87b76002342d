"""The command line. No command but `demo` imports torch; only `prebuild` and `doctor` load CuPy and NVRTC.

Data goes to stdout, everything else to stderr. Exit 0 is success, 1 a failure, 2 wrong usage, 130 an
interrupt.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import click

from .. import config
from .._version import __version__
from ..errors import ConfigError, CupyMoeError
from ..images import compiler, folders, prebuild, sources, store
from ..images.folders import Root
from ..images.targets import PTX_TARGET, TARGETS, made_for, parse_target


class _Main(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise click.UsageError(str(error)) from error
        except BrokenPipeError:
            raise  # click's own affair
        except (CupyMoeError, OSError) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            _leave()


def _leave() -> NoReturn:
    """Exit at once: a thread in NVRTC cannot be stopped, and `sys.exit` would wait for it."""
    click.echo("\ninterrupted; what is done is valid", err=True)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(130)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cupy-moe")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Kernels of MoE layers for NVIDIA GPUs: build them ahead of time, and see what is built."""
    if config.plain_terminal():
        ctx.color = False


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _print(value: dict[str, Any], as_json: bool, text: str) -> None:
    click.echo(json.dumps({"schema": sources.SCHEMA, **value}, indent=1, default=str) if as_json else text)


def _table(head: list[str], rows: list[list[Any]]) -> str:
    cells = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def _size(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


# ---- prebuild -------------------------------------------------------------------------------------------


def _completes(values: Callable[[], list[str]]) -> Callable[..., list[str]]:
    """What a shell offers for an option."""
    return lambda ctx, param, incomplete: [value for value in values() if value.startswith(incomplete)]


def _known_targets() -> list[str]:
    return [*TARGETS, PTX_TARGET]


class _Folder(click.Path):
    """Not "": an unset variable of a shell script means no folder, and least of all the current one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the name of the folder is empty", param, ctx)
        return super().convert(value, param, ctx)


def _parse_arch(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    try:
        return None if value is None else parse_target(value)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from None


def _targets(names: tuple[str, ...], ptx: bool, offline: bool) -> list[str]:
    targets: list[str] = []
    for name in names:
        if name == "all":
            targets += TARGETS if offline else compiler.supported_targets()
        elif name == "native":
            targets += [_native()]
        else:
            try:
                targets.append(parse_target(name))
            except ConfigError as error:
                raise click.BadParameter(f"{error}, all, native", param_hint="--arch") from None
    return list(dict.fromkeys([*targets, *([PTX_TARGET] if ptx else [])]))


def _native() -> str:
    from .._cupy import cupy

    try:
        return parse_target(cupy.cuda.Device().compute_capability)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise click.BadParameter(f"native: no GPU here ({error})", param_hint="--arch") from None


@main.command("prebuild")
@click.option(
    "--arch",
    multiple=True,
    required=True,
    metavar="ARCH",
    help="sm_90, 9.0, all, native; repeat.",
    shell_complete=_completes(lambda: [*_known_targets(), "all", "native"]),
)
@click.option("--out", type=_Folder(file_okay=False, path_type=Path), help="Folder to write to.")
@click.option(
    "--kernel",
    "names",
    multiple=True,
    help="Only this file of kernels_cu/ (without .cu); repeat.",
    shell_complete=_completes(lambda: list(sources.units())),
)
@click.option("--ptx/--no-ptx", help=f"Also {PTX_TARGET}, for GPUs newer than every cubin.")
@click.option("--jobs", "-j", type=click.IntRange(1), default=os.cpu_count, help="How many at once.")
@click.option("--force", is_flag=True, help="Compile again what is up to date.")
@click.option("--check", is_flag=True, help="Build nothing; exit 1 if anything is missing or stale.")
@click.option("--dry-run", is_flag=True, help="Build nothing; show what would be built.")
@click.option("--verbose", "-v", is_flag=True, help="Show registers, spills and shared memory.")
@as_json
def prebuild_command(
    arch: tuple[str, ...],
    out: Path | None,
    names: tuple[str, ...],
    ptx: bool,
    jobs: int,
    force: bool,
    check: bool,
    dry_run: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Compile kernels for GPUs that need not be here.

    Needs NVRTC, but no GPU, no nvcc and no network. Without --out, writes to the checkout's cache/ or, if the
    package is installed, to the user cache. Ship the folder and set CUPY_MOE_PREBUILT_DIR to it.
    """
    units = sources.units()
    if not units:
        raise click.ClickException(f"there are no kernel sources in {sources.source_folder()}")
    if unknown := set(names) - set(units):
        message = f"unknown kernel {', '.join(unknown)}; there are: {', '.join(units)}"
        raise click.BadParameter(message, param_hint="--kernel")
    build_nothing = check or dry_run
    chosen = [units[name] for name in names or units]
    asked = _targets(arch, ptx, offline=build_nothing)
    wanted = [(unit, target) for name in asked for unit in chosen for target in made_for(unit.targets, name)]
    root = Root(out.absolute(), "prebuilt") if out else prebuild.own_folder()
    # Where there is no folder to fill, what a look-up finds anywhere need not be made.
    roots = [root] if root else folders.in_use()
    results = [prebuild.state(roots, unit, target) for unit, target in wanted]
    manifests: dict[str, str] = {}
    if not build_nothing:
        todo = [pair for pair, r in zip(wanted, results, strict=True) if force or r.status == "missing"]
        if todo:
            root = root or prebuild.default_folder()
            built = {(r.target, r.unit): r for r in _build(root, todo, jobs)}
            results = [built.get((r.target, r.unit), r) for r in results]
        if root and root.origin != "user":  # which other versions may share
            manifests = _finish(root, results)
    _report(root, results, manifests, verbose, as_json)
    statuses = {result.status for result in results}
    if "failed" in statuses or (check and "missing" in statuses):
        sys.exit(1)


def _build(root: Root, todo: list[tuple[sources.Unit, str]], jobs: int) -> list[prebuild.Result]:
    results = []
    running = prebuild.run(root, todo, jobs)
    if sys.stderr.isatty() and not config.plain_terminal():
        with click.progressbar(running, length=len(todo), label="compiling", file=sys.stderr) as bar:
            return list(bar)
    for result in running:
        click.echo(f"{result.target} {result.unit}: {result.status} ({result.ms:.0f} ms)", err=True)
        results.append(result)
    return results


def _finish(root: Root, results: list[prebuild.Result]) -> dict[str, str]:
    """The manifests' sha256. A target of which a kernel failed keeps what it had."""
    manifests = {}
    for target in dict.fromkeys(result.target for result in results):
        statuses = {result.status for result in results if result.target == target}
        if "failed" in statuses:
            continue
        try:
            if digest := prebuild.finish(root, target):
                manifests[target] = digest
        except OSError as error:
            if "built" in statuses:  # else all was there, and the folder may well be read-only
                raise prebuild.cannot_write(f"the manifest of {target}", root, error) from error
    return manifests


def _report(
    root: Root | None,
    results: list[prebuild.Result],
    manifests: dict[str, str],
    verbose: bool,
    as_json: bool,
) -> None:
    rows = [[r.target, r.unit, r.status, len(r.kernels), _size(r.size), f"{r.ms:.0f} ms"] for r in results]
    lines = [_table(["target", "unit", "status", "kernels", "size", "time"], rows)]
    if verbose:
        figures = [
            [r.target, name, *(figure.get(key, "-") for key in ("regs", "spill", "stack", "smem"))]
            for r in results
            for name, figure in r.kernels.items()
        ]
        lines += ["", _table(["target", "kernel", "registers", "spill", "stack", "shared"], figures)]
    lines += [f"\n{r.error}" for r in results if r.error]
    lines += ["", *(f"{target} manifest sha256 {digest}" for target, digest in manifests.items())]
    where = root.path if root else "the folders of a look-up, which `cupy-moe show-config` lists"
    lines.append(f"{_size(sum(r.size for r in results))} in {where}")
    value = {"out": root and root.path, "results": [asdict(r) for r in results], "manifests": manifests}
    _print(value, as_json, "\n".join(lines))


# ---- look and clean -------------------------------------------------------------------------------------


def _roots() -> list[Root]:
    user = folders.user_root()
    return [*folders.prebuilt_roots(), *([user] if user and os.path.isdir(user.path) else [])]


def _arch_option(text: str) -> Callable[[Any], Any]:
    completes = _completes(_known_targets)
    return click.option("--arch", metavar="ARCH", callback=_parse_arch, help=text, shell_complete=completes)


@main.command("list")
@_arch_option("Only this architecture.")
@as_json
def list_command(arch: str | None, as_json: bool) -> None:
    """Show every image in every folder, in the order of their lookup."""
    images = [
        {"origin": root.origin, "sidecar": path, **_describe(folder, path, sidecar)}
        for root in _roots()
        for folder in root.opened(arch)
        for path, sidecar in store.sidecars(folder)
    ]
    head = ["origin", "state", "target", "unit", "nvrtc", "kernels", "size"]
    rows = [[*(i[key] for key in head[:5]), len(i["kernels"]), _size(i["size"])] for i in images]
    text = _table(head, rows) if rows else "no images; cupy-moe prebuild makes some"
    _print({"images": images}, as_json, text)


def _describe(folder: folders.Folder, path: Path, sidecar: store.Sidecar | str) -> dict[str, Any]:
    unknown = {"target": folder.path.name, "unit": path.stem, "kernels": {}, "size": 0, "nvrtc": ""}
    if isinstance(sidecar, str):
        return {**unknown, "state": "damaged", "problem": sidecar}
    try:
        store.read(folder, sidecar)
    except store.DamagedEntryError as error:
        return {**asdict(sidecar), "state": "damaged", "problem": str(error)}
    unit = sources.units().get(sidecar.unit)
    return {**asdict(sidecar), "state": "fresh" if unit and unit.digest == sidecar.source_digest else "stale"}


@main.command("verify")
@click.argument("path", required=False, type=_Folder(exists=True, file_okay=False, path_type=Path))
@click.option("--strict", is_flag=True, help="Prebuilt folders must also be complete and up to date.")
@as_json
def verify_command(path: Path | None, strict: bool, as_json: bool) -> None:
    """Check images: sha256, architecture, kernels, manifest, (--strict) sources; exit 1 if one is wrong."""
    roots = [Root(path.absolute(), "prebuilt")] if path else _roots()
    found = [text for root in roots for text in prebuild.problems(root, strict and root.origin != "user")]
    if strict and not any(root.origin != "user" for root in roots):
        found.append("there is no prebuilt folder")
    images = sum(1 for root in roots for folder in root.opened() for _ in store.sidecars(folder))
    summary = f"{images} images in {len(roots)} folders, {len(found)} problems"
    value = {"images": images, "folders": [root.path for root in roots], "problems": found}
    _print(value, as_json, "\n".join([*found, summary]))
    if found:
        sys.exit(1)


@main.command("clean")
@click.option("--stale", is_flag=True, help="What no kernel of this version uses (the default).")
@click.option("--all", "everything", is_flag=True, help="Every image.")
@_arch_option("Every image of this architecture.")
@click.option("--dry-run", is_flag=True, help="Remove nothing; show how much it would be.")
@as_json
def clean_command(stale: bool, everything: bool, arch: str | None, dry_run: bool, as_json: bool) -> None:
    """Remove images from the user cache; prebuilt folders are never touched."""
    if stale + everything + (arch is not None) > 1:
        raise click.UsageError("--stale, --all and --arch exclude each other")
    digests = {unit.digest for unit in sources.units().values()}

    def is_unwanted(sidecar: store.Sidecar | None) -> bool:
        return (
            everything or arch is not None or (sidecar is not None and sidecar.source_digest not in digests)
        )

    root, why = folders.locate_user_root()
    files, size = prebuild.sweep(root, arch, is_unwanted, dry_run) if root else (0, 0)
    verb = "would remove" if dry_run else "removed"
    text = f"{verb} {files} files, {_size(size)}, from {root.path if root else f'nowhere ({why})'}"
    _print({"path": root and root.path, "files": files, "bytes": size, "dry_run": dry_run}, as_json, text)


# ---- environment ----------------------------------------------------------------------------------------


@main.command("path")
@click.option("--prebuild", "of_prebuild", is_flag=True, help="Instead, where prebuild writes without --out.")
@as_json
def path_command(of_prebuild: bool, as_json: bool) -> None:
    """Print the folder of the user cache."""
    root, why = (prebuild.default_folder(), "") if of_prebuild else folders.locate_user_root()
    if root is None:
        raise click.ClickException(f"there is no user cache ({why})")
    _print({"path": root.path}, as_json, str(root.path))


@main.command("show-config")
@as_json
def show_config_command(as_json: bool) -> None:
    """Show folders, digests, versions and environment variables, and why each folder is the one used."""
    user, why = folders.locate_user_root()
    distributions = ("cupy-cuda12x", "cupy-cuda13x", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc", "torch")
    value: dict[str, dict[str, Any]] = {
        "folders": {
            "kernel sources": sources.source_folder(),
            **{f"prebuilt {n}": f"{r.path} ({r.origin})" for n, r in enumerate(folders.prebuilt_roots(), 1)},
            "user cache": f"{user.path if user else None} ({why})",
        },
        "kernels": {name: unit.digest[:16] for name, unit in sources.units().items()},
        "packages": {"cupy-moe": __version__, **{n: compiler.installed_version(n) for n in distributions}},
        "environment": {name: os.environ.get(name) for name in config.VARIABLES},
    }
    lines = [
        line for title, pairs in value.items() for line in (title, *(f"  {k}: {pairs[k]}" for k in pairs))
    ]
    meanings = [f"  {name}: {meaning}" for name, meaning in config.VARIABLES.items()]
    _print(value, as_json, "\n".join([*lines, "variables", *meanings]))


@main.command("doctor")
@click.option("--gpu", is_flag=True, help="Also load every kernel on every GPU.")
@as_json
def doctor_command(gpu: bool, as_json: bool) -> None:
    """Check that kernels can be found, compiled and kept here, and say how to repair what is not right."""
    from .doctor import examine

    checks = examine(gpu)
    text = "\n".join(
        f"{c.status:4}  {c.subject}: {c.finding}" + (f"\n      -> {c.fix}" if c.fix else "") for c in checks
    )
    _print({"checks": [asdict(check) for check in checks]}, as_json, text)
    if any(check.status == "FAIL" for check in checks):
        sys.exit(1)


@main.command("demo")
@click.option("--tokens", default=4096, show_default=True, type=click.IntRange(1, 2**17))
@click.option("--topk", default=2, show_default=True, type=click.IntRange(1, 64))
@click.option("--experts", default=64, show_default=True, type=click.IntRange(1, 4096))
@click.option("--block-size", default=128, show_default=True, type=click.IntRange(1, 4096))
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cuda", "cpu"]))
def demo_command(**arguments: Any) -> None:
    """Group routed tokens by expert, and show what comes out (imports torch).

    First the example of the documentation, then a routing as skewed as real ones: on the GPU where there is
    one, else on the CPU.
    """
    try:
        from . import demo
    except ImportError as error:
        raise click.ClickException(f"the demo needs torch ({error}); pip install torch") from error
    demo.run(**arguments)
