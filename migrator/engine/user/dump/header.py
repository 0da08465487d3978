"""The two records that open every stream."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time

from migrator.engine.base import SourceOptions
from migrator.engine.stream import RecordWriter
from migrator.errors import CheckpointFailed
from migrator.image.records import MAGIC, REV, Arch, Header, HeaderX86
from migrator.linux import memory, procfs
from migrator.linux import x86_64 as arch


def write(writer: RecordWriter, pid: int, options: SourceOptions) -> None:
    uname = os.uname()
    numbers = [int(n) for n in re.findall(r"\d+", uname.release)[:3]] + [0, 0, 0]
    theirs, ours = clock_offsets(pid), clock_offsets(os.getpid())
    writer.write(
        Header(
            magic=MAGIC,
            arch_id=Arch.X86_64,
            rev=REV,
            kernel_major=numbers[0],
            kernel_minor=numbers[1],
            kernel_patch=numbers[2],
            page_shift=12,
            uflags=1 if options.subtree else 0,
            time=time.time_ns(),
            monotonic=time.monotonic_ns() + theirs[0] - ours[0],
            boottime=time.clock_gettime_ns(time.CLOCK_BOOTTIME) + theirs[1] - ours[1],
            sysname=uname.sysname,
            nodename=uname.nodename,
            release=uname.release,
            version=uname.version,
            machine=uname.machine,
            domainname="",
            engine="user",
        )
    )
    cpu = cpu_facts()
    features, size = xstate_facts()
    writer.write(HeaderX86(features, size, cpu["vendor"], cpu["model"], cpu["flags"], vdso_digest(pid)))


def clock_offsets(pid: int) -> tuple[int, int]:
    """(monotonic, boottime): ns that the time namespace of a task adds to the clocks of the initial one."""
    offsets = {"monotonic": 0, "boottime": 0}
    with contextlib.suppress(FileNotFoundError):  # a kernel without time namespaces
        for line in procfs.read_text(f"/proc/{pid}/timens_offsets").split("\n"):
            fields = line.split()
            if len(fields) == 3 and fields[0] in offsets:
                offsets[fields[0]] = int(fields[1]) * 10**9 + int(fields[2])
    return offsets["monotonic"], offsets["boottime"]


def cpu_facts() -> dict[str, str]:
    """vendor, model and flags of the first processor, from /proc/cpuinfo."""
    out = {"vendor": "", "model": "", "flags": ""}
    names = {"vendor_id": "vendor", "model name": "model", "flags": "flags"}
    for line in procfs.read_text("/proc/cpuinfo").split("\n"):
        key, _, value = line.partition(":")
        if key.strip() in names:
            out.setdefault(names[key.strip()], "")
            out[names[key.strip()]] = value.strip()
        if not line:
            break
    return out


def xstate_facts() -> tuple[int, int]:
    """(features, size in bytes) of the extended state. Read from a task of our own: all have the same."""
    from migrator.engine.user.restore.spawn import probe_xstate

    xstate = probe_xstate()
    return arch.xfeatures(xstate), len(xstate)


def vdso_digest(pid: int) -> str:
    """sha256 of the vdso's bytes, hex; "" where the kernel gives none. Raises CheckpointFailed for a task that ends."""
    vmas = procfs.maps(pid)
    if not vmas:  # of one that is killed, before it is a zombie
        raise CheckpointFailed(f"pid {pid} has ended")
    for vma in vmas:
        if vma.path == "[vdso]":
            return hashlib.sha256(memory.read(pid, vma.start, vma.end - vma.start)).hexdigest()
    return ""
