"""What is in a folder of images: checked when it is read, whole when it is written.

    <root>/v1/sm_90/align_shared-3f2a9c0d11e2ab47.cubin   a plain ELF file, as cuobjdump likes it
    <root>/v1/sm_90/align_shared-3f2a9c0d11e2ab47.json    its Entry, written last: no image without it
    <root>/v1/sm_90/manifest.json                         prebuilt folders only, see prebuild.py

Files are published by rename and never changed, so there is no lock: two processes that both miss an image
both compile it (tens of ms) and publish identical bytes. No CuPy, no torch, no GPU.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import build
from ._version import __version__
from .folders import LAYOUT, Folder, Root, explain

FILE = re.compile(r"(?P<stem>(?P<unit>[A-Za-z0-9_]+)-[0-9a-f]{16})(?P<suffix>\.cubin|\.ptx|\.json)")
MAX_IMAGE, MAX_TEXT = 64 << 20, 1 << 20  # bytes


@dataclass(frozen=True)
class Entry:
    """What the `.json` beside an image says."""

    schema: int
    unit: str
    target: str
    source_digest: str
    entry_key: str
    size: int
    sha256: str
    kernels: build.Kernels
    files: dict[str, str]
    options: list[str]
    nvrtc: str
    nvrtc_build: str
    package: str

    @property
    def stem(self) -> str:
        return f"{self.unit}-{self.entry_key[:16]}"


@dataclass(frozen=True)
class Image:
    entry: Entry
    data: bytes
    origin: str  # "prebuilt", "package", "checkout", "user" or "compiled"
    path: Path | None


class DamagedEntryError(Exception):
    """An image or its .json is not what was published. Never leaves a look-up."""


def suffix(target: str) -> str:
    return ".ptx" if target.startswith("compute_") else ".cubin"


# ---- entries --------------------------------------------------------------------------------------------


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_dict(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(_is_text(key) and of(item) for key, item in value.items())


_FORM: dict[str, Callable[[Any], bool]] = {
    "schema": lambda value: _is_count(value) and value == build.SCHEMA,
    "unit": _is_text,
    "target": _is_text,
    "source_digest": _is_digest,
    "entry_key": _is_digest,
    "size": _is_count,
    "sha256": _is_digest,
    "kernels": lambda value: _is_dict(value, lambda figures: _is_dict(figures, _is_count)),
    "files": lambda value: _is_dict(value, _is_digest),
    "options": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "nvrtc": _is_text,
    "nvrtc_build": _is_text,
    "package": _is_text,
}


def parse_json(data: bytes) -> Any:
    """Raises DamagedEntryError."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise DamagedEntryError("cannot be understood (no JSON)") from None


def parse(data: bytes) -> Entry:
    """The only way from bytes to an Entry, which so is what it says. Raises DamagedEntryError."""
    value = parse_json(data)
    if not isinstance(value, dict) or value.keys() != _FORM.keys():
        raise DamagedEntryError("cannot be understood (other fields)")
    if odd := [name for name, is_right in _FORM.items() if not is_right(value[name])]:
        raise DamagedEntryError(f"cannot be understood ({', '.join(odd)})")
    return Entry(**value)


def parse_manifest(data: bytes) -> dict[str, str]:
    """File name -> sha256. Raises DamagedEntryError."""
    value = parse_json(data)
    files = value.get("files") if isinstance(value, dict) else None
    if not isinstance(files, dict) or not _is_dict(files, _is_digest) or not all(map(FILE.fullmatch, files)):
        raise DamagedEntryError("cannot be understood")
    return files


def entries(folder: Folder, unit: str | None = None) -> Iterator[tuple[Path, Entry | str]]:
    """The sidecars of a folder, or of one unit, and what they say; or what is wrong, as to say of a path."""
    try:
        names = folder.names()
    except OSError as error:
        yield folder.path, explain(error)
        return
    for name in names:
        match = FILE.fullmatch(name)
        if not match or match["suffix"] != ".json" or unit not in (None, match["unit"]):
            continue
        found: Entry | str
        try:
            found = parse(folder.read(name, MAX_TEXT))
            if (found.target, found.stem) != (folder.path.name, match["stem"]):
                found = f"is of {found.target}/{found.stem}"
        except FileNotFoundError:
            continue  # the folder is being cleaned
        except OSError as error:
            found = explain(error)
        except DamagedEntryError as error:
            found = str(error)
        yield folder.path / name, found


