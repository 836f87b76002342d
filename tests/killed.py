"""`cupy-moe prebuild`, killed before each call that changes a disk, and at any time. For test_faults.py.

python tests/killed.py SOURCES FOLDER
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
from cli_helpers import invoke
from failing_disk import CHANGES, Disk, compile_once, complete, fill, renew

from cupy_moe.images import compiler, lookup, prebuild, sources, store
from cupy_moe.images.folders import Root

RANDOM_TIMES = 8


class Deadly(Disk):
    def step(self, name: str) -> None:
        self.count += self.is_on and name in CHANGES
        if self.is_on and self.count == self.failing:
            os.kill(os.getpid(), signal.SIGKILL)


def start(folder: Path, call: int | None = None) -> int:
    """A process that prebuilds, and kills itself before a change."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        disk = Deadly()
        with pytest.MonkeyPatch.context() as patch, disk.fails(call or 0, 0):
            disk.patch(patch)
            invoke("prebuild", "--arch", "sm_90", "--out", folder)
        os._exit(0)
    finally:
        os._exit(1)


def ended(pid: int) -> bool:
    """Whether it has done all; else it was killed."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status == 0


def check(folder: Path, expected: bytes, about: str) -> None:
    """What is there is whole."""
    root = Root(folder, "prebuilt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUPY_MOE_DISABLE_CACHE", "1")
        if folder.exists():
            patch.setenv("CUPY_MOE_PREBUILT_DIR", str(folder))
        lookup._compiled.clear()
        assert next(lookup.candidates("tiny", (9, 0))).data == expected, about
    assert prebuild.problems(root, strict=False) == [], about
    complete(folder)


def main(kernels: Path, folder: Path) -> None:
    sources.source_folder = lambda: kernels
    expected = compiler.compile(sources.unit("tiny"), "sm_90").data  # and loads NVRTC once, for all children
    compiler.installed_nvrtc()
    for before in ("nothing", "others"):
        template = fill(folder.with_name(before), kernels, before)
        with pytest.MonkeyPatch.context() as patch:
            compile_once(patch)
            store.compile_image(sources.unit("tiny"), "sm_90")
            for call in range(1, 1000):
                renew(folder, template)
                if ended(start(folder, call)):
                    break
                check(folder, expected, f"{before} before, call {call}")
        print(f"{before} before: killed {call - 1} times")
    chance, killed, longest = random.Random(0), 0, 0.05  # seconds that it takes
    while killed < RANDOM_TIMES:
        shutil.rmtree(folder, ignore_errors=True)
        pid = start(folder)
        time.sleep(chance.random() * longest)
        os.kill(pid, signal.SIGKILL)
        killed += not ended(pid)
        check(folder, expected, f"killed by {killed}")
    print(f"at any time: killed {killed} times")


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # numpy's threads are idle when we fork
    main(Path(sys.argv[1]), Path(sys.argv[2]))
