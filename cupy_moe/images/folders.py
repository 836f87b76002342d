"""Which folders hold images, whom they are trusted from, and how what is in them is opened.

Whoever writes an image decides what runs. So what was opened is judged, not what was named: each part of a
path below a root is opened by itself and through no link, and has to belong to somebody trusted and be
writable by nobody else. Who is trusted depends on the root, which may itself be reached through links:

    of the package                 everybody: who can write there can change the code as well
    chosen by us (home, $TMPDIR)   the user and root; and nobody else may write to the root itself
    named by the user              also the owner of the root, and its group if the root is set-group-ID and
                                   writable by the group. But below /tmp and the like, where anybody could
                                   have made a CUPY_MOE_CACHE_DIR before us, it has to be the user's or root's

No CuPy, no torch, no GPU.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from .. import config
from . import sources

log = logging.getLogger("cupy_moe")
LAYOUT = "v1"
TARGET = re.compile("(sm_[1-9][0-9]{1,2}a?|compute_[1-9][0-9]{1,2})")
TEMPORARY = ".tmp-"


class UntrustedError(PermissionError):
    """A file or folder that is there but not taken; `strerror` says why. Never leaves a lookup."""


def explain(error: OSError) -> str:
    """What is the matter with a file, to be said after its name."""
    text = error.strerror or str(error)
    return text if isinstance(error, UntrustedError) else f"cannot be read ({text})"


_warned: set[str] = set()


def warn_once(key: str, message: str, *arguments: object) -> None:
    if key not in _warned:
        _warned.add(key)
        log.warning(message, *arguments)


def refuse(error: OSError) -> NoReturn:
    raise error


def warn_of(error: OSError) -> None:
    warn_once(str(error.filename), "ignoring %s: it %s", error.filename, explain(error))


# ---- trust ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trust:
    owners: frozenset[int]
    writers: frozenset[int] = frozenset()  # groups that may write
    team: int | None = None  # one whose members' files are taken: only they can give a file this group

    def objection(self, status: os.stat_result) -> str | None:
        if status.st_uid not in self.owners and status.st_gid != self.team:
            return f"belongs to uid {status.st_uid}, who is not trusted here"
        if status.st_mode & stat.S_IWOTH:
            return "is writable by every user"
        if status.st_mode & stat.S_IWGRP and status.st_gid not in self.writers:
            return f"is writable by group {status.st_gid}, which is not trusted here"
        return None


def _exposed(path: Path) -> bool:
    """Whether anybody could have made this folder, or a link on the way to it. Raises OSError."""
    current, pending, links = Path(os.sep), list(path.parts[1:]), 0
    while pending:
        if os.stat(current).st_mode & stat.S_IWOTH:
            return True
        name = pending.pop(0)
        if name == os.pardir:
            current = current.parent
        elif os.path.islink(current / name):
            target = Path(os.readlink(current / name))
            links += 1
            if links > 40:  # as many as Linux follows
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            if target.is_absolute():
                current = Path(os.sep)
            pending = [part for part in target.parts if part != os.sep] + pending
        else:
            current /= name
    return False


# ---- folders --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """An open folder that is trusted; a context manager, which closes it. Methods raise OSError."""

    fd: int
    path: Path
    trust: Trust | None  # of everybody

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        _close(self.fd)

    def names(self) -> list[str]:
        with _about(self.path):
            return sorted(os.listdir(self.fd))

    def open(self, name: str, create: bool = False) -> Folder:
        with _about(self.path / name):
            try:
                fd = self._open(name, os.O_DIRECTORY)
            except FileNotFoundError:
                if not create:
                    raise
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, self._mode(0o777), dir_fd=self.fd)
                fd = self._open(name, os.O_DIRECTORY)
        return Folder(fd, self.path / name, self.trust)

    def read(self, name: str, limit: int) -> bytes:
        """A regular file of at most so many bytes; waits for nobody, as reading a pipe would."""
        with _about(self.path / name):
            fd = self._open(name, os.O_NONBLOCK)
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise UntrustedError(errno.EPERM, "is not a file")
                if status.st_size > limit:
                    raise UntrustedError(errno.EPERM, f"has {status.st_size} bytes, more than {limit}")
                data = b""
                while chunk := os.read(fd, status.st_size + 1 - len(data)):
                    data += chunk
                return data
            finally:
                _close(fd)

    def write(self, name: str, data: bytes) -> None:
        """Replace a file as a whole. No fsync: what a power cut tears, the sha256 tells."""
        temporary = f"{TEMPORARY}{os.getpid()}-{os.urandom(8).hex()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with _about(self.path / name):
            try:
                with open(os.open(temporary, flags, self._mode(0o666), dir_fd=self.fd), "wb") as file:
                    file.write(data)
                os.replace(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=self.fd)

    def status(self, name: str) -> os.stat_result:
        """Of the name itself, where it is a link."""
        with _about(self.path / name):
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def remove(self, name: str) -> None:
        with _about(self.path / name):
            os.unlink(name, dir_fd=self.fd)

    def _open(self, name: str, flags: int) -> int:
        flags |= os.O_RDONLY | (os.O_NOFOLLOW if self.trust else 0)
        try:
            fd = os.open(name, flags, dir_fd=self.fd)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            kind = "a link" if error.errno == errno.ELOOP else "a link or not a folder"
            raise UntrustedError(errno.EPERM, f"is {kind}") from None
        try:
            if self.trust and (reason := self.trust.objection(os.fstat(fd))):
                raise UntrustedError(errno.EPERM, reason)
        except OSError:
            _close(fd)
            raise
        return fd

    def _mode(self, full: int) -> int:
        """Less what would not be trusted, whatever the umask."""
        barred = stat.S_IWOTH if self.trust and self.trust.team is not None else stat.S_IWOTH | stat.S_IWGRP
        return full & ~barred


def _close(fd: int) -> None:
    """Of what was only read: nothing is lost, whatever a disk says."""
    with contextlib.suppress(OSError):
        os.close(fd)


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    """Errors name the whole path, and not what it was opened by."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


