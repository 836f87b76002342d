"""Where images are looked up, verified and published. No CuPy, no torch, no GPU.

    <root>/v1/sm_90/align_shared-3f2a9c0d11e2ab47.cubin   a plain ELF file, as cuobjdump likes it
    <root>/v1/sm_90/align_shared-3f2a9c0d11e2ab47.json    its Entry, written last: no image without it
    <root>/v1/sm_90/manifest.json                         prebuilt folders only, see prebuild.py

Prebuilt roots match on the digest of the sources, whatever compiler made the image; the user cache also
matches the compiler, so that a new NVRTC takes effect. Files are published by rename, and a lookup neither
deletes nor reads back. There is no lock: two processes that miss together both compile (tens of ms) and
publish identical bytes. Whatever is wrong with a file or a folder costs one warning and a compilation, never
an exception.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import stat
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import build, config
from ._version import __version__
from .errors import ConfigError, DependencyError, KernelNotPrebuiltError

log = logging.getLogger("cupy_moe")
LAYOUT = "v1"
KEY = "[0-9a-f]" * 16
TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Entry:
    """What the `.json` beside an image says."""

    schema: int
    unit: str
    target: str
    source_digest: str
    entry_key: str
    size: int
    sha256: str
    kernels: build.Kernels
    files: dict[str, str]
    options: list[str]
    nvrtc: str
    nvrtc_build: str
    package: str

    @property
    def stem(self) -> str:
        return f"{self.unit}-{self.entry_key[:16]}"


@dataclass(frozen=True)
class Image:
    entry: Entry
    data: bytes
    origin: str  # "prebuilt", "package", "checkout", "user" or "compiled"
    path: Path | None


@dataclass(frozen=True)
class Root:
    path: Path
    origin: str
    private: bool = False  # for this user only

    def create(self) -> None:
        self.path.mkdir(mode=0o700 if self.private else 0o777, parents=True, exist_ok=True)


class DamagedEntryError(Exception):
    """An image or its .json is not what was published. Never leaves a lookup."""


# ---- where ----------------------------------------------------------------------------------------------


def prebuilt_roots() -> list[Root]:
    roots = [Root(path, "prebuilt") for path in config.prebuilt_dirs()]
    roots.append(Root(Path(__file__).resolve().parent / "cache", "package"))
    if checkout := build.checkout():
        roots.append(Root(checkout / "cache", "checkout"))
    return [root for root in roots if root.path.is_dir()]


def user_root() -> Root | None:
    """The user cache, or None where nothing can be kept. Creates nothing."""
    return locate_user_root()[0]


def locate_user_root() -> tuple[Root | None, str]:
    """The user cache and why it is that one."""
    if config.flag("CUPY_MOE_DISABLE_CACHE"):
        return None, "CUPY_MOE_DISABLE_CACHE=1: memory only"
    if named := config.cache_dir():
        if reason := _distrust(named, stat.S_IWOTH):  # a group may well share a folder that it names
            _warn_once(f"trust {named}", "CUPY_MOE_CACHE_DIR: %s is %s", named, reason)
        return Root(named, "user"), "CUPY_MOE_CACHE_DIR"
    # "~" stays as it is, and so is not absolute, where there is neither HOME nor a passwd entry.
    home = os.path.expanduser("~/.cache")
    for folder, why in ((os.environ.get("XDG_CACHE_HOME", ""), "XDG_CACHE_HOME"), (home, "home")):
        path = Path(folder) / "cupy_moe"
        if path.is_absolute() and _usable(path):
            return Root(path, "user", private=True), why
    with contextlib.suppress(OSError):  # gettempdir() looks for a folder that it can write to
        path = Path(tempfile.gettempdir()) / f"cupy_moe-{os.getuid()}"
        if _usable(path):
            return Root(path, "user", private=True), "temporary: no home folder that can be written"
    return None, "no folder can be written: memory only"


def _usable(path: Path) -> bool:
    try:
        if path.exists():
            reason = "not a folder" if not path.is_dir() else _distrust(path)
            if reason:
                _warn_once(f"trust {path}", "not using the cache folder %s: it is %s", path, reason)
                return False
        while not path.exists():
            path = path.parent
        return path.is_dir() and os.access(path, os.W_OK | os.X_OK)
    except OSError:
        return False


def _distrust(path: Path, others: int = stat.S_IWGRP | stat.S_IWOTH) -> str | None:
    """Why kernels in this folder may be someone else's, if so."""
    if not path.exists():
        return None
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0):
        return f"owned by uid {status.st_uid}"
    if status.st_mode & others and not status.st_mode & stat.S_ISVTX:
        return "writable by other users"
    return None


# ---- read -----------------------------------------------------------------------------------------------


def find(root: Path, pattern: str) -> list[Path]:
    try:
        return sorted((root / LAYOUT).glob(pattern))
    except OSError:
        return []


