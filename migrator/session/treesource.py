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

import contextlib
import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from types import TracebackType

from migrator.linux import fanotify
from migrator.linux.openat2 import open_beneath
from migrator.session import preflight
from migrator.session.files import FileError
from migrator.session.messages import (
    FILE_CHUNK,
    Close,
    Drop,
    Entry,
    Join,
    MessageError,
    Open,
    Put,
    Remove,
    Stash,
    Touch,
    Tree,
    TreeAnswer,
    TreeList,
    TreeOp,
    TreeOps,
    Unstash,
    Write,
)
from migrator.session.treemodel import Facts, Inode, Key, Model, Node
from migrator.session.treetarget import WORK, carried, xattrs_of

BLOCK = 64 << 10  # what of a large file is sent again if a byte of it has changed
_SMALL = 128 << 10  # files up to this are always sent whole
_DIGEST = 16  # bytes
_BATCH = 512 << 10  # bytes of one message, about
_BATCH_OPS = 1000
_LIST = 512  # entries of one list
_TICK = 50_000_000  # ns; file times are those of the last tick of the kernel, at most 10 ms old
_MOST_SURPLUS = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME
_CHUNK = 1 << 20
_WRITTEN = fanotify.FAN_MODIFY | fanotify.FAN_CREATE
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE, errno.ENXIO)


@dataclass(frozen=True)
class Mapped:
    """Inode numbers of files that tasks have mapped: those may stand mapped on the destination too, and must stay
    the same file there. What is written to through a mapping, the kernel tells nobody."""

    any: Collection[int] = frozenset()
    written: Collection[int] = frozenset()


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


