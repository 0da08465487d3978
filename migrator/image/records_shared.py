"""Records of what several tasks share without an address space or a descriptor in common.

files that only the tree has    SharedFile, with TmpfsEntry and TmpfsXattr for those that have names
System V objects                SysvShm, SysvSem, SysvQueue and SysvMessage
POSIX message queues            MqQueue and MqMessage
"""

from __future__ import annotations

import enum

from migrator.image.codec import Record, record, s32, s64, u32, u64

# st_rdev of null, zero, full, random, urandom and tty: nothing is kept in them. 0 is no device.
PLAIN_DEVICES = frozenset({0, *(1 << 8 | minor for minor in (3, 5, 7, 8, 9)), 5 << 8})
MAX_MESSAGE = 1 << 24  # bytes of one message of a queue


class SharedFileKind(enum.IntEnum):
    DELETED = 1  # has no name any more, and is mapped
    TMPFS = 2  # in a tmpfs of a container's own: see TmpfsEntry


@record(408)
class SharedFile(Record):
    """A regular file that is on no other host. Its contents come as `Pages`, by offset, as those of a `Shm`.

    A mapping of it is one of kind SHM; a program that was deleted may be one. `mount` is the tmpfs that it is in,
    empty where its file system is one of the hosts'. `name` is its path, as far as known."""

    objref: s32
    kind: u32  # enum SharedFileKind
    size: u64
    mtime: s64  # ns since the epoch
    mode: u32  # permissions
    uid: u32
    gid: u32
    reserved: u32
    mount: str
    name: str


@record(409)
class TmpfsEntry(Record):
    """A name in a tmpfs of a container's own, `mount`. Those of the last round are all there are.

    Directories come before what is in them, "." being the first."""

    shared_objref: s32  # a SharedFile, with several names if it has hard links; 0 for all others
    mode: u32  # st_mode
    uid: u32
    gid: u32
    rdev: u32  # of a character device that keeps nothing, such as /dev/null
    mtime: s64  # ns since the epoch
    mount: str
    path: str
    target: str


@record(410)
class TmpfsXattr(Record):
    """An extended attribute of a TmpfsEntry ahead of it."""

    flags: u32
    reserved: u32
    mount: str
    path: str
    name: str
    value: bytes


@record(501)
class SysvShm(Record):
    """A segment of System V shared memory (shmget(2)), after the `Shm` of kind SYSV that has its contents.

    Those that come in the last round are all there are."""

    shared_objref: s32  # of the Shm
    shmid: u32
    key: u32
    mode: u32  # permissions, and SHM_DEST
    uid: u32
    gid: u32
    cuid: u32
    cgid: u32


@record(502)
class SysvSem(Record):
    """A set of System V semaphores (semget(2))."""

    semid: u32
    key: u32
    mode: u32
    uid: u32
    gid: u32
    cuid: u32
    cgid: u32
    reserved: u32
    values: bytes  # u16 each


@record(503)
class SysvQueue(Record):
    """A System V message queue (msgget(2)); what waits in it follows as SysvMessage."""

    msqid: u32
    key: u32
    mode: u32
    uid: u32
    gid: u32
    cuid: u32
    cgid: u32
    reserved: u32
    limit: u64  # bytes, msg_qbytes


@record(504)
class SysvMessage(Record):
    msqid: u32
    reserved: u32
    kind: s64  # mtype
    text: bytes


@record(505)
class MqQueue(Record):
    """A POSIX message queue (mq_overview(7)); what waits in it follows as MqMessage. No two have one name."""

    objref: s32
    removed: u32  # 1: its name was removed; who has it open still has it
    mode: u32  # permissions
    uid: u32
    gid: u32
    max_messages: u32
    message_size: u32
    reserved: u32
    atime: s64  # ns since the epoch
    mtime: s64
    name: str  # without the slash


@record(506)
class MqMessage(Record):
    """The next message, in the order in which they are received."""

    queue_objref: s32
    priority: u32
    text: bytes
