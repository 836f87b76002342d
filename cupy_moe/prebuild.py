"""Fill a folder with images ahead of time, and check, describe and clean such folders. No GPU, no torch."""

from __future__ import annotations

import contextlib
import hashlib
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

from . import build, config, folders, store
from ._version import __version__
from .errors import CupyMoeError
from .folders import Folder, Root
from .store import DamagedEntryError, Entry

MANIFEST = "manifest.json"
_ORPHAN_AGE = 3600  # seconds after which a file without a sidecar belongs to a writer that was killed


@dataclass(frozen=True)
class Result:
    target: str
    unit: str
    status: str  # "up to date", "missing", "built" or "failed"
    size: int = 0
    ms: float = 0.0
    kernels: build.Kernels = field(default_factory=dict)
    error: str = ""


def own_folder() -> Root | None:
    """The checkout's `cache/`, which wheels are built from."""
    checkout = build.checkout()
    return Root(checkout / "cache", "checkout") if checkout else None


def default_folder() -> Root:
    """Where `prebuild` writes: to a folder of its own, else to the user cache."""
    if root := own_folder():
        return root
    user, why = folders.locate_user_root()
    if user is None:
        raise CupyMoeError(f"there is no user cache to write to ({why}); name a folder with --out")
    return user


# ---- build ----------------------------------------------------------------------------------------------


def state(roots: list[Root], unit: build.Unit, target: str) -> Result:
    """Whether a look-up would take a unit for a target from these roots and not compile. Needs no NVRTC."""
    for root in roots:
        chooses = root.origin == "user" and config.may_compile()
        installed = build.installed_nvrtc() if chooses else None
        for folder in root.opened(target):
            for _, entry in store.entries(folder, unit.name):
                if isinstance(entry, str) or entry.source_digest != unit.digest:
                    continue
                if installed and entry.nvrtc not in installed:
                    continue
                with contextlib.suppress(DamagedEntryError):
                    store.read(folder, entry)
                    return Result(target, unit.name, "up to date", entry.size, kernels=entry.kernels)
    return Result(target, unit.name, "missing")


def run(root: Root, work: list[tuple[build.Unit, str]], jobs: int) -> Iterator[Result]:
    """Compile every (unit, target), `jobs` at a time (NVRTC runs without the GIL), and publish what is ready.

    A kernel that does not compile is a result like any other; a folder that cannot be written, and an NVRTC
    that cannot be loaded, are the end: CupyMoeError. Threads compile and the caller's publishes, so that an
    interrupt leaves no file half written, and loses no more than what the threads are at.
    """
    build.toolchain()  # loads NVRTC, or says once why not
    pool = ThreadPoolExecutor(jobs)
    try:
        pairs = {pool.submit(_compile, *pair): pair for pair in work}
        for future in as_completed(pairs):
            unit, target = pairs[future]
            try:
                image, ms = future.result()
            except CupyMoeError as error:
                yield Result(target, unit.name, "failed", error=str(error))
                continue
            try:
                store.publish(root, image)
            except OSError as error:
                raise cannot_write(f"{unit.name} for {target}", root, error) from error
            yield Result(target, unit.name, "built", image.entry.size, ms, image.entry.kernels)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _compile(unit: build.Unit, target: str) -> tuple[store.Image, float]:
    start = time.perf_counter()
    return store.compile_image(unit, target), (time.perf_counter() - start) * 1e3


def cannot_write(what: str, root: Root, error: OSError) -> CupyMoeError:
    return CupyMoeError(
        f"{what} cannot be written to {root.path} ({error.strerror}); make room or get write access there,"
        " or name another folder with --out"
    )


def finish(root: Root, target: str) -> str | None:
    """Leave one fresh image per unit in a prebuilt folder, as a wheel should carry it, and its manifest.

    Returns the sha256 of the manifest, or None: there is one only where there is every unit. Writes nothing
    that is there already, as the folder may be read-only. Raises OSError.
    """
    units = build.units()
    newest: dict[str, tuple[float, Entry]] = {}
    for folder in root.opened(target):
        for path, entry in store.entries(folder):
            if isinstance(entry, str) or entry.unit not in units:
                continue
            if entry.source_digest == units[entry.unit].digest:
                with contextlib.suppress(DamagedEntryError, FileNotFoundError):
                    store.read(folder, entry)
                    made = folder.status(path.name).st_mtime
                    if made >= newest.get(entry.unit, (0.0, entry))[0]:
                        newest[entry.unit] = made, entry
    kept = {entry.stem: entry for _, entry in newest.values()}
    sweep(root, target, lambda entry: entry is not None and entry.stem not in kept)

    files = {stem + store.suffix(target): entry.sha256 for stem, entry in kept.items()}
    data = store.to_json({"schema": build.SCHEMA, "target": target, "package": __version__, "files": files})
    complete = bool(units) and newest.keys() == units.keys()
    for folder in root.opened(target):
        if not complete:
            with contextlib.suppress(FileNotFoundError):
                folder.remove(MANIFEST)
        elif not _holds(folder, MANIFEST, data):
            folder.write(MANIFEST, data)
    return hashlib.sha256(data).hexdigest() if complete else None


