"""A cluster at one moment: hosts, workloads, and when it was looked at.

Everything is immutable and goes to JSON by msgspec. Units: cores, bytes, bytes per second, seconds; times are seconds
of the controller's wall clock (time(2)), so that they survive its restart. What is here is only shape:
`consistency.validate` says whether it makes sense.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from .experience import NONE, Factors

MAX_HOSTS = 100_000
MAX_WORKLOADS = 2_000_000
MAX_NAME = 255
# Labels, features or groups of one host or workload.
MAX_ENTRIES = 512


class HostState(Enum):
    """What a host may be used for."""

    ACTIVE = "active"
    # Keeps what it has, gets nothing new.
    CORDONED = "cordoned"
    # Being emptied: gets nothing new, its workloads leave.
    DRAINING = "draining"
    # Empty, and may be rebooted at any time.
    MAINTENANCE = "maintenance"
    # Not heard of; its workloads may or may not run.
    LOST = "lost"


class Resources(msgspec.Struct, frozen=True):
    """An amount of each resource: cores, bytes of memory, bytes per second of network."""

    cpu: float = 0.0
    memory: float = 0.0
    network: float = 0.0

    def __add__(self, other: Resources) -> Resources:
        return Resources(self.cpu + other.cpu, self.memory + other.memory, self.network + other.network)

    def __sub__(self, other: Resources) -> Resources:
        return Resources(self.cpu - other.cpu, self.memory - other.memory, self.network - other.network)


class Pressure(msgspec.Struct, frozen=True):
    """Pressure stall information: the share of time (0 to 1) in which some task waited for a resource.

    See Documentation/accounting/psi.rst; `some avg60` divided by 100.
    """

    cpu: float = 0.0
    memory: float = 0.0
    io: float = 0.0


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that can run workloads, as its agent last described it.

    `load` is all that is in use; `other` is the part of it that is no workload of ours (the system, what people run by
    hand). So `load` is `other` plus the workloads' `used`, or the host is not believed.
    """

    name: str
    capacity: Resources
    load: Resources = Resources()
    other: Resources = Resources()
    pressure: Pressure = Pressure()
    labels: dict[str, str] = {}
    cpu_features: frozenset[str] = frozenset()
    kernel: str = ""
    engines: frozenset[str] = frozenset()
    state: HostState = HostState.ACTIVE
    # By the host's own clock: how it differs from ours shows in it.
    observed_at: float = 0.0


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """A container on a host.

    `affinity` and `anti_affinity` name groups: workloads that share an affinity group run on one host and move
    together, workloads that share an anti-affinity group never do. `host_labels` must all be on the host it runs on.
    """

    name: str
    host: str
    used: Resources = Resources()
    # Bytes of memory written per second while it runs.
    dirty_rate: float = 0.0
    # What a migration would send, take and stop for; None where nobody has predicted it: see `cost.predict`.
    predicted_bytes: float | None = None
    predicted_downtime: float | None = None
    # What these, or the predictions of `cost.predict`, are to be multiplied by: see `experience`.
    factors: Factors = NONE
    # Longest stop that its owner accepts, seconds; None: any.
    downtime_budget: float | None = None
    labels: dict[str, str] = {}
    host_labels: dict[str, str] = {}
    # What the copy's host must have; None: all that the present host has, as programs choose code by it at their start.
    cpu_features: frozenset[str] | None = None
    affinity: tuple[str, ...] = ()
    anti_affinity: tuple[str, ...] = ()
    pinned: bool = False
    # When a migration of it last ended; None: never.
    last_moved: float | None = None
    # Where a migration under way takes it.
    moving_to: str | None = None
    # What it is worth to its owner; only compared with other workloads'.
    value: float = 1.0


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """All hosts and workloads, at `time`."""

    time: float
    hosts: tuple[Host, ...] = ()
    workloads: tuple[Workload, ...] = ()
