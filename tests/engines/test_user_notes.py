"""What check says of a tree that is carried, and of which something stays behind, or will not be quite the same."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from migrator.engine.base import SourceOptions
from migrator.engine.user.dump.source import UserSource
from migrator.linux import procfs
from migrator.linux.cgroup import hierarchy

pytestmark = pytest.mark.root

NEEDS = """
import os, resource, socket, time
sock = socket.socket()
sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
os.mkfifo("fifo")
fifo = os.open("fifo", os.O_RDWR)
os.mkdir("open")
folder = os.open("open", os.O_RDONLY)
os.mkdir("work")
os.chdir("work")
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 4321))
print("ready", flush=True)
time.sleep(60)
"""
PROGRAM = """
import ctypes, os, signal, socket, struct, tempfile, time
if os.fork() == 0:
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(0)
os.waitid(os.P_ALL, 0, os.WSTOPPED)
try:
    open("/proc/self/loginuid", "w").write("4711")
except FileNotFoundError:
    pass  # a kernel without audit
open("/proc/self/coredump_filter", "w").write("0x7f")
with socket.socket(type=socket.SOCK_DGRAM) as closed:
    closed.bind(("127.0.0.1", 0))
    address = closed.getsockname()
refused = socket.socket(type=socket.SOCK_DGRAM)
refused.connect(address)
refused.send(b"nobody hears it")
ctypes.CDLL(None).syscall(314, 0, struct.pack("<IIQiIQQQ", 48, 0, 0, 0, 0, 97000000, 0, 0), 0)
watching = ctypes.CDLL(None).inotify_init1(0)
kept = tempfile.TemporaryFile(dir=".")
print(kept.fileno(), refused.fileno(), watching, flush=True)
time.sleep(60)
"""


def started(program: str, out: Path) -> subprocess.Popen[bytes]:
    """Writes to `out`, and lives in its directory."""
    with out.open("w") as stdout:
        return subprocess.Popen(
            [sys.executable, "-c", program], cwd=out.parent, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stdout
        )


def test_check_tells_what_stays_behind(tmp_path: Path) -> None:
    group = hierarchy().mountpoint / f"test-notes-{os.getpid()}"
    group.mkdir()
    out = tmp_path / "out"
    inside: list[int] = []
    with started(PROGRAM, out) as child:
        try:
            (group / "cgroup.procs").write_text(str(child.pid))
            while not (numbers := out.read_text().split()):
                time.sleep(0.01)
            with UserSource(child.pid, -1, SourceOptions()) as source:
                told = {what: about for about, what in source.survey().notes}
            inside = procfs.descendants(child.pid)
        finally:
            for pid in inside:
                os.kill(pid, signal.SIGKILL)
            child.wait()
            while (group / "cgroup.procs").read_text():
                time.sleep(0.01)
            group.rmdir()
    login = "the login uid 4711 (audit) will be that of the agent"
    assert told.pop(login, "") == (f"pid {child.pid}" if Path("/proc/self/loginuid").exists() else "")
    assert told["the filter 0000007f of core dumps (coredump_filter) will be that of the agent"] == f"pid {child.pid}"
    (of_cgroup,) = [what for what in told if group.name in what]
    assert of_cgroup.endswith("and its limits do not come along")
    assert told["files without a name: when they were last read is not kept"] == f"pid {child.pid} fd {numbers[0]}"
    error = "an error that a datagram has met waits to be read (SO_ERROR, MSG_ERRQUEUE), and will not be told"
    assert told[error] == f"pid {child.pid} fd {numbers[1]}"
    watching = "what happens to watched files while the tasks are stopped will not be told (inotify)"
    assert told[watching] == f"pid {child.pid} fd {numbers[2]}"
    assert told["that it is stopped will be told to its parent once more (WUNTRACED)"] == f"pid {inside[1]}"
    assert told["a time slice of its own (sched_setattr) will be that of the host"] == f"pid {child.pid}"


def test_the_survey_says_what_the_destination_must_have(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(NEEDS, out) as child:
        try:
            while not out.read_text():
                time.sleep(0.01)
            with UserSource(child.pid, -1, SourceOptions()) as source:
                found = source.survey()
        finally:
            child.kill()
            child.wait()
    assert out.read_text() == "ready\n"
    assert (found.congestion, found.most_files) == ({"reno"}, 4321)
    named = {fact.path: stat.S_IFMT(fact.mode) for fact in found.files if not stat.S_ISREG(fact.mode)}
    kinds = {"fifo": stat.S_IFIFO, "open": stat.S_IFDIR, "work": stat.S_IFDIR}
    assert named == {str(tmp_path / name): kind for name, kind in kinds.items()}
