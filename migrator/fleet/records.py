"""The typed records of a fleet's state. What is not in them, or out of its bounds, is refused.

Times are seconds since 1970 by the clock of whoever wrote them, for people and for cooldowns; whether a host is
alive is told by its lease, never by a clock.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec
from msgspec import Meta

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


class AtDeadline(Enum):
    """What to do with what is still on a host when its drain's time is up."""

    STOP = "stop"
    FORCE = "force"
    SAVE = "save"


class MovedAway(Record, frozen=True, kw_only=True):
    """A workload that a drain moved, so that it can be brought back."""

    workload: Name
    destination: Name


class Drain(Record, frozen=True, kw_only=True):
    """A drain as it was asked for and how far it has come; whoever leads next goes on from here."""

    started_at: Seconds
    deadline: Seconds = 0.0  # 0 for none
    at_deadline: AtDeadline = AtDeadline.STOP
    parallel: Annotated[int, Meta(ge=1, le=1000)] = 2
    evacuate: bool = False
    bring_back: bool = False
    moved: Annotated[tuple[MovedAway, ...], Meta(max_length=10_000)] = ()
    stayed: Annotated[dict[Name, Text], Meta(max_length=10_000)] = {}  # workload -> why


class Cordon(Record, frozen=True, kw_only=True):
    """Why a host takes no new workloads, and who said so."""

    host: Name
    mode: HostMode
    since: Seconds
    by: ShortText = ""
    reason: Text = ""
    drain: Drain | None = None


class PlannedMove(Record, frozen=True, kw_only=True):
    """One move of a plan, with why, what it brings and what it costs."""

    workload: Name
    source: Name
    destination: Name
    reason: Text
    gain: Number = 0.0
    bytes: Count = 0
    seconds: Seconds = 0.0
    downtime: Seconds = 0.0
    risk: Share = 0.0


class PlanState(Enum):
    PROPOSED = "proposed"
    APPROVED = "approved"
    RUNNING = "running"
    DONE = "done"
    REJECTED = "rejected"
    STALE = "stale"


class Plan(Record, frozen=True, kw_only=True):
    """Moves that belong together. `seen` is the revision of the state that it was made from."""

    id: Id
    made_at: Seconds
    state: PlanState
    seen: Count
    moves: Annotated[tuple[PlannedMove, ...], Meta(max_length=2000)]
    why: Text = ""
    by: ShortText = ""
    imbalance_before: Number = 0.0
    imbalance_after: Number = 0.0


class Move(Record, frozen=True, kw_only=True):
    """A move under way: there is at most one of a workload. `token` is that of the controller that began it."""

    workload: Name
    source: Name
    destination: Name
    migration: Id
    token: Positive
    started_at: Seconds
    plan: MaybeId = ""
    drain_of: MaybeName = ""
    reason: Text = ""
    predicted_downtime: Seconds = 0.0
    predicted_bytes: Count = 0
    predicted_seconds: Seconds = 0.0


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


class SnapshotSchedule(Record, frozen=True, kw_only=True):
    """Periodic checkpoints of a workload into `directory`: every `full_every`-th is a full one."""

    workload: Name
    every: Annotated[float, Meta(ge=1.0, le=31_536_000.0)]  # seconds
    directory: Path
    full_every: Annotated[int, Meta(ge=1, le=1000)] = 1
    keep: Annotated[int, Meta(ge=1, le=100_000)] = 10
    restart_when_lost: bool = False


class Snapshot(Record, frozen=True, kw_only=True):
    """A checkpoint that was taken. An incremental one needs `parent`, "" for a full one."""

    id: Id
    workload: Name
    host: Name
    at: Seconds
    path: Path
    bytes: Count
    parent: MaybeId = ""


class Mode(Enum):
    OFF = "off"
    RECOMMEND = "recommend"
    AUTOMATIC = "automatic"


class Window(Record, frozen=True, kw_only=True):
    """When the controller may move by itself: days 0 (Monday) to 6, minutes of the day in UTC, end exclusive;
    one that ends before it begins goes over midnight."""

    days: Annotated[frozenset[Annotated[int, Meta(ge=0, le=6)]], Meta(min_length=1)]
    start: Annotated[int, Meta(ge=0, lt=1440)]
    end: Annotated[int, Meta(ge=0, le=1440)]


class Settings(Record, frozen=True, kw_only=True):
    """How the fleet is balanced."""

    mode: Mode = Mode.RECOMMEND
    interval: Annotated[float, Meta(ge=1.0, le=86400.0)] = 30.0  # seconds between rounds
    threshold: Share = 0.3
    margin: Share = 0.1
    hold_rounds: Annotated[int, Meta(ge=1, le=1000)] = 3
    cooldown: Annotated[float, Meta(ge=0.0, le=31_536_000.0)] = 600.0  # seconds after a move of the same workload
    moves_per_host: Annotated[int, Meta(ge=1, le=1000)] = 1
    moves_in_all: Annotated[int, Meta(ge=1, le=10_000)] = 4
    windows: Annotated[tuple[Window, ...], Meta(max_length=100)] = ()  # none: always
