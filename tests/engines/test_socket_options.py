"""Every option that a program can set of a socket and read back is the same in the copy, or is refused."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from cli import migrator
from scripts import script
from socket_options import NOT_SET, PROGRAM, differences

pytestmark = pytest.mark.root


def test_what_can_be_set_is_the_same_in_the_copy(tmp_path: Path) -> None:
    with script(tmp_path, PROGRAM, tmp_path, json.dumps(NOT_SET), ready="said before") as program:
        changed, before = json.loads((tmp_path / "before").read_text())
        assert all(len(names) > (60 if "AF_" in kind else 15) for kind, names in changed.items())
        program.save(tmp_path / "image")
        program.restart(tmp_path / "image")
        (tmp_path / "go").touch()
        program.await_text("said after")
        _, after = json.loads((tmp_path / "after").read_text())
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
    try:
        with script(tmp_path, f"{begin} {code}; print('ready', flush=True); time.sleep(1000)") as program:
            done = migrator("checkpoint", program.pid, "--kill", "-o", tmp_path / "image", code=3)
            assert reason in done.stderr
            assert program.child.poll() is None
    finally:
        subprocess.run(["ip", "link", "del", name], check=True)
