"""What hostile peers have tried (tests/fuzz/protocol.py) and must not come to again."""

from __future__ import annotations

import asyncio
import itertools
import os
from pathlib import Path

from test_session_migration import Hosts, facts

from migrator.protocol import facts as wire
from migrator.protocol import messages as m
from migrator.protocol.machine import Machine
from migrator.protocol.states import DestinationState, destination_step
from migrator.session.driver import Driver
from migrator.session.serve import serve
from migrator.testing.fakeengine import TRAILER, FakeWorld
from transport.wire import link_pair

ID = "hostile-0001"
SURVEY = wire.Survey([1], 1, 1 << 20, [], frozenset(), 2696, "wp-async", 0, [])


async def test_a_peer_that_breaks_the_protocol_once_the_copy_runs_ends_its_session(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    hosts = Hosts(tmp_path, FakeWorld(tmp_path / "world"))
    peer, ours = await link_pair()
    server = asyncio.create_task(serve(ours, hosts.taking()))

    async def until(kind: type[m.AnyMessage]) -> None:
        while not isinstance(m.decode(await peer.receive(20)), kind):
            pass

    await peer.send(m.encode(m.Propose(ID, facts("a"), SURVEY)))
    await until(m.Verdict)
    await peer.send(m.encode(m.Begin(ID)))
    await peer.pump_in(_stream())
    await until(m.Ready)
    await peer.send(m.encode(m.Commit(ID)))
    await until(m.DestinationReport)
    await peer.send(b"nothing of this protocol")
    await asyncio.wait_for(server, 20)
    assert hosts.world.state("destination") == "run", "the copy that was committed is not touched"
    await peer.close()
    await ours.close()


def _stream() -> int:
    read, write = os.pipe()
    os.write(write, bytes(100) + TRAILER)
    os.close(write)
    return read


async def test_what_begins_while_a_session_ends_is_ended_too() -> None:
    before = asyncio.all_tasks()

    async def act(_: object) -> None: ...

    driver = Driver(
        Machine(destination_step, DestinationState.START), "x", act=act, failed=lambda _: None, tolerated=frozenset()
    )
    spawned = itertools.count()

    async def hesitant() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            driver.after(1000, lambda: None)
            next(spawned)

    driver.begin(hesitant(), "hesitant")
    driver.spawn(hesitant())
    await asyncio.sleep(0)
    await driver.close()
    assert next(spawned) == 2
    assert asyncio.all_tasks() == before
