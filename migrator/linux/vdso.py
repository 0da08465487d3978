"""The code that the kernel maps into every process (vdso(7)): tasks that were stopped in it must find the same."""

from __future__ import annotations

import hashlib

from migrator.linux import memory, procfs


def digest(pid: int) -> str:
    """sha256 of the bytes of a process's vdso, hex; "" where the kernel gives none. Raises ProcessLookupError for one
    that is ending."""
    vmas = procfs.maps(pid)
    if not vmas:  # of one that is killed, before it is a zombie
        raise ProcessLookupError(f"pid {pid} has ended")
    for vma in vmas:
        if vma.path == "[vdso]":
            return hashlib.sha256(memory.read(pid, vma.start, vma.end - vma.start)).hexdigest()
    return ""
