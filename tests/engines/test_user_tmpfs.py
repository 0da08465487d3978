"""What only a container has goes with it: what is in its own tmpfs mounts, and what its namespaces were given."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cli import MIGRATOR, migrator
from contained import NAME, await_ticks, move, own_directories, run

from migrator.linux.namespaces import run_in

__all__ = ["own_directories"]
pytestmark = pytest.mark.root


FILES = r"""
import mmap, os, socket, sys, time
base = sys.argv[1]
for place in ("/dev/shm", base + "/own"):
    os.chdir(place)
    os.makedirs("d/e/f"); os.chmod("d", 0o2750); os.chown("d", 5, 6)
    open("d/hello", "w").write("hello"); os.link("d/hello", "hard"); os.symlink("d/hello", "soft")
    os.symlink("../nowhere", "d/e/dangling")
    os.mkfifo("pipe", 0o620)
    big = open("big", "wb+"); big.truncate(1 << 20); big.seek(500_000); big.write(b"middle" * 5000); big.flush()
    open("empty", "w").close()
    open("odd \udcff\n name", "w").write("odd")
    os.setxattr("d/hello", "trusted.note", b"\0\1note")
    left = socket.socket(socket.AF_UNIX); left.bind("left"); left.close()
    listener = socket.socket(socket.AF_UNIX); listener.bind("listens"); listener.listen()
    globals()["keep" + place] = (listener, big)
    os.utime("d/hello", ns=(7, 981_173_106_123_456_789)); os.utime("d/e", ns=(7, 981_173_106_987_654_321))
os.chdir("/dev/shm")
fd = os.open("mapped", os.O_RDWR | os.O_CREAT, 0o600); os.ftruncate(fd, 300 * 4096)
mapped = mmap.mmap(fd, 300 * 4096); private = mmap.mmap(fd, 4096, mmap.MAP_PRIVATE); os.close(fd)
gone = os.open("gone", os.O_RDWR | os.O_CREAT); os.write(gone, b"gone"); os.unlink("gone")
private[:3] = b"own"
appended = open("log", "ab", buffering=0)
print("ready")
n = 0
while True:
    n += 1
    mapped[4096 * (n % 300):4096 * (n % 300) + 8] = n.to_bytes(8, "big")
    appended.write(b"%d\n" % n)
    if n % 25 == 0:
        os.rename(*("mapped", "mapped2")[:: 1 if n % 50 else -1])
    with open("mapped2" if n % 50 >= 25 else "mapped", "rb") as again:
        assert os.pread(again.fileno(), 8, 4096 * (n % 300)) == n.to_bytes(8, "big"), n
    assert open("log").read().split() == [str(i) for i in range(1, n + 1)], n
    assert os.pread(gone, 9, 0) == b"gone" and private[:3] == b"own"
    for place in ("/dev/shm", base + "/own"):
        client = socket.socket(socket.AF_UNIX); client.connect(place + "/listens")
        client.send(b"x"); other = globals()["keep" + place][0].accept()[0]; assert other.recv(9) == b"x"
        assert globals()["keep" + place][1].tell() == 530_000
        client.close(); other.close()
    print("tick", n)
    time.sleep(0.005)
"""


def listing(pid: int, *places: object) -> list[tuple[object, ...]]:
    """All that is to be seen of these directories, but of what changes all the time."""

    def inside() -> list[tuple[object, ...]]:
        found = []
        for place in map(str, places):
            for folder, folders, files in os.walk(place):
                for name in sorted({*folders, *files} - {"mapped", "mapped2", "log"}):
                    path = os.path.join(folder, name)
                    status = os.lstat(path)
                    regular = stat.S_ISREG(status.st_mode)
                    made_anew = stat.S_ISSOCK(status.st_mode)  # by binding its socket, as any
                    found.append(
                        (
                            path.encode(errors="surrogateescape"),
                            *(status.st_mode, status.st_uid, status.st_gid, status.st_rdev),
                            0 if made_anew else status.st_mtime_ns,
                            status.st_nlink if regular else 0,
                            status.st_size if regular else 0,
                            status.st_blocks if regular else 0,
                            Path(path).read_bytes() if regular else b"",
                            os.readlink(path) if stat.S_ISLNK(status.st_mode) else "",
                            {name: os.getxattr(path, name) for name in os.listxattr(path)} if regular else {},
                        )
                    )
        return sorted(found, key=str)

    return run_in(pid, {"mnt"}, inside)


def test_names_contents_mappings_and_sockets_of_tmpfs_are_as_they_were(tmp_path: Path) -> None:
    own = tmp_path / "own"
    pid = run(tmp_path, FILES, "--tmpfs", f"{own}:size=32m,mode=1777")
    before = listing(pid, "/dev/shm", own)
    assert len(before) == 2 * 13 and "trusted.note" in str(before) and "123456789" in str(before)
    for _ in range(3):
        await_ticks(tmp_path)
        pid = move()
        await_ticks(tmp_path)
        for one, other in zip(listing(pid, "/dev/shm", own), before, strict=True):
            assert one == other
    assert os.listdir(own) == []  # the host's directory below it
    assert json.loads(migrator("ps", "--json").stdout)[0]["state"] == "running"


SEMAPHORES = r"""
import multiprocessing, multiprocessing.shared_memory, os, time
context = multiprocessing.get_context("fork")

