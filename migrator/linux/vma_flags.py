"""What the kernel keeps of each mapping beside its rights (vm_flags), read exactly and without a walk of page tables.

/proc/PID/smaps has them too, after it has looked at every page: 40 ms for each GiB. A program in the kernel
(bpf_iter_task_vma, Linux 6.1) takes half a microsecond for each mapping.

    with VmaFlags() as reader:
        words = reader.read(pid)      # None where this kernel has it not

The bits are the kernel's own, which no interface promises: what they mean is for the caller to learn.
"""

from __future__ import annotations

import functools
from array import array
from types import TracebackType
from typing import NamedTuple, Self

from migrator.linux.bpf import TRACING, Assembly, Iteration, Program
from migrator.linux.btf import Kernel

WORDS = 3  # of each mapping: start, end, flags
_SEQ_WRITE = 127  # bpf_seq_write()
_META, _VMA, _SEQ = 0, 16, 0  # places in struct bpf_iter__task_vma, struct bpf_iter_meta


class _Places(NamedTuple):
    function: int
    members: tuple[int, ...]


class VmaFlags:
    """A reader, with something in the kernel for each process that was read."""

    def __init__(self) -> None:
        self._program: Program | None = None
        self._iterations: dict[int, Iteration] = {}
        self._missing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def prepare(self, pid: int) -> bool:
        """Have all there that takes time. False where the kernel cannot do it."""
        if pid not in self._iterations and not self._missing:
            try:
                self._program = self._program or _load()
                self._iterations[pid] = Iteration(self._program, pid)
            except (OSError, LookupError):
                self._missing = True
        return not self._missing

    def read(self, pid: int) -> array[int] | None:
        """`WORDS` for each mapping, in order of address; empty for a process that has ended."""
        if not self.prepare(pid):
            return None
        words = array("Q")
        for piece in self._iterations[pid].read():
            words.frombytes(piece)
        return words

    def forget(self, pid: int) -> None:
        if pid in self._iterations:
            self._iterations.pop(pid).close()

    def close(self) -> None:
        for pid in list(self._iterations):
            self.forget(pid)
        if self._program is not None:
            self._program.close()
            self._program = None


@functools.cache
def _places() -> _Places:
    kernel = Kernel.read()
    members = tuple(kernel.offset("vm_area_struct", name) for name in ("vm_start", "vm_end", "vm_flags"))
    return _Places(kernel.function("bpf_iter_task_vma"), members)


def _load() -> Program:
    function, members = _places()
    code = Assembly()
    code.fetch(6, 1, _VMA)
    code.jump_if_equal(6, 0, "end")
    code.fetch(7, 1, _META)
    code.fetch(1, 7, _SEQ)
    for at, member in zip((-24, -16, -8), members, strict=True):
        code.fetch(2, 6, member)
        code.keep(at, 2)
    code.copy(2, 10)
    code.add(2, -24)
    code.set(3, 24)
    code.call(_SEQ_WRITE)
    code.label("end")
    code.end(0)
    return Program(code.code(), TRACING, iterator=function)
