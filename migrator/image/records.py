"""The records of an image: header, hierarchy, tasks, memory. Open files are in `records_files`.

Numbers of types follow the checkpoint/restart series of 2009 to 2011 where the meaning is the same.
Pids are those of the root task's pid namespace. Times are in nanoseconds unless named otherwise.
Objrefs are positive, given out in order of appearance; 0 means "none".
"""

from __future__ import annotations

import enum
from typing import Self

from migrator.errors import ImageError
from migrator.image.codec import (
    HEADER,
    REGISTRY,
    Record,
    Struct,
    fixed,
    record,
    s32,
    s64,
    u16,
    u32,
    u64,
)

MAGIC = 0x4D49475241544F52  # "MIGRATOR" read as a big-endian number
TRAILER_MAGIC = 0x524F544152474944  # a different one, so that a header never passes for a trailer
REV = 7
PAGE_SIZE = 4096


class Arch(enum.IntEnum):
    X86_64 = 2
    AARCH64 = 5


@record(1)
class Header(Record):
    """First record.

    `monotonic` and `boottime` are what the tasks themselves saw at `time` (CLOCK_REALTIME)."""

    magic: u64
    arch_id: u16
    rev: u16
    kernel_major: u16
    kernel_minor: u16
    kernel_patch: u16
    page_shift: u16
    uflags: u32
    time: u64
    monotonic: s64
    boottime: s64
    sysname: str
    nodename: str
    release: str
    version: str
    machine: str
    domainname: str
    engine: str


@record(2)
class HeaderX86(Record):
    """Second record on x86-64: what the registers below need of the destination's processor."""

    xfeatures: u64
    xstate_size: u32
    cpu_vendor: str
    cpu_model: str
    cpu_flags: str
    vdso_digest: str  # sha256 of the vdso's bytes, hex: code in flight may point into it


@record(3)
class Container(Record):
    """The container that the tree lives in, if any. `spec` is the JSON text of its specification."""

    init_pid: s32
    name: str
    spec: str


class TaskFlag(enum.IntFlag):
    THREAD = 1
    ZOMBIE = 2
    ORPHAN = 4  # its parent is outside of the tree


@fixed
class TaskPids(Struct):
    pid: s32
    tgid: s32
    ppid: s32
    pgid: s32
    sid: s32
    flags: u32


@record(102)
class Tree(Record):
    """The task hierarchy, parents before children, leaders before their threads.

    May come again (tasks are born and die during pre-copy): the last one is the authority."""

    generation: u32
    tasks: list[TaskPids]


@record(103)
class Task(Record):
    """One task: a thread, or the leader of a process. Follows everything that it refers to."""

    pid: s32
    state: u32  # enum TaskState
    exit_code: s32  # as wait(2) encodes it, for zombies
    exit_signal: s32
    pdeath_signal: s32
    mm_objref: s32
    files_objref: s32
    fs_objref: s32
    sighand_objref: s32
    signal_objref: s32
    cred_objref: s32
    personality: u32
    sched_policy: s32
    sched_priority: s32
    nice: s32
    ioprio: s32
    rseq_len: u32
    rseq_sig: u32
    altstack_flags: s32
    flags: u32  # enum TaskBits
    clear_child_tid: u64
    robust_list: u64
    robust_len: u64
    rseq_ptr: u64
    altstack_sp: u64
    altstack_size: u64
    blocked: u64
    timerslack: u64
    comm: str
    affinity: bytes


class TaskState(enum.IntEnum):
    RUNNING = 0
    STOPPED = 1  # by a job-control signal; `exit_code` holds the signal
    ZOMBIE = 2


