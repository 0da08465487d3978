"""A user of the destination plants links and directories where root writes files that are carried along."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.filesync.attributes import set_attributes_at
from migrator.filesync.paths import FileError
from migrator.filesync.receiver import FileReceiver
from migrator.filesync.top import TreeTop
from migrator.filesync.tree_receiver import TreeReceiver
from migrator.filesync.walk import walk
from migrator.protocol import trees
from migrator.protocol.trees import SyncTree

pytestmark = pytest.mark.root

USER = 4321
FILE = trees.Put(trees.Entry(b"file", 0o100644), b"new")


def own(path: Path) -> Path:
    """Give it to the user."""
    os.chown(path, USER, USER, follow_symlinks=False)
    return path


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What the user wants to be written to, or deleted."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_text("root's")
    (folder / "secret").chmod(0o600)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return own(folder)


def untouched(outside: Path) -> None:
    assert os.listdir(outside) == ["secret"]
    assert (outside / "secret").read_text() == "root's"
    status = (outside / "secret").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, 0)


def users_link(home: Path, target: Path) -> Path:
    (home / "data").symlink_to(target)
    return own(home / "data")


def roots_link_among_the_users(home: Path, target: Path) -> Path:
    (home / "data").symlink_to(target)
    return home / "data"


def roots_link_where_all_may_write(home: Path, target: Path) -> Path:
    os.chown(home, 0, 0)
    home.chmod(0o1777)
    return roots_link_among_the_users(home, target)


@pytest.mark.parametrize("plant", [users_link, roots_link_among_the_users, roots_link_where_all_may_write])
def test_a_link_that_is_not_roots_own_is_refused_before_anything_is_sent(
    home: Path, outside: Path, plant: Callable[[Path, Path], Path]
) -> None:
    path = plant(home, outside)
    for tree in (SyncTree(str(path)), SyncTree(str(path / "deeper"))):
        with pytest.raises(FileError, match="a symbolic link that root has not made"):
            FileReceiver([tree], "", "m-test")
    with pytest.raises(FileError, match="a symbolic link"):
        FileReceiver([], "", "m-test").want([str(path / "file")])
    untouched(outside)


def test_a_link_that_root_has_made_in_a_directory_of_its_own_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "absolute").symlink_to(tmp_path / "disk")
    (tmp_path / "relative").symlink_to("absolute/../disk/./")
    target = TreeReceiver(TreeTop(SyncTree("/"), str(tmp_path / "relative")), "m-test")
    target.apply([FILE])
    target.close(True)
    assert (tmp_path / "disk/file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["absolute", "disk", "relative"]


def test_links_in_a_circle_have_an_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="not followed"):
        walk(os.fsencode(tmp_path / "a"))


def test_a_link_below_the_root_of_a_container_is_never_followed_whoever_made_it(tmp_path: Path, outside: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "srv").symlink_to(outside)
    with pytest.raises(FileError, match="symbolic link"):
        FileReceiver([SyncTree("/srv/data")], str(root), "m-test")
    untouched(outside)


def test_a_directory_that_becomes_a_link_after_it_was_looked_at_is_not_written_through(
    home: Path, outside: Path
) -> None:
    own_folder = home / "data"
    own_folder.mkdir()
    receiver = FileReceiver([SyncTree(str(own_folder / "tree"))], "", "m-test")
    receiver.accepted = True
    own_folder.rmdir()
    users_link(home, outside)
    with pytest.raises(FileError, match="symbolic link"):
        receiver.apply(trees.TreeOps(0, [FILE]))
    receiver.close(False)
    untouched(outside)


def test_directories_that_are_missing_are_made_and_nothing_else(tmp_path: Path) -> None:
    target = TreeReceiver(TreeTop(SyncTree("/"), str(tmp_path), "a/b/c"), "m-test")
    target.apply([FILE])
    target.close(True)
    assert (tmp_path / "a/b/c/file").read_text() == "new"
    assert os.listdir(tmp_path / "a/b") == ["c"]


def test_a_link_in_the_place_of_a_fifo_leaves_its_target_alone(home: Path, outside: Path) -> None:
    (home / "fifo").symlink_to(outside / "secret")
    target = TreeReceiver(TreeTop(SyncTree("/"), str(home)), "m-test")
    with pytest.raises(FileError):
        target.apply([trees.Touch(trees.Entry(b"fifo", stat.S_IFIFO | 0o666, uid=USER))])
    target.close(False)
    untouched(outside)


def test_owner_and_mode_are_those_of_what_was_looked_at_even_if_its_name_means_something_else(
    home: Path, outside: Path
) -> None:
    os.mkfifo(home / "fifo")
    fd = os.open(home / "fifo", os.O_PATH | os.O_NOFOLLOW)
    os.rename(home / "fifo", home / "elsewhere")
    (home / "fifo").symlink_to(outside / "secret")
    set_attributes_at(fd, trees.Entry(b"fifo", stat.S_IFIFO | 0o640, uid=USER, gid=USER, mtime_ns=10**18))
    os.close(fd)
    status = (home / "elsewhere").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_mtime_ns) == (0o640, USER, 10**18)
    untouched(outside)


def test_the_attributes_of_a_link_are_its_own(home: Path, outside: Path) -> None:
    target = TreeReceiver(TreeTop(SyncTree("/"), str(home)), "m-test")
    link = os.fsencode(outside / "secret")
    target.apply([trees.Put(trees.Entry(b"link", stat.S_IFLNK | 0o777, uid=USER, gid=USER, mtime_ns=5, target=link))])
    target.close(True)
    status = os.lstat(home / "link")
    assert (status.st_uid, status.st_mtime_ns) == (USER, 5)
    untouched(outside)


def working(folder: Path) -> Path:
    """The work directory in a folder."""
    (found,) = [path for path in folder.iterdir() if ".migrator-" in path.name]
    return found


def test_the_name_of_a_work_directory_cannot_be_guessed_and_nobody_else_gets_in(home: Path) -> None:
    names = set()
    for _ in range(2):
        target = TreeReceiver(TreeTop(SyncTree("/"), str(home / "tree")), "m-test")
        target.apply([FILE])
        work = working(home)
        names.add(work.name)
        assert stat.S_IMODE(work.stat().st_mode) == 0o700 and work.stat().st_uid == 0
        target.close(True)
    assert len(names) == 2


def test_a_directory_that_hands_its_group_on_takes_a_tree_like_any_other(home: Path) -> None:
    home.chmod(0o2775)
    target = TreeReceiver(TreeTop(SyncTree("/"), str(home / "tree")), "m-test")
    target.apply([FILE])
    target.close(True)
    assert (home / "tree/file").read_text() == "new"
    assert os.listdir(home) == ["tree"]


def test_a_link_in_the_place_of_the_work_directory_is_neither_written_through_nor_emptied(
    home: Path, outside: Path
) -> None:
    target = TreeReceiver(TreeTop(SyncTree("/"), str(home / "tree")), "m-test")
    target.apply([FILE, trees.Remove(b"file")])
    work = working(home)
    os.rename(work, home / "moved")
    own(outside)
    for name in ("new", "old", "aside"):
        (outside / name).mkdir()
        (outside / name / "n1").write_text("root's")
    work.symlink_to(outside)
    target.apply([trees.Put(trees.Entry(b"other", 0o100644), b"more"), trees.Remove(b"other", keep=True)])
    target.close(True)
    assert sorted(os.listdir(outside)) == ["aside", "new", "old", "secret"]
    for name in ("new", "old", "aside"):
        assert os.listdir(outside / name) == ["n1"]
        assert (outside / name / "n1").read_text() == "root's"


def test_a_link_in_what_was_set_aside_is_not_written_through(home: Path, outside: Path) -> None:
    tree = home / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/link").symlink_to(outside)
    target = TreeReceiver(TreeTop(SyncTree("/"), str(tree)), "m-test")
    target.apply([trees.Remove(b"sub", keep=True)])
    (tree / "sub/link").mkdir(parents=True)
    (tree / "sub/link/planted").write_text("the user's")
    with pytest.raises(FileError):
        target.apply([trees.Remove(b"sub/link/planted", keep=True)])
    target.close(False)
    untouched(outside)


def test_changes_of_a_large_file_wait_where_nobody_else_can_see_them(home: Path, outside: Path) -> None:
    tree = home / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(b"old")
    target = TreeReceiver(TreeTop(SyncTree("/"), str(tree)), "m-test")
    entry = trees.Entry(b"file", 0o100644, size=6 << 20)
    target.apply([trees.Open(entry, in_place=True)])
    work = working(home)
    os.rename(work, home / "moved")
    work.symlink_to(outside)
    chunk = b"x" * (512 << 10)
    target.apply([trees.Write(at * len(chunk), chunk) for at in range(12)])
    untouched(outside)
    target.apply([trees.Close()])
    target.close(True)
    assert (tree / "file").read_bytes() == b"x" * (6 << 20)
    untouched(outside)
