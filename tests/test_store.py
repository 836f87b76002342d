"""A folder may hold anything. A look-up takes what is whole and ours, and never waits, fails or swells."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cache_helpers import USER, Sandbox, acting_as, files, needs_uids
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cupy_moe.errors import KernelNotPrebuiltError
from cupy_moe.images import elf, lookup, store
from cupy_moe.images.folders import Root
from cupy_moe.images.store import DamagedEntryError
from cupy_moe.tools.cli import main

fuzz = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def cubin(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image in a prebuilt folder; and no compiler."""
    path = sandbox.publish(sandbox.prebuilt, "sm_90")
    monkeypatch.setenv("CUPY_MOE_PREBUILT_DIR", str(sandbox.prebuilt))
    monkeypatch.setenv("CUPY_MOE_DISABLE_JIT", "1")
    return path


def is_found() -> bool:
    try:
        return bool(next(lookup.candidates("tiny", (9, 0))))
    except KernelNotPrebuiltError:
        return False


def run_all_commands(folder: Path) -> None:
    """What describes, checks and cleans a folder ends in 0 or 1, and in no traceback."""
    for line in (["list"], ["list", "--json"], ["verify", "--strict"], ["clean", "--all", "--dry-run"]):
        result = CliRunner().invoke(main, line, env={"CUPY_MOE_CACHE_DIR": str(folder)})
        assert result.exit_code in (0, 1), line
        assert isinstance(result.exception, SystemExit | None), line


# ---- sidecars

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@fuzz
def test_any_field_may_say_anything(cubin: Path, data: Any) -> None:
    sidecar = cubin.with_suffix(".json")
    before = sidecar.read_bytes()
    fields = json.loads(before)
    name = data.draw(st.sampled_from(sorted(fields)))
    changed = {**fields, name: data.draw(json_values)}
    sidecar.write_bytes(store.to_json(changed))
    try:
        found = is_found()
        if name in ("schema", "unit", "target", "source_digest", "entry_key", "size", "sha256"):
            assert found == (store.to_json(changed) == before)
        run_all_commands(cubin.parents[2])
    finally:
        sidecar.write_bytes(before)


@given(st.binary(max_size=64) | json_values.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 200_000)
@example(b'{"a":' * 200_000)
@example(b'{"schema": ' + b"9" * 5000 + b"}")
@fuzz
def test_a_sidecar_may_be_anything(cubin: Path, data: bytes) -> None:
    sidecar = cubin.with_suffix(".json")
    before = sidecar.read_bytes()
    sidecar.write_bytes(data)
    try:
        assert not is_found()
        run_all_commands(cubin.parents[2])
    finally:
        sidecar.write_bytes(before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schema", True),
        ("size", True),
        ("size", -1),
        ("size", 1.0),
        ("entry_key", ["a" * 64]),
        ("sha256", "A" * 64),
        ("kernels", ["tiny_add"]),
        ("kernels", {"tiny_add": 5}),
        ("kernels", {"tiny_add": {"regs": "8"}}),
        ("files", {"tiny.cu": ["x"]}),
        ("options", "-std=c++17"),
        ("options", [["-lineinfo"]]),
        ("nvrtc", {}),
        ("nvrtc", "12\ud800"),
        ("package", "\x1b[31m"),
    ],
)
def test_an_odd_field_is_named(cubin: Path, name: str, value: object) -> None:
    fields = json.loads(cubin.with_suffix(".json").read_bytes())
    assert asdict(store.parse(store.to_json(fields))) == fields
    with pytest.raises(DamagedEntryError, match=rf"\({name}\)"):
        store.parse(json.dumps({**fields, name: value}).encode())


# ---- folders


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _huge(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size)


ODDITIES: dict[str, Callable[[Path], None]] = {
    "a pipe": _fifo,
    "a folder": _folder,
    "a link": _link,
    "a link to itself": _loop,
    "huge": _huge(1 << 40),
}


@pytest.mark.parametrize("kind", [".json", ".cubin"])
@pytest.mark.parametrize("oddity", ODDITIES)
def test_what_is_no_file_of_ours_is_neither_waited_for_nor_read(
    cubin: Path, caplog: pytest.LogCaptureFixture, oddity: str, kind: str
) -> None:
    ODDITIES[oddity](cubin.with_suffix(kind))
    assert not is_found()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(cubin.with_suffix("")) in caplog.text
    run_all_commands(cubin.parents[2])