def work(tasks, results, lock, total, name):
    shm = multiprocessing.shared_memory.SharedMemory(name)
    for n in iter(tasks.get, None):
        with lock:
            total.value += n
            shm.buf[0] = (shm.buf[0] + 1) % 256
        results.put((os.getpid(), n * n))

if __name__ == "__main__":
    tasks, results, lock = context.Queue(), context.Queue(), context.Lock()
    total, shm = context.Value("q", 0), multiprocessing.shared_memory.SharedMemory(create=True, size=100_000)
    workers = [context.Process(target=work, args=(tasks, results, lock, total, shm.name)) for _ in range(3)]
    for w in workers:
        w.start()
    barrier = context.Barrier(1); event = context.Event()
    print("ready")
    sent, answers = 0, 0
    while True:
        for n in range(20):
            tasks.put(n)
        got = sorted(results.get(timeout=20)[1] for _ in range(20))
        assert got == [n * n for n in range(20)], got
        sent += 190; answers += 20
        assert total.value == sent and shm.buf[0] == answers % 256
        assert all(w.is_alive() for w in workers)
        print("tick", answers)
"""


def test_queues_locks_and_shared_memory_of_multiprocessing_go_on(tmp_path: Path) -> None:
    run(tmp_path, SEMAPHORES)
    for _ in range(2):
        await_ticks(tmp_path)
        move()
    await_ticks(tmp_path)


DEVICE = "import os, time; os.mknod('/dev/shm/disk', 0o60600, 0x700); print('ready'); time.sleep(600)"


def test_a_device_in_a_tmpfs_is_refused_before_anything_is_stopped(tmp_path: Path) -> None:
    run(tmp_path, DEVICE)
    done = migrator("checkpoint", NAME, "--kill", "-o", tmp_path / "image", code=3)
    assert "/dev/shm/disk is a device in a tmpfs" in done.stderr
    assert json.loads(migrator("ps", "--json").stdout)[0]["state"] == "running"


ROOTED = r"""
import os, socket, time
log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); log.bind("/dev/log"); log.setblocking(False)
os.unlink("/dev/full"); open("/dev/note", "w").write("kept")
print("ready")
n = 0
while True:
    n += 1
    s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.connect("/dev/log"); s.send(b"%d" % n)
    assert log.recv(99) == b"%d" % n
    assert open("/dev/note").read() == "kept" and not os.path.exists("/dev/full")
    assert open("/dev/zero", "rb").read(4) == bytes(4) and open("/dev/null", "wb").write(b"x") == 1
    assert os.readlink("/dev/stdin") == "fd/0"
    print("tick", n)
    time.sleep(0.01)
"""


def test_what_a_program_made_of_dev_in_its_own_root_is_kept(tmp_path: Path) -> None:
    root = tmp_path / "root"
    mounts = ["usr", "lib", "lib64", *([] if sys.base_prefix.startswith("/usr") else [sys.base_prefix[1:]])]
    for folder in (*mounts, str(tmp_path)[1:]):
        (root / folder).mkdir(parents=True, exist_ok=True)
    bound = []
    try:
        for folder in mounts:
            subprocess.run(["mount", "--bind", f"/{folder}", root / folder], check=True)
            bound.append(root / folder)
        (root / str(tmp_path)[1:] / "program.py").write_text(ROOTED)
        run(tmp_path, ROOTED, "--root", root)
        for _ in range(2):
            await_ticks(tmp_path)
            move()
        await_ticks(tmp_path)
    finally:
        subprocess.run([*MIGRATOR, "stop", NAME], capture_output=True, check=False)
        for path in bound:
            subprocess.run(["umount", path], check=True)


SYSCTLS = """
import os, time
wanted = {
    "kernel/msgmax": "4096", "kernel/sem": "30\\t40\\t50\\t60", "kernel/domainname": "shop.example",
    "fs/mqueue/msg_max": "7", "net/ipv4/ip_local_port_range": "20000\\t30000", "net/core/somaxconn": "77",
}
for name, value in wanted.items():
    open(f"/proc/sys/{name}", "w").write(value)
