"""Files arrive whole, changes arrive after the freeze, and a peer can write nothing that was not asked for."""

from __future__ import annotations

import mmap
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from migrator.engine.base import FileFact
from migrator.filesync.paths import FileError
from migrator.filesync.receiver import FileReceiver
from migrator.filesync.sync import FileSync
from migrator.protocol import messages as m
from migrator.protocol import trees
from migrator.protocol.trees import SyncTree
from migrator.protocol.wire import FILE_CHUNK, MessageError

BLOCK = 64 << 10


class Wire:
    """A source and a destination with a directory each, and nothing in between."""

    def __init__(self, path: Path) -> None:
        self.here, self.there = path / "here", path / "there"
        self.here.mkdir()
        self.there.mkdir()
        self.sent = 0
        self.told = 0
        self.sync: FileSync | None = None
        self.pids: list[int] = []

    async def start(self, *names: str) -> FileSync:
        files = [self.fact(name) for name in names]
        self.receiver = FileReceiver([], str(self.there), "m-test")
        self.receiver.accepted = True
        self.receiver.want(fact.path for fact in files)
        self.sync = FileSync(files, [], str(self.here), send=self._send, tell=self._tell, pids=lambda: self.pids)
        await self.sync.compare([fact.path for fact in files])
        begin = m.decode(m.encode(m.Begin("m-test-0001", self.sync.single)))
        assert isinstance(begin, m.Begin)
        self.receiver.add(begin.trees)
        await self.sync.send()
        return self.sync

    def fact(self, name: str) -> FileFact:
        status = (self.here / name).stat()
        return FileFact(f"/{name}", status.st_size, status.st_mode, status.st_mtime_ns, "", True)

    def _tell(self, count: int) -> None:
        self.told += count

    async def _send(self, message: m.AnyMessage) -> float:
        message = m.decode(m.encode(message))
        assert self.sync is not None
        if isinstance(message, m.FilesSync):
            self.sync.heard(message)
        else:
            assert isinstance(message, trees.TreeOps)
            self.sent += sum(len(op.data) for op in message.ops if isinstance(op, trees.Put | trees.Write))
            self.receiver.apply(message)
        return 0.0

    async def close(self) -> None:
        if self.sync is not None:
            await self.sync.close()
            assert self.receiver.close(True) == []


@pytest.fixture
async def wire(tmp_path: Path) -> AsyncIterator[Wire]:
    wire = Wire(tmp_path)
    yield wire
    await wire.close()


async def test_a_file_arrives_with_its_mode_and_time(wire: Wire) -> None:
    content = os.urandom(FILE_CHUNK * 2 + 17)
    (wire.here / "data").write_bytes(content)
    (wire.here / "data").chmod(0o640)
    await wire.start("data")
    copy = wire.there / "data"
    assert copy.read_bytes() == content
    assert copy.stat().st_mode == 0o100640
    assert copy.stat().st_mtime_ns == (wire.here / "data").stat().st_mtime_ns
    assert wire.told == len(content)
    wire.receiver.close(True)
    assert os.listdir(wire.there) == ["data"]


async def test_files_of_several_directories_arrive_and_nothing_else_does(wire: Wire) -> None:
    names = ["a/one", "a/two", "b/c/three"]
    for name in [*names, "a/not-this"]:
        (wire.here / name).parent.mkdir(parents=True, exist_ok=True)
        (wire.here / name).write_text(name)
    await wire.start(*names)
    wire.receiver.close(True)
    found = {str(path.relative_to(wire.there)) for path in wire.there.rglob("*") if path.is_file()}
    assert found == set(names)
    assert all((wire.there / name).read_text() == name for name in names)


async def test_after_the_freeze_only_changed_blocks_are_sent_and_into_the_same_file(wire: Wire) -> None:
    source = wire.here / "log"
    source.write_bytes(b"a" * FILE_CHUNK * 4)
    sync = await wire.start("log")
    inode = (wire.there / "log").stat().st_ino
    with source.open("r+b") as file:
        file.seek(FILE_CHUNK + 5)
        file.write(b"changed")
        file.seek(0, os.SEEK_END)
        file.write(b"more")
    wire.sent = 0
    await sync.step()
    assert (wire.there / "log").read_bytes() == source.read_bytes()
    assert (wire.there / "log").stat().st_ino == inode
    assert wire.sent == BLOCK + 4


async def test_a_file_that_shrank_is_cut(wire: Wire) -> None:
    (wire.here / "log").write_bytes(b"a" * 1000)
    sync = await wire.start("log")
    os.truncate(wire.here / "log", 10)
    await sync.step()
    assert (wire.there / "log").read_bytes() == b"a" * 10


async def test_nothing_is_sent_again_where_nothing_changed(wire: Wire) -> None:
    (wire.here / "log").write_bytes(b"a" * 1000)
    sync = await wire.start("log")
    wire.sent = 0
    await sync.step()
    assert wire.sent == 0


