"""What is asked of a source, and what a host brings along that takes workloads in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from migrator.protocol import messages as m
from migrator.protocol.trees import SyncTree
from migrator.recovery.hooks import Tools
from migrator.recovery.journal import journal_directory
from migrator.session.interfaces import DestinationFactory, NetworkArrival


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """One migration, as its source was asked for it.

    migration:     its id, new
    peer:          how to reach the destination again, as given on the command line
    root:          pid of the workload's root process, 0 if not known: by it is known that it has ended by itself
    max_downtime:  seconds; None for the best that can be had
    thaw_overrun:  if the stop gets longer than `max_downtime` by more than the tolerance (prediction.latest), abort
    timeout:       seconds until it must have been decided to freeze
    freeze_limit:  seconds that the workload may stay frozen before it is given up, until COMMIT
    ask_for:       seconds to try to reach the destination after COMMIT before an operator is told
    bandwidth:     bytes/s of pre-copy, 0.0 for no cap; lifted for the last round
    cold:          no pre-copy: freeze at once, as every tool without it must
    copy_files:    carry open and mapped files along that differ there
    trees:         what is carried along as a whole, with `copy_files`
    log:           the file that a container writes its output to; carried along in any case
    fleet, token:  of the controller that wants it, for the destination to check
    verify:        have the copy looked at before it runs: see DestinationOptions
    """

    migration: str
    peer: str
    root: int = 0
    container: str = ""
    container_spec: str = ""
    max_downtime: float | None = None
    thaw_overrun: bool = False
    timeout: float = 600.0
    freeze_limit: float = 30.0
    ask_for: float = 60.0
    bandwidth: float = 0.0
    dry_run: bool = False
    cold: bool = False
    copy_files: bool = False
    trees: tuple[SyncTree, ...] = ()
    log: str = ""
    fleet: str = ""
    token: int = 0
    verify: bool = False
    journal: Path = field(default_factory=journal_directory)


@dataclass(frozen=True)
class Prepared:
    """What the host has made ready for one proposal.

    factory:  makes the engine's destination from the descriptor of the stream
    cgroup:   path or name of the cgroup that will hold the copy, known before it is built
    network:  gives the network of the container, once the copy is built; None without one
    runs:     called at the end of the session with the pid of the copy, if it was decided that it runs
    """

    factory: DestinationFactory
    cgroup: str
    network: Callable[[], NetworkArrival | None] = lambda: None
    runs: Callable[[int], None] = lambda pid: None


@dataclass(frozen=True, kw_only=True)
class DestinationSettings:
    """A host that takes workloads in.

    host_for: the facts of this host for one proposal, where they are others than `host`
    prepare:  checks that the proposal fits this host and makes it ready; raises Refused. Called on the
              engine's thread, before the source begins.
    root_of:  the directory that will be the root of a proposed workload, "" for the host's root
    log_of:   the log of a proposed container, which comes along whatever else does; "" for none
    limit:    seconds from BEGIN until the copy must have been told to run or to go
    """

    host: m.HostFacts
    prepare: Callable[[m.Propose], Prepared]
    host_for: Callable[[m.Propose], m.HostFacts] | None = None
    root_of: Callable[[m.Propose], str] = lambda proposal: ""
    log_of: Callable[[m.Propose], str] = lambda proposal: ""
    limit: float = 3600.0
    journal: Path = field(default_factory=journal_directory)
    tools: Tools = field(default_factory=Tools)

    def fitted(self, proposal: m.Propose) -> DestinationSettings:
        """With the facts of this host for one proposal."""
        return replace(self, host=self.host_for(proposal)) if self.host_for is not None else self
