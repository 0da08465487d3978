"""The records of an image: open files, pipes, sockets.

Three layers, each saved once and ahead of what refers to it:

    inode objects       Pipe, EventFd, TimerFd, SignalFd, DeletedFile, PidFd, Inotify, Pty, Socket (and Shm, MqQueue)
    File                an open file description: offset and flags, on a path or on an inode object
    FileTable           the descriptors of one or more processes: numbers of Files

The contents of an inode object follow it in records of their own (PipeBuffer, FileData, PtyData, SocketBuffer,
SocketTcp), before the first File. EpollItems and FileLocks follow all Files.

Flags, modes and addresses are those of Linux on the architecture of the image: `flags` as fcntl(F_GETFL)
gives them, `mode` as stat(2), addresses as getsockname(2).
"""

from __future__ import annotations

import enum

from migrator.image.codec import Record, Struct, fixed, record, s32, s64, u16, u32, u64

MAX_CHUNK = 1 << 20  # bytes of contents in one PipeBuffer, FileData, PtyData or SocketBuffer, at most


@fixed
class Descriptor(Struct):
    fd: s32  # its number
    file_objref: s32  # a File
    cloexec: u32  # 1: FD_CLOEXEC
    reserved: u32


@record(301)
class FileTable(Record):
    """The open descriptors of a process, sorted by number."""

    objref: s32
    reserved: u32
    descriptors: list[Descriptor]


class FileKind(enum.IntEnum):
    """What a File is opened on: `path`, or the object `inode_objref`."""

    REGULAR = 1  # path
    DIRECTORY = 2  # path
    PATH = 3  # path; opened with O_PATH
    DEVICE = 4  # path; `rdev` must be the same
    DELETED = 5  # a DeletedFile
    PIPE = 6  # a Pipe
    FIFO = 7  # path, and a Pipe with what is in it
    EVENTFD = 8  # an EventFd
    TIMERFD = 9  # a TimerFd
    SIGNALFD = 10  # a SignalFd
    EPOLL = 11  # nothing; its EpollItems follow
    MEMFD = 12  # a Shm
    SOCKET = 13  # a Socket
    PIDFD = 14  # a PidFd
    MQUEUE = 15  # a MqQueue
    INOTIFY = 16  # an Inotify
    PTY_MASTER = 17  # path, and a Pty
    PTY_SLAVE = 18  # path (/dev/tty as well), and a Pty


class OwnerType(enum.IntEnum):
    """Who is sent signals about a File (F_SETOWN_EX in fcntl(2))."""

    NONE = 0
    THREAD = 1
    PROCESS = 2
    GROUP = 3


@record(304)
class File(Record):
    """An open file description.

    `size` and `mtime` (ns since the epoch) are those of the file when it was saved; `dev`,
    `ino` and `rdev` as stat(2) has them, as information except `rdev` of a device.
    `owner_signal` is F_GETSIG."""

    objref: s32
    kind: u32  # enum FileKind
    flags: u32  # F_GETFL
    mode: u32  # st_mode
    pos: s64
    size: u64
    mtime: u64
    dev: u64
    ino: u64
    rdev: u64
    inode_objref: s32
    owner_type: u32  # enum OwnerType
    owner_pid: s32
    owner_signal: s32
    lock: u32  # 0 none, 1 shared, 2 exclusive: flock(2)
    reserved: u32
    path: str  # from the root of the root task


@record(305)
class PipeBuffer(Record):
    """What waits in a pipe: the next bytes, in order."""

    pipe_objref: s32
    flags: u32  # 1: one packet (O_DIRECT), otherwise a part of a stream of bytes
    data: bytes


@fixed
class EpollItem(Struct):
    data: u64
    events: u32  # 0 except for EPOLLONESHOT and EPOLLET: an event that was delivered and not renewed
    fd: s32  # the number under which it was added
    file_objref: s32  # the File it is about
    reserved: u32


