"""The store in etcd: members that die, fall silent and come back, answers that are lost, clusters that are not ours."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import urllib.error
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from migrator.errors import UsageError
from migrator.fleet import etcd, gateway
from migrator.fleet.etcd import EtcdStore
from migrator.fleet.leadership import lead
from migrator.fleet.store import Compacted, Conflict, NotHeld, StoreCorrupt, StoreUnavailable, Write, open_store
from migrator.testing.etcd import EtcdCluster, ask


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster(tmp_path_factory.mktemp("etcd3"), members=3) as cluster:
        yield cluster


@pytest.fixture
def members(three: EtcdCluster) -> Iterator[EtcdCluster]:
    """Three members that run; whatever the test has killed runs again afterwards."""
    yield three
    three.repair()


@pytest.fixture
async def store(members: EtcdCluster, tmp_path: Path) -> AsyncIterator[EtcdStore]:
    store = await EtcdStore.open(f"{members.url.removeprefix('etcd:')}?prefix={tmp_path.name}")
    yield store
    await store.close()


async def count_to(store: EtcdStore, number: int) -> None:
    """Count by compare-and-put, as several would; every number exactly once."""
    entry = await store.get("counter")
    value, revision = (int(entry.value), entry.revision) if entry else (0, 0)
    while value < number:
        value += 1
        revision = await store.put("counter", b"%d" % value, expected=revision)


@pytest.mark.parametrize("victim", ["leader", "follower"])
@pytest.mark.parametrize("how", ["killed", "deaf"])
async def test_it_goes_on_without_one_member(members: EtcdCluster, store: EtcdStore, victim: str, how: str) -> None:
    await count_to(store, 5)
    member = members.leader() if victim == "leader" else (members.leader() + 1) % 3
    (members.kill if how == "killed" else members.stop)(member)
    await count_to(store, 15)
    members.repair()
    await count_to(store, 20)
    entry = await store.get("counter")
    assert entry is not None and entry.value == b"20"


async def test_a_member_that_comes_back_has_what_it_missed(members: EtcdCluster, store: EtcdStore) -> None:
    members.kill(0)
    await store.put("hosts/a", b"while it was away")
    members.repair()
    alone = await EtcdStore.open(f"{members.endpoints[0]}?prefix={store._prefix.strip('/')}")
    entry = await alone.get("hosts/a")
    assert entry is not None and entry.value == b"while it was away"
    await alone.close()


async def test_without_a_majority_nothing_is_written_or_read(
    members: EtcdCluster, store: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "WITHIN", 3.0)
    await store.put("hosts/a", b"before")
    members.kill(0)
    members.kill(1)
    for call in (store.get("hosts/a"), store.put("hosts/a", b"lost"), store.scan(""), store.grant(5.0)):
        with pytest.raises(StoreUnavailable) as caught:
            await call
        assert members.endpoints[0] in caught.value.hint
    monkeypatch.undo()
    members.repair()
    await store.put("hosts/a", b"after")
    entry = await store.get("hosts/a")
    assert entry is not None and entry.value == b"after"


async def test_a_cluster_that_was_restarted_has_everything_and_tokens_go_on(
    members: EtcdCluster, store: EtcdStore
) -> None:
    first = await store.acquire("leader", b"one", ttl=3600.0)
    assert first is not None
    await store.put("hosts/a", b"1", guard=first)
    for member in range(3):
        members.kill(member)
    members.repair()
    assert await store.get("hosts/a") is not None
    assert await store.acquire("leader", b"other", ttl=5.0) is None
    await store.release(first)
    second = await store.acquire("leader", b"other", ttl=5.0)
    assert second is not None and second.token > first.token


async def test_a_watch_goes_on_at_another_member_and_misses_nothing(members: EtcdCluster, store: EtcdStore) -> None:
    seen = await store.scan("")
    found: list[bytes | None] = []

    async def look() -> None:
        async for batch in store.watch("", after=seen.revision):
            found.extend(change.value for change in batch)
            if len(found) >= 12:
                return

    async with asyncio.timeout(60):
        looking = asyncio.create_task(look())
        for number in range(4):
            await store.put("a", b"%d" % number)
        await asyncio.sleep(0.5)
        members.kill(0)
        for number in range(4, 8):
            await store.put("a", b"%d" % number)
        members.repair()
        members.kill(1)
        for number in range(8, 12):
            await store.put("a", b"%d" % number)
        await looking
    assert found == [b"%d" % number for number in range(12)]


async def test_a_controller_leads_on_while_members_die_one_after_the_other(
    members: EtcdCluster, store: EtcdStore
) -> None:
    async with asyncio.timeout(90), lead(store, "leader", b"one", ttl=10.0) as lock:
        for member in range(3):
            members.kill(member)
            await store.put("a", b"%d" % member, guard=lock)
            members.repair()
        await store.put("a", b"last", guard=lock)


async def test_a_controller_whose_store_falls_silent_stops_leading_by_itself(
    members: EtcdCluster, store: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "WITHIN", 1.0)
    led = asyncio.Event()
    with pytest.raises(NotHeld):
        async with asyncio.timeout(30), lead(store, "leader", b"one", ttl=3.0):
            for member in range(3):
                members.stop(member)
            led.set()
            await asyncio.sleep(30)
    assert led.is_set()


class Lossy(httpx.AsyncBaseTransport):
    """Does what it is asked, and loses the answers of the transactions it is told to."""

    def __init__(self) -> None:
        self.inner = httpx.AsyncHTTPTransport()
        self.lose = 0
        self.lost: list[tuple[str, bytes]] = []
        self.meanwhile: Any = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = await self.inner.handle_async_request(request)
        if self.lose and request.url.path.endswith("/kv/txn") and b"compare" in request.content:
            self.lose -= 1
            await answer.aread()
            self.lost.append((str(request.url), request.content))
            if self.meanwhile is not None:
                await self.meanwhile()
            raise httpx.ReadTimeout("the answer is lost")
        return answer

    async def aclose(self) -> None:
        await self.inner.aclose()


@pytest.fixture
def lossy(store: EtcdStore) -> Lossy:
    transport = Lossy()
    store._gateway._client = httpx.AsyncClient(transport=transport)
    return transport


@pytest.mark.parametrize("expected", [0, None])
async def test_a_write_whose_answer_was_lost_is_known_to_be_ours(
    store: EtcdStore, lossy: Lossy, expected: int | None
) -> None:
    lossy.lose = 2
    revision = await store.put("claim", b"mine", expected=expected)
    entry = await store.get("claim")
    assert entry is not None and (entry.value, entry.revision) == (b"mine", revision)


async def test_a_lock_whose_answer_was_lost_is_held_with_the_right_token(store: EtcdStore, lossy: Lossy) -> None:
    lossy.lose = 1
    lock = await store.acquire("leader", b"one", ttl=10.0)
    assert lock is not None
    await store.put("a", b"1", guard=lock)


async def test_a_write_whose_answer_was_lost_and_that_another_replaced_is_never_called_undone(
    store: EtcdStore, lossy: Lossy, members: EtcdCluster
) -> None:
    other = await EtcdStore.open(f"{members.endpoints[1]}?prefix={store._prefix.strip('/')}")
    revision = await store.put("a", b"0")

    async def meanwhile() -> None:
        await other.put("a", b"other")

    lossy.lose, lossy.meanwhile = 1, meanwhile
    with pytest.raises(StoreUnavailable, match="not known"):
        await store.put("a", b"mine", expected=revision)
    await other.close()


async def test_a_request_that_arrives_again_much_later_changes_nothing(store: EtcdStore, lossy: Lossy) -> None:
    lossy.lose = 1
    await store.put("settings", b"old")
    await store.put("settings", b"new")
    ((url, body),) = lossy.lost
    async with httpx.AsyncClient() as client:
        assert (await client.post(url, content=body)).status_code == 200
    entry = await store.get("settings")
    assert entry is not None and entry.value == b"new"


async def test_a_deletion_whose_answer_was_lost_is_done(store: EtcdStore, lossy: Lossy) -> None:
    revision = await store.put("a", b"1")
    lossy.lose = 1
    await store.delete("a", expected=revision)
    assert await store.get("a") is None


async def test_a_conflict_without_any_loss_is_a_conflict(store: EtcdStore, lossy: Lossy) -> None:
    await store.put("a", b"1")
    with pytest.raises(Conflict):
        await store.apply([Write("b", b"1"), Write("a", b"2", 0)])
    assert await store.get("b") is None


async def test_a_scan_of_more_than_the_gateway_takes_at_once_is_whole(store: EtcdStore) -> None:
    for number in range(9):
        await store.put(f"big/{number}", bytes([number]) * 900_000)
    listing = await store.scan("big/")
    assert [entry.value[:1] for entry in listing.entries] == [bytes([number]) for number in range(9)]


async def test_a_scan_of_many_pages_is_of_one_revision(store: EtcdStore) -> None:
    store._page = 3
    for number in range(10):
        await store.put(f"k/{number}", b"1")
    listing = await store.scan("k/")
    assert [entry.key for entry in listing.entries] == [f"k/{number}" for number in range(10)]
    assert listing.revision == listing.entries[-1].revision


async def test_a_watch_of_what_was_compacted_says_so(members: EtcdCluster, store: EtcdStore) -> None:
    first = await store.put("a", b"0")
    members.compact(await store.put("a", b"1"))
    with pytest.raises(Compacted):
        async with asyncio.timeout(20):
            async for _ in store.watch("", after=first - 1):
                pass


async def test_what_another_program_wrote_there_is_an_error(members: EtcdCluster, store: EtcdStore) -> None:
    ask(members.endpoints[0], "kv/put", {"key": store._key("hosts/a"), "value": "Zm9v"})
    for reading in (store.get("hosts/a"), store.scan("hosts/")):
        with pytest.raises(StoreCorrupt, match="hosts/a"):
            await reading


async def test_members_of_two_clusters_are_not_one_store(
    members: EtcdCluster, etcd: EtcdCluster, tmp_path: Path
) -> None:
    where = f"{members.endpoints[0]},{etcd.endpoints[0]}?prefix={tmp_path.name}"
    for turn in itertools.count():
        store = await EtcdStore.open(where)
        await store.put(f"a{turn}", b"1")
        # A busy machine may have had it leave the first before that answered, though it did what it was told: then it
        # has begun with the other.
        if "kvs" not in ask(etcd.endpoints[0], "kv/range", {"key": store._key(f"a{turn}")}):
            break
        await store.close()
    members.stop(0)
    with pytest.raises(StoreCorrupt, match="another etcd cluster"):
        await store.get("a")
    await store.close()


async def test_a_server_that_is_no_etcd_is_said() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nnot found")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(StoreUnavailable, match="does not answer as etcd"):
            await open_store(f"etcd:http://127.0.0.1:{port}")


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class Odd(httpx.AsyncBaseTransport):
    """Answers as it is told to, and never as etcd would."""

    def __init__(self) -> None:
        self.body: Callable[[dict[str, Any]], Iterator[bytes]] = lambda _: iter([b"{}"])
        self.sent = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)

        async def parts() -> AsyncIterator[bytes]:
            for part in self.body(asked):
                self.sent += len(part)
                yield part

        return httpx.Response(200, content=parts())


@pytest.fixture
async def odd(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[EtcdStore, Odd]]:
    monkeypatch.setattr(gateway, "WITHIN", 0.3)
    transport = Odd()
    store = EtcdStore(gateway.Gateway(["http://127.0.0.1:1"]), "odd")
    store._gateway._client = httpx.AsyncClient(transport=transport)
    yield store, transport
    await store.close()


def entry(key: str, size: int = 1) -> dict[str, Any]:
    sealed = base64.b64encode(b"m1 0123456789abcdef\n" + b"x" * size).decode()
    return {"key": b64(key), "value": sealed, "mod_revision": "5"}


async def test_an_answer_without_end_is_cut(odd: tuple[EtcdStore, Odd]) -> None:
    store, transport = odd
    transport.body = lambda _: itertools.repeat(b"x" * (1 << 20))
    with pytest.raises(StoreUnavailable, match="more than 16 MiB"):
        await store.get("a")
    with pytest.raises(StoreUnavailable, match="more than 16 MiB"):
        await anext(store.watch("a/", after=1))
    assert transport.sent < 4 * gateway.MAX_ANSWER


@pytest.mark.parametrize("deep", [b'{"error":' + b"[" * 100_000, b'{"other":' + b'{"a":' * 100_000, b"\xff{"])
async def test_an_answer_that_is_none_is_said(odd: tuple[EtcdStore, Odd], deep: bytes) -> None:
    store, transport = odd
    transport.body = lambda _: iter([deep, b"\n"])
    with pytest.raises(StoreUnavailable, match="does not answer as etcd"):
        await store.get("a")
    with pytest.raises(StoreUnavailable, match="does not answer as etcd"):
        await anext(store.watch("a/", after=1))


@pytest.mark.parametrize("what", ["the same again", "from elsewhere", "ever more"])
async def test_a_listing_without_end_is_given_up(
    odd: tuple[EtcdStore, Odd], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd, "_MAX_SCAN", 1 << 16)
    store, transport = odd
    number = itertools.count()

    def page(_: dict[str, Any]) -> Iterator[bytes]:
        at = {"the same again": 1, "from elsewhere": 0, "ever more": next(number)}[what]
        key = f"/odd/{'hosts' if at or what == 'ever more' else 'other'}/h{at:09}"
        yield json.dumps({"kvs": [entry(key, 1000)], "more": True}).encode()

    transport.body = page
    with pytest.raises(StoreCorrupt, match="more than 0 MiB below" if what == "ever more" else "another question"):
        await store.scan("hosts/")
    assert transport.sent < 1 << 18


async def test_the_answer_to_another_question_is_not_taken(odd: tuple[EtcdStore, Odd]) -> None:
    store, transport = odd
    transport.body = lambda _: iter([json.dumps({"kvs": [entry("/odd/b")]}).encode()])
    with pytest.raises(StoreCorrupt, match="another question"):
        await store.get("a")
    transport.body = lambda _: iter([b'{"succeeded": false, "responses": []}'])
    with pytest.raises(StoreCorrupt, match="another question"):
        await store.put("a", b"1", expected=0)


async def test_nobody_there_is_said_with_the_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "WITHIN", 0.3)
    with pytest.raises(StoreUnavailable) as caught:
        await open_store("etcd:http://127.0.0.1:1,http://127.0.0.1:2")
    assert "127.0.0.1:2" in caught.value.hint


@pytest.mark.parametrize(
    "options", ["ca=/nonexistent", "cert=/nonexistent&key=/x", "colour=red", "prefix=", "prefix=a//b"]
)
async def test_options_that_make_no_sense_are_refused(options: str) -> None:
    with pytest.raises(UsageError):
        await open_store(f"etcd:https://127.0.0.1:1?{options}")


async def test_a_request_beyond_the_limits_of_etcd_is_refused_by_it(store: EtcdStore, members: EtcdCluster) -> None:
    with pytest.raises(urllib.error.HTTPError):
        ask(members.endpoints[0], "kv/put", {"key": store._key("a"), "value": "A" * (3 << 20)})
    assert await store.get("a") is None
