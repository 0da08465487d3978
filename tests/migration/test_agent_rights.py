"""An agent that receives only, one that sends only, one that is only observed: real ones, with keys that allow just it.

And what an agent may do itself: no more than it needs, while what it restarts may do what it could before.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.linux import confinement, procfs
from migrator.protocol import fleet
from migrator.protocol import messages as m
from migrator.testing.hosts import Host
from migrator.testing.stage import AGENT_PORT, MIGRATOR, MigrateFailed, Stage
from migrator.testing.workloads import build
from transport.link import Link
from transport.ssh import connect

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

NAME, FLEET = "rightful", "f"
DENIED = "has no right"
ACTIONS = ("bring", "send away", "save", "look")
ALLOWED: dict[str, set[str]] = {
    "receive": {"bring"},
    "send": {"send away", "save"},
    "observe": {"look"},
    "": set(ACTIONS),
}


tokens = itertools.count(1)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage(tag="r") as made:
        yield made


def ask(stage: Stage, request: m.AnyMessage) -> m.AnyMessage:
    """What the agent of b answers host a's key."""

    async def talk() -> m.AnyMessage:
        link = await connect(
            f"root@{stage.b.address}:{AGENT_PORT}",
            identity=stage.a.folder / "client_key",
            known_hosts=stage.folder / "known_hosts",
            config=False,
        )
        async with link:
            return await _answer(link, request)

    with stage.a.inside():
        return asyncio.run(talk())


async def _answer(link: Link, request: m.AnyMessage) -> m.AnyMessage:
    await link.send(m.encode(request))
    while True:
        answer = m.decode(await link.receive(60))
        if not isinstance(answer, m.Hello | fleet.Departing):
            return answer


def reason(answer: m.AnyMessage) -> str:
    assert isinstance(answer, m.Failure | fleet.Departed), answer
    return answer.reason


def start(stage: Stage, host: Host) -> int:
    argv = [str(build("counter")), str(stage.folder / "out"), "5"]
    return int(host.run([*MIGRATOR, "run", "-d", "--name", NAME, "--bridge", "", "--", *argv]).stdout)


def attempt(stage: Stage, action: str) -> str:
    """Why the agent of b refuses it to host a's key; "" if it does it."""
    if action == "bring":
        start(stage, stage.a)
        where = stage.a
        try:
            stage.migrate(NAME, stage.a, stage.b)
            where = stage.b
        except MigrateFailed as error:
            return error.text
        finally:
            where.run([*MIGRATOR, "stop", NAME])
        return ""
    if action == "look":
        answer = ask(stage, fleet.Observe())
        return "" if isinstance(answer, fleet.Observed) else reason(answer)
    start(stage, stage.b)
    where = stage.b
    try:
        token = next(tokens)
        if action == "save":
            answer = ask(stage, fleet.Save(NAME, FLEET, token))
            return "" if isinstance(answer, fleet.Saved) else reason(answer)
        order = fleet.Depart(f"rights-{token:08d}", NAME, f"root@{stage.a.address}:{AGENT_PORT}", FLEET, token)
        answer = ask(stage, order)
        if isinstance(answer, fleet.Departed) and answer.outcome == "migrated":
            where = stage.a
            return ""
        return reason(answer)
    finally:
        where.run([*MIGRATOR, "stop", NAME])


@pytest.mark.parametrize("right", ALLOWED, ids=lambda right: right or "all")
def test_a_key_may_do_what_it_has_the_right_for_and_nothing_else(stage: Stage, right: str) -> None:
    keys = stage.b.folder / "authorized_keys"
    before = keys.read_text()
    if right:
        keys.write_text(f'migrator-rights="{right}" {before}')
    try:
        for action in ACTIONS:
            refused = attempt(stage, action)
            if action in ALLOWED[right]:
                assert refused == "", action
            else:
                assert DENIED in " ".join(refused.split()), (action, refused)
    finally:
        keys.write_text(before)


def test_an_agent_has_given_up_what_it_has_no_use_for_and_its_copies_have_not(stage: Stage) -> None:
    def capabilities(pid: int) -> dict[str, str]:
        status = procfs.status(pid)
        return {key: status[key] for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")}

    for host in (stage.a, stage.b):
        for task in Path(f"/proc/{stage.agent_pid(host)}/task").iterdir():
            effective = set(confinement.names(int(procfs.status(stage.agent_pid(host), int(task.name))["CapEff"], 16)))
            assert not effective & {f"cap_{name}" for name in confinement.UNUSED}
            assert "cap_sys_ptrace" in effective
    before = capabilities(start(stage, stage.a))
    try:
        copy = stage.migrate(NAME, stage.a, stage.b)["pid"]
        assert capabilities(copy) == before
    finally:
        stage.b.run([*MIGRATOR, "stop", NAME])
