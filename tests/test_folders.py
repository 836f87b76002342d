"""Whose images are taken, through which folders, and that writing is as careful; with real uids for root."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cache_helpers import USER, Sandbox, acting_as, files, needs_uids

from cupy_moe.errors import KernelNotPrebuiltError
from cupy_moe.images import compiler, folders, lookup, prebuild, sources, store
from cupy_moe.images.folders import Root, UntrustedError

STRANGER, COLLEAGUE, TEAM = 54322, 54323, 54400


@pytest.fixture
def common(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder as /tmp is, in it; and no compiler, so that a look-up finds an image or nothing."""
    monkeypatch.setenv("CUPY_MOE_DISABLE_JIT", "1")
    monkeypatch.delenv("CUPY_MOE_CACHE_DIR")
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    compiler.installed_nvrtc()
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def image(sandbox: Sandbox) -> store.Image:
    return store.compile_image(sandbox.unit, "sm_90")


def found() -> str:
    """The origin of what a look-up finds."""
    try:
        return next(lookup.candidates("tiny", (9, 0))).origin
    except KernelNotPrebuiltError:
        return "nothing"


def give(path: Path, uid: int, gid: int = -1) -> None:
    """All that is there, and not what links in it lead to."""
    for folder, _, names in os.walk(path):
        for name in (folder, *(os.path.join(folder, name) for name in names)):
            os.chown(name, uid, gid if gid >= 0 else uid, follow_symlinks=False)


def fill(path: Path, image: store.Image, uid: int) -> Path:
    store.publish(Root(path, "prebuilt"), image)
    give(path, uid)
    return path


# ---- a user cache that others can get at


def _swap_for_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _one(folder: Path, pattern: str) -> Path:
    (path,) = files(folder, pattern)
    return path


TAMPERED: dict[str, Callable[[Path], object]] = {
    "v1 of a stranger": lambda root: os.chown(root / "v1", STRANGER, STRANGER),
    "target of a stranger": lambda root: os.chown(root / "v1/sm_90", STRANGER, STRANGER),
    "image of a stranger": lambda root: os.chown(_one(root, "*/*.cubin"), STRANGER, STRANGER),
    "sidecar of a stranger": lambda root: os.chown(_one(root, "*/*.json"), STRANGER, STRANGER),
    "v1 a link": lambda root: _swap_for_link(root / "v1"),
    "target a link": lambda root: _swap_for_link(root / "v1/sm_90"),
    "image a link": lambda root: _swap_for_link(_one(root, "*/*.cubin")),
    "sidecar a link": lambda root: _swap_for_link(_one(root, "*/*.json")),
    "v1 open to all": lambda root: (root / "v1").chmod(0o777),
    "v1 sticky": lambda root: (root / "v1").chmod(0o1777),
    "target open to a group": lambda root: (root / "v1/sm_90").chmod(0o775),
    "image open to all": lambda root: _one(root, "*/*.cubin").chmod(0o666),
    "sidecar open to a group": lambda root: _one(root, "*/*.json").chmod(0o664),
}


@needs_uids
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("tampering", TAMPERED)
def test_what_others_could_have_changed_is_not_taken(
    common: Path,
    image: store.Image,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tampering: str,
    named: bool,
) -> None:
    root = fill(common / f"cupy_moe-{USER}", image, USER)
    root.chmod(0o700)
    if named:
        monkeypatch.setenv("CUPY_MOE_CACHE_DIR", str(root))
    with acting_as(USER):
        assert found() == "user"
    TAMPERED[tampering](root)
    with acting_as(USER):
        assert found() == found() == "nothing"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(root) in caplog.text


@needs_uids
@pytest.mark.parametrize("mode", [0o755, 0o1777])
@pytest.mark.parametrize(
    "where", ["link in TMPDIR", "link in home", "TMPDIR", "XDG_CACHE_HOME", "CUPY_MOE_CACHE_DIR"]
)
def test_a_user_cache_that_a_stranger_laid_out_is_not_taken(
    common: Path, image: store.Image, monkeypatch: pytest.MonkeyPatch, where: str, mode: int
) -> None:
    own = "cupy_moe" if where == "XDG_CACHE_HOME" else f"cupy_moe-{USER}"
    trap = fill(common / ("trap" if "link" in where else own), image, STRANGER)
    if mode == 0o1777:  # a folder of root's that anybody may add to
        os.chown(trap, 0, 0)
    trap.chmod(mode)
    if where == "link in TMPDIR":
        (common / f"cupy_moe-{USER}").symlink_to(trap)
        os.chown(common / f"cupy_moe-{USER}", STRANGER, STRANGER, follow_symlinks=False)
    elif where == "link in home":
        home = common / "home"
        (home / ".cache").mkdir(parents=True)
        (home / ".cache" / "cupy_moe").symlink_to(trap)
        give(home, USER)
        monkeypatch.setenv("HOME", str(home))
    elif where == "XDG_CACHE_HOME":
        monkeypatch.setenv("XDG_CACHE_HOME", str(common))
    elif where == "CUPY_MOE_CACHE_DIR":
        monkeypatch.setenv("CUPY_MOE_CACHE_DIR", str(trap))
    with acting_as(USER):
        assert found() == "nothing"


