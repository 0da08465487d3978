"""Every option that a program can set of a socket and read back is the same in the copy, or is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli import migrator
from socket_options import NOT_SET, PROGRAM, differences

pytestmark = pytest.mark.root


def await_json(path: Path, child: subprocess.Popen[bytes] | None = None) -> Any:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline and (child is None or child.poll() is None)
        time.sleep(0.01)
    return json.loads(path.read_text())


def test_what_can_be_set_is_the_same_in_the_copy(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(NOT_SET)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    copy = 0
    try:
        changed, before = await_json(tmp_path / "before", child)
        assert all(len(names) > (60 if "AF_" in kind else 15) for kind, names in changed.items())
        migrator("checkpoint", child.pid, "--kill", "-o", tmp_path / "image")
        child.wait()
        copy = int(migrator("restart", "-d", "-i", tmp_path / "image").stdout)
        (tmp_path / "go").touch()
        _, after = await_json(tmp_path / "after")
    finally:
        for pid in (child.pid, copy):
            if pid and Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        child.wait()
    assert list(differences(before, after)) == []


SIGNED = (
    "s = socket.socket(); key = struct.pack('HH4s120x', 2, 0, socket.inet_aton('127.0.0.1'))"
    " + struct.pack('BBHI80s', 0, 0, 3, 0, b'key'); s.setsockopt(6, 14, key); s.bind(('127.0.0.1', 0)); s.listen(1)"
)
REFUSED = [
    (SIGNED, "with keys (TCP_MD5SIG)"),
    ("s.setsockopt(0, 4, b'\\1\\1\\1\\1')", "options of IP of its own"),
    ("s.setsockopt(0, 50, struct.pack('!i', int(open('/sys/class/net/' + name + '/ifindex').read())))", "of number"),
    ("s.setsockopt(1, 37, struct.pack('ii', 0x82, 0))", "numbers its time stamps"),
    ("s = socket.socket(10, 2); s.setsockopt(41, 59, bytes([0, 0, 1, 4, 0, 0, 0, 0]))", "options of IP of its own"),
]


@pytest.mark.parametrize(("code", "reason"), REFUSED)
def test_what_cannot_be_set_again_is_refused(code: str, reason: str, tmp_path: Path) -> None:
    name = f"so{os.getpid()}"
    subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)
    begin = f"import socket, struct, time; name = {name!r}; s = socket.socket(2, 2);"
    child = subprocess.Popen(
        [sys.executable, "-c", f"{begin} {code}; open({str(tmp_path / 'ready')!r}, 'w'); time.sleep(1000)"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "log").open("wb"),
    )
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline and child.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        assert reason in migrator("checkpoint", child.pid, "--kill", "-o", tmp_path / "image", code=3).stderr
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
        subprocess.run(["ip", "link", "del", name], check=True)
