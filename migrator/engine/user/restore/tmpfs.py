"""The tmpfs mounts of a container filled again: files are made in a private directory of each and named in the end.

A file that is renamed keeps its mappings and descriptors, and they follow its name. What comes from the stream
is hostile: it lands in a tmpfs that the host has not, and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator

from migrator.errors import ImageError, RestartFailed
from migrator.image.records_shared import SharedFile, TmpfsEntry, TmpfsXattr
from migrator.linux.descriptors import TMPFS_MAGIC, filesystem_type
from migrator.linux.openat2 import open_beneath, open_in_root

_OURS = ".migrator-"
_PRIVATE = f"{_OURS}arriving"


class TmpfsRestore:
    """root_fd: the root directory of the container, O_PATH; set by `begin()` before the first record comes."""

    def __init__(self) -> None:
        self.root_fd = -1
        self._host: set[int] = set()  # devices, looked at ahead of the freeze
        self._mounts: dict[str, int] = {}
        self._places: dict[int, tuple[str, str]] = {}  # objref -> (mount, path) that it has by now
        self._named: dict[str, set[str]] = {}  # by mount: the paths that came
        self._folders: list[TmpfsEntry] = []

    def begin(self, root_fd: int) -> None:
        self.root_fd, self._host = root_fd, _host_devices()

    @property
    def mounts(self) -> list[str]:
        return list(self._mounts)

    def make(self, rec: SharedFile) -> int:
        """A new file, which has no place yet; open for reading and writing."""
        fd = self._mount(rec.mount)
        with contextlib.suppress(FileExistsError):
            os.mkdir(_PRIVATE, 0o700, dir_fd=fd)
        path = f"{_PRIVATE}/{rec.objref}"
        made = open_beneath(fd, path.encode(), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        self._places[rec.objref] = rec.mount, path
        return made

    def open(self, objref: int, flags: int) -> int:
        """A file that was deleted, or will be by settle(), opened by its name."""
        if objref not in self._places:
            raise ImageError(f"{objref} is no file of a tmpfs")
        with self._folder(*self._places[objref]) as (folder, name):
            return os.open(name, flags | os.O_CLOEXEC, dir_fd=folder)

    def entry(self, rec: TmpfsEntry) -> None:
        """Make a name. Raises RestartFailed."""
        try:
            self._entry(rec)
        except OSError as error:
            raise RestartFailed(f"{rec.path} in the tmpfs at {rec.mount}: {error}") from error

    def xattr(self, rec: TmpfsXattr) -> None:
        try:
            with self._folder(rec.mount, rec.path) as (folder, name):
                os.setxattr(f"/proc/self/fd/{folder}/{name}", rec.name, rec.value, follow_symlinks=False)
        except OSError as error:
            raise RestartFailed(f"attribute {rec.name} of {rec.path} in the tmpfs at {rec.mount}: {error}") from error

    def settle(self) -> None:
        """Once all has come: what has no name goes, and directories get their times."""
        for mount, named in self._named.items():
            fd = self._mounts[mount]
            shutil.rmtree(_PRIVATE, ignore_errors=True, dir_fd=fd)
            _remove_others(fd, "", named)
        for rec in reversed(self._folders):
            with self._folder(rec.mount, rec.path) as (folder, name):
                os.utime(name, ns=(rec.mtime, rec.mtime), dir_fd=folder, follow_symlinks=False)
        self._folders.clear()
        self._named.clear()

    def close(self) -> None:
        for fd in self._mounts.values():
            os.close(fd)
        self._mounts.clear()

    # ------------------------------------------------------------------ inside

    def _mount(self, path: str) -> int:
        known = self._mounts.get(path)
        if known is not None:
            return known
        try:
            fd = open_in_root(self.root_fd, path, os.O_RDONLY | os.O_DIRECTORY, links=False)
        except OSError as error:
            raise RestartFailed(f"the tmpfs at {path}: {error}") from error
        if filesystem_type(fd) != TMPFS_MAGIC or os.fstat(fd).st_dev in self._host:
            os.close(fd)
            raise RestartFailed(f"{path} is no tmpfs of the container's own here")
        self._mounts[path] = fd
        return fd

    @contextlib.contextmanager
    def _folder(self, mount: str, path: str) -> Iterator[tuple[int, str]]:
        """(descriptor of the directory, name in it)."""
        above, _, name = path.rpartition("/")  # of "." it is "."
        fd = open_beneath(self._mount(mount), os.fsencode(above), os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield fd, name
        finally:
            os.close(fd)

    def _entry(self, rec: TmpfsEntry) -> None:
        self._named.setdefault(rec.mount, set()).add(rec.path)
        kind = stat.S_IFMT(rec.mode)
        with self._folder(rec.mount, rec.path) as (folder, name):
            if kind == stat.S_IFREG:
                self._place(rec, folder, name)
            elif not _is_there(rec, folder, name):
                _make(rec, folder, name)
            os.chown(name, rec.uid, rec.gid, dir_fd=folder, follow_symlinks=False)
            if kind != stat.S_IFLNK:
                os.chmod(name, stat.S_IMODE(rec.mode), dir_fd=folder)
            if kind == stat.S_IFDIR:
                self._folders.append(rec)
            elif kind != stat.S_IFREG:
                os.utime(name, ns=(rec.mtime, rec.mtime), dir_fd=folder, follow_symlinks=False)

    def _place(self, rec: TmpfsEntry, folder: int, name: str) -> None:
        place = self._places.get(rec.shared_objref)
        if place is None or place[0] != rec.mount:
            raise RestartFailed(f"{rec.path} in the tmpfs at {rec.mount} refers to a file of another")
        with self._folder(*place) as (source, former):
            if place[1].startswith(f"{_PRIVATE}/"):
                os.rename(former, name, src_dir_fd=source, dst_dir_fd=folder)
                self._places[rec.shared_objref] = rec.mount, rec.path
            else:
                os.link(former, name, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)


def _is_there(rec: TmpfsEntry, folder: int, name: str) -> bool:
    """Whether the new container has it already; what is something else goes."""
    try:
        status = os.lstat(name, dir_fd=folder)
    except FileNotFoundError:
        return False
    same = stat.S_IFMT(status.st_mode) == stat.S_IFMT(rec.mode) and status.st_rdev == rec.rdev
    if same and (not stat.S_ISLNK(rec.mode) or os.readlink(name, dir_fd=folder) == rec.target):
        return True
    if stat.S_ISDIR(status.st_mode):
        os.rmdir(name, dir_fd=folder)
    else:
        os.unlink(name, dir_fd=folder)
    return False


def _make(rec: TmpfsEntry, folder: int, name: str) -> None:
    if stat.S_ISDIR(rec.mode):
        os.mkdir(name, 0o700, dir_fd=folder)
    elif stat.S_ISLNK(rec.mode):
        os.symlink(rec.target, name, dir_fd=folder)
    else:
        os.mknod(name, stat.S_IFMT(rec.mode) | 0o600, rec.rdev, dir_fd=folder)


def _remove_others(fd: int, prefix: str, named: set[str]) -> None:
    device = os.fstat(fd).st_dev
    for name in os.listdir(fd):
        status = os.lstat(name, dir_fd=fd)
        if status.st_dev != device or name.startswith(_OURS):  # of sockets that are not bound yet
            continue
        folder = stat.S_ISDIR(status.st_mode)
        if prefix + name not in named:
            if folder:
                shutil.rmtree(name, ignore_errors=True, dir_fd=fd)  # a mount point in it keeps it
            else:
                os.unlink(name, dir_fd=fd)
        elif folder:
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                _remove_others(below, f"{prefix}{name}/", named)
            finally:
                os.close(below)


def _host_devices() -> set[int]:
    """st_dev of all that is mounted for us."""
    found = set()
    with open("/proc/self/mountinfo") as file:
        for line in file:
            major, _, minor = line.split()[2].partition(":")
            found.add(os.makedev(int(major), int(minor)))
    return found
