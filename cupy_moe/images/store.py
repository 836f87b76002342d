"""What is in a folder of images: checked when it is read, whole when it is written.

    <root>/v1/sm_90/align_shared-3f2a9c0d11e2ab47.cubin   a plain ELF file, as cuobjdump likes it
    <root>/v1/sm_90/align_shared-3f2a9c0d11e2ab47.json    its Sidecar, written last: no image without it
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

from .._version import __version__
from . import compiler, elf
from .folders import LAYOUT, Folder, Root, UntrustedError, explain
from .sources import SCHEMA, Unit
from .targets import is_ptx, number

FILE = re.compile(r"(?P<stem>(?P<unit>[A-Za-z0-9_]+)-[0-9a-f]{16})(?P<suffix>\.cubin|\.ptx|\.json)")
MAX_IMAGE, MAX_TEXT = 64 << 20, 1 << 20  # bytes


@dataclass(frozen=True)
class Sidecar:
    """What the `.json` beside an image says."""

    schema: int
    unit: str
    target: str
    source_digest: str
    entry_key: str
    size: int
    sha256: str
    kernels: compiler.Kernels
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
    sidecar: Sidecar
    data: bytes
    origin: str  # "prebuilt", "package", "checkout", "user" or "compiled"
    path: Path | None


class DamagedEntryError(Exception):
    """An image or its .json is not what was published. Never leaves a look-up."""


class UnreadEntryError(DamagedEntryError):
    """An image that cannot be read now. It may be whole, so it is nothing to remove."""


class Unread(str):
    """What is the matter with a .json that cannot be read now, and may be whole."""


def suffix(target: str) -> str:
    return ".ptx" if is_ptx(target) else ".cubin"


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
    "schema": lambda value: _is_count(value) and value == SCHEMA,
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


def parse(data: bytes) -> Sidecar:
    """The only way from bytes to an Sidecar, which so is what it says. Raises DamagedEntryError."""
    value = parse_json(data)
    if not isinstance(value, dict) or value.keys() != _FORM.keys():
        raise DamagedEntryError("cannot be understood (other fields)")
    if odd := [name for name, is_right in _FORM.items() if not is_right(value[name])]:
        raise DamagedEntryError(f"cannot be understood ({', '.join(odd)})")
    return Sidecar(**value)


def parse_manifest(data: bytes) -> dict[str, str]:
    """File name -> sha256. Raises DamagedEntryError."""
    value = parse_json(data)
    files = value.get("files") if isinstance(value, dict) else None
    if not isinstance(files, dict) or not _is_dict(files, _is_digest) or not all(map(FILE.fullmatch, files)):
        raise DamagedEntryError("cannot be understood")
    return files


def sidecars(folder: Folder, unit: str | None = None) -> Iterator[tuple[Path, Sidecar | str]]:
    """The sidecars of a folder, or of one unit, and what they say; or what is wrong, as to say of a path."""
    try:
        names = folder.names()
    except OSError as error:
        yield folder.path, Unread(explain(error))
        return
    yield from sidecars_of(folder, names, unit)


def sidecars_of(
    folder: Folder, names: list[str], unit: str | None = None
) -> Iterator[tuple[Path, Sidecar | str]]:
    """As above, of a folder that was listed."""
    for name in names:
        match = FILE.fullmatch(name)
        if not match or match["suffix"] != ".json" or unit not in (None, match["unit"]):
            continue
        found: Sidecar | str
        try:
            found = parse(folder.read(name, MAX_TEXT))
            if (found.target, found.stem) != (folder.path.name, match["stem"]):
                found = f"is of {found.target}/{found.stem}"
        except FileNotFoundError:
            continue  # the folder is being cleaned
        except UntrustedError as error:
            found = explain(error)
        except OSError as error:
            found = Unread(explain(error))
        except DamagedEntryError as error:
            found = str(error)
        yield folder.path / name, found


# ---- images ---------------------------------------------------------------------------------------------


def read(folder: Folder, sidecar: Sidecar) -> bytes:
    """The bytes of an image, checked against its sidecar. Raises DamagedEntryError."""
    try:
        data = folder.read(sidecar.stem + suffix(sidecar.target), MAX_IMAGE)
    except (UntrustedError, FileNotFoundError) as error:
        raise DamagedEntryError(explain(error)) from None
    except OSError as error:
        raise UnreadEntryError(explain(error)) from error
    if len(data) != sidecar.size:
        raise DamagedEntryError(f"has {len(data)} bytes instead of {sidecar.size}")
    if hashlib.sha256(data).hexdigest() != sidecar.sha256:
        raise DamagedEntryError("does not match its sha256")
    if not is_ptx(sidecar.target) and elf.number(data) != number(sidecar.target):
        raise DamagedEntryError(f"holds code for {elf.number(data)} instead of {sidecar.target}")
    return data


def entry_points(data: bytes, target: str) -> set[str]:
    """The kernels in an image: from its ELF symbols, or from the text of PTX. Raises DamagedEntryError."""
    if is_ptx(target):
        return set(re.findall(r"\.entry\s+(\w+)", data.decode(errors="replace")))
    try:
        return set(elf.entry_points(data))
    except (struct.error, ValueError, IndexError, OverflowError):
        raise DamagedEntryError("has no symbols that can be read") from None


def changed_files(sidecar: Sidecar, unit: Unit) -> str:
    """What makes an image stale."""
    names = sorted(name for name, _ in set(sidecar.files.items()) ^ set(unit.files.items()))
    return ", ".join(dict.fromkeys(names)) or "compile options"


# ---- write ----------------------------------------------------------------------------------------------


def compile_image(unit: Unit, target: str) -> Image:
    made = compiler.compile(unit, target)
    sidecar = Sidecar(
        schema=SCHEMA,
        unit=unit.name,
        target=target,
        source_digest=unit.digest,
        entry_key=compiler.entry_key(unit.digest, target, made.toolchain),
        size=len(made.data),
        sha256=hashlib.sha256(made.data).hexdigest(),
        kernels=made.kernels,
        files=unit.files,
        options=list(unit.options),
        nvrtc=made.toolchain.nvrtc,
        nvrtc_build=made.toolchain.build,
        package=__version__,
    )
    return Image(sidecar, made.data, "compiled", None)


def publish(root: Root, image: Image, attempts: int = 3) -> Path:
    """Write an image and then its sidecar, each by rename; returns the path of the image. Raises OSError."""
    name = image.sidecar.stem + suffix(image.sidecar.target)
    try:
        with root.open(LAYOUT, image.sidecar.target, create=True) as folder:
            folder.write(name, image.data)
            folder.write(image.sidecar.stem + ".json", to_json(asdict(image.sidecar)))
            return folder.path / name
    except FileNotFoundError:  # the folder was removed under us
        if attempts == 1:
            raise
        return publish(root, image, attempts - 1)


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
