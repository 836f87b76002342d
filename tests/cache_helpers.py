"""A small kernel in a folder of its own, and a package that knows no other."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import cupy_moe
from cupy_moe.images import folders, prebuild, store
from cupy_moe.images import sources as kernel_sources
from cupy_moe.images.folders import Root

PACKAGE = Path(cupy_moe.__file__).parent
REAL = [path.stem for path in kernel_sources.source_folder().rglob("*.cu")]
HEADER = "constexpr int kOffset = 3;\n"
TINY = """\
#include "tiny.cuh"  // not ASCII: é
extern "C" __global__ void tiny_add(int* data) { data[threadIdx.x] += kOffset; }
extern "C" __global__ void tiny_reverse(int* data) {
    __shared__ int copy[256];
    copy[threadIdx.x] = data[threadIdx.x];
    __syncthreads();
    data[threadIdx.x] = copy[255 - threadIdx.x];
}
#if __CUDA_ARCH__ >= 900
extern "C" __global__ void __cluster_dims__(16, 1, 1) tiny_cluster(int* data) { data[blockIdx.x] = 16; }
#endif
"""


@dataclass(frozen=True)
class Sandbox:
    folder: Path  # of all below
    sources: Path
    user: Path  # CUPY_MOE_CACHE_DIR
    prebuilt: Path  # not yet in CUPY_MOE_PREBUILT_DIR, not yet there

    @property
    def unit(self) -> kernel_sources.Unit:
        forget_sources()
        return kernel_sources.unit("tiny")

    def publish(self, root: Path, target: str) -> Path:
        """The path of an image that is now there."""
        return store.publish(Root(root, "prebuilt"), store.compile_image(self.unit, target))


def forget_sources() -> None:
    """What was read of them, as they have changed."""
    for remembers in (kernel_sources._paths, kernel_sources._read_unit, kernel_sources._read_header):
        remembers.cache_clear()


def files(root: Path, pattern: str) -> list[Path]:
    """Of a folder of images, whoever may read them."""
    return sorted((root / folders.LAYOUT).glob(pattern))


def write_sources(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "tiny.cu").write_text(TINY, encoding="utf-8")
    (folder / "tiny.cuh").write_text(HEADER)
    return folder


@dataclass(frozen=True)
class Everything:
    folder: Path
    results: list[prebuild.Result]


def copy_package(folder: Path) -> Path:
    """A checkout in miniature: this package with the small kernel."""
    shutil.copytree(
        PACKAGE, folder / "cupy_moe", ignore=shutil.ignore_patterns("__pycache__", "kernels_cu", "cache")
    )
    write_sources(folder / "kernels_cu")
    return folder


def run_python(folder: Path, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, started in a folder that holds the package."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CUPY_MOE_", "PYTHON", "XDG_"))}
    given = options.pop("env", {})
    assert isinstance(given, dict)
    environment = {
        k: v for k, v in (environment | {"PYTHONPATH": str(folder)} | given).items() if v is not None
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,  # type: ignore[call-overload]
    )


# ---- other users

USER = 54321


@contextlib.contextmanager
def acting_as(uid: int, *groups: int) -> Iterator[None]:
    before = os.getgroups()
    try:
        os.setgroups(groups)
        os.setegid(uid)
        os.seteuid(uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


def can_act_as_others() -> bool:
    """Root can, unless it is root of a namespace that has no other users."""
    if os.geteuid() != 0:
        return False
    try:
        with acting_as(USER):
            return True
    except OSError:
        return False


needs_uids = pytest.mark.skipif(not can_act_as_others(), reason="only root can act as other users")
