"""The command line: what it prints, what it writes, how it exits. No GPU, no torch."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from cache_helpers import PACKAGE, Sandbox, copy_package, files, run_python
from cli_helpers import doctor, invoke, invoke_json
from click.shell_completion import BashComplete

from cupy_moe import __version__, config
from cupy_moe.errors import DependencyError
from cupy_moe.images import compiler, folders, targets
from cupy_moe.tools.cli import main

COMMANDS = ["clean", "demo", "doctor", "list", "path", "prebuild", "show-config", "verify"]


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

    assert completed("prebuild", "--arch", "sm_10") == ["sm_100"]
    assert completed("prebuild", "--arch", "a") == ["all"]
    assert completed("prebuild", "--kernel", "") == ["tiny"]
    assert completed("clean", "--arch", "c") == completed("list", "--arch", "c") == [targets.PTX_TARGET]


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
