"""One pass over what has changed in a tree: names are put to where they are on the source.

A file that has another name by now is moved aside first, so that its old place is free for what is there, and
moved back under its new name. What was seen too early or too late is in the next pass.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Generator, Iterator

from migrator.filesync.attributes import carried
from migrator.filesync.changes import Changes, Mapped
from migrator.filesync.content import entry_of, facts_of, inode_of, same_kind
from migrator.filesync.model import Key, Node
from migrator.filesync.operations import Operations
from migrator.filesync.paths import DIRECTORY, GONE, lstat
from migrator.filesync.updates import Seen, Updates
from migrator.filesync.view import TreeView
from migrator.linux import fanotify
from migrator.linux.openat2 import open_beneath
from migrator.protocol.trees import Drop, Join, MoveAside, MoveBack, Put, Remove, TreeOps


class TreePass:
    """See above; `run()` once."""

    def __init__(self, view: TreeView, changes: Changes, operations: Operations, mapped: Mapped) -> None:
        self._view = view
        self._model = view.model
        self._changes = changes
        self._operations = operations
        self._do = operations.do
        self._updates = Updates(view, changes, operations, mapped)
        self._touched = self._updates.touched
        self._seen: dict[Node, dict[bytes, Seen]] = {}  # and not done yet
        self._aside: dict[Key, tuple[int, Node]] = {}
        self._gone: list[tuple[Node, bytes, Node]] = []  # names that are to be removed
        self._later: list[tuple[Node, bytes, Seen]] = []  # names of files that are in what is aside

    def run(self) -> Iterator[TreeOps]:
        """Everything that is marked. Raises FileError for what cannot be read; the model is of no use then."""
        for node, names in self._changes.take().items():
            with self._view.opened(node) as fd:
                self._seen[node] = {name: self._see(fd, name, suspect) for name, suspect in names.items()}
        yield from self._move_aside()
        if self._changes.top_touched:
            self._touched[self._model.top] = None
            self._changes.top_touched = False
        yield from self._replay_all()
        for number, node in self._aside.values():  # it was somewhere when we looked, and is not any more
            yield from self._do(Drop(number))
            self._model.forget(node)
        self._aside.clear()
        for parent, name, one in self._later:
            self._seen.setdefault(parent, {})[name] = one
        yield from self._replay_all()
        for parent, name, node in self._gone:
            if parent.child(name) is node and self._model.attached(parent):
                yield from self._do(Remove(node.path))
                self._model.forget(node)
        yield from self._updates.directories()
        yield from self._operations.flush()

    def _see(self, fd: int | None, name: bytes, suspect: bool) -> Seen:
        status = lstat(fd, name) if fd is not None else None
        if status is not None and not carried(status.st_mode):
            status = None
        return Seen(status, suspect)

    # Renamed files and directories

    def _move_aside(self) -> Iterator[TreeOps]:
        moved: dict[Key, Node] = {}
        for parent, names in self._seen.items():
            for name, one in names.items():
                node = self._moved(parent, name, one)
                if node is not None:
                    moved[node.inode.key] = node
        for key, node in sorted(moved.items(), key=lambda item: -item[1].depth):
            yield from self._put_aside(key, node)

    def _put_aside(self, key: Key, node: Node) -> Iterator[TreeOps]:
        number = self._operations.next_aside()
        yield from self._do(MoveAside(node.path, number))
        self._model.detach(node)
        self._aside[key] = number, node

    def _moved(self, parent: Node, name: bytes, one: Seen) -> Node | None:
        """The name in the model that has become `name`, if there is one."""
        if one.status is None or one.key is None:
            return None
        inode = self._model.inodes.get(one.key)
        if inode is None or not same_kind(inode, one.status):
            return None
        if any(node.parent is parent and node.name == name for node in inode.names):
            return None
        names = [node for node in inode.names if node.there and self._model.attached(node)]
        if not names or any(self._view.holds(node) for node in names):
            return None
        return names[0] if not inode.directory or self._same_directory(names[0], parent, name) else None

    def _same_directory(self, node: Node, parent: Node, name: bytes) -> bool:
        """An inode number may be used again, a handle is not. Without one we look for no renamed directories, as
        nobody would tell us of what changed in them."""
        if self._view.watch is None or not node.handle:
            return False
        with self._view.opened(parent) as fd:
            if fd is None:
                return False
            try:
                return fanotify.handle_of(fd, name) == node.handle
            except OSError:
                return False

    def _still(self, node: Node, fd: int, name: bytes) -> bool:
        """Whether a directory is the one that it was, and not another with the same inode number."""
        if not node.handle or not node.there:
            return not self._changes.unlisted(node)
        try:
            return fanotify.handle_of(fd, name) == node.handle
        except OSError:  # it was renamed just now: we shall hear of it
            return True

    # Names

    def _replay_all(self) -> Iterator[TreeOps]:
        """Parents before what is in them, which may come with them."""
        while ready := sorted((node for node in self._seen if self._model.attached(node)), key=lambda n: n.depth):
            for node in ready:
                names = self._seen.pop(node)
                if self._model.attached(node):
                    yield from self._replay(node, names)

    def _replay(self, parent: Node, names: dict[bytes, Seen]) -> Iterator[TreeOps]:
        with self._view.opened(parent) as fd:
            if fd is None:
                return
            if facts_of(os.fstat(fd)) != parent.inode.facts:
                self._touched[parent] = None  # also where all names are again what they were
            for name in sorted(names):
                yield from self._place(parent, fd, name, names[name])

    def _place(self, parent: Node, fd: int, name: bytes, one: Seen) -> Iterator[TreeOps]:
        """Make `name` there what it is here."""
        node = parent.child(name)
        status, key = one.status, one.key
        if node is not None and node.mount:
            yield from self._mount(node, status)
        elif status is None or key is None:
            if node is not None and node.there:
                self._gone.append((parent, name, node))  # last: what was in it may have gone elsewhere
            elif node is not None:
                self._model.forget(node)
            self._touched[parent] = None
        elif node is not None and self._is_same(node, fd, name, one):
            yield from self._same(parent, node, fd, one)
        else:
            yield from self._replace(parent, fd, name, node, one)

    def _mount(self, node: Node, status: os.stat_result | None) -> Iterator[TreeOps]:
        if not node.there and status is not None:
            yield from self._do(Put(entry_of(node.path, status, mount=True)))
            node.there = True

    def _is_same(self, node: Node, fd: int, name: bytes, one: Seen) -> bool:
        if one.status is None or node.inode.key != one.key or not same_kind(node.inode, one.status):
            return False
        return node.children is None or self._still(node, fd, name)

    def _same(self, parent: Node, node: Node, fd: int, one: Seen) -> Iterator[TreeOps]:
        """The name has the file that it had."""
        assert one.status is not None
        if node.children is None:
            yield from self._updates.update(parent, node, fd, one)
            return
        if not node.there:
            yield from self._do(Put(entry_of(node.path, one.status)))
            node.there = True
        self._touched[node] = None

    def _replace(self, parent: Node, fd: int, name: bytes, node: Node | None, one: Seen) -> Iterator[TreeOps]:
        """The name has another file than before."""
        self._touched[parent] = None
        left = yield from self._give_way(parent, name, node, one)
        node = yield from self._bring(parent, fd, name, one)
        if left and parent.child(name) is None:  # what should replace it is gone as well, or not yet known
            yield from self._do(Remove(os.path.join(parent.path, name)))
        if node is None:
            return
        if node.children is None:
            yield from self._updates.update(parent, node, fd, one)
        else:
            self._touched[node] = None

    def _give_way(self, parent: Node, name: bytes, node: Node | None, one: Seen) -> Generator[TreeOps, None, bool]:
        """Forget what had the name before; whether it is still there."""
        assert one.status is not None
        if node is None:
            return False
        left = node.there
        if node.children is not None and stat.S_ISDIR(one.status.st_mode) and one.key not in self._aside:
            # a directory would take its place with all that is in it
            yield from self._do(Remove(os.path.join(parent.path, name)))
            left = False
        self._model.forget(node)
        return left

    def _bring(self, parent: Node, fd: int, name: bytes, one: Seen) -> Generator[TreeOps, None, Node | None]:
        """Give the name to what has it here: another name's, moved or shared, which is returned; or what is new."""
        status, key, path = one.status, one.key, os.path.join(parent.path, name)
        assert status is not None and key is not None
        node = None
        moved = self._moved(parent, name, one) if key not in self._aside else None
        inside = moved is not None and parent.below(moved)
        if moved is not None and not inside:  # into a directory that is new itself
            yield from self._put_aside(key, moved)
        inode = self._model.inodes.get(key)
        other = next((n for n in inode.names if self._model.attached(n)), None) if inode is not None else None
        if inside:  # a directory in itself: both were moved while we looked. The next pass knows where they are
            self._changes.mark(parent, name)
        elif inode is not None and other is None and inode.names and key not in self._aside:
            self._later.append((parent, name, one))
        elif key in self._aside:
            number, node = self._aside.pop(key)
            yield from self._do(MoveBack(number, path))
            self._model.attach(node, parent, name)
        elif inode is not None and other is not None and not inode.directory and same_kind(inode, status):
            yield from self._do(Join(path, other.path))
            node = self._model.add(parent, name, inode, directory=False)
        elif stat.S_ISDIR(status.st_mode):
            yield from self._new_directory(parent, fd, name, status)
        else:
            yield from self._updates.new(parent, fd, name, status)
        return node

    def _new_directory(self, parent: Node, fd: int, name: bytes, status: os.stat_result) -> Iterator[TreeOps]:
        path = os.path.join(parent.path, name)
        if self._view.is_mount(fd, name):
            node = self._model.add(parent, name, inode_of(status), directory=False)
            node.mount = True
            yield from self._do(Put(entry_of(path, status, mount=True)))
            return
        try:
            inner = open_beneath(fd, name, DIRECTORY)
        except OSError as error:
            if error.errno in GONE:  # we shall hear of it
                return
            raise self._view.failed(path, error) from error
        try:
            if os.path.samestat(os.fstat(inner), status):
                node = self._model.add(parent, name, inode_of(status), directory=True)
                self._view.know(node, inner)  # before the names are read: from now on we are told
                self._seen[node] = {n: self._see(inner, n, True) for n in self._view.names(node, inner)}
                self._touched[node] = None
                yield from self._do(Put(entry_of(path, status)))
        finally:
            os.close(inner)
