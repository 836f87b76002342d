"""Sources, digests, targets and the compiler."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cache_helpers import (
    HEADER,
    PACKAGE,
    REAL,
    TINY,
    Everything,
    Sandbox,
    forget_sources,
    run_python,
)
from hypothesis import given
from hypothesis import strategies as st

from cupy_moe import config
from cupy_moe.errors import (
    CompileError,
    ConfigError,
    CupyMoeError,
    DependencyError,
    KernelNotPrebuiltError,
)
from cupy_moe.images import compiler, elf, lookup, sources, targets
from cupy_moe.tools import doctor

# ---- digests


def test_a_digest_is_of_contents_and_options() -> None:
    unit = sources.Unit("tiny", TINY.encode(), {"tiny.cuh": HEADER.encode()}, ("-std=c++17",))
    same = sources.Unit("tiny", TINY.encode(), {"tiny.cuh": HEADER.encode()}, ("-std=c++17",))
    assert unit.digest == same.digest
    others = [
        sources.Unit("tine", unit.source, unit.headers, unit.options),
        sources.Unit("tiny", unit.source, {"other.cuh": HEADER.encode()}, unit.options),
        sources.Unit("tiny", unit.source, unit.headers, ("-std=c++20",)),
        sources.Unit("tiny", unit.source, unit.headers, (*unit.options, "-lineinfo")),
    ]
    assert len({unit.digest, *(other.digest for other in others)}) == 5


@given(st.data())
def test_any_byte_of_any_file_changes_the_digest(data: Any) -> None:
    files = {"tiny.cu": TINY.encode(), "tiny.cuh": HEADER.encode()}
    before = sources.Unit("tiny", files["tiny.cu"], {"tiny.cuh": files["tiny.cuh"]}, ()).digest
    name = data.draw(st.sampled_from(sorted(files)))
    position = data.draw(st.integers(0, len(files[name]) - 1))
    changed = bytearray(files[name])
    changed[position] ^= data.draw(st.integers(1, 255))
    files[name] = bytes(changed)
    assert sources.Unit("tiny", files["tiny.cu"], {"tiny.cuh": files["tiny.cuh"]}, ()).digest != before


def test_only_headers_that_a_unit_includes_change_its_digest(sandbox: Sandbox) -> None:
    (sandbox.sources / "deep.cuh").write_text("// 1")
    (sandbox.sources / "odd.cuh").write_text("// 1")
    (sandbox.sources / "tiny.cuh").write_text(f'#include "deep.cuh"\n#include "tiny.cuh"\n{HEADER}')
    unit = sandbox.unit
    assert list(unit.headers) == ["deep.cuh", "tiny.cuh"]
    (sandbox.sources / "odd.cuh").write_text("// 2")
    assert sandbox.unit.digest == unit.digest
    (sandbox.sources / "deep.cuh").write_text("// 2")
    assert sandbox.unit.digest != unit.digest


def test_every_unit_is_compiled_with_the_headers_that_it_names() -> None:
    headers = {unit.name: set(unit.headers) for unit in sources.units().values()}
    assert headers["gate_wide"] == {"common.cuh", "convert.cuh", "gate/gate.cuh"}
    assert headers["align_small"] == {"common.cuh", "align/align.cuh", "align/small.cuh"}


def test_an_entry_key_is_of_digest_target_and_compiler(sandbox: Sandbox) -> None:
    old, new = compiler.Toolchain("12.9.41", "CL-1"), compiler.Toolchain("12.9.86", "CL-1")
    other = compiler.Toolchain("12.9.86", "CL-2")
    unit = sandbox.unit
    keys = {
        compiler.entry_key(unit.digest, target, tool)
        for target in ("sm_90", "sm_80")
        for tool in (old, new, other)
    }
    assert len(keys) == 6


def test_extra_options_come_from_the_environment(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sources.unit("tiny").digest
    monkeypatch.setenv("CUPY_MOE_NVRTC_FLAGS", "-lineinfo --maxrregcount=64")
    assert sources.unit("tiny").options == (*sources.OPTIONS, "-lineinfo", "--maxrregcount=64")
    assert sources.unit("tiny").digest != before


@pytest.mark.parametrize(
    "flags", ["lineinfo", "-arch=sm_90", "-I /usr/include", "-I/usr/include", "-lineinfo 64"]
)
def test_extra_options_that_cannot_work_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    monkeypatch.setenv("CUPY_MOE_NVRTC_FLAGS", flags)
    with pytest.raises(ConfigError, match="CUPY_MOE_NVRTC_FLAGS"):
        config.nvrtc_flags()


# ---- targets


@pytest.mark.parametrize("text", ["sm_90", "90", "9.0"])
def test_a_target_has_several_spellings(text: str) -> None:
    assert targets.parse_target(text) == "sm_90"
    assert targets.parse_target("10.0") == targets.parse_target("100") == "sm_100"
    assert targets.parse_target("compute_90") == "compute_90"
    assert targets.parse_target("10.3") == targets.parse_target("sm_103") == "sm_100"
    assert targets.parse_target("sm_121") == "sm_120"
    assert targets.parse_target("90a") == targets.parse_target("sm_90a") == "sm_90a"


@pytest.mark.parametrize(
    "text", ["", "sm_80a", "compute_90a", "sm_33", "9", "sm-90", "hopper", "9.0.0", "sm_90\n"]
)
def test_an_unknown_target_is_answered_with_the_known_ones(text: str) -> None:
    with pytest.raises(ConfigError, match=r"sm_75, sm_80.*sm_121.*sm_120a"):
        targets.parse_target(text)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((9, 0), ["sm_90"]),
        ((8, 0), ["sm_80"]),
        ((8, 9), ["sm_89", "sm_86", "sm_80"]),
        ((8, 7), ["sm_87"]),  # Orin runs no desktop cubins
        ((8, 8), ["sm_86", "sm_80"]),
        ((10, 3), ["sm_100"]),
        ((11, 0), []),
        ((12, 1), ["sm_120"]),
        ((13, 0), []),
    ],
)
def test_a_device_runs_its_own_target_and_lower_minors(
    capability: tuple[int, int], expected: list[str]
) -> None:
    assert targets.native_targets(capability) == expected


SPECIFIC = (
    b'// targets  sm_80 sm_90a\n// options  -DFOUR=4\nextern "C" __global__ void f(int* x) { *x = FOUR; }\n'
)


@pytest.fixture
def specific(sandbox: Sandbox) -> sources.Unit:
    (sandbox.sources / "family").mkdir()
    (sandbox.sources / "family" / "specific.cu").write_bytes(SPECIFIC)
    forget_sources()
    return sources.unit("specific")


def test_a_unit_says_what_it_is_made_for(specific: sources.Unit) -> None:
    assert specific.targets == ("sm_80", "sm_90a")
    assert specific.options == (*sources.OPTIONS, "-DFOUR=4")
    assert sources.unit("tiny").targets == targets.DEFAULT_TARGETS
    runs = {c: targets.native_targets(c, specific.targets) for c in ((7, 5), (8, 9), (9, 0), (10, 0), (9, 1))}
    assert runs == {(7, 5): [], (8, 9): ["sm_80"], (9, 0): ["sm_90a"], (10, 0): [], (9, 1): []}
    assert targets.native_targets((9, 0), ("sm_90", "sm_90a", "compute_90")) == ["sm_90a", "sm_90"]
    assert targets.made_for(("sm_90", "sm_90a", "sm_80"), "sm_90") == ["sm_90", "sm_90a"]
    assert targets.made_for(specific.targets, "sm_90a") == ["sm_90a"]
    assert targets.made_for(specific.targets, "compute_90") == []
    assert targets.made_for(targets.DEFAULT_TARGETS, "compute_100") == ["compute_100"]


def test_a_unit_is_looked_up_only_for_its_targets(specific: sources.Unit) -> None:
    for capability, expected in (((9, 0), "sm_90a"), ((8, 6), "sm_80")):
        image = next(lookup.candidates("specific", capability))
        assert (image.origin, image.sidecar.target) == ("compiled", expected)
        assert b"FOUR" not in image.data
        assert elf.number(image.data) == targets.number(expected)
    assert next(lookup.candidates("specific", (9, 0))).origin == "user"  # from a folder of its own
    with pytest.raises(
        KernelNotPrebuiltError, match=r"not for compute capability 7\.5, but for sm_80, sm_90a"
    ):
        next(lookup.candidates("specific", (7, 5)))


@pytest.mark.parametrize("wrong", ["sm_90a sm_91", "hopper", "compute_80"])
def test_unknown_targets_of_a_unit_are_named(sandbox: Sandbox, wrong: str) -> None:
    (sandbox.sources / "wrong.cu").write_text(f"// targets  {wrong}\n")
    forget_sources()
    with pytest.raises(CupyMoeError, match=r"wrong.cu wants unknown targets: (sm_91|hopper|compute_80)"):
        sources.units()


def test_two_units_of_one_name_are_refused(specific: sources.Unit, sandbox: Sandbox) -> None:
    (sandbox.sources / "specific.cu").write_bytes(SPECIFIC)
    forget_sources()
    with pytest.raises(CupyMoeError, match=r"two files in .* are called specific.cu"):
        sources.units()


# ---- the compiler


@pytest.mark.parametrize("target", targets.TARGETS)
def test_a_cubin_is_whole_and_of_its_target(sandbox: Sandbox, target: str) -> None:
    if target not in compiler.supported_targets():
        pytest.skip(f"this NVRTC does not know {target}")
    made = compiler.compile(sandbox.unit, target)
    assert elf.number(made.data) == targets.number(target)
    assert elf.end(made.data) == len(made.data)
    clusters = targets.number(target) >= 90
    assert set(made.kernels) == {"tiny_add", "tiny_reverse"} | ({"tiny_cluster"} if clusters else set())
    assert made.kernels["tiny_reverse"]["smem"] == 1024
    assert all(figures["regs"] > 0 for figures in made.kernels.values())


def test_elf_tools_accept_a_cubin(sandbox: Sandbox) -> None:
    if not shutil.which("readelf"):
        pytest.skip("no readelf here")
    path = sandbox.publish(sandbox.user, "sm_90")
    read = subprocess.run(["readelf", "-hlS", path], capture_output=True, text=True, check=True)
    assert "past end of file" not in read.stdout + read.stderr


def test_ptx_names_its_entries(sandbox: Sandbox) -> None:
    made = compiler.compile(sandbox.unit, "compute_90")
    assert b".target sm_90" in made.data
    assert list(made.kernels) == ["tiny_add", "tiny_cluster", "tiny_reverse"]


def test_figures_of_spills_stack_and_inner_functions_are_told_apart() -> None:
    log = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'big' for 'sm_90'
ptxas info    : Function properties for big
ptxas         .     40 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 512 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 24.054 ms
ptxas info    : Function properties for _Z1gi
ptxas         .     99 bytes stack frame, 99 bytes spill stores, 99 bytes spill loads
ptxas info    : Compiling entry function 'small' for 'sm_90'
ptxas info    : Function properties for small
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers
"""
    assert compiler._parse_ptxas(log) == {
        "big": {"regs": 255, "spill": 20, "stack": 40, "smem": 512},
        "small": {"regs": 8, "spill": 0, "stack": 0, "smem": 0},
    }


