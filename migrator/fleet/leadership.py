"""Keeping a lease alive, and leading as long as a lock is held.

    async with lead(store, "leader", b"controller-1", ttl=10.0) as lock:
        ...                       # cancelled, and NotHeld raised, when the lock is or may be lost

The holder gives up before the store does: its time is counted from before the last renewal was asked for, the
store's from when it was answered.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from migrator.fleet.store import Lease, Lock, NotHeld, Store, StoreUnavailable, now

_RETRY = 0.5  # seconds between attempts to take a lock that another has


async def keep(store: Store, lease: Lease) -> None:
    """Renew the lease for ever. Raises NotHeld once it has ended, or may have because no renewal came through."""
    alive_until = lease.asked_at + lease.ttl
    pause = lease.ttl / 3
    while True:
        await asyncio.sleep(max(min(pause, alive_until - now()), 0))
        asked = now()
        try:
            async with asyncio.timeout(max(alive_until - asked, 0)):
                await store.renew(lease)
            alive_until, pause = asked + lease.ttl, lease.ttl / 3
        except (StoreUnavailable, TimeoutError):
            pause = lease.ttl / 20
            if now() >= alive_until:
                raise NotHeld(f"the lease could not be renewed for {lease.ttl:g} s") from None


async def wait_to_acquire(store: Store, name: str, owner: bytes, *, ttl: float) -> Lock:
    """Take a lock, however long another has it."""
    while True:
        if await store.holder(name) is None and (lock := await store.acquire(name, owner, ttl=ttl)):
            return lock
        await asyncio.sleep(_RETRY)


@contextlib.asynccontextmanager
async def lead(store: Store, name: str, owner: bytes, *, ttl: float = 10.0) -> AsyncIterator[Lock]:
    """Wait for the lock, hold it for the block, and give it up. Raises NotHeld, after the block was cancelled,
    when it was lost on the way."""
    lock = await wait_to_acquire(store, name, owner, ttl=ttl)
    try:
        async with asyncio.TaskGroup() as group:
            keeper = group.create_task(keep(store, lock.lease))
            yield lock
            keeper.cancel()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        await store.release(lock)
