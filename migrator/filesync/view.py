"""A tree as its source sees it: its directories, opened safely, and what has changed in it.

What changed is told by the kernel (`migrator.linux.fanotify`); where that cannot be had, by looking at everything.
Paths are never followed: directories are opened by handle, or below the top without links (openat2(2)).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from migrator.filesync.attributes import WORK, carried
from migrator.filesync.content import facts_of, inode_of
from migrator.filesync.files import FileError
from migrator.filesync.model import Inode, Model, Node
from migrator.linux import fanotify
from migrator.linux.openat2 import open_beneath
from migrator.protocol.messages import SyncTree

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE, errno.ENXIO)
_WRITTEN = fanotify.FAN_MODIFY | fanotify.FAN_CREATE


@dataclass(frozen=True)
class Mapped:
    """Inode numbers of files that tasks have mapped: those may stand mapped on the destination too, and must stay
    the same file there. What is written to through a mapping, the kernel tells nobody."""

    any: Collection[int] = frozenset()
    written: Collection[int] = frozenset()


class TreeView:
    """One tree. `top_fd` is its directory, opened for reading, and closed with this object.

    watched:  whether to have the kernel tell what changes from now on
    tell:     called with bytes of files as they are put into messages
    """

    def __init__(
        self,
        number: int,
        tree: SyncTree,
        top_fd: int,
        *,
        watched: bool = True,
        tell: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.number = number
        self.tree = tree
        self._top_fd = top_fd
        self._tell = tell
        self._watch: fanotify.FileSystemWatch | None = None
        self.refusal = ""
        if watched:
            try:
                self._watch = fanotify.FileSystemWatch(top_fd)
            except OSError as error:
                self.refusal = error.strerror or str(error)
        self._dirty: dict[Node, dict[bytes, bool]] = {}
        self._unlisted: set[Node] = set()
        self._written: dict[tuple[Node, bytes], bytes] = {}
        self._shared: set[Inode] = set()  # with names outside of the tree
        self._top_touched = True
        status = os.fstat(top_fd)
        self.model = Model(inode_of(status))
        self._know(self.model.top, top_fd)

    @property
    def watching(self) -> bool:
        """Whether the kernel tells; if not, `refusal` says why."""
        return self._watch is not None

    # What has changed

    def _drain(self) -> None:
        """Mark what the kernel says has changed; or find out."""
        if self._watch is None:
            self._walk()
            return
        for change in self._watch.changes():
            if change.mask & fanotify.FAN_Q_OVERFLOW:
                self._walk()
            if not change.directory and change.file:
                # It has one name more or less, and may have been changed by one that we never saw.
                self._mark_handle(change.file)
            node = self.model.handles.get(change.directory)
            if node is None:
                continue  # not below our top; or so new that whoever meets it looks into it anyway
            if change.name == b".":
                if node.parent is not None:
                    self._mark(node.parent, node.name, suspect=False)
                else:
                    self._top_touched = True
            elif node is not self.model.top or self._ours(change.name):
                self._mark(node, change.name, suspect=bool(change.mask & _WRITTEN))
                if change.mask & fanotify.FAN_MODIFY and change.file:
                    self._written[node, change.name] = change.file

    def _ours(self, name: bytes) -> bool:
        return name == self.tree.only if self.tree.only else not name.startswith(WORK)

    def _walk(self) -> None:
        """Mark what is not as the model has it, by looking at everything."""
        for node in list(self.model.directories()):
            with self._opened(node) as fd:
                if fd is None:
                    continue  # its own name is marked
                if node is self.model.top:
                    self._top_touched |= facts_of(os.fstat(fd)) != node.inode.facts
                names = set(self._names(node, fd))
                for name in names | (node.children or {}).keys():
                    child = node.child(name)
                    if child is not None and child.mount:
                        continue
                    status = lstat(fd, name)
                    if child is None:
                        if status is not None and carried(status.st_mode):
                            self._mark(node, name)
                    elif (
                        status is None
                        or (status.st_dev, status.st_ino) != child.inode.key
                        or status.st_ctime_ns != child.inode.changed
                        or facts_of(status) != child.inode.facts
                        or child.inode.fresh
                    ):
                        self._mark(node, name)

    def _mark(self, parent: Node, name: bytes, *, suspect: bool = True) -> None:
        names = self._dirty.setdefault(parent, {})
        names[name] = names.get(name, False) or suspect

    def _suspect(self, mapped: Mapped) -> None:
        """Mark what changes without being seen: written to through mappings, or by names outside of the tree."""
        device = self.model.top.inode.key[0]
        for number in mapped.written:
            inode = self.model.inodes.get((device, number))
            if inode is not None and inode.names and not inode.directory:
                self._mark_inode(inode)
        for inode in list(self._shared):
            if inode.links <= len(inode.names) or not inode.names:
                self._shared.discard(inode)
                continue
            node = inode.names[0]
            status = self._status(node)
            if status is None or status.st_ctime_ns != inode.changed or inode.fresh:
                self._mark_inode(inode)

    def _mark_inode(self, inode: Inode) -> None:
        node = inode.names[0]
        if node.parent is not None:
            self._mark(node.parent, node.name)

    def _mark_handle(self, handle: bytes) -> None:
        try:
            fd = fanotify.open_handle(self._top_fd, handle, os.O_PATH)
        except OSError:
            return
        status = os.fstat(fd)
        os.close(fd)
        inode = self.model.inodes.get((status.st_dev, status.st_ino))
        if inode is not None and inode.names:
            for node in inode.names:
                if node.parent is not None:
                    self._mark(node.parent, node.name)

    def _added(self, node: Node) -> None:
        if not node.inode.directory and node.inode.links > len(node.inode.names):
            self._shared.add(node.inode)

    # Places

    def _names(self, node: Node, fd: int) -> list[bytes]:
        names = sorted(os.fsencode(name) for name in os.listdir(fd))
        if node is self.model.top:
            if self.tree.only:
                return [self.tree.only] if self.tree.only in names else []
            return [name for name in names if not name.startswith(WORK)]
        return names

    def _is_mount(self, fd: int, name: bytes) -> bool:
        try:
            os.close(open_beneath(fd, name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW))
        except OSError as error:
            return error.errno == errno.EXDEV
        return False

    @contextlib.contextmanager
    def _opened(self, node: Node) -> Iterator[int | None]:
        """The directory of that node, opened for reading; None if it is gone."""
        if node is self.model.top:
            yield self._top_fd
            return
        fd = None
        try:
            if node.handle:
                fd = fanotify.open_handle(self._top_fd, node.handle, DIRECTORY)
            elif self.model.attached(node):
                fd = open_beneath(self._top_fd, node.path, DIRECTORY)
        except OSError as error:
            if error.errno not in (*GONE, errno.EXDEV):
                raise self._failed(node.path, error) from error
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)

    def _know(self, node: Node, fd: int) -> None:
        if self._watch is not None:
            self.model.watch(node, fanotify.handle_of(fd))

    def _holds(self, node: Node) -> bool:
        status = self._status(node)
        return status is not None and (status.st_dev, status.st_ino) == node.inode.key

    def _status(self, node: Node) -> os.stat_result | None:
        assert node.parent is not None
        return self._status_in(node.parent, node.name)

    def _status_in(self, parent: Node, name: bytes) -> os.stat_result | None:
        with self._opened(parent) as fd:
            return lstat(fd, name) if fd is not None else None

    def shown(self, path: bytes) -> str:
        """A path as the workload sees it, for people."""
        return os.path.join(self.tree.path, path.decode(errors="backslashreplace"))

    def _failed(self, path: bytes, error: OSError) -> FileError:
        return FileError(f"{self.shown(path)} cannot be copied: {os.strerror(error.errno or 0)}")

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._top_fd >= 0:
            os.close(self._top_fd)
            self._top_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def lstat(fd: int, name: bytes) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except OSError as error:
        if error.errno in GONE:
            return None
        raise