@needs_uids
def test_a_link_of_a_stranger_leads_nowhere_but_ones_own_may(common: Path, image: store.Image) -> None:
    scratch = fill(common / "scratch", image, USER)
    link = common / f"cupy_moe-{USER}"
    link.symlink_to(scratch)
    os.chown(link, USER, USER, follow_symlinks=False)
    with acting_as(USER):
        assert found() == "user"
    os.chown(link, STRANGER, STRANGER, follow_symlinks=False)
    with acting_as(USER):
        assert found() == "nothing"


@needs_uids
def test_root_takes_nothing_from_users(
    common: Path, image: store.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUPY_MOE_CACHE_DIR", str(fill(common / "cache", image, USER)))
    assert found() == "nothing"


# ---- folders that are meant to be shared


@needs_uids
def test_prebuilt_folders_of_root_serve_every_user(
    common: Path, image: store.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(common / "kernels", image, 0)
    for path in folder.rglob("*"):
        path.chmod(0o775 if path.is_dir() else 0o664)  # as COPY leaves it after a umask of 002
    monkeypatch.setenv("CUPY_MOE_PREBUILT_DIR", str(folder))
    with acting_as(USER):
        assert found() == "prebuilt"


@needs_uids
def test_naming_a_prebuilt_folder_is_trusting_its_owner_and_nobody_else(
    common: Path, image: store.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(common / "kernels", image, COLLEAGUE)
    link = common / "current"
    link.symlink_to(folder)  # a root may be reached through links
    monkeypatch.setenv("CUPY_MOE_PREBUILT_DIR", str(link))
    with acting_as(USER):
        assert found() == "prebuilt"
    os.chown(folder / "v1", STRANGER, STRANGER)
    with acting_as(USER):
        assert found() == "nothing"


@needs_uids
def test_a_cache_of_a_colleague_is_taken_unless_anybody_could_have_made_it(
    common: Path, image: store.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUPY_MOE_CACHE_DIR", str(fill(common / "a" / "cache", image, COLLEAGUE)))
    with acting_as(USER):
        assert found() == "nothing"
    monkeypatch.setattr(folders, "_exposed", lambda path: False)
    with acting_as(USER):
        assert found() == "user"


def test_a_folder_is_exposed_by_any_folder_above_it(tmp_path: Path) -> None:
    assert not folders._exposed(Path("/usr/lib/cupy_moe"))
    common = tmp_path / "common"
    (common / "a" / "b").mkdir(parents=True)
    common.chmod(0o1777)
    assert folders._exposed(common / "a" / "b")
    (tmp_path / "link").symlink_to(common / "a")
    assert folders._exposed(tmp_path / "link" / "b")


def test_a_link_on_the_way_may_be_anybodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, above = os.stat, set(tmp_path.parents)  # one of which everybody may write to
    monkeypatch.setattr(os, "stat", lambda path, **how: real(os.sep if path in above else path, **how))
    (tmp_path / "theirs" / "cache").mkdir(parents=True)
    (tmp_path / "sticky").mkdir()
    (tmp_path / "sticky").chmod(0o1777)
    (tmp_path / "sticky" / "foo").symlink_to(tmp_path / "theirs" / "cache")
    (tmp_path / "through").symlink_to("sticky/foo")
    (tmp_path / "direct").symlink_to(tmp_path / "sticky" / ".." / "theirs" / "cache")
    (tmp_path / "round").symlink_to("round")
    assert not folders._exposed(tmp_path / "theirs" / "cache")
    assert folders._exposed(tmp_path / "through")
    assert folders._exposed(tmp_path / "direct")
    with pytest.raises(OSError, match="symbolic links"):
        folders._exposed(tmp_path / "round")


def test_a_path_too_deep_to_make_costs_one_warning(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUPY_MOE_CACHE_DIR", str(sandbox.folder / ("d/" * 1200)))
    assert next(lookup.candidates("tiny", (9, 0))).origin == "compiled"
    assert "File name too long" in caplog.text


@needs_uids
def test_a_team_shares_a_cache(common: Path, image: store.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = common / "team"
    folder.mkdir()
    os.chown(folder, 0, TEAM)
    folder.chmod(0o2775)
    monkeypatch.setenv("CUPY_MOE_CACHE_DIR", str(folder))
    umask = os.umask(0o002)
    try:
        with acting_as(COLLEAGUE, TEAM):
            store.publish(Root(folder, "user"), image)
        with acting_as(USER, TEAM):
            assert found() == "user"
            store.publish(Root(folder, "user"), image)
    finally:
        os.umask(umask)
    path = _one(folder, "*/*.cubin")
    assert (path.stat().st_uid, path.stat().st_gid) == (USER, TEAM)
    os.chown(path, STRANGER, STRANGER)
    with acting_as(USER, TEAM):
        assert found() == "nothing"
    os.chown(path, USER, TEAM)
    folder.chmod(0o775)  # writable by a group by the accident of a umask: no team
    with acting_as(USER, TEAM):
        assert found() == "nothing"


@needs_uids
def test_the_folder_of_the_package_is_trusted_as_its_code_is(
    common: Path, image: store.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = common / "site-packages" / "cupy_moe"
    fill(package / "cache", image, COLLEAGUE)
    _swap_for_link(_one(package / "cache", "*/*.cubin"))  # as some installers do with every file
    monkeypatch.setattr(folders, "__file__", str(package / "images" / "folders.py"))
    with acting_as(USER):
        assert found() == "package"


@needs_uids
def test_the_cache_of_a_checkout_is_trusted_as_its_code_is(
    common: Path, image: store.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(common / "checkout" / "cache", image, COLLEAGUE)
    monkeypatch.setattr(sources, "checkout", lambda: common / "checkout")
    with acting_as(USER):
        assert found() == "checkout"


@pytest.mark.parametrize("name", ["../sm_80/{}", "/etc/{}", "..", "{}/../{}", "./{}"])
def test_a_manifest_names_no_file_elsewhere(
    sandbox: Sandbox, image: store.Image, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = store.publish(Root(sandbox.prebuilt, "prebuilt"), image)
    listed = {"files": {name.replace("{}", path.name): image.sidecar.sha256}}
    path.with_name(prebuild.MANIFEST).write_bytes(store.to_json(listed))
    read: list[str] = []
    real = folders.Folder.read

    def reading(folder: folders.Folder, name: str, limit: int) -> bytes:
        read.append(name)
        return real(folder, name, limit)

    monkeypatch.setattr(folders.Folder, "read", reading)
    problems = prebuild.problems(Root(sandbox.prebuilt, "prebuilt"), strict=False)
    assert problems == [f"{path.with_name(prebuild.MANIFEST)}: cannot be understood"]
    assert set(read) == {path.name, path.with_suffix(".json").name, prebuild.MANIFEST}


# ---- writing


@pytest.mark.parametrize("umask", [0, 0o002, 0o022, 0o077])
@pytest.mark.parametrize("private", [False, True])
def test_what_we_write_under_any_umask_we_take(
    sandbox: Sandbox, image: store.Image, monkeypatch: pytest.MonkeyPatch, umask: int, private: bool
) -> None:
    before = os.umask(umask)
    try:
        path = store.publish(Root(sandbox.user, "user", private), image)
    finally:
        os.umask(before)
    monkeypatch.setenv("CUPY_MOE_DISABLE_JIT", "1")
    assert found() == "user"
    for part in (path, path.parent, path.parent.parent):
        assert part.stat().st_mode & 0o022 == 0
    assert sandbox.user.stat().st_mode & 0o777 == (0o700 if private else 0o775 & ~umask)


@pytest.mark.parametrize("part", ["v1", "v1/sm_90"])
def test_nothing_is_written_through_a_link(
    sandbox: Sandbox, image: store.Image, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    elsewhere = sandbox.folder / "elsewhere"
    elsewhere.mkdir()
    (sandbox.user / part).parent.mkdir(parents=True)
    (sandbox.user / part).symlink_to(elsewhere)
    with pytest.raises(UntrustedError, match="is a link"):
        store.publish(Root(sandbox.user, "user"), image)
    assert found() == "compiled"
    assert "are not kept" in caplog.text
    assert list(elsewhere.iterdir()) == []


def test_a_file_that_is_a_link_is_replaced_and_not_followed(sandbox: Sandbox, image: store.Image) -> None:
    path = store.publish(Root(sandbox.user, "user"), image)
    precious = sandbox.folder / "precious"
    precious.write_text("mine")
    path.unlink()
    path.symlink_to(precious)
    store.publish(Root(sandbox.user, "user"), image)
    assert precious.read_text() == "mine"
    assert path.read_bytes() == image.data


def test_folders_are_closed(sandbox: Sandbox, image: store.Image) -> None:
    store.publish(Root(sandbox.user, "user"), image)
    (sandbox.user / "v1" / "sm_80").symlink_to("sm_90")
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        assert found() == "user"
        assert Root(sandbox.user, "user").targets() == ["sm_80", "sm_90"]
        with pytest.raises(UntrustedError):
            Root(sandbox.user, "user").open("v1", "sm_80")
    assert os.listdir("/proc/self/fd") == before
