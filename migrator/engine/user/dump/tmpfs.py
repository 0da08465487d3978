"""What is in the tmpfs mounts of a container's own, /dev/shm among them: its names; contents are shared memory.

Such a file system is on no other host. Its regular files are sent like shared memory, page by page while the tasks
run, and in the end all its names are.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from migrator.engine.stream import RecordWriter
from migrator.errors import CheckpointFailed
from migrator.image.records_shared import PLAIN_DEVICES, TmpfsEntry, TmpfsXattr
from migrator.linux.openat2 import open_in_root

MAX_FILES = 10_000  # each is held open while its container moves
_LABELS = frozenset({"security.selinux", "security.ima", "security.evm"})  # are the host's to give
_KINDS = frozenset({stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK})


@dataclass(slots=True, frozen=True)
class Entry:
    """A name in a tmpfs; `folder` is a descriptor of the directory that it is in, valid during the walk only."""

    mount: str
    path: str
    status: os.stat_result
    folder: int
    name: str

    @property
    def regular(self) -> bool:
        return stat.S_ISREG(self.status.st_mode)

    @property
    def key(self) -> tuple[int, int]:
        return self.status.st_dev, self.status.st_ino

    def open(self) -> int:
        """A descriptor of ours, of a regular file."""
        return os.open(self.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.folder)

    def __str__(self) -> str:
        return os.path.normpath(f"{self.mount}/{self.path}")


class OwnTmpfs:
    """The tmpfs mounts at `mounts`, as the process `pid` sees them."""

    def __init__(self, pid: int, mounts: Sequence[str]) -> None:
        self._mounts: list[tuple[str, int]] = []
        self.devices: dict[int, str] = {}  # st_dev -> mount
        if not mounts:
            return
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for mount in mounts:
                fd = open_in_root(root, mount, os.O_RDONLY | os.O_DIRECTORY, links=False)
                self._mounts.append((mount, fd))
            self.devices = {os.fstat(fd).st_dev: mount for mount, fd in self._mounts}
        except BaseException:
            self.close()
            raise
        finally:
            os.close(root)

    def close(self) -> None:
        for _, fd in self._mounts:
            os.close(fd)
        self._mounts.clear()

    def walk(self) -> Iterator[Entry]:
        """Every name, a directory ahead of what is in it; what comes and goes meanwhile may be missed."""
        for mount, fd in self._mounts:
            status = os.fstat(fd)
            yield Entry(mount, ".", status, fd, ".")
            yield from _walk(mount, "", fd, status.st_dev)

    def obstacles(self) -> Iterator[str]:
        """Why one of them cannot be carried, one sentence each."""
        files = 0
        for entry in self.walk():
            files += entry.regular
            mode = entry.status.st_mode
            if stat.S_IFMT(mode) not in _KINDS and not _plain(entry.status):
                yield f"{entry} is a device in a tmpfs, which cannot be carried"
        if files > MAX_FILES:
            yield f"{files} files lie in tmpfs, {MAX_FILES} can be carried; keep them in a file system of the hosts"

    def save(self, writer: RecordWriter, objref_of: Callable[[tuple[int, int]], int]) -> None:
        """Write the names, as they are now; `objref_of` an inode is that of its SharedFile, 0 if it has none. Raises
        CheckpointFailed for what obstacles() would have told."""
        for entry in self.walk():
            status = entry.status
            if stat.S_IFMT(status.st_mode) not in _KINDS and not _plain(status):
                raise CheckpointFailed(f"{entry} is a device in a tmpfs, which cannot be carried")
            target = os.readlink(entry.name, dir_fd=entry.folder) if stat.S_ISLNK(status.st_mode) else ""
            writer.write(
                TmpfsEntry(
                    shared_objref=objref_of(entry.key) if entry.regular else 0,
                    mode=status.st_mode,
                    uid=status.st_uid,
                    gid=status.st_gid,
                    rdev=status.st_rdev,
                    mtime=status.st_mtime_ns,
                    mount=entry.mount,
                    path=entry.path,
                    target=target,
                )
            )
            for name, value in _xattrs(entry):
                writer.write(TmpfsXattr(0, 0, entry.mount, entry.path, name, value))


def _walk(mount: str, prefix: str, fd: int, device: int) -> Iterator[Entry]:
    for name in sorted(os.listdir(fd)):
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if status.st_dev != device:  # something else is mounted there
                continue
            yield Entry(mount, prefix + name, status, fd, name)
            if stat.S_ISDIR(status.st_mode):
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                try:
                    yield from _walk(mount, f"{prefix}{name}/", below, device)
                finally:
                    os.close(below)


def _plain(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev in PLAIN_DEVICES


def _xattrs(entry: Entry) -> Iterator[tuple[str, bytes]]:
    path = f"/proc/self/fd/{entry.folder}/{entry.name}"
    for name in os.listxattr(path, follow_symlinks=False):
        if name not in _LABELS:
            yield name, os.getxattr(path, name, follow_symlinks=False)
