"""Environment variables: read when used, never at import; a bad value is refused by name."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ConfigError

VARIABLES = {
    "CUPY_MOE_PREBUILT_DIR": "folders of prebuilt images, separated as in PATH; searched first",
    "CUPY_MOE_CACHE_DIR": "the user cache, where compiled kernels are kept",
    "CUPY_MOE_DISABLE_CACHE": "1: keep compiled kernels in memory only",
    "CUPY_MOE_DISABLE_JIT": "1: never compile; a kernel that is not prebuilt is an error",
    "CUPY_MOE_FORCE_JIT": "1: ignore prebuilt images",
    "CUPY_MOE_NVRTC_FLAGS": "extra NVRTC options, e.g. -lineinfo; they are part of the source digest",
}

FLAGS = ("CUPY_MOE_DISABLE_CACHE", "CUPY_MOE_DISABLE_JIT", "CUPY_MOE_FORCE_JIT")


def flag(name: str) -> bool:
    value = os.environ.get(name, "")
    if value in ("", "0"):
        return False
    if value == "1":
        return True
    raise ConfigError(f"{name}={value!r}: expected 0 or 1")


def nvrtc_flags() -> tuple[str, ...]:
    flags = tuple(os.environ.get("CUPY_MOE_NVRTC_FLAGS", "").split())
    for text in flags:
        if not text.startswith("-") or text.startswith(
            ("-arch", "--gpu-architecture", "-I", "--include-path")
        ):
            raise ConfigError(
                f"CUPY_MOE_NVRTC_FLAGS: {text!r} is not accepted; write options such as -lineinfo in the"
                " -name=value form (architecture and include folders are chosen by cupy_moe)"
            )
    return flags


def prebuilt_dirs() -> list[Path]:
    folders = [Path(part) for part in os.environ.get("CUPY_MOE_PREBUILT_DIR", "").split(os.pathsep) if part]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"CUPY_MOE_PREBUILT_DIR: {str(folder)!r} is not a folder")
    return folders


def cache_dir() -> Path | None:
    value = os.environ.get("CUPY_MOE_CACHE_DIR", "")
    if not value:
        return None
    path = Path(os.path.abspath(os.path.expanduser(value)))
    if path.exists() and not path.is_dir():
        raise ConfigError(f"CUPY_MOE_CACHE_DIR={value!r} is not a folder")
    return path
