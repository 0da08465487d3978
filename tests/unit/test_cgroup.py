"""Cgroups: which hierarchy, and what freezing promises."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.errors import UsageError
from migrator.linux import ptrace
from migrator.linux.cgroup import PARENT, Cgroup, hierarchies, hierarchy, path_in, unique_name

HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/uni\\040fied rw,relatime shared:3 - cgroup2 cgroup2 rw
"""


def test_version_2_is_preferred_and_odd_mount_points_are_understood() -> None:
    found = hierarchies(HYBRID)
    assert [(h.version, str(h.mountpoint)) for h in found] == [
        (2, "/sys/fs/cgroup/uni fied"),
        (1, "/sys/fs/cgroup/freezer"),
    ]


def test_a_hierarchy_without_a_freezer_is_none() -> None:
    assert hierarchies("40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n") == []
    assert hierarchies("garbage\n\n - \n") == []


@pytest.mark.parametrize(
    ("text", "version", "path"),
    [
        ("0::/a/b\n", 2, "/a/b"),
        ("9:name=systemd:/x\n6:freezer:/f\n0::/u\n", 1, "/f"),
        ("9:name=systemd:/x\n6:freezer,devices:/f:g\n0::/u\n", 1, "/f:g"),
    ],
)
def test_the_cgroup_of_a_process_is_read(text: str, version: int, path: str) -> None:
    assert path_in(text, version) == path


def test_a_process_in_no_such_hierarchy_is_said_to_be_in_none() -> None:
    with pytest.raises(LookupError):
        path_in("9:name=systemd:/x\n", 1)


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden"])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        Cgroup.create(name)


COUNT = """
import mmap, sys
file = open(sys.argv[1], "r+b")
m = mmap.mmap(file.fileno(), 8)
n = 0
while True:
    n += 1
    m[:8] = n.to_bytes(8, "little")
"""


class Counter:
    """A process that counts as fast as it can, in shared memory."""

    def __init__(self, folder: Path) -> None:
        path = folder / "count"
        path.write_bytes(bytes(8))
        self.process = subprocess.Popen([sys.executable, "-c", COUNT, str(path)])
        self.pid = self.process.pid
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 8)
        for _ in range(1000):
            if self.value:
                return
            time.sleep(0.005)
        self.close()
        raise AssertionError("the counter does not count")

    @property
    def value(self) -> int:
        return int(struct.unpack("<Q", self._memory[:8])[0])

    def runs(self) -> bool:
        """Whether it counts on; a frozen one is given time to betray itself."""
        before = self.value
        for _ in range(10):
            time.sleep(0.01)
            if self.value != before:
                return True
        return False

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._memory.close()


@pytest.fixture
def counter(tmp_path: Path) -> Iterator[Counter]:
    process = Counter(tmp_path)
    yield process
    process.close()


@pytest.fixture(params=[2, 1], ids=["v2", "v1"])
def group(request: pytest.FixtureRequest) -> Iterator[Cgroup]:
    made = Cgroup.create(f"test-cg-{os.getpid()}-{request.param}", version=request.param)
    yield made
    made = Cgroup.at(made.path) if made.path.exists() else made
    if made.path.exists():
        made.thaw()
        made.kill()
        made.remove()


root = pytest.mark.root


@root
def test_a_frozen_process_stands_still_until_it_is_thawed(group: Cgroup, counter: Counter) -> None:
    group.attach(counter.pid)
    assert group.pids() == [counter.pid]
    assert not group.frozen
    group.freeze()
    assert group.frozen
    assert not counter.runs()
    group.thaw()
    assert counter.runs()
    assert not group.frozen


@root
def test_a_traced_process_stays_frozen_when_its_tracer_detaches(group: Cgroup, counter: Counter) -> None:
    group.attach(counter.pid)
    ptrace.seize(counter.pid)
    ptrace.interrupt(counter.pid)
    ptrace.wait(counter.pid)
    group.freeze()  # returns: a task in a ptrace stop counts as frozen
    before = counter.value
    ptrace.detach(counter.pid)
    assert not counter.runs()
    assert counter.value == before, "it ran between the detach and the freezer"
    assert group.frozen
    group.thaw()
    assert counter.runs()


@root
def test_a_traced_process_stands_still_through_a_freeze_and_a_thaw(group: Cgroup, counter: Counter) -> None:
    group.attach(counter.pid)
    ptrace.seize(counter.pid)
    ptrace.interrupt(counter.pid)
    ptrace.wait(counter.pid)
    group.freeze(wait=False)
    group.thaw()
    assert not counter.runs()
    assert ptrace.get_sigmask(counter.pid) == 0
    ptrace.cont(counter.pid)
    assert counter.runs()
    ptrace.interrupt(counter.pid)
    ptrace.wait(counter.pid)
    ptrace.detach(counter.pid)
    assert counter.runs()


