"""`cupy-moe prebuild`: what it makes, what it leaves, and what it says where it cannot. No GPU, no torch."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cache_helpers import PACKAGE, Sandbox, files, forget_sources
from cli_helpers import doctor, invoke, invoke_json

from cupy_moe.errors import DependencyError
from cupy_moe.images import compiler, folders, prebuild, sources, store, targets
from cupy_moe.images.folders import Root


def test_prebuild_writes_whole_folders_and_is_idempotent(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = sandbox.prebuilt
    first = invoke_json("prebuild", "--arch", "sm_90", "--arch", "90", "--ptx", "--out", out)
    assert [(r["target"], r["unit"], r["status"]) for r in first["results"]] == [
        ("sm_90", "tiny", "built"),
        (targets.PTX_TARGET, "tiny", "built"),
    ]
    assert sorted(path.suffix for path in out.rglob("*.*") if path.is_file()) == sorted(
        [".cubin", ".json", ".json", ".ptx", ".json", ".json"]
    )
    monkeypatch.setattr(compiler, "_nvrtc", lambda: pytest.fail("the compiler was loaded"))
    again = invoke_json("prebuild", "--arch", "sm_90", "--ptx", "--out", out)
    assert [result["status"] for result in again["results"]] == ["up to date"] * 2
    assert again["manifests"] == first["manifests"]


def test_all_is_what_nvrtc_knows(sandbox: Sandbox) -> None:
    value = invoke_json("prebuild", "--arch", "all", "--out", sandbox.prebuilt)
    assert [result["target"] for result in value["results"]] == compiler.supported_targets()


def test_lines_on_stderr_and_a_table_on_stdout(sandbox: Sandbox) -> None:
    result = invoke("prebuild", "--arch", "sm_90", "--out", sandbox.prebuilt, "-v", "-j", "1")
    assert "sm_90 tiny: built" in result.stderr
    assert "manifest sha256" in result.stdout
    assert "tiny_reverse" in result.stdout
    assert "1024" in result.stdout
    assert "\x1b[" not in result.output


def test_other_sources_replace_what_was_built(sandbox: Sandbox, prebuilt: Path) -> None:
    before = {path.name for path in files(prebuilt, "*/tiny-*")}
    (sandbox.sources / "tiny.cuh").write_text("constexpr int kOffset = 4;\n")
    assert sandbox.unit
    invoke("prebuild", "--arch", "sm_90", "--out", prebuilt, "--check", code=1)
    would = invoke_json("prebuild", "--arch", "sm_90", "--out", prebuilt, "--dry-run")
    assert [result["status"] for result in would["results"]] == ["missing"]
    assert {path.name for path in files(prebuilt, "*/tiny-*")} == before
    invoke("prebuild", "--arch", "sm_90", "--arch", "sm_80", "--out", prebuilt)
    after = {path.name for path in files(prebuilt, "*/tiny-*")}
    assert len(after) == 4
    assert not after & before
    invoke("prebuild", "--arch", "sm_90", "--out", prebuilt, "--check")


def test_damage_is_rebuilt_and_force_builds_all(sandbox: Sandbox, prebuilt: Path) -> None:
    (path,) = files(prebuilt, "sm_90/*.cubin")
    good = path.read_bytes()
    path.write_bytes(b"")
    invoke("prebuild", "--arch", "sm_90", "--out", prebuilt, "--check", code=1)
    invoke("prebuild", "--arch", "sm_90", "--out", prebuilt)
    assert path.read_bytes() == good
    forced = invoke_json("prebuild", "--arch", "sm_90", "--out", prebuilt, "--force")
    assert [result["status"] for result in forced["results"]] == ["built"]


def test_one_kernel_leaves_the_others(sandbox: Sandbox, prebuilt: Path) -> None:
    (sandbox.sources / "other.cu").write_text('extern "C" __global__ void other(int* p) { *p = 1; }')
    assert sandbox.unit
    value = invoke_json("prebuild", "--arch", "sm_90", "--out", prebuilt, "--kernel", "other")
    assert [result["unit"] for result in value["results"]] == ["other"]
    assert len(files(prebuilt, "sm_90/*.cubin")) == 2
    assert not prebuild.problems(Root(prebuilt, "prebuilt"), strict=False)
    assert prebuild.problems(Root(prebuilt, "prebuilt"), strict=True) == [f"{prebuilt}: no other for sm_80"]


def test_a_kernel_that_does_not_compile_fails_alone(sandbox: Sandbox) -> None:
    (sandbox.sources / "bad.cu").write_text("nonsense;")
    assert sandbox.unit
    result = invoke("prebuild", "--arch", "sm_90", "--out", sandbox.prebuilt, code=1)
    assert "bad.cu(1): error" in result.stdout
    assert not files(sandbox.prebuilt, "*/manifest.json")
    assert files(sandbox.prebuilt, "sm_90/tiny-*.cubin")


def test_a_folder_that_cannot_be_written_is_a_failure(sandbox: Sandbox) -> None:
    (sandbox.folder / "file").write_text("")
    result = invoke("prebuild", "--arch", "sm_90", "--out", sandbox.folder / "file" / "cache", code=1)
    assert "Not a directory" in result.output


def test_a_manifest_is_of_all_kernels_or_is_not_there(sandbox: Sandbox, prebuilt: Path) -> None:
    assert len(files(prebuilt, "*/manifest.json")) == 2
    (sandbox.sources / "other.cu").write_text('extern "C" __global__ void other(int* p) { *p = 1; }')
    assert sandbox.unit
    (sandbox.sources / "tiny.cuh").write_text("constexpr int kOffset = 4;\n")
    assert sandbox.unit
    value = invoke_json("prebuild", "--arch", "sm_90", "--kernel", "other", "--out", prebuilt)
    assert value["manifests"] == {}
    assert [path.parent.name for path in files(prebuilt, "*/manifest.json")] == ["sm_80"]
    assert "no tiny for sm_90" in invoke("verify", "--strict", prebuilt, code=1).stdout


def test_without_kernel_sources_there_is_nothing_to_succeed_with(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = sandbox.folder / "empty"
    empty.mkdir()
    monkeypatch.setattr(sources, "source_folder", lambda: empty)
    assert str(empty) in invoke("prebuild", "--arch", "sm_90", "--out", sandbox.prebuilt, code=1).stderr
    assert not sandbox.prebuilt.exists()


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """From now on a disk takes nothing, and gives nothing back."""

    def refuse(number: int) -> None:
        def fail(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        for name in ("write", "remove"):
            monkeypatch.setattr(folders.Folder, name, fail)

    return refuse


def test_a_read_only_folder_that_is_up_to_date_is_a_success(
    sandbox: Sandbox, prebuilt: Path, full: Callable[[int], None]
) -> None:
    full(errno.EROFS)
    before = invoke_json("prebuild", "--arch", "sm_90", "--out", prebuilt)
    assert [result["status"] for result in before["results"]] == ["up to date"]
    assert list(before["manifests"]) == ["sm_90"]
    files(prebuilt, "sm_90/manifest.json")[0].unlink()
    assert invoke_json("prebuild", "--arch", "sm_90", "--out", prebuilt)["manifests"] == {}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_takes_nothing_is_said_in_one_line(
    sandbox: Sandbox, full: Callable[[int], None], number: int
) -> None:
    full(number)
    arguments = ("prebuild", "--arch", "sm_90", "--arch", "sm_80", "--out", sandbox.prebuilt)
    result = invoke(*arguments, code=1)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "tiny for sm_" in line
    assert f"{sandbox.prebuilt} ({os.strerror(number)})" in line
    assert "--out" in line


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from cupy_moe.tools.cli import main
main(["prebuild", "--arch", "all", "--out", sys.argv[1]])
"""