def test_a_compile_error_shows_unit_options_and_log(sandbox: Sandbox) -> None:
    (sandbox.sources / "tiny.cu").write_text("nonsense;")
    with pytest.raises(CompileError, match=r"tiny\.cu for sm_90 .*-std=c\+\+17(.|\n)*tiny\.cu\(1\): error"):
        compiler.compile(sandbox.unit, "sm_90")


def test_a_target_that_nvrtc_lacks_is_answered_with_those_it_has(sandbox: Sandbox) -> None:
    with pytest.raises(CompileError, match=r"NVRTC \d+\.\d+\.\d+ cannot compile for sm_20; it knows .*sm_90"):
        compiler.compile(sandbox.unit, "sm_20")


def load_anew(monkeypatch: pytest.MonkeyPatch, version: Callable[[], tuple[int, int]]) -> None:
    """Load NVRTC once more, which now says that it is of another version."""
    from cupy_moe._cupy import cupy

    monkeypatch.setattr(cupy.cuda, "nvrtc", SimpleNamespace(getVersion=version))
    compiler._load.__wrapped__()


def test_a_missing_nvrtc_is_answered_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> tuple[int, int]:
        raise RuntimeError("libnvrtc.so.12: cannot open")

    with pytest.raises(DependencyError, match=r"libnvrtc\.so\.12.*pip install nvidia-cuda-nvrtc"):
        load_anew(monkeypatch, version)


