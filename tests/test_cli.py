"""The command line: what it prints, what it writes, how it exits. No GPU, no torch."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cache_helpers import PACKAGE, Sandbox, copy_package, files, run_python
from click.shell_completion import BashComplete
from click.testing import CliRunner, Result

from cupy_moe import __version__, config
from cupy_moe.errors import DependencyError
from cupy_moe.images import compiler, folders, prebuild, sources, store, targets
from cupy_moe.images.folders import Root
from cupy_moe.tools.cli import main

COMMANDS = ["clean", "demo", "doctor", "list", "path", "prebuild", "show-config", "verify"]


def invoke(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def invoke_json(*arguments: str | Path, code: int = 0) -> Any:
    value = json.loads(invoke(*arguments, "--json", code=code).stdout)
    assert value["schema"] == sources.SCHEMA
    return value


@pytest.fixture
def prebuilt(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Path:
    invoke("prebuild", "--arch", "sm_90", "--arch", "8.0", "--out", sandbox.prebuilt)
    monkeypatch.setenv("CUPY_MOE_PREBUILT_DIR", str(sandbox.prebuilt))
    return sandbox.prebuilt


def test_help_and_version() -> None:
    assert __version__ in invoke("--version").stdout
    text = invoke("--help").stdout
    assert all(f"  {name}" in text for name in COMMANDS)
    for name in COMMANDS[:1] + COMMANDS[2:]:
        assert "--json" in invoke(name, "-h").stdout


LIGHT = """
import pathlib, sys
from click.testing import CliRunner
from cupy_moe.images import sources
from cupy_moe.tools.cli import main
sources.source_folder = lambda: pathlib.Path(sys.argv[1])
for line in ("--help", "list", "verify", "clean", "show-config", "path", "prebuild --help", "demo -h"):
    assert CliRunner().invoke(main, line.split()).exit_code == 0, line
    assert not {"torch", "cupy", "numpy"} & set(sys.modules), line
for line in ("doctor", "prebuild --arch sm_90"):
    assert CliRunner().invoke(main, line.split()).exit_code == 0, line
    assert "torch" not in sys.modules, line
"""


def test_no_command_imports_torch(sandbox: Sandbox) -> None:
    folder = copy_package(sandbox.folder / "checkout")
    run = run_python(folder, "-c", LIGHT, str(sandbox.sources), env={"CUPY_MOE_CACHE_DIR": str(sandbox.user)})
    assert run.returncode == 0, run.stderr


WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None
from cupy_moe.tools.cli import main
main(sys.argv[2].split())
"""


