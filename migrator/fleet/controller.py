"""The controller: observe, plan, act, and check what came of it; as long as it leads.

    await Controller(fleet, name="controller-1").run()

Any number may run on one store: one leads, the others wait. What must not be forgotten is in the store before it is
acted upon, so whoever leads next goes on. Where the store or the agents cannot be reached it waits, and moves nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

import msgspec

from migrator.errors import MigratorError
from migrator.fleet import records as r
from migrator.fleet.cluster import Seen
from migrator.fleet.drains import Drains
from migrator.fleet.leadership import lead
from migrator.fleet.membership import Fleet
from migrator.fleet.mover import Mover
from migrator.fleet.observer import Observer
from migrator.fleet.plans import Plans, imbalance_of, same_moves, sent_by_balance
from migrator.fleet.recoveries import Fencing, Recoveries
from migrator.fleet.snapshots import Snapshots
from migrator.fleet.state import FleetState, Stored
from migrator.fleet.store import Compacted, Lease, Lock, NotHeld, StoreUnavailable
from migrator.runtime.service import notify
from policies.balance import HOLD, Hold, balance, credit_left
from policies.consistency import ClusterError

log = logging.getLogger("migrator.controller")

LEADER = "leader"
LEAD_TTL = 10.0  # seconds until another may lead after a leader's death
_BUSY_EVERY = 1.0  # seconds between two rounds while something is under way
_LEAST = 0.3  # and at least, whatever wakes us
_BEAT_EVERY = 10.0
_ALIVE_TTL = 40.0
_RATE_EVERY = 300.0  # seconds between two measurements of dirty rates
_RATE_SECONDS = 0.3
_WAKES = ("cordons/", "plans/", "settings/", "hosts/", "rules/", "schedules/")

# Told after each round: the controller, what was seen.
OnRound = Callable[["Controller", Seen], None]


class Controller:
    """`balances`: whether it balances by itself, as the settings say; else it only does what others have asked for.

    fencing:  how lost hosts are turned off, so that what ran there is restarted; None: nothing is restarted by itself
    finished: is told of each move that has ended
    deposed:  is told when it does not lead any more
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        name: str,
        balances: bool = True,
        ttl: float = LEAD_TTL,
        fencing: Fencing | None = None,
        on_round: OnRound | None = None,
        finished: Callable[[r.FinishedMove], None] = lambda _: None,
        deposed: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.state: FleetState = fleet.state
        self.observer: Observer = fleet.observer
        self.lock: Lock | None = None
        self.mover: Mover | None = None
        self.imbalance = 0.0
        self._balances = balances
        self._ttl = ttl
        self._fencing = fencing
        self._on_round = on_round
        self._told = finished
        self._deposed = deposed
        self._leases: dict[str, tuple[Lease, float]] = {}
        self._hold: Hold = HOLD
        self._balanced_at = float("-inf")
        self._rated_at = float("-inf")
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """For ever. Raises StoreCorrupt."""
        while True:
            try:
                notify(f"STATUS={self.name} waits to lead")
                async with lead(self.state.store, LEADER, self.name.encode(), ttl=self._ttl) as lock:
                    log.info("%s leads, with token %d", self.name, lock.token)
                    await self._lead(lock)
            except NotHeld as error:
                log.warning("%s leads no more: %s", self.name, error)
            except (StoreUnavailable, Compacted) as error:
                log.warning("the store cannot be used, so nothing is moved: %s", error)
                await asyncio.sleep(_BUSY_EVERY)
            finally:
                self.lock = self.mover = None
                self._deposed()

    async def _lead(self, lock: Lock) -> None:
        self.lock, self._hold, self._leases = lock, HOLD, {}
        self.observer.read_history_again()
        ends: list[Callable[[r.FinishedMove], None]] = [self._told]

        def finished(one: r.FinishedMove) -> None:
            for end in ends:
                end(one)

        mover = self.mover = Mover(self.state, self.observer, lock, finished)
        drains, plans = Drains(self.state, self.observer, mover, lock), Plans(self.state, mover, lock)
        snapshots = Snapshots(self.state, self.observer, mover, lock)
        recoveries = Recoveries(self.state, self.observer, lock, self._fencing) if self._fencing is not None else None
        ends += [drains.finished, plans.finished, lambda _: self._wake.set()]
        waker = asyncio.create_task(self._wait_for_changes())
        try:
            while True:
                self._wake.clear()
                began = time.monotonic()
                busy = await self._round(lock, mover, drains, plans)
                due = await snapshots.step(self.observer.seen.cluster)
                if recoveries is not None:
                    due = min(due, await recoveries.step(self.observer.seen.cluster))
                interval = _BUSY_EVERY if busy else min((await self.state.settings()).interval, due)
                await self._rest(began, interval)
        finally:
            waker.cancel()
            await asyncio.gather(waker, return_exceptions=True)
            await drains.close()
            await snapshots.close()
            if recoveries is not None:
                await recoveries.close()
            await mover.close()

    async def _rest(self, began: float, interval: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(began + interval - time.monotonic(), 0.0)):
                await self._wake.wait()
        await asyncio.sleep(max(began + _LEAST - time.monotonic(), 0.0))

    async def _round(self, lock: Lock, mover: Mover, drains: Drains, plans: Plans) -> bool:
        """One look, and what follows from it; whether something is under way."""
        measure = not mover.busy and time.monotonic() - self._rated_at > _RATE_EVERY
        if measure:
            self._rated_at = time.monotonic()
            await self.state.trim_history()
        seen = await self.observer.look(token=lock.token, rate=_RATE_SECONDS if measure else 0.0)
        await self._beat()
        for stored in (await self.state.moves.all()).values():
            mover.adopt(stored)
        try:
            self.imbalance = imbalance_of(seen.cluster)
            busy = await drains.step(seen.cluster)
            # What was under way before the look may have ended since, and what the drains have just begun was not yet.
            moves = {**self.observer.known.moves, **_records(await self.state.moves.all())}
            busy = await plans.step(seen.cluster, moves) or busy
            if self._balances and not busy and not mover.busy:
                await self._balance(seen, plans)
        except ClusterError as error:
            log.warning("nothing is planned: %s", error)
            busy = False
        notify(f"STATUS={self.name} leads {len(seen.cluster.hosts)} hosts, imbalance {self.imbalance:.3f}")
        if self._on_round is not None:
            self._on_round(self, seen)
        return busy or bool(mover.busy)

    async def _balance(self, seen: Seen, plans: Plans) -> None:
        settings = await self.state.settings()
        if settings.mode is r.Mode.OFF or time.monotonic() - self._balanced_at < settings.interval:
            return
        self._balanced_at = time.monotonic()
        if settings.balance.bytes_per_hour is not None:
            # What was really sent, by whoever led.
            sent = sent_by_balance(one.record for one in (await self.state.history.all()).values())
            credit = credit_left(sent, seen.cluster.time, settings.balance)
            self._hold = msgspec.structs.replace(self._hold, at=seen.cluster.time, credit=credit)
        made, hold = balance(seen.cluster, self._hold, settings.balance)
        self._hold = hold
        if not made.moves:
            return
        if settings.mode is r.Mode.AUTOMATIC:
            await plans.propose(made, by=self.name, state=r.PlanState.APPROVED)
            self._wake.set()
            return
        for stored in (await self.state.plans.all()).values():
            if stored.record.state is r.PlanState.PROPOSED and same_moves(stored.record.plan, made):
                return
        await plans.propose(made, by=self.name, state=r.PlanState.PROPOSED)
        log.info("plan %s is proposed: %d moves; `migrator balance --apply %s`", made.id, len(made.moves), made.id)

    async def _beat(self) -> None:
        """Say which hosts live: for each a key that vanishes if nobody says so any more."""
        now = time.monotonic()
        for name, seen in self.observer.observations.items():
            lease, at = self._leases.get(name, (None, float("-inf")))
            if name in self.observer.errors or now - at < _BEAT_EVERY:
                continue
            try:
                if lease is None:
                    raise NotHeld("none yet")
                await self.state.store.renew(lease)
            except NotHeld:
                lease = await self.state.store.grant(_ALIVE_TTL)
                await self.state.beat(r.Alive(host=name, boot_id=seen.host.boot_id, at=seen.heard_at), lease)
            self._leases[name] = (lease, now)

    async def _wait_for_changes(self) -> None:
        """Wake up when somebody asks for something."""
        while True:
            try:
                after = (await self.state.store.scan("plans/")).revision
                async for changes in self.state.store.watch("", after=after):
                    if any(change.key.startswith(_WAKES) for change in changes):
                        self._wake.set()
            except MigratorError as error:
                log.debug("watching the store: %s", error)
                await asyncio.sleep(_BUSY_EVERY)


def _records(stored: dict[str, Stored[r.Move]]) -> dict[str, r.Move]:
    return {name: one.record for name, one in stored.items()}
