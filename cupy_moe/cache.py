"""The look-up of images: prebuilt, cached, compiled. No CuPy unless it compiles, no torch, no GPU.

Prebuilt roots match on the digest of the sources, whatever compiler made the image; the user cache also
matches the compiler, so that a new NVRTC takes effect. A look-up neither deletes nor reads back. Whatever is
wrong with a file or a folder costs one warning and a compilation, never an exception.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from . import build, config, folders, store
from .errors import DependencyError, KernelNotPrebuiltError
from .folders import Root, warn_once
from .store import DamagedEntryError, Image, compile_image, publish

log = logging.getLogger("cupy_moe")


def candidates(unit_name: str, capability: tuple[int, int]) -> Iterator[Image]:
    """Images of a unit that should run on a device, best first; when the driver refuses one, take the next.

    Prebuilt and cached cubins of the own target, then of lower minors; then what NVRTC compiles now; then
    PTX; then whatever else the user cache has. Ends in KernelNotPrebuiltError, or in CompileError from NVRTC.
    """
    unit = build.unit(unit_name)
    may_compile = config.may_compile()
    roots = folders.in_use()
    prebuilt = [root for root in roots if root.origin != "user"]
    user = next((root for root in roots if root.origin == "user"), None)
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

    limit = capability[0] * 10 + capability[1]
    ptx = {target for root in roots for target in root.targets() if target.startswith("compute_")}
    runnable = [target for target in ptx if build.number(target) <= limit]
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
    for folder in root.opened(target):
        for sidecar, entry in store.entries(folder, unit.name):
            if isinstance(entry, str):
                warn_once(str(sidecar), "ignoring %s: it %s", sidecar, entry)
            elif entry.source_digest != unit.digest:
                stale = entry
            else:
                found = True
                try:
                    yield Image(entry, store.read(folder, entry), root.origin, sidecar)
                except DamagedEntryError as error:
                    warn_once(str(sidecar), "ignoring %s: the image %s", sidecar, error)
    if stale and not found and root.origin != "user":
        warn_once(
            f"stale {root.path}",
            "ignoring prebuilt kernels in %s, made from other sources (%s differs); to renew them:"
            " cupy-moe prebuild --arch %s --out %s",
            *(root.path, store.changed_files(stale, unit), target, root.path),
        )


def _found(root: Root, unit: build.Unit) -> str:
    entries = [entry for folder in root.opened() for _, entry in store.entries(folder, unit.name)]
    found = [entry for entry in entries if isinstance(entry, store.Entry)]
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
    key = build.entry_key(unit.digest, target, build.toolchain())
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
            warn_once("publish", "compiled kernels are not kept: %s; set CUPY_MOE_CACHE_DIR", error)
    return image
