"""What a fleet's controller asks of an agent: what is there, and to send something away.

Questions come outside of any migration. A controller's order carries the fleet and a fencing token; an agent that has
seen a higher one refuses (`migrator.fleet.fencing`). `rights` says what the key of whoever asks must be allowed.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from migrator.protocol.wire import Count, Features, Id, Message, Name, Rate, Seconds, Text

LISTED = 1024  # workloads in one answer

Share = Annotated[float, Meta(ge=0.0, le=1.0)]
FleetId = Annotated[str, Meta(max_length=64, pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?\Z")]
Token = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
WallTime = Annotated[float, Meta(ge=0.0, le=1e12)]  # seconds since 1970
Cores = Annotated[float, Meta(ge=0.0, le=1e6)]
Peer = Annotated[str, Meta(min_length=1, max_length=300)]
# Within what a plan is made for: one host that says nonsense must not keep a controller from planning for the others.
Capacity = Annotated[float, Meta(gt=1e-3, le=1e6)]
Memory = Annotated[int, Meta(ge=0, le=1 << 58)]
Container = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z")]


class HostReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A host at one moment, `at` by its own clock.

    cpus, memory:  its capacity for workloads: cores, bytes
    *_used:        cores, bytes, bytes per second in use, by whatever
    *_pressure:    share of the last minute in which some task waited (PSI); None where the kernel does not tell
    fenced:        the highest token seen of the fleet that asks
    """

    name: Name
    boot_id: Name
    at: WallTime
    kernel: Name
    engine: Name
    cpu_features: Features = frozenset()
    cpus: Capacity
    memory: Annotated[int, Meta(ge=1, le=1 << 58)]
    cpu_used: Cores = 0.0
    memory_used: Memory = 0
    network_used: Rate = 0.0
    cpu_pressure: Share | None = None
    memory_pressure: Share | None = None
    io_pressure: Share | None = None
    fenced: Token = 0


class WorkloadReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A container of the host; `state` as `migrator.container.describe.Row` has it.

    dirty_rate:  bytes per second that it writes to its memory; None where that was not measured
    """

    name: Container
    state: Name
    tasks: Count = 0
    cpu: Cores = 0.0
    memory: Memory = 0
    network: Rate = 0.0
    age: Seconds = 0.0
    dirty_rate: Rate | None = None
    addresses: Annotated[list[Name], Meta(max_length=64)] = []


class Observe(Message, tag="observe", frozen=True):
    """What is on this host? With a token, lower ones are refused here from now on.

    after:  the workloads whose names sort after this one
    rate:   seconds over which to measure how fast they write to memory; 0 for not at all
    """

    fleet: FleetId = ""
    token: Token = 0
    after: Name = ""
    rate: Annotated[float, Meta(ge=0.0, le=5.0)] = 0.0


class Observed(Message, tag="observed", frozen=True):
    """The answer, by name. `more`: ask again, after the last one."""

    host: HostReport
    workloads: Annotated[list[WorkloadReport], Meta(max_length=LISTED)] = msgspec.field(default_factory=list)
    more: bool = False


class Depart(Message, tag="depart", frozen=True):
    """Migrate this container to `peer`. It goes on if the link ends: ask again with `WatchDeparture`."""

    migration: Id
    workload: Name
    peer: Peer
    fleet: FleetId
    token: Token
    max_downtime: Annotated[float, Meta(ge=0.0, le=1e6)] | None = None
    timeout: Annotated[float, Meta(gt=0.0, le=1e6)] = 600.0
    bandwidth: Rate = 0.0
    copy_files: bool = False


class WatchDeparture(Message, tag="watch-departure", frozen=True):
    """What is, or was, with that migration? The answers are those to `Depart`."""

    migration: Id


class Departing(Message, tag="departing", frozen=True):
    """It is under way: the phase, bytes of stream so far, and the downtime predicted now (seconds)."""

    migration: Id
    phase: Name = ""
    bytes: Count = 0
    predicted_downtime: Seconds | None = None


class Departed(Message, tag="departed", frozen=True):
    """It is over. `outcome` as `migrator.model.Outcome`, or "unknown" for one that this agent has not heard of.

    `fate` says where the workload is.
    """

    migration: Id
    outcome: Name
    fate: Text = ""
    reason: Text = ""
    hint: Text = ""
    downtime: Seconds = 0.0
    predicted_downtime: Seconds = 0.0
    seconds: Seconds = 0.0
    bytes: Count = 0


class Save(Message, tag="save", frozen=True):
    """Checkpoint this container into the agent's storage; `end`: and end it then, else it runs on. `whole_every`: each
    so many-th one is whole, the others are increments."""

    workload: Name
    fleet: FleetId
    token: Token
    end: bool = False
    keep: Annotated[int, Meta(ge=0, le=100_000)] = 0  # only so many of this workload afterwards; 0 for all
    whole_every: Annotated[int, Meta(ge=1, le=1000)] = 1


class Saved(Message, tag="saved", frozen=True):
    """The checkpoint is whole and durable. `image`: its name in the storage."""

    workload: Name
    image: Name
    bytes: Count = 0


class Images(Message, tag="images", frozen=True):
    """Which checkpoints are in this host's storage? Of one workload, if it is named."""

    workload: Name = ""


class ImageReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A checkpoint in a host's storage; `at` by that host's clock. `base`: the whole one that it is an increment to."""

    workload: Name
    image: Name
    at: WallTime
    bytes: Count = 0
    base: Name = ""


class ImageList(Message, tag="image-list", frozen=True):
    """The newest first."""

    images: Annotated[list[ImageReport], Meta(max_length=4096)] = msgspec.field(default_factory=list)


class Revive(Message, tag="revive", frozen=True):
    """Restart a container from a checkpoint in this host's storage."""

    image: Name
    fleet: FleetId
    token: Token


class Revived(Message, tag="revived", frozen=True):
    """It runs, with that pid of its process 1."""

    image: Name
    pid: Count


Request = Observe | Depart | WatchDeparture | Save | Images | Revive
Answer = Observed | Departing | Departed | Saved | ImageList | Revived


def right(request: Request) -> str:
    """What the key of whoever asks must be allowed."""
    if isinstance(request, Observe):
        return "send" if request.token else "observe"
    return "observe" if isinstance(request, WatchDeparture | Images) else "send"
