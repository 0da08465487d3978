"""What a host brings along that takes workloads in; see `migrator.session.destination`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from migrator.container.spec import ContainerSpec
from migrator.protocol import messages as m
from migrator.recovery.journal import journal_directory
from migrator.recovery.settle import Tools
from migrator.session.interfaces import DestinationFactory, NetworkArrival


@dataclass(frozen=True)
class Prepared:
    """What the host has made ready for one proposal.

    factory:  makes the engine's destination from the descriptor of the stream
    cgroup:   path or name of the cgroup that will hold the copy, known before it is built
    arrival:  gives the network of the container, once the copy is built; None without one
    cleanup:  called on the engine's thread when the copy was discarded
    """

    factory: DestinationFactory
    cgroup: str
    arrival: Callable[[], NetworkArrival | None] = lambda: None
    cleanup: Callable[[], None] = lambda: None


def _root_of(proposal: m.Propose) -> str:
    """The root directory of a container; plain subtrees have the host's."""
    return ContainerSpec.from_json(proposal.container_spec).root if proposal.container_spec else ""


@dataclass(frozen=True, kw_only=True)
class DestinationSettings:
    """A host that takes workloads in.

    prepare:  checks that the proposal fits this host and makes it ready; raises Refused. Called on the
              engine's thread, before the source begins.
    root_of:  the directory that will be the root of a proposed workload, "" for the host's root
    limit:    seconds from BEGIN until the copy must have been told to run or to go
    """

    host: m.HostFacts
    prepare: Callable[[m.Propose], Prepared]
    root_of: Callable[[m.Propose], str] = _root_of
    limit: float = 3600.0
    journal: Path = field(default_factory=journal_directory)
    tools: Tools = field(default_factory=Tools)
