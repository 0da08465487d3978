"""Many stopped tracees at once: what else costs a microsecond in Python for each request.

All must have been seized by the calling thread. An OSError names the thread that it is about.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from signal import SIGURG
from typing import NamedTuple

from migrator.linux import ptrace
from migrator.linux import x86_64 as arch
from migrator.linux.batch import Area, Column, Iovecs, each, raise_first

NR = arch.NR
_SIGNAL = int(SIGURG)  # ends a batch


class State(NamedTuple):
    """What a stopped thread is to be put back to."""

    regs: arch.Regs
    xstate: bytes
    mask: int
    rseq: ptrace.RseqConfiguration
    dispatches: bool  # see ptrace.dispatches_syscalls()


def get_all(tids: Sequence[int]) -> list[State]:
    """Registers, extended state, signal mask, rseq area and dispatch of stopped threads, all in one go."""
    if not tids:
        return []
    size = len(arch.get_xstate(tids[0]))
    regs, states, masks, areas, modes = (Area(n, len(tids)) for n in (arch.REGS_SIZE, size, 8, 24, 32))
    vectors, more = Iovecs(regs.addresses, arch.REGS_SIZE), Iovecs(states.addresses, size)
    *results, unknown = each(
        len(tids),
        (NR["ptrace"], ptrace.GETREGSET, tids, ptrace.NT_PRSTATUS, vectors.addresses),
        (NR["ptrace"], ptrace.GETREGSET, tids, ptrace.NT_X86_XSTATE, more.addresses),
        (NR["ptrace"], ptrace.GETSIGMASK, tids, 8, masks.addresses),
        (NR["ptrace"], ptrace.GET_RSEQ_CONFIGURATION, tids, 24, areas.addresses),
        (NR["ptrace"], ptrace.GET_SYSCALL_USER_DISPATCH_CONFIG, tids, 32, modes.addresses),
    )
    for name, result in zip(("regs", "xstate", "sigmask", "rseq"), results, strict=True):
        raise_first(result, f"ptrace of {name}", [f"tid {tid}" for tid in tids])
    return [
        State(
            arch.Regs.from_buffer_copy(regs.view, i * regs.stride),
            states.get(i, size),
            struct.unpack_from("<Q", masks.view, 8 * i)[0],
            ptrace.RseqConfiguration(*struct.unpack_from("<QIII", areas.view, 24 * i)),
            not unknown[i] and bool(modes.view[modes.stride * i]),
        )
        for i in range(len(tids))
    ]


def set_all(tids: Sequence[int], regs: Sequence[arch.Regs], masks: Sequence[int], *, go_on: bool = False) -> None:
    """Signal masks, then registers of stopped threads, all in one go.

    `go_on`: registers, then signal masks, then they run. In this order each leads back by itself if we die."""
    if not tids:
        return
    vectors = Iovecs([ctypes.addressof(r) for r in regs], arch.REGS_SIZE)
    words = array("Q", masks)
    start = words.buffer_info()[0]
    calls: list[Sequence[Column]] = [
        (NR["ptrace"], ptrace.SETREGSET, tids, ptrace.NT_PRSTATUS, vectors.addresses),
        (NR["ptrace"], ptrace.SETSIGMASK, tids, 8, range(start, start + 8 * len(tids), 8)),
    ]
    if go_on:
        calls.append((NR["ptrace"], ptrace.CONT, tids, 0, 0))
    else:
        calls.reverse()
    for result in each(len(tids), *calls):
        raise_first(result, "ptrace of registers", [f"tid {tid}" for tid in tids])


def set_all_xstates(tids: Sequence[int], states: Sequence[bytes]) -> list[int]:
    """Extended state of stopped threads in one go: 0, or a negative errno, of each."""
    size = max(map(len, states), default=0)
    area = Area(size, len(tids))
    for i, state in enumerate(states):
        area.put(i, state)
    vectors = Iovecs(area.addresses, [len(state) for state in states])
    (results,) = each(len(tids), (NR["ptrace"], ptrace.SETREGSET, tids, ptrace.NT_X86_XSTATE, vectors.addresses))
    return results


def wait_all(tids: Sequence[int]) -> list[int]:
    """Wait for the next stop or end of each; the wait(2) statuses."""
    statuses = Area(4, len(tids))
    (got,) = each(len(tids), (NR["wait4"], tids, statuses.addresses, ptrace.WALL, 0), blocking=True)
    words = statuses.view.cast("i")[::2].tolist()
    return [word if who == tid else ptrace.wait(tid) for tid, who, word in zip(tids, got, words, strict=False)]


def detach_all(tids: Sequence[int]) -> list[int]:
    """Let go of them: 0, or a negative errno, of each."""
    (results,) = each(len(tids), (NR["ptrace"], ptrace.DETACH, tids, 0, 0))
    return results


@dataclass(slots=True)
class Run:
    """Calls that lie in the memory of a stopped thread, to be made by it; `context`: see Remote.start()."""

    tid: int
    regs: arch.Regs
    code: int
    table: int
    count: int
    context: int = 0


def run_all(runs: Sequence[Run], *, ending: int = _SIGNAL) -> dict[int, int]:
    """Have many threads make their calls at the same time; those that stopped by anything else: tid -> wait status.

    `ending`: the signal that ends the calls of each.
    Registers and signal masks stay what the calls needed: the caller puts them back. The threads are stopped again."""
    if not runs:
        return {}
    tids = [run.tid for run in runs]
    regs = [arch.batch_regs(r.regs, r.code, r.table, r.count, ending, r.context) for r in runs]
    mask = ~(1 << (ending - 1)) & arch.MINUS_ONE
    set_all(tids, regs, [mask] * len(tids), go_on=True)
    odd = {}
    for tid, status in zip(tids, wait_all(tids), strict=True):
        while ptrace.is_stop(status) and ptrace.stop_event(status) == ptrace.EVENT_STOP:
            ptrace.cont(tid)  # a late PTRACE_INTERRUPT, or a group stop
            status = ptrace.wait(tid)
        if not ptrace.is_stop(status) or ptrace.stop_signal(status) != ending:
            odd[tid] = status
    return odd
