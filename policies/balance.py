"""Evening out load: which workloads to move where, and why it is worth it.

`balance` is called once per observation. It plans only if the cluster as a whole, or a host, has been too uneven for
several observations, and only moves that gain more than they cost. Among those the ones that gain most above their
price come first; where bytes are rationed, those that gain most for their price. Each gain is a fall of one sum (see
`score`), so under a constant load moves come to an end and nothing goes back and forth; the cooldown does the same for
a load that is not constant.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

import msgspec

from . import windows
from .consistency import Findings, Trust, inspect, validate
from .cost import LEAST_PRICE, Cost, Prices, predict
from .ledger import Ledger, Limits, Unit
from .model import Cluster
from .plan import Cause, Move, Pace, Plan, Waves, make
from .repair import broken
from .score import Score, Weights
from .targets import Targets
from .windows import Window

# Fitting targets tried for a unit, and hosts looked at to find them.
TARGETS = 8
LOOKED_AT = 400


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """When to balance, how eagerly, and within what.

    `imbalance`: the cluster's, above which it is balanced. `excess`: how far above the mean a host's utilisation makes
    it hot. Either must hold for `hold` observations, or two that are LASTING apart. `margin`: by how much a move's gain
    must exceed its price.
    `thrift`: how much cost weighs against gain; twice as much means fewer moves. `cooldown`: seconds for which a moved
    workload stays. `bytes_per_hour`: what balancing may send on average; `bytes_at_once`: how much of that may be saved
    up, and may be sent at the beginning, a day's worth if None.
    """

    imbalance: float = 0.05
    excess: float = 0.15
    hold: int = 3
    margin: float = 0.25
    thrift: float = 1.0
    cooldown: float = 3600.0
    max_risk: float = 0.6
    bytes_per_hour: float | None = None
    bytes_at_once: float | None = None
    pace: Pace = Pace()
    prices: Prices = Prices()
    weights: Weights = Weights()
    limits: Limits = Limits()
    trust: Trust = Trust()
    windows: tuple[Window, ...] = ()

    @property
    def most_credit(self) -> float:
        """Bytes that may be sent when none were for long; without end if there is no budget."""
        if self.bytes_per_hour is None:
            return float("inf")
        return self.bytes_per_hour * 24 if self.bytes_at_once is None else self.bytes_at_once


class Hold(msgspec.Struct, frozen=True):
    """What `balance` remembers from one observation to the next.

    Observations in a row with too much imbalance, and with each host too hot; when it was last called, and how many
    bytes it might send then (None: all that the settings let it save up).
    """

    uneven: int = 0
    hot: dict[str, int] = {}
    at: float | None = None
    credit: float | None = None


class _Choice(msgspec.Struct, frozen=True):
    unit: Unit
    target: int
    gain: float
    price: float
    costs: tuple[Cost, ...]


# Seconds: what is seen again after so long is no spike, however rarely one looks.
LASTING = 1800.0
HOLD = Hold()
SETTINGS = Settings()


def credit_left(sent: Iterable[tuple[float, float]], now: float, settings: Settings) -> float:
    """What is left of the budget after all that was `sent`: times and bytes, the earliest first."""
    credit, at = settings.most_credit, None
    for when, size in sent:
        credit, at = _earned(credit, at, when, settings) - size, when
    return _earned(credit, at, now, settings)


def _earned(credit: float | None, since: float | None, now: float, settings: Settings) -> float:
    most = settings.most_credit
    if credit is None or settings.bytes_per_hour is None:
        return most
    return min(credit + settings.bytes_per_hour * max(now - (now if since is None else since), 0.0) / 3600, most)


def balance(cluster: Cluster, hold: Hold = HOLD, settings: Settings = SETTINGS) -> tuple[Plan, Hold]:
    """A plan for this observation, and what to pass with the next one.

    The plan is empty, and its notes say why, where there is nothing to do. Raises `ClusterError` if the cluster makes
    no sense. Pass the old `Hold` again if the plan was only shown: bytes count as sent once a plan is returned.
    """
    validate(cluster)
    return _Balance(cluster, hold, settings).run()


class _Balance:
    def __init__(self, cluster: Cluster, hold: Hold, settings: Settings) -> None:
        self.cluster = cluster
        self.settings = settings
        self.findings: Findings = inspect(cluster, settings.trust)
        self.ledger = Ledger(cluster, self.findings, settings.limits)
        self.score = Score(self.ledger, settings.weights)
        self.targets = Targets(self.ledger, self.score)
        self.waves = Waves(settings.pace, cluster)
        self.imbalance = self.score.imbalance()
        self.hold = self._count(hold)
        self.credit = _earned(hold.credit, hold.at, cluster.time, settings)
        self.time_left = windows.left(settings.windows, cluster.time)
        self.moves: list[Move] = []
        self.notes = [*self.findings.hosts.values(), *dict.fromkeys(self.findings.workloads.values())]
        self.share = 1 / max(settings.pace.per_host, 1)
        self.version = [0] * len(self.ledger.hosts)
        self.now = cluster.time
        self.hot: set[int] = set()
        # Targets for which there was no slot, or no credit, when a unit's turn came.
        self.refused: set[tuple[str, int]] = set()

    def _count(self, hold: Hold) -> Hold:
        settings, now = self.settings, self.cluster.time
        more = settings.hold if hold.at is not None and now - hold.at > LASTING else 1

        def counted(before: int) -> int:
            return before + more if before else 1

        names = [
            self.ledger.hosts[host].name for host in self.score.members if self.score.excess(host) > settings.excess
        ]
        uneven = counted(hold.uneven) if self.imbalance > settings.imbalance else 0
        return Hold(uneven, {name: counted(hold.hot.get(name, 0)) for name in names}, now)

    def run(self) -> tuple[Plan, Hold]:
        settings = self.settings
        uneven = self.hold.uneven >= settings.hold
        self.hot = {self.ledger.index[name] for name, rounds in self.hold.hot.items() if rounds >= settings.hold}
        if self.time_left <= 0:
            self.notes.append("no window is open")
        else:
            self._keep_rules()
            if uneven or self.hot:
                self._even_out(uneven)
            elif self.hold.uneven or self.hold.hot:
                rounds = max(self.hold.uneven, *self.hold.hot.values(), 0)
                self.notes.append(f"uneven for {rounds} of {settings.hold} observations")
        plan = make(
            self.cluster,
            sorted(self.moves, key=lambda move: move.wave),
            imbalance=self.imbalance,
            predicted=self.score.imbalance(),
            notes=self.notes,
        )
        credit = self.credit if settings.bytes_per_hour is not None else None
        return plan, msgspec.structs.replace(self.hold, credit=credit)

    def _keep_rules(self) -> None:
        """Rules that are broken come first, and need not pay."""
        for unit, reason in broken(self.ledger):
            if unit.kept:
                self.notes.append(f"{reason}, but {unit.kept}")
                continue
            if self.waves.full():  # the search is over all hosts
                self.notes.append(f"{reason}: {unit.name} waits until others have moved")
                continue
            choice = self._best_for_rule(unit)
            if choice is None or not self._enter(choice, Cause.RULE, reason):
                self.notes.append(f"{reason}, and there is nowhere for {unit.name} to go now")

    def _best_for_rule(self, unit: Unit) -> _Choice | None:
        """Where a broken rule holds again; of a split bundle only the parts elsewhere move."""
        hosts = (
            range(len(self.ledger.hosts))
            if unit.host >= 0
            else {self.ledger.index[workload.host] for workload in unit.workloads}
        )
        best: tuple[float, float, int] | None = None
        for host in hosts:
            part = unit if unit.host >= 0 else self.ledger.partial(unit, host)
            if host != unit.host and self.ledger.fits(part, host):
                rank = (part.memory if unit.host < 0 else 0.0, self.score.burden(part, host), host)
                best = rank if best is None or rank < best else best
        if best is None:
            return None
        part = unit if unit.host >= 0 else self.ledger.partial(unit, best[2])
        return self._choice(part, best[2], 0.0)

    def _choice(self, unit: Unit, target: int, gain: float) -> _Choice | None:
        """With its costs; None if they are more than is allowed."""
        at = self.ledger.hosts[target]
        costs = []
        for workload in unit.workloads:
            source = self.ledger.hosts[self.ledger.index[workload.host]]
            cost = predict(workload, source, at, self.share)
            if workload.downtime_budget is not None and cost.downtime > workload.downtime_budget:
                return None
            if cost.risk > self.settings.max_risk or cost.seconds > self.time_left:
                return None
            costs.append(cost)
        if sum(cost.bytes for cost in costs) > self.credit:
            return None
        price = max(self.settings.thrift * sum(self.settings.prices.of(cost) for cost in costs), LEAST_PRICE)
        return _Choice(unit, target, gain, price, tuple(costs))

    def _worth(self, gain: float, price: float) -> float:
        """What is moved first: what gains most; where bytes are rationed, what gains most for its price."""
        return gain - price if self.settings.bytes_per_hour is None else gain / price

    def _movable(self, unit: Unit) -> bool:
        return not unit.kept and all(
            workload.last_moved is None or self.now - workload.last_moved >= self.settings.cooldown
            for workload in unit.workloads
        )

    def _best_from(self, source: int) -> _Choice | None:
        """The move off a host that is worth most.

        Units are tried by what they could gain at best, so the first few of many decide it.
        """
        ledger, score, settings = self.ledger, self.score, self.settings
        if not self.waves.open(ledger.hosts[source].name):
            return None
        best: _Choice | None = None
        most = 0.0
        for hope, _, unit in sorted(self._hopes(source), key=lambda entry: (-entry[0], entry[1])):
            if hope <= most:
                break
            top: tuple[float, int] | None = None
            for target in self.targets.candidates(unit, TARGETS, LOOKED_AT):
                gain = score.gain(unit, source, target)
                if top is not None and gain <= top[0]:
                    continue
                if self.waves.open(ledger.hosts[target].name) and (unit.name, target) not in self.refused:
                    top = gain, target
            if top is None:
                continue
            choice = self._choice(unit, top[1], top[0])
            if choice is None or choice.gain <= (1 + settings.margin) * choice.price:
                continue
            worth = self._worth(choice.gain, choice.price)
            if worth > most:
                best, most = choice, worth
        return best

    def _hopes(self, source: int) -> Iterator[tuple[float, str, Unit]]:
        """What a host's units would be worth at the least price if they went to a host that is the emptiest in all."""
        settings = self.settings
        low = self.targets.lowest(0), self.targets.lowest(1), 0.0
        for unit in self.ledger.units_on[source]:
            gain = self.score.hope(unit, source, low)
            sent = sum(
                (workload.used.memory if workload.predicted_bytes is None else workload.predicted_bytes)
                * workload.factors.bytes
                for workload in unit.workloads
            )
            price = settings.thrift * (settings.prices.move * len(unit.workloads) + settings.prices.gib * sent / 2**30)
            price = max(price, LEAST_PRICE)
            if gain > (1 + settings.margin) * price and sent <= self.credit and self._movable(unit):
                yield self._worth(gain, price), unit.name, unit

    def _sources(self, uneven: bool) -> Iterator[int]:
        if not uneven:
            return iter(sorted(self.hot))
        above = [host for host in self.score.members if self.score.excess(host) > 0]
        above.sort(key=lambda host: (-self.score.contribution(host), host))
        return iter(above[: max(4 * self.settings.pace.total * self.settings.pace.waves, 256)])

    def _even_out(self, uneven: bool) -> None:
        """Take the best move again and again; a host's best is looked for anew only when a host of it has changed."""
        queue: list[tuple[float, int, int, int, _Choice]] = []

        def look(source: int) -> None:
            choice = self._best_from(source)
            if choice is not None:
                versions = self.version[source], self.version[choice.target]
                heapq.heappush(queue, (-self._worth(choice.gain, choice.price), source, *versions, choice))

        for source in self._sources(uneven):
            look(source)
        while queue and not self.waves.full():
            _, source, of_source, of_target, choice = heapq.heappop(queue)
            if (of_source, of_target) == (self.version[source], self.version[choice.target]):
                text = f"{self.score.text(source)} is above the mean, {self.score.text(choice.target)} is not"
                if not self._enter(choice, Cause.BALANCE, text):
                    self.refused.add((choice.unit.name, choice.target))
            look(source)

    def _enter(self, choice: _Choice, cause: Cause, reason: str) -> bool:
        """Make it part of the plan, if there is a slot for it."""
        unit, target = choice.unit, choice.target
        names = [self.ledger.hosts[self.ledger.index[workload.host]].name for workload in unit.workloads]
        if sum(cost.bytes for cost in choice.costs) > self.credit:
            return False
        slots = self.waves.take_all([(name, self.ledger.hosts[target].name) for name in names])
        if slots is None:
            return False
        for workload, wave, cost in zip(unit.workloads, slots, choice.costs, strict=True):
            self.moves.append(
                Move(
                    workload=workload.name,
                    source=workload.host,
                    target=self.ledger.hosts[target].name,
                    cause=cause,
                    reason=reason,
                    gain=choice.gain / len(unit.workloads),
                    cost=cost,
                    bundle=unit.name if len(unit.workloads) > 1 else "",
                    wave=wave,
                )
            )
            self.credit -= cost.bytes
        changed = {self.ledger.index[name] for name in names} | {target}
        # What a plan moved once it does not move again.
        unit.kept = f"{unit.name} moves already"
        self.ledger.move(unit, target)
        for host in changed:
            self.version[host] += 1
            self.score.update(host)
            self.targets.update(host)
        return True
