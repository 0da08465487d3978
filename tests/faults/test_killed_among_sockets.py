"""A source agent is killed between any two steps that touch the connections of a frozen tree."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator import host
from migrator.errors import Fate
from migrator.linux.cgroup import PARENT, directory_of, hierarchy
from migrator.protocol.states import Recorded
from migrator.recovery.journal import JournalHeader
from migrator.recovery.settle import settle_all

pytestmark = pytest.mark.root

TALK = """
import socket, sys, time
l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen()
c = socket.create_connection(l.getsockname()); s, _ = l.accept()
c.setsockopt(1, 2, 1)
out = open(sys.argv[1], 'ab', buffering=0)
n = 0
try:
    while True:
        n += 1
        c.sendall(n.to_bytes(4, 'big'))
        assert s.recv(4, socket.MSG_WAITALL) == n.to_bytes(4, 'big')
        out.write(b'%d\\n' % n if c.getsockopt(1, 2) else b'forgot\\n')
        c.setsockopt(1, 2, 1)
        time.sleep(0.001)
except BaseException as error:
    out.write(f'FAIL {error!r}\\n'.encode())
"""


class Talking:
    """A program with both ends of a connection, which says so when anything goes wrong with it."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "talk"
        self.out.touch()
        nothing = subprocess.DEVNULL
        command = [sys.executable, "-c", TALK, str(self.out)]
        self.process = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
        self.pid = self.process.pid
        self.goes_on()

    def goes_on(self) -> None:
        """It talks, and has had no error so far."""
        before, deadline = self.out.stat().st_size, time.monotonic() + 10
        while self.out.stat().st_size < before + 20:
            assert time.monotonic() < deadline, "it stands still"
            assert self.process.poll() is None, self.out.read_text()[-100:]
            time.sleep(0.002)
        assert "FAIL" not in self.out.read_text()


@pytest.fixture
def talking(tmp_path: Path) -> Iterator[Talking]:
    made = Talking(tmp_path)
    yield made
    made.process.kill()
    made.process.wait()


async def nobody(facts: JournalHeader) -> Recorded:
    raise AssertionError("the source decides alone")


async def test_at_whatever_step_it_dies_the_workload_talks_on_where_it_was(talking: Talking, tmp_path: Path) -> None:
    home = directory_of(talking.pid)
    parent = hierarchy().mountpoint / PARENT
    nursery = [sys.executable, str(Path(__file__).with_name("socket_agents.py"))]
    passed = []
    with subprocess.Popen(nursery, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as agents:
        assert agents.stdin is not None and agents.stdout is not None
        while not passed or passed[-1]:
            agents.stdin.write(json.dumps([talking.pid, str(tmp_path / "journal"), len(passed)]) + "\n")
            agents.stdin.flush()
            passed.append(json.loads(agents.stdout.readline()))
            assert not passed[-1].startswith("ended with"), passed
            (settled,) = await settle_all(tmp_path / "journal", host.tools(), nobody)
            assert settled.fate is Fate.SOURCE, (passed, settled)
            talking.goes_on()
            assert directory_of(talking.pid) == home, passed
            assert not list(parent.glob(f"migrate-{talking.pid}-*")), passed
        agents.stdin.close()
    # Repair mode replaces SO_REUSEADDR. Only of the socket that an agent was just putting it back to, it is lost.
    assert talking.out.read_text().count("forgot") <= passed.count("reuse_address")
    assert {"freeze", "repair", "save", "leave", "thaw", "detach", ""} <= set(passed)
