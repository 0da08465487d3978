"""Shared memory that a program may only read stays so: its copy can make writable what it could, and no more. What it
may open again, as it owns it, it still may."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cli import migrator
from scripts import script

pytestmark = pytest.mark.root

PROGRAM = r"""
import ctypes, mmap, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.shmat.restype = ctypes.c_void_p
folder = sys.argv[1]
def mapped(fd, prot=1):
    start = libc.mmap(None, 4096, prot, 1, fd, 0)  # MAP_SHARED
    assert start != 2**64 - 1
    return ctypes.c_void_p(start)
roots = mapped(os.open(folder + "/roots", os.O_RDONLY))
passing = os.memfd_create("passing")
os.ftruncate(passing, 4096)
read_only = os.open(f"/proc/self/fd/{passing}", os.O_RDONLY)
own = os.open(folder + "/own", os.O_RDWR)
places = {
    "a file of root": roots,
    "own, for reading": mapped(os.open(folder + "/own", os.O_RDONLY)),
    "own, for writing": mapped(own),
    "own, written to": mapped(own, 3),
    "a memfd for reading": mapped(read_only),
    "a memfd for writing": mapped(passing),
}
anonymous = libc.mmap(None, 4096, 1, 0x21, -1, 0)
places["anonymous"] = ctypes.c_void_p(anonymous)
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
def look():
    found = {name: libc.mprotect(start, 4096, 3) == 0 for name, start in places.items()}
    for start in places.values():
        libc.mprotect(start, 4096, 1)
    return found
reading, writing = os.pipe()
memory = os.memfd_create("own")
os.fchmod(memory, 0o600)
def own():
    try:  # as a shell does for /dev/stdout
        again = [os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK) for fd in (writing, memory)]
        [os.close(fd) for fd in again]
    except PermissionError:
        return "denied"
    return os.fstat(writing).st_uid, os.fstat(memory).st_uid
assert own() == (65534, 65534)
before = look()
print(before, flush=True)
print("ready", flush=True)
while not os.path.exists(folder + "/go"):
    time.sleep(0.01)
after = look()
print("same" if after == before and own() == (65534, 65534) else (after, own()), flush=True)
while True:
    time.sleep(1)
"""


def test_what_can_be_made_writable_is_what_could_be(tmp_path: Path) -> None:
    for parent in [tmp_path, *tmp_path.parents[:3]]:
        parent.chmod(0o755)
    (tmp_path / "roots").write_bytes(bytes(4096))
    (tmp_path / "own").write_bytes(bytes(4096))
    os.chown(tmp_path / "own", 65534, 65534)
    with script(tmp_path, PROGRAM, tmp_path) as program:
        said = program.await_text("ready")
        assert "'a file of root': False" in said and "'own, for writing': True" in said
        program.save(tmp_path / "image")
        program.restart(tmp_path / "image", "--verify")
        (tmp_path / "go").touch()
        program.await_text("same")


FOREIGN = """
import mmap, os, sys, time
os.setresuid(65534, 65534, 65534)
file = open(sys.argv[1], "a+")
file.write("mine"); file.flush()
if sys.argv[2] == "mapped":
    memory = mmap.mmap(file.fileno(), 4, mmap.MAP_PRIVATE)
    file.close()
print("ready", flush=True)
while True: time.sleep(1)
"""


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_a_file_of_another_user_under_the_same_path_is_not_opened(how: str, tmp_path: Path) -> None:
    """What a user had made there is somebody else's on the other host."""
    for parent in [tmp_path, *tmp_path.parents[:3]]:
        parent.chmod(0o755)
    there = tmp_path / "there"
    there.touch()
    os.chown(there, 65534, 65534)
    with script(tmp_path, FOREIGN, there, how) as program:
        program.save(tmp_path / "image")
        there.chmod(0o600)
        os.chown(there, 1234, 1234)
        refused = migrator("restart", "-d", "-i", tmp_path / "image", code=5).stderr
        assert "belongs to user 1234 " in refused and ", and to user 65534 where it was saved" in refused
        os.chown(there, 65534, 65534)
        program.restart(tmp_path / "image")
