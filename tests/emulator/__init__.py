"""Runs the kernels of kernels_cu on the CPU, through the front door: operators launch them as on a GPU.

Inside `Emulator(limits, arch)()`, CPU tensors take the way of CUDA tensors: the same checks, plan, packing of
arguments and entry point. But units are compiled by a C++ compiler, and machine.cpp runs them and watches
what they do. A launch that does something wrong raises EmulatorError.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from operator_cases import STEMS
from torch.overrides import TorchFunctionMode

from cupy_moe import _cupy
from cupy_moe.cuda import launch, modules, tensor_map
from cupy_moe.images import sources
from cupy_moe.plans.base import DeviceLimits

from .cases import Placed, place_all, place_poison

HERE = Path(__file__).parent
# Modules that launch kernels, and keep what they have prepared in functions called `_prepare`.
LAUNCHING = [*(f"operators.{stem}" for stem in STEMS), "operators._experts_launches", "parallel.messages"]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or "g++"
WATCHED = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fsanitize=thread",  # a call before every access to memory, which machine.cpp answers
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-extern-tls-init",
    "-fno-gnu-unique",  # or libraries side by side would share what is static in templates
    "-fvisibility-inlines-hidden",
    "-Wno-unknown-pragmas",
    "-Wno-attributes",
    "-Wno-tsan",
    "-D__CUDACC_VER_MAJOR__=13",
    "-D__CUDACC_VER_MINOR__=0",
]


class EmulatorError(Exception):
    """What a kernel did wrong."""


# ---- compiling


@functools.cache
def compiler() -> str | None:
    """Why there is none that will do; None where there is one."""
    try:
        _run(COMPILER, "-x", "c++", "-fsanitize=thread", "-c", os.devnull, "-o", os.devnull)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{COMPILER} cannot compile with -fsanitize=thread: {error}"
    return None


def _run(*command: str | Path) -> str:
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, command, run.stdout, run.stderr[-4000:])
    return run.stdout


@functools.cache
def _folder() -> Path:
    """Where libraries are kept between runs; sources change seldom."""
    kept = HERE.parents[1] / ".pytest_cache" / "emulator"
    try:
        kept.mkdir(parents=True, exist_ok=True)
        if os.access(kept, os.W_OK):
            return kept
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="cupy_moe-emulator-"))


def _kept(name: str, key: tuple[object, ...], make: Any) -> Path:
    digest = hashlib.sha256(repr((*key, _run(COMPILER, "--version"))).encode()).hexdigest()[:16]
    path = _folder() / f"{name}-{digest}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=_folder()) as folder:
            made = Path(folder) / name
            make(made)
            made.replace(path)
    return path


@functools.cache
def _machine() -> Path:
    texts = [(HERE / name).read_text() for name in ("machine.cpp", "cuda.hpp")]
    flags = ("-std=c++17", "-O2", "-fPIC", "-Wall", "-Werror")
    return _kept(
        "machine.o",
        (*texts, flags),
        lambda path: _run(COMPILER, *flags, "-c", HERE / "machine.cpp", "-o", path),
    )


ENTRY = re.compile(
    r'extern\s+"C"\s+void\s+(?:of_cluster\((\d+),[^)]*\)\s*)?(\w+)\s*\(\s*const\s+(\w+)\s+args\s*\)'
)


class Library:
    """A unit for one architecture: what differs between architectures is found by preprocessing."""

    def __init__(self, unit: str, arch: int) -> None:
        folder = sources.source_folder()
        (path,) = folder.rglob(f"{unit}.cu")
        architecture = f"-D__CUDA_ARCH__={10 * arch}"
        include = ("-include", HERE / "cuda.hpp", "-I", folder)
        marked = "-D__cluster_dims__(x,y,z)=of_cluster(x,y,z)"
        text = _run(COMPILER, "-E", "-P", *WATCHED, architecture, *include, marked, "-x", "c++", path)
        self.entries = {name: (int(cluster or 1), struct) for cluster, name, struct in ENTRY.findall(text)}
        wrappers = "".join(
            f'extern "C" void run_{name}(const void* a) {{ {name}(*static_cast<const {struct}*>(a)); }}\n'
            f'extern "C" unsigned size_{name}() {{ return sizeof({struct}); }}\n'
            for name, (_, struct) in self.entries.items()
        )

        def make(made: Path) -> None:
            source = made.with_suffix(".cpp")
            source.write_text(f'#include "{path}"\n{wrappers}')
            _run(COMPILER, *WATCHED, architecture, *include, "-c", source, "-o", made.with_suffix(".o"))
            _run(
                COMPILER,
                "-shared",
                "-pthread",
                "-Wl,-Bsymbolic",
                made.with_suffix(".o"),
                _machine(),
                "-o",
                made,
            )

        self.path = _kept(f"{unit}.so", (text, WATCHED, _machine().name), make)
        self.library = ctypes.CDLL(str(self.path))
        self.library.emulator_launch.restype = ctypes.c_char_p

    def launch(
        self, entry: str, arguments: int, grid: int, block: int, shared: int, seed: int, buffers: Any
    ) -> str | None:
        """What is wrong; None: nothing. `arguments` is where the struct lies, `buffers` what it may touch."""
        cluster, _ = self.entries[entry]
        size = self.library[f"size_{entry}"]()
        run = ctypes.cast(self.library[f"run_{entry}"], ctypes.c_void_p)
        ranges = (ctypes.c_void_p * (2 * len(buffers)))(*itertools.chain(*buffers))
        found = self.library.emulator_launch(
            run, ctypes.c_void_p(arguments), ctypes.c_size_t(size), grid, block, shared, cluster,
            ctypes.c_uint64(seed), ranges, ctypes.c_size_t(len(buffers)),
        )  # fmt: skip
        return found.decode() if found else None


@functools.cache
def library(unit: str, arch: int) -> Library:
    return Library(unit, arch)


# ---- the front door


def _encode_map(
    place: int, element: int, rank: int, address: int, sizes: Any, strides: Any, box: Any, steps: Any,
    interleave: int, swizzle: int, promotion: int, fill: int,
) -> int:  # fmt: skip
    """As cuTensorMapEncodeTiled, into what machine.cpp reads."""
    assert (rank, interleave, fill, list(steps)) == (5, 0, 0, [1] * 5)
    if address % 16 or any(stride % 16 for stride in strides):
        return 1
    words = [address, *sizes, *strides, *box, int(swizzle == 3) | (1 if element == 0 else 2) << 32]
    (ctypes.c_uint64 * len(words)).from_address(place)[:] = words
    return 0


class Allocations(TorchFunctionMode):
    """Knows what kernels may touch. What is made by `empty` or `new_empty` is full of poison."""

    def __init__(self, device: str = "cpu") -> None:
        self.kept: list[Placed] = []
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.Tensor.new_empty):
            with torch._C.DisableTorchFunction():
                self.kept.append(place_poison(result))
            return self.kept[-1].tensor
        if func is torch.Tensor.contiguous and result is not args[0]:
            return self.add(result).tensor
        return result

    def add(self, tensor: torch.Tensor) -> Placed:
        return self.add_all([tensor])[0]

    def add_all(self, tensors: Iterable[torch.Tensor]) -> list[Placed]:
        with torch._C.DisableTorchFunction():
            placed = place_all(tensors, self._device)
        self.kept += placed
        return placed


class Emulator:
    """A made-up device; a context in which operators run on it. `launched` are the entry points that ran."""

    def __init__(self, limits: DeviceLimits, arch: int, seed: int = 0) -> None:
        self.limits, self.arch, self.seed = limits, arch, seed
        self.launched: list[str] = []
        self._allocations = Allocations()
        self._functions: list[tuple[str, str]] = []

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy for kernels to work on, which must not touch anything beside it."""
        return self._allocations.add(tensor).tensor

    def _function(self, device: int, unit: str, entry: str) -> int:
        self._functions.append((unit, entry))
        return len(self._functions) - 1

    def _launch(self, function: int, grid: int, *rest: int) -> None:
        _, _, block, _, _, shared, _, pointers, _ = rest
        unit, entry = self._functions[function]
        self.launched.append(entry)
        arguments = ctypes.c_void_p.from_address(pointers).value or 0
        buffers = [(placed.begin, placed.end) for placed in self._allocations.kept]
        self.seed += 1
        found = library(unit, self.arch).launch(entry, arguments, grid, block, shared, self.seed, buffers)
        if found:
            raise EmulatorError(f"{entry}, {grid} blocks of {block} threads: {found}")

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Emulator]:
        import importlib

        launching = [importlib.import_module(f"cupy_moe.{name}") for name in LAUNCHING]
        prepared = [
            function
            for module in launching
            for name, function in vars(module).items()
            if name.lstrip("_").startswith("prepare") and hasattr(function, "cache_clear")
        ]

        class Refused(Exception):
            status = 0

        driver = SimpleNamespace(launchKernel=self._launch, CUDADriverError=Refused)
        with pytest.MonkeyPatch.context() as patch, self._allocations:
            for module in launching:
                if hasattr(module, "cuda_index"):
                    patch.setattr(module, "cuda_index", lambda name, device: 0)
                if hasattr(module, "device_limits"):
                    patch.setattr(module, "device_limits", lambda device: self.limits)
            for function in prepared:
                function.cache_clear()
            patch.setattr(_cupy, "cupy", SimpleNamespace(cuda=SimpleNamespace(driver=driver)))
            patch.setattr(modules, "function", self._function)
            patch.setattr(modules, "can_overlap", lambda device, unit: False)
            patch.setattr(launch, "_current_stream", lambda device: 0)
            patch.setattr(launch, "_current_device", lambda: 0)
            patch.setattr(torch.cuda, "device_count", lambda: 1)
            patch.setattr(tensor_map, "driver_function", lambda name: _encode_map)
            tensor_map.tensor_map.cache_clear()
            yield self
        tensor_map.tensor_map.cache_clear()
        for function in prepared:
            function.cache_clear()