def suffix(target: str) -> str:
    return ".ptx" if target.startswith("compute_") else ".cubin"


def entries(root: Path, target: str = "*", unit: str = "*") -> Iterator[tuple[Path, Entry | None]]:
    """The sidecars of a folder and what they say; None for one that cannot be understood."""
    for sidecar in find(root, f"{target}/{unit}-{KEY}.json"):
        try:
            entry = Entry(**json.loads(sidecar.read_bytes()))
            known = entry.schema == build.SCHEMA and all(
                isinstance(d, dict) for d in (entry.files, entry.kernels)
            )
            known &= (entry.target, entry.stem) == (sidecar.parent.name, sidecar.stem)
        except FileNotFoundError:
            continue  # the folder is being cleaned
        except (OSError, ValueError, TypeError):
            known = False
        yield sidecar, entry if known else None


def read(sidecar: Path, entry: Entry) -> bytes:
    """The bytes of an image, checked against its entry. Raises DamagedEntryError."""
    try:
        data = sidecar.with_suffix(suffix(entry.target)).read_bytes()
    except OSError as error:
        raise DamagedEntryError(f"cannot be read ({error.strerror})") from None
    if len(data) != entry.size:
        raise DamagedEntryError(f"has {len(data)} bytes instead of {entry.size}")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DamagedEntryError("does not match its sha256")
    if entry.target.startswith("sm_") and elf_target(data) != entry.target:
        raise DamagedEntryError(f"holds code for {elf_target(data)} instead of {entry.target}")
    return data


def elf_target(data: bytes) -> str:
    """The target that the header of a cubin states, or why there is none."""
    if len(data) < 64 or data[:5] != b"\x7fELF\x02":
        return "no ELF file"
    machine, flags, abi = *struct.unpack_from("<H", data, 18), *struct.unpack_from("<I", data, 48), data[7]
    if machine != 190 or abi not in (0x33, 0x41) or build.elf_end(data) > len(data):
        return "no whole CUDA ELF file"
    return f"sm_{flags & 0xFF}" if abi == 0x33 else f"sm_{flags >> 8 & 0xFF}"


def changed_files(entry: Entry, unit: build.Unit) -> str:
    """What makes an entry stale."""
    names = sorted(name for name, _ in set(entry.files.items()) ^ set(unit.files.items()))
    return ", ".join(dict.fromkeys(names)) or "compile options"


# ---- look up --------------------------------------------------------------------------------------------


def candidates(unit_name: str, capability: tuple[int, int]) -> Iterator[Image]:
    """Images of a unit that should run on a device, best first; when the driver refuses one, take the next.

    Prebuilt and cached cubins of the own target, then of lower minors; then what NVRTC compiles now; then
    PTX; then whatever else the user cache has. Ends in KernelNotPrebuiltError, or in CompileError from NVRTC.
    """
    unit = build.unit(unit_name)
    may_compile = not config.flag("CUPY_MOE_DISABLE_JIT")
    if config.flag("CUPY_MOE_FORCE_JIT") and not may_compile:
        raise ConfigError("CUPY_MOE_FORCE_JIT=1 contradicts CUPY_MOE_DISABLE_JIT=1")
    prebuilt = [] if config.flag("CUPY_MOE_FORCE_JIT") else prebuilt_roots()
    user = user_root()
    targets = build.native_targets(capability)
    offered: set[str] = set()

    def stored(root: Root, target: str, nvrtc: frozenset[str] | None = None) -> Iterator[Image]:
        for image in _matching(root, unit, target):
            if image.entry.entry_key not in offered and (nvrtc is None or image.entry.nvrtc in nvrtc):
                offered.add(image.entry.entry_key)
                yield image

    for target in targets:
        for root in prebuilt:
            yield from stored(root, target)
        # Comparing with the installed wheels is as good as asking NVRTC, which takes half a second to load.
        yield from stored(user, target, build.installed_nvrtc()) if user else ()

    reason = "CUPY_MOE_DISABLE_JIT=1 is set"
    if may_compile:
        try:
            image = _compile_cached(unit, capability, targets, user, offered)
        except DependencyError as error:
            reason = str(error)
        else:
            offered.add(image.entry.entry_key)
            yield image
            reason = "the driver refused the compiled image"

    roots = [*prebuilt, *([user] if user else [])]
    ptx = {path.name for root in roots for path in find(root.path, "compute_*")}
    limit = capability[0] * 10 + capability[1]
    runnable = [t for t in ptx if t[8:].isdigit() and build.number(t) <= limit]
    for target in [*sorted(runnable, key=build.number, reverse=True), *targets]:
        for root in roots:
            yield from stored(root, target)

    searched = [f"{root.path} ({root.origin}): {_found(root, unit)}" for root in roots]
    raise KernelNotPrebuiltError(
        f"no image of kernel {unit_name!r} for compute capability {capability[0]}.{capability[1]}\n"
        f"  wanted: {' or '.join(targets)}, or PTX up to compute_{limit}, of sources {unit.digest[:16]}\n"
        f"  searched: {'; '.join(searched) or 'no folder exists'}\n"
        f"  not compiled: {reason}\n"
        f"  to fix: cupy-moe prebuild --arch {targets[0]} --out DIR  (on any machine with NVRTC, GPU or not),"
        " then set CUPY_MOE_PREBUILT_DIR=DIR"
    )


