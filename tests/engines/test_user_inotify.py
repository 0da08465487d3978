"""What a program watches (inotify(7)) it goes on watching after a move, under the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli import migrator
from contained import NAME, await_ticks, move, own_directories, run

__all__ = ["own_directories"]
pytestmark = pytest.mark.root

INOTIFY = r"""
import ctypes, fcntl, os, select, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def ok(value):
    if value < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return value
ACCESS, MODIFY, CREATE, DELETE, IGNORED, ALL = 1, 2, 0x100, 0x200, 0x8000, 0xFFF
EXCL_UNLINK, ONESHOT = 0x4000000, 0x80000000
def watch(fd, path, mask):
    return ok(libc.inotify_add_watch(fd, path.encode(), mask))
def events(fd):
    out = []
    while select.select([fd], [], [], 0)[0]:
        raw = os.read(fd, 65536)
        while raw:
            wd, mask, cookie, length = struct.unpack_from("iIII", raw)
            out.append((wd, mask, raw[16:16 + length].rstrip(b"\0").decode()))
            raw = raw[16 + length:]
    return out
"""

WATCHING = (
    INOTIFY
    + r"""
base = sys.argv[1] + "/watched"
os.makedirs(base + "/folder"); os.makedirs(base + "/deep/er")
os.mkdir("/dev/shm/own"); open(base + "/file", "w").write("x"); os.symlink("folder", base + "/link")
one = ok(libc.inotify_init1(os.O_NONBLOCK)); two = ok(libc.inotify_init1(0)); empty = ok(libc.inotify_init1(0))
for _ in range(500):  # the numbers go on
    ok(libc.inotify_rm_watch(one, watch(one, base, CREATE)))
events(one)
folder = watch(one, base + "/folder", CREATE | DELETE | EXCL_UNLINK)
gone = watch(one, base + "/deep", CREATE)
file = watch(one, base + "/file", MODIFY)
ok(libc.inotify_rm_watch(one, gone)); assert events(one) == [(gone, IGNORED, "")]
renamed = watch(one, base + "/deep/er", ALL)
own = watch(two, "/dev/shm/own", CREATE)
link = watch(two, base + "/link", 0x2000000 | 0x400)  # IN_DONT_FOLLOW | IN_DELETE_SELF
once = watch(two, base + "/deep", CREATE | ONESHOT)
assert (folder, gone, file, renamed, own, link, once) == (501, 502, 503, 504, 1, 2, 3)
os.rename(base + "/deep/er", base + "/moved")
assert events(one) == [(renamed, 0x800, "")]  # IN_MOVE_SELF
epoll = select.epoll(); epoll.register(one, select.EPOLLIN)
if os.fork() == 0:  # which has the same instances
    while True:
        time.sleep(100)
print("ready")
n = 0
while True:
    n += 1
    assert events(one) == events(two) == events(empty) == [], n
    assert fcntl.fcntl(one, fcntl.F_GETFL) & os.O_NONBLOCK and not fcntl.fcntl(two, fcntl.F_GETFL) & os.O_NONBLOCK
    open(base + f"/folder/{n}", "w").close()
    assert [fd for fd, _ in epoll.poll(0)] == [one]
    assert events(one) == [(folder, CREATE, str(n))], n
    open(base + "/file", "a").write("x")
    assert events(one) == [(file, MODIFY, "")], n
    os.unlink(base + f"/folder/{n}")
    assert events(one) == [(folder, DELETE, str(n))], n
    os.mkdir(base + "/moved/d"); os.rmdir(base + "/moved/d")
    assert [e[:2] for e in events(one)] == [(renamed, 0x40000100), (renamed, 0x40000200)], n
    open("/dev/shm/own/new", "w").close()
    assert events(two) == [(own, CREATE, "new")], n
    os.unlink("/dev/shm/own/new")
    print("tick", n)
    time.sleep(0.02)
"""
)


def test_an_inotify_instance_watches_the_same_under_the_same_numbers(tmp_path: Path) -> None:
    run(tmp_path, WATCHING)
    for _ in range(4):
        await_ticks(tmp_path)
        move()
    await_ticks(tmp_path)


BUSY = (
    INOTIFY
    + r"""
one = ok(libc.inotify_init1(0)); folder = watch(one, sys.argv[1], CREATE | DELETE)
print("ready")
n = seen = 0
while True:  # there is something to be read most of the time
    n += 1
    os.mkdir(sys.argv[1] + "/d"); os.rmdir(sys.argv[1] + "/d")
    if n % 3 == 0:
        found = [e for e in events(one) if e[2] == "d"]
        assert len(found) == 6, found
        print("tick", n)
        time.sleep(0.002)
"""
)


def test_a_freeze_waits_until_what_happened_was_read(tmp_path: Path) -> None:
    run(tmp_path, BUSY)
    for _ in range(2):
        await_ticks(tmp_path, 20)
        move()
    await_ticks(tmp_path, 20)


UNREAD = (
    INOTIFY
    + r"""
one = ok(libc.inotify_init1(0)); folder = watch(one, sys.argv[1], CREATE)
os.mkdir(sys.argv[1] + "/d")
print("ready"); time.sleep(600)
"""
)
REMOVED = (
    INOTIFY
    + r"""
open(sys.argv[1] + "/f", "w").write("x"); kept = open(sys.argv[1] + "/f")
one = ok(libc.inotify_init1(0)); watch(one, sys.argv[1] + "/f", MODIFY)
os.unlink(sys.argv[1] + "/f"); kept.seek(0)
print("ready"); time.sleep(600)
"""
)


@pytest.mark.parametrize(
    ("script", "code", "reason"),
    [
        (UNREAD, 4, "what happened to watched files waits to be read (inotify)"),
        (REMOVED, 3, "which has no path in the tree"),
    ],
    ids=["unread", "removed"],
)
def test_what_is_not_carried_of_inotify_is_refused(tmp_path: Path, script: str, code: int, reason: str) -> None:
    run(tmp_path, script)
    done = migrator("checkpoint", NAME, "--kill", "-o", tmp_path / "image", code=code)
    assert reason in done.stderr
    assert json.loads(migrator("ps", "--json").stdout)[0]["state"] == "running"
