"""What the whole suite shares: the `gpu` marker, caches of its own, Hypothesis' settings, and fixtures."""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
from pathlib import Path

import hypothesis
import pytest
from cache_helpers import Everything, Sandbox, write_sources
from cli_helpers import invoke
from filelock import FileLock

from cupy_moe.images import compiler, folders, lookup, prebuild, sources, targets
from cupy_moe.images.folders import Root

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


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    box = Sandbox(tmp_path, write_sources(tmp_path / "kernels_cu"), tmp_path / "user", tmp_path / "prebuilt")
    for name in [name for name in os.environ if name.startswith("CUPY_MOE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUPY_MOE_CACHE_DIR", str(box.user))
    monkeypatch.setattr(sources, "source_folder", lambda: box.sources)
    monkeypatch.setattr(sources, "checkout", lambda: None)
    monkeypatch.setattr(folders, "_warned", set())
    monkeypatch.setattr(lookup, "_compiled", {})
    return box


@pytest.fixture
def prebuilt(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in CUPY_MOE_PREBUILT_DIR, with what `cupy-moe prebuild` makes for two targets."""
    invoke("prebuild", "--arch", "sm_90", "--arch", "8.0", "--out", sandbox.prebuilt)
    monkeypatch.setenv("CUPY_MOE_PREBUILT_DIR", str(sandbox.prebuilt))
    return sandbox.prebuilt


@pytest.fixture(scope="session")
def everything(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Everything:
    """Every kernel of the package for every target; kept between runs where the checkout can be written, as
    sources change seldom."""
    kept = pytestconfig.rootpath / ".pytest_cache" / f"cubins-{compiler.toolchain().nvrtc}"
    folder = kept if can_write(kept) else tmp_path_factory.mktemp("cubins")
    root = Root(folder, "prebuilt")
    asked = [*compiler.supported_targets(), targets.PTX_TARGET]
    units = sources.units().values()
    wanted = [(unit, t) for name in asked for unit in units for t in targets.made_for(unit.targets, name)]
    with FileLock(folder / "lock"):  # one process of pytest-xdist builds, the others find
        missing = [pair for pair in wanted if prebuild.state([root], *pair).status == "missing"]
        built = list(prebuild.run(root, missing, os.cpu_count() or 1))
        for target in {target for _, target in wanted}:
            prebuild.finish(root, target)
    failed = {(r.unit, r.target): r for r in built if r.status == "failed"}
    found = [prebuild.state([root], *pair) for pair in wanted]
    return Everything(folder, [failed.get((r.unit, r.target), r) for r in found])


def can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK)
    except OSError:
        return False
