"""The package's only import of CuPy; `from ._cupy import cupy` wherever it is needed, inside functions.

CuPy creates its own cache folder when it is imported and fails where it cannot (HOME unset or read-only, an
unknown uid, a full disk). We compile and load without that folder, so point CuPy at any folder that exists.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

from .errors import DependencyError


def _give_cupy_a_folder() -> None:
    if "CUPY_CACHE_DIR" in os.environ:
        return
    default = os.path.expanduser("~/.cupy/kernel_cache")
    try:
        # Without HOME and a passwd entry, "~" would be created in the current folder.
        if not os.path.isabs(default):
            raise FileNotFoundError(default)
        os.makedirs(default, exist_ok=True)
    except OSError:
        try:
            folder = tempfile.mkdtemp(prefix="cupy_moe-")  # not a fixed name in /tmp, which others could fill
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        except OSError:
            folder = os.sep
        os.environ["CUPY_CACHE_DIR"] = folder


_give_cupy_a_folder()
try:
    import cupy
    from cupy.cuda import nvrtc  # noqa: F401  (loads the bindings; the library itself comes with the first call)
except Exception as error:  # also what an unfitting NumPy or a broken install raises
    raise DependencyError(
        f"CuPy cannot be imported ({error}); pip install 'cupy-moe[cuda12]' (CUDA 12 driver)"
        " or 'cupy-moe[cuda13]' (CUDA 13 driver)"
    ) from error

__all__ = ["cupy"]
