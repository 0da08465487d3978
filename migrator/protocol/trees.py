"""Messages about files that are carried along: trees, what differs in them, what is to be done."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from migrator.protocol.wire import (
    FILE_CHUNK,
    LISTED,
    MOST_FILES,
    Count,
    FileName,
    FilePath,
    Message,
    Mode,
    Name,
    Owner,
    Part,
    Stamp,
    XattrValue,
)


class SyncTree(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is carried along: all below the directory `path`, as the workload sees it; or of that directory only the
    files `only`. Its inode number and the time of its last change (ns) tell whether both hosts look at the same
    directory."""

    path: Annotated[str, Meta(max_length=4096, pattern=r"^/")]
    only: Annotated[list[FileName], Meta(max_length=MOST_FILES)] = msgspec.field(default_factory=list)
    inode: Count = 0  # its lower 63 bits
    changed_ns: Stamp = 0


class Entry(Part, frozen=True):
    """One file of a tree, as lstat(2) shows it.

    path:    from the top of the tree, without a slash at its beginning; of a listing only its last component
    target:  of a symbolic link
    link:    the path of another name of the same file, which was named before
    mount:   a mount point: to be there as a directory, and not to be looked into
    """

    path: FilePath
    mode: Mode
    size: Count = 0
    mtime_ns: Stamp = 0
    uid: Owner = 0
    gid: Owner = 0
    target: Annotated[bytes, Meta(max_length=4096)] = b""
    link: FilePath = b""
    mount: bool = False
    xattrs: Annotated[dict[Name, XattrValue], Meta(max_length=256)] = msgspec.field(default_factory=dict)


class TreeList(Message, tag="tree-list", frozen=True):
    """source: what it has in one directory of tree `tree`, by name: all after `after`, up to the last entry,
    or if `last` to the end. Comes after the verdict and before `begin`, as often as needed."""

    number: Count
    tree: Count
    directory: FilePath
    after: FileName
    last: bool
    entries: Annotated[list[Entry], Meta(max_length=LISTED)]


class TreeAnswer(Message, tag="tree-answer", frozen=True):
    """destination: which of these entries are not the same here, by their index, and what is here only. `last`:
    nothing more about this list."""

    number: Count
    differing: Annotated[list[Count], Meta(max_length=LISTED)] = msgspec.field(default_factory=list)
    surplus: Annotated[list[FileName], Meta(max_length=LISTED)] = msgspec.field(default_factory=list)
    last: bool = True


class Put(Part, frozen=True, tag="put"):
    """Make it, in place of whatever has its name: a directory, a link, a FIFO, or a file with this content."""

    entry: Entry
    data: Annotated[bytes, Meta(max_length=FILE_CHUNK)] = b""


class Open(Part, frozen=True, tag="open"):
    """A regular file follows, to be put in place when it is closed; with `in_place` only what has changed, into
    the file that is there."""

    entry: Entry
    in_place: bool = False


class Write(Part, frozen=True, tag="write"):
    offset: Count
    data: Annotated[bytes, Meta(max_length=FILE_CHUNK)]


class Close(Part, frozen=True, tag="close"):
    """The file that was opened is complete."""


class Touch(Part, frozen=True, tag="touch"):
    """Owner, mode, time and attributes of what is there."""

    entry: Entry


class Join(Part, frozen=True, tag="join"):
    """`path` becomes another name of the file `to`."""

    path: FilePath
    to: FilePath


class Remove(Part, frozen=True, tag="remove"):
    """`path`, with all below it, is gone; `keep`: it never was on the source, and is to be kept elsewhere."""

    path: FilePath
    keep: bool = False


class MoveAside(Part, frozen=True, tag="move-aside"):
    """`path` will be somewhere else: keep it under `number`."""

    path: FilePath
    number: Count


class MoveBack(Part, frozen=True, tag="move-back"):
    """What was kept under `number` is now `path`, in place of whatever has its name."""

    number: Count
    path: FilePath


class Drop(Part, frozen=True, tag="drop"):
    """What was kept under `number` is gone."""

    number: Count


TreeOp = Put | Open | Write | Close | Touch | Join | Remove | MoveAside | MoveBack | Drop


class TreeOps(Message, tag="tree-ops", frozen=True):
    """source: what to do in tree `tree`, in this order."""

    tree: Count
    ops: Annotated[list[TreeOp], Meta(max_length=LISTED)]
