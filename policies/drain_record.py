"""A drain as it is stored, and what a step of it says to do: values, no decisions."""

from __future__ import annotations

from enum import Enum

import msgspec

from migrator.errors import MigratorError
from migrator.text import duration

from .consistency import Trust
from .cost import Cost
from .ledger import Limits, Unit
from .model import Cluster, Host, Workload
from .plan import Cause, Move, Pace
from .score import Weights


class DrainError(MigratorError):
    """A drain that makes no sense. Nothing was moved."""

    exit_code = 2


class AtDeadline(Enum):
    """What becomes of what is left at the deadline."""

    # Nothing more is begun; what is left stays, and runs.
    STOP = "stop"
    # Downtime budgets, risk and spare room count no longer; rules do.
    FORCE = "force"
    # Checkpoint to storage, then end.
    SAVE = "save"


class State(Enum):
    RUNNING = "running"
    EMPTY = "empty"
    STAYS = "stays"
    CANCELLED = "cancelled"


class Attempt(msgspec.Struct, frozen=True):
    """Migrations of a workload that failed: how many, when the last one, and why."""

    count: int
    at: float
    reason: str


class Started(msgspec.Struct, frozen=True):
    """A migration that was asked for: the target, when, and for how many seconds it was predicted."""

    target: str
    at: float
    seconds: float


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A drain as it is stored. `moved`: where each workload that left is now; `ended`: those that are nowhere."""

    host: str
    began_at: float
    deadline: float | None = None
    at_deadline: AtDeadline = AtDeadline.STOP
    parallel: int = 2
    evacuate: bool = False
    state: State = State.RUNNING
    wanted: tuple[str, ...] = ()
    started: dict[str, Started] = {}
    moved: dict[str, str] = {}
    ended: tuple[str, ...] = ()
    failed: dict[str, Attempt] = {}
    saving: tuple[str, ...] = ()
    # Seconds predicted for what has been moved: with the time that passed, how good predictions are.
    predicted_seconds: float = 0.0
    changed_at: float = 0.0
    ended_at: float | None = None


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How patient a drain is.

    `attempts`: how often a workload is tried, each time `backoff` seconds longer after the last. `grace`: seconds after
    which a migration that was asked for and is not seen has failed. `reserve`: the share of an evacuation's time that
    is not planned with.
    """

    attempts: int = 3
    backoff: float = 10.0
    grace: float = 30.0
    reserve: float = 0.1
    max_risk: float = 0.8
    pace: Pace = Pace(total=64, per_host=4)
    weights: Weights = Weights()
    limits: Limits = Limits()
    trust: Trust = Trust()


class Cordon(msgspec.Struct, frozen=True, tag=True):
    """Set the host's state to draining, so that nothing new comes."""

    host: str


class Start(msgspec.Struct, frozen=True, tag=True):
    """Begin a migration; `force`: without a limit of its downtime."""

    move: Move
    force: bool = False


class Save(msgspec.Struct, frozen=True, tag=True):
    """Checkpoint the workload to storage and end it."""

    workload: str


class Release(msgspec.Struct, frozen=True, tag=True):
    """The host is verified to be empty: set its state to maintenance."""

    host: str


Action = Cordon | Start | Save | Release


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a drain is: workloads, bytes left to send, and when it will be over as far as one can say."""

    total: int
    done: int
    running: int
    left: int
    bytes_left: float
    ends_at: float | None


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What to do next. `stays`: what is on the host and will not move as things are, each with the reason."""

    record: Record
    actions: tuple[Action, ...]
    progress: Progress
    stays: dict[str, str]


SETTINGS = Settings()


def host_named(cluster: Cluster, name: str) -> Host:
    host = next((host for host in cluster.hosts if host.name == name), None)
    if host is None:
        raise DrainError(f"host {name} is not known", hint="see `migrator hosts`")
    return host


def over_budget(workloads: tuple[Workload, ...], costs: list[Cost]) -> str:
    for workload, cost in zip(workloads, costs, strict=True):
        budget = workload.downtime_budget
        if budget is not None and cost.downtime > budget:
            return f"{workload.name} would stop for {duration(cost.downtime)}, its budget is {duration(budget)}"
    return ""


def moves_of(
    unit: Unit, target: str, cause: Cause, reason: str, gain: float, costs: list[Cost], slots: list[int]
) -> list[Move]:
    return [
        Move(
            workload=workload.name,
            source=workload.host,
            target=target,
            cause=cause,
            reason=reason,
            gain=gain / len(unit.workloads),
            cost=cost,
            bundle=unit.name if len(unit.workloads) > 1 else "",
            wave=slot,
        )
        for workload, cost, slot in zip(unit.workloads, costs, slots, strict=True)
    ]
