"""Waits with a time limit, on the source: which call a stopped task sits in, and how much of it is left.

The kernel keeps the end of an interrupted sleep to itself (struct restart_block). What can be seen:

- nanosleep(2) and clock_nanosleep(2) write the time left to their last argument, if it is given;
- a call that was restarted once shows as restart_syscall(2): its number is in the code ahead of the
  `syscall` instruction, or known from when it was seen before;
- the scheduler knows when a task ran last (`se.exec_start`): there its wait began, if it has not been
  woken since, which the count of its voluntary switches tells.

What is not known for sure is taken as the whole time: a wait may become longer, and never shorter.
"""

from __future__ import annotations

import os
import re
import struct
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from migrator.image.records import RestartBlock
from migrator.linux import memory, procfs
from migrator.linux import x86_64 as arch
from migrator.linux.remote import interrupted_call

_NR = arch.NR
RESTART_BLOCK = -516
_EPOLL = (_NR["epoll_wait"], _NR["epoll_pwait"])
_TIMED = {_NR["nanosleep"], _NR["clock_nanosleep"], _NR["poll"], _NR["futex"], *_EPOLL, _NR["restart_syscall"]}
_FUTEX_WAIT, _FUTEX_CMD = 0, 0x7F
_TIMER_ABSTIME = 1
_LONGEST = 1 << 62
_CALIBRATION = 10**9  # ns that it holds
_MARGIN = 500_000  # ns by which the scheduler's clock may differ from the one that we calibrate with
_SCHED = re.compile(r"se\.exec_start\s*:\s*(\d+)\.(\d+)\n.*?nr_voluntary_switches\s*:\s*(\d+)", re.DOTALL)


@dataclass(slots=True)
class Wait:
    """A call that a task was seen in: `place` is its stack pointer, its program counter and its arguments."""

    number: int
    place: tuple[int, ...]
    began: int  # ns of CLOCK_MONOTONIC
    switches: int  # voluntary switches of the task while it sits in it


