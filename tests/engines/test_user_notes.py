"""What check says of a tree that is carried, and of which something stays behind, or will not be quite the same."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from migrator.engine.base import SourceOptions
from migrator.engine.user.dump.source import UserSource
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
import tempfile, time
try:
    open("/proc/self/loginuid", "w").write("4711")
except FileNotFoundError:
    pass  # a kernel without audit
open("/proc/self/coredump_filter", "w").write("0x7f")
kept = tempfile.TemporaryFile(dir=".")
print(kept.fileno(), flush=True)
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
    with started(PROGRAM, out) as child:
        try:
            (group / "cgroup.procs").write_text(str(child.pid))
            while not (number := out.read_text().strip()):
                time.sleep(0.01)
            with UserSource(child.pid, -1, SourceOptions()) as source:
                told = {what: about for about, what in source.survey().notes}
        finally:
            child.kill()
            child.wait()
            group.rmdir()
    login = "the login uid 4711 (audit) will be that of the agent"
    assert told.pop(login, "") == (f"pid {child.pid}" if Path("/proc/self/loginuid").exists() else "")
    assert told["the filter 0000007f of core dumps (coredump_filter) will be that of the agent"] == f"pid {child.pid}"
    (of_cgroup,) = [what for what in told if group.name in what]
    assert of_cgroup.endswith("and its limits do not come along")
    assert told["files without a name: when they were last read is not kept"] == f"pid {child.pid} fd {number}"


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
