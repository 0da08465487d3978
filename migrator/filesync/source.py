"""The source's side of a tree that is carried along: what the destination has to do to have the same.

    with TreeSource(number, tree, top_fd, watched=True) as source:
        for listed in source.listing():              # everything, once: the destination says what differs
            source.answered(listed, answer)
        for ops in source.changes(mapped): ...       # a pass: all that has changed since the last one
        for ops in source.changes(mapped): ...       # with the workload frozen: then both sides are the same

What changed is told by the kernel (`migrator.linux.fanotify`), so that a pass takes as long as there is
change; where that cannot be had, by looking at everything. The workload may do to its files what it likes
meanwhile: `model` is always what the destination has after the operations so far, and whatever a pass saw too
early or too late is in the next one. Paths are never followed: directories are opened by handle, or below the
top without links (openat2(2)).
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

from migrator.filesync.attributes import carried, xattrs_of
from migrator.filesync.content import SMALL, TICK, entry_of, facts_of, inode_of, large, path_of, same_kind, small
from migrator.filesync.listing import TreeListing
from migrator.filesync.model import Inode, Key, Node
from migrator.filesync.view import DIRECTORY, GONE, Mapped, lstat
from migrator.linux import fanotify
from migrator.linux.openat2 import open_beneath
from migrator.protocol.messages import Drop, Join, Put, Remove, Stash, SyncTree, Touch, TreeOp, TreeOps, Unstash, Write

_BATCH = 512 << 10  # bytes of one message, about
_BATCH_OPS = 1000
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME


@dataclass(slots=True)
class _Seen:
    """What is under a name now. `suspect`: its content may have changed without its times saying so."""

    status: os.stat_result | None
    suspect: bool

    @property
    def key(self) -> Key | None:
        return (self.status.st_dev, self.status.st_ino) if self.status is not None else None


@dataclass(frozen=True, slots=True)
class _Pass:
    """A pass under way: what was seen and has not been done yet, what is kept out of the way, directories whose
    times are to be set, names that are to be removed, and those of files that are inside of what is kept out of
    the way."""

    mapped: Mapped
    seen: dict[Node, dict[bytes, _Seen]]
    limbo: dict[Key, tuple[int, Node]]
    touched: dict[Node, None]
    gone: list[tuple[Node, bytes, Node]] = field(default_factory=list)
    later: list[tuple[Node, bytes, _Seen]] = field(default_factory=list)


class TreeSource(TreeListing):
    """A tree that is carried along: see above."""

    def __init__(
        self,
        number: int,
        tree: SyncTree,
        top_fd: int,
        *,
        watched: bool = True,
        tell: Callable[[int], None] = lambda count: None,
    ) -> None:
        super().__init__(number, tree, top_fd, watched=watched, tell=tell)
        self._stashes = 0
        self._ops: list[TreeOp] = []
        self._size = 0

    def changes(self, mapped: Mapped) -> Iterator[TreeOps]:
        """What to do now: in as many steps as something has changed where the kernel tells it, else in as many as
        there are files. Raises FileError for what cannot be read; the model is of no use then.
        """
        for path in self._surplus:
            yield from self._do(Remove(path, aside=True))
        self._surplus = []
        self._drain()
        self._suspect(mapped)
        seen = self._look()
        limbo = dict[Key, tuple[int, Node]]()
        yield from self._take_out(seen, limbo)
        now = _Pass(mapped, seen, limbo, {self.model.top: None} if self._top_touched else {})
        self._top_touched = False
        yield from self._replay_all(now)
        for number, node in limbo.values():  # it was somewhere when we looked, and is not any more
            yield from self._do(Drop(number))
            self.model.forget(node)
        limbo.clear()
        for parent, name, one in now.later:
            seen.setdefault(parent, {})[name] = one
        yield from self._replay_all(now)
        for parent, name, node in now.gone:
            if parent.child(name) is node and self.model.attached(parent):
                yield from self._do(Remove(node.path))
                self.model.forget(node)
        for node in now.touched:
            yield from self._touch_directory(node)
        yield from self._flush()

    def _look(self) -> dict[Node, dict[bytes, _Seen]]:
        """What is under the marked names now."""
        found: dict[Node, dict[bytes, _Seen]] = {}
        # A file that was written to under a name that is gone may have another.
        for (node, name), handle in self._written.items():
            if self._status_in(node, name) is None:
                self._mark_handle(handle)
        self._written = {}
        dirty, self._dirty = self._dirty, {}
        for node, names in dirty.items():
            with self._opened(node) as fd:
                found[node] = {name: self._see(node, fd, name, suspect) for name, suspect in names.items()}
        return found

    def _see(self, node: Node, fd: int | None, name: bytes, suspect: bool) -> _Seen:
        status = lstat(fd, name) if fd is not None else None
        if status is not None and not carried(status.st_mode):
            status = None
        return _Seen(status, suspect)

    def _take_out(self, seen: dict[Node, dict[bytes, _Seen]], limbo: dict[Key, tuple[int, Node]]) -> Iterator[TreeOps]:
        """Move out of the way what has another name now, so that its old place is free for what is there."""
        moved: dict[Key, Node] = {}
        for parent, names in seen.items():
            for name, one in names.items():
                node = self._moved(parent, name, one)
                if node is not None:
                    moved[node.inode.key] = node
        for key, node in sorted(moved.items(), key=lambda item: -item[1].depth):
            self._stashes += 1
            yield from self._do(Stash(node.path, self._stashes))
            self.model.detach(node)
            limbo[key] = self._stashes, node

    def _moved(self, parent: Node, name: bytes, one: _Seen) -> Node | None:
        """The name in the model that has become `name`, if there is one."""
        if one.status is None or one.key is None:
            return None
        inode = self.model.inodes.get(one.key)
        if inode is None or stat.S_IFMT(inode.facts.mode) != stat.S_IFMT(one.status.st_mode):
            return None
        if any(node.parent is parent and node.name == name for node in inode.names):
            return None
        names = [node for node in inode.names if node.there and self.model.attached(node)]
        if not names or any(self._holds(node) for node in names):
            return None
        return names[0] if not inode.directory or self._same_directory(names[0], parent, name) else None

    def _still(self, node: Node, fd: int, name: bytes) -> bool:
        """Whether a directory is the one that it was, and not another with the same inode number."""
        if not node.handle or not node.there:
            return node not in self._unlisted
        try:
            return fanotify.handle_of(fd, name) == node.handle
        except OSError:  # it was renamed just now: we shall hear of it
            return True

    def _same_directory(self, node: Node, parent: Node, name: bytes) -> bool:
        """An inode number may be used again, a handle is not. Without one we look for no renamed directories, as
        nobody would tell us of what changed in them."""
        if self._watch is None or not node.handle:
            return False
        with self._opened(parent) as fd:
            if fd is None:
                return False
            try:
                return fanotify.handle_of(fd, name) == node.handle
            except OSError:
                return False

    def _replay_all(self, now: _Pass) -> Iterator[TreeOps]:
        """Parents before what is in them, which may come with them."""
        while ready := sorted((node for node in now.seen if self.model.attached(node)), key=lambda node: node.depth):
            for node in ready:
                names = now.seen.pop(node)
                if self.model.attached(node):
                    yield from self._replay(node, names, now)

    def _replay(self, parent: Node, names: dict[bytes, _Seen], now: _Pass) -> Iterator[TreeOps]:
        with self._opened(parent) as fd:
            if fd is None:
                return
            if facts_of(os.fstat(fd)) != parent.inode.facts:
                now.touched[parent] = None  # also where all names are again what they were
            for name in sorted(names):
                yield from self._place(parent, fd, name, names[name], now)

    def _place(self, parent: Node, fd: int, name: bytes, one: _Seen, now: _Pass) -> Iterator[TreeOps]:
        """Make `name` there what it is here."""
        node = parent.child(name)
        status, key = one.status, one.key
        if node is not None and node.mount:
            if not node.there and status is not None:
                yield from self._do(Put(entry_of(node.path, status, mount=True)))
                node.there = True
            return
        if status is None or key is None:
            if node is not None and node.there:
                now.gone.append((parent, name, node))  # last: what was in it may have gone elsewhere
            elif node is not None:
                self.model.forget(node)
            now.touched[parent] = None
            return
        same = node is not None and node.inode.key == key and same_kind(node.inode, status)
        if node is not None and same and (node.children is None or self._still(node, fd, name)):
            if node.children is None:
                yield from self._update(parent, node, fd, one, now)
            else:
                if not node.there:
                    yield from self._do(Put(entry_of(node.path, status)))
                    node.there = True
                now.touched[node] = None
            return
        now.touched[parent] = None
        left = yield from self._give_way(parent, name, node, one, now)
        node = yield from self._bring(parent, fd, name, one, now)
        if left and parent.child(name) is None:  # what should replace it is gone as well, or not yet known
            yield from self._do(Remove(os.path.join(parent.path, name)))
        if node is None:
            return
        if node.children is None:
            yield from self._update(parent, node, fd, one, now)
        else:
            now.touched[node] = None

    def _give_way(
        self, parent: Node, name: bytes, node: Node | None, one: _Seen, now: _Pass
    ) -> Generator[TreeOps, None, bool]:
        """Forget what had the name before; whether it is still there."""
        assert one.status is not None
        if node is None:
            return False
        left = node.there
        if node.children is not None and stat.S_ISDIR(one.status.st_mode) and one.key not in now.limbo:
            # a directory would take its place with all that is in it
            yield from self._do(Remove(os.path.join(parent.path, name)))
            left = False
        self.model.forget(node)
        return left

    def _bring(
        self, parent: Node, fd: int, name: bytes, one: _Seen, now: _Pass
    ) -> Generator[TreeOps, None, Node | None]:
        """Give the name to what has it here: another name's, moved or shared, which is returned; or what is new."""
        status, key, path = one.status, one.key, os.path.join(parent.path, name)
        assert status is not None and key is not None
        node = None
        moved = self._moved(parent, name, one) if key not in now.limbo else None
        inside = moved is not None and parent.below(moved)
        if moved is not None and not inside:  # into a directory that is new itself
            self._stashes += 1
            yield from self._do(Stash(moved.path, self._stashes))
            self.model.detach(moved)
            now.limbo[key] = self._stashes, moved
        inode = self.model.inodes.get(key)
        other = next((n for n in inode.names if self.model.attached(n)), None) if inode is not None else None
        if inside:  # a directory in itself: both were moved while we looked. The next pass knows where they are
            self._mark(parent, name)
        elif inode is not None and other is None and inode.names and key not in now.limbo:
            now.later.append((parent, name, one))
        elif key in now.limbo:
            number, node = now.limbo.pop(key)
            yield from self._do(Unstash(number, path))
            self.model.attach(node, parent, name)
        elif inode is not None and other is not None and not inode.directory and same_kind(inode, status):
            yield from self._do(Join(path, other.path))
            node = self.model.add(parent, name, inode, directory=False)
        elif stat.S_ISDIR(status.st_mode):
            yield from self._new_directory(parent, fd, name, status, now)
        else:
            yield from self._new(parent, fd, name, status, now)
        return node

    def _new_directory(
        self, parent: Node, fd: int, name: bytes, status: os.stat_result, now: _Pass
    ) -> Iterator[TreeOps]:
        path = os.path.join(parent.path, name)
        if self._is_mount(fd, name):
            node = self.model.add(parent, name, inode_of(status), directory=False)
            node.mount = True
            yield from self._do(Put(entry_of(path, status, mount=True)))
            return
        try:
            inner = open_beneath(fd, name, DIRECTORY)
        except OSError as error:
            if error.errno in GONE:  # we shall hear of it
                return
            raise self._failed(path, error) from error
        try:
            if os.path.samestat(os.fstat(inner), status):
                node = self.model.add(parent, name, inode_of(status), directory=True)
                self._know(node, inner)  # before the names are read: from now on we are told
                now.seen[node] = {n: self._see(node, inner, n, True) for n in self._names(node, inner)}
                now.touched[node] = None
                yield from self._do(Put(entry_of(path, status)))
        finally:
            os.close(inner)

    def _new(self, parent: Node, fd: int, name: bytes, status: os.stat_result, now: _Pass) -> Iterator[TreeOps]:
        path = os.path.join(parent.path, name)
        inode = inode_of(status)
        if stat.S_ISREG(status.st_mode):
            yield from self._content(path, inode, fd, name, now, new=True)
            if inode.blocks:
                self._added(self.model.add(parent, name, inode, directory=False))
            return
        if stat.S_ISLNK(status.st_mode):
            inode.target = readlink(fd, name)
            if not inode.target:
                return
        yield from self._do(Put(entry_of(path, status, inode.target)))
        self._added(self.model.add(parent, name, inode, directory=False))

    def _update(self, parent: Node, node: Node, fd: int, one: _Seen, now: _Pass) -> Iterator[TreeOps]:
        """The file is there under that name; its content or what else lstat(2) shows may have changed."""
        status, inode = one.status, node.inode
        assert status is not None
        inode.links = status.st_nlink
        self._added(node)
        facts = facts_of(status)
        regular = stat.S_ISREG(status.st_mode)
        same = facts[1:3] == inode.facts[1:3] and not one.suspect and not inode.fresh
        target = readlink(fd, node.name) if stat.S_ISLNK(status.st_mode) else b""
        if target and target != inode.target:
            inode.target, inode.facts, inode.changed = target, facts, status.st_ctime_ns
            now.touched[parent] = None
            yield from self._do(Put(entry_of(node.path, status, target)))
        elif regular and not same:
            now.touched[parent] = None  # it may be replaced there
            yield from self._content(node.path, inode, fd, node.name, now)
        elif facts != inode.facts or status.st_ctime_ns != inode.changed:
            xattrs = self._xattrs(fd, node.name) if regular else {}
            yield from self._do(Touch(entry_of(node.path, status, inode.target, xattrs=xattrs)))
            inode.facts, inode.changed = facts, status.st_ctime_ns

    def _xattrs(self, fd: int, name: bytes) -> dict[str, bytes]:
        try:
            file = open_beneath(fd, name, _READ)
        except OSError:
            return {}
        try:
            return xattrs_of(file)
        finally:
            os.close(file)

    def _content(
        self, path: bytes, inode: Inode, fd: int, name: bytes, now: _Pass, *, new: bool = False
    ) -> Iterator[TreeOps]:
        """Send a regular file: whole, or in place what has changed of it. Without any effect if it is gone."""
        try:
            file = open_beneath(fd, name, _READ)
        except OSError as error:
            if error.errno in GONE or error.errno == errno.EXDEV:  # a mount point: not what is below it
                return
            raise self._failed(path, error) from error
        try:
            status, began = os.fstat(file), time.time_ns()
            if not stat.S_ISREG(status.st_mode) or (status.st_dev, status.st_ino) != inode.key:
                return
            keep = not new and (inode.key[1] in now.mapped.any or len(inode.names) > 1)
            entry = entry_of(path, status, xattrs=xattrs_of(file))
            if status.st_size <= SMALL:
                ops = small(entry, inode, file, keep=keep, new=new)
            else:
                ops = large(entry, inode, file, in_place=not new and (keep or bool(inode.blocks)))
            for op in ops:
                yield from self._do(op)
        except OSError as error:
            raise self._failed(path, error) from error
        finally:
            os.close(file)
        inode.facts, inode.changed, inode.links = facts_of(status), status.st_ctime_ns, status.st_nlink
        inode.fresh = max(status.st_mtime_ns, status.st_ctime_ns) > began - TICK

    def _touch_directory(self, node: Node) -> Iterator[TreeOps]:
        """Times of directories change with what is done in them, so they come last."""
        if not self.model.attached(node) or not node.there or (self.tree.only and node is self.model.top):
            return
        with self._opened(node) as fd:
            if fd is None:
                return
            status = os.fstat(fd)
            yield from self._do(Touch(entry_of(node.path, status, xattrs=xattrs_of(fd))))
        node.inode.facts, node.inode.changed = facts_of(status), status.st_ctime_ns

    def _do(self, op: TreeOp) -> Iterator[TreeOps]:
        data = len(op.data) if isinstance(op, Put | Write) else 0
        cost = data + (len(path_of(op)) + 100)
        if self._ops and (self._size + cost > _BATCH or len(self._ops) >= _BATCH_OPS):
            yield from self._flush()
        self._ops.append(op)
        self._size += cost
        self._tell(data)

    def _flush(self) -> Iterator[TreeOps]:
        if self._ops:
            ops, self._ops, self._size = self._ops, [], 0
            yield TreeOps(self.number, ops)


def readlink(fd: int, name: bytes) -> bytes:
    """What a symbolic link says; b"" if it is none any more."""
    try:
        return os.readlink(name, dir_fd=fd)
    except OSError:
        return b""
