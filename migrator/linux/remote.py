"""Calling system calls inside another process.

A stopped tracee can be made to run any system call. The first one goes through the `syscall` instruction
that every process has in its vdso; it maps a scratch area, and from then on whole tables of calls run in
one go, at about a microsecond a call.

    remote = Remote(pid)                    # the tracee is in a ptrace stop
    with remote.borrowed():                 # registers and signal mask are put back at the end
        remote.map_scratch(65536)
        results = remote.batch([(nr, a0, a1), ...])
        remote.unmap_scratch()

If the tracer dies inside the block, the tracee finishes its calls and returns by itself to where it was
(migrator.linux.x86_64.signal_context), if it was seized with O_TRACESYSGOOD: without, the kernel sends it
SIGTRAP instead. Registers are always changed ahead of the signal mask, and put back
after it, so that whatever was changed is undone by that return. The calls without a scratch area need a
stack to return from; a thread that is not on the process's own stack goes without that for some
microseconds. All calls must come from the thread that seized the tracee.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from signal import SIGCHLD, SIGURG, SIGWINCH

from migrator.linux import memory, procfs, ptrace
from migrator.linux import x86_64 as arch

_PROT_RWX, _MAP_PRIVATE_ANONYMOUS, _MAP_FIXED_NOREPLACE = 7, 0x22, 0x100000
_CODE_SIZE = 256
_TABLE_SIZE = 16384
# Ignored by default. SIGURG is what Go's and PostgreSQL's tasks send one another all the time; nobody sends SIGWINCH
# where there is no terminal.
BATCH_SIGNALS = (int(SIGWINCH), int(SIGURG), int(SIGCHLD))
_MOST_CODE = 8 << 20
_SIGSTOP = 19
_FEW_SIGNALS = 64  # up to which they are looked at one by one
_REST = [(0,) * (8 - length) for length in range(9)]

Call = Sequence[int]


class RemoteError(OSError):
    """A system call inside a tracee failed. `errno` is the tracee's."""


def find_syscall_instruction(pid: int) -> int:
    """The address of a `syscall` instruction in the vdso of a process."""
    for vma in procfs.maps(pid):
        if vma.path == "[vdso]":
            at = memory.read(pid, vma.start, vma.end - vma.start).find(arch.SYSCALL_INSTRUCTION)
            if at >= 0:
                return vma.start + at
    raise RemoteError(2, "no syscall instruction in the vdso", f"pid {pid}")


@dataclass(frozen=True, slots=True)
class WayBack:
    """Code of the process itself by which a single call returns: `syscall; ret`, then rt_sigreturn."""

    call: int
    restorer: int
    stack: tuple[int, int]  # the process's own stack


_found: dict[tuple[str, int, int], tuple[int, int]] = {}  # offsets by file


def find_way_back(pid: int) -> WayBack | None:
    """Look for it in the programs that are mapped; takes about a millisecond for the first of its kind."""
    stack = (0, 0)
    call = restorer = -1
    for vma in procfs.maps(pid):
        if vma.path == "[stack]":
            stack = (vma.start, vma.end)
        if not (vma.execute and vma.read and vma.inode and vma.path.startswith("/")):
            continue
        key = (vma.device, vma.inode, vma.offset)
        offsets = _found.get(key)
        if offsets is None:
            size = min(vma.end - vma.start, _MOST_CODE)
            try:
                code = memory.read(pid, vma.start, size)
            except OSError:
                continue
            offsets = code.find(arch.SYSCALL_RETURN), max(code.find(c) for c in arch.RESTORERS)
            _found[key] = offsets
        if call < 0 <= offsets[0]:
            call = vma.start + offsets[0]
        if restorer < 0 <= offsets[1]:
            restorer = vma.start + offsets[1]
        if call >= 0 and restorer >= 0 and stack[1]:
            break
    return WayBack(call, restorer, stack) if call >= 0 and restorer >= 0 else None


