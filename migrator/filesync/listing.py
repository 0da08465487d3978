"""Comparing a tree with what the destination has: everything is listed once, and it says what differs."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator

from migrator.filesync.attributes import carried
from migrator.filesync.changes import Changes
from migrator.filesync.content import TICK, entry_of, inode_of
from migrator.filesync.difference import FEW, Difference
from migrator.filesync.model import Node
from migrator.filesync.paths import check
from migrator.filesync.view import TreeView
from migrator.protocol.trees import Entry, TreeAnswer, TreeList
from migrator.protocol.wire import MessageError

_LIST = 512  # entries of one list
_MOST_SURPLUS = 1 << 20


class Listing:
    """A tree that is compared.

    difference:  what was found, once all lists are `answered`
    surplus:     paths that only the destination has
    """

    def __init__(self, number: int, view: TreeView, changes: Changes) -> None:
        self._number = number
        self._view = view
        self._model = view.model
        self._changes = changes
        self.difference = Difference()
        if view.refusal:
            self.difference.walked.append(f"{view.tree.path} ({view.refusal})")
        self.surplus: list[bytes] = []
        self._listed: dict[int, tuple[Node, list[Node | None]]] = {}

    def lists(self) -> Iterator[TreeList]:
        """All that is here, directory by directory. Each must be `answered`. Raises FileError."""
        waiting = [self._model.top]
        number = 0
        while waiting:
            node = waiting.pop()
            with self._view.opened(node) as fd:
                if fd is None:  # it was renamed just now
                    self._changes.mark_unlisted(node)
                    continue
                self._view.know(node, fd)
                directory, entries, nodes, after = node.path, list[Entry](), list[Node | None](), b""
                for name in self._view.names(node, fd):
                    if len(entries) >= _LIST:
                        self._listed[number] = (node, nodes)
                        yield TreeList(number, self._number, directory, after, False, entries)
                        number, after, entries, nodes = number + 1, entries[-1].path, [], []
                    made = self._note(node, fd, name)
                    if made is not None:
                        entries.append(made[0])
                        nodes.append(made[1])
                        if made[1] is not None and made[1].children is not None:
                            waiting.append(made[1])
                self._listed[number] = (node, nodes)
                yield TreeList(number, self._number, directory, after, True, entries)
                number += 1

    def _note(self, parent: Node, fd: int, name: bytes) -> tuple[Entry, Node | None] | None:
        """Put a name into the model as if the destination had it, until it says otherwise."""
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            target = os.readlink(name, dir_fd=fd) if stat.S_ISLNK(status.st_mode) else b""
        except OSError:
            return None  # just gone
        known = self._model.inodes.get((status.st_dev, status.st_ino))
        directory = stat.S_ISDIR(status.st_mode)
        if not carried(status.st_mode):
            self._skip(parent, name)
            return entry_of(name, status), None
        mount = directory and self._view.is_mount(fd, name)
        if known is not None and known.names and not directory:
            entry = entry_of(name, status, target, link=known.names[0].path)
            return entry, self._model.add(parent, name, known, directory=False)
        inode = inode_of(status, target)
        inode.fresh = max(status.st_mtime_ns, status.st_ctime_ns) > time.time_ns() - TICK
        node = self._model.add(parent, name, inode, directory=directory and not mount)
        node.mount = mount
        self._changes.added(node)
        return entry_of(name, status, target, mount=mount), node

    def answered(self, answer: TreeAnswer) -> None:
        """What the destination says to a list. Raises MessageError for what was not asked."""
        if answer.number not in self._listed:
            raise MessageError("an answer to a list that was not sent")
        parent, nodes = self._listed[answer.number]
        for index in answer.differing:
            if index >= len(nodes):
                raise MessageError("an answer about more than was listed")
            node = nodes[index]
            if node is None or node.parent is None:
                continue
            self._count(node)
            self._changes.mark(parent, node.name)
            if node.children is None and not node.mount:
                self._model.forget(node)
            else:
                node.there = False
        for name in answer.surplus:
            check(name, component=True)
            if len(self.surplus) >= _MOST_SURPLUS:
                raise MessageError(f"more than {_MOST_SURPLUS} files that are only there")
            path = os.path.join(parent.path, name) if parent.parent is not None else name
            self.surplus.append(path)
            self.difference.surplus += 1
            if len(self.difference.surplus_names) < FEW:
                self.difference.surplus_names.append(self._view.shown(path))
        if answer.last:
            del self._listed[answer.number]

    def force(self, path: str) -> bool:
        """The file at `path`, of the workload's root, has to be sent although it looks the same. False if this tree
        does not have it: it lies elsewhere, or on another mount."""
        tree = self._view.tree
        top = "" if tree.path == "/" else tree.path
        if not path.startswith(top + "/"):
            return False
        names = os.fsencode(path[len(top) + 1 :]).split(b"/")
        if not self._view.carries(names[0]) or (not self._view.whole and len(names) > 1):
            return False
        node: Node | None = self._model.top
        for name in names:
            node = node.child(name) if node is not None else None
            if node is not None and node.mount:
                return False
        if node is None or node.parent is None or node.inode.directory:
            return True  # it is to be sent anyway, or was just renamed or deleted
        self._count(node)
        self._changes.mark(node.parent, node.name)
        return True

    def _count(self, node: Node) -> None:
        found = self.difference
        found.files += 1
        if stat.S_ISREG(node.inode.facts.mode):
            found.bytes += node.inode.facts.size
        if len(found.names) < FEW:
            found.names.append(self._view.shown(node.path))

    def _skip(self, parent: Node, name: bytes) -> None:
        found = self.difference
        found.skipped += 1
        if len(found.skipped_names) < FEW:
            found.skipped_names.append(self._view.shown(os.path.join(parent.path, name)))