# ---- images ---------------------------------------------------------------------------------------------


def read(folder: Folder, entry: Entry) -> bytes:
    """The bytes of an image, checked against its entry. Raises DamagedEntryError."""
    try:
        data = folder.read(entry.stem + suffix(entry.target), MAX_IMAGE)
    except OSError as error:
        raise DamagedEntryError(explain(error)) from None
    if len(data) != entry.size:
        raise DamagedEntryError(f"has {len(data)} bytes instead of {entry.size}")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DamagedEntryError("does not match its sha256")
    if entry.target.startswith("sm_") and elf_target(data) != entry.target:
        raise DamagedEntryError(f"holds code for {elf_target(data)} instead of {entry.target}")
    return data


def elf_target(data: bytes) -> str:
    """The target that the header of a cubin states, or why there is none."""
    if len(data) < 64 or data[:5] != b"\x7fELF\x02":
        return "no ELF file"
    machine, flags, abi = *struct.unpack_from("<H", data, 18), *struct.unpack_from("<I", data, 48), data[7]
    if machine != 190 or abi not in (0x33, 0x41) or build.elf_end(data) > len(data):
        return "no whole CUDA ELF file"
    return f"sm_{flags & 0xFF}" if abi == 0x33 else f"sm_{flags >> 8 & 0xFF}"


def entry_points(data: bytes, target: str) -> set[str]:
    """The kernels in an image: from its ELF symbols, or from the text of PTX. Raises DamagedEntryError."""
    if target.startswith("compute_"):
        return set(re.findall(r"\.entry\s+(\w+)", data.decode(errors="replace")))
    try:
        return set(_elf_entries(data))
    except (struct.error, ValueError, IndexError, OverflowError):
        raise DamagedEntryError("has no symbols that can be read") from None


def _elf_entries(data: bytes) -> Iterator[str]:
    (offset,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<2H", data, 58)
    sections = [struct.unpack_from("<IIQQQQI", data, offset + size * index) for index in range(count)]
    symbols = next((section for section in sections if section[1] == 2), None)  # SHT_SYMTAB
    if symbols is None:
        return
    *_, start, length, link = symbols
    for position in range(start, min(start + length, len(data)), 24):
        name, info, other = struct.unpack_from("<IBB", data, position)
        if info & 15 == 2 and other & 0x10:  # STT_FUNC, STO_CUDA_ENTRY
            begin = sections[link][4] + name
            yield data[begin : data.index(b"\0", begin)].decode()


def changed_files(entry: Entry, unit: build.Unit) -> str:
    """What makes an entry stale."""
    names = sorted(name for name, _ in set(entry.files.items()) ^ set(unit.files.items()))
    return ", ".join(dict.fromkeys(names)) or "compile options"


# ---- write ----------------------------------------------------------------------------------------------


def compile_image(unit: build.Unit, target: str) -> Image:
    made = build.compile(unit, target)
    entry = Entry(
        schema=build.SCHEMA,
        unit=unit.name,
        target=target,
        source_digest=unit.digest,
        entry_key=build.entry_key(unit.digest, target, made.toolchain),
        size=len(made.data),
        sha256=hashlib.sha256(made.data).hexdigest(),
        kernels=made.kernels,
        files=unit.files,
        options=list(unit.options),
        nvrtc=made.toolchain.nvrtc,
        nvrtc_build=made.toolchain.build,
        package=__version__,
    )
    return Image(entry, made.data, "compiled", None)


def publish(root: Root, image: Image, attempts: int = 3) -> Path:
    """Write an image and then its sidecar, each by rename; returns the path of the image. Raises OSError."""
    name = image.entry.stem + suffix(image.entry.target)
    try:
        with root.open(LAYOUT, image.entry.target, create=True) as folder:
            folder.write(name, image.data)
            folder.write(image.entry.stem + ".json", to_json(asdict(image.entry)))
            return folder.path / name
    except FileNotFoundError:  # the folder was removed under us
        if attempts == 1:
            raise
        return publish(root, image, attempts - 1)


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
