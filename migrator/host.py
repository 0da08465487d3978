"""This host as a session sees it: its engine, its containers, its journals.

The one place where sessions, engines, containers and transport are put together; the agent and the command
line both stand on it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from migrator import container
from migrator.container import connection_filter, rtnetlink, state, switchover
from migrator.container.sandbox import SandboxMaker, take_down
from migrator.container.spec import ContainerSpec
from migrator.engine.base import Destination, DestinationOptions, Engine, LateLock
from migrator.engine.select import Choice, select, select_like
from migrator.errors import MigratorError, Refused, UsageError
from migrator.fleet.fencing import Fence, fence_directory
from migrator.linux import confinement, message_ledger, procfs
from migrator.linux.repair import revive
from migrator.protocol.messages import HostFacts, Propose
from migrator.protocol.states import Recorded
from migrator.recovery.hooks import Tools, open_group
from migrator.recovery.journal import JournalHeader, journal_directory
from migrator.recovery.settle import Settlement, settle_all
from migrator.session.interfaces import NetworkArrival
from migrator.session.preflight import collect_host
from migrator.session.settings import DestinationSettings, Prepared
from transport import ssh
from transport.link import Link


@dataclass(frozen=True)
class Login:
    """How to reach other hosts: see `transport.ssh.connect`."""

    identity: Path | None = None
    known_hosts: Path | None = None
    command: str = ssh.COMMAND
    accept_new_host_key: bool = False

    async def connect(self, peer: str) -> Link:
        return await ssh.connect(
            peer,
            identity=self.identity,
            known_hosts=self.known_hosts,
            command=self.command,
            accept_new_host_key=self.accept_new_host_key,
        )


class HostHooks:
    """See `migrator.recovery.hooks.RecoveryHooks`."""

    def take_locks(self, header: JournalHeader, seconds: float) -> list[str]:
        """The locks of a copy that is to run; what somebody else has, one text each."""
        if not header.locks or open_group(header.cgroup) is None:
            return []
        locks = [LateLock(*lock) for lock in header.locks]
        # Of the engine that carries them: no other leaves any.
        return [str(lock) for lock in select().engine.take_locks(header.cgroup, locks, seconds)]

    def reopen(self, header: JournalHeader) -> None:
        """Its tasks will run here: a container gets its network back, connections come out of repair mode, and
        files of unix sockets into their places."""
        found = container.find(header.container) if header.container else None
        if found is not None and found.alive:
            switchover.reopen(found)
            if found.arriving:
                found.settled()
        group = open_group(header.cgroup)
        pids = group.pids() if group is not None else []
        revive(pids)
        if found is not None:
            message_ledger.recover(str(found.message_ledger), pids)
        for pid in pids if header.moves else ():
            with contextlib.suppress(OSError):  # one that has ended has no root directory, and the next one has
                root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    select().engine.finish_moves(root, header.moves)
                finally:
                    os.close(root)
                break

    def remove(self, header: JournalHeader) -> None:
        """Its tasks are gone: take down what stood around them."""
        found = container.find(header.container) if header.container else None
        if found is not None and _is_of(found, header):
            take_down(found)


def _is_of(found: container.Container, header: JournalHeader) -> bool:
    """Whether a container is the one that a journal is about, and not a later one of the same name."""
    return found.cgroup == header.cgroup or Path(found.cgroup).name == header.cgroup


def tools() -> Tools:
    return Tools(hooks=HostHooks())


def new_migration() -> str:
    """An id that no other migration has."""
    return f"m-{uuid.uuid4().hex[:20]}"


def facts(choice: Choice) -> HostFacts:
    """The facts of this host for a preflight. Takes some milliseconds."""
    found = collect_host(choice.engine.name, choice.abilities, choice.engine.xstate_size())
    status = confinement.own_status()
    return structs.replace(
        found, cap_bounding=confinement.bounding(status), confined=" and ".join(confinement.inherited(status))
    )


def give_up_capabilities() -> None:
    """Take from this program what an agent has no use for; its copies have it all the same. Before any thread."""
    confinement.give_up()


def load() -> None:
    """Load what the first container would wait for."""
    rtnetlink.load()


def check_mounts() -> None:
    """Raises UsageError for a service with mounts of its own: whatever it restored would have them too."""
    differ = confinement.own_mounts()
    if differ is None:
        return
    seen = f": {', '.join(differ[:5])}{' …' if len(differ) > 5 else ''} differ" if differ else ""
    raise UsageError(
        f"this agent has a mount namespace of its own{seen}; what it restores would not see the files of this host",
        hint="take PrivateTmp=, ProtectSystem=, ReadWritePaths= and the like out of its unit: "
        "systemctl cat migrator-agent",
    )


def destination_settings(engine: str = "", *, bridge: str = "", journal: Path | None = None) -> DestinationSettings:
    """This host as a destination. What comes is restarted by the engine of that name, else by the one that saved it
    where it works here too. `bridge` is for containers whose bridge is called otherwise there.

    Raises UsageError, Refused: see `select`."""

    def choose(proposal: Propose) -> Choice:
        saved_by = "" if proposal.verify else proposal.source.engine  # a second look is not for each of them
        return select_like(saved_by, engine)

    return DestinationSettings(
        host=facts(select(engine)),
        host_for=lambda proposal: facts(choose(proposal)),
        prepare=lambda proposal: _prepare(choose(proposal).engine, proposal, bridge),
        root_of=_root_of,
        log_of=_log_of,
        journal=journal or journal_directory(),
        tools=tools(),
    )


_restarted: set[int] = set()  # pids of the roots of workloads that this process has restarted


def reap() -> None:
    """Collect the workloads restarted by this process that have ended or gone on to another host."""
    for pid in list(_restarted):
        if _ended(pid):
            with contextlib.suppress(ChildProcessError):  # collected already
                if not os.waitpid(pid, os.WNOHANG)[0]:
                    continue
            _restarted.discard(pid)


def _runs(pid: int) -> None:
    _restarted.add(pid)
    reap()  # it may have ended before we knew that it is ours


def _ended(pid: int) -> bool:
    """Whether a child is a zombie that no engine traces: waiting for another would take its engine's stops away."""
    try:
        status = procfs.status(pid)
    except (FileNotFoundError, ProcessLookupError):
        return True
    return status["State"][0] == "Z" and status["TracerPid"] == "0"


