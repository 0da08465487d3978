"""Comparing lists of the source with what the destination has. Only reads."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from migrator.filesync.attributes import carried
from migrator.filesync.paths import WORK, check, shown
from migrator.filesync.top import TreeTop
from migrator.linux.openat2 import open_beneath
from migrator.protocol.trees import Entry, TreeAnswer, TreeList
from migrator.protocol.wire import LISTED, MessageError

_SHARED_NS = 60 * 10**9  # how long ago the source may have looked
_INODE = (1 << 63) - 1


class TreeComparison:
    """One tree. Keeps nothing that grows with it: a list is compared with the one directory that it is about."""

    def __init__(self, top: TreeTop) -> None:
        self._top = top
        self._names: tuple[bytes, list[bytes]] | None = None  # of the directory that was listed last

    @property
    def shared(self) -> bool:
        """Whether this seems to be the very directory that the source sees, as on shared storage."""
        try:
            self._top.open()
            status = os.fstat(self._top.fd)
        except OSError:
            return False
        tree = self._top.tree
        since = status.st_ctime_ns - tree.changed_ns
        return status.st_ino & _INODE == tree.inode and 0 <= since < _SHARED_NS

    def compare(self, listed: TreeList) -> list[TreeAnswer]:
        """What is not the same here. Raises MessageError for what no source would ask, FileError."""
        check(listed.directory)
        names = [entry.path for entry in listed.entries]
        for name in names:
            check(name, component=True)
        if sorted(set(names)) != names or (names and names[0] <= listed.after != b""):
            raise MessageError(f"{shown(listed.directory)}: a list out of order")
        differing, surplus = list(range(len(names))), []
        try:
            with self._opened(listed.directory) as fd:
                if fd is not None:
                    differing = [n for n, entry in enumerate(listed.entries) if self._differs(fd, entry)]
                    upto = None if listed.last else (names[-1] if names else b"")
                    surplus = self._surplus(listed.directory, fd, set(names), listed.after, upto)
        except OSError as error:
            raise self._top.failed(listed.directory, error, "read") from error
        if self._top.only:
            surplus = []
        parts = [surplus[at : at + LISTED] for at in range(0, len(surplus), LISTED)] or [[]]
        return [
            TreeAnswer(listed.number, differing if n == 0 else [], part, n == len(parts) - 1)
            for n, part in enumerate(parts)
        ]

    @contextlib.contextmanager
    def _opened(self, directory: bytes) -> Iterator[int | None]:
        """The directory of that path, opened; None if there is none here."""
        fd = None
        try:
            self._top.open()
            fd = open_beneath(self._top.fd, directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)

    def _surplus(self, directory: bytes, fd: int, there: set[bytes], after: bytes, upto: bytes | None) -> list[bytes]:
        if self._names is None or self._names[0] != directory:
            self._names = (directory, sorted(os.fsencode(name) for name in os.listdir(fd)))
        return [
            name
            for name in self._names[1]
            if name > after
            and (upto is None or name <= upto)
            and name not in there
            and not (not directory and name.startswith(WORK))
        ]

    def _differs(self, fd: int, entry: Entry) -> bool:
        try:
            status = os.stat(entry.path, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return carried(entry.mode)
        if not carried(entry.mode):
            return False
        if stat.S_IFMT(status.st_mode) != stat.S_IFMT(entry.mode):
            return True
        if entry.mount:
            return False
        if (status.st_uid, status.st_gid) != (entry.uid, entry.gid):
            return True
        if stat.S_ISLNK(entry.mode):
            return os.readlink(entry.path, dir_fd=fd) != entry.target
        if status.st_mode != entry.mode:
            return True
        if stat.S_ISREG(entry.mode) and (status.st_size, status.st_mtime_ns) != (entry.size, entry.mtime_ns):
            return True
        return bool(entry.link) and not self._joined(status, entry.link)

    def _joined(self, status: os.stat_result, link: bytes) -> bool:
        check(link)
        try:
            fd = open_beneath(self._top.fd, link, os.O_PATH | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            return os.path.samestat(os.fstat(fd), status)
        finally:
            os.close(fd)