def _matching(root: Root, unit: build.Unit, target: str) -> Iterator[Image]:
    stale = None
    found = False
    for sidecar, entry in entries(root.path, target, unit.name):
        if entry is None:
            _warn_once(str(sidecar), "ignoring %s: it cannot be understood", sidecar)
        elif entry.source_digest != unit.digest:
            stale = entry
        else:
            found = True
            try:
                yield Image(entry, read(sidecar, entry), root.origin, sidecar)
            except DamagedEntryError as error:
                _warn_once(str(sidecar), "ignoring %s: the image %s", sidecar, error)
    if stale and not found and root.origin != "user":
        _warn_once(
            f"stale {root.path}",
            "ignoring prebuilt kernels in %s, made from other sources (%s differs); to renew them:"
            " cupy-moe prebuild --arch %s --out %s",
            *(root.path, changed_files(stale, unit), target, root.path),
        )


def _found(root: Root, unit: build.Unit) -> str:
    found = [entry for _, entry in entries(root.path, unit=unit.name) if entry]
    names = [entry.target + ("" if entry.source_digest == unit.digest else " (stale)") for entry in found]
    return ", ".join(names) or "nothing"


_compiled: dict[str, Image] = {}  # by this process, for its other devices: there may be no cache


def _compile_cached(
    unit: build.Unit, capability: tuple[int, int], targets: list[str], user: Root | None, offered: set[str]
) -> Image:
    """Compile for the best target that NVRTC knows, unless the user cache has just that, not offered yet."""
    known = build.supported_targets()
    limit = capability[0] * 10 + capability[1]
    native = [target for target in targets if target in known]
    older = [f"compute_{build.number(t)}" for t in known if build.number(t) <= limit]
    if not native and not older:
        raise DependencyError(f"NVRTC {build.toolchain().nvrtc} knows only {', '.join(known)}")
    target = native[0] if native else older[-1]
    key = build.entry_key(unit, target, build.toolchain())
    if key not in offered:
        if key in _compiled:
            return _compiled[key]
        for image in _matching(user, unit, target) if user else ():
            if image.entry.entry_key == key:
                return image
    start = time.perf_counter()
    image = compile_image(unit, target)
    elapsed = (time.perf_counter() - start) * 1e3
    log.info("compiled %s for %s in %.0f ms: no image of it was found", unit.name, target, elapsed)
    _compiled[key] = image
    if user:
        try:
            publish(user, image)
        except OSError as error:
            _warn_once("publish", "compiled kernels are not kept: %s; set CUPY_MOE_CACHE_DIR", error)
    return image


# ---- write ----------------------------------------------------------------------------------------------


def compile_image(unit: build.Unit, target: str) -> Image:
    made = build.compile(unit, target)
    entry = Entry(
        schema=build.SCHEMA,
        unit=unit.name,
        target=target,
        source_digest=unit.digest,
        entry_key=build.entry_key(unit, target, made.toolchain),
        size=len(made.data),
        sha256=hashlib.sha256(made.data).hexdigest(),
        kernels=made.kernels,
        files=unit.files,
        options=list(unit.options),
        nvrtc=made.toolchain.nvrtc,
        nvrtc_build=made.toolchain.build,
        package=__version__,
    )
    return Image(entry, made.data, "compiled", None)


def publish(root: Root, image: Image) -> Path:
    """Write an image and then its sidecar, each by rename. Raises OSError."""
    target = image.entry.target
    root.create()
    path = root.path / LAYOUT / target / (image.entry.stem + suffix(target))
    write_file(path, image.data)
    write_file(path.with_suffix(".json"), to_json(asdict(image.entry)))
    return path


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def write_file(path: Path, data: bytes) -> None:
    """Replace a file as a whole. No fsync: what a power cut tears, the sha256 tells."""
    for attempt in range(3):  # the folder may be removed between the two steps
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
        try:
            with open(temporary, "xb") as file:  # the mode follows the umask, unlike that of mkstemp
                file.write(data)
            os.replace(temporary, path)
            return
        except FileNotFoundError:
            if attempt == 2:
                raise
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


_warned: set[str] = set()


def _warn_once(key: str, message: str, *arguments: object) -> None:
    if key not in _warned:
        _warned.add(key)
        log.warning(message, *arguments)
