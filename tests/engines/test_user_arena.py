"""Mappings that change at random all the time, in several processes: no page of a copy holds what it should not."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest
from pidhosts import HostedWorkload, PidHost, tour

from migrator.engine.user.dump.shm import SharedMemory
from migrator.engine.user.dump.tmpfs import OwnTmpfs
from migrator.image.objhash import ObjHash
from migrator.linux import map_files, procfs

pytestmark = pytest.mark.root

MAP_FIXED = 0x10


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_whatever_is_done_to_mappings_each_page_holds_what_it_should(tmp_path: Path, seed: int) -> None:
    """It is moved in every state that it happens to be in; the second look compares each copy as well."""
    with PidHost("a") as a, PidHost("b") as b, HostedWorkload(a, "arena", tmp_path, seed) as moving:
        tour(moving, a, b, (0, 1, 2, 3, 12, 3, 1, 6))
        moving.finish()


def vma_at(address: int) -> procfs.Vma:
    return next(vma for vma in procfs.maps(os.getpid()) if vma.start == address)


def test_what_is_mapped_where_something_else_was_listed_is_not_taken_for_it(tmp_path: Path) -> None:
    """The program maps another file of the same size there, after its mappings were read: the memory behind the first
    is not what is in the second."""
    pid, size = os.getpid(), 1 << 16
    other = tmp_path / "other"
    other.write_bytes(bytes(size))
    memfd, file = os.memfd_create("listed"), os.open(other, os.O_RDWR)
    os.ftruncate(memfd, size)
    area = mmap.mmap(memfd, size)
    anchor = ctypes.c_char.from_buffer(area)
    address = ctypes.addressof(anchor)
    listed = vma_at(address)
    shared = SharedMemory(ObjHash(), OwnTmpfs(pid, ()), None)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 4]
    assert libc.mmap(address, size, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, file, 0) == address
    with pytest.raises(FileNotFoundError, match="another file is mapped by now"):
        shared.of_mapping(pid, listed)
    assert shared.objects == {}
    os.close(map_files.open_path(pid, vma_at(address)))
    assert libc.mmap(address, size, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, memfd, 0) == address
    found = shared.of_mapping(pid, listed)
    assert shared.of_descriptor((os.fstat(memfd).st_dev, os.fstat(memfd).st_ino), memfd, "listed", 0) is found
    shared.close()
    os.close(memfd)
    os.close(file)
