"""Emptying a host: for maintenance, or against the clock.

A drain is a `Record`, which its owner stores, and `step`, which looks at the cluster and says what to do next. Nothing
else is remembered, so whoever has the record can go on: after each step store the returned record, then act. The end
is "empty", seen by a look at the host after the last departure, or a list of what stayed and why.

With a deadline, `AtDeadline` says what becomes of what is left. An evacuation (`begin(…, evacuate=True)`) has one that
nothing can move: it chooses what can be out in time, the most valuable first.
"""

from __future__ import annotations

import msgspec

from . import schedule
from .consistency import Findings, inspect, validate
from .cost import Cost, predict
from .drain_record import (
    SETTINGS,
    Action,
    AtDeadline,
    Attempt,
    Cordon,
    DrainError,
    Progress,
    Record,
    Release,
    Save,
    Settings,
    Start,
    Started,
    State,
    Step,
    host_named,
    moves_of,
    over_budget,
)
from .drain_seen import begin, cancel, failed, seen
from .give_back import give_back
from .ledger import Ledger, Limits, Unit
from .model import Cluster, HostState, Workload
from .placement import Placement, Places
from .plan import Cause, Waves, with_started
from .score import Score
from .targets import Targets

__all__ = [
    "Action",
    "AtDeadline",
    "Attempt",
    "Cordon",
    "DrainError",
    "Progress",
    "Record",
    "Release",
    "Save",
    "Settings",
    "Start",
    "Started",
    "State",
    "Step",
    "begin",
    "cancel",
    "failed",
    "give_back",
    "step",
]


def step(cluster: Cluster, record: Record, settings: Settings = SETTINGS) -> Step:
    """What to do next. Raises `DrainError` if the drain's host is gone, `ClusterError` if the cluster makes no sense.

    Asking again with the same cluster and the returned record never starts a workload twice.
    """
    validate(cluster)
    host_named(cluster, record.host)
    return _Step(cluster, record, settings).run()