class Remote:
    """System calls inside the process of tracee `tid`, which must be in a ptrace stop while they are made."""

    def __init__(self, pid: int, tid: int | None = None) -> None:
        self.pid = pid
        self.tid = pid if tid is None else tid
        self.scratch = 0
        self.scratch_size = 0
        self.instruction = 0
        self.survivable = True
        self.way_back: WayBack | None = None
        self._regs: arch.Regs | None = None
        self._mask = 0
        self._xstate = b""
        self._mask_set = self._stop_again = False
        self._signal = int(SIGURG)
        self._context_written = False

    @contextmanager
    def borrowed(
        self, *, regs: arch.Regs | None = None, mask: int | None = None, xstate: bytes = b""
    ) -> Iterator[Remote]:
        """Borrow the thread. `regs`, `mask` and `xstate`, where known already, save requests."""
        tid = self.tid
        self._xstate = xstate
        if not self.survivable:  # nothing to give back, and the mask stays what it is
            if self._regs is None:
                self._regs = arch.get_regs(tid)
            yield self
            return
        self._regs = regs if regs is not None else arch.get_regs(tid)
        self._mask = mask if mask is not None else ptrace.get_sigmask(tid)
        self._signal = free_signal([tid])
        self._mask_set = self._context_written = False
        try:
            yield self
        finally:
            if self._mask_set:
                ptrace.set_sigmask(tid, self._mask)
            arch.set_regs(tid, self._regs)
            self._regs = None
            if self._stop_again:
                self._stop_again = False
                os.kill(self.pid, _SIGSTOP)

    def prepare(self) -> None:
        """Look for code to call by, while the process runs: confirm() then takes microseconds."""
        self.instruction = find_syscall_instruction(self.pid)
        self.way_back = find_way_back(self.pid)

    def confirm(self) -> None:
        """Once it is stopped: look again if it has become another program since prepare()."""
        try:
            same = memory.read(self.pid, self.instruction, 2) == arch.SYSCALL_INSTRUCTION
            way = self.way_back
            if same and way is not None:
                same = memory.read(self.pid, way.call, 3) == arch.SYSCALL_RETURN
                same = same and any(memory.read(self.pid, way.restorer, len(c)) == c for c in arch.RESTORERS)
        except OSError:
            same = False
        if not same:
            self.prepare()

    def _block_signals(self) -> None:
        if not self._mask_set:
            ptrace.set_sigmask(self.tid, ~(1 << (self._signal - 1)) & arch.MINUS_ONE)
            self._mask_set = True

    def end_batches_by(self, signal: int) -> None:
        """Batches of a thread that dies with its tracer end by `signal` from now on; none of that number waits."""
        self._signal, self._mask_set = signal, False

    def call(self, number: int, *args: int) -> int:
        """One system call through the vdso; negative errno on error. Works without a scratch area."""
        assert self._regs is not None, "not inside borrowed()"
        if not self.survivable:
            self.begin_call(number, *args)
            return self.end_call()
        self.find_instruction()
        instruction, stack = self._on_the_way_back() or (self.instruction, 0)
        arch.start_call(self.tid, self._regs, instruction, number, args, stack)
        self._block_signals()
        ptrace.until_syscall(self.tid)
        return self.end_call()

    def find_instruction(self) -> None:
        """Look for what call() goes through, unless it is known."""
        if not self.instruction:
            self.instruction = find_syscall_instruction(self.pid)

    def begin_call(self, number: int, *args: int) -> None:
        """call() of one that is not to survive us, in two halves: others can make theirs meanwhile."""
        assert self._regs is not None and not self.survivable
        self.find_instruction()
        arch.start_call(self.tid, self._regs, self.instruction, number, args)
        self._block_signals()
        ptrace.until_syscall(self.tid)

    def end_call(self) -> int:
        """What the call of begin_call() returned.

        Stopped at the entry, the thread is asked to stop again: that comes when the call is done and before the
        program runs. Nothing of it outlives a tracer that dies, and it takes no SIGTRAP, as a single step would."""
        self._expect(ptrace.SYSCALL_STOP, ptrace.until_syscall)
        ptrace.interrupt(self.tid)
        ptrace.cont(self.tid)
        self._expect(0)
        return arch.result(arch.get_regs(self.tid))

    def _on_the_way_back(self) -> tuple[int, int] | None:
        """(instruction, stack pointer) from which the thread returns by itself, if that can be."""
        way = self.way_back
        if way is None or not self.survivable:
            return None
        assert self._regs is not None
        low, high = way.stack
        xstate = self._xstate or arch.get_xstate(self.tid)
        address = (self._regs.rsp - arch.RED_ZONE - arch.CONTEXT_SIZE - len(xstate) - 64) & ~63
        if not low + 8 <= address < self._regs.rsp < high:
            return None
        frame = way_of_return(self.pid, self._regs, xstate, self._mask, address)
        memory.write(self.pid, address - 8, struct.pack("<Q", way.restorer) + frame)
        return way.call, address - 8

    def map_scratch(self, size: int, address: int = 0, *, reserved: int = 0) -> int:
        """Map the scratch area: code, context and table first, then memory for whoever asks.

        The last `reserved` bytes are not given out by put(): they are the caller's."""
        flags = _MAP_PRIVATE_ANONYMOUS | (_MAP_FIXED_NOREPLACE if address else 0)
        got = self.call(arch.NR["mmap"], address, size, _PROT_RWX, flags, -1, 0)
        if -4096 < got < 0:
            raise RemoteError(-got, f"mmap of {size} bytes of scratch: {os.strerror(-got)}", f"pid {self.pid}")
        self.adopt_scratch(got, size, reserved=reserved)
        memory.write(self.pid, got, arch.BATCH_CODE)
        return got

    def adopt_scratch(self, address: int, size: int, *, reserved: int = 0) -> None:
        """Use a scratch area that is there already (after a fork, or from another thread)."""
        self.scratch, self.scratch_size = address, size
        self._context = address + _CODE_SIZE
        self.table = address + _TABLE_SIZE
        self.data = address + 2 * _TABLE_SIZE
        self.data_size = size - 2 * _TABLE_SIZE - reserved
        self.max_calls = _TABLE_SIZE // arch.BATCH_ENTRY

    def unmap_scratch(self) -> None:
        """Unmap it again: the last call inside the block."""
        self._unmapped(self.call(arch.NR["munmap"], self.scratch, self.scratch_size))

    def begin_unmap(self) -> None:
        """unmap_scratch() of one that is not to survive us, in two halves."""
        self.begin_call(arch.NR["munmap"], self.scratch, self.scratch_size)

    def end_unmap(self) -> None:
        self._unmapped(self.end_call())

    def _unmapped(self, result: int) -> None:
        if result < 0:
            raise RemoteError(-result, "munmap of the scratch area", f"pid {self.pid}")
        self.scratch = 0

    def put(self, data: bytes, offset: int = 0) -> int:
        """Write `data` into the scratch area's free part; its address there."""
        if offset + len(data) > self.data_size:
            raise RemoteError(12, f"{len(data)} bytes do not fit the scratch area", f"pid {self.pid}")
        if data:
            memory.write(self.pid, self.data + offset, data)
        return self.data + offset

    def get(self, size: int, offset: int = 0) -> bytes:
        return memory.read(self.pid, self.data + offset, size)

    def batch(self, calls: Sequence[Call]) -> list[int]:
        """Make all `calls` (number, arguments...) in order; their results, negative errno on error."""
        out: list[int] = []
        for first in range(0, len(calls), self.max_calls):
            out += self._batch(calls[first : first + self.max_calls])
        return out

    def sweep(self, number: int, firsts: Sequence[int], second: int) -> list[int]:
        """Make call `number` with each of `firsts`, and `second`, in one go; the table fills the free part."""
        count = len(firsts)
        table = array("Q", bytes(arch.BATCH_ENTRY * count))
        table[0::8], table[1::8] = array("Q", [number]) * count, array("Q", firsts)
        table[2::8] = array("Q", [second]) * count
        self.start(count, self.put(table.tobytes()))
        self.finish()
        return memoryview(self.get(arch.BATCH_ENTRY * count)).cast("q")[7::8].tolist()

    def checked(self, calls: Sequence[Call]) -> list[int]:
        """As batch(), but the first failed call raises RemoteError."""
        return self._check(calls, self.batch(calls))

    def begin(self, calls: Sequence[Call]) -> None:
        """Let the thread begin with `calls`, at most `max_calls`; others can meanwhile."""
        memory.write(self.pid, self.table, pack_calls(calls))
        self.start(len(calls))

    def end(self, calls: Sequence[Call]) -> list[int]:
        """As checked(), of what was begun."""
        return self._check(calls, self._results(calls))

    def _check(self, calls: Sequence[Call], results: list[int]) -> list[int]:
        for call, result in zip(calls, results, strict=True):
            if -4096 < result < 0:
                raise RemoteError(-result, f"{name_of(call[0])}: {os.strerror(-result)}", describe(self.pid, call))
        return results

    def _batch(self, calls: Sequence[Call]) -> list[int]:
        self.begin(calls)
        return self._results(calls)

    def _results(self, calls: Sequence[Call]) -> list[int]:
        self.finish()
        return self.results(len(calls))

    def results(self, count: int) -> list[int]:
        """What the first `count` calls of the table returned."""
        raw = memory.read(self.pid, self.table, arch.BATCH_ENTRY * count)
        return list(struct.unpack(f"<{8 * count}q", raw)[7::8])

    def start(self, count: int, table: int = 0) -> None:
        """Let the thread run `count` prepared entries; finish() waits for their end."""
        assert self._regs is not None, "not inside borrowed()"
        context = 0
        if self.survivable:
            context = (self._context + 63) & ~63
            if not self._context_written:
                xstate = self._xstate or arch.get_xstate(self.tid)
                frame = way_of_return(self.pid, self._regs, xstate, self._mask, context)
                memory.write(self.pid, context, frame)
                self._context_written = True
        arch.start_batch(self.tid, self._regs, self.scratch, table or self.table, count, self._signal, context)
        self._block_signals()
        ptrace.cont(self.tid)

    def finish(self) -> None:
        """Wait for the end of a table, or for a call in it that sends the thread `signal`: go_on() from there."""
        self._expect(self._signal)

    def go_on(self) -> None:
        ptrace.cont(self.tid)

    @property
    def signal(self) -> int:
        """By which tables end."""
        return self._signal

    def _expect(self, signal: int, go_on: Callable[[int], None] = ptrace.cont) -> None:
        while True:
            status = ptrace.wait(self.tid)
            if not ptrace.is_stop(status):
                raise RemoteError(3, f"ended while borrowed (wait status {status:#x})", f"tid {self.tid}")
            got, event = ptrace.stop_signal(status), ptrace.stop_event(status)
            if event == ptrace.EVENT_STOP:
                if not signal:
                    return
                go_on(self.tid)  # a late PTRACE_INTERRUPT, or a group stop
                continue
            if got == signal:
                return
            if got == _SIGSTOP and not event:  # the one that no mask holds back: sent again at the end
                self._stop_again = True
                go_on(self.tid)
                continue
            regs = arch.get_regs(self.tid)
            raise RemoteError(4, f"stopped by signal {got} at {regs.rip:#x} while borrowed", f"tid {self.tid}")


