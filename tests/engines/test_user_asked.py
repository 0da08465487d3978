"""What only a task itself can find out, and is not carried, is refused ahead of the freeze, and at it."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import contained
import pytest
from cli import MIGRATOR
from contained import NAME, own_directories  # noqa: F401 (a fixture)
from scripts import script

from migrator.engine.base import SourceOptions
from migrator.engine.user.dump import asked, survey_notes, survey_tasks
from migrator.engine.user.dump.parasite import ProcessReply, ThreadReply
from migrator.engine.user.dump.process import Process
from migrator.engine.user.dump.source import UserSource
from migrator.errors import CheckpointFailed, Refused
from migrator.linux import confinement, procfs

pytestmark = pytest.mark.root

BEGIN = """
import ctypes, os, select, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    result = libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
    assert result >= 0, (args, os.strerror(ctypes.get_errno()))
    return result
def in_thread(*args):
    done = threading.Event()
    threading.Thread(target=lambda: (call(*args), done.set(), time.sleep(1000)), daemon=True).start()
    done.wait()
"""
END = """
print("ready", flush=True)
while True: time.sleep(0.01)
"""
BUSY = """
import fcntl
epoll = select.epoll()
fcntl.ioctl(epoll.fileno(), 0x40088a01, struct.pack("IHBx", 10, 8, 0))
"""
REFUSED = [
    ("call(250, 0, -1, 1)", "has a keyring of its own"),
    ("in_thread(250, 0, -1, 1)", "has a keyring of its own"),
    ("call(250, 0, -2, 1)", "has a keyring of its own"),
    ("call(154, 1, struct.pack('4I', 3, 0x1000, 0xFFFFF, 0x51), 16)", "has a table of segments"),
    (BUSY, "this epoll instance polls busily"),
]


@pytest.mark.parametrize("early", [True, False], ids=["ahead", "at the freeze"])
@pytest.mark.parametrize(("code", "reason"), REFUSED, ids=[r for _, r in REFUSED])
def test_it_is_refused_and_runs_on(code: str, reason: str, early: bool, tmp_path: Path) -> None:
    with script(tmp_path, BEGIN + code + END) as program, (tmp_path / "image").open("wb") as sink:
        options = SourceOptions(cgroup_name=f"asked-{os.getpid()}")
        with UserSource(program.pid, sink.fileno(), options) as source:
            source.survey()
            source.instrument("user")
            with pytest.raises(CheckpointFailed, match=reason):
                if early and code != BUSY:
                    for _ in range(3):
                        source.round()
                    raise AssertionError
                source.freeze()
                source.final()
            source.thaw()
        assert procfs.stat(program.pid)[3] in "SR"


def reply(**said: Any) -> ProcessReply:
    thread = ThreadReply((0, 0, 0), 0, 0, 0, "", 0, 0, False, False, 2, False, False, 0, False)
    plain = ProcessReply(thread, b"", b"", [], 0, 1, 0, 0, False, False, False, 0, False, 0, False, False)
    return dataclasses.replace(plain, **said)


@pytest.mark.parametrize(
    ("said", "reason"), [({"xcomp": 1 << 18}, "as AMX"), ({"tags": True}, "has addresses with tags")]
)
def test_what_this_processor_has_not_is_refused(
    said: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asked, "_usual_features", lambda: 0xE7)
    process = cast(Process, SimpleNamespace(pid=os.getpid()))
    answer = reply(**said)
    with pytest.raises(CheckpointFailed, match=reason):
        asked.refuse_asked(process, {"Name": "python3"}, answer, [answer.leader])
    asked.refuse_asked(process, {"Name": "python3"}, reply(xcomp=0xE7), [answer.leader])


def test_a_flusher_is_refused_in_the_survey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = procfs.stat

    def stat_of_a_flusher(pid: int, tid: int | None = None) -> list[str]:
        fields = stat(pid, tid)
        return [*fields[:9], str(int(fields[9]) | survey_tasks._IO_FLUSHER), *fields[10:]]

    monkeypatch.setattr(procfs, "stat", stat_of_a_flusher)
    with (
        script(tmp_path, BEGIN + END) as program,
        UserSource(program.pid, -1, SourceOptions()) as source,
        pytest.raises(Refused, match="is there to write out memory"),
    ):
        source.survey()


@pytest.mark.parametrize("late", [False, True], ids=["before the survey", "since"])
def test_a_label_of_a_security_module_that_is_not_ours_is_refused(
    late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: dict[int, str] = {}
    monkeypatch.setattr(confinement, "_own_label", lambda: "unconfined")
    monkeypatch.setattr(confinement, "_label", lambda tid: labels.get(tid, "unconfined"))
    with (
        script(tmp_path, BEGIN + END) as program,
        open(tmp_path / "image", "wb", buffering=0) as image,
        UserSource(program.pid, image.fileno(), SourceOptions()) as source,
    ):
        if late:
            source.survey()
            source.instrument()
            source.freeze()
        labels[program.pid] = "/usr/sbin/named (enforce)"
        with pytest.raises(
            Refused if not late else CheckpointFailed, match=re.escape("as /usr/sbin/named (enforce) and migrator")
        ):
            source.final() if late else source.survey()


def test_bounds_of_utilization_and_cores_of_its_own_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_notes.sys, "utilization_clamps", lambda tid: (10, 1024))
    monkeypatch.setattr(survey_notes.sys, "core_cookie", lambda tid: 7)
    with script(tmp_path, BEGIN + END) as program, UserSource(program.pid, -1, SourceOptions()) as source:
        told = {what: about for about, what in source.survey().notes}
    assert told["bounds of its utilization (sched_setattr) do not come along"] == f"pid {program.pid}"
    assert told["that it shares no core with others (PR_SCHED_CORE) does not come along"] == f"pid {program.pid}"


LOOKS = """
print("ready", flush=True)
while True: time.sleep(0.01); print(libc.syscall(250, 10, -3, b"user", b"migrator-test", 0) >= 0, flush=True)
"""
WITH_KEY = [  # a command, in a new session keyring with a key
    sys.executable,
    "-c",
    "import ctypes, os, sys; call = ctypes.CDLL(None).syscall; assert call(250, 1, 0) > 0;"
    "assert call(248, b'user', b'migrator-test', b'secret', 6, -3) > 0; os.execvp(sys.argv[1], sys.argv[1:])",
]


def test_a_copy_has_no_key_of_the_session_of_whoever_restarts_it(tmp_path: Path) -> None:
    """The agent's session has a key; the copy, whose session keyring is empty, does not find it."""
    with script(tmp_path, BEGIN + LOOKS, within=WITH_KEY, ready="True") as program:
        program.save(tmp_path / "image")
        before = program.log.read_text()
        assert "False" not in before
        program.restart(tmp_path / "image", within=WITH_KEY)
        assert "True" not in program.await_text("False")[len(before) :]


def test_a_container_has_no_key_of_the_session_of_whoever_runs_it(tmp_path: Path) -> None:
    argv = [*MIGRATOR, "run", "--name", NAME, "--bridge", "", "--", sys.executable, "-c"]
    subprocess.run([*WITH_KEY, *argv, BEGIN + LOOKS.replace("while True: ", "")], check=True, capture_output=True)
    assert contained.log(tmp_path).split() == ["ready", "False"]
