"""The system calls alone, by the tools: workloads frozen, saved, killed and restarted in a guest."""

from __future__ import annotations

import pytest

from tests.vm.machine import Machine
from tests.vm.program import Program

WORKLOADS = [
    ("counter", ()),
    ("memory", (16, 20, "all")),
    ("threads", (6,)),
    ("tree", (4,)),
    ("signals", ()),
    ("fds", ()),
    ("fp", ()),
    ("creds", ()),
    ("heap.py", (4,)),
    ("pipeline.sh", ()),
]

# The tasks of a tree in a cgroup of their own, frozen; then saved.
SAVE = """
tree() {{ echo $1; for child in $(cat /proc/$1/task/*/children); do tree $child; done; }}
group=/sys/fs/cgroup/saved-{pid}
mkdir -p $group
for pid in $(tree {pid}); do echo $pid > $group/cgroup.procs; done
echo 1 > $group/cgroup.freeze
until grep -q 'frozen 1' $group/cgroup.events; do sleep 0.02; done
ckpt {pid} > {image} || {{ tail -c 300 {image} | strings | tail -n 1 >&2; exit 1; }}
"""
KILL = """
group=/sys/fs/cgroup/saved-{pid}
echo 1 > $group/cgroup.kill
until grep -q 'populated 0' $group/cgroup.events; do sleep 0.02; done
rmdir $group
"""


def save(guest: Machine, program: Program, image: str = "/tmp/image") -> None:
    guest.run(SAVE.format(pid=program.pid, image=image))


def kill(guest: Machine, program: Program) -> None:
    guest.run(KILL.format(pid=program.pid))
    program.await_end()


@pytest.mark.parametrize(("name", "arguments"), WORKLOADS, ids=[name for name, _ in WORKLOADS])
def test_a_workload_goes_on_from_its_image(guest: Machine, name: str, arguments: tuple[object, ...]) -> None:
    with Program(guest, name, *arguments) as program:
        program.check_progress()
        save(guest, program)
        kill(guest, program)
        guest.run("mktree -d < /tmp/image")
        program.check_progress()
        program.finish()
