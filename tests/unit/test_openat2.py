"""Paths that users have a hand in, opened by root: a link of theirs leads to what is theirs, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrator.linux import own_directory
from migrator.linux.openat2 import UntrustedLink, only_root_leads_to, open_in_root
from migrator.linux.own_directory import make_own_directory

pytestmark = pytest.mark.root

USER, OTHER = 4321, 4322


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    """A file system: what is root's, a directory of a user, and one where all may write."""
    for name, owner, mode in (("etc", 0, 0o755), ("home", USER, 0o755), ("tmp", 0, 0o1777), ("all", 0, 0o777)):
        (tmp_path / name).mkdir()
        os.chown(tmp_path / name, owner, owner)
        (tmp_path / name).chmod(mode)
    for name, owner in (("etc/secret", 0), ("home/mine", USER), ("home/other", OTHER)):
        (tmp_path / name).write_text(name)
        os.chown(tmp_path / name, owner, owner)
        (tmp_path / name).chmod(0o600)
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def link(root: int, path: str, target: str, owner: int) -> None:
    os.symlink(target, path, dir_fd=root)
    os.chown(path, owner, owner, dir_fd=root, follow_symlinks=False)


def content(root: int, path: str, flags: int = os.O_RDWR) -> str:
    fd = open_in_root(root, path, flags)
    try:
        return os.read(fd, 100).decode()
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("at", "target", "owner"),
    [
        ("home/link", "/etc/secret", USER),
        ("home/link", "../etc/secret", USER),
        ("home/link", "other", USER),
        ("home/link", "/etc/secret", 0),  # root's, but the user can have put it there: rename(2)
        ("tmp/link", "/etc/secret", USER),
        ("tmp/link", "/home/mine", OTHER),
        ("tmp/link", "/home/mine", 0),
        ("all/link", "/home/mine", USER),
    ],
)
def test_a_link_that_somebody_planted_leads_to_nobody_elses_file(root: int, at: str, target: str, owner: int) -> None:
    link(root, at, target, owner)
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_PATH):
        with pytest.raises(UntrustedLink, match=r"a symbolic link (of user|on the way)"):
            open_in_root(root, at, flags)


@pytest.mark.parametrize("owner", [USER, 0])
def test_nor_does_a_directory_on_the_way(root: int, owner: int) -> None:
    link(root, "home/link", "/etc", owner)
    for path in ("home/link/secret", "home/./link//../etc/secret", "home/link/", "home/link/."):
        with pytest.raises(UntrustedLink):
            open_in_root(root, path, os.O_PATH)


def test_links_of_several_users_lead_nowhere(root: int) -> None:
    link(root, "tmp/first", "/home/second", OTHER)
    link(root, "home/second", "mine", USER)
    assert content(root, "home/second") == "home/mine"
    with pytest.raises(UntrustedLink):
        open_in_root(root, "tmp/first", os.O_PATH)


def test_a_users_link_leads_to_what_is_the_users(root: int) -> None:
    link(root, "home/link", "/home/mine", USER)
    link(root, "tmp/link", "/home", USER)
    assert content(root, "home/link") == content(root, "tmp/link/mine") == "home/mine"


def test_a_link_that_only_root_can_have_made_is_followed_and_stays_inside(root: int, tmp_path: Path) -> None:
    link(root, "etc/absolute", "/home/other", 0)
    link(root, "etc/relative", "../../../../etc/./absolute", 0)
    link(root, "var", "etc", 0)
    assert (
        content(root, "etc/absolute") == content(root, "etc/relative") == content(root, "var/relative") == "home/other"
    )
    link(root, "etc/out", str(tmp_path / "etc/secret"), 0)
    with pytest.raises(FileNotFoundError):
        open_in_root(root, "etc/out", os.O_RDONLY)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("etc/loop", OSError),
        ("etc/link/none", FileNotFoundError),
        ("etc/link/secret/deeper", NotADirectoryError),
        ("etc/link/../none", FileNotFoundError),
    ],
)
def test_what_cannot_be_opened_is_told_as_ever(root: int, path: str, error: type[OSError]) -> None:
    link(root, "etc/loop", "loop", 0)
    link(root, "etc/link", "/etc", 0)
    before = set(os.listdir("/proc/self/fd"))  # some of which what other tests have left may close meanwhile
    with pytest.raises(error):
        open_in_root(root, path, os.O_RDONLY)
    assert set(os.listdir("/proc/self/fd")) <= before


