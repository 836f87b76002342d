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
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

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
    return root if os.path.isdir(root / "kernels_cu") else None


def source_folder() -> Path:
    packaged = _package() / "kernels_cu"
    if os.path.isdir(packaged):
        return packaged
    root = checkout()
    if root is None:
        raise CupyMoeError(f"the kernel sources are missing ({packaged}); reinstall cupy-moe")
    return root / "kernels_cu"


@functools.cache
def _package() -> Path:
    return Path(__file__).resolve().parent.parent


def units() -> dict[str, Unit]:
    """All units by name."""
    return {name: unit(name) for name in sorted(_paths(source_folder()))}


def unit(name: str) -> Unit:
    """A unit, read and hashed once per process, as is each header."""
    folder = source_folder()
    paths = _paths(folder)
    if name not in paths:
        raise CupyMoeError(f"no kernel {name!r}; there are: {', '.join(sorted(paths))}")
    return _read_unit(folder, paths[name], (*OPTIONS, *config.nvrtc_flags()))


@functools.cache
def _paths(folder: Path) -> dict[str, str]:
    """Names of units -> where they are in the folder."""
    found: dict[str, str] = {}
    for parent, _, names in os.walk(folder, onerror=_refuse):  # in half the time of Path.rglob
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix == ".cu" and stem in found:
                raise CupyMoeError(f"two files in {folder} are called {name}")
            if suffix == ".cu":
                found[stem] = os.path.join(parent, name)
    return found


@functools.cache
def _read_unit(folder: Path, path: str, options: tuple[str, ...]) -> Unit:
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        _refuse(error)
    said = {key: tuple(words.decode().split()) for key, words in _SAYS.findall(b"\n" + source)}
    wanted = said.get(b"targets", DEFAULT_TARGETS)
    if unknown := set(wanted) - {*DEFAULT_TARGETS, *SPECIFIC_TARGETS}:
        relative = os.path.relpath(path, folder)
        raise CupyMoeError(f"{relative} wants unknown targets: {', '.join(sorted(unknown))}")
    headers: dict[str, bytes] = {}
    _include(folder, source, headers)
    name = os.path.basename(path).removesuffix(".cu")
    return Unit(name, source, dict(sorted(headers.items())), (*options, *said.get(b"options", ())), wanted)


# That begin with a text, which is found ten times as fast as the beginning of a line.
_SAYS = re.compile(rb"\n// (targets|options)  (.*)")
_INCLUDES = re.compile(rb'\n#include "([^"]+)"')


def _include(folder: Path, source: bytes, headers: dict[str, bytes]) -> None:
    """Adds the headers that a source includes, and that these include; whether or not under an `#if`.
    The compiler gets no others, so what is overlooked cannot go unseen."""
    for name in map(bytes.decode, _INCLUDES.findall(b"\n" + source)):
        if name not in headers and (header := _read_header(folder, name)) is not None:
            headers[name] = header
            _include(folder, header, headers)


@functools.cache
def _read_header(folder: Path, name: str) -> bytes | None:
    try:
        with open(os.path.join(folder, name), "rb") as file:
            return file.read()
    except FileNotFoundError:  # which the compiler tells with the line
        return None
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    """What cannot be read now is not remembered as if it were not there."""
    raise CupyMoeError(f"the kernel sources cannot be read: {error}") from error
