"""16 processes with a cold cache, killed at random; every other round the folder vanishes. For test_cache.py.

python tests/race.py SOURCES CACHE ROUNDS
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

from cupy_moe.images import compiler, folders, lookup, prebuild, sources, store
from cupy_moe.images.folders import Root

WORKERS, REPEATS, TIMEOUT = 16, 40, 60.0


def work(seed: int, expected: bytes) -> None:
    """Look up, or compile and publish; then publish again and again while others read."""
    lookup._compiled.clear()
    time.sleep(random.Random(seed).random() * 0.05)
    for _ in range(REPEATS):
        image = next(lookup.candidates("tiny", (9, 0)))
        if image.data != expected:
            os._exit(3)
        with contextlib.suppress(FileNotFoundError):  # removed under us three times in a row
            store.publish(Root(Path(os.environ["CUPY_MOE_CACHE_DIR"]), "user"), image)
    os._exit(0)


def main(kernels: Path, folder: Path, rounds: int) -> None:
    sources.source_folder = lambda: kernels
    os.environ["CUPY_MOE_CACHE_DIR"] = str(folder)
    expected = compiler.compile(sources.unit("tiny"), "sm_90").data  # and loads NVRTC once, for all children
    chance = random.Random(0)
    killed = finished = leftovers = 0
    for number in range(rounds):
        shutil.rmtree(folder, ignore_errors=True)
        children = {}
        for index in range(WORKERS):
            pid = os.fork()
            if pid == 0:
                try:
                    work(number * WORKERS + index, expected)
                except BaseException as error:
                    print(f"round {number}: {error!r}", file=sys.stderr)
                os._exit(4)
            children[pid] = chance.random() < 0.5
        time.sleep(chance.random() * 0.6)
        for pid in [pid for pid, doomed in children.items() if doomed]:
            os.kill(pid, signal.SIGKILL)
            time.sleep(chance.random() * 0.02)
            if number % 2:
                shutil.rmtree(folder, ignore_errors=True)
        deadline = time.monotonic() + TIMEOUT
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                doomed = children.pop(pid)
                code = os.waitstatus_to_exitcode(status)
                assert code == 0 or (doomed and code == -signal.SIGKILL), f"round {number}: exit {code}"
                killed, finished = killed + (code != 0), finished + (code == 0)
            elif time.monotonic() > deadline:
                raise SystemExit(f"round {number}: {len(children)} processes hang")
            else:
                time.sleep(0.002)

        lookup._compiled.clear()  # what is left behind hinders nobody
        assert next(lookup.candidates("tiny", (9, 0))).data == expected
        assert prebuild.problems(Root(folder, "user"), strict=False) == []
        leftovers += len(list(folder.glob(f"*/*/{folders.TEMPORARY}*")))
    print(f"{rounds} rounds of {WORKERS}: {finished} finished, {killed} killed, {leftovers} temporary files")


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # numpy's threads are idle when we fork
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
