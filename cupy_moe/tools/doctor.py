"""`cupy-moe doctor`: what works here, what does not, and how to repair it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .. import config
from ..errors import ConfigError, CupyMoeError, DependencyError
from ..images import compiler, folders, prebuild, sources
from ..images.sources import Unit
from ..images.targets import PTX_TARGET, TARGETS, made_for


@dataclass(frozen=True)
class Check:
    status: str  # PASS, WARN or FAIL
    subject: str
    finding: str
    fix: str = ""


def examine(gpu: bool) -> list[Check]:
    steps: list[Callable[[], Iterator[Check]]] = [_environment, _cache, _prebuilt, _cupy, _compiler]
    checks: list[Check] = []
    for step in [*steps, _gpu] if gpu else steps:
        try:
            checks.extend(step())
        except (CupyMoeError, OSError) as error:
            checks.append(Check("FAIL", step.__name__.strip("_"), str(error)))
    return checks


def _environment() -> Iterator[Check]:
    yield Check("PASS", "sources", f"{len(sources.units())} kernel files in {sources.source_folder()}")
    given = sorted(name for name in os.environ if name.startswith("CUPY_MOE_"))
    for name in given:
        if name not in config.VARIABLES and name not in config.OF_SCRIPTS:
            yield Check(
                "WARN", "environment", f"{name} is not a variable of cupy_moe", "cupy-moe show-config"
            )
    try:
        config.may_compile()
        for name in config.FLAGS:
            config.flag(name)
        config.nvrtc_flags(), config.prebuilt_dirs(), config.cache_dir()
        yield Check("PASS", "environment", ", ".join(given) or "no variable is set")
    except ConfigError as error:
        yield Check("FAIL", "environment", str(error), "correct the variable or unset it")


def _cache() -> Iterator[Check]:
    root, why = folders.locate_user_root()
    if root is None:
        yield Check("WARN", "user cache", why, "set CUPY_MOE_CACHE_DIR to a folder that can be written")
        return
    probe = f"{folders.TEMPORARY}doctor"
    try:
        with root.open(folders.LAYOUT, create=True) as folder:
            folder.write(probe, b"\0" * 65536)
            folder.remove(probe)
        yield Check("PASS", "user cache", f"{root.path} ({why})")
    except OSError as error:
        fix = "set CUPY_MOE_CACHE_DIR to a folder that can be written; until then kernels are kept in memory"
        yield Check("WARN", "user cache", str(error), fix)


def _prebuilt() -> Iterator[Check]:
    for root in folders.prebuilt_roots():
        for problem in prebuild.problems(root, strict=False):
            yield Check("FAIL", "prebuilt", problem, f"cupy-moe prebuild --arch ARCH --out {root.path}")
    targets = (*TARGETS, PTX_TARGET)
    may_compile = config.may_compile()
    fix = "cupy-moe prebuild --arch ARCH" + (", or let the first use compile" if may_compile else "")
    if complete := [target for target in targets if _is_complete(target)]:
        yield Check("PASS", "prebuilt", f"every kernel for {', '.join(complete)}")
    elif may_compile or any(_has(unit, target) for target in targets for unit in sources.units().values()):
        yield Check("WARN", "prebuilt", "no target has every kernel", fix)
    else:
        yield Check("FAIL", "prebuilt", "no kernel, and CUPY_MOE_DISABLE_JIT=1 forbids compiling", fix)


def _has(unit: Unit, target: str) -> bool:
    return prebuild.state(folders.in_use(), unit, target).status == "up to date"


def _is_complete(asked: str) -> bool:
    units = sources.units().values()
    return all(_has(unit, target) for unit in units for target in made_for(unit.targets, asked))


def _cupy() -> Iterator[Check]:
    try:
        from .._cupy import cupy
    except DependencyError as error:
        yield Check("FAIL", "CuPy", str(error), "without it nothing but the CPU path works")
    else:
        yield Check("PASS", "CuPy", cupy.__version__)


def _compiler() -> Iterator[Check]:
    try:
        tools = compiler.toolchain()
    except DependencyError as error:
        needed = not any(map(_is_complete, TARGETS))
        yield Check("FAIL" if needed else "WARN", "NVRTC", str(error), "needed only to compile: see above")
        return
    from .._cupy import cupy

    cuda = cupy.cuda.driver.get_build_version() // 1000
    yield Check("PASS", "CuPy", f"{cupy.__version__} for CUDA {cuda}")
    yield Check("PASS", "NVRTC", f"{tools.nvrtc} {tools.build} {_library(cuda)}".strip())
    target = compiler.supported_targets()[-1]
    smallest = min(sources.units().values(), key=lambda unit: len(unit.source))
    start = time.perf_counter()
    compiler.compile(smallest, target)
    milliseconds = (time.perf_counter() - start) * 1e3
    yield Check("PASS", "compile", f"{smallest.name} for {target} in {milliseconds:.0f} ms")


def _library(cuda: int) -> str:
    """Where the NVRTC in use was loaded from."""
    try:
        with open("/proc/self/maps") as maps:
            match = re.search(rf"(/.*/libnvrtc\.so\.{cuda}.*)", maps.read())
    except OSError:
        return ""
    return match[1] if match else ""


def _gpu() -> Iterator[Check]:
    from .._cupy import cupy
    from ..cuda import modules

    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        yield Check(
            "FAIL", "gpu", f"no GPU can be used: {error}", "install an NVIDIA driver, or do without --gpu"
        )
        return
    version = runtime.driverGetVersion()
    yield Check("PASS", "gpu", f"driver for CUDA {version // 1000}.{version % 1000 // 10}, {count} GPUs")
    for device in range(count):
        capability = modules.capability(device)
        start = time.perf_counter()
        loaded = modules.warmup(device)
        milliseconds = (time.perf_counter() - start) * 1e3
        origins = sorted({image.origin for image in modules.images(device)})
        found = f"{loaded} kernels in {milliseconds:.0f} ms ({', '.join(origins)})"
        yield Check("PASS", f"gpu {device}", f"compute capability {capability[0]}.{capability[1]}, {found}")
