"""What the destination has of a tree, as the source knows it: names, and the files behind them.

A file is told by its inode number, not by its name: so a file or directory that was renamed is renamed there
too, and the names of one file stay names of one file. Pure: no I/O.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

Key = tuple[int, int]  # st_dev, st_ino


class Attributes(NamedTuple):
    """The part of lstat(2) that decides whether something has to be sent again."""

    mode: int
    size: int
    mtime_ns: int
    uid: int
    gid: int


@dataclass(slots=True, eq=False)
class Inode:
    """A file, whatever its names are.

    facts:   as they are on the destination
    blocks:  a digest for each block of what was sent, b"" if its content was not sent but found to be the same
    changed: the ctime of the last look, in ns, for file systems that tell nothing
    fresh:   it was changed so shortly before it was read that a later change need not show in its times
    links:   names that the file system counts, also those outside of the tree
    """

    key: Key
    facts: Attributes
    target: bytes = b""
    blocks: bytes = b""
    changed: int = 0
    fresh: bool = False
    links: int = 1
    names: list[Node] = field(default_factory=list)

    @property
    def directory(self) -> bool:
        return stat.S_ISDIR(self.facts.mode)


@dataclass(slots=True, eq=False)
class Node:
    """A name in a directory. `children` is None for what is no directory, or a mount point: not ours to look into."""

    name: bytes
    parent: Node | None
    inode: Inode
    children: dict[bytes, Node] | None = None
    handle: bytes = b""
    mount: bool = False
    there: bool = True  # a directory may be known before the destination has it

    @property
    def path(self) -> bytes:
        parts = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            parts.append(node.name)
            node = node.parent
        return b"/".join(reversed(parts))

    @property
    def depth(self) -> int:
        depth, node = 0, self
        while node.parent is not None:
            depth, node = depth + 1, node.parent
        return depth

    def below(self, other: Node) -> bool:
        """Whether it is `other`, or anywhere in it."""
        node: Node | None = self
        while node is not None and node is not other:
            node = node.parent
        return node is other

    def child(self, name: bytes) -> Node | None:
        return self.children.get(name) if self.children is not None else None

    def walk(self) -> Iterator[Node]:
        """This one and all below it, parents first."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            if node.children:
                waiting.extend(node.children.values())


class Model:
    """All names of a tree. `top` is the directory that it begins with."""

    def __init__(self, top: Inode) -> None:
        self.top = Node(b"", None, top, {})
        self.inodes: dict[Key, Inode] = {top.key: top}
        self.handles: dict[bytes, Node] = {}
        top.names.append(self.top)

    def add(self, parent: Node, name: bytes, inode: Inode, *, directory: bool) -> Node:
        """A new name; there must be none such."""
        assert parent.children is not None and name not in parent.children
        node = Node(name, parent, inode, {} if directory else None)
        parent.children[name] = node
        inode.names.append(node)
        self.inodes[inode.key] = inode
        return node

    def watch(self, node: Node, handle: bytes) -> None:
        """Remember by which handle the kernel tells of a directory."""
        if self.handles.get(node.handle) is node:
            del self.handles[node.handle]
        node.handle = handle
        if handle:
            self.handles[handle] = node

    def detach(self, node: Node) -> None:
        """Take it out with all below it, as it will be put somewhere else."""
        assert node.parent is not None and node.parent.children is not None
        if node.parent.children.get(node.name) is node:
            del node.parent.children[node.name]
        node.parent = None

    def attach(self, node: Node, parent: Node, name: bytes) -> None:
        assert parent.children is not None and name not in parent.children and not parent.below(node)
        node.parent, node.name = parent, name
        parent.children[name] = node

    def forget(self, node: Node) -> None:
        """It is gone, with all below it."""
        if node.parent is not None:
            self.detach(node)
        for gone in node.walk():
            if self.handles.get(gone.handle) is gone:  # it may have been found again under another name
                del self.handles[gone.handle]
            gone.inode.names.remove(gone)
            if not gone.inode.names and self.inodes.get(gone.inode.key) is gone.inode:
                del self.inodes[gone.inode.key]

    def find(self, path: bytes) -> Node | None:
        node: Node | None = self.top
        for name in path.split(b"/") if path else ():
            node = node.child(name) if node is not None else None
        return node

    def attached(self, node: Node) -> bool:
        """Whether it has a path, or is in what was taken out."""
        while node.parent is not None:
            node = node.parent
        return node is self.top

    def directories(self) -> Iterator[Node]:
        return (node for node in self.top.walk() if node.children is not None)
