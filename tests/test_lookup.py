"""Where images are found, what is done about damaged ones, and how they are published. No GPU."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cache_helpers import PACKAGE, REAL, Everything, Sandbox, copy_package, files, run_python

from cupy_moe.errors import CompileError, ConfigError, DependencyError, KernelNotPrebuiltError
from cupy_moe.images import compiler, folders, lookup, prebuild, sources, store, targets
from cupy_moe.images.folders import Root

HOPPER = (9, 0)


def first(capability: tuple[int, int] = HOPPER) -> lookup.Image:
    return next(lookup.candidates("tiny", capability))


def offered(capability: tuple[int, int] = HOPPER) -> list[tuple[str, str]]:
    """All that a loader would be offered if the driver refused everything."""
    found = []
    with contextlib.suppress(KernelNotPrebuiltError):
        for image in lookup.candidates("tiny", capability):
            found.append((image.origin, image.sidecar.target))
    return found


@pytest.fixture
def no_compiler(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRTC is not installed; whatever a test compiles, it compiles before."""

    def missing(*_: object) -> None:
        raise DependencyError("NVRTC cannot be loaded; pip install nvidia-cuda-nvrtc-cu12")

    compiler.toolchain()
    monkeypatch.setattr(lookup, "_compile_cached", missing)