class RestartBlocks:
    """What was seen of waiting tasks, by tid."""

    def __init__(self) -> None:
        self._seen: dict[int, Wait] = {}
        self._offsets: dict[int, tuple[int, int]] = {}  # by processor, and when each was found: see _clock_offset()
        self._stopped_at = 0

    def stopped(self) -> None:
        """All tasks stand still: what block() says from now on is how it is now."""
        self._stopped_at = time.monotonic_ns()

    def observe(self, pid: int, tid: int) -> None:
        """Look at a task that runs, just before it is stopped. Never raises."""
        try:
            words = procfs.read_text(f"/proc/{pid}/task/{tid}/syscall").split()
            if len(words) != 9 or not _is_limited(int(words[0]), [int(w, 16) for w in words[1:7]]):
                self._seen.pop(tid, None)
                return
            number = int(words[0])
            place = (int(words[7], 16), int(words[8], 16), *(int(w, 16) for w in words[1:7]))
            ran, switches = _last_ran(pid, tid)
            offset = self._clock_offset(pid, tid, ran)
        except (OSError, ValueError):
            self._seen.pop(tid, None)
            return
        known = self._seen.get(tid)
        if number == _NR["restart_syscall"] and known is not None and known.place == place:
            number = known.number
            if known.switches == switches:
                return  # the same wait as before, begun when it was seen first
        self._seen[tid] = Wait(number, place, ran + offset, switches)

    def interrupted(self, pid: int, tid: int) -> None:
        """We stopped the task and are about to let it go on: it wakes once more by that. Never raises."""
        known = self._seen.get(tid)
        if known is not None:
            try:
                known.switches = _last_ran(pid, tid)[1] + 1
            except OSError:
                del self._seen[tid]

    def confirm(self, pid: int, tids: Iterable[int]) -> None:
        """Right after tasks were stopped: forget those that were awake since they were seen."""
        for tid in tids:
            known = self._seen.get(tid)
            if known is not None:
                try:
                    if _last_ran(pid, tid)[1] == known.switches + 1:
                        continue
                except OSError:
                    pass
                del self._seen[tid]

    def shorten(self, pid: int, tid: int, regs: arch.Regs) -> None:
        """A stopped task goes on with `regs`: a wait that is then made again takes what is left of it.

        Only for epoll_wait(2), whose limit is in a register; the kernel sees to the others itself."""
        number, _ = arch.interrupted_call(regs)
        if number in _EPOLL:
            _, block = self.block(pid, tid, tid, regs)
            if block is not None and block.remaining >= 0:
                regs.r10 = -(-block.remaining // 1_000_000)

    def block(self, pid: int, tid: int, vtid: int, regs: arch.Regs) -> tuple[arch.Regs, RestartBlock | None]:
        """The registers to save of a stopped task, and its restart block if it sits in a timed wait."""
        number, code = arch.interrupted_call(regs)
        known = self._seen.get(tid)
        if number not in _TIMED:
            return regs, None
        r = regs
        args = (r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9)
        if known is not None and known.place != (r.rsp, r.rip, *args):
            known = None
        if number == _NR["restart_syscall"]:
            number = interrupted_call(pid, regs)
            if number not in _TIMED or number == _NR["restart_syscall"]:
                number = -1
            if number < 0 and known is not None and known.number != _NR["restart_syscall"]:
                number = known.number
            if number < 0:  # nobody can tell what it was: the program is told that it was interrupted
                regs = regs.copy()
                regs.rax, regs.orig_rax = -4 & arch.MINUS_ONE, arch.MINUS_ONE
                return regs, None
            regs = regs.copy()
            regs.orig_rax = number
        if code != RESTART_BLOCK and number not in _EPOLL:
            return regs, None
        remaining = _written(pid, number, args)
        if remaining < 0:
            remaining = self._reckoned(pid, number, args, known)
        return regs, RestartBlock(vtid, number, remaining, struct.pack("<6Q", *args))

    def _reckoned(self, pid: int, number: int, args: tuple[int, ...], known: Wait | None) -> int:
        whole = _whole(pid, number, args)
        if whole < 0 or known is None:
            return whole
        now = self._stopped_at or time.monotonic_ns()
        return max(0, whole - max(0, now - known.began - _MARGIN))

    def _clock_offset(self, pid: int, tid: int, ran: int) -> int:
        """ns from the scheduler's clock of the processor that a task ran on last, at `ran`, to CLOCK_MONOTONIC; rather
        too many.

        Each processor has its own: it leaves out what interrupts and the hypervisor take. So it only falls behind, and
        what it was found to be behind by *after* the task ran is not less than what it was then."""
        cpu = int(procfs.stat(pid, tid)[39])
        offset, when = self._offsets.get(cpu, (0, 0))
        now = time.monotonic_ns()
        if not when or now - when > _CALIBRATION or ran + offset >= when:
            home = os.sched_getaffinity(0)
            try:
                os.sched_setaffinity(0, {cpu})  # which brings our own `exec_start` up to date as well
                ours, _ = _last_ran(os.getpid(), threading.get_native_id())
                when = time.monotonic_ns()  # after it was read: who is held up in between makes the wait longer
            finally:
                os.sched_setaffinity(0, home)
            offset = when - ours
            self._offsets[cpu] = offset, when
        return offset


def _is_limited(number: int, args: list[int]) -> bool:
    """Whether a call is, or may be, a wait with a limit whose rest the kernel does not tell."""
    if number == _NR["nanosleep"]:
        return not args[1]
    if number == _NR["clock_nanosleep"]:
        return not args[3] and not args[1] & _TIMER_ABSTIME
    if number == _NR["futex"]:
        return bool(args[3]) and args[1] & _FUTEX_CMD == _FUTEX_WAIT
    return number in _TIMED


def _last_ran(pid: int, tid: int) -> tuple[int, int]:
    """(when a task ran last in ns of the scheduler's clock, its voluntary switches); OSError."""
    found = _SCHED.search(procfs.read_text(f"/proc/{pid}/task/{tid}/sched"))
    if found is None:
        raise OSError(2, "the scheduler does not say when a task ran", f"tid {tid}")
    return int(found[1]) * 1_000_000 + int(found[2]), int(found[3])


def _written(pid: int, number: int, args: tuple[int, ...]) -> int:
    """ns left as the kernel wrote them into the caller's memory; -1 if it was not asked to."""
    if number == _NR["clock_nanosleep"] and args[1] & _TIMER_ABSTIME:
        return -1
    pointer = {_NR["nanosleep"]: args[1], _NR["clock_nanosleep"]: args[3]}.get(number, 0)
    return _timespec(pid, pointer)


def _whole(pid: int, number: int, args: tuple[int, ...]) -> int:
    """ns that a relative wait was to take from its beginning; -1 if it has no limit, or an absolute one."""
    if number == _NR["nanosleep"]:
        return _timespec(pid, args[0])
    if number == _NR["clock_nanosleep"]:
        return -1 if args[1] & _TIMER_ABSTIME else _timespec(pid, args[2])
    if number == _NR["futex"]:
        return _timespec(pid, args[3]) if args[1] & _FUTEX_CMD == _FUTEX_WAIT else -1
    if number in (_NR["poll"], *_EPOLL):
        (ms,) = struct.unpack("<i", struct.pack("<I", args[2 if number == _NR["poll"] else 3] & 0xFFFFFFFF))
        return ms * 1_000_000 if ms >= 0 else -1
    return -1


def _timespec(pid: int, pointer: int) -> int:
    if not pointer:
        return -1
    try:
        seconds, ns = struct.unpack("<qq", memory.read(pid, pointer, 16))
    except OSError:
        return -1
    return min(seconds * 10**9 + ns, _LONGEST) if seconds >= 0 and ns >= 0 else -1
