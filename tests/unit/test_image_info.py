"""The summary of a stream, whole or broken, as text and as JSON."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_samples import body, closed, latest, stream

from migrator.api.image_info import read_info, summarise
from migrator.errors import UsageError
from migrator.image import records as r
from migrator.image.addresses import address_text
from migrator.image.info import ImageInfo, ImageSummary
from migrator.image.render import render_text, to_json
from migrator.text import printable, size

STREAM = stream(closed(body()))


def info_of(raw: bytes) -> ImageInfo:
    """Through a pipe, as from another program."""
    reader, writer = os.pipe()

    def feed() -> None:
        with os.fdopen(writer, "wb") as out:
            out.write(raw)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        return summarise(reader)
    finally:
        thread.join()
        os.close(reader)


def test_a_whole_stream_is_summarised(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(STREAM)
    info = read_info(str(path))
    assert info.whole
    assert info.cause == ""
    assert info.bytes == len(STREAM)
    assert [(task.pid, task.comm, task.state) for task in info.tasks] == [
        (1, "init", "running"),
        (2, "worker", "running"),
        (3, "worker", "running"),
        (4, "gone", "zombie"),
        (5, "worker", "stopped"),
    ]
    mm, shm, *others = info.memory
    assert [other.kind for other in others] == ["mm", "mm"]
    assert (mm.kind, mm.what, mm.size, mm.data, mm.zero) == ("mm", "/usr/bin/worker", 6 * 4096, 3, 1)
    assert (shm.kind, shm.what, shm.data, shm.absent) == ("shm", "memfd ring", 1, 2)
    assert [(part.number, part.data, part.bytes, part.last) for part in info.rounds] == [
        (1, 3, 3 * 4096, False),
        (2, 1, 4096, True),
    ]
    assert [vma.perms for vma in mm.mappings] == ["r-xp", "rw-p", "r--s"]


def test_the_text_shows_the_tree_with_children_below_their_parents() -> None:
    assert render_text(info_of(STREAM), tree=True).splitlines() == [
        "  1  init  running  group 1 session 1  mm 3 files 33",
        "    2  worker  running  group 1 session 1  mm 5 files 33",
        "      3  worker  running  thread  1 signals pending",
        "      4  gone  zombie  group 1 session 1",
        "  5  worker  stopped  group 1 session 1  parent 99 outside  mm 6 files 33",
    ]


def test_the_text_shows_memory_and_rounds() -> None:
    shown = render_text(info_of(STREAM), verbose=True)
    assert "container shop, init 1" in shown
    assert "000001000000-000001003000 rw-p 00000000 arena" in shown
    assert "  2  1 pages with data (4.0 KiB), 0 zero, 0 absent  last, tasks stopped" in shown
    assert shown.endswith(f"whole: 64 records, {len(STREAM)} bytes\n")


def test_the_text_shows_guard_regions() -> None:
    info = info_of(stream(closed(latest())))
    assert sum(memory.guard for memory in info.memory) == sum(part.guard for part in info.rounds) > 0
    assert " guard\n" in render_text(info, verbose=True)


@pytest.mark.parametrize("cut", [0, 7, 8, 500, 9000, len(STREAM) - 1])
def test_a_stream_cut_short_is_shown_as_far_as_it_goes(cut: int) -> None:
    info = info_of(STREAM[:cut])
    assert not info.whole
    assert "without a trailer" in info.cause
    assert info.bytes <= cut
    assert "BROKEN after" in render_text(info)
    json.loads(to_json(info))


def test_an_error_record_is_the_cause() -> None:
    raw = stream([*body()[:5], r.Error("pid 3 fd 4: /dev/tty cannot be carried")])
    info = info_of(raw)
    assert info.errors == ["pid 3 fd 4: /dev/tty cannot be carried"]
    assert info.cause == "the writer of the stream gave up: pid 3 fd 4: /dev/tty cannot be carried"
    assert render_text(info, errors=True).splitlines()[0] == "error: pid 3 fd 4: /dev/tty cannot be carried"


def test_the_first_thing_out_of_place_is_the_cause_and_the_rest_is_shown() -> None:
    records = closed(body())
    records.remove(next(record for record in records if isinstance(record, r.Fs)))
    info = info_of(stream(records))
    assert info.cause == "record 51 (Task): fs_objref 8 is not defined"
    assert len(info.tasks) == 5


def test_descriptors_are_shown_with_what_they_are_opened_on() -> None:
    shown = [line.strip() for line in render_text(info_of(STREAM)).splitlines()]
    table = shown.index("files 33  of pid 1, 2, 5")
    assert shown[table + 1] == "0  regular    /var/log/shop  at 17  flags 0o2"
    assert shown[table + 2] == "1  pipe       Pipe 12  flags 0o1  cloexec"
    assert shown[table + 9] == "8  socket     inet stream connected 10.0.0.2:6379 - 10.0.0.1:49153  flags 0o2"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (b"", ""),
        (b"\x02\x00\x00\x50\x7f\x00\x00\x01" + bytes(8), "127.0.0.1:80"),
        (b"\x0a\x00\x00\x50" + bytes(4) + bytes(15) + b"\x01" + bytes(4), "[::1]:80"),
        (b"\x01\x00/run/x\0", "/run/x"),
        (b"\x01\x00\0abstract", "@abstract"),
        (b"\x02\x00\x00", "020000"),
    ],
)
def test_addresses_are_shown_as_people_write_them(address: bytes, shown: str) -> None:
    assert address_text(address) == shown


def test_the_json_holds_every_part() -> None:
    shown = json.loads(to_json(info_of(STREAM)))
    assert shown["whole"] is True
    assert shown["container"]["name"] == "shop"
    assert shown["tasks"][3]["zombie"] is True
    assert shown["memory"][0]["rounds"]["1"]["data"] == 2
    assert shown["counts"]["Cpu"] == 4


def test_a_name_cannot_drive_the_terminal() -> None:
    assert printable("a\x1b[31mb\n") == r"a\x1b[31mb\n"
    assert printable("größe") == "größe"


def test_sizes_are_in_binary_units() -> None:
    assert [size(n) for n in (0, 1023, 1024, 5 << 20, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 MiB",
        "3.0 TiB",
    ]


def test_a_stream_that_goes_on_behind_an_error_does_not_fill_the_memory() -> None:
    summary = ImageSummary()
    summary.broken("something")
    for pid in range(20_000):
        summary.add(r.SigPending(pid=pid, shared=0, infos=b""))
    assert len(summary.finish().tasks) <= 10_000


def test_no_such_file_is_told_at_once() -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_info("/nowhere/at/all")
    with pytest.raises(UsageError, match="is a directory"):
        read_info("/tmp")


@given(data=st.data())
def test_any_damage_is_reported_and_rendered(data: st.DataObject) -> None:
    raw = bytearray(STREAM)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    info = info_of(raw[: data.draw(st.integers(0, len(raw)))])
    assert info.whole or info.cause
    render_text(info, verbose=True)
    json.loads(to_json(info))
