"""Which hosts are of the fleet: taking one in, and out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import msgspec

from migrator.errors import UsageError
from migrator.fleet import records as r
from migrator.fleet.agents import Agent
from migrator.fleet.observer import Observer
from migrator.fleet.state import FleetState
from migrator.fleet.store import DEFAULT_URL, Conflict, open_store
from migrator.host import Login
from transport.ssh import parse_target

AGENT_PORT = 7022


@dataclass(frozen=True)
class Fleet:
    """A fleet's state, and who looks at its hosts."""

    state: FleetState
    observer: Observer
    login: Login


@contextlib.asynccontextmanager
async def opened(url: str, login: Login, *, prometheus: str = "") -> AsyncIterator[Fleet]:
    """The fleet in the store at `url`, the default one if that is empty. `prometheus` as for an Observer."""
    store = await open_store(url or DEFAULT_URL)
    try:
        state = await FleetState.open(store)
        observer = Observer(state, login, prometheus=prometheus)
        try:
            yield Fleet(state, observer, login)
        finally:
            await observer.close()
    finally:
        await store.close()


async def join(fleet: Fleet, address: str, *, labels: Mapping[str, str], name: str = "") -> r.Host:
    """Take a host in, or replace what is known of it: HOST[:PORT] of its agent, which must answer. Without `labels` it
    keeps those that it has.

    Raises UsageError for one that calls itself otherwise, TransportError where the agent does not answer.
    """
    target = parse_target(address)
    made = r.Host(
        name="unknown",
        address=target.host,
        port=target.port or AGENT_PORT,
        cpus=1,
        memory_bytes=1,
        registered_at=time.time(),
    )
    agent = Agent(made, fleet.login)
    try:
        seen = (await agent.observe(fleet=fleet.state.fleet.id)).host
    finally:
        await agent.close()
    if name and seen.name != name:
        raise UsageError(f"the host at {address} calls itself {seen.name}, not {name}")
    others = {one.record.address: one.record for one in (await fleet.state.hosts.all()).values()}
    other = others.get(made.address)
    if other is not None and other.name != seen.name and other.port == made.port:
        raise UsageError(f"{address} is host {other.name} already", hint=f"migrator leave {other.name}")
    before = await fleet.state.hosts.get(seen.name)
    host = msgspec.structs.replace(
        made,
        name=seen.name,
        cpus=max(int(seen.cpus), 1),
        memory_bytes=max(seen.memory, 1),
        labels=dict(labels) or (before.record.labels if before is not None else {}),
        cpu_features=tuple(sorted(seen.cpu_features)),
        kernel=seen.kernel,
        engines=(seen.engine,) if seen.engine else (),
    )
    await fleet.state.register(host)
    return host


async def uncordon(state: FleetState, name: str, *, drained: bool = False) -> r.Cordon:
    """Let workloads come to a host again; what had kept them away, as it was last. A controller writes how a drain
    goes all the time, so what was changed meanwhile is read again.

    Raises UsageError if it is not cordoned, or, with `drained`, was not by a drain.
    """
    while True:
        stored = await state.cordons.get(name)
        if stored is None:
            raise UsageError(f"{name} is not cordoned", hint="`migrator hosts` shows the state of each")
        if drained and stored.record.drain is None:
            raise UsageError(f"{name} was not drained: there is nothing to bring back")
        try:
            await state.cordons.delete(name, expected=stored.revision)
        except Conflict:
            continue
        return stored.record


async def host_named(fleet: Fleet, name: str) -> r.Host:
    """Raises UsageError for one that is not of the fleet."""
    found = await fleet.state.hosts.get(name)
    if found is None:
        names = ", ".join(sorted(await fleet.state.hosts.all()))
        there = f"its hosts are {names}" if names else "it has no hosts yet"
        raise UsageError(f"host {name!r} is not of this fleet", hint=f"{there}; `migrator join` adds one")
    return found.record
