"""What is in a wheel, which modules stay light to import, and whether the README says what is there."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from shutil import copy, copytree
from typing import Any

import pytest

from cupy_moe import __version__, cli, config

ROOT = Path(__file__).parents[1]
FAKE_CACHE = ("v1/sm_90/align-0123456789abcdef.cubin", "v1/sm_90/align-0123456789abcdef.json")


@pytest.mark.parametrize(
    ("module", "barred"),
    [
        ("cupy_moe", "torch cupy numpy click"),
        ("cupy_moe.plan", "torch cupy numpy"),
        ("cupy_moe.cache", "torch cupy numpy"),
        ("cupy_moe.cli", "torch cupy numpy"),
        ("cupy_moe.build", "torch"),
        ("cupy_moe.cpu", "cupy"),
    ],
)
def test_imports_stay_light(module: str, barred: str) -> None:
    code = f"import sys, {module}; print(*sorted(set({barred.split()}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts of the checkout that a wheel is made of, with a cache that somebody has filled."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore"):
        copy(ROOT / name, tree)
    for name in ("cupy_moe", "kernels_cu"):
        copytree(ROOT / name, tree / name)
    for name in (*FAKE_CACHE, "v1/sm_90/.tmp-123-abc", ".gitignore"):
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
    package = [f.relative_to(ROOT).as_posix() for f in (ROOT / "cupy_moe").glob("*.py")]
    sources = [f"cupy_moe/kernels_cu/{f.name}" for f in (ROOT / "kernels_cu").glob("*.cu*")]
    assert sources
    wanted = [*package, "cupy_moe/py.typed", *sources, *(f"cupy_moe/cache/{n}" for n in FAKE_CACHE)]
    assert wheel_names(tree, tmp_path, monkeypatch) == sorted(wanted)


def test_sdist_makes_the_same_wheel(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hatchling = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(tree)
    with tarfile.open(tmp_path / hatchling.build_sdist(str(tmp_path))) as sdist:
        sdist.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"cupy_moe-{__version__}"
    assert wheel_names(unpacked, tmp_path, monkeypatch) == wheel_names(tree, tmp_path, monkeypatch)


def test_readme_names_every_command_and_variable() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in cli.main.commands if f"| `{name}" not in text] == []
    assert [name for name in config.VARIABLES if f"| `{name}" not in text] == []


def test_readme_example_runs_without_a_gpu() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(example.replace('device="cuda"', 'device="cpu"'), names)
    assert len(names["sorted_ids"]) == 8192 + 64 * 127
    assert len(names["expert_ids"]) == 128
    assert 8192 <= int(names["post_pad"]) <= len(names["sorted_ids"])