print("ready"); n = 0
while True:
    n += 1
    for name, value in wanted.items():
        assert open(f"/proc/sys/{name}").read() == value + "\\n", name
    print("tick", n); time.sleep(0.01)
"""


def test_sysctls_of_its_own_namespaces_go_along(tmp_path: Path) -> None:
    here = Path("/proc/sys/kernel/msgmax").read_text()
    run(tmp_path, SYSCTLS)
    for _ in range(2):
        move()
        await_ticks(tmp_path)
    assert Path("/proc/sys/kernel/msgmax").read_text() == here


HELD = """
import ctypes, os, time
names = [
    "kernel/msgmax", "kernel/hostname", "fs/mqueue/msg_max", "net/core/somaxconn", "kernel/pid_max",
    "net/ipv4/ip_local_port_range", "net/ipv4/conf/lo/rp_filter",
]
held = {f"/proc/sys/{name}": os.open(f"/proc/sys/{name}", os.O_RDWR) for name in names}
held |= {name: os.open(name, os.O_RDONLY) for name in ("/proc/sys/net/ipv4/conf/lo", "/proc/sys/kernel")}
segments = os.open("/proc/sysvipc/shm", os.O_RDONLY)  # it tells of the namespace in which it was opened
assert ctypes.CDLL(None).shmget(0x77, 4096, 0o1600) >= 0
os.write(held["/proc/sys/kernel/msgmax"], b"4096")
print("ready"); n = 0
while True:
    n += 1
    for path, fd in held.items():
        assert os.path.samestat(os.stat(path), os.fstat(fd)), path
    assert os.pread(held["/proc/sys/kernel/msgmax"], 100, 0) == b"4096\\n"
    assert [int(line.split()[0]) for line in os.pread(segments, 4096, 0).splitlines()[1:]] == [0x77]
    print("tick", n); time.sleep(0.01)
"""


def test_open_sysctls_are_those_of_its_own_namespaces(tmp_path: Path) -> None:
    run(tmp_path, HELD)
    for _ in range(2):
        move()
        await_ticks(tmp_path)


LINKED = """
import os, time
wanted = {
    "net/ipv4/conf/eth0/arp_ignore": "2", "net/ipv4/conf/eth0/rp_filter": "0", "net/ipv4/conf/lo/rp_filter": "2",
    "net/ipv4/neigh/eth0/gc_stale_time": "77", "net/ipv6/conf/eth0/hop_limit": "33",
    "net/ipv4/conf/default/arp_ignore": "1", "net/ipv4/conf/default/log_martians": "1",
}
kept = "net/ipv4/conf/eth0/log_martians"  # as it was before the default changed
was = open(f"/proc/sys/{kept}").read().strip()
for name, value in wanted.items():
    open(f"/proc/sys/{name}", "w").write(value)
wanted[kept] = was
print("ready"); n = 0
while True:
    n += 1
    for name, value in wanted.items():
        assert open(f"/proc/sys/{name}").read() == value + "\\n", name
    print("tick", n); time.sleep(0.01)
"""


def test_sysctls_of_its_interfaces_go_along(tmp_path: Path) -> None:
    bridge = f"mg{os.getpid()}"
    subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], check=True)
    try:
        run(tmp_path, LINKED, "--bridge", bridge, "--ip", "10.99.7.2/24")
        for _ in range(2):
            move()
            await_ticks(tmp_path)
    finally:
        subprocess.run([*MIGRATOR, "stop", NAME], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", bridge], check=True)


MOUNTED = """
import os, sys, time
print("ready"); n = 0
while True:
    n += 1
    assert open(sys.argv[1] + "/here/note").read() == "of the host"
    print("tick", n); time.sleep(0.01)
"""


def test_mounts_of_the_host_that_changed_since_it_began_do_not_hold_a_container(tmp_path: Path) -> None:
    """One more, one less, and a tmpfs of the host that is not mounted there any more: none is the container's own."""
    here, other, more = (tmp_path / name for name in ("here", "other", "more"))
    for place in (here, other, more):
        place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", here], check=True)
    (here / "note").write_text("of the host")
    subprocess.run(["mount", "-t", "tmpfs", "none", other], check=True)
    try:
        run(tmp_path, MOUNTED)
        subprocess.run(["umount", other], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "another", more], check=True)
        for _ in range(2):
            await_ticks(tmp_path)
            move()
        await_ticks(tmp_path)
    finally:
        subprocess.run([*MIGRATOR, "stop", NAME], capture_output=True, check=False)
        for place in (here, other, more):
            subprocess.run(["umount", place], check=False, capture_output=True)