class TaskBits(enum.IntFlag):
    NO_NEW_PRIVS = 1
    CHILD_SUBREAPER = 2
    THP_DISABLED = 4
    NOT_DUMPABLE = 8
    STOP_REPORTED = 16
    MEMBARRIER_GLOBAL = 32  # registered for membarrier(2)
    MEMBARRIER_PRIVATE = 64
    MEMBARRIER_SYNC_CORE = 128
    MEMBARRIER_RSEQ = 256
    TSC_DENIED = 512  # PR_SET_TSC
    CPUID_DENIED = 1024  # ARCH_SET_CPUID
    MCE_EARLY = 2048  # PR_MCE_KILL
    MCE_LATE = 4096
    MERGE_ALL = 8192  # PR_SET_MEMORY_MERGE
    LOCK_FUTURE = 16384  # mlockall(2): MCL_FUTURE
    LOCK_ONFAULT = 32768  # with MCL_ONFAULT
    THP_EXCEPT_ADVISED = 65536  # PR_THP_DISABLE_EXCEPT_ADVISED, with THP_DISABLED


@record(106)
class RestartBlock(Record):
    """A system call that was interrupted and goes on for its remaining time.

    `remaining` is in ns, or -1 if the call is to be made again as it was."""

    pid: s32
    syscall: u32
    remaining: s64
    args: bytes


@record(108)
class Cpu(Record):
    """Registers of one task.

    `regs` as PTRACE_GETREGSET(NT_PRSTATUS) gives them, `xstate` as NT_X86_XSTATE."""

    pid: s32
    arch_id: u32
    regs: bytes
    xstate: bytes


@fixed
class Gid(Struct):
    gid: u32
    reserved: u32


@record(115)
class Cred(Record):
    objref: s32
    uid: u32
    euid: u32
    suid: u32
    fsuid: u32
    gid: u32
    egid: u32
    sgid: u32
    fsgid: u32
    securebits: u32
    cap_inheritable: u64
    cap_permitted: u64
    cap_effective: u64
    cap_bounding: u64
    cap_ambient: u64
    groups: list[Gid]


@record(401)
class Mm(Record):
    """An address space. Its mappings follow in `Vmas`, its contents in `Pages`; both may come again."""

    objref: s32
    oom_score_adj: s32
    start_code: u64
    end_code: u64
    start_data: u64
    end_data: u64
    start_brk: u64
    brk: u64
    start_stack: u64
    arg_start: u64
    arg_end: u64
    env_start: u64
    env_end: u64
    exe_objref: s32  # a MappedFile
    pid: s32  # of the process whose address space it is
    auxv: bytes


class VmaKind(enum.IntEnum):
    ANON = 1
    FILE = 2  # objref is a MappedFile
    SHM = 3  # objref is a Shm
    HEAP = 4
    STACK = 5
    VDSO = 6
    VVAR = 7
    VVAR_VCLOCK = 8


class VmaFlag(enum.IntFlag):
    READ = 1
    WRITE = 2
    EXEC = 4
    SHARED = 8
    GROWSDOWN = 0x10
    LOCKED = 0x20
    NORESERVE = 0x40
    DONTFORK = 0x80
    DONTDUMP = 0x100
    WIPEONFORK = 0x200
    HUGEPAGE = 0x400
    NOHUGEPAGE = 0x800
    MERGEABLE = 0x1000
    RANDOM = 0x2000
    SEQUENTIAL = 0x4000
    DROPPABLE = 0x8000
    MAY_WRITE = 0x10000  # of a shared mapping: it can be made writable
    LOCKED_ONFAULT = 0x20000  # MLOCK_ONFAULT, with LOCKED


@fixed
class VmaItem(Struct):
    start: u64
    end: u64
    offset: u64  # in bytes, into the file or the shared memory
    flags: u32
    kind: u32
    objref: s32
    name_objref: s32  # a Name, for PR_SET_VMA_ANON_NAME


@record(402)
class Vmas(Record):
    """All mappings of one address space, sorted. The last one in the stream is the authority."""

    mm_objref: s32
    reserved: u32
    vmas: list[VmaItem]


