"""An agent, as a controller talks to it.

    agent = Agent(host, login)
    seen = await agent.observe()
    async for now in agent.depart(order): ...

Observing keeps one link; each order has a link of its own, so that none waits for another.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import pairwise

from migrator.errors import MigratorError, TransportError
from migrator.fleet import records as r
from migrator.host import Login
from migrator.protocol import fleet as f
from migrator.protocol import messages as m
from transport.link import Link

_ANSWER_WITHIN = 15.0  # seconds
_MOST = 100  # messages of one answer: a hundred thousand workloads


@dataclass(frozen=True, slots=True)
class Observation:
    """What an agent said, and when it was heard here (seconds since 1970, and `time.monotonic()`)."""

    host: f.HostReport
    workloads: tuple[f.WorkloadReport, ...]
    heard_at: float
    heard: float


class Agent:
    """One host of a fleet. Every call raises TransportError where it cannot be reached or refuses."""

    def __init__(self, host: r.Host, login: Login) -> None:
        self.host = host
        self._login = login
        self._link: Link | None = None
        self._one_at_a_time = asyncio.Lock()

    @property
    def peer(self) -> str:
        """How its agent is reached, also by other hosts."""
        return peer_of(self.host)

    async def observe(self, *, fleet: str = "", token: int = 0, rate: float = 0.0) -> Observation:
        """What is there now. With `token`, lower ones are refused there from now on."""
        async with self._one_at_a_time:
            try:
                async with asyncio.timeout(_ANSWER_WITHIN + 2 * rate):
                    if self._link is None:
                        self._link = await self._connect()
                    return await self._observe(self._link, f.Observe(fleet, token, "", rate))
            except TimeoutError:
                await self._drop()
                raise TransportError(f"{self.host.name} does not answer within {_ANSWER_WITHIN:g} s") from None
            except BaseException:
                await self._drop()
                raise

    async def _observe(self, link: Link, request: f.Observe) -> Observation:
        workloads: list[f.WorkloadReport] = []
        for _ in range(_MOST):
            await link.send(m.encode(request))
            answer = await self._receive(link)
            if not isinstance(answer, f.Observed):
                raise m.MessageError(f"{self.host.name}: a {type(answer).__name__} is no answer to a question")
            names = [request.after, *(one.name for one in answer.workloads)]
            if any(one >= other for one, other in pairwise(names)) or (answer.more and not answer.workloads):
                raise m.MessageError(f"{self.host.name}: its list of workloads is in no order")
            workloads += answer.workloads
            if not answer.more:
                return Observation(answer.host, tuple(workloads), time.time(), time.monotonic())
            request = f.Observe(request.fleet, request.token, names[-1], 0.0)
        raise m.MessageError(f"{self.host.name}: its list of workloads does not end")

    async def depart(self, order: f.Depart) -> AsyncIterator[f.Departing | f.Departed]:
        """Have a container sent away: how it goes, and at last what came of it."""
        async for answer in self._asked(order):
            yield answer

    async def watch(self, migration: str) -> AsyncIterator[f.Departing | f.Departed]:
        """As `depart`, of one that was asked for before."""
        async for answer in self._asked(f.WatchDeparture(migration)):
            yield answer

    async def _asked(self, request: f.Depart | f.WatchDeparture) -> AsyncIterator[f.Departing | f.Departed]:
        link = await self._connect()
        try:
            await link.send(m.encode(request))
            while True:
                answer = await self._receive(link)
                if not isinstance(answer, f.Departing | f.Departed) or answer.migration != request.migration:
                    raise m.MessageError(f"{self.host.name}: a {type(answer).__name__} was not expected")
                yield answer
                if isinstance(answer, f.Departed):
                    return
        finally:
            await link.close()

    async def ask(self, request: f.Save | f.Images | f.Revive, *, within: float = 600.0) -> f.Answer:
        """One question, one answer."""
        link = await self._connect()
        try:
            async with asyncio.timeout(within):
                await link.send(m.encode(request))
                answer = await self._receive(link)
        except TimeoutError:
            raise TransportError(f"{self.host.name} has not answered within {within:g} s") from None
        finally:
            await link.close()
        if not isinstance(answer, f.Answer):
            raise m.MessageError(f"{self.host.name}: a {type(answer).__name__} was not expected")
        return answer

    async def close(self) -> None:
        await self._drop()

    async def _connect(self) -> Link:
        link = await self._login.connect(self.peer)
        try:
            await link.send(m.encode(m.Hello([m.VERSION], "migrator", "controller")))
            while not isinstance(hello := await self._receive(link), m.Hello):
                pass
            m.common_version(hello.versions)
        except BaseException:
            await link.close()
            raise
        return link

    async def _receive(self, link: Link) -> m.AnyMessage:
        message = m.decode(await link.receive())
        if isinstance(message, m.Failure):
            raise TransportError(f"{self.host.name}: {message.reason}", hint=message.hint)
        return message

    async def _drop(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            with contextlib.suppress(MigratorError, OSError):
                await link.close()


def peer_of(host: r.Host) -> str:
    address = f"[{host.address}]" if ":" in host.address else host.address
    return f"{address}:{host.port}"
