"""A tree is carried along while it changes: whatever is done to it, the other side is the same in the end."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator.filesync.changes import Mapped
from migrator.filesync.paths import FileError
from migrator.filesync.receiver import FileReceiver
from migrator.filesync.top import TreeTop
from migrator.filesync.tree_pass import TreePass
from migrator.filesync.tree_receiver import TreeReceiver
from migrator.filesync.tree_sender import TreeSender
from migrator.protocol import messages as m
from migrator.protocol import trees
from migrator.protocol.trees import SyncTree

pytestmark = pytest.mark.root


class Sides:
    """A source and a destination directory, and nothing in between but encoded messages."""

    def __init__(self, folder: Path, *, watched: bool = True, tree: SyncTree | None = None) -> None:
        self.here, self.there = folder / "here", folder / "there"
        self.here.mkdir()
        self.watched = watched
        self.tree = tree or SyncTree("/")
        self.ops: list[trees.TreeOp] = []

    def start(self) -> TreeSender:
        fd = os.open(self.here, os.O_RDONLY | os.O_DIRECTORY)
        self.source = TreeSender(0, self.tree, fd, watched=self.watched)
        assert self.source.watching == self.watched
        self.target = TreeReceiver(TreeTop(self.tree, str(self.there)), "m-test")
        for listed in self.source.lists():
            for answer in self.target.compare(m.decode(m.encode(listed))):  # type: ignore[arg-type]
                self.source.answered(m.decode(m.encode(answer)))  # type: ignore[arg-type]
        return self.source

    def step(self, mapped: Mapped | None = None) -> list[trees.TreeOp]:
        self.ops = []
        for message in self.source.changes(mapped or Mapped()):
            message = m.decode(m.encode(message))  # type: ignore[assignment]
            self.ops += message.ops
            self.target.apply(message.ops)
        return self.ops

    def move(self, change: Callable[[], None] = lambda: None) -> None:
        """All of it: preflight, a pass, `change`, the last pass; then both sides are the same."""
        with self.start():
            self.step()
            change()
            self.step()
            self.same()
            self.target.close(True)

    def same(self) -> None:
        assert picture(self.there) == picture(self.here)

    def written(self) -> int:
        return sum(len(op.data) for op in self.ops if isinstance(op, trees.Put | trees.Write))


def picture(top: Path) -> dict[str, Any]:
    """Everything about a tree that has to be the same, hard links included."""
    found: dict[str, Any] = {}
    names: dict[int, str] = {}
    for folder, folders, files in os.walk(top):
        folders.sort()
        for name in sorted([*folders, *files, "."]):
            path = os.path.normpath(os.path.join(folder, name))
            status = os.lstat(path)
            shown = os.path.relpath(path, top)
            if shown.split("/")[0].startswith(".migrator-"):
                continue
            first = shown if stat.S_ISDIR(status.st_mode) else names.setdefault(status.st_ino, shown)
            content: bytes | str = ""
            if stat.S_ISREG(status.st_mode):
                content = Path(path).read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            found[shown] = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, first, content)
    return found


@pytest.fixture(params=[True, False], ids=["watched", "walked"])
def sides(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Sides]:
    yield Sides(tmp_path, watched=request.param)


def fill(top: Path) -> None:
    (top / "etc").mkdir()
    (top / "etc/settings").write_text("colour = green\n")
    (top / "etc/settings").chmod(0o640)
    (top / "etc/link").symlink_to("/nowhere/at/all")
    (top / "empty").touch()
    os.link(top / "etc/settings", top / "other-name")
    os.mkfifo(top / "pipe", 0o600)
    (top / "deep/er/still").mkdir(parents=True)
    (top / "deep/er/still/data").write_bytes(os.urandom(700_001))
    os.chown(top / "deep/er", 12, 34)
    os.utime(top / "deep", ns=(5, 10**18 + 7))
    (top / os.fsdecode(b"caf\xe9")).write_text("not utf-8")


def test_a_tree_arrives_where_there_was_nothing(sides: Sides) -> None:
    fill(sides.here)
    sides.move()
    assert sorted(os.listdir(sides.there.parent)) == ["here", "there"]


def test_what_is_the_same_is_not_sent(sides: Sides) -> None:
    fill(sides.here)
    sides.move()
    time.sleep(0.1)  # a file that was changed just now may be changed again without its times showing it
    with sides.start() as source:
        assert source.difference.files == 0
        sides.step()
        assert sides.written() == 0
        sides.target.close(True)
    sides.same()


def test_what_differs_is_counted_and_named(sides: Sides) -> None:
    fill(sides.here)
    sides.move()
    (sides.there / "etc/settings").write_text("colour = brown\n")
    (sides.there / "deep/er/still/data").unlink()
    (sides.there / "left").mkdir()
    (sides.there / "left/over").write_text("mine")
    with sides.start() as source:
        found = source.difference
        assert (found.files, found.surplus, found.surplus_names) == (3, 1, ["/left"])
        assert "/deep/er/still/data" in found.names and "/etc/settings" in found.names
        sides.step()
        sides.same()
        left = sides.target.close(True)
    assert (Path(left) / "left/over").read_text() == "mine", "set aside, not deleted"


def test_a_migration_that_fails_puts_back_what_was_set_aside(sides: Sides) -> None:
    fill(sides.here)
    sides.there.mkdir()
    (sides.there / "etc").mkdir()
    (sides.there / "etc/mine").write_text("mine")
    (sides.there / "mine").write_text("mine")
    with sides.start():
        sides.step()
        assert not (sides.there / "mine").exists()
        sides.target.close(False)
    assert (sides.there / "mine").read_text() == (sides.there / "etc/mine").read_text() == "mine"
    assert sorted(os.listdir(sides.there.parent)) == ["here", "there"]


def replace(path: Path, content: bytes) -> None:
    new = path.with_name("temporary")
    new.write_bytes(content)
    new.rename(path)


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def swap(top: Path) -> None:
    (top / "a").rename(top / "t")
    (top / "b").rename(top / "a")
    (top / "t").rename(top / "b")


CHANGES: dict[str, Callable[[Path], Any]] = {
    "create": lambda top: (top / "new").write_text("x"),
    "create deep": lambda top: ((top / "n/e/w").mkdir(parents=True), (top / "n/e/w/f").write_text("x")),
    "append": lambda top: append(top / "a"),
    "overwrite": lambda top: os.pwrite(os.open(top / "big", os.O_RDWR), b"x", 300_000),
    "truncate": lambda top: os.truncate(top / "big", 200_000),
    "truncate to nothing": lambda top: os.truncate(top / "big", 0),
    "grow by a hole": lambda top: os.truncate(top / "big", 5_000_000),
    "replace": lambda top: replace(top / "a", b"newer"),
    "replace big": lambda top: replace(top / "big", os.urandom(400_000)),
    "delete": lambda top: (top / "a").unlink(),
    "delete directory": lambda top: ((top / "d/f").unlink(), (top / "d/g").unlink(), (top / "d").rmdir()),
    "rename": lambda top: (top / "big").rename(top / "renamed"),
    "rename and back": lambda top: ((top / "d/f").rename(top / "d/t"), (top / "d/t").rename(top / "d/f")),
    "create and delete": lambda top: ((top / "d/t").mkdir(), (top / "d/t").rmdir()),
    "rename over": lambda top: (top / "a").rename(top / "b"),
    "rename directory": lambda top: (top / "d").rename(top / "e"),
    "rename directory and write": lambda top: ((top / "d").rename(top / "e"), (top / "e/f").write_text("after")),
    "write and rename directory": lambda top: ((top / "d/f").write_text("before"), (top / "d").rename(top / "e")),
    "move into new directory": lambda top: ((top / "new").mkdir(), (top / "big").rename(top / "new/big")),
    "move directory into new": lambda top: ((top / "new").mkdir(), (top / "d").rename(top / "new/d")),
    "move out and delete": lambda top: (
        (top / "d/f").rename(top / "f"), (top / "d/g").unlink(), (top / "d").rmdir(),
    ),
    "swap": swap,
    "file becomes directory": lambda top: ((top / "a").unlink(), (top / "a").mkdir(), (top / "a/x").touch()),
    "directory becomes file": lambda top: (
        (top / "d/f").unlink(), (top / "d/g").unlink(), (top / "d").rmdir(), (top / "d").write_text("x"),
    ),
    "chmod": lambda top: (top / "a").chmod(0o4711),
    "chmod directory": lambda top: (top / "d").chmod(0o711),
    "chown": lambda top: os.chown(top / "a", 11, 22),
    "utime": lambda top: os.utime(top / "a", ns=(1, 2)),
    "new content, same size and time": lambda top: (
        status := (top / "a").stat(), (top / "a").write_bytes(b"A" * status.st_size),
        os.utime(top / "a", ns=(status.st_atime_ns, status.st_mtime_ns)),
    ),
    "link": lambda top: os.link(top / "a", top / "d/linked"),
    "link and write": lambda top: (os.link(top / "big", top / "two"), append(top / "two")),
    "link and delete first": lambda top: (os.link(top / "a", top / "two"), (top / "a").unlink()),
    "write to linked": lambda top: (top / "d/g").write_text("both change"),
    "unlink one name, write through it": lambda top: written_unlinked(top),
    "symlink": lambda top: (top / "s").symlink_to("a"),
    "symlink changes": lambda top: ((top / "l").unlink(), (top / "l").symlink_to("elsewhere")),
    "fifo": lambda top: os.mkfifo(top / "p"),
    "write to what a link outside leads to": lambda top: (top.parent / "outside").write_text("through outside"),
    "move out of the tree": lambda top: (top / "d").rename(top.parent / "gone"),
    "move into the tree": lambda top: (
        (top.parent / "in/x").mkdir(parents=True), (top.parent / "in/x/f").touch(),
        (top.parent / "in").rename(top / "i"),
    ),
    "attribute": lambda top: os.setxattr(top / "a", "user.colour", b"green"),
}  # fmt: skip


def written_unlinked(top: Path) -> None:
    with open(top / "d/g", "a") as file:
        (top / "d/g").unlink()
        file.write("more")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_done_meanwhile_comes_out_right(sides: Sides, change: Callable[[Path], Any]) -> None:
    top = sides.here
    (top / "a").write_bytes(b"a" * 100)
    (top / "b").write_bytes(b"b" * 200)
    (top / "big").write_bytes(os.urandom(1_000_000))
    (top / "d").mkdir()
    (top / "d/f").write_text("f")
    (top / "d/g").write_text("g")
    (top / "l").symlink_to("a")
    os.link(top / "d/g", top / "also-g")
    (top.parent / "outside").write_text("outside")
    os.link(top.parent / "outside", top / "outside")
    sides.move(lambda: change(top))
    assert not [name for name in os.listdir(sides.there) if name.startswith(".migrator")]
    if change is CHANGES["attribute"]:
        assert os.getxattr(sides.there / "a", "user.colour") == b"green"


@pytest.mark.parametrize("kind", ["file", "symlink", "directory"])
def test_what_takes_a_place_and_is_gone_before_it_is_sent_leaves_nothing_there(
    sides: Sides, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: dict[str, Callable[[Path], Any]] = {
        "file": lambda path: path.write_text("new"),
        "symlink": lambda path: path.symlink_to("new"),
        "directory": lambda path: path.mkdir(),
    }
    place, aside = sides.here / "place", sides.here.parent / "aside"
    place.symlink_to("old")
    with sides.start():
        sides.step()
        make[kind](aside)
        if kind == "directory":
            place.unlink()
        aside.rename(place)
        move_aside = TreePass._move_aside

        def gone_by_then(self: TreePass) -> Iterator[Any]:
            place.rmdir() if kind == "directory" else place.unlink()
            yield from move_aside(self)

        monkeypatch.setattr(TreePass, "_move_aside", gone_by_then)
        sides.step()
        monkeypatch.setattr(TreePass, "_move_aside", move_aside)
        sides.step()
        sides.same()
        sides.target.close(True)


def test_a_directory_that_is_moved_into_one_that_was_in_it_is_not_looked_for_in_itself(tmp_path: Path) -> None:
    sides = Sides(tmp_path)
    outer, inner = sides.here / "outer", sides.here / "outer/inner"
    outer.mkdir()
    (outer / "file").write_text("kept")
    with sides.start() as source:
        sides.step()
        inner.mkdir()
        names = source._view.names

        def turned_inside_out(node: Any, fd: int) -> list[bytes]:
            if node.name == b"inner" and inner.exists():
                inner.rename(sides.here / "inner")
                outer.rename(sides.here / "inner/outer")
            return names(node, fd)

        source._view.names = turned_inside_out  # type: ignore[method-assign]
        sides.step()
        sides.step()
        sides.same()
        sides.target.close(True)


def test_a_renamed_directory_is_renamed_there(tmp_path: Path) -> None:
    sides = Sides(tmp_path)
    fill(sides.here)
    with sides.start():
        sides.step()
        (sides.here / "deep").rename(sides.here / "elsewhere")
        sides.step()
        sides.same()
        assert sides.written() == 0
        sides.target.close(True)


def test_of_a_large_file_only_changed_blocks_are_sent_and_into_the_same_file(sides: Sides) -> None:
    big = sides.here / "big"
    big.write_bytes(os.urandom(3 << 20))
    with sides.start():
        sides.step()
        inode = (sides.there / "big").stat().st_ino
        os.pwrite(os.open(big, os.O_RDWR), b"changed", (1 << 20) + 5)
        sides.step()
        sides.same()
        assert (sides.there / "big").stat().st_ino == inode
        assert sides.written() == 64 << 10
        sides.target.close(True)


def test_a_mapped_file_stays_the_same_file_and_is_looked_into_every_time(sides: Sides) -> None:
    small = sides.here / "small"
    small.write_bytes(b"s" * 5000)
    with sides.start():
        sides.step()
        inode = (sides.there / "small").stat().st_ino
        status = small.stat()
        with open(small, "r+b") as file:
            file.write(b"unseen")
        os.utime(small, ns=(status.st_atime_ns, status.st_mtime_ns))
        number = frozenset({status.st_ino})
        sides.step(Mapped(number, number))
        sides.same()
        assert (sides.there / "small").stat().st_ino == inode
        sides.target.close(True)


@pytest.mark.parametrize("seed", range(12))
def test_a_tree_that_never_rests_is_the_same_once_it_does(sides: Sides, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(60):
        shake(sides.here, chance)
    with sides.start():
        for _ in range(4):
            steps = sides.source.changes(Mapped())
            for message in steps:
                sides.target.apply(message.ops)
                shake(sides.here, chance)  # in the middle of a pass
            for _ in range(25):
                shake(sides.here, chance)
        sides.step()
        sides.same()
        sides.target.close(True)


def test_a_tree_that_changes_within_every_step_is_the_same_once_it_rests(sides: Sides) -> None:
    chance, over = random.Random(7), threading.Event()
    for _ in range(60):
        shake(sides.here, chance)

    def never_rest() -> None:
        while not over.is_set():
            shake(sides.here, chance)

    shaker = threading.Thread(target=never_rest)
    shaker.start()
    try:
        sides.start()
        for _ in range(6):
            sides.step()
    finally:
        over.set()
        shaker.join()
    with sides.source:
        sides.step()
        sides.same()
        sides.target.close(True)


def shake(top: Path, chance: random.Random) -> None:
    """Do something to a tree, anything."""
    folders = [Path(folder) for folder, _, _ in os.walk(top)]
    files = [Path(f) / n for f, _, names in os.walk(top) for n in names]
    folder, name = chance.choice(folders), f"n{chance.randrange(8)}"
    file = chance.choice(files) if files else None
    try:
        match chance.randrange(10):
            case 0 | 1:
                (folder / name).write_bytes(chance.randbytes(chance.choice([0, 10, 70_000, 300_000])))
            case 2:
                (folder / name).mkdir()
            case 3 if file:
                file.unlink()
            case 4 if file:
                file.rename(folder / name)
            case 5:
                chance.choice(folders).rename(folder / name)
            case 6 if file:
                os.link(file, folder / name)
            case 7 if file:
                with open(file, "r+b") as out:
                    out.seek(chance.randrange(100_000))
                    out.write(b"changed")
            case 8 if file:
                os.chmod(file, chance.choice([0o600, 0o644]), follow_symlinks=True)
            case 9:
                (folder / name).symlink_to("n1")
    except OSError:
        pass


def test_a_single_file_is_carried_and_its_neighbours_are_not(tmp_path: Path) -> None:
    sides = Sides(tmp_path, tree=SyncTree("/srv", [b"one"]))
    (sides.here / "one").write_text("1")
    (sides.here / "two").write_text("2")
    sides.there.mkdir()
    (sides.there / "three").write_text("3")
    with sides.start():
        sides.step()
        replace(sides.here / "one", b"once more")
        (sides.here / "two").write_text("22")
        sides.step()
        sides.target.close(True)
    assert {p.name: p.read_text() for p in sides.there.iterdir()} == {"one": "once more", "three": "3"}


def test_sockets_and_devices_are_named_and_left_out(sides: Sides) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(sides.here / "socket"))
        os.mknod(sides.here / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        with sides.start() as source:
            sides.step()
            assert (source.difference.skipped, source.difference.skipped_names) == (2, ["/null", "/socket"])
            sides.target.close(True)
    assert os.listdir(sides.there) == []


def test_where_the_kernel_tells_nothing_preflight_says_so_and_everything_is_looked_at(tmp_path: Path) -> None:
    sides = Sides(tmp_path)
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower/old").write_text("old")
    options = ",".join(f"{key}={tmp_path / key[:-3]}" for key in ("lowerdir", "upperdir", "workdir"))
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, sides.here], check=True)
    try:
        sides.watched = False
        fd = os.open(sides.here, os.O_RDONLY | os.O_DIRECTORY)
        with TreeSender(0, sides.tree, fd) as source:
            assert not source.watching
            (reason,) = source.difference.reasons("b")
            assert "the kernel does not tell what changes below / " in str(reason)
        sides.move(lambda: ((sides.here / "old").write_text("copied up"), None)[1])
    finally:
        subprocess.run(["umount", sides.here], check=True)


FILE = trees.Entry(b"a", 0o100644, 1)
HOSTILE: dict[str, list[trees.TreeOp]] = {
    "above": [trees.Put(trees.Entry(b"../a", 0o100644))],
    "absolute": [trees.Put(trees.Entry(b"/etc/passwd", 0o100644))],
    "dots": [trees.Put(trees.Entry(b"d/../../a", 0o100644))],
    "nul": [trees.Put(trees.Entry(b"a\0b", 0o100644))],
    "device": [trees.Put(trees.Entry(b"a", 0o020666))],
    "socket": [trees.Put(trees.Entry(b"a", 0o140666))],
    "our own": [trees.Remove(b".migrator-m-test")],
    "the top": [trees.Remove(b"")],
    "the top is moved": [trees.MoveAside(b"", 1)],
    "contents of nothing": [trees.Write(0, b"x")],
    "end of nothing": [trees.Close()],
    "two at once": [trees.Open(FILE), trees.Open(FILE)],
    "in the middle of a file": [trees.Open(FILE), trees.Remove(b"a")],
    "never kept": [trees.MoveBack(7, b"a")],
    "twice the same number": [trees.Put(FILE), trees.MoveAside(b"a", 1), trees.Put(FILE), trees.MoveAside(b"a", 1)],
    "link from above": [trees.Join(b"a", b"../secret")],
    "strange attribute": [trees.Put(trees.Entry(b"a", 0o100644, xattrs={"security.selinux": b"x"}))],
}


@pytest.mark.parametrize("ops", HOSTILE.values(), ids=HOSTILE)
def test_what_was_not_agreed_upon_is_refused_and_leaves_nothing(tmp_path: Path, ops: list[trees.TreeOp]) -> None:
    (tmp_path / "secret").write_text("mine")
    top = tmp_path / "top"
    target = TreeReceiver(TreeTop(SyncTree("/"), str(top)), "m-test")
    with pytest.raises(m.MessageError):
        target.apply(ops)
    target.close(False)
    assert sorted(os.listdir(tmp_path)) == ["secret", "top"]
    assert [name for name in os.listdir(top) if name != "a"] == []


@pytest.mark.parametrize(
    "op",
    [
        trees.Put(trees.Entry(b"link/secret", 0o100644)),
        trees.Open(trees.Entry(b"link/secret", 0o100644), True),
        trees.Touch(trees.Entry(b"link/secret", 0o100777)),
        trees.Open(trees.Entry(b"to-secret", 0o100644), True),
        trees.Touch(trees.Entry(b"to-secret", 0o100777)),
        trees.Remove(b"link/secret"),
        trees.Join(b"a", b"link/secret"),
        trees.Put(trees.Entry(b"mounted/a", 0o100644)),
    ],
    ids=str,
)
def test_no_link_is_followed_and_no_mount_point_crossed(tmp_path: Path, op: trees.TreeOp) -> None:
    outside, top = tmp_path / "outside", tmp_path / "top"
    outside.mkdir()
    (top / "mounted").mkdir(parents=True)
    (outside / "secret").write_text("mine")
    (outside / "secret").chmod(0o600)
    (top / "link").symlink_to(outside)
    (top / "to-secret").symlink_to(outside / "secret")
    subprocess.run(["mount", "--bind", outside, top / "mounted"], check=True)
    try:
        target = TreeReceiver(TreeTop(SyncTree("/"), str(top)), "m-test")
        with pytest.raises(FileError, match=r"/(link/secret|to-secret|mounted/a|a) cannot be written"):
            target.apply([op])
        target.close(False)
    finally:
        subprocess.run(["umount", top / "mounted"], check=True)
    assert (outside / "secret").read_text() == "mine"
    assert (outside / "secret").stat().st_mode == 0o100600
    assert os.listdir(outside) == ["secret"]


@pytest.mark.parametrize(
    ("tree", "root"),
    [(SyncTree("/"), ""), (SyncTree("/"), "/"), (SyncTree("/../etc"), "/srv"), (SyncTree("/a\0b"), "")],
)
def test_a_tree_that_is_nobodys_to_replace_is_refused(tree: SyncTree, root: str) -> None:
    with pytest.raises(m.MessageError):
        FileReceiver([tree], root, "m-test")


def test_a_tree_that_was_not_agreed_upon_or_is_over_is_refused(tmp_path: Path) -> None:
    targets = FileReceiver([SyncTree("/")], str(tmp_path / "top"), "m-test")
    with pytest.raises(m.MessageError):
        targets.apply(trees.TreeOps(0, [trees.Put(FILE)]))
    targets.accepted = True
    with pytest.raises(m.MessageError):
        targets.apply(trees.TreeOps(1, []))
    targets.close(False)
    with pytest.raises(m.MessageError):
        targets.apply(trees.TreeOps(0, [trees.Put(FILE)]))
    assert os.listdir(tmp_path) == []


def test_a_directory_that_both_hosts_share_is_recognized(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    status = (tmp_path / "top").stat()
    same = SyncTree("/top", [], status.st_ino, status.st_ctime_ns)
    (tmp_path / "top/later").touch()
    other = SyncTree("/top", [], status.st_ino, status.st_ctime_ns - 3600 * 10**9)
    for tree, shared in [(same, True), (other, False), (SyncTree("/top"), False)]:
        assert bool(FileReceiver([tree], str(tmp_path), "m-test").shared()) == shared


@pytest.mark.parametrize(
    ("directory", "after", "names"),
    [(b"..", b"", [b"a"]), (b"", b"", [b"a/b"]), (b"", b"", [b"b", b"a"]), (b"", b"b", [b"a"]), (b"", b"", [b""])],
)
def test_a_list_of_what_cannot_be_there_is_refused(
    tmp_path: Path, directory: bytes, after: bytes, names: list[bytes]
) -> None:
    target = TreeReceiver(TreeTop(SyncTree("/"), str(tmp_path)), "m-test")
    with pytest.raises(m.MessageError):
        target.compare(trees.TreeList(0, 0, directory, after, True, [trees.Entry(name, 0o100644) for name in names]))
    target.close(False)


@pytest.mark.parametrize(
    "answer",
    [
        trees.TreeAnswer(99),
        trees.TreeAnswer(0, [9]),
        trees.TreeAnswer(0, [], [b"../a"]),
        trees.TreeAnswer(0, [], [b"a/b"]),
    ],
)
def test_an_answer_to_what_was_not_asked_is_refused(sides: Sides, answer: trees.TreeAnswer) -> None:
    (sides.here / "a").touch()
    fd = os.open(sides.here, os.O_RDONLY | os.O_DIRECTORY)
    with TreeSender(0, sides.tree, fd, watched=False) as source:
        next(source.lists())
        with pytest.raises(m.MessageError):
            source.answered(answer)


def test_a_file_that_is_cut_off_on_its_way_leaves_the_old_one(sides: Sides) -> None:
    big, content = sides.here / "big", os.urandom(3 << 20)
    big.write_bytes(content)
    with sides.start():
        sides.step()
        with open(big, "r+b") as file:
            file.write(b"x" * (2 << 20))
        for message in sides.source.changes(Mapped()):
            sides.target.apply([op for op in message.ops if not isinstance(op, trees.Close)])
            break
        sides.target.close(False)
    assert (sides.there / "big").read_bytes() == content
    assert sorted(os.listdir(sides.there.parent)) == ["here", "there"]


def test_names_of_a_large_directory_are_compared_in_parts(sides: Sides) -> None:
    for number in range(1300):
        (sides.here / f"f{number}").touch()
    sides.there.mkdir()
    for number in range(0, 3000, 3):
        (sides.there / f"g{number}").touch()
    with sides.start() as source:
        assert (source.difference.files, source.difference.surplus) == (1300, 1000)
        sides.step()
        sides.same()
        sides.target.close(True)
