"""The store in one file: damaged, deleted, full, of another program, shared by processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from migrator.fleet import sqlite as module
from migrator.fleet.sqlite import SqliteStore
from migrator.fleet.store import Compacted, Conflict, NotHeld, StoreCorrupt, StoreUnavailable, Write


async def filled(path: Path) -> Path:
    store = await SqliteStore.open(path)
    for number in range(200):
        await store.put(f"hosts/{number}", os.urandom(500))
    await store.close()
    return path


async def test_a_new_file_belongs_to_its_owner_alone(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "new" / "fleet.db")
    assert stat.S_IMODE((tmp_path / "new" / "fleet.db").stat().st_mode) == 0o600
    await store.close()


@pytest.mark.parametrize("offset", [0, 16, 3 * 4096, 10 * 4096 + 8])
async def test_a_damaged_file_is_refused_at_open(tmp_path: Path, offset: int) -> None:
    path = await filled(tmp_path / "fleet.db")
    before = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xa5" * 700)
    with pytest.raises(StoreCorrupt, match=r"fleet\.db"):
        await SqliteStore.open(path)
    assert len(path.read_bytes()) == len(before)


async def test_one_bit_that_flipped_in_a_value_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    store = await SqliteStore.open(path)
    await store.put("settings/balance", b'{"threshold":0.375}')
    await store.close()
    data = path.read_bytes()
    assert b"0.375" in data
    path.write_bytes(data.replace(b"0.375", b"0.775"))
    with pytest.raises(StoreCorrupt, match="settings/balance"):
        await SqliteStore.open(path)


async def test_a_truncated_file_is_refused_at_open(tmp_path: Path) -> None:
    path = await filled(tmp_path / "fleet.db")
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)
    with pytest.raises(StoreCorrupt):
        await SqliteStore.open(path)


async def test_text_is_no_store_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("buy milk\n" * 100)
    with pytest.raises(StoreCorrupt):
        await SqliteStore.open(path)
    assert path.read_text() == "buy milk\n" * 100


async def test_the_database_of_another_program_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other.db") as database:
        database.execute("CREATE TABLE entries (key)")
    with pytest.raises(StoreCorrupt, match="other program"):
        await SqliteStore.open(tmp_path / "other.db")


async def test_a_store_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = await filled(tmp_path / "fleet.db")
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version=2")
    with pytest.raises(StoreCorrupt, match="version 2"):
        await SqliteStore.open(path)


@pytest.mark.parametrize("what", ["deleted", "replaced"])
async def test_a_file_that_goes_away_while_in_use_is_noticed_before_anything_is_lost(tmp_path: Path, what: str) -> None:
    path = await filled(tmp_path / "fleet.db")
    store = await SqliteStore.open(path)
    if what == "replaced":
        shutil.copy(path, tmp_path / "copy")
        os.replace(tmp_path / "copy", path)
    else:
        path.unlink()
    for call in (store.put("a", b"1"), store.get("hosts/1"), store.scan(""), store.grant(5.0)):
        with pytest.raises(StoreUnavailable, match="deleted or replaced"):
            await call
    await store.close()


@pytest.mark.parametrize("path", ["/proc/fleet.db", "/dev/null/fleet.db"])
async def test_a_place_that_cannot_be_written_is_said(path: str) -> None:
    with pytest.raises(StoreUnavailable):
        await SqliteStore.open(path)


async def test_a_directory_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=str(tmp_path)):
        await SqliteStore.open(tmp_path)


async def test_a_full_disk_writes_nothing_and_says_so(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)], check=True)
    try:
        store = await SqliteStore.open(tmp_path / "fleet.db")
        await store.put("hosts/a", b"1")
        with pytest.raises(StoreUnavailable, match="full") as caught:
            for number in range(100):
                await store.apply([Write("hosts/a", b"x" * 30000), Write(f"hosts/{number}", b"x" * 30000)])
        assert caught.value.hint
        done = len((await store.scan("hosts/")).entries)
        await store.close()
        again = await SqliteStore.open(tmp_path / "fleet.db")
        assert len((await again.scan("hosts/")).entries) == done
        await again.close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


async def test_another_process_that_holds_the_file_for_too_long_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUSY", 0.2)
    path = await filled(tmp_path / "fleet.db")
    store = await SqliteStore.open(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        await store.put("a", b"1")
    assert (await store.get("hosts/1")) is not None  # looking is never kept waiting
    other.execute("ROLLBACK")
    await store.put("a", b"1")
    await store.close()
    other.close()


def _count(path: str, rounds: int) -> None:
    async def count() -> None:
        store = await SqliteStore.open(path)
        done = 0
        while done < rounds:
            entry = await store.get("counter")
            value, revision = (int(entry.value), entry.revision) if entry else (0, 0)
            try:
                await store.put("counter", b"%d" % (value + 1), expected=revision)
                done += 1
            except Conflict:
                pass
        await store.close()

    asyncio.run(count())


async def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "fleet.db")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_count, args=(path, 50)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        await asyncio.to_thread(process.join, 60)
        assert process.exitcode == 0
    store = await SqliteStore.open(path)
    entry = await store.get("counter")
    assert entry is not None and entry.value == b"150"
    await store.close()


_WRITER = """
import asyncio, sys
from migrator.fleet.sqlite import SqliteStore
from migrator.fleet.store import Write

async def main():
    store = await SqliteStore.open(sys.argv[1])
    number = int(sys.argv[2])
    while True:
        number += 1
        await store.apply([Write("a", b"%d" % number), Write("b", b"%d" % number)])
        print(number, flush=True)

asyncio.run(main())
"""


async def test_a_writer_that_is_killed_leaves_whole_transactions_and_all_that_it_told_of(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    told = 0
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), str(told)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            for _, line in zip(range(20), writer.stdout, strict=False):
                told = int(line)
            writer.kill()
            told = int((writer.stdout.read().split() or [str(told)])[-1])
        store = await SqliteStore.open(path)
        a, b = await store.get("a"), await store.get("b")
        assert a is not None and b is not None
        assert a.value == b.value and a.revision == b.revision
        assert int(a.value) in (told, told + 1)
        told = int(a.value)
        await store.close()


async def test_leases_of_an_earlier_boot_have_ended(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "fleet.db")
    lock = await store.acquire("leader", b"one", ttl=3600.0)
    assert lock is not None
    store._boot = "another boot"
    assert await store.holder("leader") is None
    with pytest.raises(NotHeld):
        await store.renew(lock.lease)
    await store.close()


async def test_a_watch_of_changes_that_are_not_kept_any_more_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_CHANGES", 50)
    store = await SqliteStore.open(tmp_path / "fleet.db")
    first = await store.put("a", b"0")
    for number in range(120):
        await store.put("a", b"%d" % number)
    with pytest.raises(Compacted):
        async for _ in store.watch("", after=first):
            pass
    listing = await store.scan("")
    await store.put("a", b"last")
    async with asyncio.timeout(5):
        async for batch in store.watch("", after=listing.revision):
            assert [change.value for change in batch] == [b"last"]
            break
    await store.close()


async def test_a_counter_that_was_lost_is_an_error_and_not_a_new_beginning(tmp_path: Path) -> None:
    path = await filled(tmp_path / "fleet.db")
    with sqlite3.connect(path) as database:
        database.execute("DELETE FROM counters")
    store = await SqliteStore.open(path)
    with pytest.raises(StoreCorrupt, match="revision"):
        await store.put("a", b"1")
    await store.close()


async def test_what_is_asked_after_the_end_is_an_error(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "fleet.db")
    await store.close()
    with pytest.raises(StoreUnavailable):
        await store.get("a")
