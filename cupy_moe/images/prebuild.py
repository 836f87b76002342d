"""Fill a folder with images ahead of time, and check, describe and clean such folders. No GPU, no torch."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

from .. import config
from .._version import __version__
from ..errors import CupyMoeError
from . import compiler, folders, sources, store
from .folders import Folder, Root
from .sources import Unit
from .store import DamagedEntryError, Sidecar
from .targets import made_for

MANIFEST = "manifest.json"
_ORPHAN_AGE = 3600  # seconds after which a file without a sidecar belongs to a writer that was killed


@dataclass(frozen=True)
class Result:
    target: str
    unit: str
    status: str  # "up to date", "missing", "built" or "failed"
    size: int = 0
    ms: float = 0.0
    kernels: compiler.Kernels = field(default_factory=dict)
    error: str = ""


def own_folder() -> Root | None:
    """The checkout's `cache/`, which wheels are built from."""
    checkout = sources.checkout()
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


def state(roots: list[Root], unit: Unit, target: str) -> Result:
    """Whether a look-up would take a unit for a target from these roots and not compile. Needs no NVRTC."""
    for root in roots:
        chooses = root.origin == "user" and config.may_compile()
        installed = compiler.installed_nvrtc() if chooses else None
        for folder in root.opened(target):
            for _, sidecar in store.sidecars(folder, unit.name):
                if isinstance(sidecar, str) or sidecar.source_digest != unit.digest:
                    continue
                if installed and sidecar.nvrtc not in installed:
                    continue
                with contextlib.suppress(DamagedEntryError):
                    store.read(folder, sidecar)
                    return Result(target, unit.name, "up to date", sidecar.size, kernels=sidecar.kernels)
    return Result(target, unit.name, "missing")


