"""What a host says to one proposal: its preflight, and the files that come with it.

All of it on a thread of its own. A peer may ask for much; stop() ends it between two reads.
"""

from __future__ import annotations

import threading

from migrator.errors import MigratorError
from migrator.filesync.receiver import FileReceiver
from migrator.protocol import messages as m
from migrator.protocol.trees import SyncTree, TreeAnswer, TreeList, TreeOps
from migrator.runtime.thread import OwnThread
from migrator.session import preflight
from migrator.session.file_facts import collect_files
from migrator.session.settings import DestinationSettings


class Admission:
    """`files` are those that the source sends along. Raises what `FileReceiver` raises."""

    def __init__(self, proposal: m.Propose, settings: DestinationSettings) -> None:
        self._proposal, self._host = proposal, settings.host
        self._root_of, self._log_of = settings.root_of, settings.log_of
        self._files = FileReceiver([], "", "")
        self._thread = OwnThread("files")
        self._stopped = threading.Event()

    async def judge(self) -> tuple[list[m.Reason], list[str]]:
        """(what speaks against it, the files that are wanted). Only reads."""
        return await self._thread.run(self._judge)

    def _judge(self) -> tuple[list[m.Reason], list[str]]:
        proposal = self._proposal
        reasons: list[m.Reason] = []
        wanted: list[str] = []
        try:
            root = self._root_of(proposal)
            self._files = FileReceiver(proposal.trees, root, proposal.migration)
            told = [fact.value() for fact in proposal.survey.files]
            here = collect_files(told, root, stopped=self._stopped.is_set)
            taken = preflight.taken(proposal.survey.wanted_pids)
            reasons, wanted = preflight.compare(proposal, self._host, here, taken, self._log_of(proposal))
            reasons += preflight.without_congestion(proposal.survey.congestion, self._host.host)
            self._files.want(wanted)
            for tree in self._files.shared():
                remedy = "it needs no copy: leave --copy-files and --copy-path away"
                reasons.append(m.Reason(tree.path, "is the same directory on both hosts", remedy))
        except MigratorError as error:
            reasons += reasons_of(error, self._host.host)
        return reasons, wanted

    def accept(self) -> None:
        """From now on files may be written."""
        self._files.accepted = True

    async def compare(self, listed: TreeList) -> list[TreeAnswer]:
        return await self._thread.run(self._files.compare, listed)

    async def apply(self, operations: TreeOps) -> None:
        await self._thread.run(self._files.apply, operations)

    def add(self, trees: list[SyncTree]) -> None:
        self._files.add(trees)

    def stop(self) -> None:
        """End a comparison that is under way."""
        self._stopped.set()

    async def close(self, kept: bool) -> list[str]:
        """See `FileReceiver.close`."""
        self.stop()
        left = await self._thread.run(self._files.close, kept)
        await self._thread.close()
        return left


def reasons_of(error: MigratorError, about: str) -> list[m.Reason]:
    """An error as reasons of a verdict."""
    texts = getattr(error, "reasons", None) or [error.message]
    return [m.Reason(about, m.text(text), m.text(error.hint)) for text in texts]