# ---- roots ----------------------------------------------------------------------------------------------


_MAX_PARTS = 256  # of a path; makedirs recurses


@dataclass(frozen=True)
class Root:
    path: Path
    origin: str  # "prebuilt" (named by the user), "package", "checkout" or "user"
    private: bool = False  # a user cache that we chose

    def open(self, *parts: str, create: bool = False) -> Folder:
        """Raises OSError: FileNotFoundError where nothing is, UntrustedError for what is not taken."""
        if len(self.path.parts) > _MAX_PARTS:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(self.path))
        if create:
            os.makedirs(self.path, mode=0o700 if self.private else 0o775, exist_ok=True)
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            folder = Folder(fd, self.path, self._trust(os.fstat(fd)))
        except BaseException:
            _close(fd)
            raise
        for name in parts:
            with folder:
                folder = folder.open(name, create)
        return folder

    def targets(self, report: Callable[[OSError], None] = warn_of) -> list[str]:
        """Those that there is a folder of."""
        try:
            with self.open(LAYOUT) as layout:
                return [name for name in layout.names() if TARGET.fullmatch(name)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            report(error)
            return []

    def opened(
        self, target: str | None = None, report: Callable[[OSError], None] = warn_of
    ) -> Iterator[Folder]:
        """The folders of all targets, or of one; each is closed when the next is asked for."""
        for name in [target] if target else self.targets(report):
            try:
                folder = self.open(LAYOUT, name)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                report(error)
                continue
            with folder:
                yield folder

    def _trust(self, status: os.stat_result) -> Trust | None:
        """Of what is below; raises UntrustedError where the root itself is not to be trusted."""
        if self.origin in ("package", "checkout"):
            return None
        own = frozenset({os.geteuid(), 0})
        if self.private:
            trust = Trust(own)
            reason = trust.objection(status)
            if os.lstat(self.path).st_uid not in own:
                reason = "is a link of another user"
        else:
            shared = stat.S_ISGID | stat.S_IWGRP
            is_team = status.st_mode & (shared | stat.S_IWOTH) == shared
            team = status.st_gid if is_team else None
            trust = Trust(own | {status.st_uid}, frozenset({0, status.st_gid} if is_team else {0}), team)
            reason = None
            if status.st_uid not in own and self.origin == "user" and _exposed(self.path):
                reason = f"belongs to uid {status.st_uid}, in a folder that every user may write to"
        if reason:
            raise UntrustedError(errno.EPERM, reason, str(self.path))
        return trust


def prebuilt_roots() -> list[Root]:
    roots = [Root(path, "prebuilt") for path in config.prebuilt_dirs()]
    roots.append(Root(Path(__file__).resolve().parent.parent / "cache", "package"))
    if checkout := sources.checkout():
        roots.append(Root(checkout / "cache", "checkout"))
    return [root for root in roots if os.path.isdir(root.path)]


def user_root() -> Root | None:
    """The user cache, or None where nothing can be kept. Creates nothing."""
    return locate_user_root()[0]


def locate_user_root() -> tuple[Root | None, str]:
    """The user cache and why it is that one."""
    if config.flag("CUPY_MOE_DISABLE_CACHE"):
        return None, "CUPY_MOE_DISABLE_CACHE=1: memory only"
    if named := config.cache_dir():
        return Root(named, "user"), "CUPY_MOE_CACHE_DIR"
    # "~" stays as it is, and so is not absolute, where there is neither HOME nor a passwd entry.
    home = os.path.expanduser("~/.cache")
    for parent, why in ((os.environ.get("XDG_CACHE_HOME", ""), "XDG_CACHE_HOME"), (home, "home")):
        root = Root(Path(parent) / "cupy_moe", "user", private=True)
        if _usable(root):
            return root, why
    with contextlib.suppress(OSError):  # gettempdir() looks for a folder that it can write to
        root = Root(Path(tempfile.gettempdir()) / f"cupy_moe-{os.geteuid()}", "user", private=True)
        if _usable(root):
            return root, "temporary: no home folder that can be written"
    return None, "no folder can be written: memory only"


def in_use() -> list[Root]:
    """The roots of a look-up, in its order: prebuilt ones, and the user cache."""
    prebuilt = [] if config.flag("CUPY_MOE_FORCE_JIT") else prebuilt_roots()
    user = user_root()
    return [*prebuilt, user] if user else prebuilt


def _usable(root: Root) -> bool:
    """Whether we may keep images there, or could once the folder is made."""
    path = root.path
    if not path.is_absolute():
        return False
    if os.path.lexists(path):
        try:
            with root.open():
                pass
        except OSError as error:
            warn_of(error)
            return False
    while not os.path.lexists(path):
        path = path.parent
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK, effective_ids=True)
