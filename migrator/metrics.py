"""Prometheus metrics of migrations, attached to the event hook of a session; `docs/metrics.md` lists them.

    on_event = serve_metrics("127.0.0.1:9477")     # an agent: over HTTP
    metrics = Metrics(); ...; metrics.write(path)   # a command: for the node exporter's textfile collector

Names and units follow the conventions of Prometheus: base units, `_total` for counters. Labels have few
values, all of them known beforehand: no names, pids or ids.
"""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, write_to_textfile

from migrator import metrics_port, model
from migrator.errors import UsageError
from migrator.model import OnEvent, Outcome, Where

DOWNTIME_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_PHASE_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_TOTAL_BUCKETS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
_SIZE_BUCKETS = tuple(float(1 << shift) for shift in range(20, 42, 2))

_MOST_PHASES = 64

# What an outcome's reason is filed under: the first that is found in it.
_REASONS = (
    ("cancelled", r"^cancelled|being stopped"),
    ("timeout", r"timeout|was not ready within|no verdict|nothing came"),
    ("downtime", r"over the max downtime"),
    ("files", r"is missing on|another build|other contents|cannot be copied|cannot be written"),
    ("pids", r"^pid \d+: is taken"),
    ("processor", r"^processor of"),
    ("memory", r"^memory of|Cannot allocate"),
    ("link", r"closed the connection|is closed|link|route|[Cc]onnection|reach"),
    ("image", r"stream|record|trailer"),
)