def _prepare(engine: Engine, proposal: Propose, bridge: str) -> Prepared:
    _check_fence(proposal)
    maker = SandboxMaker(bridge)
    options = DestinationOptions(
        sandbox=maker, cgroup_name=f"restart-{proposal.migration}", live=True, verify=proposal.verify
    )
    cgroup = options.cgroup_name
    if proposal.container:
        spec = ContainerSpec.from_json(proposal.container_spec)
        _refuse_container(spec, proposal, bridge)
        cgroup = state.cgroup_name(spec.name)

    def factory(fd: int) -> Destination:
        return engine.destination(fd, options)

    def network() -> NetworkArrival | None:
        return switchover.NetworkArrival(maker.sandbox.container) if maker.sandbox is not None else None

    return Prepared(factory=factory, cgroup=cgroup, network=network, runs=_runs)


def _root_of(proposal: Propose) -> str:
    """The root directory of a container; plain subtrees have the host's."""
    return ContainerSpec.from_json(proposal.container_spec).root if proposal.container_spec else ""


def _log_of(proposal: Propose) -> str:
    """The file that the output of a container goes to."""
    return ContainerSpec.from_json(proposal.container_spec).log if proposal.container_spec else ""


def _check_fence(proposal: Propose) -> None:
    """Raises Refused if the controller that wants this has been deposed."""
    if proposal.token:
        try:
            Fence(proposal.fleet, fence_directory()).check(proposal.token)
        except MigratorError as error:
            raise Refused([error.message], hint=error.hint) from None


def _refuse_container(spec: ContainerSpec, proposal: Propose, bridge: str) -> None:
    reasons, hints = [], []
    there = container.find(spec.name)
    if there is not None and there.alive:
        reasons.append(f"container {spec.name}: one of that name lives here already (pid {there.init_pid})")
        hints.append(f"end that one there: migrator stop {spec.name}")
    if spec.name != proposal.container:
        reasons.append(f"container {proposal.container}: its specification is that of {spec.name}")
    wanted = bridge or spec.bridge
    default = wanted == container.ContainerSpec(name="x").bridge
    if wanted and not default and not os.path.isdir(f"/sys/class/net/{wanted}/bridge") and not _has_link(wanted):
        reasons.append(f"container {spec.name}: there is no bridge {wanted} here")
        hints.append("make it there, or name another for what arrives: migrator agent --bridge NAME")
    if spec.bridge and (lacking := connection_filter.missing()):
        reasons.append(f"container {spec.name}: its connections cannot be moved: {lacking}")
        hints.append("use a kernel with bpf(2)")
    arrives = any(tree.path == "/" and not tree.only for tree in proposal.trees)
    if spec.root and not arrives and not os.path.isdir(spec.root):
        reasons.append(f"container {spec.name}: its root directory {spec.root} is not here")
        hints.append("copy it there first, or use --copy-files")
    if reasons:
        raise Refused(reasons, hint="; ".join(hints))


def _has_link(name: str) -> bool:
    """Of the network namespace of this thread; /sys shows that which it was mounted in."""
    try:
        return socket.if_nametoindex(name) > 0
    except OSError:
        return False


async def settle(login: Login, journal: Path | None = None) -> list[Settlement]:
    """Finish or undo what agents of this host that died have left."""

    async def ask(header: JournalHeader) -> Recorded:
        from migrator.session.serve import ask_over  # what serves is not for who only asks: mostly nobody is asked

        link = await login.connect(header.peer)
        try:
            return await ask_over(link, header.migration)
        finally:
            await link.close()

    return await settle_all(journal or journal_directory(), tools(), ask)