class TreeSource:
    """One tree. `top_fd` is its directory, opened for reading, and closed with this object.

    watched:  whether to have the kernel tell what changes from now on. `watching` says whether it does.
    tell:     called with bytes of files as they are put into messages
    """

    def __init__(
        self,
        number: int,
        tree: Tree,
        top_fd: int,
        *,
        watched: bool = True,
        tell: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.number = number
        self.tree = tree
        self.difference = preflight.Difference()
        self._top_fd = top_fd
        self._tell = tell
        self.sent = 0  # bytes of files, in the last pass
        self._watch: fanotify.FileSystemWatch | None = None
        self._refusal = ""
        if watched:
            try:
                self._watch = fanotify.FileSystemWatch(top_fd)
            except OSError as error:
                self._refusal = error.args[-1]
        self._surplus: list[bytes] = []  # only on the destination
        self._dirty: dict[Node, dict[bytes, bool]] = {}
        self._unlisted: set[Node] = set()
        self._written: dict[tuple[Node, bytes], bytes] = {}
        self._shared: set[Inode] = set()  # with names outside of the tree
        self._listed: dict[int, tuple[Node, list[Node | None]]] = {}
        self._stashes = 0
        self._top_touched = True
        status = os.fstat(top_fd)
        self.model = Model(_inode(status))
        self._know(self.model.top, top_fd)
        self._ops: list[TreeOp] = []
        self._size = 0

    @property
    def watching(self) -> bool:
        return self._watch is not None

    # Comparing

    def listing(self) -> Iterator[TreeList]:
        """All that is here, directory by directory. Each must be `answered`."""
        waiting = [self.model.top]
        number = 0
        while waiting:
            node = waiting.pop()
            with self._opened(node) as fd:
                if fd is None:  # it was renamed just now: what it has there is not known
                    self._unlisted.add(node)
                    self._mark(node.parent or node, node.name)
                    continue
                self._know(node, fd)
                directory, entries, nodes, after = node.path, list[Entry](), list[Node | None](), b""
                for name in self._names(node, fd):
                    if len(entries) >= _LIST:
                        yield self._list(number, directory, node, entries, nodes, after, False)
                        number, after, entries, nodes = number + 1, entries[-1].path, [], []
                    made = self._note(node, fd, name)
                    if made is not None:
                        entries.append(made[0])
                        nodes.append(made[1])
                        if made[1] is not None and made[1].children is not None:
                            waiting.append(made[1])
                yield self._list(number, directory, node, entries, nodes, after, True)
                number += 1

    def _list(
        self,
        number: int,
        directory: bytes,
        node: Node,
        entries: list[Entry],
        nodes: list[Node | None],
        after: bytes,
        last: bool,
    ) -> TreeList:
        self._listed[number] = (node, nodes)
        return TreeList(number, self.number, directory, after, last, entries)

    def _names(self, node: Node, fd: int) -> list[bytes]:
        names = sorted(os.fsencode(name) for name in os.listdir(fd))
        if node is self.model.top:
            if self.tree.only:
                return [self.tree.only] if self.tree.only in names else []
            return [name for name in names if not name.startswith(WORK)]
        return names

    def _note(self, parent: Node, fd: int, name: bytes) -> tuple[Entry, Node | None] | None:
        """Put a name into the model as if the destination had it, until it says otherwise."""
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            target = os.readlink(name, dir_fd=fd) if stat.S_ISLNK(status.st_mode) else b""
        except OSError:
            return None  # just gone
        known = self.model.inodes.get((status.st_dev, status.st_ino))
        directory = stat.S_ISDIR(status.st_mode)
        if not carried(status.st_mode):
            self._skip(parent, name)
            return _entry(name, status), None
        mount = directory and self._is_mount(fd, name)
        if known is not None and known.names and not directory:
            entry = _entry(name, status, target, link=known.names[0].path)
            return entry, self.model.add(parent, name, known, directory=False)
        inode = _inode(status, target)
        inode.fresh = max(status.st_mtime_ns, status.st_ctime_ns) > time.time_ns() - _TICK
        node = self.model.add(parent, name, inode, directory=directory and not mount)
        node.mount = mount
        self._added(node)
        return _entry(name, status, target, mount=mount), node

    def _is_mount(self, fd: int, name: bytes) -> bool:
        try:
            os.close(open_beneath(fd, name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW))
        except OSError as error:
            return error.errno == errno.EXDEV
        return False

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
            self._mark(parent, node.name)
            if node.children is None and not node.mount:
                self.model.forget(node)
            else:
                node.there = False
        for name in answer.surplus:
            path = os.path.join(parent.path, name) if parent.parent is not None else name
            if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
                raise MessageError(f"not a name: {name!r}")
            if len(self._surplus) >= _MOST_SURPLUS:
                raise MessageError(f"more than {_MOST_SURPLUS} files that are only there")
            self._surplus.append(path)
            self.difference.surplus += 1
            if len(self.difference.surplus_names) < preflight.FEW:
                self.difference.surplus_names.append(self.shown(path))
        if answer.last:
            del self._listed[answer.number]

    def _count(self, node: Node) -> None:
        found = self.difference
        found.files += 1
        if stat.S_ISREG(node.inode.facts.mode):
            found.bytes += node.inode.facts.size
        if len(found.names) < preflight.FEW:
            found.names.append(self.shown(node.path))

    def _skip(self, parent: Node, name: bytes) -> None:
        found = self.difference
        found.skipped += 1
        if len(found.skipped_names) < preflight.FEW:
            found.skipped_names.append(self.shown(os.path.join(parent.path, name)))

    def force(self, path: str) -> bool:
        """The file at `path`, of the workload's root, has to be sent although it looks the same: True if it is one
        of this tree."""
        top = "" if self.tree.path == "/" else self.tree.path
        if not path.startswith(top + "/"):
            return False
        inner = os.fsencode(path[len(top) + 1 :])
        parent = self.model.find(os.path.dirname(inner))
        name = os.path.basename(inner)
        if parent is None or parent.children is None or (self.tree.only and inner != self.tree.only):
            return False
        node = parent.child(name)
        if node is None:
            return name in self._dirty.get(parent, {})
        if node.inode.directory:
            return False
        self._count(node)
        self._mark(parent, name)
        return True

    # Passes

    def changes(self, mapped: Mapped) -> Iterator[TreeOps]:
        """What to do now: in as many steps as something has changed where the kernel tells it, else in as many as
        there are files. Raises FileError for what cannot be read; the model is of no use then.
        """
        self.sent = 0
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
                    self._top_touched |= _facts(os.fstat(fd)) != node.inode.facts
                names = set(self._names(node, fd))
                for name in names | (node.children or {}).keys():
                    child = node.child(name)
                    if child is not None and child.mount:
                        continue
                    status = _lstat(fd, name)
                    if child is None:
                        if status is not None and carried(status.st_mode):
                            self._mark(node, name)
                    elif (
                        status is None
                        or (status.st_dev, status.st_ino) != child.inode.key
                        or status.st_ctime_ns != child.inode.changed
                        or _facts(status) != child.inode.facts
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
        status = _lstat(fd, name) if fd is not None else None
        if status is not None and not carried(status.st_mode):
            status = None
        return _Seen(status, suspect)

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

    def _holds(self, node: Node) -> bool:
        status = self._status(node)
        return status is not None and (status.st_dev, status.st_ino) == node.inode.key

    def _status(self, node: Node) -> os.stat_result | None:
        assert node.parent is not None
        return self._status_in(node.parent, node.name)

    def _status_in(self, parent: Node, name: bytes) -> os.stat_result | None:
        with self._opened(parent) as fd:
            return _lstat(fd, name) if fd is not None else None

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
            for name in sorted(names):
                yield from self._place(parent, fd, name, names[name], now)

    def _place(self, parent: Node, fd: int, name: bytes, one: _Seen, now: _Pass) -> Iterator[TreeOps]:
        """Make `name` there what it is here."""
        node = parent.child(name)
        status, key = one.status, one.key
        if node is not None and node.mount:
            if not node.there and status is not None:
                yield from self._do(Put(_entry(node.path, status, mount=True)))
                node.there = True
            return
        if status is None or key is None:
            if node is not None and node.there:
                now.gone.append((parent, name, node))  # last: what was in it may have gone elsewhere
            elif node is not None:
                self.model.forget(node)
            now.touched[parent] = None
            return
        same = node is not None and node.inode.key == key and _same_kind(node.inode, status)
        if node is not None and same and (node.children is None or self._still(node, fd, name)):
            if node.children is None:
                yield from self._update(parent, node, fd, one, now)
            else:
                if not node.there:
                    yield from self._do(Put(_entry(node.path, status)))
                    node.there = True
                now.touched[node] = None
            return
        now.touched[parent] = None
        if node is not None:
            if node.children is not None and stat.S_ISDIR(status.st_mode) and key not in now.limbo:
                yield from self._do(Remove(node.path))  # a directory would take its place with all that is in it
            self.model.forget(node)
        node = None
        path = os.path.join(parent.path, name)
        if key not in now.limbo:
            moved = self._moved(parent, name, one)
            if moved is not None:  # into a directory that is new itself
                self._stashes += 1
                yield from self._do(Stash(moved.path, self._stashes))
                self.model.detach(moved)
                now.limbo[key] = self._stashes, moved
        inode = self.model.inodes.get(key)
        other = next((n for n in inode.names if self.model.attached(n)), None) if inode is not None else None
        if inode is not None and other is None and inode.names and key not in now.limbo:
            now.later.append((parent, name, one))
        elif key in now.limbo:
            number, node = now.limbo.pop(key)
            yield from self._do(Unstash(number, path))
            self.model.attach(node, parent, name)
        elif inode is not None and other is not None and not inode.directory and _same_kind(inode, status):
            yield from self._do(Join(path, other.path))
            node = self.model.add(parent, name, inode, directory=False)
        elif stat.S_ISDIR(status.st_mode):
            yield from self._new_directory(parent, fd, name, status, now)
        else:
            yield from self._new(parent, fd, name, status, now)
        if node is None:
            return
        if node.children is None:
            yield from self._update(parent, node, fd, one, now)
        else:
            now.touched[node] = None

    def _new_directory(
        self, parent: Node, fd: int, name: bytes, status: os.stat_result, now: _Pass
    ) -> Iterator[TreeOps]:
        path = os.path.join(parent.path, name)
        if self._is_mount(fd, name):
            node = self.model.add(parent, name, _inode(status), directory=False)
            node.mount = True
            yield from self._do(Put(_entry(path, status, mount=True)))
            return
        try:
            inner = open_beneath(fd, name, _DIRECTORY)
        except OSError as error:
            if error.errno in _GONE:  # we shall hear of it
                return
            raise self._failed(path, error) from error
        try:
            if os.path.samestat(os.fstat(inner), status):
                node = self.model.add(parent, name, _inode(status), directory=True)
                self._know(node, inner)  # before the names are read: from now on we are told
                now.seen[node] = {n: self._see(node, inner, n, True) for n in self._names(node, inner)}
                now.touched[node] = None
                yield from self._do(Put(_entry(path, status)))
        finally:
            os.close(inner)

    def _new(self, parent: Node, fd: int, name: bytes, status: os.stat_result, now: _Pass) -> Iterator[TreeOps]:
        path = os.path.join(parent.path, name)
        inode = _inode(status)
        if stat.S_ISREG(status.st_mode):
            yield from self._content(path, inode, fd, name, now, new=True)
            if inode.blocks:
                self._added(self.model.add(parent, name, inode, directory=False))
            return
        if stat.S_ISLNK(status.st_mode):
            inode.target = _readlink(fd, name)
            if not inode.target:
                return
        yield from self._do(Put(_entry(path, status, inode.target)))
        self._added(self.model.add(parent, name, inode, directory=False))

    def _added(self, node: Node) -> None:
        if node.inode.links > len(node.inode.names):
            self._shared.add(node.inode)

    def _update(self, parent: Node, node: Node, fd: int, one: _Seen, now: _Pass) -> Iterator[TreeOps]:
        """The file is there under that name; its content or what else lstat(2) shows may have changed."""
        status, inode = one.status, node.inode
        assert status is not None
        inode.links = status.st_nlink
        self._added(node)
        facts = _facts(status)
        regular = stat.S_ISREG(status.st_mode)
        same = facts[1:3] == inode.facts[1:3] and not one.suspect and not inode.fresh
        target = _readlink(fd, node.name) if stat.S_ISLNK(status.st_mode) else b""
        if target and target != inode.target:
            inode.target, inode.facts, inode.changed = target, facts, status.st_ctime_ns
            now.touched[parent] = None
            yield from self._do(Put(_entry(node.path, status, target)))
        elif regular and not same:
            now.touched[parent] = None  # it may be replaced there
            yield from self._content(node.path, inode, fd, node.name, now)
        elif facts != inode.facts or status.st_ctime_ns != inode.changed:
            xattrs = self._xattrs(fd, node.name) if regular else {}
            yield from self._do(Touch(_entry(node.path, status, inode.target, xattrs=xattrs)))
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
            if error.errno in _GONE or error.errno == errno.EXDEV:  # a mount point: not what is below it
                return
            raise self._failed(path, error) from error
        try:
            status, began = os.fstat(file), time.time_ns()
            if not stat.S_ISREG(status.st_mode) or (status.st_dev, status.st_ino) != inode.key:
                return
            keep = not new and (inode.key[1] in now.mapped.any or len(inode.names) > 1)
            entry = _entry(path, status, xattrs=xattrs_of(file))
            if status.st_size <= _SMALL:
                yield from self._small(entry, inode, file, keep, new)
            else:
                yield from self._large(entry, inode, file, not new and (keep or bool(inode.blocks)))
        except OSError as error:
            raise self._failed(path, error) from error
        finally:
            os.close(file)
        inode.facts, inode.changed, inode.links = _facts(status), status.st_ctime_ns, status.st_nlink
        inode.fresh = max(status.st_mtime_ns, status.st_ctime_ns) > began - _TICK

    def _small(self, entry: Entry, inode: Inode, file: int, keep: bool, new: bool) -> Iterator[TreeOps]:
        data = b""
        while len(data) < entry.size and (more := os.pread(file, entry.size - len(data), len(data))):
            data += more
        digests = b"".join(_digest(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)) or _EMPTY
        if not new and digests == inode.blocks:
            yield from self._do(Touch(entry))
        elif keep:
            yield from self._do(Open(entry, in_place=True))
            if data:
                yield from self._do(Write(0, data))
            yield from self._do(Close())
        else:
            yield from self._do(Put(entry, data))
        inode.blocks = digests

    def _large(self, entry: Entry, inode: Inode, file: int, in_place: bool) -> Iterator[TreeOps]:
        before = inode.blocks if in_place else b""
        if not in_place:
            yield from self._do(Open(entry))
        opened, digests, run, run_at = not in_place, bytearray(), bytearray(), 0
        for at, data in _blocks(file, entry.size):
            digest = _digest(data)
            number = len(digests)
            digests += digest
            # Without an earlier content, what is all zero is a hole.
            same = before[number : number + _DIGEST] == digest if in_place else not any(data)
            if run and (same or len(run) + len(data) > FILE_CHUNK):
                yield from self._do(Write(run_at, bytes(run)))
                run.clear()
            if same:
                continue
            if not opened:
                yield from self._do(Open(entry, in_place=True))
                opened = True
            if not run:
                run_at = at
            run += data
        if run:
            yield from self._do(Write(run_at, bytes(run)))
        if not opened and entry.size != inode.facts.size:
            yield from self._do(Open(entry, in_place=True))
            opened = True
        yield from self._do(Close() if opened else Touch(entry))
        inode.blocks = bytes(digests)

    def _touch_directory(self, node: Node) -> Iterator[TreeOps]:
        """Times of directories change with what is done in them, so they come last."""
        if not self.model.attached(node) or not node.there or (self.tree.only and node is self.model.top):
            return
        with self._opened(node) as fd:
            if fd is None:
                return
            status = os.fstat(fd)
            yield from self._do(Touch(_entry(node.path, status, xattrs=xattrs_of(fd))))
        node.inode.facts, node.inode.changed = _facts(status), status.st_ctime_ns

    # What goes into a message

    def _do(self, op: TreeOp) -> Iterator[TreeOps]:
        data = len(op.data) if isinstance(op, Put | Write) else 0
        cost = data + (len(_path(op)) + 100)
        if self._ops and (self._size + cost > _BATCH or len(self._ops) >= _BATCH_OPS):
            yield from self._flush()
        self._ops.append(op)
        self._size += cost
        self.sent += data
        self._tell(data)

    def _flush(self) -> Iterator[TreeOps]:
        if self._ops:
            ops, self._ops, self._size = self._ops, [], 0
            yield TreeOps(self.number, ops)

    # Places

    @contextlib.contextmanager
    def _opened(self, node: Node) -> Iterator[int | None]:
        """The directory of that node, opened for reading; None if it is gone."""
        if node is self.model.top:
            yield self._top_fd
            return
        fd = None
        try:
            if node.handle:
                fd = fanotify.open_handle(self._top_fd, node.handle, _DIRECTORY)
            elif self.model.attached(node):
                fd = open_beneath(self._top_fd, node.path, _DIRECTORY)
        except OSError as error:
            if error.errno not in (*_GONE, errno.EXDEV):
                raise self._failed(node.path, error) from error
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)

    def _know(self, node: Node, fd: int) -> None:
        if self._watch is not None:
            self.model.watch(node, fanotify.handle_of(fd))

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

    def __enter__(self) -> TreeSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lstat(fd: int, name: bytes) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise


def _readlink(fd: int, name: bytes) -> bytes:
    """What a symbolic link says; b"" if it is none any more."""
    try:
        return os.readlink(name, dir_fd=fd)
    except OSError:
        return b""


def _facts(status: os.stat_result) -> Facts:
    size = status.st_size if stat.S_ISREG(status.st_mode) else 0
    return Facts(status.st_mode, size, status.st_mtime_ns, status.st_uid, status.st_gid)


def _inode(status: os.stat_result, target: bytes = b"") -> Inode:
    key = (status.st_dev, status.st_ino)
    return Inode(key, _facts(status), target, changed=status.st_ctime_ns, links=status.st_nlink)


def _entry(
    path: bytes,
    status: os.stat_result,
    target: bytes = b"",
    *,
    link: bytes = b"",
    mount: bool = False,
    xattrs: dict[str, bytes] | None = None,
) -> Entry:
    mode, size, mtime_ns, uid, gid = _facts(status)
    return Entry(path, mode, size, mtime_ns, uid, gid, target, link, mount, xattrs or {})


def _same_kind(inode: Inode, status: os.stat_result) -> bool:
    return stat.S_IFMT(inode.facts.mode) == stat.S_IFMT(status.st_mode)


def _blocks(fd: int, size: int) -> Iterator[tuple[int, bytes]]:
    """The first `size` bytes of a file in blocks, all but the last of them whole."""
    at = 0
    while at < size:
        chunk = os.pread(fd, min(_CHUNK, size - at), at)
        if not chunk:
            return
        if len(chunk) % BLOCK and at + len(chunk) < size:  # it is being cut just now
            chunk = chunk[: len(chunk) - len(chunk) % BLOCK]
            if not chunk:
                return
        for start in range(0, len(chunk), BLOCK):
            yield at + start, chunk[start : start + BLOCK]
        at += len(chunk)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _path(op: TreeOp) -> bytes:
    if isinstance(op, Put | Open | Touch):
        return op.entry.path
    return b"" if isinstance(op, Write | Close | Drop) else op.path


_EMPTY = _digest(b"")
