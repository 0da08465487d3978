"""Containers that take their files with them, while they write, rename and delete all the time.

Host b sees a file system of its own over one directory. The program in it knows what has to be in each of its
files, and checks it (`churn.c`); it is asked what it believes after each move, and the tree is compared with that.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from otherdisk import OtherDisk

from migrator.testing.hosts import Host
from migrator.testing.stage import MIGRATOR, MigrateFailed, Stage

pytestmark = pytest.mark.root

NAME = "churn"


@pytest.fixture(scope="module")
def churn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("churn") / "churn"
    source = Path(__file__).with_name("churn.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", program, source], check=True)
    return program


class Hosts:
    """Two hosts with disks of their own at `folder`."""

    def __init__(self, stage: Stage, folder: Path, disk: OtherDisk, program: Path) -> None:
        self.stage, self.folder, self.disk, self.program = stage, folder, disk, program
        self.root = folder / "root"

    def on(self, host: Host, path: Path) -> Path:
        return path if host is self.stage.a else Path(f"{self.disk.root}{path}")

    def start(self, *, static: int = 30) -> None:
        """The container, with a root that is on host a only, and its program in it."""
        (self.root / "data").mkdir(parents=True)
        (self.root / "churn").write_bytes(self.program.read_bytes())
        (self.root / "churn").chmod(0o755)
        for number in range(static):
            name = self.root / f"usr/share/{number % 7}/file{number}"
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_bytes(os.urandom(number * 100))
        os.link(self.root / "usr/share/0/file0", self.root / "usr/linked")
        (self.root / "usr/to-share").symlink_to("/usr/share")
        os.mkfifo(self.root / "usr/pipe")
        command = [*MIGRATOR, "run", "-d", "--name", NAME, "--bridge", "br0", "--root", str(self.root)]
        self.stage.a.run([*command, "--", "/churn", "/data", "300"])
        self.settled(self.stage.a, 50)

    def settled(self, host: Host, lines: int, top: Path | None = None) -> None:
        """Until it has done that much more, and found nothing wrong."""
        log = self.on(host, top or self.root / "data") / "log"
        deadline, before = time.monotonic() + 20, count(log)
        while count(log) < before + lines:
            assert time.monotonic() < deadline, f"{self.output(host)}\n{self.stage.agent_log(self.stage.b)}"
            time.sleep(0.01)

    def compare(self, host: Host, top: Path | None = None) -> None:
        """The tree is what the program believes, and there is nothing else."""
        data = self.on(host, top or self.root / "data")
        (data / "hold").touch()
        deadline = time.monotonic() + 20
        while not (data / "belief").exists():
            assert time.monotonic() < deadline, self.output(host)
            time.sleep(0.005)
        try:
            lines = (data / "belief").read_text().splitlines()
            assert lines.pop() == f"log {count(data / 'log')}"
            believed = {}
            for line in lines:
                name, size, seed = line.split()
                believed[name] = content(int(seed), int(size))
            found = {
                os.path.relpath(os.path.join(folder, name), data)
                for folder, _, names in os.walk(data)
                for name in names
            }
            assert found - {"log", "map", "hold", "belief"} == believed.keys()
            for name, wanted in believed.items():
                assert (data / name).read_bytes() == wanted, name
        finally:
            (data / "hold").unlink()

    def output(self, host: Host) -> str:
        log = self.on(host, self.root) / str(self.stage.folder / "log" / f"{NAME}.log").lstrip("/")
        return log.read_text() if log.exists() else ""

    def containers(self, host: Host) -> list[str]:
        return [row["name"] for row in json.loads(host.run([*MIGRATOR, "ps", "--json"]).stdout)]

    def leftovers(self, host: Host) -> list[str]:
        return [name for name in os.listdir(self.on(host, self.folder)) if ".migrator-" in name]


def count(log: Path) -> int:
    """The lines of a log, each the next one of the last."""
    text = log.read_text() if log.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    assert lines == [f"line {number}" for number in range(len(lines))]
    return len(lines)


def content(seed: int, size: int) -> bytes:
    return bytes((seed * 31 + n * 7 + (n >> 8)) & 0xFF for n in range(size))


def still(top: Path) -> dict[str, tuple[int, ...]]:
    """What nobody writes to: mode, size, times, number of names."""
    found = {}
    for folder, folders, names in os.walk(top):
        for name in [*folders, *names]:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            facts = (status.st_mode, status.st_uid, status.st_mtime_ns)
            more = (0, 0) if os.path.isdir(path) else (status.st_size, status.st_nlink)
            found[os.path.relpath(path, top)] = (*facts, *more)
    return found


@pytest.fixture
def hosts(churn: Path) -> Iterator[Hosts]:
    with Stage(tag="ct", agents=False) as stage:
        folder = stage.folder / "srv"
        folder.mkdir()
        disk = OtherDisk(stage.b, folder)
        try:
            stage.start_agent(stage.a)
            stage.start_agent(stage.b)
            yield Hosts(stage, folder, disk, churn)
            for host in (stage.a, stage.b):
                host.run([*MIGRATOR, "stop", NAME], check=False)
                stage.stop_agent(host)
        finally:
            disk.close()


def test_a_container_takes_its_root_along_there_and_back_again(hosts: Hosts) -> None:
    stage = hosts.stage
    hosts.start()
    usr = still(hosts.root / "usr")
    a, b = stage.a, stage.b
    for source, destination in [(a, b), (b, a), (a, b), (b, a)]:
        result = stage.migrate(NAME, source, destination, "--copy-files")
        assert result["outcome"] == "migrated"
        assert "changed files" in {phase["name"] for phase in result["timeline"]["phases"]}
        hosts.settled(destination, 50)
        hosts.compare(destination)
        assert still(hosts.on(destination, hosts.root) / "usr") == usr
        assert hosts.output(destination) == ""


def test_preflight_says_what_will_be_copied_and_touches_nothing(hosts: Hosts) -> None:
    hosts.start(static=40)
    peer = f"root@{hosts.stage.b.address}:7022"
    refused = hosts.stage.a.run([*MIGRATOR, "check", NAME, peer], check=False)
    assert refused.returncode == 3
    assert "/churn: is missing on b" in refused.stderr
    done = hosts.stage.a.run([*MIGRATOR, "check", NAME, peer, "--copy-files"])
    assert "differ or are missing on b and will be copied: /" in done.stdout
    assert len(done.stdout.splitlines()) < 10
    assert os.listdir(hosts.on(hosts.stage.b, hosts.folder)) == []
    hosts.compare(hosts.stage.a)


def test_what_was_only_there_is_named_and_set_aside(hosts: Hosts) -> None:
    hosts.start()
    there = hosts.on(hosts.stage.b, hosts.root)
    (there / "data").mkdir(parents=True)
    (there / "data/mine").write_text("mine")
    (there / "churn").write_text("an older program")
    result = hosts.stage.migrate(NAME, hosts.stage.a, hosts.stage.b, "--copy-files")
    noted = "\n".join(result["warnings"])
    assert "1 are on b only and will be set aside there: /data/mine" in noted
    hosts.settled(hosts.stage.b, 20)
    hosts.compare(hosts.stage.b)
    (left,) = hosts.leftovers(hosts.stage.b)
    assert (hosts.on(hosts.stage.b, hosts.folder) / left / "aside/data/mine").read_text() == "mine"
    deadline = time.monotonic() + 10
    while left not in hosts.stage.agent_log(hosts.stage.b):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_migration_that_is_given_up_leaves_whole_files_and_nothing_else(hosts: Hosts) -> None:
    hosts.start()
    there = hosts.on(hosts.stage.b, hosts.root)
    (there / "data").mkdir(parents=True)
    (there / "data/mine").write_text("mine")
    pid = f"/proc/{hosts.disk.root.parent.name}/ns/mnt"
    size = ["mount", "-o", "remount,size=1m", str(hosts.folder)]
    subprocess.run(["nsenter", f"--mount={pid}", *size], check=True)
    (hosts.root / "large").write_bytes(os.urandom(2 << 20))
    with pytest.raises(MigrateFailed) as failed:
        hosts.stage.migrate(NAME, hosts.stage.a, hosts.stage.b, "--copy-files")
    assert failed.value.code == 8
    assert "No space left on device" in failed.value.text
    assert hosts.containers(hosts.stage.b) == []
    assert (there / "data/mine").read_text() == "mine"
    deadline = time.monotonic() + 10
    while left := hosts.leftovers(hosts.stage.b):  # the agent goes on with that when the command has returned
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
    hosts.settled(hosts.stage.a, 20)
    hosts.compare(hosts.stage.a)


def test_a_link_in_the_destinations_tree_is_not_followed(hosts: Hosts) -> None:
    hosts.start()
    there = hosts.on(hosts.stage.b, hosts.root)
    there.mkdir()
    outside = hosts.on(hosts.stage.b, hosts.folder) / "outside"
    outside.mkdir()
    (there / "usr").symlink_to(hosts.folder / "outside")
    hosts.stage.migrate(NAME, hosts.stage.a, hosts.stage.b, "--copy-files")
    assert os.listdir(outside) == []
    assert not (there / "usr").is_symlink()
    hosts.settled(hosts.stage.b, 20)
    hosts.compare(hosts.stage.b)


def test_a_container_on_the_hosts_root_takes_along_the_paths_that_are_named(hosts: Hosts) -> None:
    data, stage = hosts.folder / "data", hosts.stage
    data.mkdir()
    (hosts.folder / "single").write_text("one file")
    (hosts.folder / "other").write_text("nobody's")
    program = hosts.folder / "program"
    program.write_bytes(hosts.program.read_bytes())
    program.chmod(0o755)
    stage.start_container(NAME, [str(program), str(data), "300"])
    hosts.settled(stage.a, 50, data)
    options = ["--copy-path", str(data), "--copy-path", str(hosts.folder / "single"), "--copy-path", f"{data}/log"]
    for source, destination in [(stage.a, stage.b), (stage.b, stage.a)]:
        stage.migrate(NAME, source, destination, *options)
        hosts.settled(destination, 50, data)
        hosts.compare(destination, data)
    assert {name for name in os.listdir(hosts.on(stage.b, hosts.folder)) if not name.startswith(".")} == {
        "data", "single", "program",
    }  # fmt: skip
    assert (stage.folder / "log" / f"{NAME}.log").read_text() == ""
    done = stage.a.run([*MIGRATOR, "check", NAME, f"root@{stage.b.address}:7022", "--copy-path", "/"], check=False)
    assert done.returncode == 2 and "that is the whole host" in done.stderr
    shared = str(stage.folder / "log")
    done = stage.a.run([*MIGRATOR, "check", NAME, f"root@{stage.b.address}:7022", "--copy-path", shared], check=False)
    assert done.returncode == 3 and f"{shared}: is the same directory on both hosts" in done.stderr


def test_a_path_that_cannot_be_carried_is_an_error_that_says_why(hosts: Hosts) -> None:
    hosts.start()
    peer = f"root@{hosts.stage.b.address}:7022"
    for path, why in {
        "srv/data": "not an absolute path",
        "/nowhere/at/all": f"there is no such file in the root of {NAME}",
        "/etc/passwd": f"is outside of the root of {NAME}",
        "/usr/to-share/0": "leads over a symbolic link",
        "/proc": "lies on a proc",
        "/usr/pipe": "is neither a file nor a directory",
        f"{hosts.root}/data": "as the workload sees it, that is /data",
    }.items():
        done = hosts.stage.a.run([*MIGRATOR, "migrate", NAME, peer, "--copy-path", path], check=False)
        assert done.returncode == 2, done.stderr
        assert why in done.stderr
    assert hosts.containers(hosts.stage.a) == [NAME]
    hosts.settled(hosts.stage.a, 5)
