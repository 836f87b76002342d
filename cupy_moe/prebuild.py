"""Fill a folder with images ahead of time, and check, describe and clean such folders. No GPU, no torch."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from . import build, cache
from ._version import __version__
from .errors import CupyMoeError

MANIFEST = "manifest.json"
_ORPHAN_AGE = 3600  # seconds after which a temporary file belongs to a writer that was killed


@dataclass(frozen=True)
class Result:
    target: str
    unit: str
    status: str  # "up to date", "missing", "built" or "failed"
    size: int = 0
    ms: float = 0.0
    kernels: build.Kernels = field(default_factory=dict)
    error: str = ""


def default_folder() -> cache.Root:
    """Where `prebuild` writes: the checkout's `cache/`, which wheels are built from; else the user cache."""
    if checkout := build.checkout():
        return cache.Root(checkout / "cache", "checkout")
    root, why = cache.locate_user_root()
    if root is None:
        raise CupyMoeError(f"there is no user cache to write to ({why}); name a folder with --out")
    return root


def state(root: Path, unit: build.Unit, target: str) -> Result:
    """Whether a folder holds a unit for a target, whatever compiler made it. Needs no NVRTC."""
    for sidecar, entry in cache.entries(root, target, unit.name):
        if entry and entry.source_digest == unit.digest:
            try:
                cache.read(sidecar, entry)
            except cache.DamagedEntryError:
                continue
            return Result(target, unit.name, "up to date", entry.size, kernels=entry.kernels)
    return Result(target, unit.name, "missing")


def run(root: cache.Root, work: list[tuple[build.Unit, str]], jobs: int) -> Iterator[Result]:
    """Compile and publish every (unit, target), `jobs` at a time (NVRTC runs without the GIL). Results come
    as they are ready; a failure is one of them, not an exception."""

    def make(unit: build.Unit, target: str) -> Result:
        start = time.perf_counter()
        try:
            image = cache.compile_image(unit, target)
            cache.publish(root, image)
        except (CupyMoeError, OSError) as error:
            return Result(target, unit.name, "failed", error=str(error))
        ms = (time.perf_counter() - start) * 1e3
        return Result(target, unit.name, "built", image.entry.size, ms, image.entry.kernels)

    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(make, unit, target) for unit, target in work]):
            yield future.result()


def sweep(
    root: Path, targets: str, unwanted: Callable[[cache.Entry], bool], dry_run: bool = False
) -> tuple[int, int]:
    """Remove images that are unwanted or without a valid entry, and what killed writers left; nothing that is
    not named as our files are. Returns how many files, and their bytes."""
    doomed = []
    known = {sidecar.with_suffix(""): entry for sidecar, entry in cache.entries(root, targets)}
    for path in cache.find(root, f"{targets}/*"):
        if path.name.startswith(cache.TEMPORARY):
            if time.time() - path.stat().st_mtime > _ORPHAN_AGE:
                doomed.append(path)
        elif path.match(f"*-{cache.KEY}.*"):
            entry = known.get(path.with_suffix(""))
            if entry is None or unwanted(entry):
                doomed.append(path)
    size = sum(path.stat().st_size for path in doomed)
    if not dry_run:
        for path in sorted(doomed, key=lambda path: path.suffix != ".json"):  # the entry before its image
            path.unlink(missing_ok=True)
    return len(doomed), size


def finish(root: Path, target: str) -> str:
    """Leave one fresh image per unit in a prebuilt folder, as a wheel should carry it, and write its
    manifest. Returns the sha256 of the manifest."""
    units = build.units()
    newest: dict[str, tuple[float, str]] = {}
    for sidecar, entry in cache.entries(root, target):
        if entry and entry.unit in units and entry.source_digest == units[entry.unit].digest:
            newest[entry.unit] = max(newest.get(entry.unit, (0, "")), (sidecar.stat().st_mtime, entry.stem))
    kept = {stem for _, stem in newest.values()}
    sweep(root, target, lambda entry: entry.stem not in kept)
    files = {
        entry.stem + cache.suffix(target): entry.sha256 for _, entry in cache.entries(root, target) if entry
    }
    manifest = {"schema": build.SCHEMA, "target": target, "package": __version__, "files": files}
    data = cache.to_json(manifest)
    cache.write_file(root / cache.LAYOUT / target / MANIFEST, data)
    return hashlib.sha256(data).hexdigest()


def problems(root: cache.Root, strict: bool) -> list[str]:
    """What is wrong with a folder: damaged images and, in a strict look, also stale and missing ones."""
    found = []
    units = build.units()
    present: dict[str, set[str]] = {}
    for sidecar, entry in cache.entries(root.path):
        if entry is None:
            found.append(f"{sidecar}: cannot be understood")
            continue
        try:
            cache.read(sidecar, entry)
        except cache.DamagedEntryError as error:
            found.append(f"{sidecar.with_suffix(cache.suffix(entry.target))}: {error}")
            continue
        fresh = entry.unit in units and units[entry.unit].digest == entry.source_digest
        if fresh:
            present.setdefault(entry.target, set()).add(entry.unit)
        elif strict:
            what = cache.changed_files(entry, units[entry.unit]) if entry.unit in units else "no such kernel"
            found.append(f"{sidecar}: stale ({what})")
    for manifest in cache.find(root.path, f"*/{MANIFEST}"):
        try:
            files = dict(json.loads(manifest.read_bytes())["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            found.append(f"{manifest}: cannot be read ({error!r})")
            continue
        present.setdefault(manifest.parent.name, set())
        for name, sha256 in files.items():
            path = manifest.parent / name
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                found.append(f"{path}: missing, or not what the manifest lists")
    if strict:
        if not present:
            found.append(f"{root.path}: holds no usable image")
        for target, names in sorted(present.items()):
            found.extend(f"{root.path}: no {name} for {target}" for name in sorted(set(units) - names))
    return found