async def test_changes_that_are_cut_off_leave_the_file_as_it_was(wire: Wire) -> None:
    (wire.here / "log").write_bytes(b"a" * 1000)
    await wire.start("log")
    entry = trees.Entry(b"log", 0o100644, 1000)
    wire.receiver.apply(trees.TreeOps(0, [trees.Open(entry, in_place=True), trees.Write(0, b"b" * 500)]))
    wire.receiver.close(True)
    assert (wire.there / "log").read_bytes() == b"a" * 1000
    assert os.listdir(wire.there) == ["log"]


async def test_what_is_written_through_a_mapping_that_is_gone_by_then_arrives(wire: Wire) -> None:
    """The kernel gives a file a new time with the first write to a page of a mapping, not with those after it."""
    source = wire.here / "data"
    source.write_bytes(b"a" * 4096)
    wire.pids = [os.getpid()]
    with source.open("r+b") as file, mmap.mmap(file.fileno(), 4096) as mapping:
        mapping[0] = 1
        sync = await wire.start("data")
        await sync.step()
        mapping[1] = 2
    await sync.step()
    assert (wire.there / "data").read_bytes() == source.read_bytes()


async def test_a_file_that_is_gone_is_an_error_with_its_name(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    (wire.here / "log").write_bytes(b"a")
    compare = FileSync.compare

    async def compare_and_delete(self: FileSync, wanted: list[str]) -> object:
        found = await compare(self, wanted)
        (wire.here / "log").unlink()
        return found

    monkeypatch.setattr(FileSync, "compare", compare_and_delete)
    with pytest.raises(FileError, match="/log cannot be copied"):
        await wire.start("log")


FILE = trees.Entry(b"data", 0o100644, 1)
HOSTILE: dict[str, Callable[[FileReceiver], None]] = {
    "another file": lambda there: there.add([SyncTree("/etc", [b"shadow"])]),
    "a whole directory": lambda there: there.add([SyncTree("/")]),
    "one more file": lambda there: there.add([SyncTree("/", [b"data", b"more"])]),
    "a longer path": lambda there: there.add([SyncTree("/", [b"a/../data"])]),
    "before it was agreed upon": lambda there: there.apply(trees.TreeOps(0, [trees.Put(FILE, b"x")])),
}


@pytest.mark.parametrize("attack", HOSTILE.values(), ids=HOSTILE)
def test_what_was_not_asked_for_is_refused_and_leaves_nothing(
    tmp_path: Path, attack: Callable[[FileReceiver], None]
) -> None:
    receiver = FileReceiver([], str(tmp_path), "m-test")
    receiver.accepted = True
    receiver.want(["/data"])
    with pytest.raises(MessageError):
        attack(receiver)
    receiver.close(False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "op",
    [
        trees.Put(trees.Entry(b"other", 0o100644, 1), b"x"),
        trees.Put(trees.Entry(b"", 0o040777)),
        trees.Remove(b"other"),
        trees.Join(b"data", b"other"),
        trees.Join(b"other", b"data"),
        trees.MoveAside(b"other", 1),
    ],
    ids=str,
)
def test_beside_the_files_that_were_asked_for_nothing_is_touched(tmp_path: Path, op: trees.TreeOp) -> None:
    (tmp_path / "other").write_text("mine")
    before = tmp_path.stat().st_mode
    receiver = FileReceiver([], str(tmp_path), "m-test")
    receiver.accepted = True
    receiver.want(["/data"])
    receiver.add([SyncTree("/", [b"data"])])
    with pytest.raises(MessageError):
        receiver.apply(trees.TreeOps(0, [op]))
    receiver.close(False)
    assert (tmp_path / "other").read_text() == "mine"
    assert tmp_path.stat().st_mode == before
    assert os.listdir(tmp_path) == ["other"]


@pytest.mark.parametrize("path", ["data", "/../data", "/a/../../data", "/nul\0/data"])
def test_a_path_that_leads_elsewhere_is_refused_even_if_it_was_asked_for(tmp_path: Path, path: str) -> None:
    receiver = FileReceiver([], str(tmp_path), "m-test")
    with pytest.raises(MessageError):
        receiver.want([path])


def test_a_directory_that_is_a_link_out_of_the_root_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "etc").symlink_to(tmp_path)
    with pytest.raises(FileError, match="symbolic link"):
        FileReceiver([], str(root), "m-test").want(["/etc/secret"])


def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "data").symlink_to("secret")
    receiver = FileReceiver([], str(tmp_path), "m-test")
    receiver.accepted = True
    receiver.want(["/data"])
    receiver.add([SyncTree("/", [b"data"])])
    with pytest.raises(FileError):
        receiver.apply(trees.TreeOps(0, [trees.Open(FILE, in_place=True)]))
    receiver.close(False)
    assert (tmp_path / "secret").read_text() == "mine"
