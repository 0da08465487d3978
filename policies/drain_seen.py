"""How a drain's record changes: begun, what was seen of the cluster since, failures, given up."""

from __future__ import annotations

import msgspec

from .consistency import validate
from .drain_record import AtDeadline, Attempt, DrainError, Record, State, host_named
from .model import Cluster, HostState


def begin(
    cluster: Cluster,
    host: str,
    *,
    seconds: float | None = None,
    at_deadline: AtDeadline = AtDeadline.STOP,
    parallel: int = 2,
    evacuate: bool = False,
) -> Record:
    """The record of a new drain, `seconds` being the time it has. Raises `DrainError`, `ClusterError`."""
    validate(cluster)
    found = host_named(cluster, host)
    if found.state is HostState.LOST:
        raise DrainError(f"host {host} is lost: nothing can be moved off it", hint="recover its workloads instead")
    if evacuate and seconds is None:
        raise DrainError("an evacuation needs the seconds that are left")
    if parallel < 1 or (seconds is not None and not seconds > 0):
        raise DrainError(f"{parallel} migrations at once, {seconds} seconds: both must be more than 0")
    return Record(
        host=host,
        began_at=cluster.time,
        deadline=None if seconds is None else cluster.time + seconds,
        at_deadline=at_deadline,
        parallel=parallel,
        evacuate=evacuate,
        wanted=tuple(workload.name for workload in cluster.workloads if workload.host == host),
        changed_at=cluster.time,
    )


def failed(record: Record, workload: str, reason: str, time: float) -> Record:
    """The record after a migration, or a checkpoint, that failed: the workload runs on the host as before."""
    count = record.failed[workload].count + 1 if workload in record.failed else 1
    return msgspec.structs.replace(
        record,
        failed={**record.failed, workload: Attempt(count, time, reason)},
        started={name: started for name, started in record.started.items() if name != workload},
        saving=tuple(name for name in record.saving if name != workload),
    )


def cancel(record: Record, time: float) -> Record:
    """The record of a drain that is given up: what has moved stays where it is (`give_back` brings it home)."""
    if record.state is not State.RUNNING:
        return record
    return msgspec.structs.replace(record, state=State.CANCELLED, ended_at=time)


def seen(cluster: Cluster, record: Record, grace: float) -> Record:
    """The record with what the cluster shows: departures, ends, migrations that never began."""
    now = cluster.time
    here = {workload.name: workload for workload in cluster.workloads if workload.host == record.host}
    at = {workload.name: workload.host for workload in cluster.workloads}
    wanted = record.wanted + tuple(name for name in here if name not in record.wanted)
    moved, ended, started = dict(record.moved), set(record.ended), dict(record.started)
    changed, predicted = record.changed_at, record.predicted_seconds
    for name in wanted:
        if name in here:
            if name in moved or name in ended:  # it came back
                moved.pop(name, None)
                ended.discard(name)
            continue
        if name not in moved and name not in ended:
            changed = now
        if name in at:
            moved.setdefault(name, at[name])
            ended.discard(name)
        elif name not in moved:
            ended.add(name)
        if name in started:
            predicted += started.pop(name).seconds
    record = msgspec.structs.replace(
        record,
        wanted=wanted,
        moved=moved,
        ended=tuple(name for name in wanted if name in ended),
        started=started,
        saving=tuple(name for name in record.saving if name in here),
        changed_at=changed,
        predicted_seconds=predicted,
    )
    for name, start in started.items():
        if here[name].moving_to is None and now - start.at > grace:
            record = failed(record, name, f"its migration to {start.target} was asked for and never seen", now)
    return record
