"""The look-up of images: prebuilt, cached, compiled. No CuPy unless it compiles, no torch, no GPU.

Prebuilt roots match on the digest of the sources, whatever compiler made the image; the user cache also
matches the compiler, so that a new NVRTC takes effect. A look-up neither deletes nor reads back. Whatever is
wrong with a file or a folder costs one warning and a compilation, never an exception.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from .. import config
from ..errors import DependencyError, KernelNotPrebuiltError
from . import compiler, folders, sources, store
from .folders import Root, warn_once
from .sources import Unit
from .store import DamagedEntryError, Image, compile_image, publish
from .targets import PTX_TARGET, is_ptx, native_targets, number, runs_somehow

log = logging.getLogger("cupy_moe")


def candidates(unit_name: str, capability: tuple[int, int]) -> Iterator[Image]:
    """Images of a unit that should run on a device, best first; when the driver refuses one, take the next.

    Prebuilt and cached cubins of the own target, then of lower minors; then what NVRTC compiles now; then
    PTX; then whatever else the user cache has. Ends in KernelNotPrebuiltError, or in CompileError from NVRTC.
    """
    unit = sources.unit(unit_name)
    may_compile = config.may_compile()
    roots = folders.in_use()
    prebuilt = [root for root in roots if root.origin != "user"]
    user = next((root for root in roots if root.origin == "user"), None)
    targets = native_targets(capability, unit.targets)
    offered: set[str] = set()

    def stored(root: Root, target: str, nvrtc: frozenset[str] | None = None) -> Iterator[Image]:
        for image in _matching(root, unit, target):
            if image.sidecar.entry_key not in offered and (nvrtc is None or image.sidecar.nvrtc in nvrtc):
                offered.add(image.sidecar.entry_key)
                yield image

    for target in targets:
        for root in prebuilt:
            yield from stored(root, target)
        # Comparing with the installed wheels is as good as asking NVRTC, which takes half a second to load.
        yield from stored(user, target, compiler.installed_nvrtc()) if user else ()

    reason = "CUPY_MOE_DISABLE_JIT=1 is set"
    if may_compile:
        try:
            image = _compile_cached(unit, capability, targets, user, offered)
        except DependencyError as error:
            reason = str(error)
        else:
            offered.add(image.sidecar.entry_key)
            yield image
            reason = "the driver refused the compiled image"

    limit = capability[0] * 10 + capability[1]
    ptx = {target for root in roots for target in root.targets() if is_ptx(target)}
    runnable = [target for target in ptx if number(target) <= limit]
    for target in [*sorted(runnable, key=number, reverse=True), *targets]:
        for root in roots:
            yield from stored(root, target)

    if not runs_somehow(capability, unit.targets):
        raise KernelNotPrebuiltError(
            f"kernel {unit_name!r} is not for compute capability {capability[0]}.{capability[1]}, but for"
            f" {', '.join(unit.targets)}"
        )
    wanted = " or ".join([*targets, f"PTX up to compute_{limit}"] if PTX_TARGET in unit.targets else targets)
    arch = targets[0] if targets else PTX_TARGET
    searched = [f"{root.path} ({root.origin}): {_found(root, unit)}" for root in roots]
    raise KernelNotPrebuiltError(
        f"no image of kernel {unit_name!r} for compute capability {capability[0]}.{capability[1]}\n"
        f"  wanted: {wanted}, of sources {unit.digest[:16]}\n"
        f"  searched: {'; '.join(searched) or 'no folder exists'}\n"
        f"  not compiled: {reason}\n"
        f"  to fix: cupy-moe prebuild --arch {arch} --out DIR  (on any machine with NVRTC, GPU or not),"
        " then set CUPY_MOE_PREBUILT_DIR=DIR"
    )


def _matching(root: Root, unit: Unit, target: str) -> Iterator[Image]:
    stale = None
    found = False
    for folder in root.opened(target):
        for path, sidecar in store.sidecars(folder, unit.name):
            if isinstance(sidecar, str):
                warn_once(str(path), "ignoring %s: it %s", path, sidecar)
            elif sidecar.source_digest != unit.digest:
                stale = sidecar
            else:
                found = True
                try:
                    yield Image(sidecar, store.read(folder, sidecar), root.origin, path)
                except DamagedEntryError as error:
                    warn_once(str(path), "ignoring %s: the image %s", path, error)
    if stale and not found and root.origin != "user":
        warn_once(
            f"stale {root.path}",
            "ignoring prebuilt kernels in %s, made from other sources (%s differs); to renew them:"
            " cupy-moe prebuild --arch %s --out %s",
            *(root.path, store.changed_files(stale, unit), target, root.path),
        )


def _found(root: Root, unit: Unit) -> str:
    entries = [sidecar for folder in root.opened() for _, sidecar in store.sidecars(folder, unit.name)]
    found = [sidecar for sidecar in entries if isinstance(sidecar, store.Sidecar)]
    names = [
        sidecar.target + ("" if sidecar.source_digest == unit.digest else " (stale)") for sidecar in found
    ]
    return ", ".join(names) or "nothing"


_compiled: dict[str, Image] = {}  # by this process, for its other devices: there may be no cache


def _compile_cached(
    unit: Unit, capability: tuple[int, int], targets: list[str], user: Root | None, offered: set[str]
) -> Image:
    """Compile for the best target that NVRTC knows, unless the user cache has just that, not offered yet."""
    known = compiler.supported_numbers()
    native = [target for target in targets if number(target) in known]
    target = native[0] if native else _newest_ptx(unit, capability)
    key = compiler.entry_key(unit.digest, target, compiler.toolchain())
    if key not in offered:
        if key in _compiled:
            return _compiled[key]
        for image in _matching(user, unit, target) if user else ():
            if image.sidecar.entry_key == key:
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
            warn_once("publish", "compiled kernels are not kept: %s; set CUPY_MOE_CACHE_DIR", error)
    return image


def _newest_ptx(unit: Unit, capability: tuple[int, int]) -> str:
    """For a device that is newer than the NVRTC in use."""
    known, limit = compiler.supported_targets(), capability[0] * 10 + capability[1]
    older = [number(target) for target in known if number(target) <= limit]
    if not older or not runs_somehow(capability, unit.targets):
        raise DependencyError(f"NVRTC {compiler.toolchain().nvrtc} knows only {', '.join(known)}")
    return f"compute_{older[-1]}"
