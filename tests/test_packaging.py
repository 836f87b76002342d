"""What is in a wheel, and which modules stay light to import."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from shutil import copy, copytree

import pytest
from cache_helpers import Everything, copy_package, run_python

import cupy_moe
from cupy_moe import __version__
from cupy_moe.images import compiler, sources, targets

ROOT = Path(__file__).parents[1]
TOP_LEVEL = [path.name for path in ROOT.glob("*.md")] + ["pyproject.toml", "LICENSE", ".gitignore"]
FAKE_CACHE = ("v1/sm_90/align-0123456789abcdef.cubin", "v1/sm_90/align-0123456789abcdef.json")


@pytest.mark.parametrize(
    ("module", "barred"),
    [
        ("cupy_moe", "torch cupy numpy click"),
        ("cupy_moe.plans.align", "torch cupy numpy"),
        ("cupy_moe.images.lookup", "torch cupy numpy"),
        ("cupy_moe.tools.cli", "torch cupy numpy"),
        ("cupy_moe.cpu.align", "cupy"),
    ],
)
def test_imports_stay_light(module: str, barred: str) -> None:
    code = f"import sys, {module}; print(*sorted(set({barred.split()}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


# What each folder may import, besides itself and the modules beside the folders.
LAYERS: dict[str, set[str]] = {
    "images": set(),
    "plans": set(),
    "cpu": {"plans"},
    "cuda": {"plans", "images"},
    "dispatch": set(),
    "operators": {"plans", "cpu", "cuda", "dispatch"},
    "parallel": {"operators", "plans", "cpu", "cuda", "dispatch"},
    "compat": {"operators", "cpu", "dispatch"},
    "tools": {"operators", "plans", "cuda", "images"},
}


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer: str) -> None:
    for path in (ROOT / "cupy_moe" / layer).glob("*.py"):
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                imported |= {(node.module or alias.name).partition(".")[0] for alias in node.names}
        assert imported & LAYERS.keys() <= LAYERS[layer], path


def test_every_folder_has_its_layer() -> None:
    folders = {path.parent.name for path in (ROOT / "cupy_moe").glob("*/__init__.py")}
    assert folders == LAYERS.keys()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts of the checkout that a wheel is made of, with a cache that somebody has filled."""
    tree = tmp_path_factory.mktemp("tree")
    for name in TOP_LEVEL:
        copy(ROOT / name, tree)
    for name in ("cupy_moe", "kernels_cu"):
        copytree(ROOT / name, tree / name)
    for name in (*FAKE_CACHE, "v1/sm_90/.tmp-123-abc", ".gitignore", "README.md"):
        path = tree / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("*" if name == ".gitignore" else name)
    return tree


def wheel_names(tree: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    hatchling = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(tree)  # PEP 517: a build backend works on the current folder
    name = hatchling.build_wheel(str(out))
    assert name == f"cupy_moe-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(out / name) as wheel:
        return sorted(n for n in wheel.namelist() if ".dist-info/" not in n)


def test_wheel_carries_sources_and_cache(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = [f.relative_to(ROOT).as_posix() for f in (ROOT / "cupy_moe").rglob("*.py")]
    folder = ROOT / "kernels_cu"
    kernels = [f"cupy_moe/kernels_cu/{f.relative_to(folder)}" for f in folder.rglob("*.cu*")]
    assert kernels
    wanted = [*package, "cupy_moe/py.typed", *kernels, *(f"cupy_moe/cache/{n}" for n in FAKE_CACHE)]
    assert wheel_names(tree, tmp_path, monkeypatch) == sorted(wanted)


def test_sdist_makes_the_same_wheel(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hatchling = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(tree)
    with tarfile.open(tmp_path / hatchling.build_sdist(str(tmp_path))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
        assert {"cache/README.md", "kernels_cu/README.md", "CONTRIBUTING.md", "SECURITY.md"} <= names
        assert not [name for name in names if ".tmp-" in name]
        sdist.extraction_filter = getattr(tarfile, "data_filter", None)  # not before 3.10.12 and 3.11.4
        sdist.extractall(tmp_path)
    unpacked = tmp_path / f"cupy_moe-{__version__}"
    assert wheel_names(unpacked, tmp_path, monkeypatch) == wheel_names(tree, tmp_path, monkeypatch)


LOOK_UP = """
import sys
from cupy_moe.images import lookup, sources, targets
for target in (*targets.TARGETS, "sm_130"):
    capability = divmod(targets.number(target), 10)
    for name, unit in sources.units().items():
        if targets.runs_somehow(capability, unit.targets):
            image = next(lookup.candidates(name, capability))
            print(image.origin, image.sidecar.target)
assert not {"torch", "cupy"} & set(sys.modules)
"""


def test_wheel_with_every_kernel_is_small_and_compiles_nothing(
    everything: Everything, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "checkout"
    copytree(tree, checkout, ignore=lambda folder, _: ["v1"] if folder.endswith("/cache") else [])
    copytree(everything.folder / "v1", checkout / "cache" / "v1")
    wheel_names(checkout, tmp_path, monkeypatch)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size <= 12_000_000
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)

    verify = run_python(installed, "-m", "cupy_moe", "verify", "--strict", "cupy_moe/cache")
    assert verify.returncode == 0, verify.stdout
    known = [*compiler.supported_targets(), targets.PTX_TARGET]
    assert f"{len(everything.results)} images in 1 folders, 0 problems" in verify.stdout
    if set(targets.TARGETS) <= set(known):
        found = run_python(installed, "-c", LOOK_UP, env={"CUPY_MOE_DISABLE_JIT": "1"})
        numbers = [(target, divmod(targets.number(target), 10)) for target in targets.TARGETS]
        wanted = [
            f"package {targets.native_targets(capability, unit.targets)[0]}"
            for _, capability in numbers
            for unit in sources.units().values()
            if targets.native_targets(capability, unit.targets)
        ]
        wanted += [
            f"package {targets.PTX_TARGET}"
            for u in sources.units().values()
            if targets.PTX_TARGET in u.targets
        ]
        assert found.stdout.splitlines() == wanted, found.stderr


def test_script_builds_a_wheel_that_holds_all(tmp_path: Path) -> None:
    pytest.importorskip("hatchling.build")
    if not set(targets.TARGETS) <= set(compiler.supported_targets()):
        pytest.skip(f"NVRTC {compiler.toolchain().nvrtc} does not know every target")
    checkout = copy_package(tmp_path / "checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        copy(ROOT / name, checkout)
    (checkout / "scripts").mkdir()
    for name in ("_venv", "wheel"):
        copy(ROOT / "scripts" / name, checkout / "scripts")
    interpreter = os.path.relpath(sys.executable, checkout)  # it need not be an absolute path
    environment = os.environ | {"CUPY_MOE_PYTHON": interpreter, "CUPY_MOE_NVRTC_FLAGS": "-lineinfo"}
    run = subprocess.run(
        ["scripts/wheel"], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert f"{len(targets.TARGETS) + 1} images in 1 folders, 0 problems" in run.stdout
    with zipfile.ZipFile(checkout / f"dist/cupy_moe-{__version__}-py3-none-any.whl") as wheel:
        names = wheel.namelist()
    for target in targets.TARGETS:
        assert any(re.search(rf"/cache/v1/{target}/tiny-\w+\.cubin$", name) for name in names)


def test_names_that_are_none_are_errors_for_type_checkers_too() -> None:
    with pytest.raises(AttributeError, match="module 'cupy_moe' has no attribute 'nonsense'"):
        cupy_moe.nonsense  # type: ignore[attr-defined]  # noqa: B018
