"""Locked files on storage that both hosts share: the locks go with the decision, and stay with an abort."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.testing.stage import MIGRATOR, MigrateFailed, Stage

pytestmark = pytest.mark.root

WORKLOADS = Path(__file__).parents[1] / "workloads"
SPAN = struct.Struct("<hhxxxxqqixxxx")


class Locker:
    """The workload in a container on host a, and a stranger who would like its locks."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        argv = [sys.executable, str(WORKLOADS / "locker.py"), str(self.out), str(folder)]
        stage.a.run([*MIGRATOR, "run", "-d", "--name", "locker", "--bridge", "", "--", *argv])
        self.check()

    def ticks(self) -> int:
        return self.out.read_text().count("tick") if self.out.exists() else 0

    def check(self) -> None:
        """It goes on, has missed no lock, and nobody else can have one."""
        before, deadline = self.ticks(), time.monotonic() + 20
        while self.ticks() < before + 5:
            assert time.monotonic() < deadline, self.out.read_text()[-500:] if self.out.exists() else "no output"
            time.sleep(0.01)
        assert "FAIL" not in self.out.read_text(), self.out.read_text()
        for name, operation in (("flock", fcntl.LOCK_SH), ("shared", fcntl.LOCK_EX)):
            with open(self.folder / name) as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, operation | fcntl.LOCK_NB)
        for name in ("posix", "ofd", "shared"):
            with open(self.folder / name, "r+") as file:
                for start, free in ((12, name == "ofd"), (120, name == "shared")):
                    raw = fcntl.fcntl(file, 36, SPAN.pack(fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0))
                    assert (SPAN.unpack(raw)[0] == fcntl.F_UNLCK) == free, (name, start)


@pytest.fixture
def locker(stage: Stage, tmp_path: Path) -> Iterator[Locker]:
    yield Locker(stage, tmp_path)
    for host in (stage.a, stage.b):
        host.run([*MIGRATOR, "stop", "locker"], check=False)


def test_locks_move_there_and_back(stage: Stage, locker: Locker) -> None:
    here, there = stage.a, stage.b
    for options in ((), ("--verify",), ("--verify",), ()):
        result = stage.migrate("locker", here, there, *options)
        assert result["outcome"] == "migrated"
        assert "locks" in [span["name"] for span in result["timeline"]["phases"]]
        locker.check()
        here, there = there, here


@pytest.mark.parametrize("point", ["destination.held", "source.saved"])
def test_a_migration_that_is_given_up_leaves_every_lock_as_it_was(stage: Stage, locker: Locker, point: str) -> None:
    host = stage.a if point.startswith("source.") else stage.b
    host.env["MIGRATOR_FAULT"] = f"{point}:raise"
    stage.stop_agent(stage.b)
    stage.start_agent(stage.b)
    try:
        with pytest.raises(MigrateFailed, match="running on the source"):
            stage.migrate("locker", stage.a, stage.b)
    finally:
        del host.env["MIGRATOR_FAULT"]
        stage.stop_agent(stage.b)
        stage.start_agent(stage.b)
    locker.check()
    assert stage.migrate("locker", stage.a, stage.b)["outcome"] == "migrated"
    locker.check()


def test_an_agent_that_dies_before_the_locks_are_had_is_followed_by_one_that_takes_them(
    stage: Stage, locker: Locker
) -> None:
    stage.stop_agent(stage.b)
    stage.start_agent(stage.b, env={**stage.b.env, "MIGRATOR_FAULT": "destination.decided:exit"})
    migration = stage.a.popen([*MIGRATOR, "migrate", "locker", f"root@{stage.b.address}:7022", "--json"])
    assert stage.await_death(stage.b) == 86
    stage.stop_agent(stage.b)
    stage.start_agent(stage.b)
    assert migration.wait(40) == 0
    locker.check()
