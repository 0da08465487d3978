"""Prometheus metrics of a controller; `docs/metrics.md` lists them. Labels have few values, all known beforehand."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from migrator.fleet import records as r
from migrator.fleet.cluster import Seen
from migrator.fleet.controller import Controller
from migrator.metrics import DOWNTIME_BUCKETS, serve_registry
from policies.drain import State
from policies.model import HostState
from policies.plan import Cause

_CAUSES = tuple(cause.value for cause in Cause)
_RATIO_BUCKETS = (0.01, 0.03, 0.1, 0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0, 10.0)


class ControllerMetrics:
    """What the controller tells after each round and each move."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = own = registry if registry is not None else CollectorRegistry()
        self._leads = Gauge("migrator_controller_leads", "1 while this controller leads.", registry=own)
        self._round = Gauge(
            "migrator_controller_round_timestamp_seconds", "When the last round ended, since 1970.", registry=own
        )
        self._imbalance = Gauge(
            "migrator_fleet_imbalance_ratio",
            "How unevenly the fleet is loaded: 0 is even, 0.1 that hosts are typically 10 points off the mean.",
            registry=own,
        )
        self._hosts = Gauge("migrator_fleet_hosts", "Hosts by state.", ["state"], registry=own)
        self._workloads = Gauge("migrator_fleet_workloads", "Containers on all hosts.", registry=own)
        self._under_way = Gauge("migrator_fleet_moves_in_flight", "Moves under way.", registry=own)
        self._drains = Gauge("migrator_fleet_drains", "Drains by state.", ["state"], registry=own)
        self._moves = Counter(
            "migrator_fleet_moves_total", "Moves that have ended, by cause and outcome.", ["cause", "outcome"],
            registry=own,
        )  # fmt: skip
        self._bytes = Counter("migrator_fleet_moved_bytes_total", "Bytes on the wire for moves.", registry=own)
        self._downtime = Histogram(
            "migrator_fleet_move_downtime_seconds",
            "Downtime of moves, as predicted when they were planned and as achieved.",
            ["kind"],
            buckets=DOWNTIME_BUCKETS,
            registry=own,
        )
        self._ratio = Histogram(
            "migrator_fleet_move_downtime_ratio",
            "Achieved downtime over the predicted one: above 1 the prediction was too good.",
            buckets=_RATIO_BUCKETS,
            registry=own,
        )
        self._sent_ratio = Histogram(
            "migrator_fleet_move_bytes_ratio",
            "Bytes that a move sent over the predicted ones: above 1 the prediction was too good.",
            buckets=_RATIO_BUCKETS,
            registry=own,
        )
        for state in HostState:
            self._hosts.labels(state.value)
        for drain in State:
            self._drains.labels(drain.value)
        for cause in _CAUSES:
            for outcome in r.Outcome:
                self._moves.labels(cause, outcome.value)

    def observe(self, controller: Controller, seen: Seen) -> None:
        """After a round."""
        cluster = seen.cluster
        self._leads.set(controller.lock is not None)
        self._round.set(time.time())
        self._imbalance.set(controller.imbalance)
        self._workloads.set(len(cluster.workloads))
        self._under_way.set(len(controller.mover.busy) if controller.mover is not None else 0)
        for state in HostState:
            self._hosts.labels(state.value).set(sum(host.state is state for host in cluster.hosts))
        drains = [one.drain.record.state for one in controller.observer.known.cordons.values() if one.drain is not None]
        for drain in State:
            self._drains.labels(drain.value).set(sum(state is drain for state in drains))

    def follows(self) -> None:
        """It does not lead, any more or yet."""
        self._leads.set(0)

    def finished(self, finished: r.FinishedMove) -> None:
        """After a move."""
        cause = finished.move.cause if finished.move.cause in _CAUSES else Cause.BALANCE.value
        self._moves.labels(cause, finished.outcome.value).inc()
        self._bytes.inc(finished.bytes)
        if finished.outcome is r.Outcome.MIGRATED and finished.bytes and finished.move.predicted_bytes:
            self._sent_ratio.observe(finished.bytes / finished.move.predicted_bytes)
        if finished.outcome is r.Outcome.MIGRATED and finished.downtime:
            self._downtime.labels("predicted").observe(finished.move.predicted_downtime)
            self._downtime.labels("achieved").observe(finished.downtime)
            if finished.move.predicted_downtime:
                self._ratio.observe(finished.downtime / finished.move.predicted_downtime)

    def serve(self, address: str) -> None:
        """Over HTTP on ADDRESS:PORT. Raises UsageError."""
        serve_registry(self.registry, address)
