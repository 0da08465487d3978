"""A tree as its source sees it: its directories, opened safely, and the model of what the destination has of it.

Paths are never followed: directories are opened by handle, or below the top without links (openat2(2)).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from migrator.filesync.content import inode_of
from migrator.filesync.model import Model, Node
from migrator.filesync.paths import DIRECTORY, GONE, WORK, FileError, lstat, shown
from migrator.linux import fanotify
from migrator.linux.openat2 import open_beneath
from migrator.protocol.trees import SyncTree


class TreeView:
    """One tree. `top_fd` is its directory, opened for reading, and closed with this object.

    watch:    by which the kernel tells what changes from now on; None where it does not
    refusal:  why it does not, "" if nobody wanted it
    """

    def __init__(self, tree: SyncTree, top_fd: int, *, watched: bool) -> None:
        self.tree = tree
        self.top_fd = top_fd
        self.watch: fanotify.FileSystemWatch | None = None
        self.refusal = ""
        self._only = frozenset(tree.only)
        if watched:
            try:
                self.watch = fanotify.FileSystemWatch(top_fd)
            except OSError as error:
                self.refusal = error.strerror or str(error)
        self.model = Model(inode_of(os.fstat(top_fd)))
        self.know(self.model.top, top_fd)

    def carries(self, name: bytes) -> bool:
        """Whether what has this name at the top belongs to the tree."""
        return name in self._only if self._only else not name.startswith(WORK)

    @property
    def whole(self) -> bool:
        """Whether the top itself is carried, and not only some files in it."""
        return not self._only

    def names(self, node: Node, fd: int) -> list[bytes]:
        """What belongs to the tree in the directory `fd` of that node, sorted. Raises OSError."""
        if node is self.model.top and self._only:
            return [name for name in sorted(self._only) if lstat(fd, name) is not None]
        names = sorted(os.fsencode(name) for name in os.listdir(fd))
        return [name for name in names if self.carries(name)] if node is self.model.top else names

    def is_mount(self, fd: int, name: bytes) -> bool:
        try:
            os.close(open_beneath(fd, name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW))
        except OSError as error:
            return error.errno == errno.EXDEV
        return False

    @contextlib.contextmanager
    def opened(self, node: Node) -> Iterator[int | None]:
        """The directory of that node, opened for reading; None if it is gone. Raises FileError."""
        if node is self.model.top:
            yield self.top_fd
            return
        fd = None
        try:
            if node.handle:
                fd = fanotify.open_handle(self.top_fd, node.handle, DIRECTORY)
            elif self.model.attached(node):
                fd = open_beneath(self.top_fd, node.path, DIRECTORY)
        except OSError as error:
            if error.errno not in (*GONE, errno.EXDEV):
                raise self.failed(node.path, error) from error
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)

    def know(self, node: Node, fd: int) -> None:
        """From now on the kernel's word about this directory is understood."""
        if self.watch is not None:
            self.model.watch(node, fanotify.handle_of(fd))

    def holds(self, node: Node) -> bool:
        """Whether the file of that node still has its name."""
        status = self.status(node)
        return status is not None and (status.st_dev, status.st_ino) == node.inode.key

    def status(self, node: Node) -> os.stat_result | None:
        assert node.parent is not None
        return self.status_in(node.parent, node.name)

    def status_in(self, parent: Node, name: bytes) -> os.stat_result | None:
        with self.opened(parent) as fd:
            return lstat(fd, name) if fd is not None else None

    def shown(self, path: bytes) -> str:
        """A path as the workload sees it, for people."""
        return os.path.join(self.tree.path, shown(path))

    def failed(self, path: bytes, error: OSError) -> FileError:
        return FileError(f"{self.shown(path)} cannot be copied: {os.strerror(error.errno or 0)}")

    def close(self) -> None:
        if self.watch is not None:
            self.watch.close()
        if self.top_fd >= 0:
            os.close(self.top_fd)
            self.top_fd = -1