@root
def test_a_traced_process_in_a_frozen_cgroup_stands_still_when_its_tracer_is_killed(
    group: Cgroup, counter: Counter
) -> None:
    code = f"""
import os
from migrator.linux import ptrace
from migrator.linux.cgroup import Cgroup
group = Cgroup.at({str(group.path)!r})
group.attach({counter.pid})
ptrace.seize({counter.pid})
ptrace.interrupt({counter.pid})
ptrace.wait({counter.pid})
group.freeze(wait=False)
print(1, flush=True)
os.kill(os.getpid(), 9)
"""
    tracer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert tracer.communicate()[0] == b"1\n" and tracer.returncode == -signal.SIGKILL
    before = counter.value
    assert not counter.runs()
    assert counter.value == before
    group.thaw()
    assert counter.runs()


@root
def test_a_process_that_enters_a_frozen_cgroup_freezes(group: Cgroup, counter: Counter) -> None:
    group.freeze()
    group.attach(counter.pid)
    time.sleep(0.02)
    assert not counter.runs()
    group.thaw()
    assert counter.runs()


@root
def test_frozen_processes_die_when_killed_without_running_on(group: Cgroup, counter: Counter) -> None:
    group.attach(counter.pid)
    group.freeze()
    before = counter.value
    group.kill()
    assert counter.process.wait(5) == -signal.SIGKILL
    assert counter.value == before
    group.remove()
    assert not group.path.exists()


@root
def test_a_frozen_process_outlives_whoever_froze_it(group: Cgroup, counter: Counter) -> None:
    code = f"""
from migrator.linux.cgroup import Cgroup
group = Cgroup.at({str(group.path)!r})
group.attach({counter.pid})
group.freeze()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert group.frozen
    assert not counter.runs()
    with Cgroup.of(counter.pid, version=group.hierarchy.version) as found:
        assert found.path == group.path
        found.thaw()
    assert counter.runs()


@root
def test_a_cgroup_is_removed_with_the_ones_made_below_it(group: Cgroup) -> None:
    (group.path / "a" / "b").mkdir(parents=True)
    group.remove()
    assert not group.path.exists()
    group.remove()  # again does no harm


@root
def test_a_hold_cgroup_can_stand_below_the_one_a_process_is_in(group: Cgroup, counter: Counter) -> None:
    group.attach(counter.pid)
    held = Cgroup.create("hold", version=group.hierarchy.version, under=group.path)
    held.attach(counter.pid)
    held.freeze()
    assert not counter.runs()
    held.thaw()
    group.attach(counter.pid)
    held.remove()
    assert counter.runs()


@root
def test_processes_go_back_to_where_they_came_from(group: Cgroup, counter: Counter, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    second = Counter(tmp_path / "second")
    origins = [group.path / name for name in ("a", "b")]
    for origin in origins:
        origin.mkdir()
    held = Cgroup.create("held", version=group.hierarchy.version, under=group.path)
    try:
        for pid in (counter.pid, second.pid):
            held.attach(pid)
        held.move_back({counter.pid: str(origins[0]), 1 << 22: str(origins[1])})
        assert not held.path.exists()
        for pid in (counter.pid, second.pid):  # the other was born in it, as it were
            assert str(pid) in (origins[0] / "cgroup.procs").read_text().split()
        held = Cgroup.create("held", version=group.hierarchy.version, under=group.path)
        held.attach(second.pid)
        held.move_back({second.pid: str(group.path / "gone")})
        assert held.pids() == [second.pid] and second.runs()
    finally:
        second.close()
        held.remove()


@root
def test_the_hierarchy_is_found_by_trying() -> None:
    chosen = hierarchy()
    assert (chosen.mountpoint / PARENT / chosen.state_file).exists()


def test_two_trees_of_the_same_pid_do_not_share_a_cgroup() -> None:
    assert unique_name("migrate", 500) != unique_name("migrate", 500)


NAMELESS = "import ctypes; ctypes.CDLL(None).prctl(15, b'caf\\xe9'); print(flush=True); input()"


@root
def test_a_process_whose_name_is_no_utf_8_is_killed_like_any_other(group: Cgroup) -> None:
    with subprocess.Popen([sys.executable, "-c", NAMELESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as named:
        assert named.stdout is not None and named.stdout.readline()
        assert b"caf\xe9" in Path(f"/proc/{named.pid}/comm").read_bytes()
        group.attach(named.pid)
        group.freeze()
        group.kill()
        assert named.wait(10) == -signal.SIGKILL
