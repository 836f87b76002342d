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
    "CUPY_MOE_NVRTC_FLAGS": "more NVRTC options, e.g. -lineinfo; kernels prebuilt without them are not used",
}
OF_SCRIPTS = ("CUPY_MOE_PYTHON", "CUPY_MOE_REQUIRE_GPU")

FLAGS = ("CUPY_MOE_DISABLE_CACHE", "CUPY_MOE_DISABLE_JIT", "CUPY_MOE_FORCE_JIT")


def flag(name: str) -> bool:
    value = os.environ.get(name, "")
    if value in ("", "0"):
        return False
    if value == "1":
        return True
    raise ConfigError(f"{name}={value!r}: expected 0 or 1")


def may_compile() -> bool:
    allowed = not flag("CUPY_MOE_DISABLE_JIT")
    if flag("CUPY_MOE_FORCE_JIT") and not allowed:
        raise ConfigError("CUPY_MOE_FORCE_JIT=1 contradicts CUPY_MOE_DISABLE_JIT=1")
    return allowed


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
    parts = os.environ.get("CUPY_MOE_PREBUILT_DIR", "").split(os.pathsep)
    found = [_folder("CUPY_MOE_PREBUILT_DIR", part) for part in parts if part]
    for path in found:
        if not os.path.isdir(path):
            raise ConfigError(f"CUPY_MOE_PREBUILT_DIR: {str(path)!r} is not a folder")
    return found


def cache_dir() -> Path | None:
    value = os.environ.get("CUPY_MOE_CACHE_DIR", "")
    if not value:
        return None
    path = _folder("CUPY_MOE_CACHE_DIR", value)
    if os.path.lexists(path) and not os.path.isdir(path):
        raise ConfigError(f"CUPY_MOE_CACHE_DIR={value!r} is not a folder")
    return path


def _folder(name: str, value: str) -> Path:
    try:
        return Path(os.path.abspath(os.path.expanduser(value)))
    except OSError as error:  # the current folder was removed
        raise ConfigError(f"{name}={value!r} is relative to a folder that is gone ({error})") from None


def plain_terminal() -> bool:
    """Whether a terminal is not to be sent colours, nor lines that are drawn over."""
    return os.environ.get("TERM") == "dumb" or bool(os.environ.get("NO_COLOR"))