@record(308)
class EpollItems(Record):
    """What an epoll instance waits for. `pid` is the process that has both descriptors."""

    epoll_objref: s32  # a File of kind EPOLL
    pid: s32
    items: list[EpollItem]


@record(309)
class Pipe(Record):
    objref: s32
    capacity: u32  # F_GETPIPE_SZ


@record(310)
class EventFd(Record):
    objref: s32
    semaphore: u32  # 1: EFD_SEMAPHORE
    count: u64


@record(311)
class TimerFd(Record):
    """A timer. `value` is what remains until the next expiration, 0 if it is not armed; if `flags` has 1
    (TFD_TIMER_ABSTIME) and the clock is CLOCK_REALTIME, it is the date instead. In ns."""

    objref: s32
    clock: s32
    flags: u32
    reserved: u32
    ticks: u64  # expirations not read yet
    value: u64
    interval: u64


@record(312)
class SignalFd(Record):
    objref: s32
    reserved: u32
    mask: u64


@record(313)
class DeletedFile(Record):
    """A regular file that has no name any more. Its contents follow as FileData, holes left out."""

    objref: s32
    mode: u32
    size: u64
    uid: u32
    gid: u32
    path: str  # where its name was


@record(314)
class FileData(Record):
    inode_objref: s32  # a DeletedFile
    reserved: u32
    offset: u64
    data: bytes


@record(315)
class PidFd(Record):
    objref: s32
    pid: s32  # 0: of a process that has ended and was waited for


@record(316)
class FileLock(Record):
    """A lock on a range of a file (fcntl(2)). Taken again once every process has its descriptors."""

    file_objref: s32  # the File that it was taken through
    pid: s32  # the process that has it, or 0: it belongs to the File (F_OFD_SETLK)
    fd: s32  # the File's number in that process
    kind: u32  # 1 shared, 2 exclusive
    start: u64  # in bytes
    length: u64  # 0: up to the end of the file, however it grows


OWNED_INODES = frozenset(
    map(int, (FileKind.PIPE, FileKind.MEMFD, FileKind.SOCKET, FileKind.REGULAR, FileKind.DIRECTORY))
)


@record(319)
class FileOwner(Record):
    """Who owns the inode of a File or MappedFile, if that is not root; the last one holds.

    One of kind PIPE, MEMFD or SOCKET is given to them; one that is opened by its path must be theirs."""

    owned_objref: s32
    reserved: u32
    uid: u32
    gid: u32


@record(317)
class Inotify(Record):
    """An inotify instance; what it watches follows."""

    objref: s32
    reserved: u32


@record(318)
class InotifyWatch(Record):
    inotify_objref: s32
    wd: s32  # its number, by which they are sorted
    mask: u32  # events, IN_EXCL_UNLINK and IN_ONESHOT
    reserved: u32
    path: str  # from the root of the root task; where it leads to is watched itself


class PtyFlag(enum.IntFlag):
    LOCKED = 1  # TIOCSPTLCK: the slave cannot be opened
    PACKET = 2  # TIOCPKT
    SLAVE_EXCLUSIVE = 4  # TIOCEXCL
    MASTER_EXCLUSIVE = 8
    STOPPED = 16  # output is stopped: TCOOFF, ^S
    SLAVE_CLOSED = 32  # the slave was opened, and is no more: EIO at the master
    HUNG_UP = 64  # the master is closed: the slave is hung up, no PTY_MASTER refers to it


@record(320)
class Pty(Record):
    """A pair of pseudo-terminals. It comes ahead of the Files that refer to it."""

    objref: s32
    index: u32  # of /dev/pts/N: the copy must have the same one
    flags: u32  # enum PtyFlag
    status: u32  # what packet mode has still to tell the master (TIOCPKT_*)
    session: s32  # pid of the leader of the session that it is the terminal of, or 0
    foreground: s32  # process group in the foreground, or 0
    uid: u32  # owner of /dev/pts/N
    gid: u32
    mode: u32  # its permission bits
    rows: u16  # struct winsize
    columns: u16
    width: u16
    height: u16
    termios: bytes  # struct termios2, as TCGETS2 gives it