@pytest.fixture
def use_prebuilt(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Path:
    sandbox.prebuilt.mkdir()
    monkeypatch.setenv("CUPY_MOE_PREBUILT_DIR", str(sandbox.prebuilt))
    return sandbox.prebuilt


# ---- order


def test_the_first_use_compiles_and_the_next_process_does_not(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cupy_moe")
    image = first()
    assert (image.origin, image.sidecar.target) == ("compiled", "sm_90")
    assert "compiled tiny for sm_90" in caplog.text
    lookup._compiled.clear()
    monkeypatch.setattr(compiler, "_nvrtc", lambda: pytest.fail("the compiler was loaded"))
    again = first()
    assert (again.origin, again.data, again.sidecar) == ("user", image.data, image.sidecar)


def test_prebuilt_comes_before_the_user_cache(sandbox: Sandbox, use_prebuilt: Path) -> None:
    first()
    sandbox.publish(use_prebuilt, "sm_90")
    assert first().origin == "prebuilt"


def test_named_folders_come_before_the_packaged_one(
    sandbox: Sandbox, use_prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = sandbox.folder / "checkout"
    monkeypatch.setattr(sources, "checkout", lambda: checkout)
    sandbox.publish(checkout / "cache", "sm_90")
    assert first().origin == "checkout"
    sandbox.publish(use_prebuilt, "sm_90")
    second = sandbox.folder / "second"
    sandbox.publish(second, "sm_90")
    monkeypatch.setenv("CUPY_MOE_PREBUILT_DIR", f"{second}{os.pathsep}{use_prebuilt}")
    found = first()
    assert found.path is not None
    assert found.path.is_relative_to(second)


def test_own_target_then_lower_minors_then_ptx(
    sandbox: Sandbox, use_prebuilt: Path, no_compiler: None
) -> None:
    for target in ("sm_80", "sm_86", "sm_87", "sm_90", "sm_89", "compute_75", "compute_80", "compute_90"):
        sandbox.publish(use_prebuilt, target)
    ampere_to_ada = [("prebuilt", t) for t in ("sm_89", "sm_86", "sm_80", "compute_80", "compute_75")]
    assert offered((8, 9)) == ampere_to_ada
    assert offered((8, 7)) == [("prebuilt", t) for t in ("sm_87", "compute_80", "compute_75")]
    assert offered((12, 0)) == [("prebuilt", t) for t in ("compute_90", "compute_80", "compute_75")]


def test_ptx_comes_after_the_compiler(sandbox: Sandbox, use_prebuilt: Path) -> None:
    sandbox.publish(use_prebuilt, "compute_90")
    assert offered() == [("compiled", "sm_90"), ("prebuilt", "compute_90")]


def test_force_jit_ignores_prebuilt(
    sandbox: Sandbox, use_prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.publish(use_prebuilt, "sm_90")
    monkeypatch.setenv("CUPY_MOE_FORCE_JIT", "1")
    assert first().origin == "compiled"
    monkeypatch.setenv("CUPY_MOE_DISABLE_JIT", "1")
    with pytest.raises(ConfigError, match="contradicts"):
        first()


def test_prebuilt_images_match_whatever_compiler_made_them(
    sandbox: Sandbox, use_prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = store.compile_image(sandbox.unit, "sm_90")
    other = compiler.Toolchain("13.5.1", "CL-9")
    key = compiler.entry_key(sandbox.unit.digest, "sm_90", other)
    foreign = replace(
        image, sidecar=replace(image.sidecar, nvrtc=other.nvrtc, nvrtc_build=other.build, entry_key=key)
    )
    store.publish(Root(use_prebuilt, "prebuilt"), foreign)
    store.publish(Root(sandbox.user, "user"), foreign)
    assert first().origin == "prebuilt"
    monkeypatch.delenv("CUPY_MOE_PREBUILT_DIR")
    assert first().origin == "compiled"  # the user cache wants the compiler that is installed ...
    monkeypatch.setattr(compiler, "installed_nvrtc", frozenset)
    monkeypatch.setenv("CUPY_MOE_DISABLE_JIT", "1")
    assert first().origin == "user"  # ... unless there is none


def test_an_image_that_the_driver_refused_is_compiled_again(sandbox: Sandbox) -> None:
    first()
    assert offered() == [("user", "sm_90"), ("compiled", "sm_90")]


# ---- B8: what may be wrong


def test_a_missing_architecture_without_compiler_is_an_error_that_says_what_to_do(
    sandbox: Sandbox, use_prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUPY_MOE_DISABLE_JIT", "1")
    sandbox.publish(use_prebuilt, "sm_80")
    with pytest.raises(KernelNotPrebuiltError) as caught:
        first()
    message = str(caught.value)
    assert "'tiny' for compute capability 9.0" in message
    assert f"{use_prebuilt} (prebuilt): sm_80" in message
    assert "CUPY_MOE_DISABLE_JIT=1 is set" in message
    assert "cupy-moe prebuild --arch sm_90 --out DIR" in message


def test_other_sources_are_reported_once_with_the_file_that_differs(
    sandbox: Sandbox, use_prebuilt: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sandbox.publish(use_prebuilt, "sm_90")
    (sandbox.sources / "tiny.cuh").write_text("constexpr int kOffset = 4;\n")
    assert sandbox.unit
    assert first().origin == "compiled"
    assert first().origin == "user"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "tiny.cuh differs" in warnings[0]
    assert f"cupy-moe prebuild --arch sm_90 --out {use_prebuilt}" in warnings[0]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _other_architecture(path: Path) -> None:
    """Well-formed in all but what the ELF header says."""
    data = store.compile_image(sources.unit("tiny"), "sm_80").data
    sidecar = path.with_suffix(".json")
    entry = json.loads(sidecar.read_bytes())
    sha256 = __import__("hashlib").sha256(data).hexdigest()
    sidecar.write_bytes(store.to_json(entry | {"size": len(data), "sha256": sha256}))
    path.write_bytes(data)


def _edit(**changes: Any) -> Any:
    def edit(path: Path) -> None:
        sidecar = path.with_suffix(".json")
        sidecar.write_bytes(store.to_json(json.loads(sidecar.read_bytes()) | changes))

    return edit


DAMAGES = {
    "truncated": _truncate,
    "flipped bit": _flip,
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "other architecture": _other_architecture,
    "sidecar empty": lambda path: path.with_suffix(".json").write_bytes(b""),
    "sidecar not JSON": lambda path: path.with_suffix(".json").write_bytes(b"\xff{"),
    "sidecar a list": lambda path: path.with_suffix(".json").write_bytes(b"[]"),
    "sidecar of the future": _edit(schema=2),
    "sidecar with more": _edit(surprise=1),
    "sidecar of another": _edit(target="sm_80"),
    "sidecar of another unit": _edit(unit="../tiny"),
    "sidecar of a folder above": _edit(target="../sm_90"),
    "sidecar with an odd key": _edit(entry_key=5),
    "sidecar with odd figures": _edit(kernels=5),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_costs_one_warning_and_a_compilation(
    sandbox: Sandbox, use_prebuilt: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    DAMAGES[damage](sandbox.publish(use_prebuilt, "sm_90"))
    assert first().origin == "compiled"
    assert first().origin == "user"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert str(use_prebuilt) in warnings[0]
    assert prebuild.problems(Root(use_prebuilt, "prebuilt"), strict=False)


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "a folder"])
def test_the_user_cache_repairs_itself(sandbox: Sandbox, damage: str) -> None:
    good = first()
    (path,) = files(sandbox.user, "sm_90/*.cubin")
    DAMAGES[damage](path)
    lookup._compiled.clear()
    assert first().origin == "compiled"
    assert first().origin == "user"
    assert first().data == good.data
    assert prebuild.problems(Root(sandbox.user, "user"), strict=False) == []


def test_without_nvrtc_ptx_serves(sandbox: Sandbox, use_prebuilt: Path, no_compiler: None) -> None:
    with pytest.raises(KernelNotPrebuiltError, match="pip install nvidia-cuda-nvrtc-cu12"):
        first()
    sandbox.publish(use_prebuilt, "compute_90")
    assert first().sidecar.target == "compute_90"


def test_an_architecture_unknown_to_nvrtc_gets_a_lower_minor_or_ptx(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "supported_numbers", lambda: {80, 90, 100})
    assert first((10, 3)).sidecar.target == "sm_100"
    image = first((12, 0))
    assert image.sidecar.target == "compute_100"
    assert b".target sm_100" in image.data
    with pytest.raises(KernelNotPrebuiltError, match=r"NVRTC \S+ knows only sm_80, sm_90, sm_100"):
        first((7, 5))


def test_a_compile_error_is_not_hidden(sandbox: Sandbox) -> None:
    (sandbox.sources / "tiny.cu").write_text("nonsense;")
    assert sandbox.unit
    with pytest.raises(CompileError, match="nonsense"):
        first()


@pytest.mark.parametrize("code", ["ENOSPC", "EACCES", "EROFS", "EDQUOT", "ESTALE", "ENOENT"])
def test_a_disk_that_takes_nothing_costs_one_warning(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        number = getattr(errno, code)
        raise OSError(number, os.strerror(number), "somewhere")

    monkeypatch.setattr(os, "replace", fail)
    assert first().origin == "compiled"
    monkeypatch.setattr(compiler, "compile", fail)  # another device of this process is served from memory
    assert first().origin == "compiled"
    assert caplog.text.count("WARNING") == 1
    assert "CUPY_MOE_CACHE_DIR" in caplog.text
    assert files(sandbox.user, "*/*") == []  # no temporary file is left


def test_a_cache_folder_that_is_a_file_further_up_costs_one_warning(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (sandbox.folder / "file").write_text("")
    monkeypatch.setenv("CUPY_MOE_CACHE_DIR", str(sandbox.folder / "file" / "cache"))
    assert first().origin == "compiled"
    assert "are not kept" in caplog.text


def test_disable_cache_writes_nothing(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_MOE_DISABLE_CACHE", "1")
    assert first().origin == "compiled"
    assert not sandbox.user.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUPY_MOE_DISABLE_JIT", "yes"),
        ("CUPY_MOE_DISABLE_CACHE", "2"),
        ("CUPY_MOE_FORCE_JIT", "true"),
        ("CUPY_MOE_PREBUILT_DIR", "/nowhere/at/all"),
        ("CUPY_MOE_CACHE_DIR", str(PACKAGE / "config.py")),
    ],
)
def test_bad_values_are_refused_by_name(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        first()


@pytest.mark.parametrize("name", ["CUPY_MOE_PREBUILT_DIR", "CUPY_MOE_CACHE_DIR"])
def test_a_path_relative_to_nowhere_is_refused_by_name(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    gone = sandbox.folder / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv(name, "kernels")
    with pytest.raises(ConfigError, match=f"{name}='kernels' is relative to a folder that is gone"):
        first()


# ---- where the user cache is


def test_the_user_cache_is_the_first_folder_that_can_be_used(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, xdg, home = (sandbox.folder / name for name in ("named", "xdg", "home"))
    monkeypatch.setattr("tempfile.tempdir", str(sandbox.folder))
    monkeypatch.setenv("CUPY_MOE_CACHE_DIR", str(named))
    monkeypatch.setenv("XDG_CACHE_HOME", str(xdg))
    monkeypatch.setenv("HOME", str(home))

    def where() -> Path | None:
        root = folders.user_root()
        return root.path if root else None

    assert where() == named
    monkeypatch.delenv("CUPY_MOE_CACHE_DIR")
    assert where() == xdg / "cupy_moe"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert where() == home / ".cache" / "cupy_moe"
    home.mkdir()
    may = os.access
    monkeypatch.setattr(  # root may all
        os, "access", lambda path, mode, **options: Path(path) != home and may(path, mode, **options)
    )
    private = where()
    assert private == sandbox.folder / f"cupy_moe-{os.geteuid()}"
    assert first().origin == "compiled"
    assert private.stat().st_mode & 0o777 == 0o700
    private.chmod(0o770)
    assert where() is None
    assert not named.exists()
    assert list(home.iterdir()) == []


def test_a_folder_that_others_may_write_to_is_not_chosen(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shared = sandbox.folder / "cupy_moe"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.delenv("CUPY_MOE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(sandbox.folder))
    for _ in range(2):
        root = folders.user_root()
        assert root is None or root.path != shared
    assert caplog.text.count("writable by every user") == 1


# ---- publishing


def test_files_follow_the_umask_and_hold_no_path_or_time(sandbox: Sandbox) -> None:
    path = sandbox.publish(sandbox.prebuilt, "sm_90")
    umask = os.umask(0)
    os.umask(umask)
    before = path.with_suffix(".json").read_bytes()
    for file in (path, path.with_suffix(".json")):
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask
    sandbox.publish(sandbox.prebuilt, "sm_90")
    assert path.with_suffix(".json").read_bytes() == before
    assert str(sandbox.folder).encode() not in before


@pytest.mark.parametrize("name", REAL)
def test_after_prebuild_every_kernel_is_found_and_nothing_compiled(
    everything: Everything, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUPY_MOE_PREBUILT_DIR", str(everything.folder))
    monkeypatch.setattr(compiler, "_nvrtc", lambda: pytest.fail("the compiler was called"))
    built = {result.target for result in everything.results if result.unit == name}
    for target in built - {targets.PTX_TARGET}:
        capability = divmod(targets.number(target), 10)
        assert next(lookup.candidates(name, capability)).sidecar.target == target
    if not {targets.PTX_TARGET, "sm_86"} <= built:
        return
    assert next(lookup.candidates(name, (8, 8))).sidecar.target == "sm_86"
    monkeypatch.setenv("CUPY_MOE_DISABLE_JIT", "1")
    assert next(lookup.candidates(name, (13, 0))).sidecar.target == targets.PTX_TARGET


# ---- other processes


def test_two_folders_and_two_processes_give_the_same_bytes_and_names(tmp_path: Path) -> None:
    trees = []
    for name in ("here", "a longer path/over there"):
        checkout = copy_package(tmp_path / name)
        run = run_python(
            checkout, "-m", "cupy_moe", "prebuild", "--arch", "sm_90", "--arch", "sm_120", "--ptx"
        )
        assert run.returncode == 0, run.stderr
        tree = checkout / "cache"
        trees.append(
            {path.relative_to(tree): path.read_bytes() for path in tree.rglob("*") if path.is_file()}
        )
    assert trees[0] == trees[1]
    assert len(trees[0]) == 9


def test_a_race_of_processes_that_are_killed(tmp_path: Path, sandbox: Sandbox) -> None:
    rounds = os.environ.get("RACE_ROUNDS", "3")
    script = str(Path(__file__).with_name("race.py"))
    run = run_python(PACKAGE.parent, script, str(sandbox.sources), str(tmp_path / "cold"), rounds)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{rounds} rounds" in run.stdout


USE = """
import os, sys
import cupy_moe
assert not {"torch", "cupy", "numpy"} & set(sys.modules)
from cupy_moe.images import lookup
print(next(lookup.candidates("tiny", (9, 0))).origin)
"""


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_package(tmp_path_factory.mktemp("checkout"))


@pytest.mark.parametrize("home", [None, "/proc/none"], ids=["unset", "unwritable"])
def test_any_home_and_uid_will_do(miniature: Path, tmp_path: Path, home: str | None) -> None:
    nobody = "import os; os.getuid = os.geteuid = lambda: 54321\n"  # a uid without a passwd entry
    run = run_python(miniature, "-c", nobody + USE, env={"HOME": home, "TMPDIR": str(tmp_path)})
    assert (run.returncode, run.stdout.split()) == (0, ["compiled"]), run.stderr
    assert not (miniature / "~").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"cupy_moe-54321"}  # CuPy's own is gone


def test_a_full_disk_will_do(miniature: Path, tmp_path: Path) -> None:
    # Folders can be made, files cannot be filled.
    no_space = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
    run = run_python(miniature, "-c", no_space + USE, env={"HOME": str(tmp_path)})
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == "compiled"
    assert run.stderr.count("compiled kernels are not kept") == 1
    assert not list(tmp_path.rglob("*.cubin"))


AUDITED = """
import sys
asked = []
sys.addaudithook(lambda event, _: asked.append(event))
from cupy_moe.images import lookup
print(next(lookup.candidates("tiny", (9, 0))).origin)
print(*(event for event in asked if event.startswith(("socket.", "urllib.", "ftplib.", "http."))))
"""


def test_nothing_is_searched_elsewhere_or_downloaded(
    miniature: Path, tmp_path: Path, sandbox: Sandbox
) -> None:
    (tmp_path / "home").mkdir()
    for place in (".", "cache", "cupy_moe", "cupy_moe/cache", "home", "home/cache"):
        sandbox.publish(tmp_path / place, "sm_90")
    code = f"import os, sys; sys.path.insert(0, {str(miniature)!r}); os.chdir({str(tmp_path)!r})\n{AUDITED}"
    run = run_python(miniature, "-c", code, env={"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)})
    assert (run.returncode, run.stdout.split()) == (0, ["compiled"]), run.stderr


def test_importing_creates_nothing_and_imports_little(tmp_path: Path) -> None:
    code = "import cupy_moe.tools.cli, sys; print(sorted({'torch', 'cupy', 'numpy'} & set(sys.modules)))"
    run = run_python(PACKAGE.parent, "-c", code, env={"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)})
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr
    assert list(tmp_path.iterdir()) == []


FORK = """
import ctypes
from cupy_moe import _cupy
from cupy_moe.images import compiler, sources
count, driver = ctypes.c_int(), ctypes.CDLL("libcuda.so.1")
before = driver.cuDeviceGetCount(ctypes.byref(count))
compiler.compile(sources.unit("tiny"), "sm_90")
print(before, driver.cuDeviceGetCount(ctypes.byref(count)))
"""


@pytest.mark.gpu
def test_compiling_does_not_initialise_cuda(miniature: Path) -> None:
    """NVRTC's own cache would, and so poison processes forked later; `--no-cache` prevents it."""
    run = run_python(miniature, "-c", FORK)
    assert run.returncode == 0, run.stderr
    before, after = run.stdout.split()
    assert before == after  # 3, CUDA_ERROR_NOT_INITIALIZED, unless importing CuPy is enough to initialise it