NAMES = ["v1", "sm_90", "compute_²", "compute_090", "compute_90", "sm_٣", "x", "\udcff", "-", "manifest.json"]
KINDS = ["folder", "file", "link", "pipe"]


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.lists(st.sampled_from(NAMES), max_size=3)), max_size=8))
@example([("folder", ["v1", "compute_²"]), ("folder", ["v1", "sm_90", "manifest.json"])])
@fuzz
def test_a_folder_may_hold_anything(cubin: Path, tmp_path: Path, tree: list[tuple[str, list[str]]]) -> None:
    root = tmp_path / "fuzzed"
    shutil.copytree(cubin.parents[2], root)
    try:
        for kind, parts in tree:
            path = root.joinpath(*parts, *([f"tiny-{'0' * 16}.json"] if kind != "folder" else []))
            if kind == "folder" and not path.exists():
                path.mkdir(parents=True)
            elif path.parent.is_dir() and not os.path.lexists(path):
                {"file": Path.touch, "link": lambda p: p.symlink_to("/"), "pipe": os.mkfifo}[kind](path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUPY_MOE_PREBUILT_DIR", str(root))
            assert is_found()
            run_all_commands(root)
    finally:
        shutil.rmtree(root)


@pytest.mark.parametrize("name", ["x" * 5000, "loop/cache", "file/cache"])
def test_a_user_cache_that_cannot_exist_costs_warnings_and_a_compilation(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    (sandbox.folder / "loop").symlink_to("loop")
    (sandbox.folder / "file").touch()
    monkeypatch.setenv("CUPY_MOE_CACHE_DIR", str(sandbox.folder / name))
    for _ in range(2):
        assert next(lookup.candidates("tiny", (9, 0))).origin == "compiled"
    assert "are not kept" in caplog.text
    assert len(caplog.records) <= 2


@needs_uids
@pytest.mark.parametrize("parts", ["", "v1", "v1/sm_90"])
def test_a_folder_that_may_not_be_searched_is_passed_over(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, parts: str
) -> None:
    sandbox.publish(sandbox.user, "sm_90")
    assert next(lookup.candidates("tiny", (9, 0))).origin == "user"
    (sandbox.user / parts).chmod(0)
    with acting_as(USER):  # who may not search the folders above, either
        assert next(lookup.candidates("tiny", (9, 0))).origin == "compiled"


# ---- entry points


@pytest.mark.parametrize("target", ["sm_75", "sm_90", "sm_120", "compute_90"])
def test_entry_points_are_read_from_the_image(sandbox: Sandbox, target: str) -> None:
    image = store.compile_image(sandbox.unit, target)
    assert store.entry_points(image.data, target) == image.sidecar.kernels.keys()
    assert len(image.sidecar.kernels) == (2 if target == "sm_75" else 3)


@given(data=st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_image_may_say_anything(cubin: Path, data: Any) -> None:
    image = bytearray(cubin.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        image[data.draw(st.integers(0, 127) | st.integers(0, len(image) - 1))] = data.draw(
            st.integers(0, 255)
        )
    whole = bytes(image[: data.draw(st.integers(0, len(image)))])
    assert isinstance(elf.number(whole), int | str)
    with contextlib.suppress(DamagedEntryError):
        assert isinstance(store.entry_points(whole, "sm_90"), set)


@pytest.mark.parametrize("kernels", [{}, {"tiny_add": {}}, {"tiny_sub": {}}])
def test_verify_compares_the_kernels_with_the_image(cubin: Path, kernels: dict[str, dict[str, int]]) -> None:
    sidecar = cubin.with_suffix(".json")
    fields = json.loads(sidecar.read_bytes())
    sidecar.write_bytes(store.to_json({**fields, "kernels": kernels}))
    result = CliRunner().invoke(main, ["verify"])
    assert result.exit_code == 1
    assert "has the kernels tiny_add, tiny_cluster, tiny_reverse, but its .json says" in result.stdout


def test_publishing_to_a_folder_that_is_removed_starts_again(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = store.compile_image(sandbox.unit, "sm_90")
    replace, calls = os.replace, []

    def replace_once_removed(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            shutil.rmtree(sandbox.user)
        replace(*arguments, **options)

    monkeypatch.setattr(os, "replace", replace_once_removed)
    store.publish(Root(sandbox.user, "user"), image)
    assert len(files(sandbox.user, "*/*")) == 2
    assert len(calls) == 3