@pytest.mark.parametrize(
    ("missing", "line", "code", "said"),
    [
        ("cupy", "prebuild --arch sm_90 --out OUT", 1, "CuPy cannot be imported"),
        ("cupy", "prebuild --arch all --out OUT", 1, "CuPy cannot be imported"),
        ("cupy", "prebuild --arch native --out OUT", 1, "CuPy cannot be imported"),
        ("torch", "demo", 1, "the demo needs torch"),
        ("torch", "demo -h", 0, ""),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    tmp_path: Path, missing: str, line: str, code: int, said: str
) -> None:
    line = line.replace("OUT", str(tmp_path / "out"))
    run = run_python(PACKAGE.parent, "-c", WITHOUT, missing, line)
    assert (run.returncode, bool(run.stdout)) == (code, code == 0), run.stderr
    assert said in run.stderr
    assert run.stderr.count("\n") == code
    assert not (tmp_path / "out").exists()


def test_a_shell_completes_architectures_and_kernels(sandbox: Sandbox) -> None:
    shell = BashComplete(main, {}, "cupy-moe", "_CUPY_MOE_COMPLETE")

    def completed(*arguments: str) -> list[str]:
        return [item.value for item in shell.get_completions(list(arguments[:-1]), arguments[-1])]

    assert completed("prebuild", "--arch", "sm_10") == ["sm_100", "sm_103"]
    assert completed("prebuild", "--arch", "a") == ["all"]
    assert completed("prebuild", "--kernel", "") == ["tiny"]
    assert completed("clean", "--arch", "c") == completed("list", "--arch", "c") == [targets.PTX_TARGET]


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


# ---- prebuild


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
    assert time.monotonic() - start < 3  # the kernels that were left take half a minute
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


def test_wrong_usage_exits_with_2(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "known: sm_75, sm_80" in invoke("prebuild", "--arch", "sm_33", code=2).stderr
    assert "--arch" in invoke("prebuild", code=2).stderr
    assert "there are: tiny" in invoke("prebuild", "--arch", "sm_90", "--kernel", "huge", code=2).stderr
    assert "known: sm_75" in invoke("list", "--arch", "x", code=2).stderr
    invoke("clean", "--all", "--stale", code=2)
    assert "is empty" in invoke("prebuild", "--arch", "sm_90", "--out", "", code=2).stderr
    assert "is empty" in invoke("verify", "", code=2).stderr
    for command in ("prebuild", "list", "clean"):
        assert "known: sm_75" in invoke(command, "--arch", "", code=2).stderr
    invoke("prebuild", "--arch", "sm_90", "--jobs", "0", code=2)
    monkeypatch.setenv("CUPY_MOE_DISABLE_CACHE", "maybe")
    assert "CUPY_MOE_DISABLE_CACHE" in invoke("path", code=2).stderr


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


# ---- list, verify, clean


def test_list_shows_all_folders(sandbox: Sandbox, prebuilt: Path) -> None:
    sandbox.publish(sandbox.user, "sm_90")
    rows = invoke_json("list")["images"]
    found = [(row["origin"], row["target"], row["state"]) for row in rows]
    assert found == [
        ("prebuilt", "sm_80", "fresh"),
        ("prebuilt", "sm_90", "fresh"),
        ("user", "sm_90", "fresh"),
    ]
    assert len(invoke_json("list", "--arch", "9.0")["images"]) == 2
    (sandbox.sources / "tiny.cuh").write_text("constexpr int kOffset = 4;\n")
    assert sandbox.unit
    files(prebuilt, "sm_80/tiny-*.json")[0].write_text("")
    files(prebuilt, "sm_90/*.cubin")[0].write_bytes(b"")
    rows = invoke_json("list")["images"]
    assert [row["state"] for row in rows] == ["damaged", "damaged", "stale"]
    assert "instead of" in rows[1]["problem"]
    assert "stale" in invoke("list").stdout


def test_an_empty_list_is_no_failure(sandbox: Sandbox) -> None:
    assert "no images" in invoke("list").stdout


@pytest.mark.parametrize(
    ("strict", "damaged", "contents", "said"),
    [
        (True, "", b"", None),
        (False, "sm_90/*.cubin", b"", "has 0 bytes instead of"),
        (True, "sm_90/tiny-*.json", None, "no tiny for sm_90"),
        (False, "sm_90/tiny-*.json", None, None),  # a writer was killed before it came to this file
        (False, "sm_90/tiny-*", None, "missing, or not what the manifest lists"),
        (False, "sm_90/manifest.json", b"{}", "cannot be understood"),
    ],
)
def test_verify(prebuilt: Path, strict: bool, damaged: str, contents: bytes | None, said: str | None) -> None:
    for path in files(prebuilt, damaged) if damaged else []:
        if contents is None:
            path.unlink()
        else:
            path.write_bytes(contents)
    for where in ([], [prebuilt]):
        result = invoke("verify", *(["--strict"] if strict else []), *where, code=1 if said else 0)
        assert (said or "0 problems") in result.stdout


@pytest.mark.parametrize("kind", ["tiny-*.json", "manifest.json", "*.cubin"])
def test_verify_goes_on_past_what_it_may_not_read(
    prebuilt: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    may_open = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).match(kind):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return may_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    problems = invoke_json("verify", code=1)["problems"]
    for path in files(prebuilt, f"*/{kind}"):
        assert f"{path}: cannot be read (Permission denied)" in problems


def test_verify_names_the_file_that_changed(sandbox: Sandbox, prebuilt: Path) -> None:
    (sandbox.sources / "tiny.cuh").write_text("constexpr int kOffset = 4;\n")
    assert sandbox.unit
    invoke("verify")
    assert "stale (tiny.cuh)" in invoke("verify", "--strict", code=1).stdout


def test_strict_wants_something_to_verify(sandbox: Sandbox) -> None:
    invoke("verify")
    invoke("verify", "--strict", code=1)


def test_clean_touches_the_user_cache_only(sandbox: Sandbox, prebuilt: Path) -> None:
    sandbox.publish(sandbox.user, "sm_90")
    (sandbox.user / "v1" / "sm_90" / "notes.txt").write_text("mine")
    old, new = (sandbox.user / "v1" / "sm_90" / f"{folders.TEMPORARY}{name}" for name in ("1-old", "2-new"))
    old.write_text("")
    os.utime(old, (0, 0))
    new.write_text("")
    assert invoke_json("clean")["files"] == 1
    assert new.exists()
    assert not old.exists()
    (sandbox.sources / "tiny.cuh").write_text("constexpr int kOffset = 4;\n")
    assert sandbox.unit
    sandbox.publish(sandbox.user, "sm_80")
    assert invoke_json("clean", "--dry-run")["files"] == 2
    assert invoke_json("clean", "--stale")["files"] == 2
    assert invoke_json("clean", "--arch", "sm_90")["files"] == 0
    assert invoke_json("clean", "--all")["files"] == 2
    assert [path.name for path in files(sandbox.user, "*/*")] == [new.name, "notes.txt"]
    assert len(files(prebuilt, "*/*.cubin")) == 2


def test_clean_removes_nothing_but_its_own(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    image = sandbox.publish(sandbox.user, "sm_90")
    elsewhere = sandbox.folder / "elsewhere"
    sandbox.publish(elsewhere, "sm_80")
    (sandbox.user / "v1" / "sm_80").symlink_to(elsewhere / "v1" / "sm_80")
    (sandbox.user / "v1" / "sm_90x").mkdir()
    others = [
        image.with_suffix(".cubin.bak"),
        image.with_name("tiny-0123.cubin"),
        image.parent.with_name("sm_90x") / image.name,
    ]
    for path in others:
        path.write_text("mine")
    image.with_name(f"tiny-{'0' * 16}.cubin").mkdir()
    assert invoke_json("clean", "--all")["files"] == 2
    assert [path.read_text() for path in others] == ["mine"] * 3
    assert len(files(elsewhere, "sm_80/*")) == 2


def test_cleaning_twice_at_once(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.publish(sandbox.user, "sm_90")
    remove = folders.Folder.remove

    def too_late(folder: folders.Folder, name: str) -> None:
        remove(folder, name)
        remove(folder, name)

    monkeypatch.setattr(folders.Folder, "remove", too_late)
    assert invoke_json("clean", "--all")["files"] == 0
    assert not files(sandbox.user, "*/*")


def test_a_damaged_sidecar_is_cleaned_with_its_image(sandbox: Sandbox) -> None:
    image = sandbox.publish(sandbox.user, "sm_90")
    image.with_suffix(".json").write_bytes(b"[" * 100_000)
    assert (
        invoke_json("clean")["files"] == 1
    )  # its image may be that of a writer who comes to the sidecar next
    os.utime(image, (0, 0))
    assert invoke_json("clean")["files"] == 1
    assert not files(sandbox.user, "*/*")


# ---- show-config, path, doctor


def test_path_and_show_config(sandbox: Sandbox, prebuilt: Path) -> None:
    assert invoke("path").stdout == f"{sandbox.user}\n"
    value = invoke_json("show-config")
    assert value["environment"]["CUPY_MOE_PREBUILT_DIR"] == str(prebuilt)
    assert set(value["environment"]) == set(config.VARIABLES)
    text = invoke("show-config").stdout
    assert f"{prebuilt} (prebuilt)" in text
    assert f"{sandbox.user} (CUPY_MOE_CACHE_DIR)" in text
    assert str(sandbox.sources) in text


def test_path_without_a_cache_is_a_failure(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_MOE_DISABLE_CACHE", "1")
    assert "memory only" in invoke("path", code=1).output


def doctor(code: int = 0) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for check in invoke_json("doctor", code=code)["checks"]:
        found.setdefault(check["subject"], []).append((check["status"], check["finding"]))
    return found


def test_doctor_on_a_healthy_host(prebuilt: Path) -> None:
    found = doctor()
    assert {status for checks in found.values() for status, _ in checks} == {"PASS"}
    assert found["prebuilt"] == [("PASS", "every kernel for sm_80, sm_90")]
    assert "PASS  compile: tiny for" in invoke("doctor").stdout


def test_doctor_finds_what_is_wrong(
    sandbox: Sandbox, prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUPY_MOE_DISBALE_JIT", "1")
    monkeypatch.setenv("CUPY_MOE_FORCE_JIT", "x")
    files(prebuilt, "sm_90/*.cubin")[0].write_bytes(b"")
    sandbox.user.write_text("")
    (sandbox.sources / "bad.cu").write_text("nonsense;")
    assert sandbox.unit
    found = doctor(code=1)
    assert ("WARN", "CUPY_MOE_DISBALE_JIT is not a variable of cupy_moe") in found["environment"]
    assert ("FAIL", "CUPY_MOE_FORCE_JIT='x': expected 0 or 1") in found["environment"]
    assert found["cache"][0][0] == "FAIL"
    assert found["prebuilt"][0][0] == "FAIL"
    assert "bad.cu(1): error" in found["compiler"][0][1]


def test_doctor_fails_where_no_kernel_could_be_launched(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor()["prebuilt"] == [("WARN", "no target has every kernel")]
    monkeypatch.setenv("CUPY_MOE_DISABLE_JIT", "1")
    found = doctor(code=1)["prebuilt"]
    assert found == [("FAIL", "no kernel, and CUPY_MOE_DISABLE_JIT=1 forbids compiling")]
    (sandbox.sources / "other.cu").write_text('extern "C" __global__ void other(int* p) { *p = 1; }')
    sandbox.publish(sandbox.user, "sm_90")
    assert doctor()["prebuilt"] == [("WARN", "no target has every kernel")]
    monkeypatch.setenv("CUPY_MOE_FORCE_JIT", "1")
    assert "contradicts" in doctor(code=1)["environment"][0][1]
    monkeypatch.delenv("CUPY_MOE_FORCE_JIT")
    monkeypatch.delenv("CUPY_MOE_DISABLE_JIT")
    monkeypatch.delitem(sys.modules, "cupy_moe._cupy", raising=False)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert doctor(code=1)["CuPy"][0][0] == "FAIL"


def test_doctor_knows_the_variables_of_the_scripts(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_MOE_PYTHON", sys.executable)
    assert ("PASS", "CUPY_MOE_CACHE_DIR, CUPY_MOE_PYTHON") in doctor()["environment"]


def test_doctor_allows_no_compiler_where_all_is_prebuilt(
    prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise DependencyError("no NVRTC")

    monkeypatch.setattr(compiler, "toolchain", missing)
    assert doctor()["NVRTC"] == [("WARN", "no NVRTC")]
    monkeypatch.delenv("CUPY_MOE_PREBUILT_DIR")
    assert doctor(code=1)["NVRTC"] == [("FAIL", "no NVRTC")]


def test_strict_verification_wants_a_manifest_and_sidecars_that_agree_with_themselves(prebuilt: Path) -> None:
    invoke("verify", "--strict", prebuilt)
    (manifest,) = files(prebuilt, "sm_90/manifest.json")
    text = manifest.read_text()
    for changed in (None, text.replace('"files": {', '"files": {}, "old": {')):
        manifest.unlink()
        if changed:
            manifest.write_text(changed)
        assert "sm_90" in invoke("verify", "--strict", prebuilt, code=1).stdout
        manifest.write_text(text)
    (sidecar,) = (path for path in files(prebuilt, "sm_90/*.json") if path != manifest)
    entry = json.loads(sidecar.read_text())
    other = {"files": {}, "options": ["-x"], "nvrtc": "1.2.3", "nvrtc_build": "CL-0"}
    for name, value in (*other.items(), ("entry_key", entry["entry_key"][:16] + "0" * 48)):
        sidecar.write_text(json.dumps(entry | {name: value}))
        assert "than its .json says" in invoke("verify", prebuilt, code=1).stdout, name


def test_an_architecture_stands_for_all_that_its_devices_look_for(sandbox: Sandbox) -> None:
    """Units that want sm_90a are made for --arch sm_90, too; strict folders have both, or say what lacks."""
    (sandbox.sources / "specific.cu").write_text('// targets  sm_90a\nextern "C" __global__ void f() {}\n')
    sources._read_units.cache_clear()
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
