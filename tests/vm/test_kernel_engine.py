"""The kernel engine in guests: what it refuses, and images that lie."""

from __future__ import annotations

import pytest

from tests.vm.machine import CommandFailed, Machine
from tests.vm.program import Program

LONG = 240.0  # seconds that a command may take where guests share a processor with much else


def test_what_the_kernel_refuses_is_named_and_the_program_runs_on(guest: Machine) -> None:
    pid = guest.spawn("sleep 1000 < /dev/kmsg")
    where = guest.run(f"cat /proc/{pid}/cgroup").stdout
    with pytest.raises(CommandFailed, match=rf"exit status 3[^$]*task {pid}, descriptor 0"):
        guest.run(f"migrator checkpoint {pid} --engine kernel --kill -o /tmp/image", seconds=LONG)
    assert guest.run(f"cat /proc/{pid}/cgroup").stdout == where
    guest.run(f"kill {pid} && while [ -e /proc/{pid} ]; do sleep 0.1; done")


def test_an_image_that_was_cut_restarts_nothing(guest: Machine) -> None:
    with Program(guest, "counter") as program:
        guest.run(f"migrator checkpoint {program.pid} --engine kernel --kill -o /tmp/image", seconds=LONG)
        program.await_end()
        with pytest.raises(CommandFailed, match="exit status 6"):
            guest.run("head -c 20000 /tmp/image | migrator restart --engine kernel --detach", seconds=LONG)
        assert guest.run(f"ls -d /proc/{program.pid} /sys/fs/cgroup/migrator/restart-*", status=None).stdout == ""
        guest.run("migrator restart --engine kernel --detach -i /tmp/image", seconds=LONG)
        program.check_progress()
        program.finish()


def test_a_link_that_a_user_has_planted_is_refused(guest: Machine) -> None:
    guest.run(
        "mkdir -p /tmp/planted/home/deep && cd /tmp/planted && mkdir -m 700 root && echo secret > root/file && "
        "chown -R 4321 home"
    )
    pid = guest.spawn(
        "setpriv --reuid 4321 --regid 4321 --clear-groups sh -c 'exec sleep 1000 >> /tmp/planted/home/deep/file'"
    )
    guest.run("until [ -e /tmp/planted/home/deep/file ]; do sleep 0.05; done")
    guest.run(f"migrator checkpoint {pid} --engine kernel --kill -o /tmp/image", seconds=LONG)
    guest.run("cd /tmp/planted/home/deep && rm file && ln -s ../../root/file file && chown -h 4321 file")
    with pytest.raises(CommandFailed, match=r"exit status 5[^$]*a symbolic link of user 4321 leads to"):
        guest.run("migrator restart --engine kernel --detach -i /tmp/image", seconds=LONG)
    # The user's own file by another way is opened.
    guest.run("cd /tmp/planted/home/deep && : > other && chown 4321 other && ln -sf other file && chown -h 4321 file")
    guest.run("migrator restart --engine kernel --detach -i /tmp/image", seconds=LONG)
    assert guest.run(f"readlink /proc/{pid}/fd/1").stdout == "/tmp/planted/home/deep/other\n"
    guest.run(f"kill {pid} && while [ -e /proc/{pid} ]; do sleep 0.1; done; rm -r /tmp/planted")
