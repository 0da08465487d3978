"""What is not carried, of what only a task itself can find out: see migrator.engine.user.dump.parasite."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Mapping, Sequence

from migrator.engine.user.dump.parasite import ARCH_GET_XCOMP_PERM, ProcessReply, ThreadReply
from migrator.engine.user.dump.process import Process
from migrator.errors import CheckpointFailed
from migrator.linux import sys
from migrator.linux.x86_64 import NR


def refuse_asked(
    process: Process, state: Mapping[str, str], reply: ProcessReply, threads: Sequence[ThreadReply]
) -> None:
    """Raises CheckpointFailed if there is any in what a process and its threads said; `state` is its status."""
    for reason in _obstacles(reply, threads):
        raise CheckpointFailed(
            f"pid {process.pid} ({state['Name']}) {reason}, which is not carried",
            hint="the workload runs on; start it without that, if it can be told to",
        )


def _obstacles(process: ProcessReply, threads: Sequence[ThreadReply]) -> Iterator[str]:
    if process.keyring or any(thread.keyring for thread in threads):
        yield "has a keyring of its own (keyrings(7))"
    if process.xcomp & ~_usual_features():
        yield "may use registers that have to be asked for, as AMX (ARCH_REQ_XCOMP_PERM)"
    if process.tags:
        yield "has addresses with tags (ARCH_ENABLE_TAGGED_ADDR)"
    if process.ldt:
        yield "has a table of segments (modify_ldt(2))"


@functools.cache
def _usual_features() -> int:
    """Features of the extended state that every process may use: we have asked for no other."""
    answer = ctypes.c_uint64()
    try:
        sys.call(NR["arch_prctl"], ARCH_GET_XCOMP_PERM, ctypes.addressof(answer))
    except OSError:
        return -1
    return answer.value
