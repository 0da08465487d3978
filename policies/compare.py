"""Several rules on the same day: ours as thrifty as they come, and the others' published ones.

A rule that moves more evens out more, so two rules are compared by what they send: beside each of the others stands
ours that evens out most without sending more, be it by its thrift or by a budget of what the other one sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt

import msgspec

from . import balance, baselines
from .consistency import ClusterError
from .day import Day, Invented, Shape
from .plan import Pace
from .rules import Nothing, Ours
from .simulate import WORLD, Rule, Run, World, simulate

THRIFTS = (1.0, 0.5, 2.0, 4.0, 8.0, 16.0)
# Times that a thrift between two of these is tried.
REFINED = 4
# With a budget of what another rule sent, of which so much may be sent at once, and the rest as the day goes by.
BUDGET_THRIFTS = (1.0, 4.0, 8.0, 12.0)
AT_ONCE = 0.8
# What is sent is not what was predicted: the share of the budget that is given, and what if that was too much.
GIVEN = (0.97, 0.85)
# Hosts for each migration that a fleet may have under way.
HOSTS_PER_SLOT = 25


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one day under each rule. The first of `ours` is the default."""

    hosts: int
    workloads: int
    interval: float
    nothing: Run
    ours: tuple[Run, ...]
    others: tuple[Run, ...]

    def match(self, other: Run) -> Run | None:
        """Ours that evens out most without sending more; None where even the thriftiest sends more."""
        able = [run for run in self.ours if run.bytes <= other.bytes]
        return min(able, key=lambda run: run.mean, default=None)

    def better(self) -> bool:
        """Whether each rule that moves anything has a match that leaves less imbalance."""
        matches = [(other, self.match(other)) for other in self.others if other.moves]
        return all(ours is not None and ours.mean < other.mean for other, ours in matches)


def compare(
    day: Day,
    world: World = WORLD,
    settings: balance.Settings = balance.SETTINGS,
    *,
    thrifts: Sequence[float] = THRIFTS,
    budget_thrifts: Sequence[float] = BUDGET_THRIFTS,
    others: Sequence[str] = baselines.NAMES,
    done: Callable[[Run], None] = lambda _run: None,
) -> Comparison:
    """Replay the day under each rule; `done` hears of each run. Raises `ClusterError` for a rule that is not known.

    Ours has the world's slots, whatever the settings say.
    """
    if unknown := sorted(set(others) - set(baselines.NAMES)):
        raise ClusterError([f"rule {name} is not known; there are {', '.join(baselines.NAMES)}" for name in unknown])

    settings = msgspec.structs.replace(settings, pace=world.pace)

    def replay(rule: Rule) -> Run:
        run = simulate(day, rule, world)
        done(run)
        return run

    def ours(thrift: float) -> Run:
        return replay(Ours(msgspec.structs.replace(settings, thrift=thrift), f"migrator, thrift {thrift:.3g}"))

    def within(budget: float, thrift: float) -> Run:
        """The first that keeps within the budget, or nearly does."""
        run = None
        for share in GIVEN:
            given = budget * share
            mine = msgspec.structs.replace(
                settings,
                thrift=thrift,
                bytes_at_once=AT_ONCE * given,
                bytes_per_hour=(1 - AT_ONCE) * given / hours,
            )
            run = replay(Ours(mine, f"migrator, {budget / 2**30:.3g} GiB, {thrift:.3g}"))
            if run.bytes <= budget:
                break
        assert run is not None
        return run

    nothing = replay(Nothing())
    hours = len(nothing.imbalance) * day.interval / 3600
    thrifty = {thrift: ours(thrift) for thrift in thrifts}
    default, rationed = thrifty[thrifts[0]], []
    found = tuple(replay(rule) for rule in baselines.rules() if rule.name in others)
    for other in found:
        # Who sends as much as our default does does not ration bytes.
        if other.moves and other.bytes < default.bytes:
            rationed += [within(other.bytes, thrift) for thrift in budget_thrifts]
        for _ in range(REFINED):
            thrift = _closer(thrifty, rationed, other)
            if thrift is None:
                break
            thrifty[thrift] = ours(thrift)
    return Comparison(
        hosts=len(day.hosts),
        workloads=len(day.workloads),
        interval=day.interval,
        nothing=nothing,
        ours=(*thrifty.values(), *rationed),
        others=found,
    )


def _closer(thrifty: dict[float, Run], rationed: Sequence[Run], other: Run) -> float | None:
    """A thrift that sends more than the best of ours does and perhaps no more than the other; None if none is called
    for."""
    able = [thrift for thrift, run in thrifty.items() if run.bytes <= other.bytes]
    known = [*(thrifty[thrift] for thrift in able), *(run for run in rationed if run.bytes <= other.bytes)]
    if not other.moves or min((run.mean for run in known), default=1.0) < other.mean:
        return None
    least = min(able, default=2 * max(thrifty))
    most = max((thrift for thrift in thrifty if thrift < least), default=None)
    return None if most is None or least < 1.02 * most else sqrt(most * least)


def pace_for(hosts: int) -> Pace:
    """The slots that a fleet of so many hosts has: each more host brings links of its own."""
    return Pace(total=max(Pace().total, hosts // HOSTS_PER_SLOT))


def invented(shape: Shape, world: World = WORLD, **more: object) -> Comparison:
    """`compare` on a day from a seed, with the slots that the fleet has for all rules."""
    world = msgspec.structs.replace(world, pace=pace_for(shape.hosts))
    return compare(Invented(shape), world, **more)  # type: ignore[arg-type]


def table(found: Comparison) -> str:
    """For people, in columns."""
    lines = [
        f"{found.hosts} hosts, {found.workloads} workloads, {len(found.nothing.imbalance)} observations",
        "",
        f"{'rule':24} {'imbalance':>9} {'starved':>11} {'moves':>6} {'failed':>6} {'back':>5} "
        f"{'GiB':>9} {'downtime':>9} {'longest':>8}",
        f"{'':24} {'mean':>9} {'core hours':>11} {'':>6} {'':>6} {'':>5} {'':>9} {'s':>9} {'s':>8}",
    ]
    for run in (found.nothing, found.ours[0]):
        lines.append(_line(run))
    for other in found.others:
        lines.append(_line(other))
        ours = found.match(other)
        if not other.moves:
            lines.append("  (moved nothing)")
        elif ours is None:
            lines.append("  (none of ours sends as little)")
        else:
            lines.append("  " + _line(ours, 22))
    ours = found.ours[0]
    lines += [
        "",
        f"{ours.rule}: predicted {ours.predicted_bytes / 2**30:.1f} GiB and {ours.predicted_downtime:.2f} s of "
        f"downtime for the moves that came about; at most {ours.most} migrations at once, "
        f"{ours.most_of_host} of one host",
    ]
    return "\n".join(lines)


def _line(run: Run, width: int = 24) -> str:
    return (
        f"{run.rule:{width}} {run.mean:9.4f} {run.starved / 3600:11.1f} {run.moves:6} {run.failed:6} {run.returns:5} "
        f"{run.bytes / 2**30:9.1f} {run.downtime:9.2f} {run.longest:8.2f}"
    )
