"""What the whole suite shares: the `gpu` marker, a cache folder of its own, and Hypothesis' settings."""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile

import hypothesis
import pytest

# Time limits on single examples fail on a busy machine; CI has to say the same thing twice of one commit.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module is imported: nothing may come from, or be left in, the user's own cache.
    folder = tempfile.TemporaryDirectory(prefix="cupy_moe-tests-", ignore_cleanup_errors=True)
    os.environ["CUPY_MOE_CACHE_DIR"] = folder.name
    config.add_cleanup(folder.cleanup)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := missing_for_gpu()):
        if os.environ.get("CUPY_MOE_REQUIRE_GPU", "0") not in ("", "0"):
            pytest.fail(f"CUPY_MOE_REQUIRE_GPU is set, but {reason}", pytrace=False)
        pytest.skip(reason)


@functools.cache
def missing_for_gpu() -> str | None:
    """Why tests marked `gpu` cannot run here; None where they can."""
    import torch

    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    return None if torch.cuda.is_available() else "no CUDA GPU"
