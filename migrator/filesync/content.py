"""What is said about a file, and its content, in operations for the destination."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator

from migrator.filesync.model import Attributes, Inode
from migrator.protocol.trees import Close, Drop, Entry, Open, Put, Touch, TreeOp, Write
from migrator.protocol.wire import FILE_CHUNK

BLOCK = 64 << 10  # what of a large file is sent again if a byte of it has changed
SMALL = 128 << 10  # files up to this are always sent whole
TICK = 50_000_000  # ns; file times are those of the last tick of the kernel, at most 10 ms old
_DIGEST = 16  # bytes
_CHUNK = 1 << 20
_ZEROS = bytes(BLOCK)


def small(entry: Entry, inode: Inode, file: int, *, keep: bool, new: bool) -> Iterator[TreeOp]:
    """A file that is sent whole if anything in it has changed; `keep`: into the file that is there."""
    data = b""
    while len(data) < entry.size and (more := os.pread(file, entry.size - len(data), len(data))):
        data += more
    digests = b"".join(digest_of(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)) or EMPTY
    if not new and digests == inode.blocks:
        yield Touch(entry)
    elif keep:
        yield Open(entry, in_place=True)
        if data:
            yield Write(0, data)
        yield Close()
    else:
        yield Put(entry, data)
    inode.blocks = digests


def large(entry: Entry, inode: Inode, file: int, *, in_place: bool) -> Iterator[TreeOp]:
    """A file in parts: all of it, or `in_place` the blocks that have changed."""
    before = inode.blocks if in_place else b""
    if not in_place:
        yield Open(entry)
    opened, digests, run, run_at = not in_place, bytearray(), bytearray(), 0
    for at, data in blocks_of(file, entry.size):
        digest = digest_of(data)
        number = len(digests)
        digests += digest
        # Without an earlier content, what is all zero is a hole.
        same = before[number : number + _DIGEST] == digest if in_place else data == _ZEROS[: len(data)]
        if run and (same or len(run) + len(data) > FILE_CHUNK):
            yield Write(run_at, bytes(run))
            run.clear()
        if same:
            continue
        if not opened:
            yield Open(entry, in_place=True)
            opened = True
        if not run:
            run_at = at
        run += data
    if run:
        yield Write(run_at, bytes(run))
    if not opened and entry.size != inode.facts.size:
        yield Open(entry, in_place=True)
        opened = True
    yield Close() if opened else Touch(entry)
    inode.blocks = bytes(digests)


def facts_of(status: os.stat_result) -> Attributes:
    size = status.st_size if stat.S_ISREG(status.st_mode) else 0
    return Attributes(status.st_mode, size, status.st_mtime_ns, status.st_uid, status.st_gid)


def inode_of(status: os.stat_result, target: bytes = b"") -> Inode:
    key = (status.st_dev, status.st_ino)
    return Inode(key, facts_of(status), target, changed=status.st_ctime_ns, links=status.st_nlink)


def entry_of(
    path: bytes,
    status: os.stat_result,
    target: bytes = b"",
    *,
    link: bytes = b"",
    mount: bool = False,
    xattrs: dict[str, bytes] | None = None,
) -> Entry:
    mode, size, mtime_ns, uid, gid = facts_of(status)
    return Entry(path, mode, size, mtime_ns, uid, gid, target, link, mount, xattrs or {})


def same_kind(inode: Inode, status: os.stat_result) -> bool:
    return stat.S_IFMT(inode.facts.mode) == stat.S_IFMT(status.st_mode)


def blocks_of(fd: int, size: int) -> Iterator[tuple[int, bytes]]:
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


def digest_of(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def path_of(op: TreeOp) -> bytes:
    if isinstance(op, Put | Open | Touch):
        return op.entry.path
    return b"" if isinstance(op, Write | Close | Drop) else op.path


EMPTY = digest_of(b"")
