"""The two records that open every stream."""

from __future__ import annotations

import os
import re
import time

from migrator.engine import processor
from migrator.engine.base import SourceOptions
from migrator.engine.clocks import clock_offsets
from migrator.engine.stream import RecordWriter
from migrator.errors import CheckpointFailed
from migrator.image.records import MAGIC, REV, Arch, Header, HeaderX86
from migrator.linux import vdso


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
    cpu = processor.cpu_facts()
    features, size = processor.xstate_facts()
    try:
        code = vdso.digest(pid)
    except ProcessLookupError as error:
        raise CheckpointFailed(f"pid {pid} has ended") from error
    writer.write(HeaderX86(features, size, cpu["vendor"], cpu["model"], cpu["flags"], code))
