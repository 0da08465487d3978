"""What every store promises, asked of each."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable

import pytest

from migrator.errors import UsageError
from migrator.fleet.leadership import keep, lead
from migrator.fleet.store import (
    MAX_VALUE,
    Change,
    Conflict,
    NotHeld,
    Store,
    StoreUnavailable,
    Write,
    open_store,
)

Opener = Callable[[], Awaitable[Store]]

SHORT = 2.0  # seconds; etcd gives no shorter lease


async def changes(store: Store, prefix: str, after: int, count: int) -> list[Change]:
    found: list[Change] = []
    async with asyncio.timeout(20):
        async for batch in store.watch(prefix, after=after):
            found += batch
            if len(found) >= count:
                break
    return found


async def test_a_value_that_was_put_is_there_with_its_revision(store: Store) -> None:
    assert await store.get("hosts/a") is None
    revision = await store.put("hosts/a", b"\x00any bytes\xff")
    entry = await store.get("hosts/a")
    assert entry is not None
    assert (entry.value, entry.revision) == (b"\x00any bytes\xff", revision)


async def test_revisions_only_grow_whatever_is_written(store: Store) -> None:
    seen = [await store.put("a", b"1"), await store.put("b", b"1"), await store.put("a", b"1")]
    seen.append(await store.delete("a"))
    seen.append(await store.put("a", b"1"))
    assert seen == sorted(set(seen))


async def test_of_two_writers_that_saw_the_same_only_one_writes(store: Store) -> None:
    revision = await store.put("plan", b"old")
    await store.put("plan", b"first", expected=revision)
    with pytest.raises(Conflict, match="plan"):
        await store.put("plan", b"second", expected=revision)
    entry = await store.get("plan")
    assert entry is not None and entry.value == b"first"


async def test_what_must_be_new_is_made_once_by_many_at_once(opener: Opener) -> None:
    stores = [await opener() for _ in range(5)]
    done = await asyncio.gather(
        *(store.put("claim", b"%d" % number, expected=0) for number, store in enumerate(stores)), return_exceptions=True
    )
    winners = [number for number, result in enumerate(done) if isinstance(result, int)]
    assert len(winners) == 1
    assert all(isinstance(result, int | Conflict) for result in done)
    entry = await stores[0].get("claim")
    assert entry is not None and entry.value == b"%d" % winners[0]


async def test_a_transaction_is_done_wholly_or_not_at_all(store: Store) -> None:
    await store.put("moves/x", b"1")
    with pytest.raises(Conflict):
        await store.apply([Write("history/1", b"done"), Write("moves/x", None, 99999)])
    assert await store.get("history/1") is None
    assert await store.get("moves/x") is not None
    revision = await store.apply([Write("history/1", b"done"), Write("moves/x", None)])
    assert await store.get("moves/x") is None
    entry = await store.get("history/1")
    assert entry is not None and entry.revision == revision


async def test_deleting_expects_too(store: Store) -> None:
    await store.delete("nothing")
    with pytest.raises(Conflict):
        await store.delete("nothing", expected=7)
    revision = await store.put("a", b"1")
    await store.put("a", b"2")
    with pytest.raises(Conflict):
        await store.delete("a", expected=revision)
    assert await store.get("a") is not None


async def test_a_scan_gives_what_is_below_the_prefix_in_order_and_nothing_else(store: Store) -> None:
    for key in ("hosts/b", "hosts/a", "hosts/a/deep", "hosts-of-others", "moves/a"):
        await store.put(key, key.encode())
    listing = await store.scan("hosts/")
    assert [(entry.key, entry.value) for entry in listing.entries] == [
        ("hosts/a", b"hosts/a"),
        ("hosts/a/deep", b"hosts/a/deep"),
        ("hosts/b", b"hosts/b"),
    ]
    assert len((await store.scan("")).entries) == 5
    assert (await store.scan("none/")).entries == ()


async def test_a_watch_from_a_scan_misses_nothing(opener: Opener) -> None:
    looking, writing = await opener(), await opener()
    await writing.put("hosts/a", b"1")
    seen = await looking.scan("hosts/")
    await writing.put("hosts/b", b"2")
    await writing.put("others/b", b"2")
    watching = asyncio.create_task(changes(looking, "hosts/", seen.revision, 3))
    await asyncio.sleep(0.3)
    await writing.put("hosts/a", b"3")
    await writing.delete("hosts/b")
    assert [(change.key, change.value) for change in await watching] == [
        ("hosts/b", b"2"),
        ("hosts/a", b"3"),
        ("hosts/b", None),
    ]


async def test_the_changes_of_one_transaction_are_seen_together(store: Store) -> None:
    seen = await store.scan("")
    await store.apply([Write("a", b"1"), Write("b", b"2")])
    async with asyncio.timeout(10):
        async for batch in store.watch("", after=seen.revision):
            assert {change.key for change in batch} == {"a", "b"}
            break


async def test_a_key_ends_with_its_lease_and_watchers_see_it(opener: Opener) -> None:
    agent, controller = await opener(), await opener()
    lease = await agent.grant(SHORT)
    revision = await agent.put("alive/a", b"here", lease=lease)
    assert await controller.get("alive/a") is not None
    (gone,) = await changes(controller, "alive/", revision, 1)
    assert (gone.key, gone.value) == ("alive/a", None)
    assert await controller.get("alive/a") is None
    with pytest.raises(NotHeld):
        await agent.renew(lease)
    with pytest.raises(NotHeld):
        await agent.put("alive/a", b"again", lease=lease)
    assert await controller.get("alive/a") is None


async def test_a_lease_that_is_renewed_lives_on(store: Store) -> None:
    lease = await store.grant(3 * SHORT)  # whoever renews it may be held up by a busy machine for most of that
    await store.put("alive/a", b"here", lease=lease)
    for _ in range(8):
        await asyncio.sleep(SHORT / 2)
        await store.renew(lease)
    assert await store.get("alive/a") is not None
    await store.revoke(lease)
    assert await store.get("alive/a") is None
    await store.revoke(lease)


async def test_a_key_put_again_without_its_lease_stays(store: Store) -> None:
    lease = await store.grant(SHORT)
    await store.put("a", b"1", lease=lease)
    await store.put("a", b"2")
    await store.revoke(lease)
    entry = await store.get("a")
    assert entry is not None and entry.value == b"2"


async def test_a_lock_has_one_holder_and_a_higher_token_each_time(opener: Opener) -> None:
    one, other = await opener(), await opener()
    first = await one.acquire("leader", b"one", ttl=SHORT)
    assert first is not None
    assert await other.acquire("leader", b"other", ttl=SHORT) is None
    holder = await other.holder("leader")
    assert holder is not None and (holder.value, holder.revision) == (b"one", first.token)
    await one.release(first)
    second = await other.acquire("leader", b"other", ttl=SHORT)
    assert second is not None
    assert second.token > first.token


async def test_the_lock_of_a_holder_that_died_passes_on(opener: Opener) -> None:
    one, other = await opener(), await opener()
    first = await one.acquire("leader", b"one", ttl=SHORT)
    assert first is not None
    async with asyncio.timeout(15), lead(other, "leader", b"other", ttl=SHORT) as second:
        assert second.token > first.token
        with pytest.raises(NotHeld):
            await one.put("moves/x", b"too late", guard=first)
        await other.put("moves/x", b"in time", guard=second)
    entry = await one.get("moves/x")
    assert entry is not None and entry.value == b"in time"


async def test_only_one_of_many_leads_at_any_time(opener: Opener) -> None:
    leading = 0
    tokens = []

    async def controller(number: int) -> None:
        nonlocal leading
        store = await opener()
        async with lead(store, "leader", b"%d" % number, ttl=5.0) as lock:
            leading += 1
            assert leading == 1
            tokens.append(lock.token)
            await asyncio.sleep(0.05)
            leading -= 1

    async with asyncio.timeout(60):
        await asyncio.gather(*(controller(number) for number in range(4)))
    assert tokens == sorted(set(tokens)) and len(tokens) == 4


async def test_leading_lasts_longer_than_one_lease_and_ends_when_it_is_lost(opener: Opener) -> None:
    one, other = await opener(), await opener()
    began = time.monotonic()
    with pytest.raises(NotHeld):
        async with asyncio.timeout(30), lead(one, "leader", b"one", ttl=SHORT) as lock:
            await asyncio.sleep(SHORT * 2)
            await one.put("plan", b"still mine", guard=lock)
            await other.revoke(lock.lease)
            await asyncio.sleep(30)
    assert time.monotonic() - began < 25


async def test_an_error_of_the_block_that_leads_comes_out_as_it_is(store: Store) -> None:
    with pytest.raises(ZeroDivisionError):
        async with lead(store, "leader", b"one", ttl=SHORT):
            raise ZeroDivisionError
    assert await store.holder("leader") is None


async def test_a_lease_counts_as_lost_when_renewals_do_not_come_through(store: Store) -> None:
    class Cut:
        async def renew(self, lease: object) -> None:
            raise StoreUnavailable("cut off")

    lease = await store.grant(SHORT)
    async with asyncio.timeout(10):
        with pytest.raises(NotHeld):
            await keep(Cut(), lease)  # type: ignore[arg-type]


async def test_what_was_written_outlives_the_program(opener: Opener, store: Store) -> None:
    await store.put("hosts/a", b"1")
    await store.close()
    again = await opener()
    entry = await again.get("hosts/a")
    assert entry is not None and entry.value == b"1"


@pytest.mark.parametrize(
    "writes",
    [
        [],
        [Write("../etc", b"")],
        [Write("a//b", b"")],
        [Write("a/", b"")],
        [Write("", b"")],
        [Write("a\x00", b"")],
        [Write("ä", b"")],
        [Write("a" * 600, b"")],
        [Write("a", b"x" * (MAX_VALUE + 1))],
        [Write("a", b"1"), Write("a", b"2")],
        [Write(f"k{n}", b"") for n in range(101)],
    ],
)
async def test_what_no_store_takes_is_refused_before_it_is_asked(store: Store, writes: list[Write]) -> None:
    with pytest.raises(UsageError):
        await store.apply(writes)
    assert (await store.scan("")).entries == ()


async def test_the_largest_value_and_the_largest_transaction_are_taken(store: Store) -> None:
    value = os.urandom(MAX_VALUE)
    await store.put("big", value)
    entry = await store.get("big")
    assert entry is not None and entry.value == value
    await store.apply([Write(f"k{n}", b"%d" % n, 0) for n in range(100)])
    assert len((await store.scan("")).entries) == 101


@pytest.mark.parametrize("prefix", ["hosts", "/", "a//", "hosts/*/"])
async def test_a_prefix_that_would_match_too_much_is_refused(store: Store, prefix: str) -> None:
    with pytest.raises(UsageError):
        await store.scan(prefix)


@pytest.mark.parametrize(
    "url", ["", "sqlite:", "etcd:", "redis:x", "/var/lib/fleet.db", "etcd:ftp://a", "etcd:http://"]
)
async def test_a_url_that_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        await open_store(url)
