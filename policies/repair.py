"""Rules that the present placement breaks: somebody changed a label, or placed by hand."""

from __future__ import annotations

from collections.abc import Iterator

from .ledger import Ledger, Unit
from .model import HostState


def broken(ledger: Ledger) -> Iterator[tuple[Unit, str]]:
    """Units that must move for the rules to hold again, each with the rule; only those on hosts that are in use."""
    first: dict[tuple[int, str], Unit] = {}
    for unit in ledger.units:
        if unit.host < 0:
            yield unit, f"{', '.join(sorted(workload.name for workload in unit.workloads)[:5])} should share a host"
            continue
        if ledger.hosts[unit.host].state is not HostState.ACTIVE:
            continue
        if unit.groups:
            other = next((first[unit.host, group] for group in unit.groups if (unit.host, group) in first), None)
            if other is not None:
                # Of the two, the one that costs less to move, unless it may not.
                leaves = min(unit, other, key=lambda one: (bool(one.kept), one.memory, one.name))
                stays = other if leaves is unit else unit
                for group in stays.groups:
                    first[unit.host, group] = stays
                yield leaves, f"{unit.name} and {other.name} should not share host {ledger.hosts[unit.host].name}"
                continue
            for group in unit.groups:
                first[unit.host, group] = unit
        if any(workload.host_labels for workload in unit.workloads):
            labels = ledger.hosts[unit.host].labels
            for workload in unit.workloads:
                missing = [f"{key}={value}" for key, value in workload.host_labels.items() if labels.get(key) != value]
                if missing:
                    yield unit, f"{workload.name} should be on a host labelled {', '.join(sorted(missing))}"
                    break
