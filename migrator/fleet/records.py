"""The typed records of a fleet's state. What is not in them, or out of its bounds, is refused.

Times are seconds since 1970 by the clock of whoever wrote them, for people and for cooldowns; whether a host is
alive is told by its lease, never by a clock.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec
from msgspec import Meta

from policies import balance as policy_balance
from policies import drain_record
from policies import plan as policy_plan
from policies.experience import NONE, Factors

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")]
Id = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
MaybeId = Annotated[str, Meta(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?\Z")]
MaybeName = Annotated[str, Meta(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,62})?\Z")]
Text = Annotated[str, Meta(max_length=4096)]
ShortText = Annotated[str, Meta(max_length=256)]
Path = Annotated[str, Meta(max_length=4096, pattern="^/")]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Positive = Annotated[int, Meta(ge=1, le=1 << 53)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e12)]
Number = Annotated[float, Meta(ge=-1e15, le=1e15)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Names = Annotated[tuple[Name, ...], Meta(max_length=4096)]
Texts = Annotated[tuple[ShortText, ...], Meta(max_length=4096)]
Labels = Annotated[dict[Name, ShortText], Meta(max_length=256)]


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all records."""


class Fleet(Record, frozen=True, kw_only=True):
    """Which fleet this store is of. A store that is made anew is another fleet: its tokens begin at 1 again."""

    id: Id
    made_at: Seconds


class Host(Record, frozen=True, kw_only=True):
    """A host as it was registered, and what it said about itself then."""

    name: Name
    address: ShortText
    port: Port = 7022
    cpus: Positive
    memory_bytes: Positive
    labels: Labels = {}
    cpu_features: Texts = ()
    kernel: ShortText = ""
    engines: Texts = ()
    registered_at: Seconds


class Load(Record, frozen=True, kw_only=True):
    """What is in use on a host: cores, bytes of memory, bytes per second on its network; and the shares of time in
    which some task waited for a resource (PSI, `some avg60`), None where the kernel does not tell."""

    cpu: Annotated[float, Meta(ge=0.0, le=1e6)] = 0.0
    memory: Count = 0
    network: Annotated[float, Meta(ge=0.0, le=1e15)] = 0.0
    cpu_pressure: Share | None = None
    memory_pressure: Share | None = None
    io_pressure: Share | None = None


class Alive(Record, frozen=True, kw_only=True):
    """Lives under the lease of its host: while it is there, the host is."""

    host: Name
    boot_id: ShortText
    at: Seconds
    load: Load = Load()


class HostMode(Enum):
    """What a host is kept from. A host without a record takes workloads; one that is lost has no `Alive`."""

    CORDONED = "cordoned"
    DRAINING = "draining"
    MAINTENANCE = "maintenance"


class Drain(Record, frozen=True, kw_only=True):
    """A drain: the policy's own record, from which whoever leads next goes on, and what its last step had to say.

    stays: what is on the host and will not move as things are, each with the reason
    """

    record: drain_record.Record
    bring_back: bool = False
    progress: drain_record.Progress | None = None
    stays: dict[str, Text] = {}
    updated_at: Seconds = 0.0


class Cordon(Record, frozen=True, kw_only=True):
    """Why a host takes no new workloads, and who said so."""

    host: Name
    mode: HostMode
    since: Seconds
    by: ShortText = ""
    reason: Text = ""
    drain: Drain | None = None


class PlanState(Enum):
    PROPOSED = "proposed"
    APPROVED = "approved"
    RUNNING = "running"
    DONE = "done"
    REJECTED = "rejected"
    STALE = "stale"


class Plan(Record, frozen=True, kw_only=True):
    """A plan of the policies, and what became of it.

    failed:    the moves that did not come about, by workload, with the reason
    achieved:  the imbalance that was observed when its last move had ended; `plan.predicted` is to be held against it
    """

    id: Id
    state: PlanState
    plan: policy_plan.Plan
    by: ShortText = ""
    why: Text = ""
    failed: dict[str, Text] = {}
    achieved: Number | None = None
    changed_at: Seconds = 0.0


class Move(Record, frozen=True, kw_only=True):
    """A move under way: there is at most one of a workload. `token` is that of the controller that began it; `factors`
    are those of experience in what was predicted."""

    workload: Name
    source: Name
    destination: Name
    migration: Id
    token: Positive
    started_at: Seconds
    plan: MaybeId = ""
    drain_of: MaybeName = ""
    cause: ShortText = ""
    reason: Text = ""
    predicted_downtime: Seconds = 0.0
    predicted_bytes: Count = 0
    predicted_seconds: Seconds = 0.0
    factors: Factors = NONE


class Outcome(Enum):
    MIGRATED = "migrated"
    REFUSED = "refused"
    ABORTED = "aborted"
    UNDECIDED = "undecided"


class FinishedMove(Record, frozen=True, kw_only=True):
    """What came of a move: predicted in `move`, achieved here."""

    move: Move
    outcome: Outcome
    ended_at: Seconds
    why: Text = ""
    downtime: Seconds = 0.0
    bytes: Count = 0
    seconds: Seconds = 0.0


class Rule(Record, frozen=True, kw_only=True):
    """What its owner wants for a workload; see `policies.model.Workload`."""

    workload: Name
    labels: Labels = {}
    host_labels: Labels = {}
    affinity: Names = ()
    anti_affinity: Names = ()
    pinned: bool = False
    downtime_budget: Seconds | None = None
    value: Seconds = 1.0


WHOLE_EVERY = 10


class SnapshotSchedule(Record, frozen=True, kw_only=True):
    """Periodic checkpoints of a workload into the storage of its host.

    whole_every:       each so many-th one is whole, the others are increments
    restart_when_lost: if its host is lost, whoever says that it is off has the newest one restarted elsewhere
    host, last_at:     where and when the last one was taken
    """

    workload: Name
    every: Annotated[float, Meta(ge=1.0, le=31_536_000.0)]  # seconds
    keep: Annotated[int, Meta(ge=1, le=100_000)] = 10
    whole_every: Annotated[int, Meta(ge=1, le=1000)] = WHOLE_EVERY
    restart_when_lost: bool = False
    host: MaybeName = ""
    last_at: Seconds = 0.0
    last_error: Text = ""


class Mode(Enum):
    OFF = "off"
    RECOMMEND = "recommend"
    AUTOMATIC = "automatic"


class Settings(Record, frozen=True, kw_only=True):
    """How the fleet is balanced: whether, every how many seconds it is looked at, and the policy's own settings."""

    mode: Mode = Mode.RECOMMEND
    interval: Annotated[float, Meta(ge=1.0, le=86400.0)] = 30.0
    balance: policy_balance.Settings = policy_balance.SETTINGS
