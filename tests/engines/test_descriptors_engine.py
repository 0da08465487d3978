"""Every kind of descriptor at once, moved by the engine itself: a program that checks them all the time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pidhosts import HostedWorkload, PidHost, migrate, restore_from_file, save_to_file

pytestmark = pytest.mark.root

LOCAL = (
    "file,shared,append,deleted,memfd,directory,pipe,fifo,eventfd,epoll,timerfd,signalfd,devices,"
    "unixpair,unixdgram,unixlisten"
)


@pytest.fixture
def hosts() -> Iterator[tuple[PidHost, PidHost]]:
    with PidHost("a") as a, PidHost("b") as b:
        yield a, b


def test_descriptors_of_every_kind_move_live_there_and_back(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    here, there = hosts
    with HostedWorkload(here, "fds", tmp_path, LOCAL) as moving:
        for _ in range(3):
            migrate(moving, here, there)
            moving.check_alive_and_progressing()
            here, there = there, here
        moving.finish()


def test_descriptors_of_every_kind_restart_from_a_file(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    # with sockets of the internet, too: their addresses are free once the source has ended
    with HostedWorkload(hosts[0], "fds", tmp_path) as moving:
        save_to_file(moving, hosts[0], tmp_path / "image")
        restore_from_file(moving, hosts[1], tmp_path / "image")
        moving.check_alive_and_progressing()
        moving.finish()