class PtyEnd(enum.IntEnum):
    NONE = 0  # raw input, output, or a line that is being typed
    LINE = 1  # a line, which ends with the last byte of data
    EOF = 2  # a line that was ended by the character EOF, which is not in data


@record(321)
class PtyData(Record):
    """What waits in a Pty, in the order in which it is read. A line that is being typed comes last."""

    pty_objref: s32
    direction: u32  # 1: input, which the slave reads; 2: output, which the master reads
    end: u32  # enum PtyEnd
    data: bytes


class SocketState(enum.IntEnum):
    UNCONNECTED = 1  # bound, if `local` says so
    LISTENING = 2
    CONNECTED = 3  # TCP: any state that has a peer, see SocketTcp
    PEER_GONE = 4  # the connection has ended; what is queued can still be read
    CONNECTING = 5  # TCP: the SYN is on its way; sent anew


@fixed
class SocketOption(Struct):
    """One option as setsockopt(2) takes it.

    Structs are packed into `value`: linger as onoff | seconds << 32, timeouts in µs, SO_PEERCRED as uid | gid << 32."""

    level: s32
    name: s32
    value: s64


@record(701)
class Socket(Record):
    """A socket. `local` and `peer` are struct sockaddr as the kernel gives them, empty if there is none.

    Options are those that differ from a new socket's. The ends of a connection between two unix sockets
    name each other by `peer_objref`."""

    objref: s32
    family: u32
    type: u32  # SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET
    protocol: u32
    state: u32  # enum SocketState
    shutdown: u32  # 1: reading, 2: writing, 3: both
    backlog: u32  # of listen(2)
    peer_objref: s32  # a Socket, or 0
    sndbuf: u32  # bytes, as getsockopt gives them
    rcvbuf: u32
    buf_lock: u32  # SO_BUF_LOCK: 1 sndbuf, 2 rcvbuf set by the program
    mode: u32  # unix: permissions of the socket's file
    uid: u32  # of the socket; unix: of the socket's file
    gid: u32
    error: s32  # SO_ERROR that waits to be read, or 0
    local: bytes
    peer: bytes
    path: str  # unix: where the socket's file is, "" if it has none
    device: str  # SO_BINDTODEVICE
    congestion: str  # TCP_CONGESTION
    options: list[SocketOption]


@record(702)
class SocketBuffer(Record):
    """What waits to be received from a socket, in order. `address` is the sender's, if it has one."""

    socket_objref: s32
    flags: u32  # 1: one whole message, otherwise a part of a stream of bytes
    data: bytes
    address: bytes


@record(703)
class SocketTcp(Record):
    """The state of a TCP connection (TCP_REPAIR in tcp(7); kernel: net/ipv4/tcp.c).

    `rcv_seq` and `snd_seq` are TCP_QUEUE_SEQ of the two queues: the sequence numbers after the last byte
    of `received` and of `sent`. The last `unsent` bytes of `sent` were never sent."""

    socket_objref: s32
    state: u32  # TCP_ESTABLISHED 1, FIN_WAIT1 4, FIN_WAIT2 5, CLOSE_WAIT 8, LAST_ACK 9, CLOSING 11
    rcv_seq: u32
    snd_seq: u32
    unsent: u32
    options: u32  # tcpi_options: 1 timestamps, 2 SACK, 4 window scaling
    snd_wscale: u32
    rcv_wscale: u32
    mss_clamp: u32
    timestamp: u32  # TCP_TIMESTAMP
    snd_wl1: u32  # struct tcp_repair_window
    snd_wnd: u32
    max_window: u32
    rcv_wnd: u32
    rcv_wup: u32
    received: bytes  # waiting to be read
    sent: bytes  # not acknowledged by the peer