class PageKind(enum.IntEnum):
    DATA = 0  # contents follow
    ZERO = 1  # reads as zeros; nothing follows
    ABSENT = 2  # dropped or never touched: whatever the mapping itself gives
    GUARD = 3  # to touch it is a fault (MADV_GUARD_INSTALL); of an Mm


@fixed
class PageRange(Struct):
    start: u64  # virtual address, or offset in bytes for a Shm
    nr_pages: u32
    kind: u32


@record(403)
class Pages(Record):
    """A chunk of contents: ranges, then the contents of the DATA ranges, one after the other.

    The last chunk of an object in a round has no ranges."""

    objref: s32  # an Mm, a Shm or a SharedFile
    crc: u32  # zlib.crc32 of `data`, or 0
    ranges: list[PageRange]
    data: bytes


@record(404)
class Shm(Record):
    """Memory shared by several mappings or descriptors.

    Anonymous, memfd, or System V."""

    objref: s32
    kind: u32  # enum ShmKind
    size: u64
    seals: u32
    mode: u32
    name: str


class ShmKind(enum.IntEnum):
    ANON = 1
    MEMFD = 2
    SYSV = 3


@record(405)
class MappedFile(Record):
    """A file that is mapped or executed. Its content is not in the stream: the same path is verified."""

    objref: s32
    mode: u32
    size: u64
    mtime: u64
    path: str
    build_id: str


class RoundFlag(enum.IntFlag):
    LAST = 1  # the tasks are stopped: what follows is final
    END = 2  # the round that is open is complete


@record(406)
class RoundMark(Record):
    """The pages and drafts that follow belong to round `number`; or, with END, that round is complete."""

    number: u32
    flags: u32  # enum RoundFlag
    time: u64


@record(407)
class Name(Record):
    objref: s32
    reserved: u32
    text: str


@record(451)
class Fs(Record):
    objref: s32
    umask: u32
    cwd: str
    root: str


@record(601)
class Sighand(Record):
    """`actions`: 64 times struct sigaction of the kernel (handler, flags, restorer, mask), signal 1 first."""

    objref: s32
    reserved: u32
    actions: bytes


@fixed
class Rlimit(Struct):
    soft: u64
    hard: u64


@fixed
class Itimer(Struct):
    value: u64  # remaining, in microseconds
    interval: u64


@fixed
class PosixTimer(Struct):
    timer_id: s32
    clock: s32
    notify: u32
    signo: u32
    tid: s32
    overrun: s32
    sigval: u64
    value: u64  # remaining
    interval: u64


@record(602)
class Signal(Record):
    """What the threads of a process share: limits and timers."""

    objref: s32
    reserved: u32
    rlimits: list[Rlimit]
    itimers: list[Itimer]
    timers: list[PosixTimer]


@record(604)
class SigPending(Record):
    """Signals that wait.

    `infos` is an array of siginfo_t (128 bytes each). `shared`: of the whole process."""

    pid: s32
    shared: u32
    infos: bytes


@record(9001)
class Trailer(Record):
    """Last record. Without it nothing may be restarted."""

    magic: u64
    nr_records: u64


class Error(Record):
    """What went wrong, for people. Payload: a NUL, then a text in UTF-8. May end a stream at any point."""

    __slots__ = ("text",)
    TYPE = 9999
    _members = ()

    def __init__(self, text: str) -> None:
        self.text = text

    def encode(self) -> bytes:
        payload = b"\0" + self.text.encode("utf-8", "replace")
        payload += bytes(-len(payload) % 8)
        return HEADER.pack(self.TYPE, HEADER.size + len(payload)) + payload

    @classmethod
    def decode(cls, payload: bytes | memoryview) -> Self:
        raw = bytes(payload)
        if raw[:1] != b"\0":
            raise ImageError("Error: the text is not led by a NUL")
        return cls(raw[1:].rstrip(b"\0").decode("utf-8", "replace"))

    def __repr__(self) -> str:
        return f"Error({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Error) and other.text == self.text

    __hash__ = None  # type: ignore[assignment]


REGISTRY[Error.TYPE] = Error