def test_an_nvrtc_of_another_cuda_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = r"CuPy is for CUDA 1\d, but has loaded NVRTC 99\.1; "
    with pytest.raises(DependencyError, match=refused + "call cupy_moe before CuPy.*$"):
        load_anew(monkeypatch, lambda: (99, 1))
    monkeypatch.setattr(compiler, "_open_library", lambda *_: None)
    with pytest.raises(DependencyError, match=refused + "pip install nvidia-cuda-nvrtc.*$"):
        load_anew(monkeypatch, lambda: (99, 1))


USE = """
import ctypes, sys
for path in sys.argv[1:]:
    ctypes.CDLL(path)  # as `import torch` does
from cupy_moe._cupy import cupy
from cupy_moe.images import compiler, sources
print(cupy.cuda.driver.get_build_version() // 1000, compiler.toolchain().nvrtc)
assert compiler.compile(sources.unit("moe_sum"), "sm_90").data
"""


def nvrtc_libraries() -> list[str]:
    wheels = [
        metadata.files(name) or [] for name in compiler._WHEELS.values() if compiler.installed_version(name)
    ]
    return [str(f.locate()) for files in wheels for f in files if f.name.startswith("libnvrtc.so.")]


@pytest.mark.parametrize("first", [[], nvrtc_libraries(), nvrtc_libraries()[::-1]], ids=len)
def test_nvrtc_is_of_cupys_cuda_whatever_is_installed_and_loaded(first: list[str]) -> None:
    run = run_python(PACKAGE.parent, "-c", USE, *first)
    assert run.returncode == 0, run.stderr
    cuda, version = run.stdout.split()
    assert version.startswith(f"{cuda}.")


