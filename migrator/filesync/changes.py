"""The names of a tree under which something has changed.

The kernel tells them (`migrator.linux.fanotify`); where it does not, they are found by looking at everything.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass

from migrator.filesync.attributes import carried
from migrator.filesync.content import facts_of
from migrator.filesync.model import Inode, Node
from migrator.filesync.paths import lstat
from migrator.filesync.view import TreeView
from migrator.linux import fanotify

_WRITTEN = fanotify.FAN_MODIFY | fanotify.FAN_CREATE


@dataclass(frozen=True)
class Mapped:
    """Inode numbers of files that tasks have mapped: those may stand mapped on the destination too, and must stay
    the same file there. What is written to through a mapping, the kernel tells nobody."""

    any: Collection[int] = frozenset()
    written: Collection[int] = frozenset()


class Changes:
    """What is to be looked at in the next pass.

    top_touched:  whether the top itself has other attributes
    """

    def __init__(self, view: TreeView) -> None:
        self._view = view
        self._model = view.model
        self._dirty: dict[Node, dict[bytes, bool]] = {}
        self._unlisted: set[Node] = set()
        self._written: dict[tuple[Node, bytes], bytes] = {}
        self._shared: set[Inode] = set()  # with names outside of the tree
        self.top_touched = True

    def find(self, mapped: Mapped) -> None:
        """Mark all that has changed since the last time."""
        self._drain()
        self._suspect(mapped)

    def take(self) -> dict[Node, dict[bytes, bool]]:
        """The marked names of each directory, and whether their content is suspect; none is marked after it."""
        # A file that was written to under a name that is gone may have another.
        for (node, name), handle in self._written.items():
            if self._view.status_in(node, name) is None:
                self._mark_handle(handle)
        self._written = {}
        dirty, self._dirty = self._dirty, {}
        return dirty

    def mark(self, parent: Node, name: bytes, *, suspect: bool = True) -> None:
        """Look at this name. `suspect`: its content may have changed without its times saying so."""
        names = self._dirty.setdefault(parent, {})
        names[name] = names.get(name, False) or suspect

    def mark_unlisted(self, node: Node) -> None:
        """A directory that was renamed while it was to be listed: what is in it is not known."""
        self._unlisted.add(node)
        self.mark(node.parent or node, node.name)

    def unlisted(self, node: Node) -> bool:
        return node in self._unlisted

    def added(self, node: Node) -> None:
        """A name that is new in the model, or whose number of links may have changed."""
        if not node.inode.directory and node.inode.links > len(node.inode.names):
            self._shared.add(node.inode)

    def _drain(self) -> None:
        """Mark what the kernel says has changed; or find out."""
        if self._view.watch is None:
            self._walk()
            return
        for change in self._view.watch.changes():
            if change.mask & fanotify.FAN_Q_OVERFLOW:
                self._walk()
            if not change.directory and change.file:
                # It has one name more or less, and may have been changed by one that we never saw.
                self._mark_handle(change.file)
            node = self._model.handles.get(change.directory)
            if node is None:
                continue  # not below our top; or so new that whoever meets it looks into it anyway
            if change.name == b".":
                if node.parent is not None:
                    self.mark(node.parent, node.name, suspect=False)
                else:
                    self.top_touched = True
            elif node is not self._model.top or self._view.carries(change.name):
                self.mark(node, change.name, suspect=bool(change.mask & _WRITTEN))
                if change.mask & fanotify.FAN_MODIFY and change.file:
                    self._written[node, change.name] = change.file

    def _walk(self) -> None:
        """Mark what is not as the model has it, by looking at everything."""
        for node in list(self._model.directories()):
            with self._view.opened(node) as fd:
                if fd is None:
                    continue  # its own name is marked
                if node is self._model.top:
                    self.top_touched |= facts_of(os.fstat(fd)) != node.inode.facts
                for name in {*self._view.names(node, fd), *(node.children or ())}:
                    self._look(node, fd, name)

    def _look(self, parent: Node, fd: int, name: bytes) -> None:
        child = parent.child(name)
        if child is not None and child.mount:
            return
        status = lstat(fd, name)
        if child is None:
            if status is not None and carried(status.st_mode):
                self.mark(parent, name)
        elif (
            status is None
            or (status.st_dev, status.st_ino) != child.inode.key
            or status.st_ctime_ns != child.inode.changed
            or facts_of(status) != child.inode.facts
            or child.inode.fresh
        ):
            self.mark(parent, name)

    def _suspect(self, mapped: Mapped) -> None:
        """Mark what changes without being seen: written to through mappings, or by names outside of the tree."""
        device = self._model.top.inode.key[0]
        for number in mapped.written:
            inode = self._model.inodes.get((device, number))
            if inode is not None and inode.names and not inode.directory:
                self._mark_inode(inode)
        for inode in list(self._shared):
            if inode.links <= len(inode.names) or not inode.names:
                self._shared.discard(inode)
                continue
            status = self._view.status(inode.names[0])
            if status is None or status.st_ctime_ns != inode.changed or inode.fresh:
                self._mark_inode(inode)

    def _mark_inode(self, inode: Inode) -> None:
        node = inode.names[0]
        if node.parent is not None:
            self.mark(node.parent, node.name)

    def _mark_handle(self, handle: bytes) -> None:
        try:
            fd = fanotify.open_handle(self._view.top_fd, handle, os.O_PATH)
        except OSError:
            return
        status = os.fstat(fd)
        os.close(fd)
        inode = self._model.inodes.get((status.st_dev, status.st_ino))
        if inode is not None:
            for node in inode.names:
                if node.parent is not None:
                    self.mark(node.parent, node.name)