def test_an_interrupt_stops_at_once_and_leaves_what_is_done(tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    with subprocess.Popen(command, cwd=PACKAGE.parent, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "built" in process.stderr.readline()
        time.sleep(0.1)  # it waits for the next
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait() == 130
    assert time.monotonic() - start < 10  # the kernels that were left take half a minute
    assert said.splitlines()[-1] == "interrupted; what is done is valid"
    assert prebuild.problems(Root(tmp_path, "prebuilt"), strict=False) == []
    assert {path.suffix for path in tmp_path.rglob("*.*")} == {".cubin", ".json"}
    assert not list(tmp_path.rglob(f"{folders.TEMPORARY}*"))


@pytest.mark.parametrize("between", ["an image", "a temporary file"])
def test_prebuilding_at_the_same_time_takes_nothing_from_the_other(sandbox: Sandbox, between: str) -> None:
    root = Root(sandbox.prebuilt, "prebuilt")
    image = store.compile_image(sandbox.unit, "sm_90")
    with root.open("v1", "sm_90", create=True) as folder:
        name = f"{folders.TEMPORARY}1-a" if between == "a temporary file" else f"{image.sidecar.stem}.cubin"
        folder.write(name, image.data)
        assert prebuild.finish(root, "sm_90") is None  # of another process
        assert folder.read(name, 1 << 20) == image.data
        os.utime(sandbox.prebuilt / "v1" / "sm_90" / name, (0, 0))
        prebuild.finish(root, "sm_90")
        assert folder.names() == []


def test_of_two_images_the_newest_whole_one_stays(sandbox: Sandbox, prebuilt: Path) -> None:
    (good,) = files(prebuilt, "sm_90/*.cubin")
    image = store.compile_image(sandbox.unit, "sm_90")
    made_by = compiler.Toolchain("99.0.1", image.sidecar.nvrtc_build)
    key = compiler.entry_key(image.sidecar.source_digest, "sm_90", made_by)
    newer = replace(image, sidecar=replace(image.sidecar, entry_key=key, nvrtc=made_by.nvrtc))
    path = store.publish(Root(prebuilt, "prebuilt"), newer)
    path.write_bytes(b"")
    os.utime(good.with_suffix(".json"), (0, 0))
    invoke("prebuild", "--arch", "sm_90", "--out", prebuilt)
    assert files(prebuilt, "sm_90/*.cubin") == [good]
    store.publish(Root(prebuilt, "prebuilt"), newer)
    invoke("prebuild", "--arch", "sm_90", "--out", prebuilt)
    assert files(prebuilt, "sm_90/*.cubin") == [path]
    invoke("verify", "--strict", prebuilt)


@pytest.fixture
def packaged(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in an installed wheel that holds the kernels for sm_90."""
    package = sandbox.folder / "site-packages" / "cupy_moe"
    sandbox.publish(package / "cache", "sm_90")
    monkeypatch.setattr(folders, "__file__", str(package / "images" / "folders.py"))
    return package / "cache"


def test_what_is_packaged_need_not_be_built(
    sandbox: Sandbox, packaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invoke("prebuild", "--arch", "sm_90", "--check")
    assert "sm_80   tiny  missing" in invoke("prebuild", "--arch", "8.0", "--check", code=1).stdout
    invoke("prebuild", "--arch", "sm_90", "--out", sandbox.prebuilt, "--check", code=1)
    invoke("prebuild", "--arch", "sm_90")
    assert not sandbox.user.exists()
    invoke("prebuild", "--arch", "sm_80")
    assert [path.parent.name for path in files(sandbox.user, "*/*.cubin")] == ["sm_80"]
    invoke("prebuild", "--arch", "sm_80", "--arch", "sm_90", "--check")
    assert doctor()["prebuilt"] == [("PASS", "every kernel for sm_80, sm_90")]
    monkeypatch.setenv("CUPY_MOE_FORCE_JIT", "1")
    invoke("prebuild", "--arch", "sm_90", "--check", code=1)
    monkeypatch.delenv("CUPY_MOE_FORCE_JIT")
    monkeypatch.setenv("CUPY_MOE_DISABLE_CACHE", "1")
    invoke("prebuild", "--arch", "sm_90")
    assert "memory only" in invoke("prebuild", "--arch", "sm_75", code=1).stderr


def test_the_user_cache_counts_only_for_the_compiler_that_is_installed(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    invoke("prebuild", "--arch", "sm_90")
    invoke("prebuild", "--arch", "sm_90", "--check")
    monkeypatch.setattr(compiler, "installed_nvrtc", lambda: frozenset({"99.0.1"}))
    invoke("prebuild", "--arch", "sm_90", "--check", code=1)
    monkeypatch.setenv("CUPY_MOE_DISABLE_JIT", "1")  # then anything is better than nothing
    invoke("prebuild", "--arch", "sm_90", "--check")


def test_without_nvrtc_prebuild_says_what_to_install(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise DependencyError("NVRTC cannot be loaded; pip install it")

    monkeypatch.setattr(compiler, "_nvrtc", missing)
    assert "pip install it" in invoke("prebuild", "--arch", "all", "--out", sandbox.prebuilt, code=1).output
    assert "pip install it" in invoke("prebuild", "--arch", "90", "--out", sandbox.prebuilt, code=1).output


def test_without_out_it_writes_to_the_checkout_or_the_user_cache(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert invoke("path", "--prebuild").stdout.strip() == str(sandbox.user)
    sandbox.publish(sandbox.user, "sm_80")
    invoke("prebuild", "--arch", "sm_90")
    assert {path.parent.name for path in files(sandbox.user, "*/*.cubin")} == {"sm_80", "sm_90"}
    assert not files(sandbox.user, "*/manifest.json")
    monkeypatch.setattr(sources, "checkout", lambda: sandbox.folder)
    assert invoke("path", "--prebuild").stdout.strip() == str(sandbox.folder / "cache")


def test_an_architecture_stands_for_all_that_its_devices_look_for(sandbox: Sandbox) -> None:
    """Units that want sm_90a are made for --arch sm_90, too; strict folders have both, or say what lacks."""
    (sandbox.sources / "specific.cu").write_text('// targets  sm_90a\nextern "C" __global__ void f() {}\n')
    forget_sources()
    invoke("prebuild", "--arch", "sm_90", "--arch", "sm_80", "--out", sandbox.prebuilt)
    made = [f"{path.parent.name} {path.stem.split('-')[0]}" for path in files(sandbox.prebuilt, "*/*.cubin")]
    assert sorted(made) == ["sm_80 tiny", "sm_90 tiny", "sm_90a specific"]
    assert len(files(sandbox.prebuilt, "*/manifest.json")) == 3
    invoke("verify", "--strict", sandbox.prebuilt)
    invoke("prebuild", "--arch", "9.0", "--arch", "90a", "--out", sandbox.prebuilt, "--check")
    shutil.rmtree(sandbox.prebuilt / "v1" / "sm_90a")
    assert "no specific for sm_90a" in invoke("verify", "--strict", sandbox.prebuilt, code=1).stdout
    assert (
        "sm_90a  specific  missing"
        in invoke("prebuild", "--arch", "sm_90", "--out", sandbox.prebuilt, "--check", code=1).stdout
    )


@pytest.mark.parametrize("variables", [{}, {"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_a_bar_is_drawn_only_where_it_is_welcome(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda stream: True)
    shown = invoke("prebuild", "--arch", "sm_90", "--out", sandbox.prebuilt).stderr
    assert ("sm_90 tiny: built" in shown) == bool(variables)
    assert ("compiling" in shown) != bool(variables)