class _Step:
    def __init__(self, cluster: Cluster, record: Record, settings: Settings) -> None:
        self.cluster = cluster
        self.settings = settings
        self.now = cluster.time
        self.host = host_named(cluster, record.host)
        self.here = {workload.name: workload for workload in cluster.workloads if workload.host == record.host}
        self.record = seen(cluster, record, settings.grace)
        # What was asked for takes room at its target, seen or not.
        self.cluster = with_started(cluster, {name: start.target for name, start in self.record.started.items()})
        self.here = {workload.name: workload for workload in self.cluster.workloads if workload.host == record.host}
        self.past = record.deadline is not None and self.now >= record.deadline
        self.force = self.past and record.at_deadline is AtDeadline.FORCE and not record.evacuate
        self.findings = inspect(cluster, settings.trust)
        self.doubt = self.findings.hosts.get(record.host, "")
        believed = self.findings
        if self.force or record.evacuate:  # there is no time to wait until the host is believed again
            believed = Findings(
                {name: why for name, why in believed.hosts.items() if name != record.host}, believed.workloads
            )
        limits = Limits(cpu=1.0, memory=1.0, network=1.0) if self.force else settings.limits
        self.ledger = Ledger(self.cluster, believed, limits)
        self.number = self.ledger.index[record.host]
        # What this host itself has in the ledger does not matter; that it is closed does.
        self.ledger.closed[self.number] = self.ledger.closed[self.number] or f"host {record.host} is being drained"
        self.score = Score(self.ledger, settings.weights)
        self.share = 1 / record.parallel
        self.stays: dict[str, str] = {}
        self.actions: list[Action] = []
        self.mates: dict[str, set[int]] = {}
        self.bytes_left = 0.0
        self.seconds: dict[str, float] = {}

    def run(self) -> Step:
        record = self.record
        if record.state is State.RUNNING:
            if self.host.state is HostState.LOST:
                self._stay_all(f"host {record.host} is lost")
                if self.past:
                    self._end(State.STAYS)
            elif self.host.state not in (HostState.DRAINING, HostState.MAINTENANCE):
                self.actions.append(Cordon(record.host))
            elif not self.here:
                self._empty()
            else:
                self._go_on()
        return Step(record=self.record, actions=tuple(self.actions), progress=self._progress(), stays=dict(self.stays))

    def _empty(self) -> None:
        """Nothing is seen there; that counts once the host itself has said so after the last departure."""
        if any(workload.moving_to == self.record.host for workload in self.cluster.workloads):
            return
        if self.host.observed_at >= self.record.changed_at and not self.doubt:
            self.actions.append(Release(self.record.host))
            self._end(State.EMPTY)

    def _end(self, state: State) -> None:
        self.record = msgspec.structs.replace(self.record, state=state, ended_at=self.now)

    def _stay_all(self, reason: str) -> None:
        self.stays.update((name, reason) for name in self.here if name not in self._under_way())

    def _under_way(self) -> dict[str, None]:
        moving = {name: None for name, workload in self.here.items() if workload.moving_to is not None}
        return {**moving, **dict.fromkeys(self.record.started), **dict.fromkeys(self.record.saving)}

    def _go_on(self) -> None:
        record = self.record
        if self.past and record.at_deadline is AtDeadline.SAVE and not record.evacuate:
            self._save()
        elif self.past and not self.force:
            self._place()
            known = dict(self.stays)
            self._stay_all("the deadline has passed")
            self.stays.update((name, f"the deadline has passed; {reason}") for name, reason in known.items())
        else:
            self._move()
        waiting = (bool(self.doubt) and not self.past) or any(self._retries(name) for name in self.stays)
        final = self.past or record.deadline is None or self._for_good()
        if not self._under_way() and not self.actions and not waiting and final:
            self._end(State.STAYS)

    def _for_good(self) -> bool:
        """Whether what stays would stay after any wait: nothing but a save at the deadline moves what is pinned."""
        return self.record.at_deadline is not AtDeadline.SAVE and all(self.here[name].pinned for name in self.stays)

    def _retries(self, name: str) -> bool:
        """Whether it is only waiting for another try."""
        attempt = self.record.failed.get(name)
        if attempt is None or attempt.count >= self.settings.attempts or self.past:
            return False
        return self.now < attempt.at + self.settings.backoff * attempt.count

    def _save(self) -> None:
        saving = list(self.record.saving)
        busy = self._under_way()
        for name, workload in self.here.items():
            if workload.moving_to is not None or name in busy:
                continue
            attempt = self.record.failed.get(name)
            if attempt is not None and attempt.count > self.settings.attempts:
                self.stays[name] = attempt.reason
            elif len(busy) + len(saving) < self.record.parallel + len(self.record.saving):
                saving.append(name)
                self.actions.append(Save(name))
        self.record = msgspec.structs.replace(self.record, saving=tuple(saving))

    def _move(self) -> None:
        """Find a place for everything that is left, then begin as much of it as there are slots."""
        units, hosts = self._place()
        ready = [unit for unit in units if hosts[unit.name] is not None]
        costs = {unit.name: self._costs(unit, str(hosts[unit.name])) for unit in ready}
        self.bytes_left = sum(cost.bytes for of_unit in costs.values() for cost in of_unit)
        for unit in ready:
            self.seconds[unit.name] = sum(cost.seconds for cost in costs[unit.name])
        for unit in self._order(ready):
            self._start(unit, str(hosts[unit.name]), costs[unit.name])

    def _place(self) -> tuple[list[Unit], dict[str, str | None]]:
        """What is to be placed, and where: what finds no place stays, with the reason."""
        units = self._left()
        score = self.score
        placement = Places(self.ledger, score, Targets(self.ledger, score), self._allowed).place(units)
        self._note_unplaced(units, placement)
        return units, {unit.name: placement.targets.get(unit.name) for unit in units}

    def _left(self) -> list[Unit]:
        """Units to place: not under way, not failed too often, not waiting for another try."""
        busy = self._under_way()
        units = []
        for unit in self.ledger.units:
            mine = tuple(workload for workload in unit.workloads if workload.host == self.record.host)
            if not mine or any(workload.name in busy for workload in mine):
                continue
            if len(mine) != len(unit.workloads):
                unit = self._remainder(unit, mine)
            reason = self._not_now(mine)
            if reason:
                self.stays.update((workload.name, reason) for workload in mine)
            else:
                units.append(unit)
        return units

    def _remainder(self, unit: Unit, mine: tuple[Workload, ...]) -> Unit:
        """What is here of a split bundle: it goes where the others are, or anywhere if none of their hosts is open."""
        others = {workload.moving_to or workload.host for workload in unit.workloads if workload not in mine}
        where = {self.ledger.index[name] for name in others}
        self.mates[mine[0].name] = {host for host in where if not self.ledger.closed[host]}
        # The others' own moves and pins do not keep what is here.
        kept = next((f"{workload.name} is pinned to {workload.host}" for workload in mine if workload.pinned), "")
        kept = kept or next((self.findings.workloads.get(workload.name, "") for workload in mine), "")
        rest = Unit(mine, self.number, unit.need, kept)
        self.ledger.units_on[self.number].append(rest)
        return rest

    def _not_now(self, workloads: tuple[Workload, ...]) -> str:
        for workload in workloads:
            attempt = self.record.failed.get(workload.name)
            if attempt is None or (self.force and attempt.at < (self.record.deadline or 0)):
                continue
            if attempt.count >= self.settings.attempts:
                return f"failed {attempt.count} times, the last time: {attempt.reason}"
            if self.now < attempt.at + self.settings.backoff * attempt.count:
                return f"failed {attempt.count} times, is tried again: {attempt.reason}"
        return ""

    def _costs(self, unit: Unit, target: str) -> list[Cost]:
        at = self.ledger.hosts[self.ledger.index[target]]
        return [predict(workload, self.host, at, self.share) for workload in unit.workloads]

    def _refusal(self, unit: Unit, host: int) -> str:
        if self.force:
            return ""
        costs = self._costs(unit, self.ledger.hosts[host].name)
        reason = over_budget(unit.workloads, costs)
        worst = max(cost.risk for cost in costs)
        if not reason and worst > self.settings.max_risk and not self.record.evacuate:
            reason = f"{unit.name} would probably not converge: risk {worst:.0%}"
        return reason

    def _allowed(self, unit: Unit, host: int) -> bool:
        mates = self.mates.get(unit.name)
        return not self._refusal(unit, host) and (not mates or host in mates)

    def _note_unplaced(self, units: list[Unit], placement: Placement) -> None:
        for unit in units:
            if unit.name not in placement.unplaced:
                continue
            reason = placement.unplaced[unit.name]
            if self.mates.get(unit.name):
                names = ", ".join(sorted(self.ledger.hosts[host].name for host in self.mates[unit.name]))
                reason = f"{unit.name} must join its bundle on {names}, which has no room for it now"
            for host in range(len(self.ledger.hosts)):
                if self.ledger.fits(unit, host) and (refusal := self._refusal(unit, host)):
                    reason = refusal
                    break
            self.stays.update((workload.name, reason) for workload in unit.workloads)

    def _order(self, units: list[Unit]) -> list[Unit]:
        """The longest first, so that the last slots are filled by short ones; against the clock, see `schedule`."""
        if not self.record.evacuate:
            return sorted(units, key=lambda unit: (-self.seconds[unit.name], unit.name))
        left = (self.record.deadline or self.now) - self.now
        planned = left - self.settings.reserve * ((self.record.deadline or 0) - self.record.began_at)
        slots = [0.0] * self.record.parallel
        for number, started in enumerate(sorted(self.record.started.values(), key=lambda one: one.at)):
            slots[number % len(slots)] += max(started.at + started.seconds - self.now, 0.0)
        jobs = [
            schedule.Job(unit.name, self.seconds[unit.name], sum(workload.value for workload in unit.workloads))
            for unit in units
        ]
        chosen = schedule.in_time(jobs, slots, planned)
        by_name = {unit.name: unit for unit in units}
        for unit in units:
            if unit.name not in chosen:
                reason = f"would take {self.seconds[unit.name]:.0f} s, too long for the {left:.0f} s that are left"
                self.stays.update((workload.name, reason) for workload in unit.workloads)
        return [by_name[name] for name in chosen]

    def _start(self, unit: Unit, target: str, costs: list[Cost]) -> None:
        """Begin a unit's moves if there are slots. A bundle of more than there are slots goes when all are free."""
        busy = len(self._under_way())
        free = self.record.parallel - busy
        if free < len(unit.workloads) and busy:
            return
        waves = self._waves()
        size = len(unit.workloads)
        pairs = [(self.record.host, target)] * min(size, max(self.record.parallel, 1))
        slots = waves.take_all(pairs)
        if slots is None:
            return
        cause = Cause.EVACUATE if self.record.evacuate else Cause.DRAIN
        text = f"host {self.record.host} is being {'evacuated' if self.record.evacuate else 'drained'}"
        text += f"; with all that comes there will be {self.score.text(self.ledger.index[target])}"
        started = dict(self.record.started)
        for move in moves_of(unit, target, cause, text, 0.0, costs, [0] * size):
            self.actions.append(Start(move, self.force))
            started[move.workload] = Started(target, self.now, move.cost.seconds)
        self.record = msgspec.structs.replace(self.record, started=started)

    def _waves(self) -> Waves:
        """Slots of targets; the drained host's own are `parallel`."""
        pace = msgspec.structs.replace(self.settings.pace, waves=1)
        waves = Waves(msgspec.structs.replace(pace, per_host=max(pace.per_host, self.record.parallel)), self.cluster)
        for name, started in self.record.started.items():
            if self.here[name].moving_to is None:
                waves.take(self.record.host, started.target)
        return waves

    def _progress(self) -> Progress:
        record = self.record
        running = len(self._under_way()) if record.state is State.RUNNING else 0
        left = len(self.here) - running
        return Progress(
            total=len(record.wanted),
            done=len(record.wanted) - len(self.here),
            running=running,
            left=left,
            bytes_left=self.bytes_left,
            ends_at=self._ends_at(),
        )

    def _ends_at(self) -> float | None:
        """From what is predicted for the rest, corrected by how the predictions did so far."""
        record = self.record
        if record.state is not State.RUNNING:
            return record.ended_at
        rest = sum(self.seconds.values())
        rest += sum(max(started.at + started.seconds - self.now, 0.0) for started in record.started.values())
        if not rest and self.here:
            return None
        factor = 1.0
        if record.predicted_seconds:
            passed = (self.now - record.began_at) * record.parallel
            factor = min(max(passed / record.predicted_seconds, 0.5), 5.0)
        return self.now + factor * rest / record.parallel
