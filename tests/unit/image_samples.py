"""A small stream with every kind of record, always the same: for golden images and tests."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable

from migrator.image import records as r
from migrator.image import records_files as f
from migrator.image import records_shared as s
from migrator.image.codec import Record

PAGE = bytes(range(256)) * 16
TEXT, HEAP, SHARED = 0x400000, 0x1000000, 0x7F0000000000


def task(pid: int, *, mm: int = 3, state: int = r.TaskState.RUNNING, comm: str = "worker") -> r.Task:
    living = state != r.TaskState.ZOMBIE
    return r.Task(
        pid=pid,
        state=state,
        exit_code=0 if living else 0x0900,
        exit_signal=17,
        pdeath_signal=0,
        mm_objref=mm if living else 0,
        files_objref=33 if living else 0,
        fs_objref=8 if living else 0,
        sighand_objref=9 if living else 0,
        signal_objref=10 if living else 0,
        cred_objref=7,
        personality=0,
        sched_policy=0,
        sched_priority=0,
        nice=-5,
        ioprio=0,
        rseq_len=32 if living else 0,
        rseq_sig=0x53053053,
        altstack_flags=2,
        flags=r.TaskBits.NO_NEW_PRIVS,
        clear_child_tid=HEAP + 16,
        robust_list=HEAP + 32,
        robust_len=24,
        rseq_ptr=HEAP + 64,
        altstack_sp=0,
        altstack_size=0,
        blocked=1 << 16,
        timerslack=50_000,
        comm=comm,
        affinity=b"\x03",
    )


def cpu(pid: int) -> r.Cpu:
    return r.Cpu(pid=pid, arch_id=r.Arch.X86_64, regs=bytes(range(216)), xstate=bytes(576))


def pids(pid: int, *, tgid: int = 0, ppid: int = 1, flags: int = 0) -> r.TaskPids:
    return r.TaskPids(pid=pid, tgid=tgid or pid, ppid=ppid, pgid=1, sid=1, flags=flags)


def vma(start: int, nr_pages: int, **over: int) -> r.VmaItem:
    values = {
        "start": start,
        "end": start + nr_pages * 4096,
        "offset": 0,
        "flags": r.VmaFlag.READ | r.VmaFlag.WRITE,
        "kind": r.VmaKind.ANON,
        "objref": 0,
        "name_objref": 0,
    }
    return r.VmaItem(**{**values, **over})


def pages(objref: int, *ranges: tuple[int, int, int]) -> r.Pages:
    nr_data = sum(count for _, count, kind in ranges if kind == r.PageKind.DATA)
    data = PAGE * nr_data
    items = [r.PageRange(start=start, nr_pages=count, kind=kind) for start, count, kind in ranges]
    return r.Pages(objref=objref, crc=zlib.crc32(data), ranges=items, data=data)


def header() -> r.Header:
    return r.Header(
        magic=r.MAGIC,
        arch_id=r.Arch.X86_64,
        rev=1,
        kernel_major=6,
        kernel_minor=12,
        kernel_patch=9,
        page_shift=12,
        uflags=1,
        time=1_700_000_000_000_000_000,
        monotonic=12_345_678_900,
        boottime=12_345_678_901,
        sysname="Linux",
        nodename="somewhere",
        release="6.12.9",
        version="#1 SMP",
        machine="x86_64",
        domainname="(none)",
        engine="user",
    )


def header_x86() -> r.HeaderX86:
    return r.HeaderX86(
        xfeatures=7,
        xstate_size=832,
        cpu_vendor="GenuineIntel",
        cpu_model="Some CPU",
        cpu_flags="fpu sse avx",
        vdso_digest="ab" * 32,
    )


def tree() -> r.Tree:
    tasks = [
        pids(1, ppid=0),
        pids(2),
        pids(3, tgid=2, flags=r.TaskFlag.THREAD),
        pids(4, ppid=2, flags=r.TaskFlag.ZOMBIE),
        pids(5, ppid=99, flags=r.TaskFlag.ORPHAN),
    ]
    return r.Tree(generation=1, tasks=tasks)


def mm(objref: int = 3, pid: int = 1) -> r.Mm:
    return r.Mm(
        objref=objref,
        oom_score_adj=-17,
        start_code=TEXT,
        end_code=TEXT + 0x1000,
        start_data=TEXT + 0x2000,
        end_data=TEXT + 0x3000,
        start_brk=HEAP,
        brk=HEAP + 0x3000,
        start_stack=0x7FFD00000000,
        arg_start=1,
        arg_end=2,
        env_start=3,
        env_end=4,
        exe_objref=1,
        pid=pid,
        auxv=bytes(range(32)),
    )


def vmas(mm_objref: int = 3) -> r.Vmas:
    items = [
        vma(TEXT, 1, flags=r.VmaFlag.READ | r.VmaFlag.EXEC, kind=r.VmaKind.FILE, objref=1),
        vma(HEAP, 3, kind=r.VmaKind.HEAP, name_objref=2),
        vma(SHARED, 2, flags=r.VmaFlag.READ | r.VmaFlag.SHARED, kind=r.VmaKind.SHM, objref=4, offset=4096),
    ]
    return r.Vmas(mm_objref=mm_objref, reserved=0, vmas=items)


def file(objref: int, kind: int, *, inode: int = 0, path: str = "", **over: int) -> f.File:
    values = {
        "flags": 0o2,
        "mode": 0o100644,
        "pos": 0,
        "size": 0,
        "mtime": 1_700_000_000_000_000_000,
        "dev": 0x801,
        "ino": 4711,
        "rdev": 0,
        "owner_type": f.OwnerType.NONE,
        "owner_pid": 0,
        "owner_signal": 0,
        "lock": 0,
        "reserved": 0,
    }
    return f.File(objref=objref, kind=kind, inode_objref=inode, path=path, **{**values, **over})


def socket(objref: int, *, state: int = f.SocketState.CONNECTED, family: int = 1, peer: int = 0) -> f.Socket:
    return f.Socket(
        objref=objref,
        family=family,
        type=1,
        protocol=0,
        state=state,
        shutdown=0,
        backlog=0,
        peer_objref=peer,
        sndbuf=212992,
        rcvbuf=212992,
        buf_lock=0,
        mode=0,
        uid=0,
        gid=0,
        error=0,
        local=b"\x02\x00\x18\xeb\x0a\x00\x00\x02" + bytes(8) if family == 2 else b"",
        peer=b"\x02\x00\xc0\x01\x0a\x00\x00\x01" + bytes(8) if family == 2 else b"",
        path="",
        device="",
        congestion="cubic" if family == 2 else "",
        options=[f.SocketOption(level=1, name=9, value=1)],
    )


def socket_tcp() -> f.SocketTcp:
    return f.SocketTcp(
        socket_objref=19,
        state=1,
        rcv_seq=1000,
        snd_seq=2000,
        unsent=2,
        options=7,
        snd_wscale=7,
        rcv_wscale=7,
        mss_clamp=1460,
        timestamp=99,
        snd_wl1=998,
        snd_wnd=65535,
        max_window=65535,
        rcv_wnd=65535,
        rcv_wup=1000,
        received=b"GET k",
        sent=b"+OK\r\n",
    )


def files() -> list[Record]:
    """Inode objects 12 to 20, Files 21 to 32, table 33."""
    kind = f.FileKind
    return [
        f.Pipe(objref=12, capacity=65536),
        f.PipeBuffer(pipe_objref=12, flags=0, data=b"in flight"),
        f.EventFd(objref=13, semaphore=1, count=3),
        f.TimerFd(objref=14, clock=1, flags=0, reserved=0, ticks=0, value=5_000_000, interval=0),
        f.SignalFd(objref=15, reserved=0, mask=1 << 9),
        f.DeletedFile(objref=16, mode=0o100600, size=4099, uid=0, gid=0, path="/tmp/gone"),
        f.FileData(inode_objref=16, reserved=0, offset=4096, data=b"end"),
        socket(17, peer=18),
        socket(18, peer=17),
        f.SocketBuffer(socket_objref=18, flags=0, data=b"hello", address=b""),
        socket(19, family=2),
        socket_tcp(),
        f.PidFd(objref=20, pid=2),
        file(21, kind.REGULAR, path="/var/log/shop", pos=17, size=100, lock=2),
        file(22, kind.PIPE, inode=12, flags=0o1),
        file(23, kind.EVENTFD, inode=13),
        file(24, kind.TIMERFD, inode=14),
        file(25, kind.SIGNALFD, inode=15),
        file(26, kind.DELETED, inode=16, path="/tmp/gone"),
        file(27, kind.SOCKET, inode=17),
        file(28, kind.SOCKET, inode=18),
        file(29, kind.SOCKET, inode=19, owner_type=f.OwnerType.PROCESS, owner_pid=1, owner_signal=29),
        file(30, kind.PIDFD, inode=20),
        file(31, kind.EPOLL),
        file(32, kind.MEMFD, inode=4),
        f.FileLock(file_objref=21, pid=2, fd=0, kind=2, start=100, length=0),
        f.FileTable(
            objref=33,
            reserved=0,
            descriptors=[f.Descriptor(fd=fd, file_objref=21 + fd, cloexec=fd & 1, reserved=0) for fd in range(12)],
        ),
        f.EpollItems(
            epoll_objref=31,
            pid=2,
            items=[f.EpollItem(data=7, events=1, fd=2, file_objref=23, reserved=0)],
        ),
    ]


def body() -> list[Record]:
    """Everything but the trailer.

    Objrefs 1, 2, 4, 7, 8, 9, 10 are MappedFile, Name, Shm, Cred, Fs, Sighand and Signal;
    3, 5 and 6 are the Mms of pids 1, 2 and 5; from 12 on there are files."""
    data, zero, absent = r.PageKind.DATA, r.PageKind.ZERO, r.PageKind.ABSENT
    return [
        header(),
        header_x86(),
        r.Container(init_pid=1, name="shop", spec='{"hostname": "shop"}'),
        tree(),
        r.MappedFile(objref=1, mode=0o100755, size=4096, mtime=1, path="/usr/bin/worker", build_id="00ff"),
        r.Name(objref=2, reserved=0, text="arena \udcff"),
        mm(),
        r.Shm(objref=4, kind=r.ShmKind.MEMFD, size=3 * 4096 - 5, seals=1, mode=0o600, name="ring"),
        vmas(),
        mm(5, pid=2),
        vmas(5),
        mm(6, pid=5),
        vmas(6),
        r.RoundMark(number=1, flags=0, time=1_700_000_000_000_000_001),
        pages(3, (HEAP, 2, data), (HEAP + 2 * 4096, 1, zero)),
        pages(4, (0, 1, data), (4096, 2, absent)),
        pages(3),
        r.RoundMark(number=2, flags=1, time=1_700_000_000_000_000_002),
        pages(3, (HEAP, 1, data)),
        r.Cred(
            objref=7,
            uid=1000,
            euid=1000,
            suid=0,
            fsuid=1000,
            gid=100,
            egid=100,
            sgid=100,
            fsgid=100,
            securebits=0,
            cap_inheritable=0,
            cap_permitted=1,
            cap_effective=1,
            cap_bounding=(1 << 41) - 1,
            cap_ambient=0,
            groups=[r.Gid(gid=4, reserved=0), r.Gid(gid=24, reserved=0)],
        ),
        r.Fs(objref=8, umask=0o22, cwd="/srv", root="/"),
        r.Sighand(objref=9, reserved=0, actions=bytes(range(256)) * 8),
        r.Signal(
            objref=10,
            reserved=0,
            rlimits=[r.Rlimit(soft=1024, hard=(1 << 64) - 1)] * 16,
            itimers=[r.Itimer(value=5, interval=10)] * 3,
            timers=[
                r.PosixTimer(timer_id=0, clock=1, notify=0, signo=14, tid=0, overrun=2, sigval=7, value=9, interval=0)
            ],
        ),
        *files(),
        task(1, comm="init"),
        task(2, mm=5),
        task(3, mm=5),
        task(4, state=r.TaskState.ZOMBIE, comm="gone"),
        task(5, mm=6, state=r.TaskState.STOPPED),
        r.RestartBlock(pid=2, syscall=230, remaining=1_500_000_000, args=bytes(48)),
        r.SigPending(pid=3, shared=0, infos=bytes(128)),
        r.SigPending(pid=2, shared=1, infos=b""),
        cpu(1),
        cpu(2),
        cpu(3),
        cpu(5),
    ]


def drafted() -> list[Record]:
    """The same in revision 2: what of the state was known ahead came with the first round."""
    records = body()
    records[0].rev = 2  # type: ignore[attr-defined]
    marks = [at for at, record in enumerate(records) if isinstance(record, r.RoundMark)]
    state = [at for at, record in enumerate(records) if at > marks[1] and not isinstance(record, _ONLY_AT_LAST)]
    drafts = [records[at] for at in state]
    last = [record for at, record in enumerate(records) if at >= marks[1] and at not in state]
    end = r.RoundMark(number=1, flags=r.RoundFlag.END, time=1_700_000_000_000_000_002)
    return [*records[: marks[1]], *drafts, end, *last]


def shared() -> list[Record]:
    """What revision 3 added."""
    owner: dict[str, int] = {"uid": 5, "gid": 6, "cuid": 7, "cgid": 8}
    return [
        r.Shm(objref=50, kind=r.ShmKind.SYSV, size=8192, seals=0, mode=0o600, name="/SYSV00000007"),
        s.SharedFile(
            objref=51, kind=s.SharedFileKind.DELETED, size=5000, mtime=-1, mode=0o755, uid=1, gid=2, reserved=0,
            mount="", name="/usr/bin/daemon",
        ),
        s.SharedFile(
            objref=52, kind=s.SharedFileKind.TMPFS, size=4096, mtime=1, mode=0o600, uid=1, gid=2, reserved=0,
            mount="/dev/shm", name="/dev/shm/d/ring",
        ),
        pages(51, (0, 1, r.PageKind.DATA), (4096, 1, r.PageKind.ABSENT)),
        s.TmpfsEntry(0, 0o41777, 0, 0, 0, 1, "/dev/shm", ".", ""),
        s.TmpfsEntry(0, 0o40700, 1, 2, 0, 1, "/dev/shm", "d", ""),
        s.TmpfsEntry(52, 0o100600, 1, 2, 0, 1, "/dev/shm", "d/ring", ""),
        s.TmpfsEntry(52, 0o100600, 1, 2, 0, 1, "/dev/shm", "d/again", ""),
        s.TmpfsEntry(0, 0o120777, 1, 2, 0, 1, "/dev/shm", "link", "../to"),
        s.TmpfsEntry(0, 0o20666, 1, 2, 0x103, 1, "/dev/shm", "null", ""),
        s.TmpfsXattr(0, 0, "/dev/shm", "d/ring", "user.note", b"\0note"),
        s.SysvShm(shared_objref=50, shmid=3, key=7, mode=0o600, **owner),
        s.SysvSem(semid=4, key=8, mode=0o600, **owner, reserved=0, values=b"\1\0\2\0"),
        s.SysvQueue(msqid=5, key=9, mode=0o600, **owner, reserved=0, limit=16384),
        s.SysvMessage(msqid=5, reserved=0, kind=1, text=b"first"),
    ]  # fmt: skip


def full() -> list[Record]:
    """drafted(), and what revision 3 added."""
    records = drafted()
    records[0].rev = 3  # type: ignore[attr-defined]
    at = next(at for at, record in enumerate(records) if isinstance(record, r.Cpu))
    return [*records[:at], *shared(), *records[at:]]


def guarded() -> list[Record]:
    """full(), and what revision 4 added."""
    records = full()
    records[0].rev = 4  # type: ignore[attr-defined]
    for record in records:
        if isinstance(record, r.Task) and record.pid == 2:
            record.flags |= r.TaskBits.MEMBARRIER_PRIVATE | r.TaskBits.MEMBARRIER_RSEQ
        if isinstance(record, r.Task) and record.pid == 5:
            record.flags |= r.TaskBits.MEMBARRIER_GLOBAL | r.TaskBits.MEMBARRIER_SYNC_CORE
    at = next(at for at, record in enumerate(records) if isinstance(record, r.Cpu))
    return [*records[:at], pages(3, (HEAP + 3 * 4096, 1, r.PageKind.GUARD)), *records[at:]]


def latest() -> list[Record]:
    """owned(), and what revision 7 added."""
    records = owned()
    records[0].rev = 7  # type: ignore[attr-defined]
    nothing: dict[str, int] = {"pos": 0, "size": 0, "mtime": 0, "dev": 0, "ino": 0, "rdev": 0, "reserved": 0}
    nobody: dict[str, int] = {"owner_type": 0, "owner_pid": 0, "owner_signal": 0, "lock": 0}
    size = {"rows": 25, "columns": 80, "width": 0, "height": 0}
    termios = bytes(range(44))
    packet = f.PtyFlag.LOCKED | f.PtyFlag.PACKET | f.PtyFlag.STOPPED
    added: list[Record] = [
        f.Pty(
            objref=70, index=3, flags=packet, status=4, session=1, foreground=2, uid=1000, gid=5, mode=0o620,
            **size, termios=termios,
        ),
        f.PtyData(pty_objref=70, direction=1, end=f.PtyEnd.LINE, data=b"line\n"),
        f.PtyData(pty_objref=70, direction=1, end=f.PtyEnd.EOF, data=b""),
        f.PtyData(pty_objref=70, direction=1, end=f.PtyEnd.NONE, data=b"typ"),
        f.PtyData(pty_objref=70, direction=2, end=f.PtyEnd.NONE, data=b"shown\r\n"),
        f.Pty(
            objref=71, index=0, flags=f.PtyFlag.HUNG_UP, status=0, session=0, foreground=0, uid=0, gid=0, mode=0,
            **size, termios=b"",
        ),
        f.File(
            objref=72, kind=f.FileKind.PTY_MASTER, flags=2, mode=0o20666, **nothing, **nobody, inode_objref=70,
            path="/dev/ptmx",
        ),
        f.File(
            objref=73, kind=f.FileKind.PTY_SLAVE, flags=2, mode=0o20620, **nothing, **nobody, inode_objref=70,
            path="/dev/tty",
        ),
        f.File(
            objref=74, kind=f.FileKind.PTY_SLAVE, flags=0, mode=0o20620, **nothing, **nobody, inode_objref=71,
            path="/dev/pts/0",
        ),
    ]  # fmt: skip
    at = next(at for at, record in enumerate(records) if isinstance(record, r.Cpu))
    return [*records[:at], *added, *records[at:]]


def owned() -> list[Record]:
    """queued(), and what revision 6 added."""
    records = queued()
    records[0].rev = 6  # type: ignore[attr-defined]
    for record in records:
        if isinstance(record, r.Task) and record.pid == 5:
            record.flags |= r.TaskBits.THP_DISABLED | r.TaskBits.THP_EXCEPT_ADVISED
        if isinstance(record, r.Vmas):
            for item in record.vmas:
                if item.flags & r.VmaFlag.SHARED:
                    item.flags |= r.VmaFlag.MAY_WRITE
                else:
                    item.flags |= r.VmaFlag.LOCKED | r.VmaFlag.LOCKED_ONFAULT
    pipe = next(record for record in records if isinstance(record, f.File) and record.kind == f.FileKind.PIPE)
    at = records.index(pipe) + 1
    return [*records[:at], f.FileOwner(owned_objref=pipe.objref, reserved=0, uid=1000, gid=100), *records[at:]]


def queued() -> list[Record]:
    """guarded(), and what revision 5 added."""
    records = guarded()
    records[0].rev = 5  # type: ignore[attr-defined]
    for record in records:
        if isinstance(record, r.Task) and record.pid == 2:
            record.flags |= r.TaskBits.TSC_DENIED | r.TaskBits.MCE_EARLY | r.TaskBits.LOCK_FUTURE
        if isinstance(record, r.Task) and record.pid == 5:
            record.flags |= r.TaskBits.CPUID_DENIED | r.TaskBits.MCE_LATE | r.TaskBits.MERGE_ALL
    queue: dict[str, int] = {
        "uid": 5, "gid": 6, "max_messages": 10, "message_size": 8192, "reserved": 0, "atime": 1, "mtime": 2,
    }  # fmt: skip
    added: list[Record] = [
        s.MqQueue(objref=60, removed=1, mode=0o600, **queue, name="gone"),
        s.MqMessage(queue_objref=60, priority=0, text=b""),
        s.MqQueue(objref=61, removed=0, mode=0o640, **queue, name="jobs"),
        s.MqMessage(queue_objref=61, priority=32767, text=b"first"),
        s.MqMessage(queue_objref=61, priority=0, text=b"last"),
        f.PidFd(objref=63, pid=0),
        f.Inotify(objref=62, reserved=0),
        f.InotifyWatch(inotify_objref=62, wd=1, mask=0x100, reserved=0, path="/"),
        f.InotifyWatch(inotify_objref=62, wd=77, mask=0x84000FFF, reserved=0, path="/etc/hosts"),
    ]
    at = next(at for at, record in enumerate(records) if isinstance(record, r.Cpu))
    return [*records[:at], *added, *records[at:]]


_ONLY_AT_LAST = (r.Pages, r.Cpu, r.RestartBlock, r.SigPending)


def closed(records: Iterable[Record]) -> list[Record]:
    """`records` and the trailer that belongs to them."""
    done = [copy.deepcopy(record) for record in records]
    return [*done, r.Trailer(magic=r.TRAILER_MAGIC, nr_records=len(done) + 1)]


def stream(records: Iterable[Record]) -> bytes:
    return b"".join(record.encode() for record in records)