def test_doctor_shows_whose_cuda_it_is_and_where_nvrtc_is() -> None:
    found = {check.subject: check.finding for check in doctor._compiler()}
    cuda = found["CuPy"].rpartition(" for CUDA ")[2]
    assert re.fullmatch(rf"{cuda}\.\d+\.\d+ CL-\d+ /.*/libnvrtc\.so\.{cuda}[.\d]*", found["NVRTC"])


def test_the_cache_is_asked_for_the_nvrtc_of_cupys_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"nvidia-cuda-nvrtc-cu12": "12.9.86", "nvidia-cuda-nvrtc": "13.2.1"}
    monkeypatch.setattr(compiler, "installed_version", installed.get)
    look_up = compiler.installed_nvrtc.__wrapped__
    assert look_up() == {"12.9.86", "13.2.1"}  # CuPy from elsewhere
    installed["cupy-cuda12x"] = "14.2.0"
    assert look_up() == {"12.9.86"}


def test_one_thread_loads_nvrtc_while_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def load() -> tuple[Any, compiler.Toolchain]:
        begun.append(threading.current_thread().name)
        time.sleep(0.2)
        return None, compiler.Toolchain("12.9.86", "")

    monkeypatch.setattr(compiler, "_load", functools.cache(load))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: compiler.toolchain(), range(8)))
    assert len(begun) == 1
    assert set(found) == {compiler.Toolchain("12.9.86", "")}


@pytest.mark.parametrize("name", REAL)
def test_every_kernel_compiles_for_every_target_without_spills(everything: Everything, name: str) -> None:
    results = [result for result in everything.results if result.unit == name]
    assert [result.error for result in results if result.status == "failed"] == []
    wanted = sources.unit(name).targets
    known = {*compiler.supported_targets(), targets.PTX_TARGET}
    assert (
        {r.target for r in results} == {t for name in known for t in targets.made_for(wanted, name)} != set()
    )
    for result in results:
        assert result.kernels, f"no entry point for {result.target}"
        for entry, figures in result.kernels.items():
            assert not figures.get("spill"), f"{entry} for {result.target}: {figures}"
            assert not figures.get("stack"), f"{entry} for {result.target}: {figures}"


def test_the_library_path_is_never_compiled_in(sandbox: Sandbox) -> None:
    assert str(Path(sandbox.sources)).encode() not in compiler.compile(sandbox.unit, "sm_90").data


def test_a_cupy_that_fails_to_import_in_any_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cupy").mkdir()
    environment = {"PYTHONPATH": f"{tmp_path}:{PACKAGE.parent}"}
    command = "-m", "cupy_moe", "prebuild", "--arch", "sm_90", "--out", "x"
    for failure in ("ValueError('numpy.dtype size changed')", "RuntimeError('broken')", "OSError('gone')"):
        (tmp_path / "cupy" / "__init__.py").write_text(f"raise {failure}\n")
        run = run_python(tmp_path, *command, env=environment)
        assert run.returncode == 1
        assert run.stderr.count("\n") == 1, run.stderr
        assert "CuPy cannot be imported" in run.stderr