def waiting_signals(infos: bytes) -> set[int]:
    """The numbers of signals, as ptrace.peek_siginfo() gives them."""
    return {int(struct.unpack_from("<i", infos, at)[0]) for at in range(0, len(infos), ptrace.SIGINFO_SIZE)}


def _waiting(tid: int, *, shared: bool) -> set[int]:
    infos = ptrace.peek_siginfo(tid, shared=shared, most=_FEW_SIGNALS)
    if len(infos) < _FEW_SIGNALS * ptrace.SIGINFO_SIZE:
        return waiting_signals(infos)
    mask = int(procfs.status(tid)["ShdPnd" if shared else "SigPnd"], 16)
    return {signal for signal in range(1, 65) if mask >> (signal - 1) & 1}


def free_signal(tids: Sequence[int]) -> int:
    """A signal that waits for none of these threads of a process, all of them stopped: a batch may end by it."""
    waiting = _waiting(tids[0], shared=True)
    for tid in tids:
        waiting |= _waiting(tid, shared=False)
    for signal in BATCH_SIGNALS:
        if signal not in waiting:
            return signal
    raise RemoteError(16, f"all of signals {BATCH_SIGNALS} wait, and one is needed", f"tid {tids[0]}")


def interrupted_call(pid: int, regs: arch.Regs) -> int:
    """The number of the system call that a stop interrupted and that is to be made again, or -1.

    A call that was restarted before shows as restart_syscall(2): its own number is in the code."""
    number, _ = arch.interrupted_call(regs)
    if number == arch.NR["restart_syscall"]:
        try:
            found = arch.call_number(memory.read(pid, regs.rip - 7, 7))
        except OSError:
            found = -1
        return found if found >= 0 else number
    return number


def way_of_return(pid: int, regs: arch.Regs, xstate: bytes, mask: int, address: int) -> bytes:
    """What rt_sigreturn(2) at `address` needs for a stopped thread to go on as it is now."""
    return arch.signal_context(regs, xstate, mask, address, interrupted_call(pid, regs))


def pack_calls(calls: Sequence[Call]) -> bytes:
    flat: list[int] = []
    for call in calls:
        flat += call
        flat += _REST[len(call)]
    try:
        return struct.pack(f"<{len(flat)}Q", *flat)
    except struct.error:  # a negative argument
        return struct.pack(f"<{len(flat)}Q", *[value & arch.MINUS_ONE for value in flat])


_NAMES = {number: name for name, number in arch.NR.items()}


def name_of(number: int) -> str:
    return _NAMES.get(number, f"system call {number}")


def describe(pid: int, call: Call) -> str:
    return f"in pid {pid}, arguments " + " ".join(hex(value & arch.MINUS_ONE) for value in call[1:])
