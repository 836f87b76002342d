"""NVRTC: found, loaded, and run. `compile` is pure: from memory to memory, no GPU, no files, no cache."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import CompileError, DependencyError
from . import elf
from .sources import SCHEMA, Unit, digest_of
from .targets import PTX_TARGET, TARGETS, is_ptx, number

Kernels = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Toolchain:
    nvrtc: str  # 12.9.86
    build: str  # CL-36037853


@dataclass(frozen=True)
class Compiled:
    data: bytes
    kernels: Kernels  # entry point -> regs, spill, stack, smem (bytes); empty figures for PTX
    toolchain: Toolchain


_WHEELS = {12: "nvidia-cuda-nvrtc-cu12", 13: "nvidia-cuda-nvrtc"}  # of each CUDA that there is a CuPy for
_loading = threading.Lock()


def _begin_child() -> None:
    """The thread that had it is not in this process, and would never give it back."""
    global _loading
    _loading = threading.Lock()


os.register_at_fork(after_in_child=_begin_child)


def _nvrtc() -> Any:
    return _loaded()[0]


def toolchain() -> Toolchain:
    """The NVRTC in use, to the patch level that `getVersion` does not tell."""
    return _loaded()[1]


def _loaded() -> tuple[Any, Toolchain]:
    with _loading:  # a second thread would find the library open, but not yet what it needs beside it
        return _load()


@functools.cache
def _load() -> tuple[Any, Toolchain]:
    """CuPy's bindings to the NVRTC of CuPy's own CUDA, after a first compilation: that of nothing, to PTX,
    which states the version."""
    from .._cupy import cupy

    nvrtc, cuda = cupy.cuda.nvrtc, cupy.cuda.driver.get_build_version() // 1000
    wheel = _WHEELS.get(cuda, _WHEELS[13])
    library = _open_library(f"libnvrtc.so.{cuda}", wheel)
    try:
        with _offered_to_cupy(library):
            version = nvrtc.getVersion()
    except Exception as error:  # the class depends on the versions of CuPy and cuda-pathfinder
        raise DependencyError(f"NVRTC cannot be loaded ({error}); pip install {wheel}") from error
    found = ".".join(map(str, version))
    if version[0] != cuda:
        fix = f"pip install {wheel}" if library is None else "call cupy_moe before CuPy compiles anything"
        raise DependencyError(f"CuPy is for CUDA {cuda}, but has loaded NVRTC {found}; {fix}")
    ptx, _ = _run_nvrtc(nvrtc, "empty.cu", b"", {}, (), PTX_TARGET)
    text = ptx.decode(errors="replace")
    patch, build = re.search(r"\bV(\d+\.\d+\.\d+)", text), re.search(r"\b(CL-\d+)", text)
    return nvrtc, Toolchain(patch[1] if patch else found, build[1] if build else "")


def _open_library(name: str, wheel: str) -> ctypes.CDLL | None:
    """The library in a wheel, else what the loader knows by its name; None where CuPy has to look further."""
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError, OSError):
        for file in metadata.files(wheel) or ():
            if file.name == name:
                path = Path(str(file.locate())).resolve()
                for builtins in path.parent.glob(name.replace("nvrtc", "nvrtc-builtins") + ".*"):
                    ctypes.CDLL(str(builtins))  # which the NVRTC of CUDA 13.0 does not find beside itself
                return ctypes.CDLL(str(path))
    with contextlib.suppress(OSError):
        return ctypes.CDLL(name)
    return None


@contextlib.contextmanager
def _offered_to_cupy(library: ctypes.CDLL | None) -> Iterator[None]:
    """Inside, cuda-pathfinder has this library for CuPy, where it would take NVRTC of the newest CUDA found.
    CuPy before 14 does not ask it, but opens the name of its own CUDA's, and so finds what is open."""
    pathfinder: Any = sys.modules.get("cuda.pathfinder")
    if library is None or pathfinder is None:
        yield
        return
    load = pathfinder.load_nvidia_dynamic_lib
    nvrtc = SimpleNamespace(abs_path=library._name, _handle_uint=library._handle)  # what CuPy reads
    pathfinder.load_nvidia_dynamic_lib = lambda name: nvrtc if name == "nvrtc" else load(name)
    try:
        yield
    finally:
        pathfinder.load_nvidia_dynamic_lib = load


