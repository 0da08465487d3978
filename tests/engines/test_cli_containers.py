"""Containers by the command line: run, ps, checkpoint, restart, thaw, stop; and migrator inside of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli import MIGRATOR, await_file, build, end, migrator, started

from migrator.recovery.journal import Journal, JournalHeader, Role, boot_id

pytestmark = pytest.mark.root

NAME = f"cli{os.getpid()}"


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MIGRATOR_STATE_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("MIGRATOR_JOURNAL_DIR", str(tmp_path / "journal"))
    monkeypatch.setenv("MIGRATOR_LOG_DIR", str(tmp_path / "log"))
    yield
    subprocess.run([*MIGRATOR, "stop", NAME], capture_output=True, check=False)


def run_counter(folder: Path) -> int:
    done = migrator("run", "-d", "--name", NAME, "--bridge", "", "--", build("counter"), folder / "out", 5)
    return int(done.stdout)


def row() -> dict[str, Any]:
    (only,) = json.loads(migrator("ps", "--json").stdout)
    assert only["name"] == NAME
    return dict(only)


def ticks(folder: Path) -> list[int]:
    lines = (folder / "out").read_text().splitlines()
    assert not [line for line in lines if line.startswith("FAIL")]
    return [int(line.split()[1]) for line in lines if line.startswith("tick ")]


def await_ticks(folder: Path, more: int = 3) -> None:
    before, deadline = len(ticks(folder)), time.monotonic() + 20
    while len(ticks(folder)) < before + more:
        assert time.monotonic() < deadline, "it stands still"
        time.sleep(0.01)


def test_a_container_is_saved_by_name_through_a_pipe_and_counts_on(tmp_path: Path) -> None:
    first = run_counter(tmp_path)
    again = migrator("run", "--name", NAME, "--bridge", "", "--", "true", code=2)
    assert "already lives" in again.stderr
    assert "migrator stop" in again.stderr
    save = started("checkpoint", NAME, "--kill", stdout=subprocess.PIPE)
    load = started("restart", "-d", stdin=save.stdout, stdout=subprocess.PIPE, text=True)
    assert save.stdout is not None
    save.stdout.close()
    said, _ = load.communicate(timeout=60)
    assert (save.wait(), load.returncode) == (0, 0)
    assert (row()["state"], row()["init_pid"]) == ("running", int(said))
    assert int(said) != first
    await_ticks(tmp_path)
    migrator("stop", NAME)
    assert json.loads(migrator("ps", "--json").stdout) == []
    assert ticks(tmp_path) == list(range(1, len(ticks(tmp_path)) + 1))


def test_a_frozen_container_is_shown_refused_and_thawed_and_ends_in_the_foreground(tmp_path: Path) -> None:
    image = tmp_path / "image"
    pid = run_counter(tmp_path)
    migrator("checkpoint", pid, "--kill", "-o", image)
    assert json.loads(migrator("ps", "--json").stdout) == []
    migrator("restart", "--frozen", "-i", image)
    assert row()["state"] == "frozen"
    done = migrator("checkpoint", NAME, "-o", image, code=2)
    assert "is frozen" in done.stderr
    migrator("thaw", NAME)
    assert row()["state"] == "running"
    await_ticks(tmp_path)
    migrator("stop", NAME)
    foreground = started("restart", "-i", image, stdin=subprocess.DEVNULL)
    try:
        await_ticks(tmp_path)
        foreground.send_signal(signal.SIGTERM)
        assert foreground.wait(20) == 0
    finally:
        end(foreground)
    assert json.loads(migrator("ps", "--json").stdout) == []


def test_what_a_migration_has_frozen_is_neither_thawed_nor_stopped_by_hand(tmp_path: Path) -> None:
    run_counter(tmp_path)
    facts = JournalHeader(migration="m-undecided", role=Role.SOURCE, container=NAME, boot_id=boot_id())
    Journal.create(tmp_path / "journal", facts).close()
    for command in ("thaw", "stop"):
        done = migrator(command, NAME, code=2)
        assert "m-undecided" in done.stderr
        assert "migrator settle" in done.stderr
    await_ticks(tmp_path)
    (tmp_path / "journal" / "m-undecided.source.journal").unlink()


def test_a_program_in_a_container_is_saved_and_restarted_from_inside(tmp_path: Path) -> None:
    python = os.path.realpath(sys.executable)
    inside = tmp_path / "inside.py"
    inside.write_text(f"""
import os, subprocess, sys, time
here = {str(tmp_path)!r}
ours = {MIGRATOR!r}
def ticks():
    return open(here + "/out").read().count("tick")
def more():
    before = ticks()
    while ticks() < before + 3:
        time.sleep(0.01)
def cgroup():
    return open(f"/proc/{{child.pid}}/cgroup").read()
child = subprocess.Popen([{str(build("counter"))!r}, here + "/out", "5"])
time.sleep(0.3)
home = cgroup()
subprocess.run([*ours, "checkpoint", str(child.pid), "-o", here + "/one"], check=True)
assert cgroup() == home, "it is not where it was"
more()
subprocess.run([*ours, "checkpoint", str(child.pid), "--kill", "-o", here + "/two"], check=True)
child.wait()
subprocess.run([*ours, "restart", "-d", "-i", here + "/two"], check=True, stdin=subprocess.DEVNULL)
more()
open(here + "/done", "w").write("well")
""")
    env = [item for key in ("PATH", "PYTHONPATH") if key in os.environ for item in ("-e", key)]
    env += ["-e", f"PYTHONPATH={':'.join(filter(None, sys.path))}"]
    log = tmp_path / "log" / f"{NAME}.log"
    done = subprocess.run(
        [*MIGRATOR, "run", "--name", NAME, "--bridge", "", *env, "--", python, str(inside)],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + log.read_text()
    assert await_file(tmp_path / "done") == "well"
    assert ticks(tmp_path) == list(range(1, len(ticks(tmp_path)) + 1))