def run(root: Root, work: list[tuple[Unit, str]], jobs: int) -> Iterator[Result]:
    """Compile every (unit, target), `jobs` at a time (NVRTC runs without the GIL), and publish what is ready.

    A kernel that does not compile is a result like any other; a folder that cannot be written, and an NVRTC
    that cannot be loaded, are the end: CupyMoeError. Threads compile and the caller's publishes, so that an
    interrupt leaves no file half written, and loses no more than what the threads are at.
    """
    compiler.toolchain()  # loads NVRTC, or says once why not
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
            yield Result(target, unit.name, "built", image.sidecar.size, ms, image.sidecar.kernels)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _compile(unit: Unit, target: str) -> tuple[store.Image, float]:
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
    that is there already, as the folder may be read-only. A manifest lists what is there at any time, also if
    this is cut off. Raises OSError, and then has removed nothing that may be whole and is needed.
    """
    units = {name: unit for name, unit in sources.units().items() if target in made_for(unit.targets, target)}
    newest: dict[str, tuple[float, Sidecar]] = {}
    unread: list[str] = []
    for folder in root.opened(target, folders.refuse):
        for path, sidecar in store.sidecars_of(folder, folder.names()):
            if isinstance(sidecar, store.Unread):
                unread.append(f"{path} {sidecar}")
            if isinstance(sidecar, str) or sidecar.unit not in units:
                continue
            if sidecar.source_digest == units[sidecar.unit].digest:
                try:
                    store.read(folder, sidecar)
                    made = folder.status(path.name).st_mtime
                except store.UnreadEntryError as error:
                    unread.append(f"the image of {path} {error}")
                except (DamagedEntryError, FileNotFoundError):
                    continue
                else:
                    if made >= newest.get(sidecar.unit, (0.0, sidecar))[0]:
                        newest[sidecar.unit] = made, sidecar
    kept = {sidecar.stem: sidecar for _, sidecar in newest.values()}
    files = {stem + store.suffix(target): sidecar.sha256 for stem, sidecar in kept.items()}
    data = store.to_json({"schema": sources.SCHEMA, "target": target, "package": __version__, "files": files})
    complete = bool(units) and newest.keys() == units.keys()
    if unread and not complete:
        raise OSError(errno.EIO, "; ".join(unread))
    for folder in root.opened(target, folders.refuse):
        if not complete:
            with contextlib.suppress(FileNotFoundError):
                folder.remove(MANIFEST)
        elif not _holds(folder, MANIFEST, data):
            folder.write(MANIFEST, data)
    sweep(
        root,
        target,
        lambda sidecar: sidecar is not None and sidecar.stem not in kept,
        report=folders.refuse,
    )
    return hashlib.sha256(data).hexdigest() if complete else None


def _holds(folder: Folder, name: str, data: bytes) -> bool:
    try:
        return folder.read(name, store.MAX_TEXT) == data
    except OSError:
        return False


# ---- clean and check ------------------------------------------------------------------------------------


def sweep(
    root: Root,
    target: str | None,
    unwanted: Callable[[Sidecar | None], bool],
    dry_run: bool = False,
    report: Callable[[OSError], None] = folders.warn_of,
) -> tuple[int, int]:
    """Remove unwanted images, what is damaged, and what killed writers left; nothing that is not named as
    our files are. Returns how many files, and their bytes.

    An image without a valid sidecar may be that of a writer who comes to the sidecar next, and so is left
    alone for an hour, unless `unwanted(None)`; one whose sidecar cannot be read now, for good.
    """
    files = size = 0
    for folder in root.opened(target, report):
        names = folder.names()
        known = {path.stem: sidecar for path, sidecar in store.sidecars_of(folder, names)}
        for name in sorted(names, key=lambda name: not name.endswith(".json")):  # a sidecar first
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
    name: str, is_old: bool, known: dict[str, Sidecar | str], unwanted: Callable[[Sidecar | None], bool]
) -> bool:
    match = store.FILE.fullmatch(name)
    if not match:
        return name.startswith(folders.TEMPORARY) and is_old
    sidecar = known.get(match["stem"])
    if isinstance(sidecar, Sidecar):
        return unwanted(sidecar)
    if isinstance(sidecar, store.Unread):
        return unwanted(None)
    return match["suffix"] == ".json" or is_old or unwanted(None)


def problems(root: Root, strict: bool) -> list[str]:
    """What is wrong with a folder: damaged images and, in a strict look, also stale and missing ones."""
    found: list[str] = []
    units = sources.units()
    present: dict[str, set[str]] = {}
    for folder in root.opened(
        report=lambda error: found.append(f"{error.filename}: {folders.explain(error)}")
    ):
        target = folder.path.name
        for path, sidecar in store.sidecars(folder):
            if isinstance(sidecar, str):
                found.append(f"{path}: {sidecar}")
            elif problem := _problem(folder, sidecar):
                found.append(f"{path.with_suffix(store.suffix(target))}: {problem}")
            elif sidecar.unit in units and units[sidecar.unit].digest == sidecar.source_digest:
                present.setdefault(target, set()).add(sidecar.unit)
            elif strict:
                known = sidecar.unit in units
                what = store.changed_files(sidecar, units[sidecar.unit]) if known else "no such kernel"
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
        found.extend(f"{root.path}: no {unit} for {target}" for target, unit in _absent(present))
    return found


def _absent(present: dict[str, set[str]]) -> list[tuple[str, str]]:
    """What a device would look for beside what is there: target and unit."""
    wanted = {
        (target, unit.name)
        for asked in present
        for unit in sources.units().values()
        for target in made_for(unit.targets, asked)
    }
    return sorted((target, unit) for target, unit in wanted if unit not in present.get(target, ()))


def _problem(folder: Folder, sidecar: Sidecar) -> str | None:
    try:
        entries = store.entry_points(store.read(folder, sidecar), sidecar.target)
    except DamagedEntryError as error:
        return str(error)
    if entries != sidecar.kernels.keys():
        said = ", ".join(sidecar.kernels) or "none"
        return f"has the kernels {', '.join(sorted(entries)) or 'none'}, but its .json says {said}"
    made_by = compiler.Toolchain(sidecar.nvrtc, sidecar.nvrtc_build)
    if sources.source_digest(sidecar.unit, sidecar.files, sidecar.options) != sidecar.source_digest:
        return "has other files or options than its .json says"
    if compiler.entry_key(sidecar.source_digest, sidecar.target, made_by) != sidecar.entry_key:
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
