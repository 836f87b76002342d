"""Sources -> units and their digests.

A *unit* is one `.cu` file in a folder of `kernels_cu/`; what it includes is handed to NVRTC from memory, so
that no path of a machine is part of a compilation or of a digest, and images can be moved between machines. A
line of its own says what it is made for, where that is not every target, and another with which options:

    // targets  sm_90a sm_100a
    // options  --use_fast_math
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import config
from ..errors import CupyMoeError
from .targets import DEFAULT_TARGETS, SPECIFIC_TARGETS

SCHEMA = 1
OPTIONS = ("-std=c++17",)


@dataclass(frozen=True)
class Unit:
    name: str
    source: bytes
    headers: dict[str, bytes]  # those that it includes, by the names it does it by: others change no digest
    options: tuple[str, ...]
    targets: tuple[str, ...] = DEFAULT_TARGETS  # what it can be made for
    files: dict[str, str] = field(init=False)  # file name -> sha256
    digest: str = field(init=False)  # contents and options only: no path, time, version or toolchain

    def __post_init__(self) -> None:
        contents = {f"{self.name}.cu": self.source, **self.headers}
        files = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(contents.items())}
        object.__setattr__(self, "files", files)
        object.__setattr__(self, "digest", source_digest(self.name, files, self.options))


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def source_digest(unit: str, files: dict[str, str], options: Iterable[str]) -> str:
    return digest_of([SCHEMA, unit, files, list(options)])


def checkout() -> Path | None:
    """The repository root when the package runs from a checkout or an editable install."""
    root = _package().parent
    return root if (root / "kernels_cu").is_dir() else None


def source_folder() -> Path:
    packaged = _package() / "kernels_cu"
    if packaged.is_dir():
        return packaged
    root = checkout()
    if root is None:
        raise CupyMoeError(f"the kernel sources are missing ({packaged}); reinstall cupy-moe")
    return root / "kernels_cu"


def _package() -> Path:
    return Path(__file__).resolve().parent.parent


def units() -> dict[str, Unit]:
    """All units by name, read and hashed once per process."""
    return _read_units(source_folder(), (*OPTIONS, *config.nvrtc_flags()))


def unit(name: str) -> Unit:
    try:
        return units()[name]
    except KeyError:
        raise CupyMoeError(f"no kernel {name!r}; there are: {', '.join(units())}") from None


@functools.cache
def _read_units(folder: Path, options: tuple[str, ...]) -> dict[str, Unit]:
    headers, found = dict(_read(folder, ".cuh")), dict[str, Unit]()
    for path, data in _read(folder, ".cu"):
        name = os.path.basename(path).removesuffix(".cu")
        if name in found:
            raise CupyMoeError(f"two files in {folder} are called {name}.cu")
        said = {key: tuple(words.decode().split()) for key, words in _SAYS.findall(b"\n" + data)}
        wanted = said.get(b"targets", DEFAULT_TARGETS)
        if unknown := set(wanted) - {*DEFAULT_TARGETS, *SPECIFIC_TARGETS}:
            raise CupyMoeError(f"{path} wants unknown targets: {', '.join(sorted(unknown))}")
        own = (*options, *said.get(b"options", ()))
        found[name] = Unit(name, data, _included(data, headers), own, wanted)
    return dict(sorted(found.items()))


# That begin with a text, which is found ten times as fast as the beginning of a line.
_SAYS = re.compile(rb"\n// (targets|options)  (.*)")
_INCLUDES = re.compile(rb'\n#include "([^"]+)"')


def _read(folder: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Files by their paths from the folder on; `Path.rglob` would take twice as long."""
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            if name.endswith(suffix):
                path = os.path.join(parent, name)
                with open(path, "rb") as file:
                    yield os.path.relpath(path, folder), file.read()


def _included(source: bytes, headers: dict[str, bytes]) -> dict[str, bytes]:
    """Of the headers, those that a source includes, and that these include; whether or not under an `#if`.
    The compiler gets no others, so what is overlooked cannot go unseen."""
    names = [name.decode() for name in _INCLUDES.findall(b"\n" + source)]
    found = {name: headers[name] for name in names if name in headers}
    rest = {name: data for name, data in headers.items() if name not in found}
    for data in list(found.values()):
        found |= _included(data, rest)
    return dict(sorted(found.items()))
