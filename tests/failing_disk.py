"""A disk that fails, or whatever happens, at any call of it; and what is left of images then. No torch."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cache_helpers import HEADER, forget_sources
from cli_helpers import invoke

from cupy_moe.images import folders, lookup, prebuild, sources, store
from cupy_moe.images.folders import Root


class FailingFile:
    """A file that takes nothing, or cannot be closed: a disk is full when a buffer is written out."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def __enter__(self) -> FailingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.disk.step("close a file")

    def read(self) -> bytes:
        self.disk.step("read a file")
        return self.file.read()

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.disk.step("write")
        self.file.write(data[len(data) // 2 :])


WRITES = ("makedirs", "mkdir", "replace", "create", "write", "close a file")
CHANGES = (*WRITES, "unlink")


class Disk:
    """Fails the n-th call of the operating system; or of some kinds, the n-th and all that come later."""

    MADE_BY_NAME = "open", "mkdir", "replace", "unlink", "listdir", "scandir"
    OF_WHAT_IS_THERE = "stat", "lstat", "fstat", "read", "readlink"

    def __init__(self) -> None:
        self.count = self.failing = self.number = 0
        self.from_then_on: tuple[str, ...] = ()
        self.failed: list[str] = []
        self.is_on = False

    def step(self, name: str) -> None:
        """One of the kinds that fail from then on; or any, where a single call fails."""
        if not self.is_on or (self.from_then_on and name not in self.from_then_on):
            return
        self.count += 1
        if self.count == self.failing or (self.count > self.failing and self.from_then_on):
            self.failed.append(name)
            raise OSError(self.number, os.strerror(self.number))

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in (*self.MADE_BY_NAME, *self.OF_WHAT_IS_THERE):
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))
        monkeypatch.setattr(os, "close", self.close)
        for module in (folders, sources):
            monkeypatch.setattr(module, "open", self.open_file, raising=False)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            creates = name == "open" and arguments[1] & os.O_CREAT
            self.step("create" if creates else name)
            return function(*arguments, **options)

        return call

    def close(self, fd: int, close: Callable[[int], None] = os.close) -> None:
        close(fd)
        self.step("close")

    def open_file(self, *arguments: Any) -> Any:
        return FailingFile(open(*arguments), self)

    @contextlib.contextmanager
    def fails(self, call: int, number: int, from_then_on: tuple[str, ...] = ()) -> Iterator[None]:
        self.count, self.failing, self.number = 0, call, number
        self.from_then_on, self.failed, self.is_on = from_then_on, [], True
        try:
            yield
        finally:
            self.is_on = False


# ---- images


made: dict[tuple[str, str], store.Image] = {}


def compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image, for all tests."""
    compile_image = store.compile_image

    def compiled(unit: sources.Unit, target: str) -> store.Image:
        key = unit.digest, target
        made[key] = made.get(key) or compile_image(unit, target)
        return made[key]

    monkeypatch.setattr(store, "compile_image", compiled)
    monkeypatch.setattr(lookup, "compile_image", compiled)


def fill(folder: Path, kernels: Path, before: str) -> Path:
    """What prebuild is to find: no folder, "the same" as it makes, or images of "others" sources."""
    if before == "others":
        (kernels / "tiny.cuh").write_text(HEADER + "// as it was\n")
    forget_sources()
    if before != "nothing":
        invoke("prebuild", "--arch", "sm_90", "--out", folder)
    (kernels / "tiny.cuh").write_text(HEADER)
    forget_sources()
    return folder


def renew(folder: Path, template: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if template.exists():
        shutil.copytree(template, folder)


def complete(folder: Path) -> None:
    """Prebuilding again makes a folder what it should be, and an hour later leaves nothing else in it."""
    root = Root(folder, "prebuilt")
    invoke("prebuild", "--arch", "sm_90", "--out", folder)
    assert lacking(root) == []
    if prebuild.problems(root, strict=True) or leftovers(folder):
        for path in folder.rglob("*.*"):
            os.utime(path, (0, 0))
        invoke("prebuild", "--arch", "sm_90", "--out", folder)
    assert prebuild.problems(root, strict=True) == []
    assert leftovers(folder) == []


def leftovers(root: Path) -> list[Path]:
    return list(root.rglob(f"{folders.TEMPORARY}*"))


def lacking(root: Root) -> list[str]:
    """What a folder lacks; more than it needs may be left for an hour."""
    odd = prebuild.problems(root, strict=True)
    return [problem for problem in odd if not re.search(r": stale|manifest.json does not list ", problem)]