class Metrics:
    """An observer for `on_event`. Sessions of both sides may share one."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        own = self.registry
        self._in_flight = Gauge("migrator_migrations_in_flight", "Migrations under way, on either side.", registry=own)
        self._ended = Counter(
            "migrator_migrations_total",
            "Migrations that have ended, by side, outcome and kind of reason.",
            ["side", "outcome", "reason"],
            registry=own,
        )
        self._downtime = Histogram(
            "migrator_downtime_seconds",
            "From the freeze on the source to the first instruction on the destination.",
            ["side"],
            buckets=DOWNTIME_BUCKETS,
            registry=own,
        )
        self._first_packet = Histogram(
            "migrator_first_packet_seconds",
            "From the freeze to the first packet that the programs of a container sent on the destination.",
            buckets=DOWNTIME_BUCKETS,
            registry=own,
        )
        self._error = Histogram(
            "migrator_downtime_excess_seconds",
            "By how much the downtime was longer than predicted; 0 where it was shorter.",
            buckets=DOWNTIME_BUCKETS,
            registry=own,
        )
        self._accuracy = Histogram(
            "migrator_downtime_prediction_ratio",
            "Downtime by predicted downtime: 1 where the prediction was right.",
            buckets=_RATIO_BUCKETS,
            registry=own,
        )
        self._duration = Histogram(
            "migrator_migration_duration_seconds",
            "From the request to the end.",
            ["side"],
            buckets=_TOTAL_BUCKETS,
            registry=own,
        )
        self._phases: set[str] = set()  # names that are labels
        self._phase = Histogram(
            "migrator_downtime_phase_seconds",
            "Parts of the downtime; those of one migration add up to it.",
            ["phase", "where"],
            buckets=_PHASE_BUCKETS,
            registry=own,
        )
        self._rounds = Histogram(
            "migrator_precopy_rounds",
            "Rounds of pre-copy that a migration took.",
            ["side"],
            buckets=(1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30),
            registry=own,
        )
        self._round_bytes = Counter(
            "migrator_round_bytes_total",
            "Bytes of stream in rounds, before compression.",
            ["side", "kind"],
            registry=own,
        )
        self._round_pages = Counter(
            "migrator_round_pages_total",
            "Pages of 4096 bytes in rounds: with contents, or announced as zero.",
            ["side", "kind", "content"],
            registry=own,
        )
        self._stream = Counter(
            "migrator_stream_bytes_total", "Bytes of whole streams, before compression.", ["side"], registry=own
        )
        self._wire = Counter("migrator_wire_bytes_total", "Bytes on the wire.", ["side"], registry=own)
        self._size = Histogram(
            "migrator_stream_size_bytes", "Size of a migration's stream.", ["side"], buckets=_SIZE_BUCKETS, registry=own
        )
        self._ratio = Gauge(
            "migrator_compression_ratio",
            "Bytes before compression per byte after, last migration.",
            ["side"],
            registry=own,
        )
        self._dirty = Gauge(
            "migrator_dirty_rate_bytes_per_second",
            "Memory written by the workload, as the last round has seen it.",
            ["side"],
            registry=own,
        )
        self._throughput = Gauge(
            "migrator_throughput_bytes_per_second", "Stream that the link takes, last round.", ["side"], registry=own
        )
        self._predicted = Gauge(
            "migrator_predicted_downtime_seconds", "If it were frozen after the last round.", ["side"], registry=own
        )

    def observer(self, side: Where) -> OnEvent:
        """An observer for the sessions of one side."""

        def observe(event: model.Event) -> None:
            self.observe(event, side)

        return observe

    def __call__(self, event: model.Event) -> None:
        """An observer for an agent: its sessions are destinations."""
        self.observe(event, Where.DESTINATION)

    def observe(self, event: model.Event, side: Where) -> None:
        if isinstance(event, model.Started):
            self._in_flight.inc()
        elif isinstance(event, model.RoundDone):
            self._round(event, side.value)
        elif isinstance(event, model.Ended):
            self._in_flight.dec()
            self._end(event.result, event.where.value)

    def write(self, path: Path) -> None:
        """Write all of it in the text format, at once."""
        write_to_textfile(str(path), self.registry)

    def _round(self, event: model.RoundDone, side: str) -> None:
        done = event.round
        kind = "first" if done.number == 1 else "repeated"
        self._round_bytes.labels(side, kind).inc(done.bytes)
        self._round_pages.labels(side, kind, "data").inc(done.pages)
        self._round_pages.labels(side, kind, "zero").inc(done.zero_pages)
        self._dirty.labels(side).set(done.dirty_rate * 4096)
        self._throughput.labels(side).set(event.throughput)
        self._predicted.labels(side).set(event.predicted_downtime)

    def _end(self, result: model.MigrationResult, side: str) -> None:
        self._ended.labels(side, result.outcome.value, reason_of(result)).inc()
        self._duration.labels(side).observe(result.total)
        if result.stream_bytes:
            self._stream.labels(side).inc(result.stream_bytes)
            self._wire.labels(side).inc(result.wire_bytes)
            self._size.labels(side).observe(result.stream_bytes)
            self._ratio.labels(side).set(result.compression_ratio)
        if result.outcome is not Outcome.MIGRATED:
            return
        self._rounds.labels(side).observe(len(result.rounds))
        if result.downtime:
            self._downtime.labels(side).observe(result.downtime)
        if result.first_packet:
            self._first_packet.observe(result.first_packet)
        if result.predicted_downtime:
            self._error.observe(max(result.downtime - result.predicted_downtime, 0.0))
            self._accuracy.observe(result.downtime / result.predicted_downtime)
        if result.timeline is not None:
            for (phase, where), seconds in phases_of(result.timeline).items():
                self._phase.labels(self._label(phase), where).observe(seconds)

    def _label(self, phase: str) -> str:
        """The other host names its phases as it likes: only the first names are labels of their own."""
        if len(self._phases) < _MOST_PHASES:
            self._phases.add(phase)
        return phase if phase in self._phases else "other"


def phases_of(timeline: model.Timeline) -> dict[tuple[str, str], float]:
    """(phase, where) -> seconds of the downtime, repeated ones added up."""
    found: dict[tuple[str, str], float] = {}
    for part in timeline.downtime_parts():
        key = re.sub(r"[^a-z]+", "_", part.name.lower()).strip("_"), part.where.value
        found[key] = found.get(key, 0.0) + part.seconds
    return found


def reason_of(result: model.MigrationResult) -> str:
    """One word of a small set for why it ended so."""
    if result.outcome in (Outcome.MIGRATED, Outcome.DRY_RUN):
        return "none"
    for word, pattern in _REASONS:
        if re.search(pattern, result.reason):
            return word
    return "other"


def serve_metrics(address: str) -> OnEvent:
    """Serve metrics over HTTP at "ADDRESS:PORT", from a thread of its own, until the program ends; returns the
    observer for an agent. Raises UsageError where that cannot be listened on."""
    metrics = Metrics()
    serve_registry(metrics.registry, address)
    return metrics


def serve_registry(registry: CollectorRegistry, address: str) -> None:
    """Serve what is in it at "ADDRESS:PORT", from a thread of its own. Raises UsageError."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise UsageError(f"{address!r} is no ADDRESS:PORT", hint="such as 127.0.0.1:9477")
    try:
        metrics_port.listen(host.strip("[]") or "0.0.0.0", int(port), registry)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot serve metrics at {address}: {error}") from error
