"""What is sent about one name of a tree: its file, or what of it has changed."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass

from migrator.filesync.attributes import xattrs_of
from migrator.filesync.changes import Changes, Mapped
from migrator.filesync.content import SMALL, TICK, entry_of, facts_of, inode_of, large, small
from migrator.filesync.model import Inode, Key, Node
from migrator.filesync.operations import Operations
from migrator.filesync.paths import GONE
from migrator.filesync.view import TreeView
from migrator.linux.openat2 import open_beneath
from migrator.protocol.trees import Put, Touch, TreeOps

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME


@dataclass(slots=True)
class Seen:
    """What is under a name now. `suspect`: its content may have changed without its times saying so."""

    status: os.stat_result | None
    suspect: bool

    @property
    def key(self) -> Key | None:
        return (self.status.st_dev, self.status.st_ino) if self.status is not None else None


class Updates:
    """The files of one pass. `touched` are the directories in which something was done: their times come last."""

    def __init__(self, view: TreeView, changes: Changes, operations: Operations, mapped: Mapped) -> None:
        self._view = view
        self._changes = changes
        self._do = operations.do
        self._mapped = mapped
        self.touched: dict[Node, None] = {}

    def new(self, parent: Node, fd: int, name: bytes, status: os.stat_result) -> Iterator[TreeOps]:
        """A file that the destination does not have. Without any effect if it is gone."""
        path = os.path.join(parent.path, name)
        inode = inode_of(status)
        if stat.S_ISREG(status.st_mode):
            yield from self._content(path, inode, fd, name, new=True)
            if not inode.blocks:
                return
        else:
            if stat.S_ISLNK(status.st_mode):
                inode.target = _readlink(fd, name)
                if not inode.target:
                    return
            yield from self._do(Put(entry_of(path, status, inode.target)))
        self._changes.added(self._view.model.add(parent, name, inode, directory=False))

    def update(self, parent: Node, node: Node, fd: int, one: Seen) -> Iterator[TreeOps]:
        """The file is there under that name; its content or what else lstat(2) shows may have changed."""
        status, inode = one.status, node.inode
        assert status is not None
        inode.links = status.st_nlink
        self._changes.added(node)
        facts = facts_of(status)
        regular = stat.S_ISREG(status.st_mode)
        same = facts[1:3] == inode.facts[1:3] and not one.suspect and not inode.fresh
        target = _readlink(fd, node.name) if stat.S_ISLNK(status.st_mode) else b""
        if target and target != inode.target:
            inode.target, inode.facts, inode.changed = target, facts, status.st_ctime_ns
            self.touched[parent] = None
            yield from self._do(Put(entry_of(node.path, status, target)))
        elif regular and not same:
            self.touched[parent] = None  # it may be replaced there
            yield from self._content(node.path, inode, fd, node.name)
        elif facts != inode.facts or status.st_ctime_ns != inode.changed:
            xattrs = _xattrs(fd, node.name) if regular else {}
            yield from self._do(Touch(entry_of(node.path, status, inode.target, xattrs=xattrs)))
            inode.facts, inode.changed = facts, status.st_ctime_ns

    def directories(self) -> Iterator[TreeOps]:
        """The attributes of the directories that were touched."""
        for node in self.touched:
            yield from self._directory(node)

    def _directory(self, node: Node) -> Iterator[TreeOps]:
        view = self._view
        if not view.model.attached(node) or not node.there or (node is view.model.top and not view.whole):
            return
        with view.opened(node) as fd:
            if fd is None:
                return
            status = os.fstat(fd)
            yield from self._do(Touch(entry_of(node.path, status, xattrs=xattrs_of(fd))))
        node.inode.facts, node.inode.changed = facts_of(status), status.st_ctime_ns

    def _content(self, path: bytes, inode: Inode, fd: int, name: bytes, *, new: bool = False) -> Iterator[TreeOps]:
        """Send a regular file: whole, or in place what has changed of it. Without any effect if it is gone."""
        try:
            file = open_beneath(fd, name, _READ)
        except OSError as error:
            if error.errno in GONE or error.errno == errno.EXDEV:  # a mount point: not what is below it
                return
            raise self._view.failed(path, error) from error
        try:
            status, began = os.fstat(file), time.time_ns()
            if not stat.S_ISREG(status.st_mode) or (status.st_dev, status.st_ino) != inode.key:
                return
            keep = not new and (inode.key[1] in self._mapped.any or len(inode.names) > 1)
            entry = entry_of(path, status, xattrs=xattrs_of(file))
            if status.st_size <= SMALL:
                ops = small(entry, inode, file, keep=keep, new=new)
            else:
                ops = large(entry, inode, file, in_place=not new and (keep or bool(inode.blocks)))
            for op in ops:
                yield from self._do(op)
        except OSError as error:
            raise self._view.failed(path, error) from error
        finally:
            os.close(file)
        inode.facts, inode.changed, inode.links = facts_of(status), status.st_ctime_ns, status.st_nlink
        inode.fresh = max(status.st_mtime_ns, status.st_ctime_ns) > began - TICK


def _xattrs(fd: int, name: bytes) -> dict[str, bytes]:
    try:
        file = open_beneath(fd, name, _READ)
    except OSError:
        return {}
    try:
        return xattrs_of(file)
    finally:
        os.close(file)


def _readlink(fd: int, name: bytes) -> bytes:
    """What a symbolic link says; b"" if it is none any more."""
    try:
        return os.readlink(name, dir_fd=fd)
    except OSError:
        return b""
