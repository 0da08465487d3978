"""A small stream with every kind of record, always the same: for golden images and tests."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable

from migrator.image import records as r
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
        files_objref=0,
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


def body() -> list[Record]:
    """Everything but the trailer.

    Objrefs 1, 2, 4, 7, 8, 9, 10 are MappedFile, Name, Shm, Cred, Fs, Sighand and Signal;
    3, 5 and 6 are the Mms of pids 1, 2 and 5."""
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
                r.PosixTimer(
                    timer_id=0, clock=1, notify=0, signo=14, tid=0, overrun=2, sigval=7, value=9, interval=0
                )
            ],
        ),
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


def closed(records: Iterable[Record]) -> list[Record]:
    """`records` and the trailer that belongs to them."""
    done = [copy.deepcopy(record) for record in records]
    return [*done, r.Trailer(magic=r.TRAILER_MAGIC, nr_records=len(done) + 1)]


def stream(records: Iterable[Record]) -> bytes:
    return b"".join(record.encode() for record in records)