def _holds(folder: Folder, name: str, data: bytes) -> bool:
    try:
        return folder.read(name, store.MAX_TEXT) == data
    except OSError:
        return False


# ---- clean and check ------------------------------------------------------------------------------------


def sweep(
    root: Root, target: str | None, unwanted: Callable[[Entry | None], bool], dry_run: bool = False
) -> tuple[int, int]:
    """Remove unwanted images, what is damaged, and what killed writers left; nothing that is not named as
    our files are. Returns how many files, and their bytes.

    An image without a valid sidecar may be that of a writer who comes to the sidecar next, and so is left
    alone for an hour, unless `unwanted(None)`.
    """
    files = size = 0
    for folder in root.opened(target):
        known = {path.stem: entry for path, entry in store.entries(folder)}
        for name in sorted(folder.names(), key=lambda name: not name.endswith(".json")):  # an entry first
            try:
                status = folder.status(name)
                is_old = time.time() - status.st_mtime > _ORPHAN_AGE
                if stat.S_ISDIR(status.st_mode) or not _is_doomed(name, is_old, known, unwanted):
                    continue
                if not dry_run:
                    folder.remove(name)
            except FileNotFoundError:
                continue  # somebody else is cleaning
            files, size = files + 1, size + status.st_size
    return files, size


def _is_doomed(
    name: str, is_old: bool, known: dict[str, Entry | str], unwanted: Callable[[Entry | None], bool]
) -> bool:
    match = store.FILE.fullmatch(name)
    if not match:
        return name.startswith(folders.TEMPORARY) and is_old
    entry = known.get(match["stem"])
    if isinstance(entry, Entry):
        return unwanted(entry)
    return match["suffix"] == ".json" or is_old or unwanted(None)


def problems(root: Root, strict: bool) -> list[str]:
    """What is wrong with a folder: damaged images and, in a strict look, also stale and missing ones."""
    found: list[str] = []
    units = build.units()
    present: dict[str, set[str]] = {}
    for folder in root.opened(
        report=lambda error: found.append(f"{error.filename}: {folders.explain(error)}")
    ):
        target = folder.path.name
        for path, entry in store.entries(folder):
            if isinstance(entry, str):
                found.append(f"{path}: {entry}")
            elif problem := _problem(folder, entry):
                found.append(f"{path.with_suffix(store.suffix(target))}: {problem}")
            elif entry.unit in units and units[entry.unit].digest == entry.source_digest:
                present.setdefault(target, set()).add(entry.unit)
            elif strict:
                known = entry.unit in units
                what = store.changed_files(entry, units[entry.unit]) if known else "no such kernel"
                found.append(f"{path}: stale ({what})")
        try:
            listed = _read_manifest(folder)
        except DamagedEntryError as error:
            found.append(f"{folder.path / MANIFEST}: {error}")
            continue
        if strict:
            found.extend(f"{folder.path}: {problem}" for problem in _unlisted(folder, listed))
        if listed:
            present.setdefault(target, set())
        for name, sha256 in listed.items():
            if not _has_sha256(folder, name, sha256):
                found.append(f"{folder.path / name}: missing, or not what the manifest lists")
    if strict:
        if not present:
            found.append(f"{root.path}: holds no usable image")
        for target, names in sorted(present.items()):
            found.extend(f"{root.path}: no {name} for {target}" for name in sorted(set(units) - names))
    return found


def _problem(folder: Folder, entry: Entry) -> str | None:
    try:
        entries = store.entry_points(store.read(folder, entry), entry.target)
    except DamagedEntryError as error:
        return str(error)
    if entries != entry.kernels.keys():
        said = ", ".join(entry.kernels) or "none"
        return f"has the kernels {', '.join(sorted(entries)) or 'none'}, but its .json says {said}"
    made_by = build.Toolchain(entry.nvrtc, entry.nvrtc_build)
    if build.source_digest(entry.unit, entry.files, entry.options) != entry.source_digest:
        return "has other files or options than its .json says"
    if build.entry_key(entry.source_digest, entry.target, made_by) != entry.entry_key:
        return "is of another compiler or target than its .json says"
    return None


def _unlisted(folder: Folder, listed: dict[str, str]) -> Iterator[str]:
    """What a whole folder does not have: images that its manifest does not list, or no manifest."""
    suffix = store.suffix(folder.path.name)
    images = [name for name in folder.names() if name.endswith(suffix)]
    if not listed:
        yield f"no {MANIFEST} lists its {len(images)} images; cupy-moe prebuild writes one"
    elif extra := set(images) - listed.keys():
        yield f"{MANIFEST} does not list {', '.join(sorted(extra))}"


def _read_manifest(folder: Folder) -> dict[str, str]:
    """File name -> sha256; empty where there is none. Raises DamagedEntryError."""
    try:
        return store.parse_manifest(folder.read(MANIFEST, store.MAX_TEXT))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DamagedEntryError(folders.explain(error)) from None


def _has_sha256(folder: Folder, name: str, sha256: str) -> bool:
    try:
        return hashlib.sha256(folder.read(name, store.MAX_IMAGE)).hexdigest() == sha256
    except OSError:
        return False
