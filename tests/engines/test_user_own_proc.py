"""What a program has open about itself below /proc: it is opened once there is what it tells about."""

from __future__ import annotations

from pathlib import Path

import pytest
from contained import await_ticks, move, own_directories, run

__all__ = ["own_directories"]
pytestmark = pytest.mark.root

PROGRAM = r"""
import os, threading, time
tids = []
def wait():
    tids.append(threading.get_native_id())
    while True:
        time.sleep(1)
threading.Thread(target=wait, daemon=True).start()
while not tids:
    time.sleep(0.001)
watched = os.open("/etc", os.O_RDONLY)
os.lseek(watched, 7, os.SEEK_SET)
names = f"/proc/self/fdinfo/{watched}", f"/proc/self/task/{tids[0]}/comm", "/proc/self/maps", "/proc/self/fd"
fds = [os.open(name, os.O_RDONLY) for name in names]
links = [os.readlink(f"/proc/self/fd/{fd}") for fd in fds]
os.set_inheritable(fds[0], True)
if os.fork() == 0:  # which has the same, about its parent
    while True:
        time.sleep(100)
print("ready")
n = 0
while True:
    n += 1
    assert [os.readlink(f"/proc/self/fd/{fd}") for fd in fds] == links, n
    assert b"pos:\t7\n" in os.pread(fds[0], 4096, 0) and os.get_inheritable(fds[0]), n
    assert os.pread(fds[1], 100, 0) == open(names[1], "rb").read(), n
    assert not os.get_inheritable(fds[1]), n
    assert b"[stack]" in open(names[2], "rb").read() and os.pread(fds[2], 100, 0), n
    assert str(watched) in os.listdir(fds[3]), n
    print("tick", n)
    time.sleep(0.01)
"""


def test_files_about_descriptors_and_threads_of_the_tree_are_carried(tmp_path: Path) -> None:
    run(tmp_path, PROGRAM)
    for _ in range(2):
        await_ticks(tmp_path)
        move()
    await_ticks(tmp_path)
