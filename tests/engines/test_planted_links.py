"""A user has a program of his saved, and plants links where root opens files for its copy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli import await_file, migrator, sweep

pytestmark = pytest.mark.root

USER = 4321
SECRET = "root's own\n"
PROGRAM = """
import mmap, os, signal, socket, sys
os.chdir("/")
os.setgroups([]); os.setgid({user}); os.setuid({user})
kept, told = [], os.open({folder!r} + "/out", os.O_WRONLY | os.O_CREAT)
def opened(how):
    fd = os.open({folder!r} + "/deep/file", how | os.O_CREAT, 0o640)
    os.ftruncate(fd, {size})
    return fd
{state}
signal.signal(signal.SIGUSR1, lambda *_: os.write(told, repr(look()).encode()))
print(os.getpid(), flush=True)
while True:
    signal.pause()
"""
STATES = {
    "open": "fd = opened(os.O_RDWR)\nlook = lambda: os.pread(fd, 100, 0)",
    "mapped": "fd = opened(os.O_RDWR); m = mmap.mmap(fd, 0); os.close(fd)\nlook = lambda: m[:]",
    "mapped privately": "fd = opened(2); m = mmap.mmap(fd, 0, mmap.MAP_PRIVATE); os.close(fd)\nlook = lambda: m[:]",
    "a directory": "fd = os.open({folder!r} + '/deep', os.O_RDONLY)\nlook = lambda: os.listdir(fd)",
    "the working directory": "os.chdir({folder!r} + '/deep')\nlook = lambda: os.listdir('.')",
    "a FIFO": "name = {folder!r} + '/deep/file'; os.mkfifo(name); fd = os.open(name, os.O_RDWR)\nlook = lambda: 1",
    "a socket": "s = socket.socket(socket.AF_UNIX); s.bind({folder!r} + '/deep/file'); s.listen()\nlook = lambda: 1",
}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A directory of the user's that everybody can reach; what is root's is beside it."""
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(0o755)
    folder, ours = tmp_path / "home", tmp_path / "root"
    for made in (folder, folder / "deep", ours):
        made.mkdir()
    for made in (folder, folder / "deep"):
        os.chown(made, USER, USER)
    (ours / "file").write_text(SECRET)
    (ours / "file").chmod(0o640)
    ours.chmod(0o700)
    yield folder


def start(home: Path, state: str) -> int:
    folder = str(home)
    code = PROGRAM.format(
        user=USER, folder=folder, size=len(SECRET), state=STATES[state].replace("{folder!r}", repr(folder))
    )
    with open(home / "pid", "wb") as out:
        subprocess.run(
            ["setsid", "--fork", sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    return int(await_file(home / "pid"))


def a_link_to_the_file(home: Path) -> None:
    (home / "deep/file").unlink(missing_ok=True)
    (home / "deep/file").symlink_to(home.parent / "root/file")
    os.chown(home / "deep/file", USER, USER, follow_symlinks=False)


def a_link_to_the_directory(home: Path) -> None:
    (home / "deep").rename(home / "away")
    (home / "deep").symlink_to(home.parent / "root")
    os.chown(home / "deep", USER, USER, follow_symlinks=False)


def the_users_own(home: Path) -> None:
    (home / "deep").rename(home / "away")
    (home / "deep").symlink_to("away")
    os.chown(home / "deep", USER, USER, follow_symlinks=False)


@pytest.mark.parametrize(
    ("state", "plant"),
    [
        ("open", a_link_to_the_file),
        ("open", a_link_to_the_directory),
        ("mapped", a_link_to_the_file),
        ("mapped privately", a_link_to_the_file),
        ("a directory", a_link_to_the_directory),
        ("the working directory", a_link_to_the_directory),
        ("a FIFO", a_link_to_the_file),
        ("a socket", a_link_to_the_directory),  # of its own name it replaces what is there, wherever it is
    ],
)
def test_no_copy_gets_what_is_roots(home: Path, state: str, plant: Callable[[Path], None]) -> None:
    pid = start(home, state)
    migrator("checkpoint", pid, "--kill", "-o", home / "image")
    if state == "a socket":
        (home / "deep/file").unlink()
    plant(home)
    done = migrator("restart", "-d", "-i", home / "image", code=5)
    assert f"a symbolic link of user {USER} leads there" in done.stderr, done.stderr
    assert not os.path.exists(f"/proc/{pid}")
    ours = home.parent / "root"
    assert os.listdir(ours) == ["file"] and (ours / "file").read_text() == SECRET
    sweep(pid)


@pytest.mark.parametrize("state", ["open", "mapped", "the working directory", "a socket"])
def test_a_copy_gets_what_is_the_users(home: Path, state: str) -> None:
    pid = start(home, state)
    migrator("checkpoint", pid, "--kill", "-o", home / "image")
    the_users_own(home)
    migrator("restart", "-d", "-i", home / "image")
    try:
        os.kill(pid, signal.SIGUSR1)
        end = time.monotonic() + 20
        while not (home / "out").read_text():
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        os.kill(pid, signal.SIGKILL)
        sweep(pid)
