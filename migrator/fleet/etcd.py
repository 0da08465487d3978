"""The store in an etcd cluster, for a fleet with several controllers. `docs/fleet-state.md` says why so.

A request whose answer is lost may have been done, may be done later, or never. So every write names the revision
that it replaces, and carries a mark of its own: a late repetition changes nothing, and a write that finds its
mark there has been done.
"""

from __future__ import annotations

import asyncio
import base64
import math
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from itertools import groupby

from migrator.errors import UsageError
from migrator.fleet import gateway as g
from migrator.fleet.store import (
    MAX_KEY,
    Change,
    Compacted,
    Conflict,
    Entry,
    Lease,
    Listing,
    Lock,
    NotHeld,
    Store,
    StoreCorrupt,
    StoreUnavailable,
    Write,
    check_key,
    check_prefix,
    check_writes,
    now,
)

_SEAL = re.compile(rb"m1 ([0-9a-f]{16})\n")
_SEAL_BYTES = 20
_PAGE = 500  # entries
_MAX_SCAN = 512 << 20  # bytes of values; a fleet of 10,000 hosts has a tenth of that
_RECONNECT = 0.2  # seconds
_OTHER = "etcd answered another question than it was asked"


class EtcdStore(Store):
    """See `migrator.fleet.store.Store`. Keys are below a prefix of the cluster's own, `/migrator/` by default."""

    def __init__(self, gateway: g.Gateway, prefix: str) -> None:
        """Use `open`."""
        self._gateway = gateway
        self._prefix = f"/{prefix}/"
        self._page = _PAGE

    @classmethod
    async def open(cls, rest: str) -> EtcdStore:
        """`http://a:2379,http://b:2379?prefix=migrator&ca=FILE&cert=FILE&key=FILE`; asks the cluster once.

        Raises UsageError, StoreUnavailable, StoreCorrupt.
        """
        endpoints, verify, prefix = g.parse_url(rest)
        check_key(prefix)
        store = cls(g.Gateway(endpoints, verify), prefix)
        try:
            await store.get("fleet/id")
        except BaseException:
            await store.close()
            raise
        return store

    async def get(self, key: str) -> Entry | None:
        check_key(key)
        answer = await self._ask("kv/range", {"key": self._key(key)}, g.RangeAnswer)
        entries = [self._entry(found) for found in answer.kvs]
        if any(entry.key != key for entry in entries) or len(entries) > 1:
            raise StoreCorrupt(_OTHER)
        return entries[0] if entries else None

    async def scan(self, prefix: str) -> Listing:
        check_prefix(prefix)
        entries: list[Entry] = []
        at, size, last, request = 0, 0, "", self._range(prefix)
        while True:
            try:
                answer = await self._gateway.call(
                    "kv/range", {**request, "limit": self._page, "revision": at}, g.RangeAnswer
                )
            except g.GatewayError as error:
                if error.code == g.EXHAUSTED and self._page > 1:  # more bytes than the gateway takes at once
                    self._page = max(self._page // 4, 1)
                    continue
                raise _failed(error) from None
            at = at or answer.header.revision
            for entry in map(self._entry, answer.kvs):
                if not entry.key.startswith(prefix) or entry.key <= last:
                    raise StoreCorrupt(_OTHER)
                entries.append(entry)
                last, size = entry.key, size + len(entry.key) + len(entry.value)
            if size > _MAX_SCAN:
                raise StoreCorrupt(f"etcd has more than {_MAX_SCAN >> 20} MiB below {self._prefix}{prefix}")
            if not answer.more or not answer.kvs:
                return Listing(tuple(entries), at)
            request["key"] = _text(answer.kvs[-1].key + b"\0")

    async def apply(self, writes: Sequence[Write], *, guard: Lock | None = None) -> int:
        check_writes(writes)
        deadline = now() + g.WITHIN
        while True:
            certain = await self._with_revisions(writes)
            try:
                return await self._transact(certain, guard)
            except NotHeld:
                raise
            except Conflict:
                # Somebody wrote between our look and our write; whoever expects nothing does not mind.
                if all(write.expected is not None for write in writes) or now() > deadline:
                    raise
                if any(write.expected is not None for write in writes):
                    await self._check_expected(writes)

    async def watch(self, prefix: str, *, after: int) -> AsyncIterator[tuple[Change, ...]]:
        check_prefix(prefix)
        heard = now()
        while True:
            request: dict[str, object] = {"create_request": {**self._range(prefix), "start_revision": after + 1}}
            async for result in self._gateway.stream(request):
                heard = now()
                if result.compact_revision:
                    raise Compacted(f"the changes after revision {after} are not kept any more")
                if result.canceled:
                    break
                for revision, events in groupby(result.events, key=lambda event: event.kv.mod_revision):
                    yield tuple(sorted((self._change(event) for event in events), key=lambda change: change.key))
                    after = revision
            if now() - heard > g.WITHIN + g.SILENCE:
                raise StoreUnavailable("etcd sends no changes", hint=f"are most of {self._gateway.names} up?")
            await asyncio.sleep(_RECONNECT)

    async def grant(self, ttl: float) -> Lease:
        if not 0 < ttl <= 86400:
            raise UsageError(f"a lease lasts up to a day, not {ttl} s")
        asked = now()
        answer = await self._ask("lease/grant", {"TTL": math.ceil(ttl)}, g.LeaseAnswer)
        if not answer.id or not answer.ttl:
            raise StoreCorrupt("etcd granted a lease without an id")
        return Lease(answer.id, float(answer.ttl), asked)

    async def renew(self, lease: Lease) -> None:
        answer = await self._ask("lease/keepalive", {"ID": lease.id}, g.KeepAliveAnswer)
        if answer.result.ttl <= 0:
            raise NotHeld("the lease has ended")

    async def revoke(self, lease: Lease) -> None:
        try:
            await self._ask("lease/revoke", {"ID": lease.id}, g.LeaseAnswer)
        except NotHeld:
            pass

    async def close(self) -> None:
        await self._gateway.close()

    async def _with_revisions(self, writes: Sequence[Write]) -> list[Write]:
        """The writes, each with the revision that it replaces."""
        if all(write.expected is not None for write in writes):
            return list(writes)
        there = await self._revisions([write.key for write in writes])
        return [replace(write, expected=there[write.key]) if write.expected is None else write for write in writes]

    async def _check_expected(self, writes: Sequence[Write]) -> None:
        there = await self._revisions([write.key for write in writes])
        for write in writes:
            if write.expected not in (None, there[write.key]):
                raise Conflict(f"{write.key} has revision {there[write.key]}, not {write.expected}")

    async def _revisions(self, keys: Sequence[str]) -> dict[str, int]:
        request: dict[str, object] = {
            "success": [{"request_range": {"key": self._key(key), "keys_only": True}} for key in keys]
        }
        return self._seen(keys, await self._ask("kv/txn", request, g.TransactionAnswer))

    async def _transact(self, writes: list[Write], guard: Lock | None) -> int:
        """One transaction, all revisions given. Repeated where the answer was lost, which then shows by the mark."""
        mark = secrets.token_hex(8).encode()
        expected = {write.key: write.expected or 0 for write in writes}
        if guard is not None:
            expected[guard.key] = guard.token
        keys = list(expected)
        request: dict[str, object] = {
            "compare": [
                {"key": self._key(key), "target": "MOD", "result": "EQUAL", "mod_revision": revision}
                for key, revision in expected.items()
            ],
            "success": [self._operation(write, mark) for write in writes],
            "failure": [{"request_range": {"key": self._key(key)}} for key in keys],
        }
        doubts: list[bool] = []
        answer = await self._ask("kv/txn", request, g.TransactionAnswer, doubts)
        if answer.succeeded:
            return answer.header.revision
        if doubts:
            return self._done_before(writes, mark, keys, answer)
        there = self._seen(keys, answer)
        if guard is not None and there[guard.key] != guard.token:
            raise NotHeld(f"the lock {guard.name!r} is not ours any more (token {guard.token})")
        key = next(key for key in keys if there[key] != expected[key])
        raise Conflict(f"{key} has revision {there[key]}, not {expected[key]}")

    def _done_before(self, writes: list[Write], mark: bytes, keys: list[str], answer: g.TransactionAnswer) -> int:
        """The revision of a transaction whose first answer was lost, if it can be told that it was done."""
        self._seen(keys, answer)  # as many as were asked for
        found = dict(zip(keys, (response.response_range for response in answer.responses), strict=True))
        puts = [write for write in writes if write.value is not None]
        for write in puts:
            there = found[write.key]
            if there is not None and there.kvs and there.kvs[0].value.startswith(b"m1 " + mark):
                return there.kvs[0].mod_revision
        if not puts and not any(
            there.kvs for key, there in found.items() if there is not None and key in _keys(writes)
        ):
            return answer.header.revision  # all are gone, as was asked
        raise StoreUnavailable(
            f"whether {writes[0].key} was written is not known: the answer was lost, and others have written since"
        )

    def _operation(self, write: Write, mark: bytes) -> dict[str, object]:
        if write.value is None:
            return {"request_delete_range": {"key": self._key(write.key)}}
        put: dict[str, object] = {"key": self._key(write.key), "value": _text(b"m1 " + mark + b"\n" + write.value)}
        if write.lease is not None:
            put["lease"] = write.lease.id
        return {"request_put": put}

    def _seen(self, keys: Sequence[str], answer: g.TransactionAnswer) -> dict[str, int]:
        """The revisions that a transaction's ranges have found, 0 for a key that is not there."""
        ranges = [response.response_range for response in answer.responses]
        if len(ranges) != len(keys):
            raise StoreCorrupt(_OTHER)
        return {
            key: found.kvs[0].mod_revision if found is not None and found.kvs else 0
            for key, found in zip(keys, ranges, strict=True)
        }

    async def _ask(
        self, path: str, request: dict[str, object], kind: type[g.A], doubts: list[bool] | None = None
    ) -> g.A:
        try:
            return await self._gateway.call(
                path, request, kind, on_doubt=lambda: doubts.append(True) if doubts is not None else None
            )
        except g.GatewayError as error:
            raise _failed(error) from None

    def _key(self, key: str) -> str:
        return _text((self._prefix + key).encode())

    def _range(self, prefix: str) -> dict[str, object]:
        """Everything below: a prefix ends in a slash, and what follows that in ASCII is the digit 0."""
        start = (self._prefix + prefix).encode()
        return {"key": _text(start), "range_end": _text(start[:-1] + b"0")}

    def _entry(self, found: g.KeyValue) -> Entry:
        key = self._plain(found.key)
        if not _SEAL.match(found.value):
            raise StoreCorrupt(
                f"{key} in etcd was not written by this program",
                hint=f"delete it, or use another prefix than {self._prefix}",
            )
        return Entry(key, found.value[_SEAL_BYTES:], found.mod_revision)

    def _change(self, event: g.Event) -> Change:
        if event.type == "DELETE":
            return Change(self._plain(event.kv.key), None, event.kv.mod_revision)
        entry = self._entry(event.kv)
        return Change(entry.key, entry.value, entry.revision)

    def _plain(self, key: bytes) -> str:
        try:
            plain = key.decode("ascii").removeprefix(self._prefix)
            check_key(plain)
        except (UnicodeDecodeError, UsageError):
            raise StoreCorrupt(
                f"the key {key[:MAX_KEY]!r} in etcd is not ours", hint=f"use another prefix than {self._prefix}"
            ) from None
        return plain


def _keys(writes: list[Write]) -> set[str]:
    return {write.key for write in writes}


def _failed(error: g.GatewayError) -> Exception:
    if error.code == g.OUT_OF_RANGE:
        return StoreUnavailable(f"etcd has compacted what was being read: {error}", hint="try again")
    if error.code == g.INVALID:
        return UsageError(f"etcd does not take this: {error}", hint="are its request limits below the defaults?")
    return StoreUnavailable(f"etcd failed: {error}")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
