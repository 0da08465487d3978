"""A process that is being built: a stub, stopped, that takes the shape of the saved one."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from migrator.engine.spawn import LOW_END, PARKING, SCRATCH_ADDRESS, SCRATCH_SIZE, STUB_ADDRESS
from migrator.engine.user.ranges import Span, merge, subtract
from migrator.errors import RestartFailed
from migrator.image.records import VmaFlag, VmaItem
from migrator.linux import memory, procfs, ptrace, sys
from migrator.linux import x86_64 as arch
from migrator.linux.pagemap import Scanner
from migrator.linux.remote import Call, Remote, RemoteError

NR = arch.NR
_AF_UNIX, _SOCK_SEQPACKET, _SOCK_CLOEXEC = 1, 5, 0o2000000
_FDS_PER_MESSAGE = 240
_O_CLOEXEC = 0o2000000
_RLIMIT_NOFILE = 7
_CHANNEL = 1023  # number of the channel's end inside: a low one, as the table of descriptors grows up to it
_SYSTEM = ("[vvar]", "[vvar_vclock]", "[vdso]")
PREPARED_SIZE = SCRATCH_SIZE // 2  # of the scratch area, for migrator.engine.user.restore.task_setup
PREPARED = SCRATCH_ADDRESS + SCRATCH_SIZE - PREPARED_SIZE


@dataclass(slots=True)
class StubThread:
    tid: int
    vtid: int


@dataclass(slots=True)
class Stub:
    """`pid` as we see it, `vpid` as the process itself will.

    `mapped`: what of a saved address space it has, sorted. A child has what its parent had when it was cloned,
    contents too: what they have in common stays shared by copy-on-write."""

    pid: int
    vpid: int
    pidfd: int
    threads: dict[int, StubThread] = field(default_factory=dict)  # by vtid
    mapped: list[VmaItem] = field(default_factory=list)
    forked: bool = False
    remote: Remote = field(init=False)
    mem: memory.MemFile = field(init=False)
    _socket: socket.socket | None = None
    _their_fd: int = -1
    _segments: arch.Regs | None = None
    _scanner: Scanner | None = None

    def __post_init__(self) -> None:
        self.remote = Remote(self.pid)
        self.remote.survivable = False  # it is killed with its tracer: nothing to return to
        self.mem = memory.MemFile(self.pid)
        self.threads[self.vpid] = StubThread(self.pid, self.vpid)

    # ------------------------------------------------------------------ beginnings

    def occupy(self) -> None:
        """First steps of the root's stub, just seized and stopped: scratch area, nothing else left."""
        remote = self.remote
        with remote.borrowed():
            remote.map_scratch(SCRATCH_SIZE, SCRATCH_ADDRESS, reserved=PREPARED_SIZE)
            calls: list[Call] = [(NR["munmap"], STUB_ADDRESS, 4096)]
            default = remote.put(bytes(32))
            for vma in procfs.maps(self.pid):
                if vma.path == "[stack]":
                    calls.append((NR["munmap"], vma.start, vma.end - vma.start))
            remote.checked(calls)
            # what its maker ignores it would ignore as well, as Python does SIGPIPE
            remote.batch([(NR["rt_sigaction"], n, default, 0, 8) for n in range(1, 65)])
        self.open_up()

    def inherit(self, parent: Stub) -> None:
        """First steps of a forked stub: it has its parent's scratch area at the same place, and what is mapped."""
        self._adopt(parent)
        self._unmap_others()
        self.open_up()

    def inherit_pid(self, parent: Stub) -> None:
        """As inherit(), for a stub that is nothing but a pid: no channel, and no memory of its parent's to hold."""
        self._adopt(parent)
        if self.mapped:
            self.mapped = []
            self._unmap_others()

    def inherit_to_hand_on(self, parent: Stub) -> None:
        """As inherit(), for a stub that is there for a moment, to be cloned in its turn."""
        self._adopt(parent)

    def _adopt(self, parent: Stub) -> None:
        self.remote.adopt_scratch(SCRATCH_ADDRESS, SCRATCH_SIZE, reserved=PREPARED_SIZE)
        self.mapped = [item for item in parent.mapped if not item.flags & VmaFlag.DONTFORK]
        self.forked = True

    def _unmap_others(self) -> None:
        """Unmap what the parent had mapped and is not of a saved address space."""
        there = merge(
            (vma.start, vma.end)
            for vma in procfs.maps(self.pid)
            if vma.start >= LOW_END and vma.path not in (*_SYSTEM, "[vsyscall]")
        )
        left = subtract(there, merge((item.start, item.end) for item in self.mapped))
        self.checked([(NR["munmap"], start, end - start) for start, end in left], "unmapping what its parent had")

    def open_up(self) -> None:
        """Open the channel for descriptors, and close all others."""
        remote = self.remote
        with remote.borrowed():
            limit = remote.put(bytes(16))
            remote.checked([(NR["prlimit64"], 0, _RLIMIT_NOFILE, 0, limit)])
            _, hard = struct.unpack("<QQ", remote.get(16))
            remote.put(struct.pack("<QQ", hard, hard))
            top = min(hard, _CHANNEL + 1) - 1
            pair = remote.data + 64
            remote.checked(
                [
                    (NR["prlimit64"], 0, _RLIMIT_NOFILE, limit, 0),
                    (NR["close_range"], 0, 0xFFFFFFFF, 0),
                    (NR["socketpair"], _AF_UNIX, _SOCK_SEQPACKET | _SOCK_CLOEXEC, 0, pair),
                    (NR["dup3"], 0, top, _O_CLOEXEC),
                ]
            )
            self._socket = socket.socket(fileno=sys.pidfd_getfd(self.pidfd, 1))
            self._their_fd = top
            remote.checked([(NR["close_range"], 0, 1, 0)])

    def place_system_mappings(self, wanted: dict[str, tuple[int, int]]) -> None:
        """Move vdso and vvar to where the saved process had them: name -> (start, end)."""
        have = {v.path: v for v in procfs.maps(self.pid) if v.path in _SYSTEM}
        if {n: (v.start, v.end) for n, v in have.items()} == wanted:
            return
        sizes = {n: v.end - v.start for n, v in have.items()}
        if sizes != {n: e - s for n, (s, e) in wanted.items()}:
            raise RestartFailed(
                f"the kernel's own mappings differ: here {sizes}, saved { {n: e - s for n, (s, e) in wanted.items()} }",
                hint="restart on a host that runs the same kernel build",
            )
        calls: list[Call] = []
        park = PARKING
        for name, vma in have.items():
            size = sizes[name]
            calls.append((NR["mremap"], vma.start, size, size, 3, park))
            calls.append((NR["mremap"], park, size, size, 3, wanted[name][0]))
            park += size
        # all are parked before the first is placed: places may overlap
        calls = calls[0::2] + calls[1::2]
        assert park <= LOW_END
        with self.remote.borrowed():
            try:
                self.remote.checked(calls)
            except RemoteError as error:
                raise RestartFailed(
                    f"pid {self.vpid}: the vdso cannot be moved: {error}",
                    hint="a kernel with CONFIG_MSEAL_SYSTEM_MAPPINGS forbids it",
                ) from error
        if self.remote.instruction:
            self.remote.instruction += wanted["[vdso]"][0] - have["[vdso]"].start

    # ------------------------------------------------------------------ for those who build

    def call_batch(self, calls: Sequence[Call]) -> list[int]:
        """System calls inside the stub; negative errno on error."""
        if not calls:
            return []
        with self.remote.borrowed():
            return self.remote.batch(calls)

    def checked(self, calls: Sequence[Call], about: str) -> list[int]:
        """As call_batch(), but a failure raises RestartFailed about `about`."""
        if not calls:
            return []
        try:
            with self.remote.borrowed():
                return self.remote.checked(calls)
        except RemoteError as error:
            raise RestartFailed(f"pid {self.vpid}: {about}: {error}") from error

    def put(self, data: bytes) -> int:
        """Put bytes into the scratch area; they stay until the next put()."""
        return self.remote.put(data)

    def receive(self, fds: Sequence[int]) -> list[int]:
        """Pass descriptors of ours; their numbers inside, close-on-exec not set."""
        out: list[int] = []
        for first in range(0, len(fds), _FDS_PER_MESSAGE):
            group = fds[first : first + _FDS_PER_MESSAGE]
            out += self._pass(group, [], [])
        return out

    def _pass(self, fds: Sequence[int], before: list[Call], after: list[Call]) -> list[int]:
        """Pass at most _FDS_PER_MESSAGE descriptors, with other calls ahead of and behind it in one go."""
        assert self._socket is not None
        self._socket.sendmsg([b"f"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        control_size = 16 + -(-4 * len(fds) // 8) * 8
        base = self.remote.data
        message = struct.pack("<QIxxxxQQQQixxxx", 0, 0, base + 64, 1, base + 128, control_size, 0) + bytes(8)
        iov = struct.pack("<QQ", base + 96, 1)
        self.put(message.ljust(64, b"\0")[:64] + iov)
        calls = [*before, (NR["recvmsg"], self._their_fd, base, 0), *after]
        if self.checked(calls, "receiving descriptors")[len(before)] != 1:
            raise RestartFailed(f"pid {self.vpid}: descriptors did not arrive")
        raw = self.remote.get(control_size, 128)
        length, level, kind = struct.unpack_from("<Qii", raw)
        if (level, kind) != (1, 1) or length != 16 + 4 * len(fds):
            raise RestartFailed(
                f"pid {self.vpid}: only some of {len(fds)} descriptors arrived",
                hint="raise the limit of open files (RLIMIT_NOFILE) of the agent",
            )
        return list(struct.unpack_from(f"<{len(fds)}i", raw, 16))

    def install_fds(self, items: list[tuple[int, int, bool]]) -> None:
        """Give the stub exactly these descriptors: (our fd, number, close-on-exec)."""
        items = sorted(items, key=lambda item: item[1])
        if items and items[-1][1] >= self._their_fd:
            self._move_channel(items[-1][1] + 1)
        # With all others closed the n-th to arrive gets number n: what to do with it is known beforehand.
        # It lies at or below its place, so moving from the top never hits one that still waits.
        place = _placing(range(len(items)), items)
        clear: list[Call] = [(NR["close_range"], 0, self._their_fd - 1, 0)]
        fds = [fd for fd, _, _ in items]
        if len(items) + len(place) < _FDS_PER_MESSAGE and items:
            numbers = self._pass(fds, clear, place)
        else:
            self.checked(clear, "closing descriptors")
            numbers = self.receive(fds)
            self.checked(place, "placing descriptors")
        if numbers != list(range(len(items))):
            raise RestartFailed(f"pid {self.vpid}: descriptors arrived as {numbers}")

    def change_fds(self, gone: Sequence[int], items: Sequence[tuple[int, int, bool]]) -> None:
        """Of the descriptors that install_fds() gave, close those numbers, and give these instead."""
        items = sorted(items, key=lambda item: item[1])
        if items and items[-1][1] >= self._their_fd:
            self._move_channel(items[-1][1] + 1)
        self.checked([(NR["close"], number) for number in gone], "closing descriptors")
        numbers = self.receive([fd for fd, _, _ in items])
        # The n-th to arrive gets the n-th free number: at or below its place, as above.
        if numbers != sorted(numbers) or any(n > at for n, (_, at, _) in zip(numbers, items, strict=True)):
            raise RestartFailed(f"pid {self.vpid}: descriptors arrived as {numbers}")
        self.checked(_placing(numbers, items), "placing descriptors")

    def _move_channel(self, number: int) -> None:
        try:
            self.checked([(NR["dup3"], self._their_fd, number, _O_CLOEXEC)], "moving the channel")
        except RestartFailed as error:
            raise RestartFailed(
                f"pid {self.vpid}: descriptor number {number - 1} is above the limit of open files here",
                hint="raise the hard RLIMIT_NOFILE of the agent",
            ) from error
        self.checked([(NR["close"], self._their_fd)], "moving the channel")
        self._their_fd = number

    @property
    def channel(self) -> list[Call]:
        """The call that closes the channel inside: after it no descriptors can be passed."""
        return [(NR["close"], self._their_fd)] if self._their_fd >= 0 else []

    def channel_closed(self) -> None:
        """That call is made, or about to be."""
        self._their_fd = -1

    @property
    def segments(self) -> arch.Regs:
        """Registers to begin from: all stubs have the same segments."""
        if self._segments is None:
            self._segments = arch.get_regs(self.pid)
        return self._segments

    def own_pages(self, start: int, end: int) -> list[Span]:
        """As Scanner.own(), sorted and merged."""
        self._scanner = self._scanner or Scanner(self.pid)
        return merge(self._scanner.own(start, end))

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._scanner is not None:
            self._scanner.close()
        self.mem.close()
        os.close(self.pidfd)


def await_birth(tid: int) -> None:
    """Wait for a tracee that was cloned into tracing to be in its first stop."""
    status = ptrace.wait(tid)
    if not ptrace.is_stop(status):
        raise RestartFailed(f"tid {tid} ended at birth (wait status {status:#x})")


def _placing(numbers: Sequence[int], items: Sequence[tuple[int, int, bool]]) -> list[Call]:
    """The calls that put what arrived as `numbers` into the places of `items`: see install_fds()."""
    place: list[Call] = []
    for number, (_, at, cloexec) in reversed([*zip(numbers, items, strict=True)]):
        if number != at:
            place.append((NR["dup3"], number, at, _O_CLOEXEC if cloexec else 0))
            place.append((NR["close"], number))
        elif cloexec:
            place.append((NR["fcntl"], number, 2, 1))
    return place
