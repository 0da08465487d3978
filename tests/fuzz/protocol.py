"""Hostile peers of an agent: messages out of order, wrong, repeated, cut off; and bytes below the messages.

Each sequence is one link. The agent's side is `session.serve` with an engine that only pretends; after each the
link is cut, `serve` must have returned without raising anything, and the workload must not have run unless this very
sequence had it committed.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import msgspec

from migrator.errors import MigratorError
from migrator.protocol import facts
from migrator.protocol import messages as m
from migrator.recovery.hooks import Tools
from migrator.session.serve import serve
from migrator.session.settings import DestinationSettings, Prepared
from migrator.testing.fakeengine import TRAILER, FakeDestination, FakeWorld, Script
from tests.fuzz.counts import Counts
from tests.fuzz.mutation import WIDE
from transport.link import Link
from transport.wire import link_pair

AT_A_TIME = 16
ENDS_WITHIN = 30.0  # seconds after its link was cut
_HOST = m.HostFacts("a", "6.18", "x86_64", "v", "m", frozenset(), 2696, "fake")
_TEXTS = ("", "/", "..", "\0", "\x1b[2J", "a" * 5000, "\u202e", "/proc/kmsg", "/dev/zero", "/etc/passwd")
_SURVEY = facts.Survey([1], 1, 1 << 20, [], frozenset(), 2696, "wp-async", 0, [])


def fuzz(seconds: float, seed: int) -> Counts:
    """Play hostile sequences for a while."""
    logging.disable(logging.CRITICAL)
    sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
    every: list[Any] = importlib.import_module("test_protocol_messages").EVERY
    counts, end = Counts(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        while time.monotonic() < end:
            asyncio.run(_batch(range(seed, seed + AT_A_TIME), every, Path(folder), counts))
            seed += AT_A_TIME
    logging.disable(logging.NOTSET)
    return counts


async def _batch(seeds: range, every: list[Any], folder: Path, counts: Counts) -> None:
    await asyncio.gather(*(_sequence(seed, every, folder, counts) for seed in seeds))
    await asyncio.sleep(0.1)
    for task in asyncio.all_tasks():
        if task is not asyncio.current_task():
            counts.found.append(f"protocol {seeds}: {task!r} is left")


async def _sequence(seed: int, every: list[Any], folder: Path, counts: Counts) -> None:
    rng = random.Random(seed)
    here = folder / str(seed)
    (here / "world").mkdir(parents=True)
    world, migration = FakeWorld(here / "world"), f"fuzz-{seed:08d}"
    settings = DestinationSettings(
        host=msgspec.structs.replace(_HOST, host="b"),
        prepare=lambda proposal: Prepared(lambda fd: FakeDestination(world, fd, Script()), "fake"),
        journal=here / "journal",
        tools=Tools(world.groups("destination")),
    )
    peer, ours = await link_pair()
    server = asyncio.create_task(serve(ours, settings))
    sent: list[str] = []
    try:
        await _play(rng, peer, migration, every, sent)
    except MigratorError:
        pass  # it has ended the link, as it may
    await peer.close()
    about = f"protocol {seed} ({', '.join(sent)})"
    try:
        async with asyncio.timeout(ENDS_WITHIN):
            await server
        counts.note(world.state("destination").split()[0])
    except TimeoutError:
        counts.found.append(f"{about}: still served {ENDS_WITHIN} s after its end")
    except Exception:
        counts.found.append(f"{about}: {traceback.format_exc()}")
    await ours.close()
    if "run" in world.state("destination") and "Commit" not in sent and "Ask" not in sent:
        counts.found.append(f"{about}: it runs, and nobody has committed it")


async def _play(rng: random.Random, peer: Link, migration: str, every: list[Any], sent: list[str]) -> None:
    """An honest beginning of some length, with hostile messages between and after it."""
    honest: list[Any] = [
        m.Hello([m.VERSION], "migrator", "a"),
        m.Propose(migration, _HOST, _SURVEY, copy_files=rng.random() < 0.2),
        m.Begin(migration),
        None,  # the stream
        m.Commit(migration),
        m.Done(migration),
    ]
    for step in honest[: rng.randrange(len(honest) + 1)]:
        while rng.random() < 0.25:
            await _hostile(rng, peer, migration, every, sent)
        await _say(peer, step, sent)
        if rng.random() < 0.9:
            await _hear(peer, 0.05)
    for _ in range(rng.randrange(6)):
        await _hostile(rng, peer, migration, every, sent)
    await _hear(peer, 0.01)


async def _say(peer: Link, step: Any, sent: list[str]) -> None:
    if step is not None:
        sent.append(type(step).__name__)
        await peer.send(m.encode(step))
        return
    sent.append("stream")
    read, write = os.pipe()
    os.write(write, bytes(4096) + TRAILER)
    os.close(write)
    await peer.pump_in(read)


async def _hear(peer: Link, seconds: float) -> None:
    try:
        while True:
            await peer.receive(seconds)
    except MigratorError:
        peer_ended = not peer.alive
        if peer_ended:
            raise


async def _hostile(rng: random.Random, peer: Link, migration: str, every: list[Any], sent: list[str]) -> None:
    way = rng.random()
    if way < 0.03:
        sent.append("packets")
        await peer.send_packets([rng.randbytes(rng.choice((0, 14, 60, 1500))) for _ in range(rng.randrange(5))])
        return
    if way < 0.06:
        await _say(peer, None, sent)
        return
    message = rng.choice(every)
    plain = msgspec.to_builtins(message, builtin_types=(bytes,))
    if "migration" in plain and rng.random() < 0.8:
        plain["migration"] = migration
    if way < 0.3:
        sent.append(type(message).__name__)
        await peer.send(msgspec.msgpack.encode(plain))
        return
    for _ in range(rng.choice((1, 1, 2, 4))):
        _spoil(rng, plain)
    raw = bytearray(msgspec.msgpack.encode(plain))
    if way > 0.95:
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    data = bytes(raw[: 1 << 20])
    sent.append(type(message).__name__ if _is_valid(data) else f"spoilt {type(message).__name__}")
    await peer.send(data)


def _is_valid(data: bytes) -> bool:
    """Whether it is a message all the same: not every change spoils one."""
    try:
        m.decode(data)
    except MigratorError:
        return False
    return True


def _spoil(rng: random.Random, plain: Any) -> None:
    """Change one value, somewhere in it."""
    keys: list[Any] = list(plain) if isinstance(plain, dict) else list(range(len(plain)))
    if not keys:
        return
    key = rng.choice(keys)
    value = plain[key]
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        _spoil(rng, value)
        return
    if key == "type":
        return
    plain[key] = rng.choice(
        (_number(rng), rng.choice(_TEXTS), rng.choice(_TEXTS).encode(), None, [], {}, [value] * 3, value, True)
    )


def _number(rng: random.Random) -> float:
    return rng.choice((*(n for n in WIDE), -1, -(1 << 31), -(1 << 63), 0.5, float("nan"), float("inf"), -1e308))