def installed_version(distribution: str) -> str | None:
    from importlib import metadata  # 20 ms, and a process with prebuilt kernels needs none of it

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def installed_nvrtc() -> frozenset[str]:
    """Version of the NVRTC wheel of CuPy's CUDA, without loading the 100 MB library (about 1 ms). Of each,
    where the name of CuPy's package does not tell its CUDA."""
    wheels = [wheel for cuda, wheel in _WHEELS.items() if installed_version(f"cupy-cuda{cuda}x")]
    return frozenset(filter(None, map(installed_version, wheels or _WHEELS.values())))


def supported_targets() -> list[str]:
    """The members of TARGETS that the NVRTC in use can make."""
    return [target for target in TARGETS if number(target) in supported_numbers()]


def supported_numbers() -> set[int]:
    """Of targets, which the NVRTC in use knows; with a number, all its suffixes."""
    return set(_nvrtc().getSupportedArchs())


def entry_key(digest: str, target: str, toolchain: Toolchain) -> str:
    """Names one image: what it was made from, for which target, by which compiler."""
    return digest_of([SCHEMA, digest, target, toolchain.nvrtc, toolchain.build])


def compile(unit: Unit, target: str) -> Compiled:
    """Compile one unit: the same inputs give the same bytes in every process and folder. Raises CompileError,
    DependencyError."""
    if number(target) not in supported_numbers():
        known = ", ".join(supported_targets())
        raise CompileError(f"NVRTC {toolchain().nvrtc} cannot compile for {target}; it knows {known}")
    data, log = _run_nvrtc(_nvrtc(), f"{unit.name}.cu", unit.source, unit.headers, unit.options, target)
    if is_ptx(target):
        return Compiled(data, {name: {} for name in _ptx_entries(data)}, toolchain())
    return Compiled(_whole_elf(data), _parse_ptxas(log), toolchain())


def _run_nvrtc(
    nvrtc: Any, name: str, source: bytes, headers: dict[str, bytes], options: tuple[str, ...], target: str
) -> tuple[bytes, str]:
    arguments = [*options, f"-arch={target}", "--ptxas-options=-v"]
    if nvrtc.getVersion() >= (12, 9):
        # NVRTC's own cache calls cuInit, which would poison children forked later.
        arguments.append("--no-cache")
    program = nvrtc.createProgram(
        source.decode(), name, tuple(headers.values()), tuple(header.encode() for header in headers)
    )
    try:
        nvrtc.compileProgram(program, tuple(arguments))
        get = nvrtc.getPTX if is_ptx(target) else nvrtc.getCUBIN
        return get(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        hint = "; upgrade cuda-pathfinder, or reinstall the NVRTC wheel" if error.status == 7 else ""
        log = nvrtc.getProgramLog(program)
        raise CompileError(f"{name} for {target} ({' '.join(arguments)}): {error}{hint}\n{log}") from None
    finally:
        nvrtc.destroyProgram(program)


def _whole_elf(data: bytes) -> bytes:
    """CuPy takes a cubin for a C string and drops its last byte, a zero, which ELF tools insist on."""
    return data + b"\0" if elf.end(data) == len(data) + 1 else data


def _parse_ptxas(log: str) -> Kernels:
    """The figures of each entry point from ptxas -v, whose log has lines on other functions, too."""
    kernels: Kernels = {}
    entry, current = "", ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            entry = match[1]
            kernels[entry] = {"regs": 0, "spill": 0, "stack": 0, "smem": 0}
        elif match := re.search(r"Function properties for (\S+)", line):
            current = match[1]
        elif entry and current == entry:
            if match := re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
            ):
                kernels[entry].update(stack=int(match[1]), spill=int(match[2]) + int(match[3]))
            if match := re.search(r"Used (\d+) registers", line):
                smem = re.search(r"(\d+) bytes smem", line)
                kernels[entry].update(regs=int(match[1]), smem=int(smem[1]) if smem else 0)
    return dict(sorted(kernels.items()))


def _ptx_entries(ptx: bytes) -> list[str]:
    return sorted(re.findall(r"\.entry\s+(\w+)", ptx.decode(errors="replace")))
