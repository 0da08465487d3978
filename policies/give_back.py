"""Bringing home what a drain moved away."""

from __future__ import annotations

from .consistency import inspect, validate
from .cost import predict
from .drain_record import SETTINGS, Record, Settings, host_named, moves_of, over_budget
from .ledger import Ledger
from .model import Cluster
from .plan import Cause, Move, Plan, Waves, make
from .score import Score


def give_back(cluster: Cluster, record: Record, settings: Settings = SETTINGS) -> Plan:
    """A plan that brings home what a drain moved away, once its host is active again; the cheapest first.

    Only what is still where the drain put it; the notes say what cannot go home and why.
    """
    validate(cluster)
    home = host_named(cluster, record.host)
    ledger = Ledger(cluster, inspect(cluster, settings.trust), settings.limits)
    score = Score(ledger, settings.weights)
    waves = Waves(settings.pace, cluster)
    number = ledger.index[record.host]
    notes, returns = [], []
    for unit in ledger.units:
        away = [workload for workload in unit.workloads if record.moved.get(workload.name) == workload.host]
        if not away or unit.host < 0:
            continue
        share = 1 / settings.pace.per_host
        costs = [predict(workload, ledger.hosts[unit.host], home, share) for workload in unit.workloads]
        returns.append((sum(cost.bytes for cost in costs), unit.name, unit, costs))
    moves: list[Move] = []
    for _, _, unit, costs in sorted(returns, key=lambda entry: entry[:2]):
        reason = unit.kept or ledger.why_not(unit, number) or over_budget(unit.workloads, costs)
        slots = None if reason else waves.take_all([(workload.host, home.name) for workload in unit.workloads])
        if slots is None:
            notes.append(f"{unit.name} does not go home now: {reason or 'enough migrations are under way'}")
            continue
        gain = score.gain(unit, unit.host, number)
        text = f"its home {home.name} is back from a drain"
        moves += moves_of(unit, home.name, Cause.RETURN, text, gain, costs, slots)
        origin = unit.host
        ledger.move(unit, number)
        score.update(origin)
        score.update(number)
    return make(cluster, moves, notes=notes)