def test_a_link_itself_can_be_opened(root: int) -> None:
    link(root, "home/link", "/etc/secret", USER)
    link(root, "etc/home", "/home", 0)
    for path in ("home/link", "etc/home/link"):
        fd = open_in_root(root, path, os.O_PATH | os.O_NOFOLLOW)
        assert os.readlink(b"", dir_fd=fd) == b"/etc/secret"
        os.close(fd)
    with pytest.raises(OSError, match="symbolic links"):
        open_in_root(root, "etc/home/link", os.O_RDONLY | os.O_NOFOLLOW)


def test_a_device_is_not_opened_to_see_whose_it_is(root: int, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo("etc/fifo", dir_fd=root)  # opening it for both would be noticed by a reader
    reader = os.open("etc/fifo", os.O_RDONLY | os.O_NONBLOCK, dir_fd=root)
    link(root, "home/link", "/etc/fifo", USER)
    with pytest.raises(UntrustedLink):
        open_in_root(root, "home/link", os.O_WRONLY | os.O_NONBLOCK)
    os.set_blocking(reader, False)
    assert os.read(reader, 1) == b"", "no writer came"
    os.close(reader)


@pytest.mark.parametrize(
    ("path", "leads"),
    [
        ("/", True),
        ("/etc", True),
        ("/etc/./deep/", True),
        ("/home", True),  # nobody but root can replace it, whoever owns it
        ("/home/deep", False),
        ("/tmp/deep", False),
        ("/etc/link", False),
        ("/etc/secret", False),
        ("/etc/../etc", False),
    ],
)
def test_whether_only_root_leads_to_a_directory(root: int, tmp_path: Path, path: str, leads: bool) -> None:
    link(root, "etc/link", "/etc", 0)
    for name in ("etc/deep", "home/deep", "tmp/deep"):
        (tmp_path / name).mkdir()
    assert only_root_leads_to(root, path) is leads


def replaced_by_a_link(place: Path, name: str) -> None:
    (place / name).rename(place / "taken")
    (place / name).symlink_to(place.parent / "etc")


def replaced_by_one_of_the_users(place: Path, name: str) -> None:
    (place / name).rename(place / "taken")
    (place / name).mkdir(0o700)
    os.chown(place / name, USER, USER)


@pytest.mark.parametrize("replace", [replaced_by_a_link, replaced_by_one_of_the_users])
def test_a_directory_of_ours_that_was_replaced_is_not_used(
    root: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: Callable[[Path, str], None]
) -> None:
    real = os.mkdir

    def mkdir(name: bytes, mode: int, *, dir_fd: int) -> None:
        real(name, mode, dir_fd=dir_fd)
        monkeypatch.setattr(own_directory.os, "mkdir", real)
        replace(tmp_path / "home", os.fsdecode(name))

    monkeypatch.setattr(own_directory.os, "mkdir", mkdir)
    place = os.open("home", os.O_PATH, dir_fd=root)
    with pytest.raises(OSError):
        make_own_directory(place, ".migrator-")
    os.close(place)


def test_a_directory_of_ours_may_be_in_one_that_hands_its_group_on(root: int, tmp_path: Path) -> None:
    (tmp_path / "home").chmod(0o2775)
    place = os.open("home", os.O_PATH, dir_fd=root)
    name, fd = make_own_directory(place, b".migrator-")
    assert os.fstat(fd).st_mode & 0o7777 == 0o2700
    assert name.startswith(b".migrator-")
    os.close(fd)
    os.close(place)
