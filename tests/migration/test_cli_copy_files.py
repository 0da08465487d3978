"""Two hosts whose files differ: preflight names them, `--copy-files` carries them, also while they grow.

Host b sees a file system of its own over one directory, as a host with disks of its own would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from otherdisk import OtherDisk

from migrator.testing.hosts import Host
from migrator.testing.stage import MIGRATOR, MigrateFailed, Stage

pytestmark = pytest.mark.root

NAME = "files"

# Appends to one file, reads another, and overwrites parts of a third; it says so if any is not as it left it.
PROGRAM = """
import os, sys, time
folder = sys.argv[1]
settings = os.open(folder + "/settings", os.O_RDONLY)
log = os.open(folder + "/log", os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o640)
data = os.open(folder + "/data", os.O_RDWR)
said, count, size = os.pread(settings, 100, 0), 0, os.fstat(data).st_size
while True:
    place = count * 4093 % (size - 8)
    os.pwrite(data, count.to_bytes(8, "little"), place)
    os.write(log, b"line %d\\n" % count)
    assert os.pread(settings, 100, 0) == said
    assert int.from_bytes(os.pread(data, 8, place), "little") == count
    count += 1
    time.sleep(0.002)
"""


class Hosts:
    """The stage, the directory that differs, and the workload that writes there."""

    def __init__(self, stage: Stage, folder: Path, disk: OtherDisk) -> None:
        self.stage, self.folder, self.disk = stage, folder, disk

    def on_b(self, name: str) -> Path:
        return Path(f"{self.disk.root}{self.folder / name}")

    def start(self) -> None:
        self.folder.joinpath("settings").write_text("colour = green\n")
        self.folder.joinpath("data").write_bytes(os.urandom(3 << 20))
        self.folder.joinpath("data").chmod(0o600)
        python = os.path.realpath(sys.executable)
        self.stage.start_container(NAME, [python, "-c", PROGRAM, str(self.folder)])
        self.await_lines(self.folder / "log", 20)

    def await_lines(self, log: Path, more: int) -> None:
        """Until it has written `more` lines from now on, each the next one of the last."""
        deadline, before = time.monotonic() + 20, self.lines(log)
        while (now := self.lines(log)) < before + more:
            assert time.monotonic() < deadline, f"{now} lines; {self.output()}"
            time.sleep(0.01)

    def await_tidied(self, folder: Path) -> None:
        """Until nothing of ours is in it: an agent goes on with that when the command has returned."""
        deadline = time.monotonic() + 10
        while left := [name for name in os.listdir(folder) if name.startswith(".")]:
            assert time.monotonic() < deadline, left
            time.sleep(0.01)

    def lines(self, log: Path) -> int:
        text = log.read_text() if log.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        assert lines == [f"line {number}" for number in range(len(lines))]
        return len(lines)

    def output(self) -> str:
        return (self.stage.folder / "log" / f"{NAME}.log").read_text()

    def containers(self, host: Host) -> list[str]:
        return [row["name"] for row in json.loads(host.run([*MIGRATOR, "ps", "--json"]).stdout)]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Stage(tag="cf", agents=False) as stage:
        folder = stage.folder / "srv"
        folder.mkdir()
        disk = OtherDisk(stage.b, folder)
        try:
            stage.start_agent(stage.a)
            stage.start_agent(stage.b)
            yield Hosts(stage, folder, disk)
            for host in (stage.a, stage.b):
                host.run([*MIGRATOR, "stop", NAME], check=False)
                stage.stop_agent(host)
        finally:
            disk.close()


def test_files_that_lack_or_differ_are_named_and_nothing_is_stopped(hosts: Hosts) -> None:
    hosts.start()
    hosts.on_b("settings").write_text("colour = brown\n")
    peer = f"root@{hosts.stage.b.address}:7022"
    for command in (["check"], ["migrate", "--dry-run"], ["migrate"]):
        done = hosts.stage.a.run([*MIGRATOR, *command, NAME, peer], check=False)
        assert done.returncode == 3, done.stderr
        assert f"{hosts.folder}/settings: has other contents on b" in done.stderr
        assert f"{hosts.folder}/data: is missing on b" in done.stderr
        assert f"{hosts.folder}/log: is missing on b" in done.stderr
        assert "--copy-files" in done.stderr
    assert sorted(os.listdir(hosts.on_b(""))) == ["settings"], "a preflight writes nothing"
    assert hosts.containers(hosts.stage.a) == [NAME]
    hosts.await_lines(hosts.folder / "log", 5)
    done = hosts.stage.a.run([*MIGRATOR, "check", NAME, peer, "--copy-files"])
    assert "it can be moved" in done.stdout
    assert sorted(os.listdir(hosts.on_b(""))) == ["settings"]


def test_files_are_carried_along_there_and_back_while_the_workload_writes_to_them(hosts: Hosts) -> None:
    hosts.start()
    hosts.on_b("settings").write_text("colour = brown\n")
    stage = hosts.stage
    result = stage.migrate(NAME, stage.a, stage.b, "--copy-files")
    assert result["outcome"] == "migrated"
    left = {name: (hosts.folder / name).read_bytes() for name in ("settings", "log", "data")}
    hosts.await_lines(hosts.on_b("log"), 20)
    assert hosts.on_b("settings").read_bytes() == left["settings"]
    assert hosts.on_b("log").read_bytes().startswith(left["log"])
    assert {name: (hosts.folder / name).read_bytes() for name in left} == left, "the source writes no more"
    assert hosts.on_b("data").stat().st_mode & 0o7777 == 0o600
    assert hosts.on_b("log").stat().st_mode & 0o7777 == 0o640
    # And back, over what was left there and is out of date by now.
    with pytest.raises(MigrateFailed) as failed:
        stage.migrate(NAME, stage.b, stage.a)
    assert failed.value.code == 3
    assert "is older than the one that the workload writes to" in failed.value.text
    result = stage.migrate(NAME, stage.b, stage.a, "--copy-files")
    assert result["outcome"] == "migrated"
    there = hosts.on_b("log").read_bytes()
    hosts.await_lines(hosts.folder / "log", 20)
    assert (hosts.folder / "log").read_bytes().startswith(there)
    assert hosts.containers(stage.b) == []
    hosts.await_tidied(hosts.folder)
    hosts.await_tidied(hosts.on_b(""))
    assert hosts.output() == ""


def test_a_host_without_room_for_the_files_ends_the_migration_and_nothing_else(hosts: Hosts) -> None:
    hosts.start()
    keeper = hosts.on_b("full")
    subprocess.run(["nsenter", f"--mount={hosts.disk.root.parent}/ns/mnt", "mount", "-o", "remount,size=1m",
                    str(hosts.folder)], check=True)  # fmt: skip
    keeper.write_bytes(b"x" * 4096)
    with pytest.raises(MigrateFailed) as failed:
        hosts.stage.migrate(NAME, hosts.stage.a, hosts.stage.b, "--copy-files")
    assert failed.value.code == 8
    assert "No space left on device" in failed.value.text
    hosts.await_lines(hosts.folder / "log", 5)
    assert hosts.containers(hosts.stage.a) == [NAME]
    assert hosts.containers(hosts.stage.b) == []
    hosts.await_tidied(hosts.on_b(""))
