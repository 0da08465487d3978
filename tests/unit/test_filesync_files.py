"""Files arrive whole, changes arrive after the freeze, and a peer can write nothing that was not asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from migrator.engine.base import FileFact
from migrator.filesync.files import FileError, FileReceiver, FileSender
from migrator.protocol import messages as m
from migrator.protocol.messages import FILE_CHUNK, FileBegin, FileData, FileEnd, MessageError


class Wire:
    """A source and a destination with a directory each, and nothing in between."""

    def __init__(self, path: Path, *names: str) -> None:
        self.here, self.there = path / "here", path / "there"
        self.here.mkdir()
        self.there.mkdir()
        self.names = names
        self.sent = 0

    def start(self) -> None:
        self.files = [self.fact(name) for name in self.names]
        self.receiver = FileReceiver([fact.path for fact in self.files], str(self.there))
        self.sender = FileSender(self.files, self._send, str(self.here))
        self.sender.want([fact.path for fact in self.files])

    def fact(self, name: str) -> FileFact:
        status = (self.here / name).stat()
        return FileFact(f"/{name}", status.st_size, status.st_mode, status.st_mtime_ns, "", True)

    async def _send(self, message: m.AnyMessage) -> None:
        message = m.decode(m.encode(message))
        if isinstance(message, m.FilesSync):
            self.sender.synced(message.number)
        else:
            assert isinstance(message, FileBegin | FileData | FileEnd)
            if isinstance(message, FileData):
                self.sent += len(message.data)
            self.receiver.take(message)


async def test_a_file_arrives_with_its_mode_and_time(tmp_path: Path) -> None:
    wire = Wire(tmp_path, "data")
    content = os.urandom(FILE_CHUNK * 2 + 17)
    (wire.here / "data").write_bytes(content)
    (wire.here / "data").chmod(0o640)
    wire.start()
    await wire.sender.send_wanted()
    copy = wire.there / "data"
    assert copy.read_bytes() == content
    assert copy.stat().st_mode == 0o100640
    assert copy.stat().st_mtime_ns == (wire.here / "data").stat().st_mtime_ns
    assert os.listdir(wire.there) == ["data"]


async def test_after_the_freeze_only_changed_blocks_are_sent_and_into_the_same_file(tmp_path: Path) -> None:
    wire = Wire(tmp_path, "log")
    source = wire.here / "log"
    source.write_bytes(b"a" * FILE_CHUNK * 4)
    wire.start()
    await wire.sender.send_wanted()
    inode = (wire.there / "log").stat().st_ino
    with source.open("r+b") as file:
        file.seek(FILE_CHUNK + 5)
        file.write(b"changed")
        file.seek(0, os.SEEK_END)
        file.write(b"more")
    wire.sent = 0
    await wire.sender.send_changes()
    assert (wire.there / "log").read_bytes() == source.read_bytes()
    assert (wire.there / "log").stat().st_ino == inode
    assert wire.sent == FILE_CHUNK + 4


async def test_a_file_that_shrank_is_cut(tmp_path: Path) -> None:
    wire = Wire(tmp_path, "log")
    (wire.here / "log").write_bytes(b"a" * 1000)
    wire.start()
    await wire.sender.send_wanted()
    os.truncate(wire.here / "log", 10)
    await wire.sender.send_changes()
    assert (wire.there / "log").read_bytes() == b"a" * 10


async def test_nothing_is_sent_again_where_nothing_changed(tmp_path: Path) -> None:
    wire = Wire(tmp_path, "log")
    (wire.here / "log").write_bytes(b"a" * 1000)
    wire.start()
    await wire.sender.send_wanted()
    wire.sent = 0
    await wire.sender.send_changes()
    assert wire.sent == 0


async def test_changes_that_are_cut_off_leave_the_file_as_it_was(tmp_path: Path) -> None:
    wire = Wire(tmp_path, "log")
    (wire.here / "log").write_bytes(b"a" * 1000)
    wire.start()
    await wire.sender.send_wanted()
    wire.receiver.take(FileBegin(wire.files[0], in_place=True))
    wire.receiver.take(FileData(0, b"b" * 500))
    wire.receiver.close()
    assert (wire.there / "log").read_bytes() == b"a" * 1000
    assert os.listdir(wire.there) == ["log"]


async def test_a_file_that_is_gone_is_an_error_with_its_name(tmp_path: Path) -> None:
    wire = Wire(tmp_path, "log")
    (wire.here / "log").write_bytes(b"a")
    wire.start()
    (wire.here / "log").unlink()
    with pytest.raises(FileError, match="/log cannot be copied"):
        await wire.sender.send_wanted()


FACT = FileFact("/data", 1, 0o100644, 0, "", False)


@pytest.mark.parametrize(
    "messages",
    [
        [FileBegin(FileFact("/etc/shadow", 1, 0o100644, 0, "", False))],
        [FileBegin(FileFact("/data", 1, 0o120777, 0, "", False))],
        [FileData(0, b"x")],
        [FileEnd(0)],
        [FileBegin(FACT), FileBegin(FACT)],
        [FileBegin(FACT), FileData(0, b"x"), FileEnd(1, "ff" * 32)],
    ],
)
def test_what_was_not_asked_for_is_refused_and_leaves_nothing(
    tmp_path: Path, messages: list[FileBegin | FileData | FileEnd]
) -> None:
    receiver = FileReceiver(["/data"], str(tmp_path))
    with pytest.raises(MessageError):
        for message in messages:
            receiver.take(message)
    receiver.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", ["data", "/../data", "/a/../../data", "/nul\0"])
def test_a_path_that_leads_elsewhere_is_refused_even_if_it_was_asked_for(tmp_path: Path, path: str) -> None:
    receiver = FileReceiver([path], str(tmp_path))
    with pytest.raises(MessageError):
        receiver.take(FileBegin(FileFact(path, 1, 0o100644, 0, "", False)))


def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "data").symlink_to("secret")
    receiver = FileReceiver(["/data"], str(tmp_path))
    with pytest.raises(FileError):
        receiver.take(FileBegin(FACT, in_place=True))
    assert (tmp_path / "secret").read_text() == "mine"
